"""The keys and values of a sequence in a file, so that another program goes on without reading the prompt again.

    0     8 bytes   b"EDGEKV" and the version as two digits
    8     8 bytes   length of the header, little-endian
    16    header    JSON: "model" (the key below), "n_tokens", "first": of each group its first block, and "layout"
    ..    tokens    int32, little-endian
    ..    blocks    group by group its blocks from the first up to the last token (number 0 of the newest before), or
                    its one state there; in a file of one block none where "first" is 2. A block is the arrays of its
                    layers as ``edgellm.kernels.kv`` lays them, one after the other
    end   32 bytes  SHA-256 of everything before

A file is written under another name first, and believed only when length, checksum, model and shapes are right. The
key of a model is a SHA-256 over its weights, the metadata that the program is made from, and the cache's type, so that
what one device has read another goes on with.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgellm.engine.cache import KVCache, n_blocks_of
from edgellm.formats.errors import FormatError
from edgellm.formats.gguf import GGUFFile
from edgellm.formats.json_text import parse_json
from edgellm.formats.regular_file import open_regular, read_regular
from edgellm.kernels.cache_types import PACKED
from edgellm.kernels.kv import BLOCK_TOKENS, CacheGroup, CachePool, KVLayer
from edgellm.kernels.program import Executor
from edgellm.machine.atomic import whole_file
from edgellm.machine.paths import cache_dir

MAGIC = b"EDGEKV04"
ABSENT = 2  # "first" of a group of which a file of one block has nothing
MAX_HEADER_NBYTES = 1 << 20
CHUNK_NBYTES = 1 << 20
N_HASHES = 100  # of model files that are remembered
MAX_NOTES_NBYTES = 1 << 20


@dataclass(frozen=True)
class SavedState:
    """A file that was proved whole: its tokens, and for each group its first block and the bytes of what it holds."""

    path: Path
    tokens: list[int]
    first: list[int]
    blocks: list[list[memoryview]]
    layout: dict[str, Any]


# ---- writing ---------------------------------------------------------------------------------------------------------


def save(path: Path, cache: KVCache, tokens: Sequence[int], key: str, variant: str = "") -> int:
    """Write the longest beginning of ``tokens`` that the cache holds; its length. 0 writes nothing."""
    sequence = cache.open([*tokens, 0], variant=variant)
    try:
        if not sequence.length:
            return 0
        held = cache.blocks(sequence)
        blocks = (cache.pool.read_block(group, block) for group, blocks in enumerate(held) for block in blocks)
        write(path, key, sequence.tokens, sequence.first, layout_of(cache.pool), blocks)
        return sequence.length
    finally:
        cache.release(sequence)


def write(
    path: Path,
    key: str,
    tokens: Sequence[int],
    first: Sequence[int],
    layout: Mapping[str, Any],
    blocks: Iterable[bytes],
) -> None:
    """Write a file of these blocks, group by group; of each group those from ``first`` on. OSError."""
    header = {"model": key, "n_tokens": len(tokens), "first": list(first), "layout": layout}
    text = json.dumps(header).encode()
    head = MAGIC + len(text).to_bytes(8, "little") + text + np.asarray(tokens, "<i4").tobytes()
    with whole_file(path, private=True, sync=False) as file:
        checksum = hashlib.sha256()
        for piece in itertools.chain([head], blocks):
            checksum.update(piece)
            file.write(piece)
        file.write(checksum.digest())


def layout_of(pool: CachePool) -> dict[str, Any]:
    """The shapes that a file and a pool must share."""
    groups = [
        [group.kind, group.window, [[array.dtype.name, *array.shape[1:]] for array in pool.of_group(g)]]
        for g, group in enumerate(pool.groups)
    ]
    return {"block_tokens": BLOCK_TOKENS, "groups": groups}


# ---- reading ---------------------------------------------------------------------------------------------------------


def read(path: Path, key: str) -> SavedState:
    """The state in a file, proved before it is given. FormatError KV_FILE when it is damaged or another model's."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size < len(MAGIC) + 8 + 32:
            raise _wrong(path, f"it has {size} bytes")
        # not mapped: another program may cut it short after it was proved
        return _proved(path, memoryview(file.read()), key)


def restore(cache: KVCache, state: SavedState, variant: str = "") -> list[int]:
    """Put a state into the cache; the tokens that are known then. FormatError when the cache has other shapes."""
    if state.layout != layout_of(cache.pool):
        raise _wrong(state.path, "its layers have other shapes")
    if not all(state.blocks):
        raise _wrong(state.path, "it is a part of one")
    if len(state.tokens) > cache.n_ctx:
        raise _wrong(state.path, f"it has {len(state.tokens)} tokens, the context {cache.n_ctx}")

    end = n_blocks_of(len(state.tokens))
    numbers = [group.held(first, end) for group, first in zip(cache.pool.groups, state.first, strict=True)]

    def fill(group: int, block: int, target: int) -> None:
        cache.pool.write_block(group, target, state.blocks[group][numbers[group].index(block)])

    return state.tokens[: cache.put_back(state.tokens, state.first, fill, variant)]


