"""Small programs that try one CPU kernel in odd shapes on random numbers, judged by the numpy reference.

A kernel is judged by the normalised mean square error of what it wrote, ``sum (y - r)^2 / sum r^2``; kernels that only
move numbers must be exact. ``selftest.py`` tries all kernels, ``cpu/verified_kernels.py`` those just compiled.

A program here is a row of ops of one kernel, in many shapes (``kernels/ops`` has them), with buffers of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import numpy as np

from edgellm.arguments import CACHE_TYPES
from edgellm.kernels.cache_types import PACKED, QUANTIZED, TOKEN_TYPES, stored
from edgellm.kernels.cpu.compile.kernel_table import DECODE, STREAM, TEAM, TOP_K
from edgellm.kernels.cpu.run.draw import CPUDraw
from edgellm.kernels.cpu.weights import BLOCKS, SUPERBLOCKS
from edgellm.kernels.draw import DrawSpec, Link
from edgellm.kernels.kv import BLOCK_TOKENS, CachePool, KVLayer
from edgellm.kernels.ops import OPS, Add, Embed, Op, SelectOutputs
from edgellm.kernels.ops.sketch import N_VOCAB, Sketch
from edgellm.kernels.program import Batch, Executor, Program
from edgellm.kernels.reference import ReferenceExecutor

if TYPE_CHECKING:
    from edgellm.kernels.cpu.compile.kernel_cache import KernelCache

MATMUL_LIMIT = 1e-6  # 15-bit activations are near 1e-9; plain int8 ones would be near 1e-4
SUPERBLOCK_LIMIT = 1e-5  # one scale for 256 of them, three of which are far out: near 1e-7
FLOAT_LIMIT = 1e-9  # another order of float32 sums is near 1e-13
N_TOKENS = (1, 2, 5, 25)
STARTS = {1: 300, 2: 31, 5: 600, 25: 250}  # first position: later than 256, and the context is summed in cuts
LOOKS_AHEAD = 5  # so many tokens see further than themselves
MAX_TOKENS = 25
N_BLOCKS = 24  # 768 positions


@dataclass(frozen=True)
class SelfTestResult:
    """What a kernel computed against what it should: ``ok`` is ``nmse <= limit``; ``detail`` names the worst case."""

    kernel: str
    form: str
    nmse: float
    limit: float
    ok: bool
    detail: str


def nmse(values: np.ndarray, expected: np.ndarray) -> float:
    """Normalised mean square error, infinite where either is not finite."""
    difference = np.sum(np.square(values.astype(np.float64) - expected))
    power = np.sum(np.square(expected, dtype=np.float64))
    if not np.isfinite(difference) or not np.isfinite(power):
        return float("inf")
    return float(difference / power) if power else float("inf") if difference else 0.0


# ---- programs of one kernel ------------------------------------------------------------------------------------------


def sketch(seed: int = 1, max_tokens: int = MAX_TOKENS) -> Sketch:
    """A program to add ops to. Its first op adds nothing to nothing; the hook after it fills all inputs."""
    s = Sketch(np.random.default_rng(seed), max_tokens)
    start = s.buffer(1)
    s.emit("start", Add(start, start, start))
    return s


def add_trial(s: Sketch, kernel: str) -> None:
    """Add ops that run a kernel: its name is that of an op, with a variant behind it."""
    if kernel in TEAM:
        _chain(s)
    else:
        kernel = SHOWN_BY.get(kernel, kernel)
        op = max((op for op in OPS if f"{kernel}_".startswith(f"{op.name}_")), key=lambda op: len(op.name))
        variant = kernel[len(op.name) + 1 :]
        op.trial(s, variant) if variant else op.trial(s)


def _chain(s: Sketch) -> None:
    """Many short ops that need each other's results: threads out of step would show."""
    x, y = s.buffer(N_VOCAB), s.buffer(N_VOCAB)
    s.emit("embed", Embed(s.tensor("F32", (N_VOCAB, N_VOCAB)), x))
    s.emit("add", Add(x, x, y))
    for _ in range(20):
        s.emit("add", Add(x, y, y))
    s.emit("select", SelectOutputs(y, Program.output))


