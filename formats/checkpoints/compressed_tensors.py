"""compressed-tensors: groups of modules, each with bits, strategy and format of its own.

pack-quantized        weight_packed (n_out, words) int32, inputs from the lowest bit on, each as q + 2^(bits - 1);
                      weight_zero_point packed likewise along the outputs; weight_shape, weight_scale
int-quantized, float-quantized, naive-quantized   weight int8 or 8-bit floats, weight_scale, weight_zero_point
mxfp4-pack-quantized  weight_packed uint8, weight_scale uint8 for every 32, a power of two
nvfp4-pack-quantized  weight_packed uint8, weight_scale E4M3 for every 16, over weight_global_scale

w = (q - zero) * scale
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from edgellm.formats.checkpoints.bit_packing import n_words, unpack_words
from edgellm.formats.checkpoints.mxfp4 import e2m1_rows
from edgellm.formats.checkpoints.scaled import e2m1_groups, scaled
from edgellm.formats.checkpoints.weight import Parts, Weight
from edgellm.formats.stored_numbers import FLOATS

MAX_PATTERN = 200  # characters of a module's pattern


def weights(config: dict[str, Any], parts: Parts) -> dict[str, Weight]:
    """Every compressed module's weight, by the settings of the group that the module belongs to."""
    sparsity = config.get("sparsity_config") or {}
    if not isinstance(sparsity, dict) or (sparsity and sparsity.get("format") != "dense"):
        parts.refuse("sparsity_config", "is set; edgellm decodes weights that are all there")
    groups = _groups(config, parts)
    found = {}
    for base in parts.bases(".weight_scale"):
        arguments, form = _group_of(base, groups, config, parts)
        packed = parts.tensors.get(f"{base}.weight_packed")
        if packed is not None and packed.kind.name == "I32":
            found[f"{base}.weight"] = _packed(parts, base, arguments)
        elif packed is not None:
            found[f"{base}.weight"] = _four_bit_floats(parts, base, form)
        else:
            found[f"{base}.weight"] = _plain(parts, base, arguments)
    return found


def _groups(config: dict[str, Any], parts: Parts) -> list[tuple[list[str], dict[str, Any], str]]:
    """(targets, settings of the weights, format) of every group."""
    groups = config.get("config_groups")
    found = []
    for group in groups.values() if isinstance(groups, dict) else ():
        arguments = group.get("weights") if isinstance(group, dict) else None
        targets = group.get("targets") if isinstance(group, dict) else None
        if not isinstance(arguments, dict) or not isinstance(targets, list):
            continue
        form = group.get("format") or config.get("format")
        found.append(([target for target in targets if isinstance(target, str)], arguments, str(form)))
    if not found:
        parts.fail("config_groups", "has no group with targets and weights")
    return found


def _group_of(
    base: str, groups: list[tuple[list[str], dict[str, Any], str]], config: dict[str, Any], parts: Parts
) -> tuple[dict[str, Any], str]:
    """The settings of a module: those of the group that names it, else whose pattern it matches, else of its class."""
    ranked = []
    for targets, arguments, form in groups:
        for target in targets:
            if target == base:
                ranked.append((0, arguments, form))
            elif target.startswith("re:") and len(target) <= MAX_PATTERN and _matches(target[3:], base):
                ranked.append((1, arguments, form))
            elif "." not in target and not target.startswith("re:"):
                ranked.append((2, arguments, form))
    if not ranked:
        parts.fail(base, "belongs to no group of config_groups")
    _, arguments, form = min(ranked, key=lambda row: row[0])
    return arguments, form


def _matches(pattern: str, base: str) -> bool:
    try:
        return re.match(pattern, base) is not None
    except re.error:
        return False


def _number(parts: Parts, base: str, arguments: dict[str, Any], key: str, most: int) -> int:
    value = arguments.get(key)
    if type(value) is not int or not 1 <= value <= most:
        parts.fail(base, f"{key} is {value}, expected 1 to {most}")
    return value


def _plain(parts: Parts, base: str, arguments: dict[str, Any]) -> Weight:
    """8-bit numbers, one by one."""
    name = f"{base}.weight"
    values = parts.need(name, "I8", "F8_E4M3", "F8_E5M2")
    block = arguments.get("block_structure")
    if isinstance(block, str) and re.fullmatch(r"\d{1,5}x\d{1,5}", block):
        block = [int(n) for n in block.split("x")]
    shape = None
    if isinstance(block, list) and len(block) == 2 and all(type(n) is int and n >= 1 for n in block):
        shape = (block[0], block[1])
    zero = f"{base}.weight_zero_point"
    has_zero = zero in parts.tensors and arguments.get("symmetric") is False
    parts.used.add(zero)
    return scaled(parts, name, values, f"{base}.weight_scale", shape, zero if has_zero else None)


