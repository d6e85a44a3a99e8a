"""Several tokens in one call: what the executor decodes by itself is what comes of it step by step, to the bit."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import threading
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import numpy as np
import pytest
from cpu_programs import FORMS, cpu_draw, cpu_executor, kernel_cache, part, sequences, single_sequence

from edgellm.engine import scheduler
from edgellm.engine.cache import KVCache, pool_blocks
from edgellm.engine.engine import Engine
from edgellm.engine.requests import GeneratedToken
from edgellm.formats.errors import NumericError, ParameterError
from edgellm.formats.gguf import GGUFFile
from edgellm.kernels.cpu.lib import draw_layout
from edgellm.kernels.cpu.run.attention_work import AttentionWork, _visible_cuts_of
from edgellm.kernels.cpu.run.draw import MAX_STEPS, CPUDraw, CPUTokenDraw
from edgellm.kernels.cpu.run.executor import CPUExecutor
from edgellm.kernels.cpu.run.step import ROPE_RUN
from edgellm.kernels.cpu.run.threads import ThreadTeam
from edgellm.kernels.draw import Drawn, DrawSpec, Link, TokenDraw
from edgellm.kernels.program import Batch, Program
from edgellm.models import build_program
from edgellm.sampling.params import SamplingParams
from edgellm.sampling.sampler import Sampler

tiny_models = pytest.importorskip("tiny_models", reason="the gguf package writes the test models")

ARCHITECTURES = ("llama", "qwen3moe", "granitemoe", "gemma3")
N_CTX = 320
HANG_S = 60


@pytest.fixture(scope="module", params=ARCHITECTURES)
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    path = tmp_path_factory.mktemp("models") / f"{request.param}.gguf"
    tiny_models.write_tiny_model(path, request.param, "Q4_K", tied=False)
    with GGUFFile.open(path) as file:
        yield build_program(file)


def executor_of(program: Program, n_threads: int = 2, form: str = FORMS[0]) -> CPUExecutor:
    return cpu_executor(program, N_CTX // 32, n_threads, 64, form)


def greedy() -> TokenDraw:
    return cpu_draw().open(DrawSpec((Link("temperature", 0.0),), 1, 1), np.random.default_rng(1))


def one(tables: Batch, token: int, position: int) -> Batch:
    """One token of the sequence of another batch."""
    numbers = (np.array([n], np.int32) for n in (token, position, 0))
    return Batch(*numbers, np.ones(1, bool), tables.tables)


# ---- the executor ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("n_threads", [1, 2, 3])
def test_a_run_gives_the_tokens_and_the_cache_of_single_steps(program: Program, n_threads: int, form: str) -> None:
    prompt = single_sequence(program, 70, n_blocks=N_CTX // 32, seed=3)
    alone, together = (executor_of(program, n_threads, form) for _ in range(2))
    for executor in (alone, together):
        for start in (0, 35):
            executor.run(part(prompt, start, start + 35))
    tokens = [1]
    for position in range(70, 310):
        tokens.append(int(alone.run(one(prompt, tokens[-1], position)).argmax()))
    drawn, draw, sizes = [1], greedy(), set()
    while len(drawn) < len(tokens):
        n = together.decode(one(prompt, drawn[-1], 69 + len(drawn)), min(7, len(tokens) - len(drawn)), draw)
        drawn += draw.tokens(n)
        sizes.add(n)
    assert drawn == tokens
    assert 7 in sizes, "runs, and not single steps"
    for mine, theirs in zip(chain(*together.pool.arrays), chain(*alone.pool.arrays), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    for executor in (alone, together):
        executor.close()


LENGTHS = [70, 3, 200]  # on their way to the end of a block, of a window, of a cut
N_TOGETHER = 80  # tokens of each
SPECS = [
    DrawSpec((Link("temperature", 0.0),), 1, 1),
    DrawSpec((Link("top_k", 20), Link("top_p", 0.95), Link("temperature", 1.3)), 20, 20),
    DrawSpec((Link("top_k", 8), Link("temperature", 0.9)), 8, 10, wants_sum=True),
]


def next_tokens(program: Program, tokens: list[int], n_made: int = 0) -> Batch:
    """The next token of each of three sequences, behind ``LENGTHS`` and so many tokens."""
    batch = sequences(program, [1, 1, 1], [length + n_made for length in LENGTHS], 3 * N_CTX // 32)
    return dataclasses.replace(batch, tokens=np.array(tokens, np.int32))


def three(program: Program, n_threads: int = 2, form: str = FORMS[0]) -> CPUExecutor:
    """An executor that has read the beginnings of three sequences."""
    executor = cpu_executor(program, 3 * N_CTX // 32, n_threads, sum(LENGTHS), form)
    executor.run(sequences(program, LENGTHS, [0, 0, 0], 3 * N_CTX // 32))
    return executor


def told(draw: CPUTokenDraw, n: int) -> list[Drawn]:
    """What was drawn; the sum is not there where it was not wanted."""
    wants_sum = draw._record[draw_layout.WANTS_SUM // 8]
    return [row if wants_sum else row._replace(sum=0.0) for row in draw.drawn(n)]


def draws(executor: CPUExecutor) -> list[CPUTokenDraw]:
    return [executor.draw.open(spec, np.random.default_rng(i)) for i, spec in enumerate(SPECS)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("n_threads", [1, 2, 3])
def test_sequences_that_decode_together_draw_the_tokens_of_single_steps(
    program: Program, n_threads: int, form: str
) -> None:
    singles, together = three(program, n_threads, form), three(program, n_threads, form)
    judges: list[list[Drawn]] = [[], [], []]
    tokens, one_by_one = [9, 10, 11], draws(singles)
    for n in range(N_TOGETHER):
        logits = singles.run(next_tokens(program, tokens, n))
        for draw, row, drawn in zip(one_by_one, logits, judges, strict=True):
            assert draw.draw(row)
            drawn += told(draw, 1)
        tokens = [drawn[-1].token for drawn in judges]
    runs, n, sizes = draws(together), 0, set()
    while n < N_TOGETHER:
        tokens = [drawn[n - 1].token if n else 9 + which for which, drawn in enumerate(judges)]
        made = together.decode_together(next_tokens(program, tokens, n), min(7, N_TOGETHER - n), runs, [[]] * 3)
        assert made == made[:1] * 3
        for draw, judge in zip(runs, judges, strict=True):
            assert told(draw, made[0]) == judge[n : n + made[0]]
        n += made[0]
        sizes.add(made[0])
    assert 7 in sizes, "runs, and not single steps"
    for mine, theirs in zip(chain(*together.pool.arrays), chain(*singles.pool.arrays), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    for executor in (singles, together):
        executor.close()


def announced(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The threads of each job that teams are given from now on."""
    used, announce = list[int](), ThreadTeam._announce

    def noting(team: ThreadTeam, *job: int) -> None:
        used.append(team.at_once)
        announce(team, *job)

    monkeypatch.setattr(ThreadTeam, "_announce", noting)
    return used