SHOWN_BY = {
    "quantize": "matmul_q8_0",
    "group_by_expert": "expert_matmul_q8_0",
    **{f"{part}_{name}": f"attention_{name}" for name in CACHE_TYPES for part in ("score", "weigh")},
    **{f"store_{name}": f"store_kv_{name}" for name in TOKEN_TYPES},
}
"""Kernels that no op has, and one that needs them."""

LIMITS: dict[str, float] = {
    **dict.fromkeys((*TEAM, "add", "add_rows", "select_outputs", "split_heads", "join_heads", "store_kv"), 0.0),
    **{f"{op}_{quant.lower()}": MATMUL_LIMIT for quant in BLOCKS for op in ("matmul", "expert_matmul")},
    **{f"{op}_{quant.lower()}": SUPERBLOCK_LIMIT for quant in SUPERBLOCKS for op in ("matmul", "expert_matmul")},
    **dict.fromkeys(SHOWN_BY, MATMUL_LIMIT),
    **{f"{op}_{name}": 0.0 for name in TOKEN_TYPES for op in ("store", "bound_keys")},
    **dict.fromkeys(("pack_kv", "choose_blocks"), 0.0),
    "attention_typed": MATMUL_LIMIT,
}
"""NMSE that a kernel may have; FLOAT_LIMIT where none is given."""


# ---- running one on both executors -----------------------------------------------------------------------------------


def try_kernel(
    kernel: str, cache: KernelCache, make_executor: Callable[..., Executor], n_threads: int = 2
) -> SelfTestResult:
    """The worst NMSE of a kernel over its shapes and numbers of tokens.

    ``make_executor`` is CPUExecutor, which needs this test for its own kernels; it takes them from ``cache``.
    """
    if kernel == TOP_K:
        return _try_top_k(cache)
    if kernel == DECODE:
        return _try_decode(cache, make_executor, n_threads)
    if kernel == STREAM:
        return _try_stream(cache)
    s = sketch()
    add_trial(s, kernel)
    program = s.program()
    reference = ReferenceExecutor(program, N_BLOCKS, MAX_TOKENS, "float16")
    executor = make_executor(program, N_BLOCKS, n_threads, MAX_TOKENS, untested=cache)
    for one in (reference, executor):
        fill_randomly(one.pool)
    found: list[tuple[float, str]] = []
    try:
        for n in N_TOKENS:
            batch = random_batch(s.rng, program, n, STARTS[n])
            expected, values = (outputs_of_ops(e, batch, s.inputs) for e in (reference, executor))
            for shape, one, other in zip(s.shapes, values, expected, strict=True):
                found.append((nmse(one, other), f"{shape} tokens={n}"))
            if kernel in TEAM:  # without a hook the threads go from op to op by themselves
                found.append((nmse(executor.run(batch), reference.run(batch)), f"chain of ops tokens={n}"))
    finally:
        executor.close()
    error, detail = max(found, key=itemgetter(0))
    limit = LIMITS.get(kernel, FLOAT_LIMIT)
    return SelfTestResult(kernel, cache.isa.name, error, limit, error <= limit, detail)


def _try_stream(cache: KernelCache) -> SelfTestResult:
    """Every byte of whole strips is read once, in each order: the sums of numbers are exact."""
    from edgellm.kernels.cpu.compile.jit import KERNEL, CodeMemory
    from edgellm.kernels.cpu.lib.layout import STREAM_ORDERS, STREAM_ROW_NBYTES, STREAM_ROWS

    code = CodeMemory()
    stream = KERNEL(code.load(STREAM, cache.objects([STREAM])[STREAM]))
    n_read = 3 * STREAM_ROWS * STREAM_ROW_NBYTES // 4  # three strips, and a piece of one
    memory = np.random.default_rng(1).integers(-(2**31), 2**31, n_read + 160, dtype=np.int32)
    expected, right = memory[:n_read].sum(dtype=np.int32), True
    for order in STREAM_ORDERS:
        sums = np.zeros(16, np.int32)
        stream(memory.ctypes.data, memory.nbytes, order, sums.ctypes.data)
        right &= bool(sums.sum(dtype=np.int32) == expected)
    return SelfTestResult(STREAM, cache.isa.name, float(not right), 0.0, right, f"{memory.nbytes:,} bytes, 3 orders")


