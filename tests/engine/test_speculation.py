"""Speculative decoding: the answer of plain decoding to the last bit, whatever is drafted and whoever shares a step."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fake_executor import (
    N_VOCAB,
    PACKED,
    STATE,
    FakeExecutor,
    expected_logits,
    expected_tokens,
    fake_layers,
    fake_pool,
    fake_program,
)
from speculation_trials import Oracle
from test_engine import HANG_S, Greedy, prompt_of, wait_until_idle

from edgellm.engine import engine as engine_module
from edgellm.engine.cache import KVCache, pool_blocks
from edgellm.engine.engine import Engine
from edgellm.engine.scheduler import Scheduler
from edgellm.engine.speculation import DRAFTERS, MAX_DRAFT, Drafter, NgramDrafter
from edgellm.formats.errors import NumericError
from edgellm.kernels.program import Batch
from edgellm.sampling import Sampler, SamplingParams

WINDOWS = [(0,), (0, 40), (33,), (STATE, 0), (PACKED, 0), (STATE, PACKED, 0)]


class Scripted(Greedy):
    """The tokens of a script, whatever the logits are; these are kept."""

    def __init__(self, script: Sequence[int]) -> None:
        self.script = script
        self.seen: list[np.ndarray] = []
        self.n = 0

    def sample(self, logits: np.ndarray) -> SimpleNamespace:
        self.seen.append(logits.copy())
        return SimpleNamespace(token=self.script[self.n], logprob=None, top=None)

    def accept(self, token: int) -> None:
        self.n += 1


def oracle(texts: Sequence[Sequence[int]], right: float = 0.8, seed: int = 0) -> Oracle:
    return Oracle(N_VOCAB, texts, right, seed)


def make_engine(
    drafter: Callable[[], Drafter] | None,
    windows: tuple[int, ...] = (0,),
    *,
    n_ctx: int = 512,
    chunk: int = 64,
    n_blocks: Any = None,
    eog_ids: Sequence[int] = (),
) -> Engine:
    program = fake_program(windows)
    pool = fake_pool(program, n_blocks or pool_blocks(fake_layers(windows), n_ctx, chunk, 3))
    return Engine(FakeExecutor(program, pool, chunk), KVCache(pool, n_ctx), eog_ids, drafter)


@pytest.fixture
def all_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts of any length, as if they cost nothing."""
    monkeypatch.setattr(Scheduler, "_tokens_per_s", lambda self, n: n)


def run(engine: Engine, prompt: list[int], n: int | None, sampler: Any = None, **options: Any) -> list[Any]:
    return list(engine.generate(prompt, sampler or Greedy(), max_tokens=n, **options))


def together(*work: Callable[[], None]) -> None:
    threads = [threading.Thread(target=function) for function in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG_S)
        assert not thread.is_alive()


def test_a_rejected_token_that_is_looked_at_fails_in_the_fake_executor() -> None:
    program = fake_program()
    executor = FakeExecutor(program, fake_pool(program, (1,)))
    executor.run(Batch.single(program, range(10)))
    executor.run(Batch.single(program, [50], 5))  # 5 to 9 were rejected
    executor.run(Batch.single(program, [60, 70], 6))
    with pytest.raises(AssertionError, match=r"position 8 .* rejected"):
        executor.run(Batch.single(program, [80], 10))


@pytest.mark.usefixtures("all_drafts")
@pytest.mark.parametrize("windows", WINDOWS)
@pytest.mark.parametrize("chunk", [1, 3, 64])
@pytest.mark.parametrize("right", [0.0, 0.5, 0.9, 1.0])
def test_the_answer_is_that_of_plain_decoding(windows: tuple[int, ...], chunk: int, right: float) -> None:
    prompt = prompt_of(1, 50)
    expected = expected_tokens(prompt, 120, windows)
    engine = make_engine(lambda: oracle([prompt + expected], right), windows, chunk=chunk)
    tokens = run(engine, prompt, 120)
    assert [token.token for token in tokens] == expected
    assert [token.timings.generation_n for token in tokens] == list(range(1, 121))
    assert [token.finish_reason for token in tokens] == [None] * 119 + ["length"]
    timings = tokens[-1].timings
    assert (timings.drafted_n > 0) == (chunk > 1)
    assert timings.accepted_n <= timings.drafted_n
    assert (timings.accepted_n == timings.drafted_n) == (right == 1.0 or chunk == 1)
    assert timings.as_dict()["accepted_n"] == timings.accepted_n
    engine.close()
    engine.cache.check([])


