"""Tokens per second, measured as llama-bench measures them: the executor alone, without tokenizer and sampler.

``pp512`` reads a prompt of 512 random tokens in steps of ``n_ubatch``; ``tg128`` computes 128 tokens one after the
other; ``@ d512`` does it behind 512 tokens that are already in the cache; ``x 16`` makes 16 texts grow together, one
token each in every step, and counts the tokens of all. A warm-up comes first and is not counted; it lasts until the
executor has found with how many threads it decodes fastest.
Reading a prompt is bound by arithmetic, decoding by memory: so a decode test also states the bytes that it must read
for a token, as a share of what this machine reads in that time at best: in several orders, and from large pages. A file
that is in small pages streams at less.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np

from edgellm.formats.errors import UnsupportedError
from edgellm.formats.large_pages import large_page_share
from edgellm.kernels.chosen_blocks import check_chosen_context
from edgellm.kernels.executors import GPULayers, describe, executor_class, is_gpu
from edgellm.kernels.kv import BLOCK_TOKENS, KVLayer
from edgellm.kernels.ops import BoundKeys, ChooseBlocks
from edgellm.kernels.program import Batch
from edgellm.machine.cpu import cpu_name

if TYPE_CHECKING:
    from edgellm.kernels.program import Executor, Program
    from edgellm.llm import LLM
    from edgellm.measure.model_card import ModelCard

N_UBATCH = 512
DRAFTED_TEXT = "A river begins in the mountains, where rain and snow gather in small streams. On its way to the sea"


@dataclass(frozen=True)
class BenchTest:
    """``n_prompt`` tokens read, then ``n_gen`` tokens made, behind ``n_depth`` tokens in the cache.

    n_parallel   sequences of which each step makes one token; a test with several reads no prompt
    drafted      an answer to a text, sampler and all, whose tokens a draft model drafts
    """

    n_prompt: int
    n_gen: int
    n_depth: int = 0
    n_parallel: int = 1
    drafted: bool = False

    @property
    def name(self) -> str:
        """llama-bench's word for it, such as ``tg128 @ d512``."""
        work = "+".join(f"{kind}{n}" for kind, n in (("pp", self.n_prompt), ("tg", self.n_gen)) if n)
        if self.n_parallel > 1:
            work += f" x {self.n_parallel}"
        if self.drafted:
            work += " drafted"
        return f"{work} @ d{self.n_depth}" if self.n_depth else work

    @property
    def n_tokens(self) -> int:
        """Tokens counted, those before them left out."""
        return self.n_prompt + self.n_gen * self.n_parallel


@dataclass(frozen=True)
class BenchResult:
    """Seconds of every repetition of a test.

    bytes_per_token   bytes of weights and cache that one token of a decode test must read
    read_bandwidth    bytes per second that as many threads read from memory at best, or that a GPU copies; None where
                      not measured
    large_page_share  the part of the file that is mapped by large pages (formats/large_pages.py), None where not known
    cache_types       of keys and values
    decode_threads    those that made tokens fastest of all, None where nothing was tried
    """

    test: BenchTest
    n_threads: int
    seconds: tuple[float, ...]
    bytes_per_token: int
    read_bandwidth: float | None
    large_page_share: float | None = None
    cache_types: tuple[str, str] = ("f16", "f16")
    decode_threads: int | None = None
    started: datetime = field(default_factory=lambda: datetime.now(UTC))

    @property
    def rates(self) -> tuple[float, ...]:
        """Tokens per second of every repetition."""
        return tuple(self.test.n_tokens / s for s in self.seconds)

    @property
    def mean(self) -> float:
        """Mean of the rates."""
        return statistics.fmean(self.rates)

    @property
    def deviation(self) -> float:
        """Sample standard deviation of the rates, 0 for a single repetition."""
        return statistics.stdev(self.rates) if len(self.rates) > 1 else 0.0

    @property
    def bandwidth_share(self) -> float | None:
        """The part of the memory bandwidth that decoding one text reaches; None for other tests."""
        if self.test.n_prompt or self.test.n_parallel > 1 or self.test.drafted or not self.read_bandwidth:
            return None
        return self.mean * self.bytes_per_token / self.read_bandwidth

    def record(
        self, card: ModelCard, n_ubatch: int = N_UBATCH, executor: str = "cpu", gpu_layers: GPULayers = "auto"
    ) -> dict[str, Any]:
        """The result under llama-bench's JSON names, and our own at the end. -1 layers are as many as fit."""
        from importlib.metadata import version

        kind = executor_class(executor)
        own = f"f{8 * np.dtype(kind.kv_dtype).itemsize}"
        type_k, type_v = (own if name == "f16" else name for name in self.cache_types)
        nanoseconds = [s * 1e9 for s in self.seconds]
        return {
            "build_commit": f"edgellm {version('edgellm')}",
            "build_number": 0,
            "cpu_info": cpu_name(),
            "gpu_info": describe(executor) if is_gpu(executor) else "",
            "backends": kind.backend,
            "model_filename": str(card.path),
            "model_type": card.model_type,
            "model_size": card.nbytes,
            "model_n_params": card.n_params,
            "n_batch": n_ubatch,
            "n_ubatch": n_ubatch,
            "n_threads": self.n_threads,
            "type_k": type_k,
            "type_v": type_v,
            "n_gpu_layers": 0 if not is_gpu(executor) else -1 if gpu_layers == "auto" else gpu_layers,
            "use_mmap": True,
            "n_prompt": self.test.n_prompt,
            "n_gen": self.test.n_gen,
            "n_depth": self.test.n_depth,
            "n_parallel": self.test.n_parallel,
            "test_time": self.started.strftime("%Y-%m-%dT%H:%M:%SZ"),
            "avg_ns": round(statistics.fmean(nanoseconds)),
            "stddev_ns": round(statistics.stdev(nanoseconds)) if len(nanoseconds) > 1 else 0,
            "avg_ts": round(self.mean, 6),
            "stddev_ts": round(self.deviation, 6),
            "samples_ns": [round(ns) for ns in nanoseconds],
            "samples_ts": [round(rate, 6) for rate in self.rates],
            "bytes_per_token": self.bytes_per_token,
            "read_bandwidth": None if self.read_bandwidth is None else round(self.read_bandwidth),
            "bandwidth_share": None if self.bandwidth_share is None else round(self.bandwidth_share, 4),
            "large_page_share": None if self.large_page_share is None else round(self.large_page_share, 4),
            "decode_threads": self.decode_threads,
        }