def _try_top_k(cache: KernelCache) -> SelfTestResult:
    """The kernel that no op has: which logits are largest must be exact, their sum is judged by its NMSE."""
    from edgellm.kernels.cpu.compile.jit import CodeMemory

    memory = CodeMemory()
    device = CPUDraw(memory.load(TOP_K, cache.objects([TOP_K])[TOP_K]), memory)
    rng = np.random.default_rng(1)
    found: list[tuple[float, str]] = []
    for n in (1, 15, 64, 333, 4099):
        logits = (4 * rng.standard_normal(n, np.float32)).round(2)  # some of them equal
        order = np.argsort(-logits, kind="stable")
        for k in sorted({1, min(n, 40), min(n, device.max_k)}):
            head = device.top_k(logits, k, with_sum=True)
            expected = np.log(np.exp(logits, dtype=np.float64).sum())
            right = head is not None and np.array_equal(head.positions, order[:k])
            error = nmse(np.array([head.log_sum]), np.array([expected])) if head and right else float("inf")
            found.append((error, f"n={n} k={k}"))
            found.append((_error_of_draw(device, logits, order[:k]), f"draw n={n} k={k}"))
    error, detail = max(found, key=itemgetter(0))
    return SelfTestResult(TOP_K, cache.isa.name, error, FLOAT_LIMIT, error <= FLOAT_LIMIT, detail)


def _error_of_draw(device: CPUDraw, logits: np.ndarray, head: np.ndarray) -> float:
    """NMSE of what a chain has made of the head, infinite when it left another number of them."""
    links = Link("temperature", 2.0), Link("min_p", -4.0), Link("top_p", 0.9, 2), Link("top_k", 30)
    draw = device.open(DrawSpec(links, len(head), len(head)), np.random.default_rng(1))
    if not draw.draw(logits):
        return float("inf")
    drawn, shaped = draw.drawn(1)[0], logits[head].astype(np.float64) / 2
    likely = int(np.count_nonzero(shaped >= shaped[0] - 4))
    reached = np.cumsum(np.exp(shaped[:likely] - shaped[0]))
    most = min(max(int(np.searchsorted(reached, 0.9 * reached[-1])) + 1, 2), likely)
    n_left = min(most, 30)
    if drawn.left != [len(head), likely, most, n_left] or not 0 <= drawn.place < n_left:
        return float("inf")
    return nmse(np.array([*drawn.shaped[:likely], drawn.shaped_sum]), np.array([*shaped[:likely], reached[n_left - 1]]))


def _try_decode(cache: KernelCache, make_executor: Callable[..., Any], n_threads: int) -> SelfTestResult:
    """The kernel that goes from token to token: they must be those that follow one by one."""
    s, n_steps = sketch(), 8
    _chain(s)
    program = s.program()
    reference = ReferenceExecutor(program, 1, 1)
    tokens = [3]
    for position in range(n_steps):
        tokens.append(int(reference.run(Batch.single(program, tokens[-1:], position)).argmax()))
    executor = make_executor(program, 1, n_threads, 1, untested=cache)
    draw = executor.draw.open(DrawSpec((Link("temperature", 0.0),), 1, 1), s.rng)
    try:
        n = executor.decode(Batch.single(program, tokens[:1]), n_steps, draw)
    finally:
        executor.close()
    ok = draw.tokens(n) == tokens[1:]
    return SelfTestResult(DECODE, cache.isa.name, 0.0 if ok else float("inf"), 0.0, ok, f"{n} of {n_steps} tokens")


