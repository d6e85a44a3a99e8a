"""The number types of checkpoints, by their safetensors names, as float32; and float32 as the plain types of GGUF.

numpy has no bfloat16 and no 8-bit floats: the first is the upper half of a float32, the second a table of 256 numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgellm.formats.errors import FormatError, UnsupportedError

FLOATS = ("F32", "F16", "BF16")
"""What weights have that were never rounded to a few bits, in checkpoints and in GGUF files."""


@dataclass(frozen=True)
class NumberType:
    """One dtype. ``storage`` is what numpy reads its bytes as; ``n_bits`` of an element, 4 and 6 are packed."""

    name: str
    n_bits: int
    storage: np.dtype | None


_STORED = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_STORED |= dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E8M0"), "u1")
_STORED |= {"I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1"}
_STORED |= {"U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "u1"}
NUMBER_TYPES: dict[str, NumberType] = {
    **{name: NumberType(name, 8 * np.dtype(form).itemsize, np.dtype(form)) for name, form in _STORED.items()},
    **{name: NumberType(name, n, None) for name, n in (("F6_E2M3", 6), ("F6_E3M2", 6), ("F4", 4), ("C64", 64))},
}


def float8_table(n_exponent: int, n_mantissa: int, bias: int, *, nuz: bool = False) -> np.ndarray:
    """All 256 numbers of an 8-bit float: 1 sign, exponent and mantissa bits; special values are set by the caller.

    ``nuz``: no negative zero, whose pattern is the only NaN.
    """
    code = np.arange(256)
    exponent = code >> n_mantissa & (1 << n_exponent) - 1
    mantissa = (code & (1 << n_mantissa) - 1) / (1 << n_mantissa)
    value = np.where(exponent == 0, mantissa * 2.0 ** (1 - bias), (1 + mantissa) * 2.0 ** (exponent - bias))
    table = np.where(code & 0x80, -value, value).astype(np.float32)
    if nuz:
        table[0x80] = np.nan
    return table


def _tables() -> dict[str, np.ndarray]:
    e4m3 = float8_table(4, 3, 7)
    e4m3[[0x7F, 0xFF]] = np.nan
    e5m2 = float8_table(5, 2, 15)
    e5m2[[0x7C, 0xFC]] = np.inf, -np.inf
    e5m2[[0x7D, 0x7E, 0x7F, 0xFD, 0xFE, 0xFF]] = np.nan
    e8m0 = np.append(np.ldexp(1.0, np.arange(255) - 127), np.nan).astype(np.float32)
    return {
        "F8_E4M3": e4m3,
        "F8_E5M2": e5m2,
        "F8_E4M3FNUZ": float8_table(4, 3, 8, nuz=True),
        "F8_E5M2FNUZ": float8_table(5, 2, 16, nuz=True),
        "F8_E8M0": e8m0,
    }


FLOAT8: dict[str, np.ndarray] = _tables()
"""(256,) float32 of every 8-bit float."""

FP4_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
"""(16,) float32: the 4-bit floats of the OCP microscaling formats."""


def to_float32(values: np.ndarray, kind: NumberType) -> np.ndarray:
    """float32 of an array of ``kind.storage``. UnsupportedError for types that are packed or complex."""
    if kind.name == "BF16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    if kind.name in FLOAT8:
        return FLOAT8[kind.name][values]
    if kind.storage is None:
        raise UnsupportedError(
            f"Numbers of the type {kind.name} have no meaning alone; a scheme that packs them was expected. "
            "Take the unquantized checkpoint.",
            code="CHECKPOINT_DTYPE",
        )
    with np.errstate(over="ignore"):
        return values.astype(np.float32)


def encode_plain(rows: np.ndarray, quant_name: str) -> np.ndarray:
    """float32 (n, n_in) as the bytes (n, row_nbytes) of F32, F16 or BF16, rounded to the nearest even.

    FormatError ``TENSOR_RANGE`` for a number that F16 cannot hold.
    """
    rows = np.ascontiguousarray(rows, np.float32)
    if quant_name == "F16":
        with np.errstate(over="ignore"):
            out = rows.astype("<f2")
        if np.isinf(out).any() and not np.isinf(rows).any():
            raise FormatError(
                f"A weight is {float(np.abs(rows).max()):g}, and F16 holds numbers up to 65504. Choose BF16 or F32.",
                code="TENSOR_RANGE",
            )
    elif quant_name == "BF16":
        bits = rows.view(np.uint32)
        rounded = bits + (0x7FFF + (bits >> 16 & 1)) >> 16
        out = np.where(np.isnan(rows), bits >> 16 | 0x40, rounded).astype("<u2")
    else:
        assert quant_name == "F32", quant_name
        out = rows.astype("<f4", copy=False)
    return out.view(np.uint8).reshape(len(rows), -1)
