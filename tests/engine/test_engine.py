"""The engine against an executor that notices every paging mistake."""

from __future__ import annotations

import asyncio
import gc
import random
import threading
import time
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

from edgellm.engine import engine as engine_module
from edgellm.engine import scheduler
from edgellm.engine.cache import KVCache, pool_blocks
from edgellm.engine.engine import Engine
from edgellm.engine.requests import GenerationRequest
from edgellm.engine.scheduler import PROMPT_TOKENS_BESIDE
from edgellm.formats.errors import ClosedError, ContextFullError, NumericError, ParameterError
from edgellm.kernels.kv import BLOCK_TOKENS
from edgellm.kernels.program import Batch

HANG_S = 60.0
WINDOWS = [(0,), (0, 40), (64,), (STATE,), (STATE, 0), (PACKED, 0), (STATE, PACKED, 0)]


class Greedy:
    """The most likely token."""

    short = None
    mask = None
    begins = ()

    def __init__(self) -> None:
        self.accepted: list[int] = []

    def sample(self, logits: np.ndarray) -> SimpleNamespace:
        return SimpleNamespace(token=int(logits.argmax()), logprob=None, top=None)

    def accept(self, token: int) -> None:
        self.accepted.append(token)


class Foresight(Oracle):
    """Knows how any text of a fake executor goes on, and errs now and then."""

    def __init__(self, windows: tuple[int, ...]) -> None:
        super().__init__(N_VOCAB)
        self.windows = windows

    def known(self, tokens: Sequence[int], n: int) -> list[int]:
        return expected_tokens(list(tokens), min(n, 4), self.windows)


def make_engine(
    windows: tuple[int, ...] = (0,), n_ctx: int = 512, chunk: int = 16, eog_ids=(), n_blocks=None, drafts: bool = False
) -> Engine:
    windows = tuple(sorted(windows))
    program = fake_program(windows)
    pool = fake_pool(program, n_blocks or pool_blocks(fake_layers(windows), n_ctx, chunk))
    drafter = (lambda: Foresight(windows)) if drafts else None
    return Engine(FakeExecutor(program, pool, chunk), KVCache(pool, n_ctx), eog_ids, drafter)


@pytest.fixture
def engine(drafts: bool) -> Iterator[Engine]:
    made = make_engine(drafts=drafts)
    yield made
    made.close()


def prompt_of(seed: int, n: int) -> list[int]:
    return random.Random(seed).choices(range(N_VOCAB), k=n)


def run(engine: Engine, prompt: list[int], n: int, **options) -> list[int]:
    return [step.token for step in engine.generate(prompt, Greedy(), max_tokens=n, **options) if step.token is not None]


def wait_until_idle(engine: Engine) -> None:
    """Until the engine has let go of every request."""
    until(lambda: engine._thread is None)


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + HANG_S
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.002)


@pytest.mark.parametrize("windows", WINDOWS)
@pytest.mark.parametrize("chunk", [1, 7, 64, 512])
@pytest.mark.parametrize("n", [1, 2, 64, 65, 150])
def test_chunked_prefill_equals_one_prefill(windows: tuple[int, ...], chunk: int, n: int, drafts: bool) -> None:
    engine = make_engine(windows, chunk=chunk, drafts=drafts)
    assert run(engine, prompt_of(n, n), 10) == expected_tokens(prompt_of(n, n), 10, windows)
    engine.close()


@pytest.mark.parametrize("windows", WINDOWS)
def test_the_second_turn_computes_only_what_is_new(windows: tuple[int, ...], drafts: bool) -> None:
    engine = make_engine(windows, drafts=drafts)
    history: list[int] = []
    for turn in range(4):
        known = len(history)
        history += prompt_of(turn, 30)
        steps = list(engine.generate(history, Greedy(), max_tokens=20))
        timings = steps[-1].timings
        assert timings.prompt_n == len(history)
        # the last token of a reply was sampled but never computed
        assert timings.reused_n == max(0, known - 1)
        assert timings.computed_n == timings.prompt_n - timings.reused_n
        reply = [step.token for step in steps]
        assert reply == expected_tokens(history, 20, windows)
        history += reply
        wait_until_idle(engine)
    engine.close()


