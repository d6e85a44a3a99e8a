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