def bench_tests(
    n_prompts: Sequence[int],
    n_gens: Sequence[int],
    depths: Sequence[int],
    pairs: Sequence[tuple[int, int]] = (),
    parallel: Sequence[int] = (1,),
) -> list[BenchTest]:
    """The tests that lists of ``-p``, ``-n``, ``-d``, ``-pg`` and ``-np`` ask for, in llama-bench's order."""
    tests = []
    for depth in depths:
        tests += [BenchTest(n, 0, depth) for n in n_prompts if n]
        tests += [BenchTest(0, n, depth, together) for n in n_gens if n for together in parallel]
        tests += [BenchTest(p, g, depth) for p, g in pairs if p + g]
    return tests


def longest(tests: Sequence[BenchTest]) -> int:
    """Tokens of the longest text."""
    return max(test.n_depth + test.n_prompt + test.n_gen for test in tests)


def tests_of(program: Program, tests: Sequence[BenchTest], n_ubatch: int) -> list[BenchTest]:
    """Those that the program can be measured by: one that reads whole texts has them in one step, and nothing behind.

    UnsupportedError where there are none, or where the longest is too long for the program.
    """
    check_chosen_context(program, longest(tests))
    whole = program.takes_whole_texts
    fitting = [one for one in tests if not whole or not (one.n_gen or one.n_depth or one.n_prompt > n_ubatch)]
    if not fitting:
        raise UnsupportedError(
            f"{program.architecture} reads whole texts, so it is measured by prompts of one step. Give -p with at most "
            f"{n_ubatch} tokens, or a larger -ub."
        )
    return fitting


def run_tests(
    program: Program,
    tests: Sequence[BenchTest],
    make_executor: Callable[[Sequence[int]], Executor],
    *,
    n_threads: int,
    repetitions: int = 5,
    n_ubatch: int = N_UBATCH,
    warmup: bool = True,
    read_bandwidth: float | None = None,
    on_start: Callable[[BenchTest], None] | None = None,
) -> Iterator[BenchResult]:
    """Run each test ``repetitions`` times; ``make_executor`` makes what is measured, of blocks and slots by group."""
    n_ctx = max(test.n_depth + test.n_prompt + test.n_gen for test in tests)
    most = max(
        test.n_parallel * math.ceil((test.n_depth + test.n_prompt + test.n_gen) / BLOCK_TOKENS) for test in tests
    )
    n_slots = max(test.n_parallel for test in tests)
    executor = make_executor([n_slots if group.kind == "state" else most for group in program.groups])
    tokens = np.random.default_rng(0).integers(0, program.n_vocab, n_ctx, dtype=np.int32)
    try:
        for test in tests:
            if on_start:
                on_start(test)
            yield _run_test(executor, tokens, test, n_threads, repetitions, n_ubatch, warmup, read_bandwidth)
    finally:
        executor.close()


