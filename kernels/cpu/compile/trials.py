"""Small programs that try one CPU kernel in odd shapes on random numbers, judged by the numpy reference.

A kernel is judged by the normalised mean square error of what it wrote, ``sum (y - r)^2 / sum r^2``; kernels that only
move numbers must be exact. ``selftest.py`` tries all kernels, ``cpu/verified_kernels.py`` those just compiled.

A program here is a row of ops of one kernel, in many shapes. Each op has buffers of its own: the first op of the
program adds nothing to nothing, and the hook after it fills all inputs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import numpy as np

from edgellm.formats.gguf import QuantizedTensor
from edgellm.formats.quant_types import QUANT_TYPES
from edgellm.kernels.cpu.compile.kernel_table import DECODE, STREAM, TEAM, VOCABULARY
from edgellm.kernels.cpu.weights import BLOCKS, FLOAT, QUANTIZED, SUPERBLOCKS
from edgellm.kernels.kv import CachePool, KVLayer
from edgellm.kernels.likeliest import MAX_K, VocabularyKernel
from edgellm.kernels.ops import Add, ApplyRope, Attention, Embed, GatedUnit, Matmul, Op, RMSNorm, SelectOutputs, StoreKV
from edgellm.kernels.program import Batch, Buffer, Executor, Program
from edgellm.kernels.reference import ReferenceExecutor
from edgellm.kernels.rope import Rope, frequencies
from edgellm.kernels.token_draw import Link, TokenDraw
from edgellm.kernels.vocabulary_layout import MIN_P, TEMPERATURE, TOP_K, TOP_P

if TYPE_CHECKING:
    from edgellm.kernels.cpu.compile.kernel_cache import KernelCache

MATMUL_LIMIT = 1e-6  # 15-bit activations are near 1e-9; plain int8 ones would be near 1e-4
SUPERBLOCK_LIMIT = 1e-5  # one scale for 256 of them, three of which are far out: near 1e-7
FLOAT_LIMIT = 1e-9  # another order of float32 sums is near 1e-13
N_TOKENS = (1, 2, 5, 17)
STARTS = {1: 300, 2: 31, 5: 600, 17: 250}  # first position: later than 256, and the context is summed in cuts
MAX_TOKENS = 17
N_VOCAB = 50
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


# ---- random weights --------------------------------------------------------------------------------------------------

# the minimum of a block in units of its scale that centres the weights on zero
_MINIMA = {"Q4_1": -7.5, "Q5_1": -15.5, "Q2_K": 1.5, "Q4_K": 7.5, "Q5_K": 15.5}


def random_tensor(rng: np.random.Generator, name: str, quant: str, shape: tuple[int, ...]) -> QuantizedTensor:
    """Random weights of any type that has kernels, and of others with float scales: random bits under sane scales."""
    kind = QUANT_TYPES[quant]
    n_rows = int(np.prod(shape[:-1]))
    row_nbytes = kind.row_nbytes(shape[-1])
    if quant in FLOAT:
        values = rng.standard_normal((n_rows, shape[-1]), np.float32) / np.float32(np.sqrt(shape[-1]))
        upper_halves = (values.view(np.uint32) >> 16).astype(np.uint16)
        data = {"F32": values, "F16": values.astype(np.float16), "BF16": upper_halves}
        return QuantizedTensor(name, shape, kind, data[quant].view(np.uint8))
    data_bytes = rng.integers(0, 256, (n_rows, row_nbytes), np.uint8)
    blocks = data_bytes.reshape(-1).view(kind.layout)
    scale = rng.uniform(0.001, 0.02, len(blocks)) * rng.choice((-1, 1), len(blocks))
    for field_name, (dtype, *_) in (kind.layout.fields or {}).items():
        if dtype.kind == "f":
            is_minimum = field_name in ("m", "dmin")
            blocks[field_name] = scale * _MINIMA[quant] * rng.uniform(0.8, 1.2, len(blocks)) if is_minimum else scale
    if quant == "MXFP4":
        blocks["e"] = rng.integers(118, 124, len(blocks))  # 2^(e - 128), near 0.01
    return QuantizedTensor(name, shape, kind, data_bytes)


# ---- programs of one kernel ------------------------------------------------------------------------------------------


@dataclass
class Sketch:
    """A program in the making: ops over buffers of their own, and the random numbers that go in.

    inputs   name -> (max_tokens, width) float32
    shapes   per op, what to call the case in a report
    """

    rng: np.random.Generator
    max_tokens: int = MAX_TOKENS
    ops: list[Op] = field(default_factory=list)
    shapes: list[str] = field(default_factory=list)
    buffers: dict[str, Buffer] = field(default_factory=dict)
    inputs: dict[str, np.ndarray] = field(default_factory=dict)
    tensors: dict[str, QuantizedTensor] = field(default_factory=dict)
    cache_layers: list[KVLayer] = field(default_factory=list)
    ropes: dict[str, Rope] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.buffers["logits"] = Buffer("logits", N_VOCAB, "outputs")
        start = self.buffer(1)
        self.emit("start", Add(start, start, start))

    def emit(self, shape: str, op: Op) -> None:
        """Append an op."""
        self.ops.append(op)
        self.shapes.append(shape)

    def buffer(self, width: int) -> str:
        """A new buffer."""
        name = f"b{len(self.buffers)}"
        self.buffers[name] = Buffer(name, width)
        return name

    def input(self, width: int) -> str:
        """A new buffer of normal random numbers, a few of them far out as in a real model."""
        name = self.buffer(width)
        values = self.rng.standard_normal((self.max_tokens, width), np.float32)
        values[:, :: max(1, width // 3)] *= 30
        self.inputs[name] = values
        return name

    def tensor(self, quant: str, shape: tuple[int, ...]) -> str:
        """A new random weight."""
        name = f"w{len(self.tensors)}"
        self.tensors[name] = random_tensor(self.rng, name, quant, shape)
        return name

    def layer(self, *shape: int) -> int:
        """A new layer of the cache: heads, the two head dimensions, window."""
        self.cache_layers.append(KVLayer(*shape))
        return len(self.cache_layers) - 1

    def program(self) -> Program:
        """The program so far."""
        caches = tuple(self.cache_layers)
        return Program("selftest", tuple(self.ops), self.buffers, self.tensors, caches, self.ropes, N_VOCAB, 4096, 0)


def _matmul(s: Sketch, quant: str) -> None:
    block = QUANT_TYPES[quant].block_size
    columns = {1: (40, 33, 512, 7, 100), 32: (32, 96, 544, 64, 1056), 256: (256, 512, 768, 256, 1024)}[block]
    for i, (n_out, n_in) in enumerate(zip((1, 7, 17, 33, 100), columns, strict=True)):
        bias = s.tensor("F32", (n_out,)) if i % 2 else None
        s.emit(
            f"n_out={n_out} n_in={n_in}",
            Matmul(s.input(n_in), s.tensor(quant, (n_out, n_in)), s.buffer(n_out), bias),
        )


def _embed(s: Sketch, quant: str) -> None:
    block = QUANT_TYPES[quant].block_size
    for width, scale in ((block, 1.0), (block * 3, 25.3), (block * 2 + (5 if block == 1 else 0), 1.0)):
        s.emit(f"width={width}", Embed(s.tensor(quant, (N_VOCAB, width)), s.buffer(width), scale))


def _rms_norm(s: Sketch) -> None:
    for groups, width in ((1, 576), (1, 33), (1, 7), (3, 40), (2, 64)):
        s.emit(
            f"groups={groups} width={width}",
            RMSNorm(s.input(groups * width), s.tensor("F32", (width,)), s.buffer(groups * width), 1e-5),
        )


def _rope(s: Sketch) -> None:
    for heads, head_dim, n_dims in ((3, 64, 64), (1, 40, 40), (2, 36, 20)):
        for adjacent in (False, True):
            name = f"r{len(s.ropes)}"
            s.ropes[name] = Rope(adjacent, frequencies(n_dims, 10000.0), 1.0 + 0.1 * adjacent)
            shape = f"heads={heads} head_dim={head_dim} n_dims={n_dims} adjacent={adjacent}"
            s.emit(shape, ApplyRope(s.input(heads * head_dim), head_dim, name))


def _gated_unit(s: Sketch, activation: Any) -> None:
    for width in (1, 17, 100, 256):
        s.emit(f"width={width}", GatedUnit(s.input(width), s.input(width), s.buffer(width), activation))


def _add(s: Sketch) -> None:
    for width in (1, 17, 100, 256):
        s.emit(f"width={width}", Add(s.input(width), s.input(width), s.buffer(width)))


def _select_outputs(s: Sketch) -> None:
    s.emit(f"width={N_VOCAB}", SelectOutputs(s.input(N_VOCAB), "logits"))


def _store_kv(s: Sketch) -> None:
    for heads, dim_k, dim_v, window in ((1, 64, 64, 0), (3, 40, 24, 0), (2, 17, 33, 40)):
        layer = s.layer(heads, dim_k, dim_v, window)
        shape = f"heads={heads} head_dim={dim_k}/{dim_v}"
        s.emit(shape, StoreKV(s.input(heads * dim_k), s.input(heads * dim_v), layer))


def _attention(s: Sketch) -> None:
    shapes = ((1, 2, 64, 64, 0), (3, 3, 40, 24, 0), (4, 1, 17, 33, 100), (8, 1, 64, 64, 33))
    for group, heads, dim_k, dim_v, window in shapes:
        layer = s.layer(heads, dim_k, dim_v, window)
        n_heads = group * heads
        q, out = s.input(n_heads * dim_k), s.buffer(n_heads * dim_v)
        shape = f"heads={n_heads}/{heads} head_dim={dim_k}/{dim_v} window={window}"
        s.emit(shape, Attention(q, out, layer, n_heads, dim_k**-0.5))


def _chain(s: Sketch) -> None:
    """Many short ops that need each other's results: threads out of step would show."""
    x, y = s.buffer(N_VOCAB), s.buffer(N_VOCAB)
    s.emit("embed", Embed(s.tensor("F32", (N_VOCAB, N_VOCAB)), x))
    s.emit("add", Add(x, x, y))
    for _ in range(20):
        s.emit("add", Add(x, y, y))
    s.emit("select", SelectOutputs(y, "logits"))


