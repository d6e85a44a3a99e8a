"""Whether machines have the same file of a model: by its name or path each opens its own, which may be another version.

An answer that goes on elsewhere, or that several machines make together, is right only where the weights are the same.
"""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgellm.engine.cache_file import weights_hash
from edgellm.formats.errors import FormatError
from edgellm.formats.gguf import GGUFFile
from edgellm.loading import open_program


def file_hash(gguf: GGUFFile) -> str:
    """Of weights and metadata. The first time for a file it reads all of it; that of the weights is remembered."""
    total = hashlib.sha256(weights_hash(gguf).encode())
    for name in sorted(gguf.metadata):
        value = gguf.metadata[name]
        total.update(f"{name}={value.tolist() if isinstance(value, np.ndarray) else value!r}\n".encode())
    return total.hexdigest()


def hash_of(path: Path, overrides: Mapping[str, Any] | None = None) -> str:
    """``file_hash`` of the file at a path."""
    with open_program(path, overrides) as (gguf, _):
        found = file_hash(gguf)
    gguf.close()
    return found


def check_same(path: Path, found: str, expected: str, whose: str) -> None:
    """FormatError where the file of this machine is another than that of ``whose``."""
    if found != expected:
        raise FormatError(
            f"{path} on {socket.gethostname()} is another file than that of {whose}: its weights or its metadata are "
            "not the same. Give every machine the same file.",
            code="RAY",
        )