def run_drafted(
    llm: LLM, n_gens: Sequence[int], *, n_threads: int, repetitions: int = 5, warmup: bool = True
) -> Iterator[BenchResult]:
    """Answers of so many tokens to ``DRAFTED_TEXT``, greedy, of a model that was loaded with a draft model."""
    for n in [n for n in n_gens if n]:
        seconds = []
        for number in range(repetitions + warmup):
            times = llm.generate(DRAFTED_TEXT, max_tokens=n + 1, temperature=0, ignore_eos=True).timings
            if number >= warmup:
                seconds.append(times.generation_ms / 1e3)
        nbytes = bytes_per_token(llm.program, n // 2, llm.executor.kv_dtype)
        yield BenchResult(BenchTest(0, n, drafted=True), n_threads, tuple(seconds), nbytes, None)


def _run_test(
    executor: Executor,
    tokens: np.ndarray,
    test: BenchTest,
    n_threads: int,
    repetitions: int,
    n_ubatch: int,
    warmup: bool,
    read_bandwidth: float | None,
) -> BenchResult:
    """One test; what lies behind its depth is overwritten by every repetition, which the causal mask allows."""
    n_blocks = math.ceil((test.n_depth + test.n_prompt + test.n_gen) / BLOCK_TOKENS)
    for sequence in range(test.n_parallel):
        _read(executor, tokens[: test.n_depth], 0, n_ubatch, n_blocks, sequence)
    if warmup:
        _read(executor, tokens[test.n_depth :][: test.n_prompt], test.n_depth, n_ubatch, n_blocks)
        _warm_up(executor, tokens, test, n_blocks)
    seconds = []
    for _ in range(repetitions):
        started = time.perf_counter()
        _read(executor, tokens[test.n_depth :][: test.n_prompt], test.n_depth, n_ubatch, n_blocks)
        _generate(executor, tokens, test.n_depth + test.n_prompt, test.n_gen, test.n_parallel, n_blocks)
        seconds.append(time.perf_counter() - started)
    middle = test.n_depth + test.n_prompt + test.n_gen // 2
    program = executor.program
    largest = max(program.tensors.values(), key=lambda tensor: tensor.nbytes)
    return BenchResult(
        test,
        n_threads,
        tuple(seconds),
        bytes_per_token(program, middle, executor.pool.dtype.name),
        read_bandwidth,
        large_page_share(largest.pieces[0].data),
        next(((x.type_k, x.type_v) for x in program.cache_layers if isinstance(x, KVLayer)), ("f16", "f16")),
        # most have nothing to choose
        executor.decode_threads(test.n_parallel).kept if test.n_gen and hasattr(executor, "decode_threads") else None,
    )


def _read(executor: Executor, tokens: np.ndarray, start: int, n_ubatch: int, n_blocks: int, sequence: int = 0) -> None:
    """The tokens from position ``start`` on of one of the sequences."""
    for i in range(0, len(tokens), n_ubatch):
        batch = Batch.single(executor.program, tokens[i : i + n_ubatch], start + i, "last")
        executor.run(replace(batch, tables=_tables(executor.program, [sequence], n_blocks, start + i)))


def _warm_up(executor: Executor, tokens: np.ndarray, test: BenchTest, n_blocks: int) -> None:
    """A few steps, and where texts grow as many as the executor needs to settle."""
    n = min(test.n_gen, 4)
    _generate(executor, tokens, test.n_depth, n, test.n_parallel, n_blocks)
    while n and not getattr(executor, "settled", True):  # most have nothing to try
        _generate(executor, tokens, test.n_depth, n, test.n_parallel, n_blocks)


def _generate(executor: Executor, tokens: np.ndarray, start: int, n: int, n_parallel: int, n_blocks: int) -> None:
    """n steps of one token for each of ``n_parallel`` sequences."""
    sequences = np.arange(n_parallel, dtype=np.int32)
    for i in range(start, start + n):
        batch = Batch(
            tokens=np.take(tokens, np.arange(i, i + n_parallel), mode="wrap"),
            positions=np.full(n_parallel, i, np.int32),
            sequences=sequences,
            outputs=np.ones(n_parallel, bool),
            tables=_tables(executor.program, sequences, n_blocks, i),
        )
        executor.run(batch)


def _tables(
    program: Program, sequences: Sequence[int] | np.ndarray, n_blocks: int, start: int
) -> tuple[np.ndarray, ...]:
    """By group: ``n_blocks`` blocks of each sequence, and a slot that its state goes on in, if it begins not here."""
    rows = np.asarray(sequences, np.int32)[:, None]
    blocks = rows * n_blocks + np.arange(n_blocks, dtype=np.int32)
    slots = np.concatenate([rows if start else np.full_like(rows, -1), rows], axis=1)
    return tuple(slots if group.kind == "state" else blocks for group in program.groups)


def bytes_per_token(program: Program, n_cached: int, kv_dtype: str = "float16") -> int:
    """Bytes of weights and of a cache of ``n_cached`` tokens that computing one more token must read."""
    weights = sum(op.nbytes_per_token(program.tensors) for op in program.ops)
    attends = (op for op in program.ops if not isinstance(op, BoundKeys | ChooseBlocks))  # which read what it counts
    layers = [program.cache_layers[index] for op in attends for index in op.read_layers()]
    return weights + sum(layer.seen_nbytes(n_cached, kv_dtype) for layer in layers)
