"""A draft model: the answer of plain decoding, whatever it drafts, whoever shares a step, however small its cache."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_executor import N_VOCAB, PACKED, STATE, FakeExecutor, expected_tokens, fake_layers, fake_pool, fake_program
from speculation_trials import free_drafts
from tiny_models import write_tiny_model

import edgellm
from edgellm.engine import draft_model as draft_model_module
from edgellm.engine import engine as engine_module
from edgellm.engine import scheduler as scheduler_module
from edgellm.engine.cache import KVCache, pool_blocks
from edgellm.engine.draft_model import LEAST_READ, DraftModel, ModelDrafter, SameIds
from edgellm.engine.drafts import CREDIT, REST, LastAnswers, RestingDrafter, Trust
from edgellm.engine.engine import Engine
from edgellm.engine.scheduler import LEAST_STEP_S, Scheduler
from edgellm.engine.speculation import Ask, DraftSource, NgramDrafter
from edgellm.formats.errors import ClosedError, NumericError
from edgellm.sampling import Sampler, SamplingParams

HANG_S = 60.0
WINDOWS = [((0,), (0,)), ((0, 40), (0,)), ((0,), (33,)), ((STATE, 0), (0, 40)), ((PACKED, 0), (PACKED, 0))]
"""Of the model and of its draft model."""


class Erring(FakeExecutor):
    """Says what the fake model of the same windows says, but for some positions."""

    right = 0.8

    def _logits(self, seen: list[list[tuple[int, int]]]) -> np.ndarray:
        logits = super()._logits(seen)
        if random.Random(str(seen[-1][-3:])).random() > self.right:
            logits = np.roll(logits, 1)
        return 30 * logits


def make_draft(
    windows: tuple[int, ...] = (0,), right: float = 0.8, n_ctx: int = 512, chunk: int = 64, n_blocks: Any = None
) -> DraftModel:
    program = fake_program(windows)
    pool = fake_pool(program, n_blocks or pool_blocks(fake_layers(windows), n_ctx, chunk, 3))
    executor = Erring(program, pool, chunk)
    executor.right = right
    return DraftModel(executor, KVCache(pool, n_ctx), lambda: SameIds(N_VOCAB))


def make_engine(
    drafts: DraftModel | None,
    windows: tuple[int, ...] = (0,),
    *,
    n_ctx: int = 512,
    chunk: int = 64,
    n_blocks: Any = None,
) -> Engine:
    program = fake_program(windows)
    pool = fake_pool(program, n_blocks or pool_blocks(fake_layers(windows), n_ctx, chunk, 3))
    return Engine(FakeExecutor(program, pool, chunk), KVCache(pool, n_ctx), (), drafts)


@pytest.fixture
def all_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    free_drafts(monkeypatch)


def prompt_of(seed: int, n: int) -> list[int]:
    return random.Random(seed).choices(range(N_VOCAB), k=n)


def sampler(prompt: Sequence[int], **options: Any) -> Sampler:
    return Sampler(SamplingParams(**({"temperature": 0.0} | options)), N_VOCAB, history=prompt)


def run(engine: Engine, prompt: list[int], n: int, **options: Any) -> list[Any]:
    return list(engine.generate(prompt, sampler(prompt, **options), max_tokens=n))


def check_empty(engine: Engine, drafts: DraftModel) -> None:
    thread = engine._thread
    if thread is not None:
        thread.join(HANG_S)
    for cache in (engine.cache, drafts.cache):
        cache.check([])
        assert not any(cache.n_used())
    assert not drafts.drafters


def test_it_is_a_source_of_drafts() -> None:
    assert isinstance(make_draft(), DraftSource)


@pytest.mark.usefixtures("all_drafts")
@pytest.mark.parametrize("windows", WINDOWS)
@pytest.mark.parametrize("chunk", [3, 64])
@pytest.mark.parametrize("right", [0.0, 0.7, 1.0])
def test_the_answer_is_that_of_plain_decoding(windows: tuple[Any, Any], chunk: int, right: float) -> None:
    prompt = prompt_of(1, 50)
    expected = expected_tokens(prompt, 60, windows[0])
    drafts = make_draft(windows[1], right)
    engine = make_engine(drafts, windows[0], chunk=chunk)
    tokens = run(engine, prompt, 60)
    assert [token.token for token in tokens] == expected
    timings = tokens[-1].timings
    assert timings.drafted_n > 0
    assert (timings.accepted_n == timings.drafted_n) == (right == 1.0 and windows[0] == windows[1])
    assert (timings.accepted_n > 0) == (right > 0 and windows[0] == windows[1]) or timings.accepted_n < 10
    check_empty(engine, drafts)
    engine.close()
    assert drafts.executor.closed == 1  # type: ignore[attr-defined]


@pytest.mark.usefixtures("all_drafts")
@pytest.mark.parametrize(
    "options",
    [{"temperature": 1.5, "top_k": 0}, {"temperature": 1.0, "n_probs": 5, "logprobs": True}, {"mirostat": 2}],
    ids=str,
)
def test_samplers_at_one_seed_choose_the_same(options: dict[str, Any]) -> None:
    prompt = prompt_of(2, 30)
    plain, drafted = (run(make_engine(drafts), prompt, 100, seed=5, **options) for drafts in (None, make_draft()))
    assert [token.choice for token in drafted] == [token.choice for token in plain]
    assert drafted[-1].timings.drafted_n > 100


@pytest.mark.usefixtures("all_drafts")
@pytest.mark.parametrize(("n_blocks", "n_draft_blocks"), [(24, 24), (13, 24), (24, 13), (13, 7)])
def test_answers_beside_each_other_are_those_they_give_alone(n_blocks: int, n_draft_blocks: int) -> None:
    """With 13 blocks three answers of 260 tokens do not fit: they preempt each other, or draft in turn."""
    prompts = [prompt_of(seed, 100) for seed in range(3)]
    expected = [expected_tokens(prompt, 160) for prompt in prompts]
    drafts = make_draft(n_ctx=320, n_blocks=(n_draft_blocks,))
    engine = make_engine(drafts, n_ctx=320, n_blocks=(n_blocks,))
    got: dict[int, list[int]] = {}
    n_drafted: list[int] = []

    def ask(i: int) -> None:
        tokens = run(engine, prompts[i], 160)
        got[i] = [token.token for token in tokens]
        n_drafted.append(tokens[-1].timings.drafted_n)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG_S)
    assert [got[i] for i in range(3)] == expected
    assert sum(n_drafted) > 100
    check_empty(engine, drafts)
    engine.close()


@pytest.mark.usefixtures("all_drafts")
def test_callers_that_leave_and_answers_that_are_preempted_leave_nothing_behind() -> None:
    prompt = prompt_of(5, 70)
    expected, drafts = expected_tokens(prompt, 150), make_draft()
    engine = make_engine(drafts)
    answer, got = engine.generate(prompt, sampler(prompt), max_tokens=150), []
    for i, token in enumerate(answer):
        got.append(token.token)
        if i % 20 == 10:
            engine.call(lambda cache, executor: [engine.scheduler.preempt(one) for one in engine.scheduler.requests])
    assert got == expected
    answer = engine.generate(prompt, sampler(prompt), max_tokens=150)
    assert [next(answer).token for _ in range(30)] == expected[:30]
    answer.close()
    check_empty(engine, drafts)
    drafts.executor.batches.clear()  # type: ignore[attr-defined]
    run(engine, [*prompt, *expected[:20], 5], 4)
    assert max(drafts.executor.batches) < 64, "what was read of a prompt is known"  # type: ignore[attr-defined]
    engine.close()


@pytest.mark.usefixtures("all_drafts")
def test_a_draft_model_that_fails_is_given_up_and_the_answers_go_on() -> None:
    prompt, told = prompt_of(7, 20), list[str]()
    drafts = make_draft()
    drafts.tell = told.append
    engine = make_engine(drafts)
    drafts.executor.fail = ClosedError("the model is closed")  # type: ignore[attr-defined]
    assert [token.token for token in run(engine, prompt, 60)] == expected_tokens(prompt, 60)
    assert told == ["There are no more drafts: the model is closed"]
    assert [token.token for token in run(engine, prompt, 60)] == expected_tokens(prompt, 60)
    check_empty(engine, drafts)
    engine.close()
    assert drafts.executor.closed == 1  # type: ignore[attr-defined]


@pytest.mark.usefixtures("all_drafts")
def test_a_text_of_which_a_draft_model_makes_nan_goes_on_without_and_the_next_has_drafts() -> None:
    prompt, told = prompt_of(7, 20), list[str]()
    drafts = make_draft()
    drafts.tell = told.append
    engine = make_engine(drafts)
    drafts.executor.fail = NumericError("a logit is NaN")  # type: ignore[attr-defined]
    for seed, is_drafted in ((7, False), (8, True)):
        prompt = prompt_of(seed, 20)
        tokens = run(engine, prompt, 60)
        assert [token.token for token in tokens] == expected_tokens(prompt, 60)
        assert (tokens[-1].timings.drafted_n > 0) == is_drafted
    assert not told
    check_empty(engine, drafts)
    engine.close()


def test_the_failure_of_a_draft_model_is_told_after_any_answer(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "model.gguf", "llama", n_layer=1)
    with edgellm.load(path, n_ctx=256, n_threads=1, draft=path) as llm:
        ask = partial(llm.generate, temperature=0, max_tokens=30, ignore_eos=True)
        ask([11, 12, 13])
        assert llm.take_notices() == []
        llm.engine.scheduler.source.close()  # type: ignore[union-attr]
        llm.engine.scheduler.source._is_over = False  # type: ignore[union-attr]
        ask([14, 15, 16])
        (told,) = llm.take_notices()
        assert told.startswith("There are no more drafts: ") and llm.take_notices() == []


@pytest.mark.usefixtures("all_drafts")
def test_a_text_that_the_draft_model_cannot_hold_goes_on_without() -> None:
    prompt = prompt_of(8, 100)
    drafts = make_draft(n_ctx=128)
    engine = make_engine(drafts)
    tokens = run(engine, prompt, 120)
    assert [token.token for token in tokens] == expected_tokens(prompt, 120)
    assert tokens[-1].timings.drafted_n > 0
    drafts._reading = lambda: SameIds(max(prompt))  # and one that has an id it does not know
    assert run(engine, prompt, 50)[-1].timings.drafted_n == 0
    check_empty(engine, drafts)
    engine.close()


# ---- how much --------------------------------------------------------------------------------------------------------


def drafted(drafts: DraftModel, text: list[int], n: int = 15, plain_s: float = 1e9) -> list[int]:
    drafter = drafts()
    made = drafts.draft_all([Ask(drafter, text, n)], plain_s)[0]
    drafts.release(drafter)
    return list(made.tokens)


def test_a_draft_is_as_long_as_its_chances_are_worth_a_step() -> None:
    text, drafts = prompt_of(3, 40), make_draft(right=1.0)
    whole = drafted(drafts, text)
    assert whole == expected_tokens(text, 15)[: len(whole)]
    assert len(drafted(drafts, text, 4)) <= 4
    drafts._step_s = 1.0
    assert len(drafted(drafts, text, plain_s=1.0)) == 1  # a step of its own costs one of the model


def test_a_text_is_read_in_pieces_before_it_is_drafted() -> None:
    drafts, text = make_draft(chunk=64), prompt_of(4, 200)
    drafter = drafts()
    made = [drafts.draft_all([Ask(drafter, text, 8)], 1e9)[0] for _ in range(4)]
    assert [bool(draft.tokens) for draft in made] == [False, False, False, True]
    assert [draft.tried for draft in made] == [False, False, False, True]
    assert [draft.read_s > 0 for draft in made] == [True, True, True, False]


def test_the_first_text_is_read_in_small_pieces_until_it_is_known_what_they_take() -> None:
    drafts, text = make_draft(chunk=512), prompt_of(4, 400)
    drafter = drafts()
    for _ in range(2):
        drafts.draft_all([Ask(drafter, text, 8)], 1e9)
    sizes = drafts.executor.batches  # type: ignore[attr-defined]
    assert sizes[0] == LEAST_READ < sizes[1]


def test_what_is_read_of_a_prompt_counts_among_what_drafts_have_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    prompt, drafts = prompt_of(9, 400), make_draft(chunk=64)
    monkeypatch.setattr(RestingDrafter, "settle", lambda self, gain: None)
    engine = make_engine(drafts)
    drafts.executor.pause_s = 0.02  # type: ignore[attr-defined]
    timings = run(engine, prompt, 5)[-1].timings  # it ends before its prompt is read
    assert timings.drafted_n == 0 and timings.gained_n < -1
    engine.close()


def test_a_prompt_whose_reading_did_not_pay_is_not_the_last_one_to_be_read_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(RestingDrafter, "settle", lambda self, gain: None)
    drafts = make_draft(chunk=64)
    engine, read = make_engine(drafts), drafts.executor.batches  # type: ignore[attr-defined]
    assert run(engine, prompt_of(9, 400), 5)[-1].timings.gained_n < 0 < len(read)  # it ends before its prompt is read
    n = len(read)
    assert run(engine, prompt_of(10, 400), 15)[-1].timings.gained_n == 0 and len(read) == n
    assert run(engine, prompt_of(11, 400), 60)[-1].timings.drafted_n > 0, "a longer one may pay"
    engine.close()


def test_answers_begin_without_drafts_for_longer_the_more_often_the_last_ones_did_not_pay() -> None:
    last, rests = LastAnswers(), list[int]()

    def over(gain: float) -> None:
        drafter = last.begun(RestingDrafter)
        drafter.charge(-gain)
        last.ended(drafter)
        rests.append(last.rest)

    for _ in range(5):
        over(-1.0)
    assert rests == [16, 64, 256, 1024, 1024]
    over(0.0)  # it ended before it began to draft
    assert rests[-1] == 896
    drafter = last.begun(RestingDrafter)
    assert not drafter.wants([0] * 100) and not drafter.wants([0] * 995) and drafter.wants([0] * 996)
    for _ in range(6):
        over(2.0)
    assert rests[-1] == 0 and last.begun(RestingDrafter).wants([0])


def test_drafts_that_do_not_pay_rest_for_longer_and_longer() -> None:
    drafter = ModelDrafter(SameIds(N_VOCAB), CREDIT, Trust())
    rests, n, start = [], 0, None
    while n < 3000:
        n += 1
        if drafter.wants([0] * n):
            if start is not None and n - start > 1:
                rests.append(n - start)
            start = n
            drafter.settle(-1.0)
    assert rests[0] == REST[0] and max(rests) == REST[1] and sorted(rests) == rests
    drafter.settle(1.0)
    assert drafter._rest < REST[1]


def test_chances_are_what_was_borne_out() -> None:
    trust = Trust()
    assert trust.chance(0.5) == 0.5 and trust.chance(2.0) == 1.0
    for _ in range(40):
        trust.expect(1, [1, 2, 3], [0.9, 0.9, 0.9])
        trust.look([0, 1, 5, 3])  # the second is wrong, and the third says nothing
    assert 0.4 < trust.chance(0.9) < 0.65
    assert trust.inherited().chance(0.9) == trust.chance(0.9)


def test_time_that_drafts_take_is_no_part_of_what_a_step_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    drafts, now, found = make_draft(right=0.0), [1.0], list[float]()
    engine = make_engine(drafts)
    for module in (engine_module, scheduler_module, draft_model_module):
        monkeypatch.setattr(module, "perf_counter", lambda: now[0])
    for executor, seconds in ((engine.executor, 0.001), (drafts.executor, 0.02)):

        def timed(*args: Any, run: Any = executor.run, seconds: float = seconds) -> Any:
            now[0] += seconds
            return run(*args)

        executor.run = timed  # type: ignore[method-assign]
    note = engine.scheduler.note

    def noted(*args: Any, **named: Any) -> None:
        note(*args, **named)
        found.extend(engine.scheduler._decode_s.values())

    engine.scheduler.note = noted  # type: ignore[method-assign]
    timings = run(engine, prompt_of(9, 20), 200)[-1].timings
    assert timings.accepted_n < timings.drafted_n < 40
    assert timings.gained_n < 0
    assert max(found) == pytest.approx(0.001)
    engine.close()


def test_time_of_drafts_is_taken_once_from_that_of_runs_without_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With drafters that think for longer than a step of this model takes, and then have no idea."""
    path, found, note = write_tiny_model(tmp_path / "model.gguf", "llama", n_layer=1), list[float](), Scheduler.note

    def noted(self: Scheduler, *args: Any, **named: Any) -> None:
        note(self, *args, **named)
        found.extend(self._decode_s.values())

    def think(self: NgramDrafter, tokens: Sequence[int], n: int) -> list[int]:
        time.sleep(0.003)
        return []

    monkeypatch.setattr(Scheduler, "note", noted)
    monkeypatch.setattr(NgramDrafter, "draft", think)
    for n_together in (1, 3):
        found.clear()
        with edgellm.load(path, n_ctx=256, n_threads=1, speculate="ngram", n_parallel=3) as llm:
            ask = partial(llm.generate, temperature=0, max_tokens=60, ignore_eos=True)
            with ThreadPoolExecutor(n_together) as pool:
                list(pool.map(ask, [[11 + i, 12, 13] for i in range(n_together)]))
        assert min(found) > LEAST_STEP_S


