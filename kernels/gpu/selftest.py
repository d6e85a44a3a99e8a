"""Every shader tried on one device: against the numpy reference, and against itself in another number of columns.

wgpu gives no control over how a driver contracts or orders arithmetic, so that a token has the same bits alone and in a
batch is tried on the user's own device, not only promised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from operator import itemgetter
from typing import Any, cast

import numpy as np

from edgellm.kernels.cache_types import DEFAULT, QUANTIZED
from edgellm.kernels.cpu.compile import trials
from edgellm.kernels.cpu.compile.trials import SelfTestResult, nmse
from edgellm.kernels.gpu import cache_types, sources
from edgellm.kernels.gpu.executor import GPUExecutor
from edgellm.kernels.gpu.lowering import RULES, unknown
from edgellm.kernels.gpu.pool import DeviceArray
from edgellm.kernels.gpu.sources import CURVES, UNITS
from edgellm.kernels.ops import (
    Activate,
    Add,
    Attention,
    Embed,
    ExpertMatmul,
    GatedUnit,
    HeadMatmul,
    Matmul,
    Op,
    StoreKV,
)
from edgellm.kernels.ops.sketch import Sketch
from edgellm.kernels.program import Batch
from edgellm.kernels.reference import ReferenceExecutor

LIMIT = 1e-9  # of NMSE: sums of float32 in another order; half precision would be near 1e-7
EXACT = ("add", "select_outputs", "store_kv")
LIMITS = {f"{StoreKV.name}_{kind}": 1e-5 for kind in QUANTIZED}  # one code in a thousand may be rounded otherwise
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
)
"""The names of ops, with a type of weights or an activation behind them."""


def run(index: int) -> Iterator[SelfTestResult]:
    """Every shader on a device, then the order of its sums."""
    for name in SHADERS:
        yield try_shader(name, index)
    for quant in sources.TYPES:
        yield try_order(quant, index)


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
