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
from edgellm.formats.checkpoints.scaled import four_bit_floats, scaled
from edgellm.formats.checkpoints.weight import Parts, Weight, pair
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
        arguments = _settings_of(base, groups, parts)
        packed = parts.tensors.get(f"{base}.weight_packed")
        if packed is not None and packed.kind.name == "I32":
            found[f"{base}.weight"] = _packed(parts, base, arguments)
        elif packed is not None:
            found[f"{base}.weight"] = _four_bit_floats(parts, base)
        else:
            found[f"{base}.weight"] = _plain(parts, base, arguments)
    return found


def _groups(config: dict[str, Any], parts: Parts) -> list[tuple[str, dict[str, Any]]]:
    """(target, settings of the weights) of every target of every group."""
    groups = config.get("config_groups")
    found = []
    for group in groups.values() if isinstance(groups, dict) else ():
        arguments, targets = (group.get("weights"), group.get("targets")) if isinstance(group, dict) else (None, None)
        if isinstance(arguments, dict) and isinstance(targets, list):
            found += [(target, arguments) for target in targets if isinstance(target, str)]
    if not found:
        parts.fail("config_groups", "has no group with targets and weights")
    return found


def _settings_of(base: str, groups: list[tuple[str, dict[str, Any]]], parts: Parts) -> dict[str, Any]:
    """The settings of a module: those of the group that names it, else whose pattern it matches, else of its class."""

    def rank(target: str) -> int | None:
        if target.startswith("re:"):
            return 1 if len(target) <= MAX_PATTERN and _matches(target[3:], base) else None
        return 0 if target == base else 2 if "." not in target else None

    ranked = [(place, arguments) for target, arguments in groups if (place := rank(target)) is not None]
    if not ranked:
        parts.fail(base, "belongs to no group of config_groups")
    return min(ranked, key=lambda row: row[0])[1]


def _matches(pattern: str, base: str) -> bool:
    try:
        return re.match(pattern, base) is not None
    except re.error:
        return False


def _plain(parts: Parts, base: str, arguments: dict[str, Any]) -> Weight:
    """8-bit numbers, one by one."""
    name = f"{base}.weight"
    values = parts.need(name, "I8", "F8_E4M3", "F8_E5M2")
    block = arguments.get("block_structure")
    if isinstance(block, str) and re.fullmatch(r"\d{1,5}x\d{1,5}", block):
        block = [int(n) for n in block.split("x")]
    zero = f"{base}.weight_zero_point"
    has_zero = zero in parts.tensors and arguments.get("symmetric") is False
    parts.used.add(zero)
    return scaled(parts, name, values, f"{base}.weight_scale", pair(block), zero if has_zero else None)


def _packed(parts: Parts, base: str, arguments: dict[str, Any]) -> Weight:
    """1 to 8 bits in words. Older writers leave a word's last bits empty where a number would cross its border."""
    bits = arguments.get("num_bits")
    if type(bits) is not int or not 1 <= bits <= 8:
        parts.fail(base, f"num_bits is {bits}, expected 1 to 8")
    given = parts.need(f"{base}.weight_shape", "I64", "I32").values.reshape(-1).tolist()
    shape = pair(given)
    if shape is None:
        parts.fail(f"{base}.weight_shape", f"is {given}, expected two numbers", "MODEL_SHAPE")
    n_out, n_in = shape
    packed = parts.matrix(f"{base}.weight_packed", "I32", rows=n_out)
    scale = parts.need(f"{base}.weight_scale", *FLOATS)
    n_groups = scale.shape[1] if len(scale.shape) == 2 else 1
    indices = parts.find(f"{base}.weight_g_idx", "I32", "I64")
    if indices is not None and (indices.values < 0).any():  # without an order of activations
        indices = None
    size = n_in if n_groups == 1 else arguments.get("group_size")
    group_of = parts.groups(indices, f"{base}.weight_scale", size, n_in, n_groups)
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


def _four_bit_floats(parts: Parts, base: str) -> Weight:
    """MXFP4 or NVFP4 by the type of the scales."""
    name, scale_name = f"{base}.weight_packed", f"{base}.weight_scale"
    scale = parts.need(scale_name, "U8", "F8_E8M0", "F8_E4M3")
    if scale.kind.name != "F8_E4M3":
        return four_bit_floats(parts, name, scale_name, 32, ("U8", "F8_E8M0"))
    whole = parts.flat(f"{base}.weight_global_scale", 1, "F32")
    return four_bit_floats(parts, name, scale_name, 16, ("F8_E4M3",), lambda numbers: numbers / whole)