@pytest.mark.parametrize("seed", range(9))
def test_random_histories_give_the_cold_answer(seed: int, drafts: bool) -> None:
    rng = random.Random(seed)
    kinds = [(0,), (0, 40), (64,), (0, 33, 128), (STATE,), (STATE, 0, 40)]
    windows = rng.choice(kinds) if seed < 6 else [(PACKED, 0), (PACKED, 0, 40), (STATE, PACKED, 0)][seed - 6]
    engine = make_engine(windows, n_ctx=rng.choice([100, 256]), chunk=rng.choice([3, 32, 64]), drafts=drafts)
    histories: list[list[int]] = [[]]
    for _ in range(25):
        history = list(rng.choice(histories))
        history = history[: rng.randint(0, len(history))] + rng.choices(range(N_VOCAB), k=rng.randint(1, 40))
        history = history[: engine.n_ctx]
        n = rng.randint(1, 20)
        reply = run(engine, history, n)
        assert reply == expected_tokens(history, min(n, engine.n_ctx - len(history) + 1), windows)
        histories.append(history + reply)
    wait_until_idle(engine)
    engine.cache.check([])
    engine.close()


@pytest.mark.parametrize("windows", [(0,), (0, 40), (STATE, 0), (PACKED, 0)])
def test_interleaved_answers_do_not_disturb_each_other(windows: tuple[int, ...], drafts: bool) -> None:
    engine = make_engine(windows, n_ctx=256, n_blocks=(40,) * len(windows), drafts=drafts)
    prompts = [prompt_of(1, 40) + prompt_of(s, 10) for s in range(5)]
    iterators = [engine.generate(prompt, Greedy(), max_tokens=50) for prompt in prompts]
    answers: list[list[int]] = [[] for _ in prompts]
    for _ in range(50):
        for answer, iterator in zip(answers, iterators, strict=True):
            answer.append(next(iterator).token)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer == expected_tokens(prompt, 50, windows)
    engine.close()


def test_an_answer_inside_the_loop_over_another_does_not_hang(engine: Engine) -> None:
    outer = []
    for step in engine.generate(prompt_of(1, 400), Greedy(), max_tokens=5):
        outer.append(step.token)
        # together they need more blocks than there are
        assert run(engine, prompt_of(2, 300), 3) == expected_tokens(prompt_of(2, 300), 3)
    assert outer == expected_tokens(prompt_of(1, 400), 5)


def test_threads_that_need_more_blocks_than_there_are_all_get_their_answers(engine: Engine) -> None:
    prompts = [prompt_of(seed, 300) for seed in range(6)]
    answers: dict[int, list[int]] = {}

    def work(i: int) -> None:
        answers[i] = run(engine, prompts[i], 30)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG_S)
    assert answers == {i: expected_tokens(prompt, 30) for i, prompt in enumerate(prompts)}
    wait_until_idle(engine)
    engine.cache.check([])


@pytest.mark.parametrize(("n", "answer"), [(510, 3), (511, 2), (512, 1)])
def test_the_answer_ends_with_the_context(engine: Engine, n: int, answer: int) -> None:
    steps = list(engine.generate(prompt_of(n, n), Greedy()))
    assert [step.finish_reason for step in steps] == [None] * (answer - 1) + ["context_full"]
    assert [step.token for step in steps] == expected_tokens(prompt_of(n, n), answer)


@pytest.mark.parametrize("n", [513, 5120])
def test_a_prompt_longer_than_the_context_is_an_error_with_both_counts(engine: Engine, n: int) -> None:
    with pytest.raises(ContextFullError, match=rf"{n} tokens.*512"):
        engine.generate(prompt_of(1, n), Greedy())
    with pytest.raises(ContextFullError, match=rf"{n} tokens.*512"):
        next(engine.score(prompt_of(1, n), lambda start, logits: start))


def test_end_of_generation_ids_end_the_answer(drafts: bool) -> None:
    prompt = prompt_of(1, 20)
    reply = expected_tokens(prompt, 30)
    end = reply.index(reply[12])
    engine = make_engine(eog_ids=[reply[12]], drafts=drafts)
    steps = list(engine.generate(prompt, Greedy()))
    assert [s.token for s in steps] == reply[: end + 1]
    assert steps[-1].finish_reason == "stop"
    assert run(engine, prompt, 30, stop_ids=()) == reply
    assert run(engine, prompt, 30, stop_ids=[reply[3]]) == reply[: reply.index(reply[3]) + 1]
    engine.close()