def _proved(path: Path, data: memoryview, key: str) -> SavedState:
    if bytes(data[:8]) != MAGIC:
        raise _wrong(path, "it is no such file, or of another version")
    length = int.from_bytes(data[8:16], "little")
    if not 2 <= length <= min(MAX_HEADER_NBYTES, len(data) - 48):
        raise _wrong(path, f"its header has {length} bytes")
    if hashlib.sha256(data[:-32]).digest() != bytes(data[-32:]):
        raise _wrong(path, "its checksum is wrong")
    try:
        header = parse_json(bytes(data[16 : 16 + length]), path.name, "KV_FILE")
        if header["model"] != key:
            raise _wrong(path, "it is of another model, or its keys and values are of other types or in an older form")
        return _state(path, header, data[16 + length : -32])
    except FormatError:
        raise
    except (ValueError, KeyError, TypeError, IndexError, OverflowError) as error:
        raise _wrong(path, f"its header is wrong ({error})") from None


def _state(path: Path, header: dict[str, Any], data: memoryview) -> SavedState:
    """Cut the file up; every length must be as the header says."""
    n_tokens, first, layout = header["n_tokens"], header["first"], header["layout"]
    groups = layout["groups"]
    if not all(isinstance(n, int) and n >= 0 for n in (n_tokens, *first)) or len(first) != len(groups):
        raise ValueError("a count is no whole number")
    if not n_tokens or layout["block_tokens"] != BLOCK_TOKENS:
        raise ValueError("its counts disagree")
    tokens, at, blocks = np.frombuffer(data[: 4 * n_tokens], "<i4").tolist(), 4 * n_tokens, list[list[memoryview]]()
    for start, (kind, window, shapes) in zip(first, groups, strict=True):
        end = 1 if kind == "state" else n_blocks_of(n_tokens)
        nbytes = sum(math.prod(shape) * np.dtype(dtype).itemsize for dtype, *shape in shapes)
        n = len(CacheGroup(kind, window).held(start, end))
        if start > end + 1 or nbytes <= 0 or nbytes * n > len(data) - at:
            raise ValueError("it is too short")
        blocks.append([data[at + i * nbytes : at + (i + 1) * nbytes] for i in range(n)])
        at += nbytes * n
    if at != len(data):
        raise ValueError("it is too long")
    return SavedState(path, tokens, first, blocks, layout)


def _wrong(path: Path, what: str) -> FormatError:
    return FormatError(
        f"{path.name}: {what}. Expected keys and values that this model has saved; they are computed again.",
        code="KV_FILE",
    )


# ---- the key of a model ----------------------------------------------------------------------------------------------


def model_key(gguf: GGUFFile, executor: Executor, variant: str = "") -> str:
    """What must be the same for keys and values to be of use: weights, hyperparameters, the type of the cache, the form
    of the files.

    ``variant`` is that of ``KVCache.open``: what else makes the numbers.
    """
    key = hashlib.sha256(MAGIC + f"{executor.kv_dtype}\n{variant}\n{weights_hash(gguf)}\n".encode())
    for i, layer in enumerate(executor.program.cache_layers):
        if isinstance(layer, KVLayer) and layer.is_typed:
            form = f" {PACKED[layer.type_k].layout}" if layer.type_k in PACKED else ""
            key.update(f"{i} {layer.type_k} {layer.type_v}{form}\n".encode())
        if isinstance(layer, KVLayer) and layer.n_chosen:
            key.update(f"{i} reads {layer.n_chosen} blocks\n".encode())
    if any(rope.beyond is not None for rope in executor.program.ropes.values()):
        key.update(b"short context\n")
    for name in sorted(gguf.metadata):
        if not name.startswith(("tokenizer.", "general.")) or name == "general.architecture":
            value = gguf.metadata[name]
            key.update(f"{name}={value.tolist() if isinstance(value, np.ndarray) else value!r}\n".encode())
    return key.hexdigest()


def weights_hash(gguf: GGUFFile) -> str:
    """SHA-256 over all tensors, remembered for a file that has not changed since: a large one takes seconds."""
    parts = [(path.absolute(), path.stat()) for path in gguf.paths]
    name = "|".join(f"{path}:{status.st_size}:{status.st_mtime_ns}" for path, status in parts)
    notes = cache_dir() / "weights-sha256.json"
    known: dict[str, str] = {}
    with contextlib.suppress(OSError, FormatError, AttributeError):
        noted = parse_json(read_regular(notes, MAX_NOTES_NBYTES, "KV_FILE"), notes.name, "KV_FILE")
        known = {str(k): str(v) for k, v in noted.items()}
    if name in known:
        return known[name]
    total = hashlib.sha256()
    for tensor_name, tensor in gguf.tensors.items():
        total.update(f"{tensor_name} {tensor.quant.name} {tensor.shape}\n".encode())
        data = np.ascontiguousarray(tensor.data).reshape(-1).view(np.uint8)
        for start in range(0, len(data), CHUNK_NBYTES):
            total.update(data[start : start + CHUNK_NBYTES].data)
    known[name] = total.hexdigest()
    with contextlib.suppress(OSError):
        notes.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(notes, sync=False) as file:
            file.write(json.dumps(dict(list(known.items())[-N_HASHES:])).encode())
    return known[name]
