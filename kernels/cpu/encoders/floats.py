"""Encoders of F16 and BF16: each number rounded to nearest, halves to even."""

from __future__ import annotations

from typing import Any

from edgellm.kernels.cpu.encoders import common as at
from edgellm.kernels.cpu.encoders import lanes
from edgellm.kernels.cpu.lib import simd as v

_lower_half, _by_16, _one, _quiet = lanes.integer(0x7FFF), lanes.integer(16), lanes.integer(1), lanes.integer(0x40)


@v.forceinline
def _bfloat_bits(value):
    """The upper halves of eight float32, rounded; a NaN stays one."""
    bits = lanes.bits_of(value)
    rounded = (bits + _lower_half() + ((bits >> _by_16()) & _one())) >> _by_16()
    return lanes.where(lanes.differs(value, value), (bits >> _by_16()) | _quiet(), rounded)


def make_float_encoder(name: str) -> Any:
    """The kernel of F16 or BF16."""
    bits = lanes.half_bits if name == "F16" else _bfloat_bits

    def encode(op, step, thread, n_threads):
        n = v.load_i64(op + at.N_ROWS) * v.load_i64(op + at.N_IN)
        x, out = v.load_i64(op + at.X), v.load_i64(op + at.OUT)
        whole = n // 8 * 8
        for i in range(0, whole, 8):
            lanes.store_u16x8(out + i * 2, lanes.i32x8_as_u16x8(bits(v.load_f32x8(x + i * 4))))
        for i in range(whole, n):
            v.store_u16(out + i * 2, v.first_lane(lanes.i32x8_as_u16x8(bits(v.splat_f32x8(v.load_f32(x + i * 4))))))

    return encode
