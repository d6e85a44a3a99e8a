"""Whether machines have the same files of a model: each opens its own by name or path, which may be another version.

An answer that goes on elsewhere, or that several machines make together, is right only where the weights are the same.
What drafts and what adapts a model are files too.
"""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from edgellm import loading
from edgellm.engine.cache_file import weights_hash
from edgellm.formats.errors import FormatError
from edgellm.formats.gguf import GGUFFile


class Made(NamedTuple):
    """What a front and its replicas were made of.

    version   of the application: while an update goes on, there are two of them
    files     the hash of a model's
    """

    version: str
    files: str

    def answers(self, front: Made, begun: bool) -> bool:
        """Whether a replica may answer a front: an answer that is begun has the files of its beginning to its end."""
        return self.files == front.files or (self.version != front.version and not begun)


def file_hash(gguf: GGUFFile) -> str:
    """Of weights and metadata. The first time for a file it reads all of it; that of the weights is remembered."""
    total = hashlib.sha256(weights_hash(gguf).encode())
    for name in sorted(gguf.metadata):
        value = gguf.metadata[name]
        total.update(f"{name}={value.tolist() if isinstance(value, np.ndarray) else value!r}\n".encode())
    return total.hexdigest()


def files_hash(gguf: GGUFFile, options: loading.LoadOptions) -> str:
    """Of a model's file, of that of its draft model, and of those of its adapters."""
    total = hashlib.sha256(file_hash(gguf).encode())
    for use, path in _beside(options):
        with GGUFFile.open(path) as one:
            total.update(f"{use} {file_hash(one)}\n".encode())
    return total.hexdigest()


def _beside(options: loading.LoadOptions) -> Iterator[tuple[str, Path]]:
    if options.draft is not None:
        yield "draft", loading.fetched(options.draft, lambda *_: None)
    yield from (("lora", choice.path) for choice in options.lora)
    yield from (("control vector", choice.path) for choice in options.control_vectors)


def proved(path: Path, options: loading.LoadOptions) -> str:
    """``files_hash`` of a model at a path, once its draft model and its adapters have been found to go with it.

    It is asked of a machine that runs no model, and may have no GPU.
    """
    with loading.open_program(path, options.kv_overrides) as (gguf, program):
        loading.planned(program, gguf, on_cpu(options)).close()
        found = files_hash(gguf, options)
    gguf.close()
    return found


def on_cpu(options: loading.LoadOptions) -> loading.LoadOptions:
    """The same for a machine without a GPU."""
    return replace(options, executor="cpu", gpu_layers="auto", cpu_moe=False)


def check_same(path: Path, found: str, expected: str, whose: str) -> None:
    """FormatError where the file of this machine is another than that of ``whose``."""
    if found != expected:
        raise FormatError(
            f"{path} on {socket.gethostname()} is another file than that of {whose}: its weights or its metadata are "
            "not the same, or those of what drafts for it or adapts it. Give every machine the same files.",
            code="RAY",
        )
