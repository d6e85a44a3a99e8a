"""What keys and values can be kept as: ggml's types of 32 numbers, each token of a head by itself, or whole blocks.

A token's key, or value, is cut into groups of 32 dimensions. A group has a float16 scale d, in some types a float16
minimum m, and for every dimension a code; a number is ``d * level(code) + m``. A token is quantized from its own
numbers alone, so it has the same bits in any batch, any chunking and any block.

A block of 32 positions of one head, where ``dots`` are what a product sums over and ``lanes`` what it does not (of keys
dimensions and positions, of values positions and dimensions):

    8 bits       (dots / 2, lanes, 2) int8
    4 or 5 bits  (dots / 4, lanes, 2) uint8: dots 4 i and 4 i + 1 in the low nibbles, 4 i + 2 and 4 i + 3 in the high
    5 bits       (dots / 4, lanes / 16, 2) uint32: for low and high nibbles, bit 2 l + j is the fifth of lane l, dot j
    scales       (dim / 32, 32) float16, then minima likewise

So a register of bytes has two dots of 16 lanes, which one instruction multiplies with int16 and adds.

A packed type takes a block of 32 positions once it is full (KIVI): of keys the positions of a dimension share scale and
minimum, of values 32 dimensions of a position. The newest blocks and a text's first one are read in 16 bits elsewhere
(kernels/kv.py). Keys have three bits and values two, for the errors of keys cost more: they go through the softmax.
Levels lie between a group's ends, or, where that has the smaller squared error, in a part of the way. A scale is a
byte, the upper bits of a float16 that is not negative; a minimum is a byte of steps from 128, see levels.py.

    2 bits       (dots / 8, lanes, 2) uint8: dot 8 i + 2 s + j at bit 2 s of byte j
    3 bits       (dots / 16, 3, lanes, 2) uint8: dot 16 i + 2 s + j at bit 3 s of 12, of which 8 are in the first byte;
                 dot 16 i + 8 + 2 s + j likewise in the second; their upper bits in the low and high nibble of the third
    scales       (lanes / 32, dots) uint8, then minima likewise
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from edgellm.formats.levels import IQ4, KIVI2_FAR_STEP, KIVI2_KEYS, KIVI2_KNEE, KIVI2_REACH, KIVI2_VALUES, PackedLevels

GROUP = 32
POSITIONS = 32  # of a block

Codes = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Codes uint8 (..., dim), scales and minima float32 (..., dim / 32); minima are zero where a type has none."""