def test_the_number_of_threads_may_change_from_call_to_call_and_no_bit_with_it(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone, changing = three(program, 1), three(program, 3)
    sizes, used = itertools.cycle((3, 1, 2, 2)), announced(monkeypatch)
    threads = changing.decode_threads(3)
    monkeypatch.setattr(threads, "took", lambda *_: setattr(threads, "n", next(sizes)))
    expected, found = draws(alone), draws(changing)
    tokens, n = [9, 10, 11], 0
    while n < N_TOGETHER:
        first = next_tokens(program, tokens, n)
        made = alone.decode_together(first, 5, expected, [[]] * 3)
        assert changing.decode_together(first, made[0], found, [[]] * 3) == made
        assert [told(draw, made[0]) for draw in found] == [told(draw, made[0]) for draw in expected]
        tokens, n = [draw.tokens(made[0])[-1] for draw in expected], n + made[0]
        np.testing.assert_array_equal(
            changing.run(next_tokens(program, tokens, n)), alone.run(next_tokens(program, tokens, n))
        )
    assert set(used) == {1, 2, 3}
    for executor in (alone, changing):
        executor.close()


def test_prompts_have_all_threads_and_decode_steps_of_each_number_of_texts_a_number_of_their_own(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor, used = three(program), announced(monkeypatch)
    executor.decode_threads(3).n = 1
    executor.decode_together(next_tokens(program, [9, 10, 11]), 1, draws(executor), [[]] * 3)
    assert set(used) == {1}
    used.clear()
    executor.decode(one(next_tokens(program, [9, 10, 11]), 9, LENGTHS[0]), 1, greedy())
    executor.run(sequences(program, LENGTHS, [0, 0, 0], 3 * N_CTX // 32))
    assert set(used) == {2}
    executor.close()


def test_the_stop_id_of_one_ends_the_run_of_all(program: Program) -> None:
    executor, first = three(program), next_tokens(program, [9, 10, 11])
    expected = draws(executor)
    assert executor.decode_together(first, 9, expected, [[]] * 3) == [9] * 3
    tokens = [draw.tokens(9) for draw in expected]
    for which in range(3):
        stop, found = tokens[which][4], draws(executor)
        n = tokens[which].index(stop) + 1
        stop_ids: list[list[int]] = [[], [], []]
        stop_ids[which] = [stop, -5]
        assert executor.decode_together(first, 9, found, stop_ids) == [n] * 3
        assert [draw.tokens(n) for draw in found] == [row[:n] for row in tokens]
    executor.close()


def test_nan_in_one_sequence_gives_tokens_to_the_others(program: Program) -> None:
    executor = three(program)
    first = next_tokens(program, [9, 10, 11])
    for _, values in executor.pool.arrays:
        values[first.tables[0][1, 0]] = np.nan
    assert executor.decode_together(first, 6, draws(executor), [[]] * 3) == [1, 0, 1]
    with pytest.raises(NumericError):
        executor.run(first)
    executor.close()


def test_a_run_of_several_takes_one_token_of_each(program: Program) -> None:
    executor, good = three(program), next_tokens(program, [9, 10, 11])
    silent = dataclasses.replace(good, outputs=np.array([True, False, True]))
    twice = dataclasses.replace(good, sequences=np.zeros(3, np.int32))
    same = draws(executor)
    cases = (
        (silent, 2, draws(executor)),
        (twice, 2, draws(executor)),
        (good, 0, draws(executor)),
        (good, 2, draws(executor)[:2]),
        (good, 2, [*same[:2], same[0]]),
    )
    for batch, n_steps, given in cases:
        with pytest.raises(ParameterError, match="decode_together"):
            executor.decode_together(batch, n_steps, given, [[]] * 3)
    missing = dataclasses.replace(good, tables=tuple(np.where(t == t[1], -1, t) for t in good.tables))
    with pytest.raises(ParameterError, match="block"):
        executor.decode_together(missing, 2, draws(executor), [[]] * 3)
    executor.close()


def test_a_run_ends_with_the_step_it_is_at_when_somebody_waits(program: Program) -> None:
    executor = three(program)
    for wanted, n in ((True, 1), (False, 5)):
        executor.hurry(wanted)
        assert executor.decode_together(next_tokens(program, [9, 10, 11]), 5, draws(executor), [[]] * 3) == [n] * 3
    executor.close()


def test_a_stop_id_is_the_last_token_of_a_run(program: Program) -> None:
    executor, draw = executor_of(program), greedy()
    first = one(single_sequence(program, 1, n_blocks=2), 1, 0)
    tokens = draw.tokens(executor.decode(first, 9, draw))
    for stop in dict.fromkeys(tokens):
        n = executor.decode(first, 9, draw, {stop, -5})
        assert draw.tokens(n) == tokens[: tokens.index(stop) + 1]
    executor.close()


def test_a_run_takes_one_token_that_wants_logits(program: Program) -> None:
    executor = executor_of(program)
    good = one(single_sequence(program, 1, n_blocks=2), 1, 0)
    silent = Batch(good.tokens, good.positions, good.sequences, np.zeros(1, bool), good.tables)
    for batch, n_steps in ((single_sequence(program, 2), 2), (silent, 2), (good, 0)):
        with pytest.raises(ParameterError, match="decode"):
            executor.decode(batch, n_steps, greedy())
    assert executor.decode(good, 3, greedy()) == 3
    executor.close()


def test_a_run_needs_blocks_for_all_its_steps(program: Program) -> None:
    executor = executor_of(program)
    tables = single_sequence(program, 32)  # one block
    assert executor.decode(one(tables, 1, 30), 2, greedy()) == 2
    with pytest.raises(ParameterError, match="block table"):
        executor.decode(one(tables, 1, 30), 3, greedy())
    executor.close()


def test_a_step_with_nan_ends_a_run_without_its_token(program: Program) -> None:
    executor, draw = executor_of(program), greedy()
    prompt = single_sequence(program, 20, n_blocks=2, seed=3)
    executor.run(prompt)
    tokens = draw.tokens(executor.decode(one(prompt, 1, 20), 9, draw))
    executor.close()
    for bad, n in ((1, 0), (tokens[2], tokens.index(tokens[2]) + 1)):  # the first input, and a later one
        executor = executor_of(with_nan(program, bad))
        executor.run(prompt)
        assert executor.decode(one(prompt, 1, 20), 9, draw) == n
        assert draw.tokens(n) == tokens[:n]
        with pytest.raises(NumericError):
            executor.run(one(prompt, bad, 20 + n))
        executor.close()


def with_nan(program: Program, token: int) -> Program:
    """The program with one row of its embedding spoilt."""
    tensor = program.tensors["token_embd.weight"]
    data = tensor.data.copy()
    data.reshape(tensor.shape[0], -1)[token].view(tensor.quant.layout)["d"] = np.nan
    spoilt = dataclasses.replace(tensor, data=data)
    return dataclasses.replace(program, tensors=program.tensors | {tensor.name: spoilt})


def test_steps_that_count_as_alike_have_the_same_work(program: Program) -> None:
    work = AttentionWork(program, 2)
    for position in range(3 * N_CTX):
        n = work.steps_alike(position)
        keys = [tuple(_visible_cuts_of(position + i, g.window) for g in program.groups) for i in range(n + 1)]
        assert len(set(keys[:n])) == 1
        assert keys[n] != keys[0], "or a run could have been longer"
    assert ROPE_RUN % MAX_STEPS == 0


# ---- the engine ------------------------------------------------------------------------------------------------------


class Asked:
    """An engine that decodes in runs, or not."""

    def __init__(self, program: Program, monkeypatch: pytest.MonkeyPatch, run_s: float, **options: Any) -> None:
        monkeypatch.setattr(scheduler, "RUN_S", run_s)
        n_blocks = pool_blocks(program.cache_layers, N_CTX, 64, 2)
        self.executor = CPUExecutor(program, n_blocks, 2, 64, untested=kernel_cache(FORMS[0]))
        self.sizes: list[int] = []
        self.together: list[list[int]] = []
        decode, decode_together = self.executor.decode, self.executor.decode_together

        def noted(batch: Batch, n_steps: int, *rest: Any) -> int:
            self.sizes.append(decode(batch, n_steps, *rest))
            return self.sizes[-1]

        def noted_together(*arguments: Any) -> list[int]:
            self.together.append(decode_together(*arguments))
            return self.together[-1]

        self.executor.decode = noted  # type: ignore[method-assign]
        self.executor.decode_together = noted_together  # type: ignore[method-assign]
        self.cache = KVCache(self.executor.pool, N_CTX)
        self.engine = Engine(self.executor, self.cache, **options)
        self.n_vocab = program.n_vocab
        self.draw: CPUDraw | None = self.executor.draw

    def steps(self, prompt: list[int], max_tokens: int | None = 150, **options: Any) -> list[GeneratedToken]:
        return list(self.engine.generate(prompt, self.sampler(**options), max_tokens=max_tokens))

    def sampler(self, **options: Any) -> Sampler:
        return Sampler(SamplingParams(seed=7, **options), self.n_vocab, draw=self.draw)

    def close(self) -> None:
        self.engine.close()
        self.cache.check([])


@pytest.fixture
def ask(program: Program, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Asked]]:
    """ask(seconds of a run): a fresh engine."""
    made: list[Asked] = []

    def make(run_s: float = 60.0, **options: Any) -> Asked:
        made.append(Asked(program, monkeypatch, run_s, **options))
        return made[-1]

    yield make
    for asked in made:
        asked.close()


OPTIONS: list[dict[str, Any]] = [
    {"temperature": 0},
    {},
    {"n_probs": 5, "logprobs": True, "sampler_trace": True},
    {"temperature": 0, "n_probs": 2, "logprobs": True},
    {"top_k": 20, "temperature": 1.5, "min_p": 0},
    {"logit_bias": dict.fromkeys(range(3, 200, 7), False)},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_an_answer_is_the_same_in_runs(options: dict[str, Any], ask: Callable[..., Asked]) -> None:
    single = ask(0.0)
    one_by_one = single.steps([1, 2, 3], **options)
    assert not single.sizes
    runs = ask()
    together = runs.steps([1, 2, 3], **options)
    assert max(runs.sizes) > 4
    assert [(s.token, s.choice, s.finish_reason) for s in together] == [
        (s.token, s.choice, s.finish_reason) for s in one_by_one
    ]
    for n, step in enumerate(together, 1):
        assert (step.timings.prompt_n, step.timings.generation_n) == (3, n)
    again = runs.steps([1, 2, 3, *(s.token for s in together[:100] if s.token is not None), 5])
    assert again[0].timings.reused_n == 103, "what runs have computed is known"


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_an_answer_is_the_same_in_runs_and_with_drafts_between_them(
    options: dict[str, Any], ask: Callable[..., Asked], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler.Scheduler, "_tokens_per_s", lambda self, n: n)
    plain = ask(0.0).steps([1, 2, 3], **options)
    text = [1, 2, 3, *(step.token for step in plain if step.token is not None)]
    rng = np.random.default_rng(1)

    class Guesser:
        """Right for some tokens, then wrong, and often without an idea."""

        def draft(self, tokens: Any, n: int) -> list[int]:
            right, wrong = rng.integers(0, n + 1, 2)
            draft = [*text[len(tokens) :][:right], *rng.integers(0, 200, wrong).tolist()]
            return draft[:n] if rng.random() < 0.8 else []

        def settle(self, gain: float) -> None:
            pass

    both = ask(drafter=Guesser)
    drafted = both.steps([1, 2, 3], **options)
    assert max(both.sizes) > 2
    timings = drafted[-1].timings
    assert timings.drafted_n > timings.accepted_n > 0
    assert [(s.token, s.choice, s.finish_reason) for s in drafted] == [
        (s.token, s.choice, s.finish_reason) for s in plain
    ]
    again = both.steps([*text[:120], 5], 20, temperature=0)
    assert again[0].timings.reused_n == 120
    assert [s.token for s in again] == [s.token for s in ask(0.0).steps([*text[:120], 5], 20, temperature=0)]


@pytest.mark.parametrize("options", [{"repeat_penalty": 1.2}, {"logit_bias": {4: -1.0}}, {"top_k": 0}], ids=str)
def test_a_chain_that_needs_python_takes_its_steps_one_by_one(
    options: dict[str, Any], ask: Callable[..., Asked]
) -> None:
    asked = ask()
    assert len(asked.steps([1, 2], 20, **options)) == 20
    assert not asked.sizes


@pytest.mark.parametrize("n", [1, 2, 3, 17, 40])
def test_max_tokens_and_the_end_of_the_context_hold_in_runs(n: int, ask: Callable[..., Asked]) -> None:
    asked = ask()
    steps = asked.steps([1, 2, 3], n)
    assert len(steps) == n
    assert steps[-1].finish_reason == "length"
    steps = asked.steps([1 + i % 200 for i in range(N_CTX - n - 1)], None)
    assert len(steps) == n + 2
    assert steps[-1].finish_reason == "context_full"


def test_an_answer_ends_with_its_stop_token_inside_a_run(ask: Callable[..., Asked]) -> None:
    tokens = [step.token for step in ask(0.0).steps([1, 2, 3], 60, temperature=0.9)]
    stop = tokens[20]
    steps = ask(eog_ids=[stop]).steps([1, 2, 3], 60, temperature=0.9)
    assert [step.token for step in steps] == tokens[: tokens.index(stop) + 1]
    assert steps[-1].finish_reason == "stop"


def at_once(functions: list[Callable[[], Any]]) -> None:
    threads = [threading.Thread(target=function) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG_S)


def test_answers_beside_each_other_are_those_they_give_alone(ask: Callable[..., Asked]) -> None:
    single, asked = ask(0.0), ask(0.01)
    many: list[dict[str, Any]] = [*OPTIONS, {"repeat_penalty": 1.2}]

    def answers(asked: Asked, n: int, options: dict[str, Any]) -> list[Any]:
        return [(s.token, s.choice, s.finish_reason) for s in asked.steps([n, 2, 3], 60 + 9 * n, **options)]

    for chosen in (many[:2], many[:-1], many):  # the last of all draws in Python
        expected = {n: answers(single, n, options) for n, options in enumerate(chosen)}
        got: dict[int, list[Any]] = {}

        def answer(n: int, options: dict[str, Any], got: dict[int, list[Any]] = got) -> None:
            got[n] = answers(asked, n, options)

        at_once([functools.partial(answer, n, options) for n, options in enumerate(chosen)])
        assert got == expected
    assert max(map(len, asked.together)) > 2
    assert max(map(max, asked.together)) > 1, "runs, and not single steps"


def test_who_comes_or_leaves_ends_a_run_with_its_step(ask: Callable[..., Asked]) -> None:
    asked = ask()
    steps = asked.engine.generate([1, 2, 3], asked.sampler(), max_tokens=200)
    next(steps)
    wanted: list[bool] = []
    hurry = asked.executor.hurry

    def noted(now: bool) -> None:
        wanted.append(now)
        hurry(now)

    asked.executor.hurry = noted  # type: ignore[method-assign]
    assert len(asked.steps([4, 5], 5)) == 5
    assert wanted.count(True) >= 2, "when it came, and when it left"
    steps.close()
    assert wanted[-1] or wanted[-2]
    assert len(asked.steps([6, 7], 30)) == 30


def test_a_caller_that_leaves_inside_a_run_leaves_nothing_behind(ask: Callable[..., Asked]) -> None:
    asked = ask()
    for n in (1, 2, 5, 30):
        steps = asked.engine.generate([1, 2, 3], asked.sampler(), max_tokens=200)
        for _ in range(n):
            next(steps)
        steps.close()
    assert len(asked.steps([9, 8], 10)) == 10


def test_nan_in_a_run_is_an_error_after_the_tokens_before_it(ask: Callable[..., Asked]) -> None:
    asked = ask()
    steps = asked.engine.generate([1, 2, 3], asked.sampler(), max_tokens=300)
    for _ in range(5):
        next(steps)

    def poison(cache: KVCache, executor: Any) -> None:
        for _, values in executor.pool.arrays:
            values[:] = np.nan

    asked.engine.call(poison)
    with pytest.raises(NumericError):
        list(steps)


def test_a_fault_in_one_answer_is_not_told_to_another(
    ask: Callable[..., Asked], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ask(0.01)
    broken, other = asked.sampler(), asked.engine.generate([4, 5], asked.sampler(), max_tokens=200)
    next(other)
    assert broken.short is not None
    broken.short.sampled = lambda n: [1 // 0]  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError):
        list(asked.engine.generate([1, 2, 3], broken, max_tokens=50))
    assert len(list(other)) == 199


def test_an_answer_whose_blocks_were_taken_computes_them_again_before_it_runs_on(
    program: Program, ask: Callable[..., Asked]
) -> None:
    asked = ask()
    expected = [step.token for step in asked.steps([1, 2, 3], 60)]
    asked = ask()
    asked.engine.scheduler.max_tokens = 1  # every step has one token, and most of these want no logits
    steps = asked.engine.generate([1, 2, 3], asked.sampler(), max_tokens=60)
    got = [next(steps).token for _ in range(4)]

    def take(cache: KVCache, executor: Any) -> None:
        request = next(r for r in asked.engine.scheduler.requests if r.sequence is not None)
        cache.release(request.sequence, keep=False)
        request.sequence = None

    asked.engine.call(take)
    assert got + [step.token for step in steps] == expected


def test_stop_ids_that_no_token_has_end_nothing(ask: Callable[..., Asked]) -> None:
    asked = ask()
    odd: Any = {2**70, -1, None, 10**6}
    assert len(list(asked.engine.generate([1, 2], asked.sampler(), max_tokens=40, stop_ids=odd))) == 40
    assert max(asked.sizes) > 4


def test_for_a_sampler_in_numpy_nothing_runs_on(ask: Callable[..., Asked]) -> None:
    asked = ask()
    expected = [step.token for step in asked.steps([1, 2, 3], 40)]
    asked.sizes.clear()
    asked.draw = None
    assert [step.token for step in asked.steps([1, 2, 3], 40)] == expected
    assert not asked.sizes
