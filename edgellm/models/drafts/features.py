"""What a draft reads of a model: the inputs of some of its layers side by side, brought to the width of the draft.

The model's own steps make them, for all their tokens and with the draft's matrix, so that a prompt's features come by
the fast products, and a row of them is all that is kept of a token.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from edgellm.formats.errors import UnsupportedError
from edgellm.formats.gguf import QuantizedTensor
from edgellm.kernels.ops import Matmul, Op, RMSNorm, Scale, SelectOutputs
from edgellm.kernels.program import Buffer, Program

STREAM = "x"  # what layers read and add to
INPUTS, FEATURES = "features.inputs", "features"


@dataclass(frozen=True)
class Features:
    """A row for each token: behind(before([x_a | x_b | ...]) F^T), x_i what layer i reads.

    layers   their numbers; one past the last is what the norm at the end reads
    fuse     F, (n_embd of the draft, n_layers * n_embd)
    before   the weight of an RMSNorm, None for none
    behind   likewise
    """

    layers: Sequence[int]
    fuse: QuantizedTensor
    before: QuantizedTensor | None = None
    behind: QuantizedTensor | None = None
    eps: float = 0.0


def n_layers(program: Program) -> int:
    """How many layers a model has."""
    names = " ".join(name for op in program.ops for name in op.weight_names())
    return 1 + max((int(found) for found in re.findall(r"\bblk\.(\d+)\.", names)), default=-1)


def with_features(program: Program, features: Features) -> Program:
    """The program of a model whose steps make features besides. UnsupportedError where its layers read no stream."""
    starts = [_start(program, layer) for layer in features.layers]
    width, n = program.n_embd, len(features.layers)
    inputs = Buffer(INPUTS, n * width)
    parts = [replace(inputs, name=f"{INPUTS}[{i}]", width=width, of=INPUTS, first=i * width) for i in range(n)]
    out = Buffer(FEATURES, features.fuse.shape[0])
    tensors = {
        f"features.{name}": tensor
        for name, tensor in (("before", features.before), ("fuse", features.fuse), ("behind", features.behind))
        if tensor is not None
    }
    made: list[Op] = [Matmul(INPUTS, "features.fuse", FEATURES)]
    if features.before is not None:
        made.insert(0, RMSNorm(INPUTS, "features.before", INPUTS, features.eps))
    if features.behind is not None:
        made.append(RMSNorm(FEATURES, "features.behind", FEATURES, features.eps))
    ops: list[Op] = []
    for i, op in enumerate(program.ops):
        ops += [Scale(STREAM, part.name, 1.0) for start, part in zip(starts, parts, strict=True) if start == i]
        ops += made if i == max(starts) else []
        ops.append(op)
    buffers = {buffer.name: buffer for buffer in (inputs, *parts, out)}
    return replace(
        program,
        ops=tuple(ops),
        buffers=program.buffers | buffers,
        tensors=program.tensors | tensors,
        tapped=FEATURES,
    )


def _start(program: Program, layer: int) -> int:
    """The op before which the stream is what a layer reads: the first one that has a weight of it."""
    stream = program.buffers.get(STREAM)
    if layer == n_layers(program):
        found = [i for i, op in enumerate(program.ops) if isinstance(op, SelectOutputs) and op.x == STREAM]
    else:
        own = f"blk.{layer}."
        found = [i for i, op in enumerate(program.ops) if any(name.startswith(own) for name in op.weight_names())]
    if not found or stream is None or stream.width != program.n_embd or stream.rows != "tokens":
        raise UnsupportedError(
            f"No draft can read what layer {layer} of a {program.architecture} model reads. Draft with n-grams or a "
            "small model.",
            code="DRAFT_MODEL",
        )
    return found[0]
