"""Encoders of F16 and BF16: each number rounded to nearest, halves to even."""

from __future__ import annotations

from typing import Any

from edgellm.kernels.cpu.encoders import common as at
from edgellm.kernels.cpu.encoders.lanes import bits_of, differs, half_bits, i32x8_as_u16x8, integer, store_u16x8, where
from edgellm.kernels.cpu.lib.simd import first_lane, forceinline, load_f32, load_f32x8, load_i64, splat_f32x8, store_u16

_lower_half, _by_16, _one, _quiet = integer(0x7FFF), integer(16), integer(1), integer(0x40)


@forceinline
def _bfloat_bits(v):
    """The upper halves of eight float32, rounded; a NaN stays one."""
    bits = bits_of(v)
    rounded = (bits + _lower_half() + ((bits >> _by_16()) & _one())) >> _by_16()
    return where(differs(v, v), (bits >> _by_16()) | _quiet(), rounded)


def make_float_encoder(name: str) -> Any:
    """The kernel of F16 or BF16."""
    bits = half_bits if name == "F16" else _bfloat_bits

    def encode(op, step, thread, n_threads):
        n = load_i64(op + at.N_ROWS) * load_i64(op + at.N_IN)
        x, out = load_i64(op + at.X), load_i64(op + at.OUT)
        whole = n // 8 * 8
        for i in range(0, whole, 8):
            store_u16x8(out + i * 2, i32x8_as_u16x8(bits(load_f32x8(x + i * 4))))
        for i in range(whole, n):
            store_u16(out + i * 2, first_lane(i32x8_as_u16x8(bits(splat_f32x8(load_f32(x + i * 4))))))

    return encode