@pytest.mark.usefixtures("all_drafts")
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0, "n_probs": 3, "logprobs": True},
        {"temperature": 1.5, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
        {"temperature": 1.0, "n_probs": 5, "logprobs": True, "sampler_trace": True},
        {"temperature": 1.0, "repeat_penalty": 1.3, "presence_penalty": 0.2},
        {"temperature": 1.0, "dry_multiplier": 0.8, "xtc_probability": 0.5},
        {"mirostat": 1},
        {"mirostat": 2},
        {"adaptive_target": 0.4},
    ],
    ids=str,
)
def test_samplers_at_one_seed_choose_the_same_with_the_same_log_probabilities(options: dict[str, Any]) -> None:
    prompt = prompt_of(2, 30)

    def choices(drafter: Callable[[], Drafter] | None) -> list[Any]:
        engine = make_engine(drafter)
        sampler = Sampler(SamplingParams(seed=5, **options), N_VOCAB, history=prompt, token_bytes=lambda i: b"%d" % i)
        tokens = run(engine, prompt, 100, sampler)
        engine.close()
        assert (drafter is not None) == (tokens[-1].timings.drafted_n > 100)
        return [token.choice for token in tokens]

    plain = choices(None)
    assert choices(lambda: oracle([prompt + [choice.token for choice in plain]])) == plain


@pytest.mark.usefixtures("all_drafts")
@pytest.mark.parametrize("n", [1, 2, 3, 17, 40])
def test_limits_the_end_of_the_context_and_stop_ids_hold_inside_a_draft(n: int) -> None:
    prompt = prompt_of(3, 512 - n)
    expected = expected_tokens(prompt, n + 1)
    engine = make_engine(lambda: oracle([prompt + expected_tokens(prompt, 99)], 1.0))
    for limit, length, reason in ((None, n + 1, "context_full"), (n, n, "length")):
        tokens = run(engine, prompt, limit)
        assert [token.token for token in tokens] == expected[:length]
        assert [token.finish_reason for token in tokens] == [None] * (length - 1) + [reason]
    stop = expected[-1]
    tokens = run(engine, prompt, None, stop_ids=[stop])
    assert [token.token for token in tokens] == expected[: expected.index(stop) + 1]
    assert tokens[-1].finish_reason == "stop"
    engine.close()


@pytest.mark.usefixtures("all_drafts")
@pytest.mark.parametrize("windows", WINDOWS)
def test_the_prefix_cache_holds_the_answer_and_nothing_that_was_rejected(windows: tuple[int, ...]) -> None:
    prompt = prompt_of(4, 40)
    expected = expected_tokens(prompt, 100, windows)
    engine = make_engine(lambda: oracle([prompt + expected], 0.6), windows)
    assert [token.token for token in run(engine, prompt, 100)] == expected
    wait_until_idle(engine)
    engine.cache.check([])
    engine._drafter = None
    for n in (139, 130, 97, 60):  # from the end, where the window still is
        tokens = run(engine, [*(prompt + expected)[:n], 5], 20)
        assert [t.token for t in tokens] == expected_tokens([*(prompt + expected)[:n], 5], 20, windows)
        assert tokens[0].timings.reused_n == n or windows != (0,)
    for wrong in ((expected[20] + 1) % N_VOCAB, (expected[60] + 1) % N_VOCAB):  # a token that a draft had there
        n = 60 if wrong == (expected[20] + 1) % N_VOCAB else 100
        other = [*(prompt + expected)[:n], wrong]
        assert [t.token for t in run(engine, other, 20)] == expected_tokens(other, 20, windows)
    engine.close()