def test_the_sampler_is_told_every_token(engine: Engine) -> None:
    sampler = Greedy()
    steps = list(engine.generate(prompt_of(1, 5), sampler, max_tokens=7))
    assert sampler.accepted == [step.token for step in steps]


def test_no_tokens_wanted_is_a_prefill(engine: Engine) -> None:
    steps = list(engine.generate(prompt_of(1, 50), Greedy(), max_tokens=0))
    assert [(s.token, s.finish_reason) for s in steps] == [(None, "length")]
    wait_until_idle(engine)
    assert list(engine.generate(prompt_of(1, 50), Greedy(), max_tokens=1))[-1].timings.reused_n == 49


@pytest.mark.parametrize(
    ("prompt", "options", "says"),
    [
        ([], {}, "0 tokens"),
        ([1, -1], {}, "Token id -1"),
        ([1, N_VOCAB], {}, f"Token id {N_VOCAB}"),
        ([1], {"max_tokens": -2}, "max_tokens is -2"),
        ([1], {"max_tokens": float("nan")}, "max_tokens is nan"),
        ([1], {"max_tokens": True}, "max_tokens is True"),
        ([1], {"cancel": 5}, "cancel is 5"),
        ([1], {"progress": 5}, "progress is 5"),
        ([1], {"hook": "x"}, "hook is 'x'"),
    ],
)
def test_senseless_requests_are_refused_at_once(engine: Engine, prompt: list[int], options: dict, says: str) -> None:
    with pytest.raises(ParameterError, match=says):
        engine.generate(prompt, Greedy(), **options)


def test_closing_the_iterator_cancels_within_one_step(engine: Engine) -> None:
    iterator = engine.generate(prompt_of(1, 10), Greedy())
    next(iterator)
    iterator.close()
    n = len(engine.executor.batches)
    wait_until_idle(engine)
    assert len(engine.executor.batches) <= n + 1
    assert engine.cache.n_used() == (0,)
    engine.cache.check([])


def test_an_iterator_thrown_away_frees_its_blocks(engine: Engine) -> None:
    for _ in engine.generate(prompt_of(1, 10), Greedy()):
        break
    cycle = [engine.generate(prompt_of(2, 10), Greedy())]
    next(cycle[0])
    cycle.append(cycle)
    del cycle
    gc.collect()
    wait_until_idle(engine)
    assert engine.cache.n_used() == (0,)


def test_a_cancel_flag_stops_between_prefill_chunks(engine: Engine) -> None:
    cancel = threading.Event()

    def progress(done: int, total: int) -> None:
        if done >= 64:
            cancel.set()

    steps = list(engine.generate(prompt_of(1, 500), Greedy(), cancel=cancel, progress=progress))
    assert [(s.token, s.finish_reason) for s in steps] == [(None, "cancelled")]
    wait_until_idle(engine)
    # the chunks that were in the mailbox already, and the one in progress
    assert len(engine.executor.batches) <= 64 // 16 + scheduler.LEAD + 1
    assert engine.cache.n_used() == (0,)


def test_a_waiting_request_can_be_cancelled_while_another_computes(engine: Engine) -> None:
    engine.executor.pause_s = 1.0
    busy = threading.Thread(target=run, args=(engine, prompt_of(1, 10), 3))
    busy.start()
    until(lambda: bool(engine.scheduler.requests))
    cancel = threading.Event()
    cancel.set()
    steps = list(engine.generate(prompt_of(2, 10), Greedy(), cancel=cancel))
    assert [s.finish_reason for s in steps] == ["cancelled"]
    assert busy.is_alive()
    engine.executor.pause_s = 0.0
    busy.join(HANG_S)


def test_a_cancelled_answer_leaves_what_it_computed_findable(engine: Engine) -> None:
    iterator = engine.generate(prompt_of(1, 100), Greedy())
    reply = [next(iterator).token for _ in range(5)]
    iterator.close()
    wait_until_idle(engine)
    steps = list(engine.generate(prompt_of(1, 100) + reply, Greedy(), max_tokens=1))
    assert steps[-1].timings.reused_n == 104
    assert steps[-1].token == expected_tokens(prompt_of(1, 100) + reply, 1)[0]


def test_progress_counts_up_to_the_whole_prompt(engine: Engine) -> None:
    seen: list[tuple[int, int]] = []
    list(engine.generate(prompt_of(1, 40), Greedy(), max_tokens=3, progress=lambda *p: seen.append(p)))
    assert seen == [(16, 40), (32, 40), (40, 40)]