SKETCHES: dict[str, Callable[[Sketch], None]] = {
    **dict.fromkeys(TEAM, _chain),
    "quantize": partial(_matmul, quant="Q8_0"),
    "rms_norm": _rms_norm,
    "rope": _rope,
    "add": _add,
    "select_outputs": _select_outputs,
    "store_kv": _store_kv,
    "attention": _attention,
    **{f"gated_{kind}": partial(_gated_unit, activation=kind) for kind in ("silu", "gelu")},
    **{f"matmul_{quant.lower()}": partial(_matmul, quant=quant) for quant in (*QUANTIZED, *FLOAT)},
    **{f"embed_{quant.lower()}": partial(_embed, quant=quant) for quant in (*QUANTIZED, *FLOAT)},
}

LIMITS: dict[str, float] = {
    **dict.fromkeys((*TEAM, "add", "select_outputs", "store_kv"), 0.0),
    **{f"matmul_{quant.lower()}": MATMUL_LIMIT for quant in BLOCKS},
    **{f"matmul_{quant.lower()}": SUPERBLOCK_LIMIT for quant in SUPERBLOCKS},
    "quantize": MATMUL_LIMIT,
}
"""NMSE that a kernel may have; FLOAT_LIMIT where none is given."""


# ---- running one on both executors -----------------------------------------------------------------------------------


