"""From a program to an op table: one row of int64 per kernel call, with every address filled in.

Most ops become one row. A product with quantized weights needs its input quantized first: that row is added once for
all products that read the same buffer (q, k and v; gate and up).

Addresses are safe to hand to the kernels because the GGUF validator proved every tensor's range, the architecture file
proved every shape, and the buffers are made here from the same numbers.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import struct
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from edgellm.formats.errors import UnsupportedError
from edgellm.formats.gguf import QuantizedTensor
from edgellm.kernels.cpu.lib import layout
from edgellm.kernels.cpu.lib.layout import ALONE_WIDTH
from edgellm.kernels.cpu.run import adapters, altup, attention_work, cached, experts, recurrent
from edgellm.kernels.cpu.run.experts_ahead import Routed, pieces_of
from edgellm.kernels.cpu.run.panels import put_panels
from edgellm.kernels.cpu.run.threads import aligned_zeros
from edgellm.kernels.cpu.weights import FLOAT, QUANTIZED, SUPERBLOCKS
from edgellm.kernels.kv import CachePool
from edgellm.kernels.narrowing import LastWrite, OutputTail, last_write, output_tail
from edgellm.kernels.ops import (
    Activate,
    Add,
    AddRows,
    ApplyRope,
    Clamp,
    Embed,
    ExpertMatmul,
    GatedUnit,
    JoinHeads,
    LayerNorm,
    Matmul,
    RMSNorm,
    Scale,
    SelectOutputs,
    SelfAttention,
    SigmoidGate,
    Softcap,
    SoftplusGate,
    SplitHeads,
)
from edgellm.kernels.ops.encoder import alibi_slopes
from edgellm.kernels.program import Buffer, Op, Program
from edgellm.kernels.row_log import LOG_ROWS, row_log

MAX_OUTPUTS = 32
"""Rows of an ``outputs`` buffer: more logits than that are computed in turns."""

ROW_KINDS: dict[str, tuple[int, Callable[[int], int]]] = {
    "tokens": (layout.N_TOKENS, lambda max_tokens: max_tokens),
    "outputs": (layout.N_OUTPUTS, lambda max_tokens: MAX_OUTPUTS),
    "log": (layout.N_LOGGED, lambda max_tokens: min(max_tokens, LOG_ROWS)),
}
"""Of each kind of rows: where the step says how many there are, and how many it has at most, given most tokens."""


@dataclass
class OpTable:
    """The rows of a program, and all memory they point to. ``adapted`` are those of ``Program.adapted``."""

    program: Program
    rows: np.ndarray  # (n_rows, 32) int64: the program's, its output tail's (narrowing.py), and those that replay a log
    first_row: list[int]  # of each op of the program, and one past the last
    n_token_rows: int  # rows before the first that works on outputs
    n_rows_before_tail: int  # rows that run before the output tail
    tail_first_row: list[int]  # of each op of the output tail, and one past the last
    tail_names: dict[str, str]  # as in OutputTail
    log: list[np.ndarray]  # buffers (row_log.py)
    last_write: LastWrite | None  # where rows can be dropped in its place
    kernels: list[str]  # name of each row's kernel
    calls: list[tuple[int, int, str]]  # rows, and a field of them that is the address of a kernel
    sources: list[int]  # for each row the one that made the int16 activations which it reads, -1 if it reads none
    buffers: dict[str, np.ndarray]  # (rows, floats of layout.buffer_row)
    widths: dict[str, int]
    routed: list[Routed]  # what is multiplied with experts, by the row that puts pairs in their order
    nbytes: int  # of the rows, the buffers and their int16 forms, and the weights that were unpacked
    keep: list[np.ndarray]  # all whose addresses are in the rows
    adapted: OpTable | None = None


@dataclass
class _Row:
    kernel: str
    arguments: Any  # of layout.py
    reads: frozenset[str]
    writes: frozenset[str]
    alone: bool  # small: one thread does it when there is one token
    source: int  # as in OpTable

    def needs(self, earlier: _Row) -> bool:
        """Whether this row must wait for an earlier one."""
        return bool(self.reads & earlier.writes or self.writes & (earlier.writes | earlier.reads))


def _field(value: float) -> int:
    """An argument as it stands in a row: floats as the bits of a float64."""
    return int(struct.unpack("<q", struct.pack("<d", value))[0]) if isinstance(value, float) else value


def _set_flags(table: np.ndarray, rows: list[_Row]) -> None:
    """Where the threads must meet: before a row that needs one since the last meeting, unless both are thread 0's."""
    for one_token, flag in ((False, layout.MEET), (True, layout.MEET_ALONE)):
        since: list[_Row] = []
        for fields, row in zip(table, rows, strict=True):
            together = [r for r in since if not (one_token and row.alone and r.alone)]
            if any(row.needs(r) for r in together):
                fields[layout.FLAGS // 8] |= flag
                since = []
            since.append(row)
    table[:, layout.FLAGS // 8] |= [layout.ALONE * row.alone for row in rows]


def _link_products(table: np.ndarray, rows: list[_Row], n_rows: int) -> None:
    """Each product with quantized weights knows the one that follows; the last of the first n_rows rows, the program's,
    and the last of its output tail know the first: of the next token."""
    products = [i for i, row in enumerate(rows) if row.source >= 0 and isinstance(row.arguments, layout.MATMUL)]
    for of_part in ([i for i in products if i < n_rows], [i for i in products if i >= n_rows]):
        for i, following in zip(of_part, [*of_part[1:], products[0]], strict=True) if of_part else ():
            rows[i].arguments = rows[i].arguments._replace(following=table[following].ctypes.data)


class _Int16(NamedTuple):
    """The quantized form of a buffer: what it is called in ``_Row``, where it is, and the row that made it."""

    name: str
    address: int
    row_nbytes: int
    source: int


class _Groups(NamedTuple):
    """The pairs of a step by expert: what they are called in ``_Row``, and where they are."""

    name: str
    groups: int
    pairs: int


@dataclass
class _Memory:
    """Makes the arrays that rows point to and counts their bytes; does nothing but count when it is not ``real``."""

    real: bool
    nbytes: int = 0
    keep: list[np.ndarray] = field(default_factory=list)

    def take(self, nbytes: int, make: Callable[[], np.ndarray]) -> np.ndarray:
        """What ``make`` gives, of so many bytes."""
        self.nbytes += nbytes
        self.keep.append(make() if self.real else np.zeros((1, 1), np.uint8))
        return self.keep[-1]

    def zeros(self, n_rows: int, width: int, dtype: str) -> np.ndarray:
        """Zeros that begin at a cache line."""
        nbytes = n_rows * width * np.dtype(dtype).itemsize
        return self.take(nbytes, lambda: aligned_zeros(nbytes).view(dtype).reshape(n_rows, width))


@dataclass
class _Lowering:
    program: Program
    pool: CachePool | None  # None leaves its addresses zero
    max_tokens: int
    memory: _Memory
    shapes: list[attention_work.AttentionShape] = field(default_factory=list)
    logged: Collection[str] = ()  # buffers of its log (row_log.py)
    rows: list[_Row] = field(default_factory=list)
    first_row: list[int] = field(default_factory=list)
    buffers: dict[str, np.ndarray] = field(default_factory=dict)
    places: dict[str, tuple[int, int]] = field(default_factory=dict)  # of each buffer: address, bytes of a row
    derived: dict[tuple[str, ...], Any] = field(default_factory=dict)  # buffers -> what was made of them, while current
    by_head: dict[tuple[str, int], _Groups] = field(default_factory=dict)  # kind of rows, heads -> their pairs
    arrays: dict[str, np.ndarray] = field(default_factory=dict)  # that derived things are in
    matrices: dict[str, tuple[str, int, int]] = field(default_factory=dict)
    vectors: dict[str, int] = field(default_factory=dict)
    of_experts: dict[int, str] = field(default_factory=dict)  # rows of products with experts -> their weight
    calls: list[tuple[int, str, str]] = field(default_factory=list)  # rows, and an argument that is a kernel's address

    def op(self, op: Op) -> None:
        """Add the rows of an op."""
        self.first_row.append(len(self.rows))
        if op.computes:
            _RULES[type(op)](self, op)
        written = set(map(self.root, op.written_buffers()))
        self.derived = {of: made for of, made in self.derived.items() if not written.intersection(map(self.root, of))}

    def root(self, name: str) -> str:
        """The buffer that has the columns of ``name``: itself, or the one that it is part of."""
        return self.program.buffers[name].of or name

    def allocate(self, name: str, buffer: Buffer) -> None:
        """Make a buffer's array, or find it in the one it is part of, which was made before."""
        self.buffers[name] = array = self._part(name, buffer) if buffer.of else self._whole(name, buffer)
        self.places[name] = array.ctypes.data, array.strides[0]

    def _whole(self, name: str, buffer: Buffer) -> np.ndarray:
        return self.memory.zeros(self.n_rows(name), layout.buffer_row(buffer.width), buffer.dtype)

    def _part(self, name: str, buffer: Buffer) -> np.ndarray:
        end, of = buffer.first + buffer.width, self.program.buffers[buffer.of]
        if of.of or buffer.first % layout.ROW_ALIGN or end > of.width or (end % layout.ROW_ALIGN and end < of.width):
            raise UnsupportedError(
                f"buffer {name}: columns {buffer.first} to {end} of {buffer.of}, which has {of.width}. The CPU kernels "
                f"take whole groups of {layout.ROW_ALIGN} columns, of a buffer that is not itself part of one.",
                code="BUFFER_COLUMNS",
            )
        return self.buffers[buffer.of][:, buffer.first : buffer.first + layout.padded(buffer.width)]

    def emit(
        self,
        op: Op,
        kernel: str,
        arguments: Any,
        *,
        alone: bool,
        forms: Mapping[str, _Int16 | _Groups] | None = None,
        also_reads: Iterable[str] = (),
        also_writes: Iterable[str] = (),
    ) -> None:
        """Add a row for an op, which in place of some buffers reads ``forms`` of them."""
        forms = forms or {}
        reads = [forms[name].name if name in forms else self.root(name) for name in op.read_buffers()]
        reads += [*(f"cache {layer}" for layer in op.read_layers()), *also_reads]
        writes = [
            *map(self.root, op.written_buffers()),
            *(f"cache {layer}" for layer in op.written_layers()),
            *also_writes,
        ]
        source = next((form.source for form in forms.values() if isinstance(form, _Int16)), -1)
        self.rows.append(_Row(kernel, arguments, frozenset(reads), frozenset(writes), alone, source))

    def where(self, **buffers: str) -> dict[str, int]:
        """For each argument the address of its buffer, and under the name with _row the bytes of a row."""
        found = {}
        for argument, name in buffers.items():
            found[argument], found[f"{argument}_row"] = self.places[name]
        return found

    def width(self, name: str) -> int:
        return self.program.buffers[name].width

    def kind(self, name: str) -> str:
        return "log" if name in self.logged else self.program.buffers[name].rows

    def row_kind(self, name: str) -> int:
        return ROW_KINDS[self.kind(name)][0]

    def n_rows(self, name: str) -> int:
        return ROW_KINDS[self.kind(name)][1](self.max_tokens)

    def vector(self, name: str, behind: int = 0) -> int:
        """Address of a tensor as a row of float32, padded to whole vectors, with so many zeros behind it."""
        if name not in self.vectors:
            tensor = self.program.tensors[name]
            size = math.prod(tensor.shape)
            array = self.memory.zeros(1, layout.padded(size + behind), "float32")
            if self.memory.real:
                array[0, :size] = tensor.dequantize().reshape(-1)
            self.vectors[name] = array.ctypes.data
        return self.vectors[name]

    def states(self, layer: int) -> int:
        """Address of a recurrent layer's states."""
        return 0 if self.pool is None else self.pool.arrays[layer][0].ctypes.data

    def matrix(self, name: str) -> tuple[str, int, int]:
        """Kernel suffix, address and row bytes of a weight. A type without kernels is dequantized to F32 here."""
        if name not in self.matrices:
            tensor = self.program.tensors[name]
            quant, data, n_rows = tensor.quant.name, tensor.data, math.prod(tensor.shape[:-1])
            row_nbytes = tensor.quant.row_nbytes(tensor.shape[-1])
            missing = layout.PANEL_ROWS - n_rows  # the matmul reads 16 rows at once
            if not _has_kernels(tensor):
                quant, row_nbytes = "F32", tensor.shape[-1] * 4
                data = self.memory.take(n_rows * row_nbytes, lambda: np.ascontiguousarray(tensor.dequantize()))
            elif len(tensor.pieces) > 1:
                data = self.memory.take(n_rows * row_nbytes, lambda: np.ascontiguousarray(tensor.stored(0, n_rows)))
            if missing > 0:
                few, nbytes = data, layout.PANEL_ROWS * row_nbytes
                data = self.memory.take(nbytes, lambda: np.concatenate([few, np.repeat(few[-1:], missing, axis=0)]))
            self.memory.keep.append(data)
            self.matrices[name] = (quant, data.ctypes.data, row_nbytes)
        return self.matrices[name]

    def experts(self, name: str) -> tuple[str, int, int]:
        """Kernel suffix, address of the table of where each expert's rows are (layout.EXPERT_MATMUL), row bytes."""
        tensor = self.program.tensors[name]
        n_expert, n_out, n_in = tensor.shape
        table = self.memory.zeros(1, n_expert, "int64")
        if len(tensor.pieces) == 1 or n_out < layout.PANEL_ROWS or not _has_kernels(tensor):
            quant, first, row_nbytes = self.matrix(name)
            places = [first] * n_expert
        else:
            quant, row_nbytes = tensor.quant.name, tensor.quant.row_nbytes(n_in)
            places = [piece.data.ctypes.data - i * n_out * row_nbytes for i, piece in enumerate(tensor.pieces)]
            self.memory.keep += [piece.data for piece in tensor.pieces]
        if self.memory.real:
            table[:] = places
        return quant, table.ctypes.data, row_nbytes

    def run(self, name: str) -> int:
        """Groups of a buffer that share a scale: 8 when an op weighs it with 256-weight blocks before it changes."""
        tensors, root = self.program.tensors, self.root(name)
        for op in itertools.islice(self.program.ops, len(self.first_row) - 1, None):
            if name in op.read_buffers() and any(tensors[w].quant.name in SUPERBLOCKS for w in op.weight_names()):
                return 8
            if root in map(self.root, op.written_buffers()):
                break
        return 1

    def array(self, name: str, n_rows: int, width: int, dtype: str) -> int:
        """Address of an array that a derived thing is in, the same for each time it is made."""
        if name not in self.arrays:
            self.arrays[name] = self.memory.zeros(n_rows, width, dtype)
        return self.arrays[name].ctypes.data

    def quantized_rows(self, name: str) -> _Int16:
        """A buffer's int16 form; emits the row that makes it unless it is current."""
        if (name,) not in self.derived:
            self._quantize((name,), self.slots(name, self.width(name)), self.width(name))
        return self.derived[name,]

    def quantized_pairs(self, name: str, of: str, n_in: int, n_used: int, groups: _Groups) -> _Int16:
        """The int16 form of a token's row, or of its slots, in the order of ``groups``, which is that of ``of``."""
        if (name, of) not in self.derived:
            self._quantize((name, of), self.slots(name, n_in), n_in, n_used, groups)
        return self.derived[name, of]

    def slots(self, name: str, n_in: int) -> dict[str, int]:
        """Where the experts of a token find their input: in one row for all of them, or each its own."""
        return self.where(x=name) | {"x_slot": 0 if self.width(name) == n_in else n_in * 4}

    def _quantize(
        self, of: tuple[str, ...], x: dict[str, int], n_in: int, slots: int = 1, groups: _Groups | None = None
    ) -> None:
        form, nbytes = f"int16 {' '.join(of)}", layout.activation_row_nbytes(n_in)
        order = groups or _Groups("", 0, 0)
        address = self.array(form, self.n_rows(of[0]) * slots, nbytes, "uint8")
        arguments = layout.QUANTIZE(
            **x, out=address, out_row=nbytes, n_groups=n_in // 32, run=self.run(of[0]),
            row_kind=self.row_kind(of[0]), pairs=order.pairs, groups=order.groups, slots=slots,
        )  # fmt: skip
        self.derived[of] = _Int16(form, address, nbytes, len(self.rows))
        reads, alone = {self.root(of[0])} | ({order.name} - {""}), n_in * slots <= ALONE_WIDTH
        self.rows.append(_Row("quantize", arguments, frozenset(reads), frozenset({form}), alone, -1))

    def grouped(self, ids: str, n_expert: int) -> _Groups:
        """The pairs by expert; emits the row that orders them unless it is current."""
        if (ids,) not in self.derived:
            reads = frozenset({self.root(ids)})
            self.derived[ids,] = self._order(ids, ids, self.where(ids=ids), n_expert, self.width(ids), reads)
        return self.derived[ids,]

    def by_heads(self, x: str, n_heads: int) -> _Groups:
        """The pairs of a token and each of its heads, by head; emits the row that orders them, once for all layers."""
        kind = self.kind(x)
        if (kind, n_heads) not in self.by_head:
            numbers = self.array(f"heads {n_heads}", 1, n_heads, "int32")
            if self.memory.real:
                self.arrays[f"heads {n_heads}"][:] = np.arange(n_heads)
            ids = {"ids": numbers, "ids_row": 0}  # of every token the same
            self.by_head[kind, n_heads] = self._order(f"heads {n_heads} {kind}", x, ids, n_heads, n_heads)
        return self.by_head[kind, n_heads]

    def _order(
        self, of: str, rows: str, ids: dict[str, int], n_expert: int, n_used: int, reads: frozenset[str] = frozenset()
    ) -> _Groups:
        """Emit the row that puts pairs in the order of experts; there are as many tokens as a buffer has ``rows``."""
        form = f"groups {of}"
        groups = self.array(form, 1, (layout.GROUPS + n_expert * layout.EXPERTS_GROUP_NBYTES) // 4, "int32")
        pairs = self.array(f"pairs {of}", 1, self.n_rows(rows) * n_used, "int32")
        arguments = layout.GROUP_BY_EXPERT(
            **ids, groups=groups, pairs=pairs, n_expert=n_expert, n_used=n_used, row_kind=self.row_kind(rows)
        )
        self.rows.append(_Row("group_by_expert", arguments, reads, frozenset({form}), alone=True, source=-1))
        return _Groups(form, groups, pairs)


def _has_kernels(tensor: QuantizedTensor) -> bool:
    return all(piece.quant.name in QUANTIZED or piece.quant.name in FLOAT for piece in tensor.pieces)


# ---- one rule for each kind of op ------------------------------------------------------------------------------------


def _embed(low: _Lowering, op: Embed) -> None:
    kind = low.program.tensors[op.weight].quant.name
    if not op.embeds and kind not in (*QUANTIZED, *FLOAT):  # unpacked it might not fit
        raise UnsupportedError(
            f"{op.weight} is {kind}; the CPU kernels look rows up in {', '.join((*QUANTIZED, *FLOAT))}. Take the model "
            "in another type.",
            code="TENSOR_TYPE",
        )
    quant, w, w_row = low.matrix(op.weight)
    arguments = layout.EMBED(w=w, w_row=w_row, width=low.width(op.out), **low.where(out=op.out), scale=op.scale)
    low.emit(op, f"embed_{quant.lower()}", arguments, alone=True)


def _rms_norm(low: _Lowering, op: RMSNorm) -> None:
    width, of_row = low.program.tensors[op.weight].shape[-1], low.width(op.x)
    arguments = layout.RMS_NORM(
        **low.where(x=op.x, out=op.out), w=low.vector(op.weight), width=width, heads=of_row // width, eps=op.eps,
        row_kind=low.row_kind(op.x),
    )  # fmt: skip
    low.emit(op, "rms_norm", arguments, alone=of_row <= ALONE_WIDTH)


def _layer_norm(low: _Lowering, op: LayerNorm) -> None:
    width = low.width(op.x)
    arguments = layout.LAYER_NORM(
        **low.where(x=op.x, out=op.out), w=low.vector(op.weight), bias=low.vector(op.bias) if op.bias else 0,
        width=width, eps=op.eps, row_kind=low.row_kind(op.x),
    )  # fmt: skip
    low.emit(op, "layer_norm", arguments, alone=width <= ALONE_WIDTH)


def _activate(low: _Lowering, op: Activate) -> None:
    width, row_kind = low.width(op.out), low.row_kind(op.out)
    arguments = layout.ACTIVATE(**low.where(x=op.x, out=op.out), width=width, row_kind=row_kind)
    low.emit(op, f"activate_{op.activation}", arguments, alone=width <= ALONE_WIDTH)


def _add_rows(low: _Lowering, op: AddRows) -> None:
    tensor, width = low.program.tensors[op.weight], low.width(op.x)
    table = low.memory.zeros(tensor.shape[0], layout.padded(width), "float32")
    if low.memory.real:
        table[:, :width] = tensor.dequantize()
    arguments = layout.ADD_ROWS(
        **low.where(x=op.x, out=op.out), w=table.ctypes.data, w_row=layout.padded(width) * 4, width=width,
        numbers={"positions": layout.POSITIONS, "types": layout.TYPES, "none": -1}[op.of],
    )  # fmt: skip
    low.emit(op, "add_rows", arguments, alone=True)


def _self_attention(low: _Lowering, op: SelfAttention) -> None:
    head_dim = low.width(op.q) // op.n_heads
    if head_dim > layout.SELF_HEAD_DIM:
        raise UnsupportedError(
            f"{op.q} has heads of {head_dim}; the CPU kernel takes up to {layout.SELF_HEAD_DIM}.", code="MODEL_SHAPE"
        )
    slopes = low.memory.zeros(1, layout.padded(op.n_heads), "float32") if op.fades else None
    if slopes is not None and low.memory.real:
        slopes[0, : op.n_heads] = alibi_slopes(op.n_heads)
    arguments = layout.SELF_ATTENTION(
        **low.where(q=op.q, k=op.k, v=op.v, out=op.out), n_heads=op.n_heads, n_kv_heads=op.n_kv_heads,
        head_dim=head_dim, scale=op.scale, reach=op.reach, slopes=0 if slopes is None else slopes.ctypes.data,
    )  # fmt: skip
    low.emit(op, "self_attention", arguments, alone=False)


def _matmul(low: _Lowering, op: Matmul) -> None:
    whole_texts = low.program.is_encoder and low.program.tensors[op.weight].quant.name in FLOAT
    quant, w, w_row = put_panels(low, op.weight) if whole_texts else low.matrix(op.weight)
    n_out, n_in = low.program.tensors[op.weight].shape
    x, forms = low.where(x=op.x), dict[str, _Int16]()
    if quant in QUANTIZED:
        form = forms[op.x] = low.quantized_rows(op.x)
        x = {"x": form.address, "x_row": form.row_nbytes}
    arguments = layout.MATMUL(
        **x, w=w, w_row=w_row, n_out=n_out, n_in=n_in, **low.where(out=op.out),
        bias=low.vector(op.bias) if op.bias else 0, row_kind=low.row_kind(op.x), following=0,
    )  # fmt: skip
    low.emit(op, f"matmul_{'texts_' * whole_texts}{quant.lower()}", arguments, alone=False, forms=forms)


def _rope(low: _Lowering, op: ApplyRope) -> None:
    rope = low.program.ropes[op.rope]
    arguments = layout.ROPE(
        **low.where(x=op.x), heads=low.width(op.x) // op.head_dim, head_dim=op.head_dim, half=rope.n_dims // 2,
        index=list(low.program.ropes).index(op.rope), adjacent=int(rope.adjacent),
    )  # fmt: skip
    low.emit(op, "rope", arguments, alone=True)


def _gated_unit(low: _Lowering, op: GatedUnit) -> None:
    width, row_kind = low.width(op.out), low.row_kind(op.out)
    arguments = layout.GATED_UNIT(**low.where(gate=op.gate, up=op.up, out=op.out), width=width, row_kind=row_kind)
    low.emit(op, f"gated_{op.activation}", arguments, alone=width <= ALONE_WIDTH)


def _add(low: _Lowering, op: Add) -> None:
    width, row_kind = low.width(op.out), low.row_kind(op.out)
    arguments = layout.ADD(**low.where(x=op.x, y=op.y, out=op.out), width=width, row_kind=row_kind, scale=op.scale)
    low.emit(op, "add" if op.scale == 1.0 else "add_scaled", arguments, alone=width <= ALONE_WIDTH)


def _scale(low: _Lowering, op: Scale) -> None:
    width, row_kind = low.width(op.x), low.row_kind(op.out)
    arguments = layout.SCALE(**low.where(x=op.x, out=op.out), width=width, row_kind=row_kind, factor=op.factor)
    low.emit(op, "scale", arguments, alone=width <= ALONE_WIDTH)


def _gate(low: _Lowering, op: SigmoidGate | SoftplusGate) -> None:
    width = low.width(op.x)
    arguments = layout.GATE(
        **low.where(x=op.x, gate=op.gate, out=op.out), width=width, span=width // low.width(op.gate),
        row_kind=low.row_kind(op.out),
    )  # fmt: skip
    low.emit(op, op.name, arguments, alone=width <= ALONE_WIDTH)


def _split_heads(low: _Lowering, op: SplitHeads) -> None:
    width, heads = low.width(op.x), low.width(op.first) // op.head_dim
    arguments = layout.SPLIT_HEADS(
        **low.where(x=op.x, first=op.first, second=op.second), heads=heads, first_dim=op.head_dim,
        second_dim=low.width(op.second) // heads, row_kind=low.row_kind(op.x),
    )  # fmt: skip
    low.emit(op, "split_heads", arguments, alone=width <= ALONE_WIDTH)


def _join_heads(low: _Lowering, op: JoinHeads) -> None:
    width, heads = low.width(op.out), low.width(op.first) // op.head_dim
    arguments = layout.JOIN_HEADS(
        **low.where(first=op.first, second=op.second, out=op.out), heads=heads, first_dim=op.head_dim,
        second_dim=low.width(op.second) // heads, row_kind=low.row_kind(op.out),
    )  # fmt: skip
    low.emit(op, "join_heads", arguments, alone=width <= ALONE_WIDTH)


def _cap(low: _Lowering, op: Softcap | Clamp) -> None:
    width, row_kind = low.width(op.x), low.row_kind(op.out)
    cap = op.cap if isinstance(op, Softcap) else op.limit
    arguments = layout.CAP(**low.where(x=op.x, out=op.out), width=width, row_kind=row_kind, cap=cap)
    low.emit(op, op.name, arguments, alone=width <= ALONE_WIDTH)


def _select_outputs(low: _Lowering, op: SelectOutputs) -> None:
    arguments = layout.SELECT_OUTPUTS(**low.where(x=op.x, out=op.out), width=low.width(op.out))
    low.emit(op, "select_outputs", arguments, alone=True)


_RULES: dict[type, Any] = {
    Embed: _embed,
    RMSNorm: _rms_norm,
    Matmul: _matmul,
    ApplyRope: _rope,
    GatedUnit: _gated_unit,
    Add: _add,
    SelectOutputs: _select_outputs,
    Scale: _scale,
    SigmoidGate: _gate,
    SoftplusGate: _gate,
    Softcap: _cap,
    Clamp: _cap,
    SplitHeads: _split_heads,
    JoinHeads: _join_heads,
    LayerNorm: _layer_norm,
    Activate: _activate,
    AddRows: _add_rows,
    SelfAttention: _self_attention,
    **cached.RULES,
    **experts.RULES,
    **recurrent.RULES,
    **adapters.RULES,
    **altup.RULES,
}


# ---- a whole program -------------------------------------------------------------------------------------------------


def lower(program: Program, pool: CachePool, max_tokens: int, *, narrows: bool = True) -> OpTable:
    """The op table of a program, kernel addresses still zero (``OpTable.kernels`` has their names).

    ``narrows`` adds the program's ops once more, from the last that mixes rows on, for those that want logits.
    """
    low, tail = _all_rows(program, pool, max_tokens, _Memory(real=True), narrows=narrows)
    table = _table(program, low, tail, narrows=narrows)
    if program.adapted is not None:
        with_adapters = _all_rows(program.adapted, pool, max_tokens, low.memory, narrows=narrows, shared=low)
        table.adapted = _table(program.adapted, *with_adapters, narrows=narrows)
    table.nbytes = low.memory.nbytes
    return table


def _table(program: Program, low: _Lowering, tail: OutputTail, *, narrows: bool) -> OpTable:
    n_ops, first_row, at = len(program.ops), low.first_row, layout.ARGUMENTS // 8
    table = aligned_zeros(len(low.rows) * layout.OP_NBYTES).view(np.int64).reshape(-1, layout.OP_FIELDS)
    _link_products(table, low.rows, first_row[n_ops])
    for fields, row in zip(table[:, at:], low.rows, strict=True):
        fields[: len(row.arguments)] = [_field(value) for value in row.arguments]
    _set_flags(table, low.rows)
    selects = [i for i, op in enumerate(program.ops) if isinstance(op, SelectOutputs)]
    return OpTable(
        program=program,
        rows=table,
        first_row=first_row[: n_ops + 1],
        n_token_rows=first_row[selects[0] if selects else n_ops],
        n_rows_before_tail=first_row[tail.start],
        tail_first_row=first_row[n_ops:],
        tail_names=tail.names,
        log=[low.buffers[name] for name in low.logged],
        last_write=last_write(program) if narrows else None,
        kernels=[row.kernel for row in low.rows],
        calls=[(i, at + low.rows[i].arguments._fields.index(name), kernel) for i, name, kernel in low.calls],
        sources=[row.source for row in low.rows],
        buffers=low.buffers,
        widths={name: buffer.width for name, buffer in low.program.buffers.items()},
        routed=_routed(low),
        nbytes=low.memory.nbytes,
        keep=low.memory.keep,
    )


def _routed(low: _Lowering) -> list[Routed]:
    """The products with experts whose weights lie in the file, behind the row that says which they are."""
    found: list[Routed] = []
    for i, row in enumerate(low.rows):
        if row.kernel == "group_by_expert" and row.reads:
            groups = next(low.arrays[name] for name in row.writes)
            found.append(Routed(i, groups.reshape(-1), []))
        elif found and (weight := low.of_experts.get(i)) and _has_kernels(low.program.tensors[weight]):
            found[-1].pieces.append(pieces_of(low.program.tensors[weight]))
    return found


def in_file_nbytes(program: Program) -> int:
    """Bytes of experts that may stay in the file: all but those that one token is sent to."""
    found = 0
    for op in program.ops:
        if isinstance(op, ExpertMatmul) and _has_kernels(tensor := program.tensors[op.weight]):
            found += tensor.nbytes - tensor.nbytes * op.n_used // tensor.shape[0]
    return found


def work_nbytes(program: Program, max_tokens: int, n_threads: int, form: str) -> int:
    """Bytes that the CPU executor of a program holds besides mapped weights and the cache, without taking them."""
    low, _ = _all_rows(program, None, max_tokens, _Memory(real=False))
    if program.adapted is not None:
        _all_rows(program.adapted, None, max_tokens, low.memory, shared=low)
    return low.memory.nbytes + n_threads * scratch_nbytes(program, max_tokens, form)


def scratch_nbytes(program: Program, max_tokens: int, form: str) -> int:
    """Scratch of one thread, whole pages."""
    widest = max(buffer.width for buffer in (program.adapted or program).buffers.values())
    nbytes = max(attention_work.scratch_nbytes(program), experts.scratch_nbytes(program, max_tokens, form))
    return -(-max(nbytes, layout.matmul_scratch_nbytes(max_tokens, widest)) // 4096) * 4096 + layout.tiles_nbytes(form)


def _all_rows(
    program: Program,
    pool: CachePool | None,
    max_tokens: int,
    memory: _Memory,
    *,
    narrows: bool = True,
    shared: _Lowering | None = None,
) -> tuple[_Lowering, OutputTail]:
    """Of a program and the tail behind it, which is empty where there is none.

    shared   of a program with which it has buffers and weights in common
    """
    last = last_write(program) if narrows else None
    tail = (output_tail(program) if narrows and not last else None) or OutputTail(len(program.ops), (), {})
    log, ops = row_log(program), (*program.ops, *tail.ops)
    whole = dataclasses.replace(program, ops=ops, buffers={**program.buffers, **tail.buffers, **log.buffers})
    low = _Lowering(whole, pool, max_tokens, memory, attention_work.attention_shapes(program), log.buffers)
    if shared is not None:
        low.buffers, low.places, low.arrays = shared.buffers, shared.places, shared.arrays
        low.matrices, low.vectors = shared.matrices, shared.vectors
    for name, buffer in sorted(whole.buffers.items(), key=lambda item: item[1].of != ""):
        if name not in low.buffers:
            low.allocate(name, buffer)
    for i, op in enumerate(whole.ops):
        if last and i == last.start:
            low.derived, low.by_head = {}, {}  # of rows that may be other ones from here on
        low.op(op)
        for copy in log.copies.get(op, ()):
            _scale(low, copy)
    low.first_row.append(len(low.rows))
    for op in log.replay:
        _RULES[type(op)](low, op)
    memory.nbytes += len(low.rows) * layout.OP_NBYTES
    return low, tail
