"""Rules for ops over the row of a token: norms, sums, gates, streams, and products of a few rows.

Those that stand together are one dispatch: a workgroup of the token does them one after another, through the buffers
that they have alone and with a barrier between, so nothing is to be proved about who reads what, and the bits stay.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from edgellm.kernels.gpu import sources
from edgellm.kernels.gpu.device import MOST_NUMBERS
from edgellm.kernels.gpu.emitter import Lowering, blocks, folded
from edgellm.kernels.gpu.layout import Place
from edgellm.kernels.gpu.sources import LANES, bindings, source
from edgellm.kernels.gpu.weights import Matrix
from edgellm.kernels.ops import (
    Activate,
    Add,
    AddToStreams,
    Clamp,
    GatedUnit,
    GaussianTopK,
    LayerNorm,
    MatchMagnitude,
    Matmul,
    MixStreams,
    RMSNorm,
    Scale,
    ScaleColumns,
    SigmoidGate,
    Softcap,
    SoftplusGate,
)
from edgellm.kernels.ops.altup import LEAST
from edgellm.kernels.program import Op

THREADS = LANES * sources.SLICES  # of a workgroup: as many as products have, so that one can stand beside them
WIDEST = 1 << 15  # columns that the one workgroup of a row is not too few for


class Value(NamedTuple):
    """What an op makes of a number u of x and v of y, whose ``$AMOUNT`` may be in it."""

    function: str
    x: str
    y: str
    out: str
    amount: float = 1.0


def value_of(op: Op) -> Value | None:
    """What an op does, where it does it number by number."""
    match op:
        case Activate():
            return Value(sources.curved(op.activation, "u"), op.x, op.x, op.out)
        case GatedUnit():
            return Value(f"{op.activation}(u, v)", op.gate, op.up, op.out)
        case Add():
            return Value("u + v" if op.scale == 1.0 else "fma($AMOUNT, v, u)", op.x, op.y, op.out, op.scale)
        case Scale():
            return Value("$AMOUNT * u", op.x, op.x, op.out, op.factor)
        case Softcap():
            return Value("softcap(u, $AMOUNT)", op.x, op.x, op.out, op.cap)
        case Clamp():
            return Value("clamp(u, -$AMOUNT, $AMOUNT)", op.x, op.x, op.out, op.limit)
        case SigmoidGate():
            return Value("u * sigmoid(v)", op.x, op.gate, op.out)
        case SoftplusGate():
            return Value("u * softplus(v)", op.x, op.gate, op.out)
    return None


def by_value(low: Lowering, op: Op) -> None:
    """An op number by number, by a thread for each."""
    if taken_together(low):
        return
    value = value_of(op)
    assert value is not None, "by its rule"
    x, y, z = (low.place(name) for name in (value.x, value.y, value.out))
    bound = bindings(0, [("x", x.buffer, "r"), ("y", y.buffer, "r"), ("z", z.buffer, "w")])
    n, words = low.n(z) * z.width, {"BINDINGS": bound.text, "FUNCTIONS": sources.text("activations")}
    words |= bound.names | {"FUNCTION": value.function.replace("$AMOUNT", "p.amount"), "THREADS": f"{THREADS}u"}
    low.emit(
        source("pointwise", **words), bound.buffers, bound.kinds, folded(blocks(n, THREADS)), z.width, n,
        x.width // y.width, x.at, x.row, y.at, y.row, z.at, z.row, float(value.amount),
    )  # fmt: skip


def by_row(low: Lowering, op: Op) -> None:
    """An op by a workgroup for each row, with those behind it."""
    if not taken_together(low):
        _emit(low, [piece for piece in (_piece(low, op),) if piece])


def taken_together(low: Lowering) -> bool:
    """Emit the op that is being lowered with those behind it as one dispatch, where there are such; whether so."""
    pieces, op, n = list[_Piece](), low.next(0), 0
    while op is not None and (piece := _piece(low, op)) is not None and (not pieces or piece.rows == pieces[0].rows):
        pieces.append(piece)
        n += 1
        op = low.next(n)
    while len(pieces) > 1:
        if pieces[-1].matrix is None and _emit(low, pieces):
            low.n_taken = len(pieces)
            return True
        pieces.pop()
    return False


@dataclass
class _Piece:
    """An op as a part of a dispatch: its shader in shaders/rows, what it reads and writes, and words of its own.

    numbers   words that are immediates; ``vectors`` are tensors of numbers, ``matrix`` the weights of a product
    """

    shader: str
    buffers: Mapping[str, str]
    rows: str
    numbers: Mapping[str, float] = field(default_factory=dict)
    words: Mapping[str, str | int] = field(default_factory=dict)
    vectors: tuple[str, ...] = ()
    matrix: Matrix | None = None


def _piece(low: Lowering, op: Op) -> _Piece | None:
    """What an op is as a part of a dispatch; None where it is none."""
    value, tensors = value_of(op), low.there.program.tensors
    if value is not None:
        z, y = low.place(value.out), low.place(value.y)
        if z.width > WIDEST:
            return None
        numbers: dict[str, float] = {"WIDTH": z.width}
        if "AMOUNT" in value.function:
            numbers["AMOUNT"] = float(value.amount)
        return _Piece("value", {"x": value.x, "y": value.y, "z": value.out}, z.rows, numbers,
                      {"FUNCTION": value.function, "PER": low.place(value.x).width // y.width})  # fmt: skip
    match op:
        case RMSNorm() if tensors[op.weight].shape[-1] == (z := low.place(op.out)).width:
            numbers = {"WIDTH": z.width, "EPS": float(op.eps)}
            return _Piece("rms_norm", {"x": op.x, "z": op.out}, z.rows, numbers, vectors=(op.weight,))
        case LayerNorm():
            z = low.place(op.out)
            vectors = (op.weight, *([op.bias] if op.bias else []))
            words: dict[str, str | int] = {"BIAS": "w[$W + $WIDTH + i]" if op.bias else "0.0"}
            numbers = {"WIDTH": z.width, "EPS": float(op.eps)}
            return _Piece("layer_norm", {"x": op.x, "z": op.out}, z.rows, numbers, words, vectors)
        case GaussianTopK():
            z = low.place(op.out)
            numbers = {"WIDTH": z.width, "FACTOR": float(op.factor)}
            return _Piece("gaussian_top_k", {"x": op.x, "z": op.out}, z.rows, numbers)
        case ScaleColumns():
            z = low.place(op.out)
            return _Piece("scale_columns", {"x": op.x, "z": op.out}, z.rows, {"WIDTH": z.width}, vectors=(op.weight,))
        case MatchMagnitude():
            width = low.place(op.of).width
            roles, n = {"x": op.x, "y": op.of, "z": op.out}, low.place(op.x).width // width
            return _Piece("match_magnitude", roles, low.place(op.out).rows, {"WIDTH": width, "LEAST": LEAST}, {"N": n})
        case MixStreams():
            z, n = low.place(op.out), math.isqrt(low.place(op.coefs).width)
            roles = {"x": op.x, "y": op.coefs, "z": op.out}
            return _Piece("mix_streams", roles, z.rows, {"WIDTH": z.width // n}, {"N": n})
        case AddToStreams():
            z, roles = low.place(op.out), {"x": op.x, "y": op.y, "c": op.coefs or op.y, "z": op.out}
            numbers = {"WIDTH": z.width, "STREAM": low.place(op.y).width, "FIRST": op.first}
            return _Piece("add_to_streams", roles, z.rows, numbers,
                          {"FACTOR": "1.0 + $c[c + s]" if op.coefs else "1.0"})  # fmt: skip
        case Matmul():
            return _small_product(low, op)
    return None


def _small_product(low: Lowering, op: Matmul) -> _Piece | None:
    """A product whose rows one workgroup has."""
    (matrix, begin), n = low.there.matrices[op.weight], low.there.program.tensors[op.weight].shape[0]
    if n > LANES or op.bias is not None or op.out in low.there.made or len(matrix.parts) > 1:
        return None
    words: dict[str, str | int] = {"BEGIN": begin, "N": n}
    return _Piece("matmul", {"x": op.x, "z": op.out}, low.place(op.out).rows, {}, words, (), matrix)


def _emit(low: Lowering, pieces: Sequence[_Piece]) -> bool:
    """Emit these as one dispatch; whether a shader can have so many buffers and numbers."""
    vectors = [name for piece in pieces for name in piece.vectors]
    matrices = list({id(piece.matrix): piece.matrix for piece in pieces if piece.matrix is not None}.values())
    first = bool(vectors) + len(matrices)
    roles = [
        (name, low.place(name).buffer, "w" if role == "z" else "r")
        for piece in pieces for role, name in piece.buffers.items()
    ]  # fmt: skip
    bound, numbers = bindings(first, roles), dict[tuple[type, float], str]()
    declared, functions = [bound.text, *([sources.vector(0, "w")] if vectors else [])], [sources.text("activations")]
    for i, matrix in enumerate(matrices):
        array, text = sources.weights_of(matrix.quant, bool(vectors) + i, f"of{i}", matrix.words)
        declared.append(array)
        functions.append(text)

    def number(value: float) -> str:
        return numbers.setdefault((type(value), value), f"p.n{len(numbers)}")

    steps, at = list[str](), 0
    for piece in pieces:
        words = {word: number(value) for word, value in piece.numbers.items()} | {"W": f"{at}u"}
        words |= {name: f"{word}u" if isinstance(word, int) else word for name, word in piece.words.items()}
        words |= {role: bound.names[name] for role, name in piece.buffers.items()}
        if piece.matrix is not None:
            of = f"of{matrices.index(piece.matrix)}"
            words |= sources.row_product(piece.matrix.quant, of, piece.matrix.pieces, words["x"])
        starts = [_start(role, low.place(name), number) for role, name in piece.buffers.items()]
        steps.append("\n".join(["{", *starts, sources.row_op(piece.shader, words), "}"]))
        at += sum(math.prod(low.there.program.tensors[name].shape) for name in piece.vectors)
    n_buffers = bool(vectors) + len(matrices) + len(bound.buffers)
    if len(pieces) > 1 and (n_buffers > low.there.device.most_buffers or len(numbers) > MOST_NUMBERS):
        return False
    buffers = [*([low.vector(*vectors)] if vectors else []), *(matrix.parts[0].buffer for matrix in matrices)]
    buffers += bound.buffers
    fields = ", ".join(f"n{i}: {'f32' if kind is float else 'u32'}" for i, (kind, _) in enumerate(numbers))
    low.emit(
        source("rows", FIELDS=fields, BINDINGS="\n".join(declared), FUNCTIONS="\n".join(functions),
               OPS="\nstorageBarrier();\nworkgroupBarrier();\n".join(steps), LANES=LANES, SLICES=sources.SLICES),
        buffers, "r" * first + bound.kinds, (low.counts.rows(pieces[0].rows), 1, 1), *(value for _, value in numbers),
    )  # fmt: skip
    return True


def _start(role: str, place: Place, number: Callable[[float], str]) -> str:
    """Where a row of a buffer begins."""
    return f"let {role} = {number(place.at)} + row * {number(place.row)};"
