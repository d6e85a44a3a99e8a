"""From a program to an op table: one row of int64 per kernel call, with every address filled in.

Most ops become one row. A product with quantized weights needs its input quantized first: that row is added once for
all products that read the same buffer (q, k and v; gate and up).

Addresses are safe to hand to the kernels because the GGUF validator proved every tensor's range, the architecture file
proved every shape, and the buffers are made here from the same numbers.
"""

from __future__ import annotations

import dataclasses
import struct
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edgellm.kernels.cpu.lib import layout
from edgellm.kernels.cpu.lib.layout import activation_row_nbytes, padded
from edgellm.kernels.cpu.run.attention_work import AttentionShape, attention_shape, attention_shapes
from edgellm.kernels.cpu.run.threads import aligned_zeros
from edgellm.kernels.cpu.weights import FLOAT, QUANTIZED, SUPERBLOCKS
from edgellm.kernels.kv import CachePool
from edgellm.kernels.narrowing import OutputTail, output_tail
from edgellm.kernels.ops import Add, ApplyRope, Attention, Embed, GatedUnit, Matmul, RMSNorm, SelectOutputs, StoreKV
from edgellm.kernels.program import Program

MAX_OUTPUTS = 32
"""Rows of an ``outputs`` buffer: more logits than that are computed in turns."""


@dataclass
class OpTable:
    """The rows of a program, and all memory they point to."""

    rows: np.ndarray  # (n_rows, 16) int64: the program's, then its output tail's (narrowing.py)
    first_row: list[int]  # of each op of the program, and one past the last
    n_token_rows: int  # rows before the first that works on outputs
    n_rows_before_tail: int  # rows that run before the output tail
    kernels: list[str]  # name of each row's kernel
    buffers: dict[str, np.ndarray]  # (rows, padded width) float32
    keep: list[Any]  # weights and activations whose addresses are in the rows


def bits(value: float) -> int:
    """A float argument as it stands in a row."""
    return int(struct.unpack("<q", struct.pack("<d", value))[0])