def outputs_of_ops(
    executor: Executor, batch: Batch, inputs: dict[str, np.ndarray], first_row: int = 0
) -> list[np.ndarray]:
    """What every op of a program wrote: its output buffer, or all that it wrote, in one row, as float32.

    The inputs are the rows from ``first_row`` on, one for each token of the batch.
    """
    outputs: list[np.ndarray] = []

    def after(index: int, op: Op, read: Callable[[str], np.ndarray]) -> None:
        if index == 0:
            for name, values in inputs.items():
                read(name)[:] = values[first_row : first_row + len(batch)]
        written = [read(name) for name in op.written_buffers()]
        written += [array for layer in op.written_layers() for array in executor.pool.arrays[layer]]
        one = len(written) == 1
        outputs.append(written[0].copy() if one else np.concatenate([a.astype(np.float32).ravel() for a in written]))

    executor.run(batch, after)
    return outputs


def fill_randomly(pool: CachePool) -> None:
    """Random keys and values everywhere, the same at every call."""
    rng = np.random.default_rng(2)
    for layer, arrays in zip(pool.layers, pool.arrays, strict=True):
        names = (layer.type_k, layer.type_v, "f16") if isinstance(layer, KVLayer) else ("f16",)
        for values, (array, name) in enumerate(zip(arrays, names, strict=False)):
            if name in QUANTIZED:
                assert isinstance(layer, KVLayer), "it has a type"
                dim = layer.head_dim_v if values else layer.head_dim_k
                x = rng.standard_normal((*array.shape[:2], BLOCK_TOKENS, dim), np.float32)
                array[:] = QUANTIZED[name].write(QUANTIZED[name].quantize(x), values=bool(values))
            elif name in PACKED:
                assert isinstance(layer, KVLayer), "it has a type"
                dims = (BLOCK_TOKENS, layer.head_dim_v) if values else (layer.head_dim_k, BLOCK_TOKENS)
                x = rng.standard_normal((*array.shape[:2], *dims), np.float32)
                array[:] = PACKED[name].pack(x, values=bool(values))
            else:
                x = rng.standard_normal(array.shape, np.float32)
                array[:] = stored(x, name) if name == "bf16" else x


def random_batch(rng: np.random.Generator, program: Program, n: int, start: int) -> Batch:
    """n tokens from ``start`` on; with more than 8 the last third is another sequence. Blocks in random order."""
    second = n // 3 if n > 8 else 0
    positions = np.concatenate([np.arange(start, start + n - second), np.arange(40, 40 + second)])
    n_blocks = N_BLOCKS - 2
    tables = []
    for group in program.groups:
        if group.kind == "state":
            tables.append(np.array([[0, 1], [3, 2]], np.int32))
            continue
        blocks = rng.permutation(N_BLOCKS)
        tables.append(np.stack([blocks[:n_blocks], np.roll(blocks, 3)[:n_blocks]]).astype(np.int32))
        tables[-1][1, 2:] = -1
        tables[-1][1, :2] = blocks[n_blocks:]
    outputs = rng.random(n) < 0.7
    outputs[-1] = True  # ops behind a selection of nothing do not run
    return Batch(
        rng.integers(0, N_VOCAB, n).astype(np.int32),
        positions.astype(np.int32),
        (np.arange(n) >= n - second).astype(np.int32),
        outputs,
        tuple(tables),
        sees=np.repeat(positions[[1, -1]], [2, n - 2]).astype(np.int32) if n == LOOKS_AHEAD else None,
        types=rng.integers(0, 2, n).astype(np.int32),
        adapters=random_scales(n, program.n_adapters) if program.n_adapters else None,
    )


def random_scales(n: int, n_adapters: int) -> np.ndarray:
    """The scales of adapters for n tokens, (n, n_adapters) float32: a third of them 0."""
    token, adapter = np.ogrid[:n, :n_adapters]
    scales = np.random.default_rng(3).uniform(-2, 2, (n, n_adapters))
    scales[(token + 2 * adapter) % 3 == 0] = 0
    return scales.astype(np.float32)