@pytest.mark.usefixtures("all_drafts")
@pytest.mark.parametrize("windows", WINDOWS)
@pytest.mark.parametrize("n_blocks", [24, 13])
def test_answers_beside_each_other_are_those_they_give_alone(windows: tuple[int, ...], n_blocks: int) -> None:
    """With 13 blocks three answers of 260 tokens do not fit: they preempt each other."""
    prompts = [prompt_of(seed, 100) for seed in range(3)]
    expected = [expected_tokens(prompt, 160, windows) for prompt in prompts]
    texts = [prompt + answer for prompt, answer in zip(prompts, expected, strict=True)]
    engine = make_engine(lambda: oracle(texts, 0.7), windows, n_ctx=320, n_blocks=(n_blocks,) * len(windows))
    got: dict[int, list[int]] = {}

    def ask(i: int) -> None:
        got[i] = [token.token for token in run(engine, prompts[i], 160)]

    together(*(lambda i=i: ask(i) for i in range(3)))
    assert [got[i] for i in range(3)] == expected
    wait_until_idle(engine)
    engine.cache.check([])
    engine.close()


@pytest.mark.usefixtures("all_drafts")
def test_an_answer_that_is_preempted_between_two_drafts_goes_on_as_before() -> None:
    prompt = prompt_of(5, 70)
    expected = expected_tokens(prompt, 150)
    engine = make_engine(lambda: oracle([prompt + expected]))
    answer = engine.generate(prompt, Greedy(), max_tokens=150)
    got = []
    for i, token in enumerate(answer):
        got.append(token.token)
        if i % 20 == 10:
            keep = i % 40 == 10
            engine.call(lambda cache, executor, keep=keep: [
                engine.scheduler.preempt(request, keep=keep) for request in engine.scheduler.requests
            ])  # fmt: skip
    assert got == expected
    engine.close()


@pytest.mark.usefixtures("all_drafts")
@pytest.mark.parametrize("n", [1, 2, 5, 30])
def test_a_caller_that_leaves_in_the_middle_leaves_nothing_behind(n: int) -> None:
    prompt = prompt_of(6, 40)
    expected = expected_tokens(prompt, 200)
    engine = make_engine(lambda: oracle([prompt + expected]))
    answer, cancel = engine.generate(prompt, Greedy(), max_tokens=200), threading.Event()
    assert [next(answer).token for _ in range(n)] == expected[:n]
    answer.close()
    reasons = []
    for token in engine.generate(prompt, Greedy(), max_tokens=200, cancel=cancel):
        reasons.append(token.finish_reason)
        if len(reasons) == n:
            cancel.set()
    assert reasons == [None] * n + ["cancelled"]
    wait_until_idle(engine)
    assert engine.cache.n_used() == (0,)
    engine.cache.check([])
    known = run(engine, prompt + expected[:n], 1)[0]
    assert known.token == expected[n]
    assert known.timings.reused_n >= 40 + n - 1
    engine.close()


@pytest.mark.usefixtures("all_drafts")
def test_nan_behind_a_token_that_was_only_guessed_is_nobodys_error() -> None:
    poison = 96
    prompt = next(p for p in (prompt_of(s, 20) for s in range(99)) if poison not in p + expected_tokens(p, 60))
    expected = expected_tokens(prompt, 60)

    class Poisoner(Oracle):
        def draft(self, tokens: Sequence[int], n: int) -> list[int]:
            return [*super().draft(tokens, min(n, 3)), poison][:n]

    engine = make_engine(lambda: Poisoner(N_VOCAB, [prompt + expected], 1.0))
    engine.executor.poisonous = poison
    assert [token.token for token in run(engine, prompt, 60)] == expected
    engine.executor.poison = True
    with pytest.raises(NumericError):
        run(engine, prompt, 60)
    engine.close()


