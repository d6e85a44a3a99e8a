"""bitsandbytes: 4-bit codes (NF4, FP4) with a scale for every block of weights, or int8 with a scale for every row.

4 bits: ``weight`` has two codes a byte, the earlier one in the upper half, over the flattened matrix. ``quant_map`` are
the 16 values of the codes, ``absmax`` the scale of each ``blocksize`` weights; where that is quantized again,

    absmax[b] = nested_quant_map[absmax_code[b]] * nested_absmax[b // nested_blocksize] + nested_offset

8 bits: ``weight`` int8, ``SCB`` the largest size in each row: w = q * SCB / 127.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from edgellm.formats.checkpoints.weight import Parts, Rows, Weight, pair
from edgellm.formats.json_text import parse_json
from edgellm.formats.stored_numbers import FLOATS

STATE = ".quant_state.bitsandbytes__"


def weights(config: dict[str, Any], parts: Parts) -> dict[str, Weight]:
    """Every packed weight of either kind."""
    found = {}
    for kind in ("nf4", "fp4"):
        for name in parts.bases(f"{STATE}{kind}"):
            found[name] = _four_bits(parts, name, kind)
    for base in parts.bases(".SCB"):
        found[f"{base}.weight"] = _eight_bits(parts, base)
    return found


def _eight_bits(parts: Parts, base: str) -> Weight:
    q = parts.matrix(f"{base}.weight", "I8")
    scale = parts.flat(f"{base}.SCB", len(q), *FLOATS)[:, None] / np.float32(127)
    layout = parts.find(f"{base}.weight_format", "U8")
    if layout is not None and layout.values.any():
        parts.refuse(f"{base}.weight_format", "is a layout of an old graphics card, expected rows")
    return Weight((q.shape[0], q.shape[1]), lambda start, stop: q[start:stop] * scale[start:stop])


def _four_bits(parts: Parts, name: str, kind: str) -> Weight:
    state = _state(parts, name, kind)
    shape = pair(state.get("shape"))
    if shape is None:
        parts.fail(name, f"the shape of its state is {state.get('shape')}, expected two numbers")
    n_out, n_in = shape
    packed = parts.need(name)
    if packed.raw.size != -(-n_out * n_in // 2):
        parts.fail(name, f"has {packed.raw.size} bytes for {n_out} x {n_in} codes of 4 bits", "MODEL_SHAPE")
    values = parts.flat(f"{name}.quant_map", 16, *FLOATS)
    block = _size(parts, name, state, "blocksize")
    absmax = _absmax(parts, name, state, -(-n_out * n_in // block))

    def decode(start: int, stop: int) -> np.ndarray:
        first, last = start * n_in, stop * n_in
        codes = packed.raw[first // 2 : -(-last // 2)]
        both = np.stack((codes >> 4, codes & 15), axis=1).reshape(-1)
        codes = both[first % 2 : first % 2 + last - first]
        first_block, last_block = first // block, -(-last // block)
        scales = np.repeat(absmax(first_block, last_block), block)[first - first_block * block :]
        return (values[codes] * scales[: len(codes)]).reshape(stop - start, n_in)

    return Weight((n_out, n_in), decode)


def _state(parts: Parts, name: str, kind: str) -> dict[str, Any]:
    """What the packed tensor's state says in JSON."""
    tensor = parts.need(f"{name}{STATE}{kind}", "U8")
    state = parse_json(tensor.raw.tobytes(), f"{name}{STATE}{kind}", "CHECKPOINT_SCHEME")
    if not isinstance(state, dict):
        parts.fail(name, "its state is no JSON object")
    return state


def _size(parts: Parts, name: str, state: dict[str, Any], key: str) -> int:
    size = state.get(key)
    if type(size) is not int or not 1 <= size <= 1 << 16:
        parts.fail(name, f"its {key} is {size}, expected 1 to 65536")
    return size


def _absmax(parts: Parts, name: str, state: dict[str, Any], n_blocks: int) -> Rows:
    """A function that gives the scales of some blocks, float32."""
    tensor = parts.need(f"{name}.absmax", *FLOATS, "U8")
    if tensor.raw.size * 8 // tensor.kind.n_bits != n_blocks:
        parts.fail(f"{name}.absmax", f"has the shape {tensor.shape}, expected {n_blocks} scales", "MODEL_SHAPE")
    flat = tensor.values.reshape(-1)
    if tensor.kind.name != "U8":
        return lambda start, stop: tensor.float32().reshape(-1)[start:stop]
    values = parts.flat(f"{name}.nested_quant_map", 256, *FLOATS)
    block = _size(parts, name, state, "nested_blocksize")
    outer = parts.need(f"{name}.nested_absmax", *FLOATS).float32().reshape(-1)
    offset = state.get("nested_offset")
    if len(outer) != -(-n_blocks // block) or isinstance(offset, bool) or not isinstance(offset, int | float):
        parts.fail(f"{name}.nested_absmax", f"has {len(outer)} scales for {n_blocks} blocks, offset {offset}")
    shift = np.float32(offset)
    return lambda start, stop: values[flat[start:stop]] * outer[np.arange(start, stop) // block] + shift
