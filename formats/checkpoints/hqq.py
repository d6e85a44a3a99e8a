"""HQQ: 1 to 8 bits, a scale and a zero point (no whole number) for every group of the flattened matrix.

    axis 1: the matrix as (n_groups, group_size), ``scale`` and ``zero`` (n_groups, 1)
    axis 0: the matrix as (group_size, n_groups), ``scale`` and ``zero`` (1, n_groups)

    w = (q - zero) * scale

``W_q`` packs rows of that matrix: with 4 bits its first half lies in the upper halves of the bytes and the second in
the lower, with 2 bits a quarter each, with 1 an eighth; with 3 bits ten tenths lie in an int32, from bit 27 down.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from edgellm.formats.checkpoints.weight import Parts, Weight, pair
from edgellm.formats.stored_numbers import FLOATS

# packing -> (dtype of W_q, bits, shift of each part)
PACKINGS: dict[str, tuple[str, int, tuple[int, ...]]] = {
    "8bit_u8": ("u1", 8, (0,)),
    "4bit_u8": ("u1", 4, (4, 0)),
    "3bit_32": ("<i4", 3, tuple(range(27, -1, -3))),
    "2bit_u8": ("u1", 2, (6, 4, 2, 0)),
    "1bit_u8": ("u1", 1, tuple(range(7, -1, -1))),
}
BY_BITS = {8: "8bit_u8", 6: "8bit_u8", 5: "8bit_u8", 4: "4bit_u8", 3: "3bit_32", 2: "2bit_u8", 1: "1bit_u8"}
SETTINGS = (
    "nbits", "group_size", "axis", "packing", "unpack_view_dtype", "view_as_float", "compute_dtype", "offload_meta",
    "encoded_state_dict", "stores_quant_config", "channel_wise", "optimize", "round_zero", "quant_scale", "quant_zero",
)  # fmt: skip


def weights(config: dict[str, Any], parts: Parts) -> dict[str, Weight]:
    """Every packed module's weight."""
    return {f"{base}.weight": _weight(parts, base) for base in parts.bases(".W_q")}


def _weight(parts: Parts, base: str) -> Weight:
    n_out, n_in, axis, packing, group_size = _settings(parts, base)
    form, bits, shifts = PACKINGS[packing]
    # the shape in which the matrix is packed; without a group size its own rows, or columns, are the groups
    n_rows, n_columns = n_out, n_in
    if group_size is not None:
        n_groups = n_out * n_in // group_size
        n_rows, n_columns = (n_groups, group_size) if axis == 1 else (group_size, n_groups)
    step = -(-n_rows // len(shifts))
    raw = parts.need(f"{base}.W_q").raw
    if raw.size != step * n_columns * np.dtype(form).itemsize or n_rows * n_columns != n_out * n_in:
        parts.fail(f"{base}.W_q", f"has {raw.size} bytes for {n_out} x {n_in} weights of {bits} bits", "MODEL_SHAPE")
    packed = raw.view(form).reshape(step, n_columns)
    n_groups = n_rows if axis == 1 else n_columns
    scale, zero = (parts.flat(f"{base}.{name}", n_groups, *FLOATS) for name in ("scale", "zero"))
    shift_of = np.array(shifts, packed.dtype)

    def decode(start: int, stop: int) -> np.ndarray:
        place = np.arange(start * n_in, stop * n_in)
        row, column = place // n_columns, place % n_columns
        q = packed[row % step, column] >> shift_of[row // step] & packed.dtype.type((1 << bits) - 1)
        group = row if axis == 1 else column
        return ((q - zero[group]) * scale[group]).astype(np.float32).reshape(stop - start, n_in)

    return Weight((n_out, n_in), decode)


def _settings(parts: Parts, base: str) -> tuple[int, int, int, str, int | None]:
    """Shape, axis, packing and group size, which are kept as tensors of one number or of characters."""

    def number(name: str) -> int | None:
        tensor = parts.find(f"{base}.{name}")
        if tensor is None or tensor.raw.size != tensor.kind.n_bits // 8:
            return None
        value = float(tensor.float32().reshape(-1)[0])
        return int(value) if value == int(value) else None

    for name in SETTINGS:
        parts.find(f"{base}.{name}")
    if number("quant_scale") or number("quant_zero"):
        parts.refuse(base, "its scales are quantized too, expected plain numbers")
    axis = number("axis")
    text = parts.find(f"{base}.packing", "U8")
    packing = text.raw.tobytes().decode("ascii", "replace") if text is not None else BY_BITS.get(number("nbits") or 0)
    if axis not in (0, 1) or packing not in PACKINGS:
        parts.fail(base, f"axis and packing are {axis} and {packing}, expected 0 or 1 and one of {', '.join(PACKINGS)}")
    given = parts.need(f"{base}.shape", "I32", "I64").values.reshape(-1).tolist()
    shape, group_size = pair(given), number("group_size")
    if shape is None or (group_size is not None and group_size < 1):
        parts.fail(f"{base}.shape", f"is {given} in groups of {group_size}, expected two numbers", "MODEL_SHAPE")
    return *shape, axis, packing, group_size