@dataclass(frozen=True)
class _Row:
    kernel: str
    arguments: list[int]
    reads: frozenset[str]
    writes: frozenset[str]
    alone: bool  # small: one thread does it when there is one token

    def needs(self, earlier: _Row) -> bool:
        """Whether this row must wait for an earlier one."""
        return bool(self.reads & earlier.writes or self.writes & (earlier.writes | earlier.reads))


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
    and the last of its output tail know the first: of the next token.
    """
    quantized = {f"matmul_{name.lower()}" for name in QUANTIZED}
    products = [i for i, row in enumerate(rows) if row.kernel in quantized]
    for of_part in ([i for i in products if i < n_rows], [i for i in products if i >= n_rows]):
        for i, following in zip(of_part, [*of_part[1:], products[0]], strict=True) if of_part else ():
            table[i, layout.FOLLOWING // 8] = table[following].ctypes.data


ALONE_WIDTH = 8192
"""Rows of up to so many values are left to one thread: a few microseconds, about what a meeting costs."""


@dataclass
class _Lowering:
    program: Program
    pool: CachePool
    max_tokens: int
    attention_shapes: list[AttentionShape]
    rows: list[_Row] = field(default_factory=list)
    first_row: list[int] = field(default_factory=list)
    buffers: dict[str, np.ndarray] = field(default_factory=dict)
    keep: list[Any] = field(default_factory=list)
    quantized: dict[str, tuple[int, int]] = field(default_factory=dict)  # buffer -> its int16 form, while current
    activations: dict[str, np.ndarray] = field(default_factory=dict)
    matrices: dict[str, tuple[str, int, int]] = field(default_factory=dict)
    vectors: dict[str, int] = field(default_factory=dict)

    def emit(self, kernel: str, *arguments: int, reads: tuple[str, ...], writes: tuple[str, ...], alone: bool) -> None:
        """Add a row. ``reads`` and ``writes`` name buffers, their int16 forms ("int16 x") and caches ("cache 3")."""
        self.rows.append(_Row(kernel, list(arguments), frozenset(reads), frozenset(writes), alone))

    def buffer(self, name: str) -> tuple[int, int]:
        """Address and row bytes of a buffer."""
        array = self.buffers[name]
        return array.ctypes.data, array.strides[0]

    def row_kind(self, name: str) -> int:
        return layout.N_OUTPUTS if self.program.buffers[name].rows == "outputs" else layout.N_TOKENS

    def wrote(self, name: str) -> None:
        self.quantized.pop(name, None)

    def vector(self, name: str) -> int:
        """Address of a one-dimensional tensor as float32, padded to whole vectors."""
        if name not in self.vectors:
            values = self.program.tensors[name].dequantize().reshape(-1)
            array = np.zeros(padded(len(values)), np.float32)
            array[: len(values)] = values
            self.keep.append(array)
            self.vectors[name] = array.ctypes.data
        return self.vectors[name]

    def matrix(self, name: str) -> tuple[str, int, int]:
        """Kernel suffix, address and row bytes of a weight. A type without kernels is dequantized to F32 here."""
        if name not in self.matrices:
            tensor = self.program.tensors[name]
            quant, data = tensor.quant.name, tensor.data
            if quant not in QUANTIZED and quant not in FLOAT:
                quant, data = "F32", np.ascontiguousarray(tensor.dequantize())
            if len(data) < layout.PANEL_ROWS:  # the matmul reads 16 rows at once
                data = np.concatenate([data, np.repeat(data[-1:], layout.PANEL_ROWS - len(data), axis=0)])
            self.keep.append(data)
            self.matrices[name] = (quant, data.ctypes.data, data.strides[0])
        return self.matrices[name]

    def run(self, name: str) -> int:
        """Groups of a buffer that share a scale: 8 when a product with 256-weight blocks reads it before it changes."""
        for op in self.program.ops[len(self.first_row) - 1 :]:
            if isinstance(op, Matmul) and op.x == name and self.matrix(op.weight)[0] in SUPERBLOCKS:
                return 8
            if (op.x if isinstance(op, ApplyRope) else getattr(op, "out", None)) == name:
                break
        return 1

    def quantized_rows(self, name: str) -> tuple[int, int]:
        """Address and row bytes of a buffer's int16 form; emits the row that makes it unless it is current."""
        if name not in self.quantized:
            width = self.program.buffers[name].width
            nbytes = activation_row_nbytes(width)
            if name not in self.activations:
                n_rows = self.buffers[name].shape[0]
                self.activations[name] = aligned_zeros(n_rows * nbytes).reshape(n_rows, nbytes)
                self.keep.append(self.activations[name])
            address = self.activations[name].ctypes.data
            arguments = (*self.buffer(name), address, nbytes, width // 32, self.row_kind(name), self.run(name))
            form = f"int16 {name}"
            self.emit("quantize", *arguments, reads=(name,), writes=(form,), alone=width <= ALONE_WIDTH)
            self.quantized[name] = (address, nbytes)
        return self.quantized[name]


def _embed(low: _Lowering, op: Embed) -> None:
    quant, w, w_row = low.matrix(op.weight)
    width = low.program.buffers[op.out].width
    columns = width // 32 if quant in QUANTIZED else width
    arguments = (w, w_row, columns, *low.buffer(op.out), bits(op.scale))
    low.emit(f"embed_{quant.lower()}", *arguments, reads=(), writes=(op.out,), alone=True)
    low.wrote(op.out)


def _rms_norm(low: _Lowering, op: RMSNorm) -> None:
    group = low.program.tensors[op.weight].shape[-1]
    heads = low.program.buffers[op.x].width // group
    x, out = low.buffer(op.x), low.buffer(op.out)
    arguments = (*x, low.vector(op.weight), *out, group, heads, bits(op.eps), low.row_kind(op.x))
    low.emit("rms_norm", *arguments, reads=(op.x,), writes=(op.out,), alone=group * heads <= ALONE_WIDTH)
    low.wrote(op.out)


def _matmul(low: _Lowering, op: Matmul) -> None:
    quant, w, w_row = low.matrix(op.weight)
    n_out, n_in = low.program.tensors[op.weight].shape
    x, columns = (low.quantized_rows(op.x), n_in // 32) if quant in QUANTIZED else (low.buffer(op.x), n_in)
    bias = low.vector(op.bias) if op.bias else 0
    out = low.buffer(op.out)
    arguments = (*x, w, w_row, n_out, columns, *out, bias, low.row_kind(op.x))
    source = f"int16 {op.x}" if quant in QUANTIZED else op.x
    low.emit(f"matmul_{quant.lower()}", *arguments, reads=(source,), writes=(op.out,), alone=False)
    low.wrote(op.out)


def _rope(low: _Lowering, op: ApplyRope) -> None:
    rope = low.program.ropes[op.rope]
    heads = low.program.buffers[op.x].width // op.head_dim
    index = list(low.program.ropes).index(op.rope)
    arguments = (*low.buffer(op.x), heads, op.head_dim, rope.n_dims // 2, index, int(rope.adjacent))
    low.emit("rope", *arguments, reads=(op.x,), writes=(op.x,), alone=True)
    low.wrote(op.x)


def _store_kv(low: _Lowering, op: StoreKV) -> None:
    layer = low.program.kv_layer(op.layer)
    k, v = (array.ctypes.data for array in low.pool.arrays[op.layer])
    table = low.pool.groups.index(layer.group)
    shape = (layer.n_kv_heads, layer.head_dim_k, layer.head_dim_v)
    cache = f"cache {op.layer}"
    arguments = (*low.buffer(op.k), *low.buffer(op.v), k, v, *shape, table)
    low.emit("store_kv", *arguments, reads=(op.k, op.v), writes=(cache,), alone=True)


def _attention(low: _Lowering, op: Attention) -> None:
    layer = low.program.kv_layer(op.layer)
    k, v = (array.ctypes.data for array in low.pool.arrays[op.layer])
    shape = (op.n_heads, layer.n_kv_heads, layer.head_dim_k, layer.head_dim_v, layer.window)
    parts = low.attention_shapes.index(attention_shape(op, layer))
    arguments = (*low.buffer(op.q), *low.buffer(op.out), k, v, *shape, parts, bits(op.scale))
    reads = (op.q, f"cache {op.layer}")
    low.emit("attention", *arguments, reads=reads, writes=(op.out, "partials"), alone=False)
    low.wrote(op.out)


def _gated_unit(low: _Lowering, op: GatedUnit) -> None:
    width = low.program.buffers[op.out].width
    arguments = (*low.buffer(op.gate), *low.buffer(op.up), *low.buffer(op.out), width, low.row_kind(op.out))
    reads, alone = (op.gate, op.up), width <= ALONE_WIDTH
    low.emit(f"gated_{op.activation}", *arguments, reads=reads, writes=(op.out,), alone=alone)
    low.wrote(op.out)


def _add(low: _Lowering, op: Add) -> None:
    width, kind = low.program.buffers[op.out].width, low.row_kind(op.out)
    arguments = (*low.buffer(op.x), *low.buffer(op.y), *low.buffer(op.out), width, kind)
    low.emit("add", *arguments, reads=(op.x, op.y), writes=(op.out,), alone=width <= ALONE_WIDTH)
    low.wrote(op.out)


def _select_outputs(low: _Lowering, op: SelectOutputs) -> None:
    arguments = (*low.buffer(op.x), *low.buffer(op.out), low.program.buffers[op.out].width)
    low.emit("select_outputs", *arguments, reads=(op.x,), writes=(op.out,), alone=True)
    low.wrote(op.out)


_RULES: dict[type, Any] = {
    Embed: _embed,
    RMSNorm: _rms_norm,
    Matmul: _matmul,
    ApplyRope: _rope,
    StoreKV: _store_kv,
    Attention: _attention,
    GatedUnit: _gated_unit,
    Add: _add,
    SelectOutputs: _select_outputs,
}


def lower(program: Program, pool: CachePool, max_tokens: int) -> OpTable:
    """The op table of a program, kernel addresses still zero (``OpTable.kernels`` has their names)."""
    tail = output_tail(program) or OutputTail(len(program.ops), (), {})
    whole = dataclasses.replace(program, ops=(*program.ops, *tail.ops), buffers={**program.buffers, **tail.buffers})
    low = _Lowering(whole, pool, max_tokens, attention_shapes(program, pool))
    for name, buffer in whole.buffers.items():
        n_rows = max_tokens if buffer.rows == "tokens" else MAX_OUTPUTS
        low.buffers[name] = np.zeros((n_rows, padded(buffer.width)), buffer.dtype)
    for op in whole.ops:
        low.first_row.append(len(low.rows))
        _RULES[type(op)](low, op)
    low.first_row.append(len(low.rows))
    n_ops = len(program.ops)
    selects = [i for i, op in enumerate(program.ops) if isinstance(op, SelectOutputs)]
    table = np.zeros((len(low.rows), layout.OP_FIELDS), np.int64)
    for fields, row in zip(table, low.rows, strict=True):
        assert len(row.arguments) < layout.FLAGS // 8, "an op row has 13 arguments at most"
        fields[1 : 1 + len(row.arguments)] = row.arguments
    _set_flags(table, low.rows)
    _link_products(table, low.rows, low.first_row[n_ops])
    return OpTable(
        table,
        low.first_row[: n_ops + 1],
        low.first_row[selects[0] if selects else n_ops],
        low.first_row[tail.start],
        [row.kernel for row in low.rows],
        low.buffers,
        low.keep,
    )