@pytest.mark.parametrize(("head_dim", "is_typed"), [(32, True), (16, False)])
def test_what_drafts_keeps_keys_and_values_as_the_model_does_where_its_heads_divide(
    head_dim: int, is_typed: bool, tmp_path: Path
) -> None:
    path = write_tiny_model(tmp_path / "model.gguf", "llama", n_layer=2, head_dim=32)
    draft = write_tiny_model(tmp_path / "draft.gguf", "llama", n_layer=1, head_dim=head_dim)
    types, needs = {"cache_type_k": "q8_0", "cache_type_v": "q4_0"}, list[int]()
    for given in ({}, types):
        with edgellm.load(path, n_ctx=512, n_threads=1, draft=draft, **given) as llm:  # type: ignore[arg-type]
            needs.append(llm.memory_estimate.draft)
            layer = llm.engine.scheduler.source.executor.program.cache_layers[0]  # type: ignore[union-attr]
            plain = {"cache_type_k": "f16", "cache_type_v": "f16"}
            assert {f"cache_type_{of}": getattr(layer, f"type_{of}") for of in "kv"} == (
                given if given and is_typed else plain
            )
            llm.generate([11, 12, 13] * 9, temperature=0, max_tokens=20, ignore_eos=True)
            assert not llm.take_notices()
    assert (needs[1] < needs[0]) == is_typed
