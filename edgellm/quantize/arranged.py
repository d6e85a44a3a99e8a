"""Tensors of a checkpoint in GGUF's arrangement: cut, joined, turned, in another order, while they are read.

Each function takes an ``InputTensor`` and gives another one; nothing is read before its rows are wanted.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from edgellm.formats.errors import FormatError
from edgellm.formats.findings import PULL_AGAIN, short
from edgellm.formats.stored_numbers import encode_plain
from edgellm.models.parts.checkpoint_config import CheckpointConfig
from edgellm.models.parts.checkpoint_form import CheckpointForm, HeadRows
from edgellm.quantize.input_model import InputTensor, Rows


def part_of_rows(tensor: InputTensor, i: int, n_parts: int, stored_name: str) -> InputTensor:
    """The i-th of equal parts of a matrix's rows, or of the rows of each expert's matrix."""
    if n_parts == 1:
        return tensor
    whole = tensor.shape[-2] if len(tensor.shape) > 1 else 0
    if whole == 0 or whole % n_parts:
        raise FormatError(
            f"{short(stored_name)}: has the shape {tensor.shape}, expected matrices of {n_parts} equal parts. "
            f"{PULL_AGAIN}",
            code="MODEL_SHAPE",
        )
    n = whole // n_parts

    def cut(read: Rows) -> Rows:
        def rows(start: int, stop: int) -> np.ndarray:
            pieces = []
            for matrix in range(start // n, -(-stop // n)):
                first = matrix * whole + i * n - matrix * n  # from a row of the part to one of the whole
                pieces.append(read(max(start, matrix * n) + first, min(stop, matrix * n + n) + first))
            return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

        return rows

    return replace(
        tensor, shape=(*tensor.shape[:-2], n, tensor.n_in), decode=cut(tensor.decode), stored=cut(tensor.stored)
    )


def from_row(tensor: InputTensor, first: int, stored_name: str) -> InputTensor:
    """A matrix without the rows before ``first``."""
    if not first:
        return tensor
    if len(tensor.shape) != 2 or tensor.shape[0] <= first:
        raise FormatError(
            f"{short(stored_name)}: has the shape {tensor.shape}, expected more than {first:,} rows. {PULL_AGAIN}",
            code="MODEL_SHAPE",
        )

    def behind(read: Rows) -> Rows:
        return lambda start, stop: read(start + first, stop + first)

    shape = (tensor.shape[0] - first, tensor.n_in)
    return replace(tensor, shape=shape, decode=behind(tensor.decode), stored=behind(tensor.stored))


def with_rows(tensor: InputTensor, n: int | None, stored_name: str) -> InputTensor:
    """A matrix of so many rows, the last of them 0 where it has fewer; None: as many as it has."""
    if n is None or tensor.shape[0] == n:
        return tensor
    if len(tensor.shape) != 2 or tensor.shape[0] > n:
        raise FormatError(
            f"{short(stored_name)}: has the shape {tensor.shape}, expected up to {n:,} rows. {PULL_AGAIN}",
            code="MODEL_SHAPE",
        )
    there = tensor.shape[0]

    def rows(start: int, stop: int) -> np.ndarray:
        found = np.zeros((stop - start, tensor.n_in), np.float32)
        if start < there:
            found[: there - start] = tensor.decode(start, min(stop, there))
        return found

    return _of_rows(tensor, (n, tensor.n_in), rows)


def rearranged(tensor: InputTensor, form: CheckpointForm, config: CheckpointConfig) -> InputTensor:
    """A tensor with its rows, or columns, in GGUF's order, and its numbers and shape as GGUF has them."""
    rest = re.sub(r"^blk\.\d+\.", "", tensor.name)
    is_vector = len(tensor.shape) == 1
    change = form.numbers.get(rest)
    factor, shape = form.factors(config).get(rest, 1.0), form.shapes(config).get(rest)
    if np.ndim(factor) or factor != 1.0:
        tensor = _multiplied(tensor, factor)
    rows, columns = (orders(config).get(rest) for orders in (form.row_orders, form.column_orders))
    for order, axis in ((rows, 0), (columns, -1)):
        if order is not None and tensor.shape[axis] != len(order):
            raise FormatError(
                f"{tensor.name} has the shape {tensor.shape}, expected {len(order)} as config.json says. {PULL_AGAIN}",
                code="MODEL_SHAPE",
            )
    if shape is not None:
        tensor = _as_matrix(tensor, shape)
    elif is_vector:
        rows, columns = None, rows
    if change is None and (rows is None or _in_order(rows)) and (columns is None or _in_order(columns)):
        return tensor

    def decode(start: int, stop: int) -> np.ndarray:
        found = tensor.decode(start, stop) if rows is None else _in_runs(tensor.decode, rows[start:stop])
        found = found if columns is None else found[:, columns]
        return found if change is None else change(found)

    return _of_rows(tensor, tensor.shape, decode)


