"""Every shader tried on one device: against the numpy reference, and against itself in another number of columns.

Then a step of a tiny decoder, whose ops are taken together, against its ops one by one and its tokens one by one, and
every float16.

wgpu gives no control over how a driver contracts or orders arithmetic, so that a token has the same bits alone and in a
batch is tried on the user's own device, not only promised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from operator import itemgetter
from typing import Any, cast

import numpy as np

from edgellm.kernels.cache_types import DEFAULT, PACKED, QUANTIZED
from edgellm.kernels.cpu.compile import trials
from edgellm.kernels.cpu.compile.trials import SelfTestResult, nmse
from edgellm.kernels.gpu import adapters, cache_types, sources
from edgellm.kernels.gpu.device import Device
from edgellm.kernels.gpu.executor import GPUExecutor
from edgellm.kernels.gpu.lowering import RULES, unknown
from edgellm.kernels.gpu.pool import DeviceArray
from edgellm.kernels.gpu.sources import CURVES, UNITS
from edgellm.kernels.kv import KVLayer
from edgellm.kernels.ops import (
    Activate,
    Add,
    ApplyRope,
    Attention,
    Embed,
    ExpertMatmul,
    ExpertSum,
    GatedUnit,
    HeadMatmul,
    Matmul,
    Op,
    PackKV,
    RMSNorm,
    Route,
    SelectOutputs,
    StoreKV,
)
from edgellm.kernels.ops.sketch import N_VOCAB, Sketch
from edgellm.kernels.program import Batch, Program
from edgellm.kernels.reference import ReferenceExecutor
from edgellm.kernels.rope import Rope

LIMIT = 1e-9  # of NMSE: sums of float32 in another order; half precision would be near 1e-7
EXACT = ("add", "select_outputs", "store_kv")
FITTED = (PackKV.name, *(f"{StoreKV.name}_{kind}" for kind in QUANTIZED))
LIMITS = dict.fromkeys(FITTED, 1e-5)  # one code in a thousand may be rounded otherwise
WEIGHED = (Embed, Matmul, ExpertMatmul)
COLUMNS = (1, 2, 4, 8, 33)
OF_HEADS = ("F32", "Q8_0", "Q4_K")  # types of a matrix for each head; others differ in what experts show

SHADERS = (
    *(op.name for op in RULES if op not in (*WEIGHED, GatedUnit, Activate, HeadMatmul)),
    f"{Add.name}_scaled",
    *(f"{GatedUnit.name}_{kind}" for kind in UNITS),
    *(f"{Activate.name}_{kind}" for kind in CURVES),
    *(f"{op.name}_{quant.lower()}" for op in WEIGHED for quant in sources.TYPES),
    *(f"{HeadMatmul.name}_{quant.lower()}" for quant in OF_HEADS),
    f"{Attention.name}_latent",
    *(f"{op.name}_{kind}" for op in (StoreKV, Attention) for kind in cache_types.TYPES if kind != DEFAULT),
    *(f"{Attention.name}_{kind}" for kind in PACKED),
)
"""The names of ops, with a type of weights or an activation behind them."""


def run(index: int) -> Iterator[SelfTestResult]:
    """Every shader on a device, then the order of its sums, a step, and its halves."""
    for name in SHADERS:
        yield try_shader(name, index)
    for quant in sources.TYPES:
        yield try_order(quant, index)
    yield try_step(index)
    yield try_halves(index)


_HALVES = """
@group(0) @binding(0) var<storage, read> x: array<u32>;
@group(0) @binding(1) var<storage, read_write> y: array<vec2<f32>>;
@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) g: vec3<u32>, @builtin(local_invocation_index) t: u32) {
  y[g.x * 64u + t] = unpack2x16float(x[g.x * 64u + t]);
}
"""


def try_halves(index: int) -> SelfTestResult:
    """What shaders make of every float16; ``nmse`` is the share that is another number. Scales of 4-bit weights are
    often below 6e-5, which WGSL lets a driver read as 0."""
    device, halves = Device(adapters.choose(index)), np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    try:
        x, y = device.upload(halves), device.buffer(4 * len(halves))
        device.run([device.dispatch(_HALVES, [x, y], "rw", (len(halves) // 128, 1, 1))])
        found = device.read(y, 4 * len(halves)).view(np.float32)
    finally:
        device.close()
    wrong = ~((found == halves) | (np.isnan(found) & np.isnan(halves)))
    smallest = f"{halves[wrong][0]} is read as {found[wrong][0]}" if wrong.any() else ""
    return SelfTestResult("halves", f"gpu:{index}", float(wrong.mean()), 0.0, not wrong.any(), smallest)


def try_step(index: int, n_tokens: int = 12) -> SelfTestResult:
    """A prompt of a decoder, whose ops are taken together; ``nmse`` is the share of its rows that have other bits where
    ops run one by one, or tokens do."""
    program = _decoder()
    tokens = np.arange(n_tokens) * 7 % program.n_vocab
    found = []
    for pieces, hook in (((n_tokens,), None), ((n_tokens,), lambda *_: None), ((1,) * n_tokens, None)):
        executor, start, rows = GPUExecutor(program, 1, max_tokens=n_tokens, index=index), 0, []
        try:
            for n in pieces:
                batch = Batch.single(program, tokens[start : start + n], start, "all")
                rows.append(executor.run(batch, hook).copy())
                start += n
        finally:
            executor.close()
        found.append(np.concatenate(rows))
    wrong = [np.mean(np.any(found[0] != other, axis=1)) for other in found[1:]]
    detail = ", ".join(how for how, share in zip(("op by op", "token by token"), wrong, strict=True) if share)
    return SelfTestResult("step", f"gpu:{index}", float(max(wrong)), 0.0, not any(wrong), detail)


def _decoder() -> Program:
    """A layer with a feed-forward and one with experts, as those of files in Q4_K_M, and what is around them."""
    s, d, n_ff, dim = Sketch(np.random.default_rng(1), trials.MAX_TOKENS), 256, 256, 64
    rope = s.rope(Rope(False, (10000.0 ** -np.linspace(0, 1, dim // 2)).astype(np.float32)))
    x, h, q, k, v, proj = (s.buffer(width) for width in (d, d, 4 * dim, 2 * dim, 2 * dim, d))

    def norm(of: str, out: str, width: int) -> RMSNorm:
        return RMSNorm(of, s.tensor("F32", (width,)), out, 1e-5)

    def product(of: str, out: str, quant: str = "Q4_K") -> Matmul:
        return Matmul(of, s.tensor(quant, (s.buffers[out].width, s.buffers[of].width)), out)

    s.ops.append(Embed(s.tensor("Q8_0", (N_VOCAB, d)), x, 1.0))
    for has_experts in (False, True):
        layer, attn = s.layer(KVLayer(2, dim, dim)), s.buffer(4 * dim)
        s.ops += [norm(x, h, d), product(h, q), product(h, k), product(h, v, "Q6_K"), norm(q, q, dim), norm(k, k, dim)]
        s.ops += [ApplyRope(q, dim, rope), ApplyRope(k, dim, rope), StoreKV(k, v, layer)]
        s.ops += [Attention(q, attn, layer, 4, dim**-0.5), product(attn, proj), Add(x, proj, x), norm(x, h, d)]
        if has_experts:
            router, ids, probs = s.buffer(8), s.buffer(2, "int32"), s.buffer(2)
            gate, up, made = s.buffer(2 * n_ff), s.buffer(2 * n_ff), s.buffer(2 * d)
            weights = [s.tensor("Q4_K", (8, *shape)) for shape in ((n_ff, d), (n_ff, d), (d, n_ff))]
            s.ops += [product(h, router, "F32"), Route(router, ids, probs, "chosen")]
            s.ops += [ExpertMatmul(h, ids, weights[0], gate, 2), ExpertMatmul(h, ids, weights[1], up, 2)]
            s.ops += [GatedUnit(gate, up, gate, "silu"), ExpertMatmul(gate, ids, weights[2], made, 2)]
            s.ops.append(ExpertSum(made, probs, proj))
        gate, up, out = s.buffer(n_ff), s.buffer(n_ff), s.buffer(d)
        s.ops += [product(h, gate), product(h, up), GatedUnit(gate, up, gate, "silu"), product(gate, out, "Q6_K")]
        s.ops += [Add(proj, out, proj), Add(x, proj, x)] if has_experts else [Add(x, out, x)]
    last = s.buffer(d)
    s.buffers[last] = replace(s.buffers[last], rows="outputs")
    s.ops += [SelectOutputs(x, last), norm(last, last, d), product(last, Program.output, "Q8_0")]
    return replace(s.program(), context_length=64)


def try_shader(name: str, index: int, n_tokens: tuple[int, ...] = trials.N_TOKENS) -> SelfTestResult:
    """The worst NMSE of a shader over the shapes that its op is tried in."""
    s = trials.sketch()
    trials.add_trial(s, name)
    _leave_out_unknown(s)
    program = s.program()
    reference = ReferenceExecutor(program, trials.N_BLOCKS, trials.MAX_TOKENS, "float16")
    executor = GPUExecutor(program, trials.N_BLOCKS, max_tokens=trials.MAX_TOKENS, index=index)
    found: list[tuple[float, str]] = []
    try:
        trials.fill_randomly(reference.pool)
        for arrays, others in zip(executor.pool.arrays, reference.pool.arrays, strict=True):
            for ours, kept in zip(arrays, others, strict=True):
                cast(DeviceArray, ours).fill(kept)
        for n in n_tokens:
            batch = trials.random_batch(s.rng, program, n, trials.STARTS[n])
            expected, values = _written(reference, batch, s.inputs), _written(executor, batch, s.inputs)
            for shape, one, other in zip(s.shapes, values, expected, strict=True):
                found.append((nmse(one, other), f"{shape} tokens={n}"))
    finally:
        executor.close()
    error, detail = max(found, key=itemgetter(0))
    limit = 0.0 if name in EXACT else LIMITS.get(name, LIMIT)
    return SelfTestResult(name, f"gpu:{index}", error, limit, error <= limit, detail)


def try_order(quant: str, index: int, columns: tuple[int, ...] = COLUMNS) -> SelfTestResult:
    """Whether a product has the same bits in every number of columns; ``nmse`` is the share of those that differ."""
    s = trials.sketch(max_tokens=max(columns))
    trials.add_trial(s, f"matmul_{quant.lower()}")
    executor = GPUExecutor(s.program(), 1, max_tokens=max(columns), index=index)
    made = {}
    try:
        for n in columns:
            batch = replace(Batch.single(executor.program, [0] * n), outputs=np.zeros(n, bool))
            made[n] = _written(executor, batch, s.inputs)
    finally:
        executor.close()
    most = made[max(columns)]
    wrong = [f"{n} columns" for n in columns if not all(map(_same, made[n], most))]
    return SelfTestResult(
        f"order_{quant.lower()}", f"gpu:{index}", len(wrong) / len(columns), 0.0, not wrong, ", ".join(wrong)
    )


def _leave_out_unknown(s: Sketch) -> None:
    """The cases of an op that have no shader: a program with one is refused by name, or has it on the CPU."""
    program = s.program()
    known = [unknown(program, op) is None for op in s.ops]
    s.ops = [op for op, kept in zip(s.ops, known, strict=True) if kept]
    s.shapes = [shape for shape, kept in zip(s.shapes, known, strict=True) if kept]


def _same(few: np.ndarray, many: np.ndarray) -> bool:
    """Whether the rows of the smaller batch are the first ones of the larger."""
    return bool(np.array_equal(few.reshape(-1), many.reshape(-1)[: few.size]))


def _written(executor: Any, batch: Batch, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    """What every op of a program wrote, in one row, as float32."""
    outputs: list[np.ndarray] = []

    def after(index: int, op: Op, read: Callable[[str], np.ndarray]) -> None:
        if index == 0:
            for name, values in inputs.items():
                read(name)[:] = values[: len(batch)]
        written = [read(name).astype(np.float32).ravel() for name in op.written_buffers()]
        for layer in op.written_layers():
            for array in executor.pool.arrays[layer]:
                whole = array if isinstance(array, np.ndarray) else array.all()
                written.append(whole.astype(np.float32).ravel())
        outputs.append(np.concatenate(written))

    executor.run(batch, after)
    return outputs