def try_kernel(
    kernel: str, cache: KernelCache, make_executor: Callable[..., Executor], n_threads: int = 2
) -> SelfTestResult:
    """The worst NMSE of a kernel over its shapes and numbers of tokens.

    ``make_executor`` is CPUExecutor, which needs this test for its own kernels; it takes them from ``cache``.
    """
    if kernel == VOCABULARY:
        return _try_vocabulary(cache)
    if kernel == DECODE:
        return _try_decode(cache, make_executor, n_threads)
    if kernel == STREAM:
        return _try_stream(cache)
    sketch = Sketch(np.random.default_rng(1))
    SKETCHES[kernel](sketch)
    program = sketch.program()
    pools = [random_pool(program, N_BLOCKS) for _ in range(2)]
    reference = ReferenceExecutor(program, pools[0], MAX_TOKENS)
    executor = make_executor(program, pools[1], n_threads, MAX_TOKENS, cache=cache)
    found: list[tuple[float, str]] = []
    try:
        for n in N_TOKENS:
            batch = _batch(sketch.rng, program, n, STARTS[n])
            expected, values = (outputs_of_ops(e, batch, sketch.inputs) for e in (reference, executor))
            for shape, one, other in zip(sketch.shapes, values, expected, strict=True):
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
    from edgellm.kernels.cpu.lib.layout import STREAM_ROW_NBYTES, STREAM_ROWS

    code = CodeMemory()
    stream = KERNEL(code.load(STREAM, cache.objects([STREAM])[STREAM]))
    n_read = 3 * STREAM_ROWS * STREAM_ROW_NBYTES // 4  # three strips, and a piece of one
    memory = np.random.default_rng(1).integers(-(2**31), 2**31, n_read + 160, dtype=np.int32)
    expected, right = memory[:n_read].sum(dtype=np.int32), True
    for side_by_side in (0, 1):
        sums = np.zeros(16, np.int32)
        stream(memory.ctypes.data, memory.nbytes, side_by_side, sums.ctypes.data)
        right &= bool(sums.sum(dtype=np.int32) == expected)
    return SelfTestResult(STREAM, cache.isa.name, float(not right), 0.0, right, f"{memory.nbytes:,} bytes, two orders")