def _in_runs(read: Rows, wanted: np.ndarray) -> np.ndarray:
    """Some rows in this order, read in as few pieces as there are runs of them."""
    ends = [*(np.flatnonzero(np.diff(wanted) != 1) + 1), len(wanted)]
    runs = zip([0, *ends[:-1]], ends, strict=True)
    return np.concatenate([read(int(wanted[a]), int(wanted[b - 1]) + 1) for a, b in runs])


def of_these_rows(tensor: InputTensor, rows: np.ndarray, n_rows: int, stored_name: str) -> InputTensor:
    """Some rows of a matrix of ``n_rows``, or some numbers of a vector, in this order."""
    if tensor.shape[0] != n_rows or len(tensor.shape) > 2:
        raise FormatError(
            f"{short(stored_name)}: has the shape {tensor.shape}, expected {n_rows:,} rows as config.json says. "
            f"{PULL_AGAIN}",
            code="MODEL_SHAPE",
        )
    if len(tensor.shape) == 1:
        return _of_rows(tensor, (len(rows),), lambda start, stop: tensor.decode(start, stop)[:, rows])
    shape = (len(rows), tensor.shape[1])
    return replace(
        tensor,
        shape=shape,
        decode=lambda start, stop: _in_runs(tensor.decode, rows[start:stop]),
        stored=lambda start, stop: _in_runs(tensor.stored, rows[start:stop]),
    )


def _multiplied(tensor: InputTensor, factor: float | np.ndarray) -> InputTensor:
    """All numbers times one, or each row times its own; of a vector an element is a row."""
    by_row = np.asarray(factor, np.float32)
    if by_row.ndim and len(by_row) != tensor.shape[0]:
        raise FormatError(
            f"{tensor.name} has the shape {tensor.shape}, expected {len(by_row)} rows by config.json. {PULL_AGAIN}",
            code="MODEL_SHAPE",
        )

    def rows(start: int, stop: int) -> np.ndarray:
        of_rows = by_row if by_row.ndim == 0 or len(tensor.shape) == 1 else by_row[start:stop, None]
        return tensor.decode(start, stop) * of_rows

    return _of_rows(tensor, tensor.shape, rows)


def _as_matrix(tensor: InputTensor, shape: tuple[int, int]) -> InputTensor:
    """A vector in rows."""
    if tensor.shape != (shape[0] * shape[1],):
        raise FormatError(
            f"{tensor.name} has the shape {tensor.shape}, expected {shape[0] * shape[1]} numbers as config.json says. "
            f"{PULL_AGAIN}",
            code="MODEL_SHAPE",
        )
    return _of_rows(tensor, shape, lambda start, stop: tensor.decode(0, 1).reshape(shape)[start:stop])


def _in_order(order: np.ndarray) -> bool:
    return bool((np.diff(order) == 1).all())


def transposed_matrix(tensor: InputTensor, stored_name: str) -> InputTensor:
    """A matrix the other way round."""
    if len(tensor.shape) != 2:
        raise FormatError(
            f"{short(stored_name)}: has the shape {tensor.shape}, expected a matrix. {PULL_AGAIN}", code="MODEL_SHAPE"
        )
    turned = transposed(replace(tensor, shape=(1, *tensor.shape)))
    return replace(turned, shape=turned.shape[1:])