@dataclass(frozen=True)
class CacheType:
    """A type that keys or values are kept as.

    bits      of a code
    levels    what codes stand for: 2^bits numbers that fit an int8
    fit       float32 (..., 32) to codes, scale and minimum of each group
    """

    name: str
    bits: int
    levels: np.ndarray
    fit: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray | None]]
    has_minimum: bool = False

    def head_nbytes(self, dim: int, *, values: bool = False) -> int:
        """Bytes of a block of one head, of keys or of values."""
        return dim * (4 * self.bits + 2 + 2 * self.has_minimum)

    def quantize(self, x: np.ndarray) -> Codes:
        """Numbers (..., dim), each row by itself."""
        groups = np.ascontiguousarray(x, np.float32).reshape(*x.shape[:-1], x.shape[-1] // GROUP, GROUP)
        with np.errstate(all="ignore"):  # NaN and infinity become scales that are none
            codes, scale, minimum = self.fit(groups)
            lost = np.abs(groups).sum(axis=-1) * np.float32(0)
            half = (scale + lost).astype(np.float16).astype(np.float32)
            minima = np.zeros_like(half) if minimum is None else minimum.astype(np.float16).astype(np.float32)
            return codes.astype(np.uint8).reshape(x.shape), half, minima

    def numbers(self, codes: Codes) -> np.ndarray:
        """What ``quantize`` made, as float32 (..., dim)."""
        levels = self.levels.astype(np.float32)[codes[0]].reshape(*codes[1].shape, GROUP)
        return (levels * codes[1][..., None] + codes[2][..., None]).reshape(codes[0].shape)

    def read(self, data: np.ndarray, dim: int, *, values: bool) -> Codes:
        """Blocks (..., head_nbytes) as codes (..., 32, dim), scales and minima (..., 32, dim / 32)."""
        front, n_codes = data.shape[:-1], dim * 4 * self.bits
        dots, lanes = (POSITIONS, dim) if values else (dim, POSITIONS)
        raw = data[..., : dim * 4 * (8 if self.bits == 8 else 4)]
        if self.bits == 8:
            by_dot = raw.reshape(*front, dots // 2, lanes, 2).swapaxes(-1, -2)
        else:
            pairs = raw.reshape(*front, dots // 4, lanes, 2).swapaxes(-1, -2)  # (..., quad, j, lane)
            by_dot = np.stack([pairs & 15, pairs >> 4], axis=-3)  # (..., quad, half, j, lane)
            if self.bits == 5:
                words = np.ascontiguousarray(data[..., dim * 16 : dim * 20])
                fifth = np.unpackbits(words, axis=-1, bitorder="little")
                fifth = fifth.reshape(*front, dots // 4, lanes // 16, 2, 16, 2)  # quad, lanes, half, lane, j
                fifth = np.moveaxis(fifth, (-3, -1), (-4, -3))  # quad, half, j, lanes, lane
                by_dot = by_dot | (fifth.reshape(by_dot.shape) << 4)
        codes = by_dot.reshape(*front, dots, lanes)
        halves = np.ascontiguousarray(data[..., n_codes:]).view(np.float16).astype(np.float32)
        halves = halves.reshape(*front, 1 + self.has_minimum, dim // GROUP, POSITIONS).swapaxes(-1, -2)
        scales = halves[..., 0, :, :]
        minima = halves[..., 1, :, :] if self.has_minimum else np.zeros_like(scales)
        return (codes if values else codes.swapaxes(-1, -2)), scales, minima

    def write(self, codes: Codes, *, values: bool) -> np.ndarray:
        """What ``read`` gave, as blocks again."""
        by_dot = codes[0] if values else codes[0].swapaxes(-1, -2)
        front, dots, lanes = by_dot.shape[:-2], by_dot.shape[-2], by_dot.shape[-1]
        parts: list[np.ndarray] = []
        if self.bits == 8:
            parts.append(by_dot.reshape(*front, dots // 2, 2, lanes).swapaxes(-1, -2))
        else:
            quads = by_dot.reshape(*front, dots // 4, 2, 2, lanes)
            nibbles = (quads[..., 0, :, :] & 15) | ((quads[..., 1, :, :] & 15) << 4)
            parts.append(nibbles.swapaxes(-1, -2))
            if self.bits == 5:
                fifth = (quads >> 4).reshape(*front, dots // 4, 2, 2, lanes // 16, 16)
                fifth = np.moveaxis(fifth, (-4, -3), (-3, -1))
                parts.append(np.packbits(np.ascontiguousarray(fifth).reshape(*front, -1), axis=-1, bitorder="little"))
        for numbers in codes[1 : 2 + self.has_minimum]:
            halves = np.ascontiguousarray(numbers.swapaxes(-1, -2).astype(np.float16))
            parts.append(halves.reshape(*front, -1).view(np.uint8))
        return np.concatenate([np.ascontiguousarray(part).reshape(*front, -1) for part in parts], axis=-1)


# ---- how a group is quantized: ggml's plain quantizers ---------------------------------------------------------------


def _reciprocal(d: np.ndarray) -> np.ndarray:
    return np.where(d != 0, np.float32(1) / d, np.float32(0))[..., None]


def _largest(x: np.ndarray) -> np.ndarray:
    """The first number of each group with the largest magnitude."""
    return np.take_along_axis(x, np.abs(x).argmax(axis=-1)[..., None], axis=-1)[..., 0]


def _fit_bytes(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, None]:
    d = np.abs(x).max(axis=-1) / np.float32(127)
    scaled = x * _reciprocal(d)
    whole = np.trunc(scaled)
    whole += np.where(np.abs(scaled - whole) >= 0.5, np.sign(scaled), 0)  # halves away from zero
    return whole.astype(np.int8).view(np.uint8), d, None


def _fit_signed(bits: int) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray, None]]:
    half = 1 << (bits - 1)

    def fit(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, None]:
        d = _largest(x) / np.float32(-half)
        codes = np.trunc(x * _reciprocal(d) + (np.float32(half) + np.float32(0.5)))
        return np.minimum(codes, 2 * half - 1), d, None

    return fit


def _fit_affine(bits: int) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray]]:
    highest = (1 << bits) - 1

    def fit(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        low = x.min(axis=-1)
        d = (x.max(axis=-1) - low) / np.float32(highest)
        codes = np.trunc((x - low[..., None]) * _reciprocal(d) + np.float32(0.5))
        return np.minimum(codes, highest), d, low

    return fit


IQ4_MIDDLES = np.array([(a + b) / 2 for a, b in itertools.pairwise(IQ4)], np.float32)


def _fit_nonlinear(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, None]:
    """The level nearest to each number where the largest has the lowest; then the scale with the least error, weighed
    by squares."""
    largest = _largest(x)
    factor = _reciprocal(largest / np.float32(IQ4[0]))
    codes = np.searchsorted(IQ4_MIDDLES, x * factor, side="right")
    levels = np.array(IQ4, np.float32)[codes]
    sum_qx, sum_q2 = np.zeros_like(largest), np.zeros_like(largest)
    for i in range(GROUP):
        value, level = x[..., i], levels[..., i]
        weighed = value * value * level
        sum_qx, sum_q2 = sum_qx + weighed * value, sum_q2 + weighed * level
    return codes, np.where(sum_q2 > 0, sum_qx / sum_q2, np.float32(0)), None


def _whole(bits: int, centre: int) -> np.ndarray:
    return np.arange(1 << bits) - centre


QUANTIZED: dict[str, CacheType] = {
    kind.name: kind
    for kind in (
        CacheType("q8_0", 8, np.arange(256, dtype=np.uint8).view(np.int8), _fit_bytes),
        CacheType("q4_0", 4, _whole(4, 8), _fit_signed(4)),
        CacheType("q4_1", 4, _whole(4, 0), _fit_affine(4), has_minimum=True),
        CacheType("q5_0", 5, _whole(5, 16), _fit_signed(5)),
        CacheType("q5_1", 5, _whole(5, 0), _fit_affine(5), has_minimum=True),
        CacheType("iq4_nl", 4, np.array(IQ4), _fit_nonlinear),
    )
}


# ---- blocks of 2 and 3 bits ------------------------------------------------------------------------------------------


def _scale_bytes(d: np.ndarray) -> np.ndarray:
    """The nearest scales that a byte can be; of what is not zero none is."""
    bits = (d.astype(np.float16).view(np.uint16).astype(np.int32) + 64) >> 7
    return np.where(d > 0, np.maximum(bits, 1), bits).astype(np.uint8)


def _scales_of(scales: np.ndarray) -> np.ndarray:
    return (scales.astype(np.uint16) << 7).view(np.float16).astype(np.float32)


def _minima_of(minima: np.ndarray, d: np.ndarray, per_scale: int) -> np.ndarray:
    steps = minima.astype(np.float32) - np.float32(128)
    behind = steps - np.clip(steps, -KIVI2_KNEE, KIVI2_KNEE)
    return (steps + behind * np.float32(KIVI2_FAR_STEP - 1)) * (d * np.float32(1 / per_scale))


def _minimum_bytes(steps: np.ndarray) -> np.ndarray:
    """The nearest that minima of so many small steps can be."""
    near = np.clip(steps, -KIVI2_KNEE, KIVI2_KNEE)
    counted = near + (steps - near) * np.float32(1 / KIVI2_FAR_STEP)
    return np.trunc(np.clip(counted + np.float32(128.5), 0, 255))


def _fit_within(x: np.ndarray, levels: PackedLevels) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes of groups (..., 32) in the better of ``levels.within``, scales and minima, uint8.

    Errors are summed in order, as the kernels do.
    """
    low, high, highest = x.min(axis=-1), x.max(axis=-1), levels.highest
    middle, found = (low + high) * np.float32(0.5), list[tuple[np.ndarray, ...]]()
    far = np.abs(middle) * np.float32(levels.per_scale / KIVI2_REACH)
    for part, centre in np.array(levels.within, np.float32):
        wide = (high - low) * (part / np.float32(highest))
        scales, centres = _scale_bytes(np.maximum(wide, far)), np.where(far > wide, centre, np.float32(highest / 2))
        d = _scales_of(scales)
        by = _reciprocal(d)
        minima = _minimum_bytes((middle * by[..., 0] - centres) * np.float32(levels.per_scale))
        least = _minima_of(minima, d, levels.per_scale)
        codes = np.clip(np.trunc((x - least[..., None]) * by + np.float32(0.5)), 0, highest)
        error = np.zeros_like(low)
        for i in range(x.shape[-1]):
            apart = x[..., i] - (codes[..., i] * d + least)
            error = error + apart * apart
        found.append((error, codes, scales, minima))
    (error, *whole), (less, *narrow) = found
    better = less < error
    codes, scales, minima = (
        np.where(better[..., None] if one.ndim > better.ndim else better, other, one).astype(np.uint8)
        for one, other in zip(whole, narrow, strict=True)
    )
    return codes, scales, minima


@dataclass(frozen=True)
class PackedType:
    """A type of blocks of 32 positions.

    layout   its version: files of another one are not read
    """

    name: str
    keys: PackedLevels
    values: PackedLevels
    layout: int

    def levels(self, *, values: bool) -> PackedLevels:
        """Those of keys, or of values."""
        return self.values if values else self.keys

    def head_nbytes(self, dim: int, *, values: bool) -> int:
        """Bytes of a block of one head."""
        return dim * self.levels(values=values).nbytes

    def pack(self, x: np.ndarray, *, values: bool) -> np.ndarray:
        """Blocks of keys (..., dim, 32), of values (..., 32, dim), as bytes (..., head_nbytes)."""
        front, (dots, lanes), levels = x.shape[:-2], x.shape[-2:], self.levels(values=values)
        groups = np.ascontiguousarray(x, np.float32).reshape(*front, dots, lanes // GROUP, GROUP)
        with np.errstate(all="ignore"):
            codes, scales, minima = _fit_within(groups, levels)
            scales[~np.isfinite(groups).all(axis=-1)] = 255  # what is not finite has to stay visible
        fours = codes.astype(np.uint16).reshape(*front, dots // 8, 4, 2, lanes)
        words = (fours << (np.arange(4, dtype=np.uint16) * levels.bits)[:, None, None]).sum(axis=-3, dtype=np.uint16)
        words = words.swapaxes(-1, -2)  # (..., dots / 8, lanes, 2)
        if levels.bits == 3:
            first, second = words[..., ::2, :, :], words[..., 1::2, :, :]
            words = np.stack([first & 255, second & 255, first >> 8 | second >> 8 << 4], axis=-3)
        parts = (words.astype(np.uint8), scales.swapaxes(-1, -2), minima.swapaxes(-1, -2))
        return np.concatenate([part.reshape(*front, -1) for part in parts], axis=-1)

    def unpack(self, data: np.ndarray, dim: int, *, values: bool) -> np.ndarray:
        """What ``pack`` made, as float32 in the shape of what it was given."""
        front, (dots, lanes) = data.shape[:-1], (POSITIONS, dim) if values else (dim, POSITIONS)
        levels = self.levels(values=values)
        bits, n_codes = levels.bits, dim * levels.codes_nbytes
        words = data[..., :n_codes].astype(np.uint16)
        if bits == 3:
            words = words.reshape(*front, dots // 16, 3, lanes, 2)
            first, second, upper = words[..., 0, :, :], words[..., 1, :, :], words[..., 2, :, :]
            words = np.stack([first | (upper & 15) << 8, second | upper >> 4 << 8], axis=-3)
        words = words.reshape(*front, dots // 8, 1, lanes, 2).swapaxes(-1, -2)
        codes = words >> (np.arange(4, dtype=np.uint16) * bits)[:, None, None] & levels.highest
        codes = codes.reshape(*front, dots, lanes // GROUP, GROUP)
        bytes_of = data[..., n_codes:].reshape(*front, 2, lanes // GROUP, dots).swapaxes(-1, -2)
        d = _scales_of(bytes_of[..., 0, :, :])
        least = _minima_of(bytes_of[..., 1, :, :], d, levels.per_scale)
        return (codes.astype(np.float32) * d[..., None] + least[..., None]).reshape(*front, dots, lanes)


PACKED: dict[str, PackedType] = {kind.name: kind for kind in (PackedType("kivi2", KIVI2_KEYS, KIVI2_VALUES, layout=3),)}
FLOATS: dict[str, np.dtype] = {"f16": np.dtype(np.float16), "f32": np.dtype(np.float32), "bf16": np.dtype(np.uint16)}
"""numpy has no bfloat16: its bits."""

TOKEN_TYPES = (*FLOATS, *QUANTIZED)
"""Those in which a token is kept by itself."""

DEFAULT = "f16"


def stored(x: np.ndarray, name: str) -> np.ndarray:
    """float32 as a float type keeps it."""
    if name != "bf16":
        return x.astype(FLOATS[name])
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # to nearest even
    return np.where(np.isnan(x), (bits >> 16) | 0x40, rounded).astype(np.uint16)


def numbers_of(array: np.ndarray, name: str) -> np.ndarray:
    """What ``stored`` gave, as float32; of "f16" whatever float an executor keeps."""
    return (array.astype(np.uint32) << 16).view(np.float32) if name == "bf16" else array.astype(np.float32)
