"""llama.cpp's own quantizer as a judge: the shared library inside the xllamacpp wheel, called through ctypes."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import numpy as np
import pytest

from edgellm.formats.quant_types import QUANT_TYPES


@functools.cache
def library() -> ctypes.CDLL:
    """The loaded library; skips the test where there is none."""
    package = pytest.importorskip("xllamacpp", reason="llama.cpp's quantizer comes with the xllamacpp wheel")
    found = sorted(Path(package.__file__).parent.glob("xllamacpp*.so"))
    if not found:
        pytest.skip("this xllamacpp wheel has no shared library to call")
    loaded = ctypes.CDLL(str(found[0]))
    if not hasattr(loaded, "ggml_quantize_chunk"):
        pytest.skip("this xllamacpp wheel hides ggml_quantize_chunk")
    loaded.ggml_quantize_chunk.restype = ctypes.c_size_t
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    loaded.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, count, count, count, pointer]
    return loaded


def quantize(quant: str, rows: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
    """uint8 (n, row_nbytes) of float32 rows (n, n_in), by ggml_quantize_chunk."""
    n, n_in = rows.shape
    rows = np.ascontiguousarray(rows, np.float32)
    out = np.zeros((n, QUANT_TYPES[quant].row_nbytes(n_in)), np.uint8)
    weights = None if importance is None else importance.ctypes.data
    library().ggml_quantize_chunk(QUANT_TYPES[quant].id, rows.ctypes.data, out.ctypes.data, 0, n, n_in, weights)
    return out


class _Traits(ctypes.Structure):
    """The head of ggml_type_traits."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("block_size", ctypes.c_int64),
        ("interleave", ctypes.c_int64),
        ("block_nbytes", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
    )


def traits(type_id: int) -> _Traits:
    """What ggml knows of a type: its name, its sizes, and how to make float32 of it."""
    function = library().ggml_get_type_traits
    function.restype = ctypes.POINTER(_Traits)
    found: _Traits = function(type_id).contents
    return found


def dequantize(quant: str, data: np.ndarray) -> np.ndarray:
    """float32 (n, n_in) of uint8 rows (n, row_nbytes), by ggml."""
    known = traits(QUANT_TYPES[quant].id)
    data = np.ascontiguousarray(data)
    out = np.zeros((len(data), data.shape[1] // known.block_nbytes * known.block_size), np.float32)
    known.to_float(data.ctypes.data, out.ctypes.data, out.size)
    return out


def file_type_name(number: int) -> str:
    """How llama.cpp calls this ``general.file_type``."""
    function = library().llama_ftype_name
    function.restype = ctypes.c_char_p
    name: bytes = function(number)
    return name.decode()