def experts_apart(tensor: InputTensor, n_experts: int, stored_name: str) -> InputTensor:
    """The rows of all experts, one after the other, as a matrix for each."""
    if len(tensor.shape) != 2 or tensor.shape[0] % n_experts:
        raise FormatError(
            f"{short(stored_name)}: has the shape {tensor.shape}, expected rows of {n_experts} experts. {PULL_AGAIN}",
            code="MODEL_SHAPE",
        )
    return replace(tensor, shape=(n_experts, tensor.shape[0] // n_experts, tensor.n_in))


def transposed(tensor: InputTensor) -> InputTensor:
    """Each expert's matrix the other way round; the last one is kept, for the rows that follow."""
    n_experts, n_in, n_out = tensor.shape
    kept: dict[int, np.ndarray] = {}

    def matrix(expert: int) -> np.ndarray:
        if expert not in kept:
            kept.clear()
            kept[expert] = np.ascontiguousarray(tensor.decode(expert * n_in, (expert + 1) * n_in).T)
        return kept[expert]

    def rows(start: int, stop: int) -> np.ndarray:
        experts = range(start // n_out, -(-stop // n_out))
        return np.concatenate([matrix(e)[max(start - e * n_out, 0) : stop - e * n_out] for e in experts])

    return _of_rows(tensor, (n_experts, n_out, n_in), rows)


def rows_of_heads(tensor: InputTensor, of: HeadRows, stored_name: str) -> InputTensor:
    """Some rows of every head as a tensor (n_heads, n_out, n_in); the last head is kept, for the rows that follow."""
    if len(tensor.shape) != 2 or tensor.shape[0] != of.n_heads * of.each:
        raise FormatError(
            f"{short(stored_name)}: has the shape {tensor.shape}, expected {of.each} rows for each of {of.n_heads} "
            f"heads as config.json says. {PULL_AGAIN}",
            code="MODEL_SHAPE",
        )
    n_out, n_in = (tensor.n_in, of.n) if of.turned else (of.n, tensor.n_in)
    kept: dict[int, np.ndarray] = {}

    def matrix(head: int) -> np.ndarray:
        if head not in kept:
            kept.clear()
            rows = tensor.decode(head * of.each + of.first, head * of.each + of.first + of.n)
            kept[head] = np.ascontiguousarray(rows.T) if of.turned else rows
        return kept[head]

    def rows(start: int, stop: int) -> np.ndarray:
        heads = range(start // n_out, -(-stop // n_out))
        return np.concatenate([matrix(h)[max(start - h * n_out, 0) : stop - h * n_out] for h in heads])

    return _of_rows(tensor, (of.n_heads, n_out, n_in), rows)


def every_nth(tensor: InputTensor, i: int, n_parts: int, stored_name: str) -> InputTensor:
    """The i-th and every n-th row after it of each expert's matrix, or so of its biases."""
    if n_parts == 1:
        return tensor
    is_bias = tensor.name.endswith(".bias")
    n = tensor.shape[-1 if is_bias else -2] // n_parts
    if tensor.shape[-1 if is_bias else -2] % n_parts:
        raise FormatError(
            f"{short(stored_name)}: has the shape {tensor.shape}, expected {n_parts} that alternate. {PULL_AGAIN}",
            code="MODEL_SHAPE",
        )
    if is_bias:
        return _of_rows(tensor, (*tensor.shape[:-1], n), lambda start, stop: tensor.decode(start, stop)[:, i::n_parts])

    def rows(start: int, stop: int) -> np.ndarray:  # n * n_parts rows of a matrix, without a gap between two
        return tensor.decode(start * n_parts, stop * n_parts)[i::n_parts]

    return _of_rows(tensor, (*tensor.shape[:-2], n, tensor.n_in), rows)


def _of_rows(tensor: InputTensor, shape: tuple[int, ...], rows: Rows) -> InputTensor:
    """Another tensor of float32 rows, with the type of this one where that is a plain one."""
    kind = tensor.quant.name

    def stored(start: int, stop: int) -> np.ndarray:
        return encode_plain(np.ascontiguousarray(rows(start, stop)), kind).view(np.uint8).reshape(stop - start, -1)

    return replace(tensor, shape=shape, decode=rows, stored=stored)


def stacked(name: str, experts: dict[int, InputTensor], n_experts: int) -> InputTensor:
    """The matrices of all experts as one tensor (n_experts, n_out, n_in)."""
    if sorted(experts) != list(range(n_experts)):
        raise FormatError(
            f"{name}: {len(experts)} experts are there, expected those from 0 to {n_experts - 1}. {PULL_AGAIN}",
            code="CHECKPOINT_TENSOR",
        )
    parts = [experts[i] for i in range(n_experts)]
    first = parts[0]
    for part in parts:
        if (part.shape, part.quant) != (first.shape, first.quant):
            raise FormatError(
                f"{name}: one expert is {part.quant.name} {part.shape}, another {first.quant.name} {first.shape}, "
                f"expected experts that are alike. {PULL_AGAIN}",
                code="MODEL_SHAPE",
            )

    def stacked(read: Callable[[InputTensor], Rows]) -> Rows:
        def rows(start: int, stop: int) -> np.ndarray:
            n = first.n_rows
            of = [(i, max(start - i * n, 0), min(stop - i * n, n)) for i in range(start // n, -(-stop // n))]
            return np.concatenate([read(parts[i])(a, b) for i, a, b in of])

        return rows

    return replace(
        first,
        shape=(n_experts, *first.shape),
        decode=stacked(lambda part: part.decode),
        stored=stacked(lambda part: part.stored),
        quantized=any(part.quantized for part in parts),
    )


def with_paired_heads(tensor: InputTensor, n_head: int, stored_name: str) -> InputTensor:
    """The rows of every head reordered, so that rotated pairs, half a head apart in transformers, are neighbours."""
    n = tensor.shape[0]
    if n % (2 * n_head):
        raise FormatError(
            f"{short(stored_name)}: has {n:,} rows, expected an even number for each of {n_head} heads. {PULL_AGAIN}",
            code="MODEL_SHAPE",
        )
    head = n // n_head
    order = np.arange(head).reshape(2, -1).T.reshape(-1)

    def reordered(read: Any) -> Any:
        if len(tensor.shape) == 1:
            whole = (np.arange(n_head)[:, None] * head + order).reshape(-1)
            return lambda start, stop: _elements(read(start, stop), n)[:, whole].reshape(stop - start, -1)

        def rows(start: int, stop: int) -> np.ndarray:
            first, last = start // head, -(-stop // head)  # whole heads
            heads = read(first * head, last * head)
            found = heads.reshape(last - first, head, -1)[:, order].reshape(heads.shape)
            return found[start - first * head : stop - first * head]

        return rows

    return replace(tensor, decode=reordered(tensor.decode), stored=reordered(tensor.stored))


def _elements(row: np.ndarray, n: int) -> np.ndarray:
    """A vector's numbers (1, n), or its bytes as (1, n, 4), fit to be reordered."""
    return row if row.shape[-1] == n and row.dtype != np.uint8 else row.reshape(len(row), n, -1)