@pytest.mark.usefixtures("all_drafts")
def test_a_sampler_that_fails_inside_a_draft_fails_after_the_tokens_before_it() -> None:
    prompt = prompt_of(7, 20)
    expected = expected_tokens(prompt, 60)
    sampler = Scripted(expected[:41])  # an IndexError behind them
    engine = make_engine(lambda: oracle([prompt + expected], 1.0))
    got = []
    with pytest.raises(IndexError):
        for token in engine.generate(prompt, sampler, max_tokens=60):
            got.append(token.token)
    assert got == expected[:41]
    assert [token.token for token in run(engine, prompt, 60)] == expected
    engine.close()


def test_an_answer_with_a_hook_is_not_drafted() -> None:
    engine = make_engine(lambda: oracle([prompt_of(8, 20) + expected_tokens(prompt_of(8, 20), 30)], 1.0))
    tokens = run(engine, prompt_of(8, 20), 30, hook=lambda i, op, read: None)
    assert [token.token for token in tokens] == expected_tokens(prompt_of(8, 20), 30)
    assert tokens[-1].timings.drafted_n == 0
    engine.close()


@pytest.mark.usefixtures("all_drafts")
@pytest.mark.parametrize("seed", range(3))
def test_clients_that_come_and_go_get_the_answers_that_they_would_get_alone(seed: int) -> None:
    windows = (0, 40)
    texts = [p + expected_tokens(p, 30, windows) for p in (prompt_of(s, n) for s in range(3) for n in (1, 9, 40, 90))]
    engine = make_engine(lambda: oracle(texts, 0.7, seed), windows, n_ctx=256, n_blocks=(16, 16))
    wrong: list[object] = []

    def client(number: int) -> None:
        rng = random.Random(seed * 100 + number)
        for _ in range(8):
            text = rng.choice(texts)
            n, prompt = rng.randint(1, 30), text[:-30]
            leave = rng.randint(0, n) if rng.random() < 0.4 else None
            answer: list[int] = []
            for token in engine.generate(prompt, Greedy(), max_tokens=n):
                if len(answer) == leave:
                    break
                answer.append(token.token)
            if answer != text[-30:][: len(answer)]:
                wrong.append((number, prompt))

    together(*(lambda i=i: client(i) for i in range(5)))
    assert not wrong
    wait_until_idle(engine)
    engine.cache.check([])
    assert engine.cache.n_used() == (0, 0)
    engine.close()


# ---- prompt lookup ---------------------------------------------------------------------------------------------------


@pytest.fixture
def clocked(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[int], float]], Engine]]:
    """clocked(seconds of a step of n tokens): an engine with prompt lookup and a clock of its own."""
    made: list[Engine] = []

    def make(seconds: Callable[[int], float]) -> Engine:
        engine, now = make_engine(NgramDrafter, n_ctx=1024), [1.0]
        plain_run = engine.executor.run

        def timed(batch: Batch, hook: Any = None) -> np.ndarray:
            now[0] += seconds(len(batch))
            return plain_run(batch, hook)

        engine.executor.run = timed  # type: ignore[method-assign]
        monkeypatch.setattr(engine_module, "perf_counter", lambda: now[0])
        made.append(engine)
        return engine

    yield make
    for engine in made:
        engine.close()


def cheap(n: int) -> float:
    """What a step costs where its tokens cost little."""
    return 1 + 0.1 * n


def usual(n: int) -> float:
    """And where they cost as much as on CPUs."""
    return 0.5 + 0.5 * n


def dear(n: int) -> float:
    """And more than steps of their own."""
    return n**1.2


def drafted(engine: Engine, prompt: list[int], script: list[int]) -> tuple[int, int, int]:
    """Tokens drafted and accepted, and steps taken; every logit is compared."""
    engine.executor.batches.clear()
    sampler = Scripted(script)
    tokens = run(engine, prompt, len(script), sampler)
    assert [token.token for token in tokens] == script
    for i in range(0, len(script), 7):
        np.testing.assert_array_equal(sampler.seen[i], expected_logits(prompt + script[:i]))
    return tokens[-1].timings.drafted_n, tokens[-1].timings.accepted_n, len(engine.executor.batches)