def test_answers_share_their_steps_and_each_is_as_if_alone(engine: Engine) -> None:
    prompts = [prompt_of(seed, 5 + seed) for seed in range(8)]
    answers = run_together(engine, prompts, 30)
    assert answers == [expected_tokens(prompt, 30) for prompt in prompts]
    assert max(engine.executor.batches) >= 8
    # far fewer steps than 8 x 30
    assert len(engine.executor.batches) < 8 * 30 / 2


def test_a_long_prompt_does_not_stop_the_answers_of_others(drafts: bool) -> None:
    engine = make_engine(n_ctx=4096, chunk=512, drafts=drafts)
    prompts = [prompt_of(1, 10), prompt_of(2, 2000)]
    assert run_together(engine, prompts, 40) == [expected_tokens(prompt, 40) for prompt in prompts]
    mixed = [n for n in engine.executor.batches if 2 < n < 512]
    assert PROMPT_TOKENS_BESIDE + 1 in mixed
    engine.close()


@pytest.mark.parametrize("windows", [(0,), (0, 40), (STATE, 0), (PACKED, 0)])
def test_short_prompts_do_not_wait_for_a_long_one_and_do_not_stop_it(windows: tuple[int, ...], drafts: bool) -> None:
    engine = make_engine(windows, n_ctx=4096, chunk=64, n_blocks=(400,) * len(windows), drafts=drafts)
    engine.executor.pause_s = 0.002
    long, answers = prompt_of(1, 3900), []
    reading = threading.Thread(target=lambda: answers.append(run(engine, long, 4)))
    reading.start()
    until(lambda: len(engine.executor.batches) > 2)
    for seed in range(2, 5):
        short = prompt_of(seed, 60)
        before = engine.scheduler.requests[0].n_computed
        assert run(engine, short, 4) == expected_tokens(short, 4, windows)
        (left,) = [request for request in engine.scheduler.requests if request.n_prompt == len(long)]
        assert before < left.n_computed < len(long)
    reading.join(HANG_S)
    assert answers == [expected_tokens(long, 4, windows)]
    engine.close()


