"""Write tiny GGUF files for tests, through the judge's own writer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

Tensor = np.ndarray | tuple[np.ndarray, str]


def write_gguf(path: str | Path, metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    """Write a GGUF v3 file and give its path.

    metadata  Python values: int becomes UINT32 (INT64 where it does not fit), float FLOAT32, numpy scalars and numeric
              arrays keep their type, a list of str becomes an array of strings. Needs "general.architecture".
    tensors   name -> array (float32, float16, ...), or (uint8 (..., row_nbytes), type name such as "Q4_K").
              Shapes are in numpy order, outermost dimension first.
    """
    gguf = pytest.importorskip("gguf", reason="gguf writes the test files")
    kinds = gguf.GGUFValueType
    writer = gguf.GGUFWriter(path, str(metadata["general.architecture"]))
    for key, value in metadata.items():
        if key == "general.architecture":
            continue
        if isinstance(value, np.ndarray):
            writer.add_key_value(key, value.tolist(), kinds.ARRAY, sub_type=_kind(kinds, value.dtype))
        elif isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, np.generic):
            writer.add_key_value(key, value.item(), _kind(kinds, value.dtype))
        elif isinstance(value, int) and not isinstance(value, bool):
            writer.add_key_value(key, value, kinds.UINT32 if 0 <= value < 1 << 32 else kinds.INT64)
        else:
            writer.add_key_value(key, value, kinds.get_type(value))
    for name, tensor in tensors.items():
        if isinstance(tensor, tuple):
            writer.add_tensor(name, tensor[0], raw_dtype=gguf.GGMLQuantizationType[tensor[1]])
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(path)


def _kind(kinds: Any, dtype: np.dtype) -> Any:
    names = {"f": "FLOAT", "i": "INT", "u": "UINT"}
    return kinds.BOOL if dtype.kind == "b" else kinds[f"{names[dtype.kind]}{8 * dtype.itemsize}"]