def test_a_text_that_repeats_the_prompt_takes_few_steps(clocked: Callable[..., Engine]) -> None:
    prompt = prompt_of(1, 300)
    n_drafted, n_accepted, n_steps = drafted(clocked(cheap), prompt, prompt[50:250])
    assert n_accepted > 0.9 * n_drafted
    assert n_steps < 5 + 30


def test_a_text_that_repeats_itself_takes_few_steps(clocked: Callable[..., Engine]) -> None:
    n_drafted, n_accepted, n_steps = drafted(clocked(cheap), prompt_of(1, 30), [1, 2, 3, 4] * 40)
    assert n_accepted == n_drafted > 120
    assert n_steps < 30


def test_lookup_rests_where_drafts_cost_more_than_steps(clocked: Callable[..., Engine]) -> None:
    prompt = prompt_of(1, 300)
    n_drafted, _, n_steps = drafted(clocked(dear), prompt, prompt[50:250])
    assert n_drafted <= 3 * MAX_DRAFT
    assert n_steps >= 150


def test_lookup_rests_where_its_drafts_are_wrong_and_wakes_where_the_text_repeats(
    clocked: Callable[..., Engine],
) -> None:
    noise = random.Random(1).choices(range(6), k=400)  # every pair was there before, and says nothing
    n_drafted, n_accepted, _ = drafted(clocked(usual), [0], noise)
    assert n_accepted < 0.5 * n_drafted < 20
    n_drafted, n_accepted, _ = drafted(clocked(usual), [0], noise + noise)
    assert n_accepted > 250


def test_a_text_without_repetition_is_not_drafted(clocked: Callable[..., Engine]) -> None:
    assert drafted(clocked(cheap), [0], list(range(1, N_VOCAB)))[0] == 0


@pytest.mark.parametrize(
    ("tokens", "n", "draft"),
    [
        ([], 5, []),
        ([1], 5, []),
        ([1, 2], 5, []),
        ([1, 2, 1, 2], 5, [1, 2]),
        ([1, 2, 3, 4, 1, 2], 5, [3, 4]),
        ([1, 2, 3, 4, 1, 2], 1, [3]),
        ([1, 2, 3, 4, 1, 2], 0, []),
        ([9, 1, 2, 3, 4, 9, 1, 2], 5, [3, 4, 9]),
        ([1, 2, 5, 1, 2, 6, 1, 2], 5, [6, 1]),
        ([7, 7, 7, 7, 7], 4, [7, 7, 7]),
    ],
)
def test_a_draft_is_what_followed_last_and_as_long_as_the_match(tokens: list[int], n: int, draft: list[int]) -> None:
    assert DRAFTERS["ngram"]().draft(tokens, n) == draft
    grown = NgramDrafter()
    for end in range(len(tokens)):
        grown.draft(tokens[:end], n)
    assert grown.draft(tokens, n) == draft


def test_drafts_are_short_until_some_have_paid_and_after_a_long_one_that_did_not() -> None:
    drafter, text = NgramDrafter(), [*range(20), 50, *range(12)]
    short, long = [12, 13, 14], list(range(12, 20))
    assert drafter.draft(text, 8) == short
    for gain, draft in ((1.5, short), (1.5, long), (9.0, long), (-1.0, long), (-6.0, short), (-6.0, short)):
        drafter.settle(gain)
        assert drafter.draft(text, 8) == draft
    drafter.settle(-6.0)
    assert drafter.draft(text, 8) == []


def test_a_run_without_python_is_as_long_behind_a_draft_as_behind_other_steps() -> None:
    engine = make_engine(None)
    line, request = engine.scheduler, engine._generation(prompt_of(1, 20), Greedy())
    line.add(request)
    (part,) = line.schedule([request], lambda request, error: pytest.fail(str(error)))
    engine.cache.commit(part.sequence, part.tokens)
    line.note([part], [20], 0.1)
    for n, seconds in ((1, 0.002), (4, 0.005)):
        part = part._replace(tokens=[1] * n, n_outputs=n, n_drafted=n - 1)
        line.note([part], [n], seconds)
        assert line.run_length(part._replace(tokens=[1], n_outputs=1, n_drafted=0)) == 12
    engine.close()