def test_requests_that_lack_blocks_are_not_woken_by_one_that_was_only_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two young prompts that lack blocks took the tokens of each step in turn; the oldest one, which may, had none."""
    monkeypatch.setattr(scheduler, "POLL_S", HANG_S)
    line, cache = make_engine().scheduler, KVCache(fake_pool(fake_program((0,)), 8), 512)
    line.cache = cache
    oldest, holder, *young = [
        GenerationRequest(threading.Lock(), prompt_of(i, 100), None, Greedy(), 4, frozenset(), False) for i in range(4)
    ]
    for request in (oldest, holder, *young):
        line.add(request)
    holder.sequence, holder.not_before = cache.open(holder.tokens), float("inf")
    cache.reserve(holder.sequence, 8 * BLOCK_TOKENS)
    line.requests = [holder, *young, oldest]
    parts = list[scheduler.Scheduled]()
    for _ in range(4):  # as many as there are requests
        parts = parts or line.schedule(line.next_in_line(), lambda request, error: pytest.fail(str(error)))
    assert [part.request for part in parts] == [oldest]


@pytest.mark.parametrize("windows", [(0,), (0, 40), (STATE, 0), (PACKED, 0)])
def test_one_prompt_asked_many_times_at_once_is_computed_once(windows: tuple[int, ...], drafts: bool) -> None:
    engine = make_engine(windows, n_ctx=512, chunk=512, n_blocks=(60,) * len(windows), drafts=drafts)
    prompt = prompt_of(1, 200)
    assert run_together(engine, [prompt] * 6, 10) == [expected_tokens(prompt, 10, windows)] * 6
    assert sum(engine.executor.batches) < 200 + 6 * (BLOCK_TOKENS + 10)
    wait_until_idle(engine)
    engine.cache.check([])
    engine.close()


def test_nan_in_one_answer_ends_that_one_alone(engine: Engine) -> None:
    seeds = (s for s in range(100) if 96 not in prompt_of(s, 20) + expected_tokens(prompt_of(s, 20), 10))
    good = [prompt_of(next(seeds), 20) for _ in range(4)]
    bad = [96] * 3
    engine.executor.poisonous = 96
    answers = run_together(engine, [*good, bad], 10)
    assert answers[:4] == [expected_tokens(prompt, 10) for prompt in good]
    assert isinstance(answers[4], NumericError)


def test_an_answer_with_a_hook_has_its_steps_to_itself(engine: Engine) -> None:
    seen: list[int] = []
    plain_run = engine.executor.run

    def run_and_note(batch, hook=None):
        if hook is not None:
            seen.append(len(np.unique(batch.sequences)))
        return plain_run(batch, hook)

    engine.executor.run = run_and_note
    prompts = [prompt_of(seed, 20) for seed in range(3)]
    options = [{}, {"hook": lambda i, op, read: None}, {}]
    assert run_together(engine, prompts, 10, options) == [expected_tokens(prompt, 10) for prompt in prompts]
    assert set(seen) == {1}


def test_a_function_runs_between_two_steps_and_its_result_or_error_comes_back(engine: Engine) -> None:
    inside: list[str] = []

    def look(cache: KVCache, executor: FakeExecutor) -> int:
        inside.append(threading.current_thread().name)
        return cache.n_ctx

    assert engine.call(look) == engine.n_ctx
    answer = engine.generate(prompt_of(1, 40), Greedy(), max_tokens=5)
    first = next(answer).token
    assert engine.call(look) == engine.n_ctx
    assert engine.call(lambda cache, executor: None) is None
    assert [first, *(step.token for step in answer)] == expected_tokens(prompt_of(1, 40), 5)
    with pytest.raises(ZeroDivisionError):
        engine.call(lambda cache, executor: 1 // 0)
    assert set(inside) == {"edgellm-engine"}
    engine.close()
    with pytest.raises(ClosedError):
        engine.call(look)


def run_together(engine: Engine, prompts: list[list[int]], n: int, options: list[dict] | None = None) -> list:
    """The answers of requests that all stand in line before the first step; an error in place of one that failed."""
    answers: list = [None] * len(prompts)

    def work(i: int) -> None:
        try:
            answers[i] = run(engine, prompts[i], n, **(options[i] if options else {}))
        except NumericError as error:
            answers[i] = error

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(prompts))]
    pause, engine.executor.pause_s = engine.executor.pause_s, 0.05
    for thread in threads:
        thread.start()
    until(lambda: len(engine.scheduler.requests) == len(prompts))
    engine.executor.pause_s = pause
    for thread in threads:
        thread.join(HANG_S)
    return answers


def test_an_executor_error_reaches_the_caller_and_leaves_the_engine_usable(engine: Engine) -> None:
    assert run(engine, prompt_of(1, 40), 3) == expected_tokens(prompt_of(1, 40), 3)
    engine.executor.fail = MemoryError("no memory")
    with pytest.raises(MemoryError):
        run(engine, prompt_of(1, 40), 3)
    assert run(engine, prompt_of(1, 40), 3) == expected_tokens(prompt_of(1, 40), 3)
    wait_until_idle(engine)
    engine.cache.check([])


@pytest.mark.parametrize("windows", [(0,), (STATE, 0)])
@pytest.mark.parametrize("place", ["open", "copy", "next_tokens", "draft"])
def test_what_goes_wrong_before_a_step_is_that_requests_affair_alone(
    place: str, windows: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, bad, good = make_engine(windows), prompt_of(1, 40), prompt_of(2, 60)
    answer = run(engine, bad, 3)
    answers: list[list[int]] = []

    def broken(*_: object, **__: object) -> list[int]:
        raise ArithmeticError("broken")

    other = threading.Thread(target=lambda: answers.append(run(engine, good, 40)))
    engine.executor.pause_s = 0.002
    other.start()
    until(lambda: engine.cache.n_used()[0] > 1)
    with monkeypatch.context() as patch:
        if place == "open":
            patch.setattr(engine.cache, "open", broken)
        elif place == "copy":
            patch.setattr(engine.cache.pool, "copy_block", broken)
        else:
            made = type(engine)._generation

            def generation(*args: Any, **options: Any) -> Any:
                request = made(engine, *args, **options)
                setattr(request, place, broken)
                return request

            patch.setattr(engine, "_generation", generation)
        with pytest.raises(ArithmeticError):
            run(engine, [*bad, *answer, 5], 9)
    other.join(HANG_S)
    assert answers == [expected_tokens(good, 40, tuple(sorted(windows)))]
    assert run(engine, bad, 3) == answer
    wait_until_idle(engine)
    engine.cache.check([])
    engine.close()


def test_a_sampler_error_reaches_the_caller_and_leaves_the_engine_usable(engine: Engine) -> None:
    sampler = Greedy()
    sampler.sample = lambda logits: 1 / 0  # type: ignore[method-assign,assignment,return-value]
    with pytest.raises(ZeroDivisionError):
        list(engine.generate([1, 2], sampler))
    assert run(engine, [1, 2], 3) == expected_tokens([1, 2], 3)


def test_nan_logits_are_a_named_error_and_are_not_found_again(engine: Engine) -> None:
    engine.executor.poison = True
    with pytest.raises(NumericError) as error:
        run(engine, prompt_of(1, 70), 3)
    assert error.value.code == "NUMERIC_NAN"
    engine.executor.poison = False
    wait_until_idle(engine)
    steps = list(engine.generate(prompt_of(1, 70), Greedy(), max_tokens=3))
    assert steps[-1].timings.reused_n == 0
    engine.cache.check([])


@pytest.mark.parametrize("n", [1, 16, 17, 100])
def test_scores_are_the_logits_of_every_position(engine: Engine, n: int) -> None:
    tokens = prompt_of(3, n)
    run(engine, tokens, 5)
    parts = list(engine.score(tokens, lambda start, logits: (start, logits.copy())))
    assert [start for start, _ in parts] == list(range(0, n, 16))
    scores = np.concatenate([logits for _, logits in parts])
    np.testing.assert_array_equal(scores, [expected_logits(tokens[: i + 1]) for i in range(n)])
    wait_until_idle(engine)
    engine.cache.check([])


@pytest.mark.parametrize("windows", [(0,), (PACKED, 0)])
def test_scoring_goes_on_after_its_blocks_were_given_away(
    windows: tuple[int, ...], drafts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "IDLE_S", 0.01)
    engine = make_engine(windows, n_ctx=320, drafts=drafts)
    tokens = prompt_of(3, 300)
    scores = engine.score(tokens, lambda start, logits: (start, logits.copy()))
    parts = [next(scores) for _ in range(8)]
    time.sleep(0.1)
    assert run(engine, prompt_of(4, 300), 2) == expected_tokens(prompt_of(4, 300), 2)
    parts += scores
    assert [start for start, _ in parts] == list(range(0, 300, 16))
    np.testing.assert_array_equal(parts[-1][1][-1], expected_logits(tokens))
    engine.close()


@pytest.mark.parametrize("drafts", [False], indirect=True)
def test_timings_add_up(engine: Engine) -> None:
    engine.executor.pause_s = 0.005
    steps = list(engine.generate(prompt_of(1, 40), Greedy(), max_tokens=6))
    timings = steps[-1].timings
    assert (timings.prompt_n, timings.reused_n, timings.generation_n) == (40, 0, 6)
    assert timings.prompt_ms >= 15 and timings.generation_ms >= 25
    assert timings.time_to_first_token_ms >= timings.prompt_ms
    assert timings.prompt_tps == pytest.approx(40e3 / timings.prompt_ms)
    assert timings.generation_tps == pytest.approx(5e3 / timings.generation_ms)
    assert timings.as_dict()["generation_tps"] == timings.generation_tps
    assert [step.timings.generation_n for step in steps] == [1, 2, 3, 4, 5, 6]


def test_close_frees_the_executor_and_later_use_is_a_named_error(engine: Engine) -> None:
    iterator = engine.generate([1], Greedy())
    next(iterator)
    engine.close()
    engine.close()
    assert engine.executor.closed
    with pytest.raises(ClosedError):
        for _ in range(10):
            next(iterator)
    with pytest.raises(ClosedError):
        run(engine, [1], 1)
    assert engine.cache.n_used() == (0,)


def test_no_thread_stays_behind_an_answer(engine: Engine) -> None:
    answer = engine.generate([1, 2, 3], Greedy(), max_tokens=4)
    next(answer)
    thread = engine._thread
    assert len(list(answer)) == 3
    if thread is not None:
        thread.join(HANG_S)
    assert engine._thread is None and not any(t.name == "edgellm-engine" for t in threading.enumerate())


def test_async_for_gives_the_same_steps(engine: Engine) -> None:
    async def collect(seed: int) -> list[int]:
        return [s.token async for s in engine.agenerate(prompt_of(seed, 40), Greedy(), max_tokens=20)]

    async def main() -> list[list[int]]:
        return await asyncio.gather(*(collect(seed) for seed in range(8)))

    assert asyncio.run(main()) == [expected_tokens(prompt_of(seed, 40), 20) for seed in range(8)]


def test_cancelling_a_task_or_closing_its_iterator_cancels_the_request(engine: Engine) -> None:
    async def main() -> None:
        engine.executor.pause_s = 0.01

        async def consume() -> None:
            async for _ in engine.agenerate([1, 2], Greedy()):
                pass

        task = asyncio.create_task(consume())
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        iterator = engine.agenerate([1, 2], Greedy())
        await anext(iterator)
        await iterator.aclose()

    asyncio.run(main())
    wait_until_idle(engine)
    assert engine.cache.n_used() == (0,)


def test_a_cancel_flag_stops_an_async_answer(engine: Engine) -> None:
    async def main() -> list[str | None]:
        cancel = threading.Event()
        reasons = []
        async for step in engine.agenerate([1, 2], Greedy(), cancel=cancel):
            reasons.append(step.finish_reason)
            if len(reasons) == 3:
                cancel.set()
        return reasons

    assert asyncio.run(main()) == [None, None, None, "cancelled"]


@pytest.mark.parametrize("windows", [(0, 40), (PACKED, 0)])
@pytest.mark.parametrize("seed", range(3))
def test_clients_that_come_and_go_leave_nothing_behind(seed: int, windows: tuple[int, ...], drafts: bool) -> None:
    """Threads that cancel at random points; those that stay get the answer they would get alone."""
    engine = make_engine(windows, n_ctx=256, n_blocks=(20, 20), drafts=drafts)
    wrong: list[object] = []

    def client(number: int) -> None:
        rng = random.Random(seed * 100 + number)
        for _ in range(8):
            prompt = prompt_of(rng.randrange(4), rng.randint(1, 120))
            n = rng.randint(1, 30)
            leave = rng.randint(0, n) if rng.random() < 0.4 else None
            answer: list[int] = []
            for step in engine.generate(prompt, Greedy(), max_tokens=n):
                if len(answer) == leave:
                    break
                answer.append(step.token)
            if answer != expected_tokens(prompt, len(answer), windows):
                wrong.append((number, prompt))

    threads = [threading.Thread(target=client, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG_S)
    assert not wrong
    wait_until_idle(engine)
    engine.cache.check([])
    assert engine.cache.n_used() == (0, 0)
    engine.close()


def test_a_debug_line_tells_what_a_request_cost(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(engine_module, "DEBUG", True)
    run(engine, prompt_of(1, 40), 3)
    list(engine.score(prompt_of(1, 20), lambda start, logits: start))
    wait_until_idle(engine)
    lines = capfd.readouterr().err.splitlines()
    assert lines[0].startswith("edgellm: prompt 0 reused + 40 new at ") and lines[0].endswith(" t/s, done")
    assert lines[1] == "edgellm: 20 tokens scored, done"


def prompt_steps(token_s: Callable[[int], float], others: int = 0, **options: bool) -> list[int]:
    """Tokens of each step of a long prompt, of which a token takes so long at a position; ``others`` wait, too."""
    engine = make_engine(n_ctx=8192, chunk=512)
    line, sizes = engine.scheduler, []
    for name, value in options.items():
        setattr(line, name, value)
    for seed in range(1 + others):
        line.add(engine._generation(prompt_of(seed, 4000), Greedy()))
    while not sizes or sum(sizes) < 3800:
        scheduled = line.schedule(line.next_in_line(), lambda request, error: pytest.fail(str(error)))
        n_tokens = sum(len(part.tokens) for part in scheduled)
        for part in scheduled:
            engine.cache.commit(part.sequence, part.tokens)
        line.note(scheduled, [len(part.tokens) for part in scheduled], n_tokens * token_s(sum(sizes)))
        sizes.append(n_tokens)
    engine.close()
    return sizes


def test_a_step_that_somebody_may_wait_for_is_no_longer_than_its_time() -> None:
    assert set(prompt_steps(lambda at: 0.01)[:-1]) == {512}  # nobody waits
    for waited_for in ({"interactive": True}, {"others": 2}):
        unknown, *sizes = prompt_steps(lambda at: 1e-3, **waited_for)  # type: ignore[arg-type]
        assert unknown == PROMPT_TOKENS_BESIDE and all(size * 1e-3 <= scheduler.STEP_S for size in sizes)
        assert min(sizes[:-1]) * 1e-3 > 0.7 * scheduler.STEP_S  # and not much shorter
        assert set(prompt_steps(lambda at: 1e-5, **waited_for)[1:-1]) == {512}  # type: ignore[arg-type]
        slow = prompt_steps(lambda at: 1.0, **waited_for)  # type: ignore[arg-type]
        assert set(slow[1:-1]) == {scheduler.LEAST_PROMPT_TOKENS}
    slower = prompt_steps(lambda at: 3e-4 + at * 1e-6, interactive=True)  # as attention makes it
    assert slower[1] > 2 * slower[-2]
    line = {"interactive": True, "interruptible": True}  # it is alone, and may be broken off
    assert set(prompt_steps(lambda at: 1e-3, **line)[1:-1]) == {512}
    assert all(size * 0.01 <= scheduler.LONE_STEP_S for size in prompt_steps(lambda at: 0.01, **line))
    assert max(prompt_steps(lambda at: 1e-3, 2, **line)[1:]) * 1e-3 <= scheduler.STEP_S


class InterruptibleExecutor(FakeExecutor):
    """A step has ten parts; ``between`` is called with the number of each before a look."""

    backend, kv_dtype = "fake", "float32"
    work_nbytes = staticmethod(lambda *sizes: 0)

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.between: Callable[[int], None] = lambda part: None
        self.broken_off: list[int] = []

    def run_while(self, batch: Batch, wanted: Callable[[], bool]) -> np.ndarray | None:
        for part in range(10):
            self.between(part)
            if not wanted():
                self.broken_off.append(part)
                return None
        return self.run(batch)


@pytest.fixture(params=[(0,), (STATE, 0), (PACKED, 0)])
def serving(request: pytest.FixtureRequest) -> Iterator[Engine]:
    """As a server has it, at the beginning of the second step of a prompt."""
    program = fake_program(request.param)
    pool = fake_pool(program, pool_blocks(fake_layers(request.param), 4096, 512, 4))
    made = Engine(InterruptibleExecutor(program, pool, 512), KVCache(pool, 4096))
    made.scheduler.interactive = True
    yield made
    wait_until_idle(made)
    made.cache.check([])
    assert made.cache.n_used()[0] == 0
    made.close()


def test_a_lone_prompt_gives_way_at_the_next_look_and_once(serving: Engine) -> None:
    kinds = {"state": STATE, "newest": PACKED}
    windows = tuple(kinds.get(group.kind, 0) for group in serving.cache.pool.groups)
    prompt, answers, executor = prompt_of(1, 3000), {}, serving.executor
    assert isinstance(executor, InterruptibleExecutor)
    newcomers: list[threading.Thread] = []

    def ask(name: str, tokens: list[int]) -> None:
        answers[name] = run(serving, tokens, 2)

    def come_in(part: int) -> None:
        if part == 4 and len(executor.batches) == 1:
            newcomers.append(threading.Thread(target=ask, args=("newcomer", prompt_of(7, 40))))
            newcomers[-1].start()
            until(lambda: len(serving.scheduler.requests) == 2)

    executor.between = come_in
    ask("prompt", prompt)
    newcomers[0].join(HANG_S)
    assert executor.broken_off == [4] and list(answers) == ["newcomer", "prompt"]
    for name, tokens in (("newcomer", prompt_of(7, 40)), ("prompt", prompt)):
        assert answers[name] == expected_tokens(tokens, 2, windows)


def test_a_caller_that_leaves_a_lone_prompt_ends_its_step_at_the_next_look(serving: Engine) -> None:
    executor, cancel = serving.executor, threading.Event()
    assert isinstance(executor, InterruptibleExecutor)
    executor.between = lambda part: cancel.set() if part == 6 and len(executor.batches) == 2 else None
    prompt = prompt_of(1, 3000)
    *_, last = serving.generate(prompt, Greedy(), max_tokens=2, cancel=cancel)
    wait_until_idle(serving)
    assert last.finish_reason == "cancelled" and executor.broken_off == [6]
    read = sum(executor.batches)
    *_, last = serving.generate(prompt, Greedy(), max_tokens=1)
    assert last.timings.reused_n == read > 0  # and what was read stays known