def _packed(parts: Parts, base: str, arguments: dict[str, Any]) -> Weight:
    """1 to 8 bits in words. Older writers leave a word's last bits empty where a number would cross its border."""
    bits = _number(parts, base, arguments, "num_bits", 8)
    shape = parts.need(f"{base}.weight_shape", "I64", "I32").values.reshape(-1).tolist()
    if len(shape) != 2 or min(shape) < 1:
        parts.fail(f"{base}.weight_shape", f"is {shape}, expected two numbers", "MODEL_SHAPE")
    n_out, n_in = shape
    packed = parts.matrix(f"{base}.weight_packed", "I32", rows=n_out)
    scale = parts.need(f"{base}.weight_scale", *FLOATS)
    n_groups = scale.shape[1] if len(scale.shape) == 2 else 1
    group_of = _group_of_input(parts, base, arguments, n_in, n_groups)
    if scale.raw.size * 8 // scale.kind.n_bits not in (n_out * n_groups, 1):
        parts.fail(f"{base}.weight_scale", f"has the shape {scale.shape} for {n_out} rows", "MODEL_SHAPE")
    unpack = _unpacker(parts, f"{base}.weight_packed", packed.shape[1], bits, n_in)
    zero = None
    if f"{base}.weight_zero_point" in parts.tensors:
        zeros = parts.matrix(f"{base}.weight_zero_point", "I32", columns=n_groups)
        unpack_zero = _unpacker(parts, f"{base}.weight_zero_point", zeros.shape[0], bits, n_out)
        zero = zeros if arguments.get("symmetric") is False else None

    def decode(start: int, stop: int) -> np.ndarray:
        q = unpack(packed[start:stop].T, 0, n_in).T.astype(np.float32)
        z = np.float32(1 << bits - 1) if zero is None else unpack_zero(zero, start, stop)[:, group_of]
        numbers = scale.float32()
        numbers = numbers.reshape(-1, n_groups)[start:stop, group_of] if numbers.size > 1 else numbers.reshape(1, 1)
        return (q - z) * numbers

    return Weight((n_out, n_in), decode)


def _group_of_input(parts: Parts, base: str, arguments: dict[str, Any], n_in: int, n_groups: int) -> np.ndarray:
    """(n_in,) the group of every input; with activation order a tensor says it."""
    indices = parts.find(f"{base}.weight_g_idx", "I32", "I64")
    if indices is not None and (indices.values >= 0).all():
        found = indices.values.reshape(-1).astype(np.int64)
        if len(found) != n_in or found.max() >= n_groups:
            parts.fail(f"{base}.weight_g_idx", f"names groups outside 0 to {n_groups - 1}")
        return found
    if n_groups == 1:
        return np.zeros(n_in, np.int64)
    size = _number(parts, base, arguments, "group_size", 1 << 20)
    if -(-n_in // size) != n_groups:
        parts.fail(f"{base}.weight_scale", f"has {n_groups} groups of {size} for {n_in} inputs", "MODEL_SHAPE")
    return np.arange(n_in) // size


def _unpacker(parts: Parts, name: str, found: int, bits: int, n: int) -> Any:
    """What unpacks n numbers of this many words, by either writer's habit."""
    if found == n_words(n, bits):
        return lambda words, start, stop: unpack_words(np.ascontiguousarray(words), bits, start, stop)
    per_word = 32 // bits
    if found != -(-n // per_word):
        parts.fail(name, f"has {found} words for {n} numbers of {bits} bits", "MODEL_SHAPE")

    def unpack(words: np.ndarray, start: int, stop: int) -> np.ndarray:
        place = np.arange(start, stop)
        shift = (place % per_word * bits).astype(np.uint32)[:, None]
        words = np.ascontiguousarray(words).view(np.uint32)
        return (words[place // per_word] >> shift & (1 << bits) - 1).astype(np.uint8)

    return unpack


def _four_bit_floats(parts: Parts, base: str, form: str) -> Weight:
    """MXFP4 or NVFP4 by the type of the scales."""
    packed = parts.matrix(f"{base}.weight_packed", "U8")
    n_out, n_in = packed.shape[0], packed.shape[1] * 2
    scale = parts.need(f"{base}.weight_scale", "U8", "F8_E8M0", "F8_E4M3")
    size = 16 if scale.kind.name == "F8_E4M3" else 32
    parts.matrix(f"{base}.weight_scale", rows=n_out, columns=n_in // size)
    if n_in % size:
        parts.fail(f"{base}.weight_packed", f"has rows of {n_in}, expected a multiple of {size}", "MODEL_SHAPE")
    if size == 32:
        return Weight((n_out, n_in), e2m1_rows(packed.reshape(-1), scale.raw, n_in))
    whole = parts.scalar(f"{base}.weight_global_scale", "F32")

    def numbers(start: int, stop: int) -> np.ndarray:
        return scale.float32(slice(start, stop)) / whole

    return Weight((n_out, n_in), e2m1_groups(packed, numbers))