def _try_vocabulary(cache: KernelCache) -> SelfTestResult:
    """The kernel that no op has: which logits are largest must be exact, their sum is judged by its NMSE."""
    from edgellm.kernels.cpu.compile.jit import CodeMemory

    memory = CodeMemory()
    kernel = VocabularyKernel(memory.load(VOCABULARY, cache.objects([VOCABULARY])[VOCABULARY]), memory)
    rng = np.random.default_rng(1)
    found: list[tuple[float, str]] = []
    for n in (1, 15, 64, 333, 4099):
        logits = (4 * rng.standard_normal(n, np.float32)).round(2)  # some of them equal
        order = np.argsort(-logits, kind="stable")
        for k in sorted({1, min(n, 40), min(n, MAX_K)}):
            head = kernel(logits, k, with_sum=True)
            expected = np.log(np.exp(logits, dtype=np.float64).sum())
            right = head is not None and np.array_equal(head.positions, order[:k])
            error = nmse(np.array([head.log_sum]), np.array([expected])) if head and right else float("inf")
            found.append((error, f"n={n} k={k}"))
            found.append((_error_of_draw(kernel, logits, order[:k]), f"draw n={n} k={k}"))
    error, detail = max(found, key=itemgetter(0))
    return SelfTestResult(VOCABULARY, cache.isa.name, error, FLOAT_LIMIT, error <= FLOAT_LIMIT, detail)


def _error_of_draw(kernel: VocabularyKernel, logits: np.ndarray, head: np.ndarray) -> float:
    """NMSE of what a chain has made of the head, infinite when it left another number of them."""
    links = [Link(TEMPERATURE, 2.0), Link(MIN_P, -4.0), Link(TOP_P, 0.9, 2), Link(TOP_K, 30)]
    draw = TokenDraw(links, len(head), len(head), False, np.random.default_rng(1))
    if not kernel.draw(logits, draw):
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
    sketch, n_steps = Sketch(np.random.default_rng(1)), 8
    _chain(sketch)
    program = sketch.program()
    reference = ReferenceExecutor(program, random_pool(program, 1), 1)
    tokens = [3]
    for position in range(n_steps):
        tokens.append(int(reference.run(Batch.single(program, tokens[-1:], position)).argmax()))
    draw = TokenDraw([Link(TEMPERATURE, 0.0)], 1, 1, False, sketch.rng)
    executor = make_executor(program, random_pool(program, 1), n_threads, 1, cache=cache)
    try:
        n = executor.decode(Batch.single(program, tokens[:1]), n_steps, draw)
    finally:
        executor.close()
    ok = draw.tokens(n) == tokens[1:]
    return SelfTestResult(DECODE, cache.isa.name, 0.0 if ok else float("inf"), 0.0, ok, f"{n} of {n_steps} tokens")


def outputs_of_ops(
    executor: Executor, batch: Batch, inputs: dict[str, np.ndarray], first_row: int = 0
) -> list[np.ndarray]:
    """What every op of a program wrote, as float32: its output buffer, or the keys and values of its whole layer.

    The inputs are the rows from ``first_row`` on, one for each token of the batch.
    """
    outputs: list[np.ndarray] = []

    def after(index: int, op: Op, read: Callable[[str], np.ndarray]) -> None:
        if index == 0:
            for name, values in inputs.items():
                read(name)[:] = values[first_row : first_row + len(batch)]
        if isinstance(op, StoreKV):
            stored = executor.pool.arrays[op.layer]
            outputs.append(np.concatenate([a.astype(np.float32).reshape(-1) for a in stored]))
        else:
            outputs.append(read(op.x if isinstance(op, ApplyRope) else op.out).copy())

    executor.run(batch, after)
    return outputs


def random_pool(program: Program, n_blocks: int, seed: int = 2) -> CachePool:
    """A float16 pool full of random keys and values, the same at every call."""
    rng = np.random.default_rng(seed)
    pool = CachePool(program.cache_layers, [n_blocks] * len(program.groups))
    for array in itertools.chain(*pool.arrays):
        array[:] = rng.standard_normal(array.shape, np.float32)
    return pool


def _batch(rng: np.random.Generator, program: Program, n: int, start: int) -> Batch:
    """n tokens from ``start`` on; with more than 8 the last third is another sequence. Blocks in random order."""
    second = n // 3 if n > 8 else 0
    positions = np.concatenate([np.arange(start, start + n - second), np.arange(40, 40 + second)])
    n_blocks = N_BLOCKS - 2
    tables = []
    for _ in program.groups:
        blocks = rng.permutation(N_BLOCKS)
        tables.append(np.stack([blocks[:n_blocks], np.roll(blocks, 3)[:n_blocks]]).astype(np.int32))
        tables[-1][1, 2:] = -1
        tables[-1][1, :2] = blocks[n_blocks:]
    return Batch(
        rng.integers(0, N_VOCAB, n).astype(np.int32),
        positions.astype(np.int32),
        (np.arange(n) >= n - second).astype(np.int32),
        rng.random(n) < 0.7,
        tuple(tables),
    )
