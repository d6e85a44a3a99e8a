"""SentencePiece's table of character replacements, an untrusted binary, proven sound before a library follows it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

MAX_REPLACEMENT_NBYTES = 64  # Unicode's longest is 33, of U+FDFA


def checked_charsmap(blob: bytes, unfit: Callable[[], Exception]) -> bytes:
    """The table, proven to keep a library inside it and to let no character grow without bound; raises ``unfit()``.

    Layout: uint32 n; a double-array trie of n bytes (uint32 units); replacement strings, each ended by a zero. The
    libraries follow offsets unchecked, so each one that a unit can lead to is checked here.
    """
    if not blob:
        return b""
    size = int.from_bytes(blob[:4], "little")
    strings = np.frombuffer(blob, np.uint8)[4 + size :]
    if len(blob) < 8 or size % 4 or not 0 < size < len(blob) - 4 or strings[-1] != 0:
        raise unfit()
    ends = np.flatnonzero(strings == 0)
    if np.diff(ends, prepend=-1).max() > MAX_REPLACEMENT_NBYTES + 1:
        raise unfit()
    units = np.frombuffer(blob, dtype="<u4", count=size // 4, offset=4)
    index = np.arange(units.size, dtype=np.int64)
    inner = units & 0x80000000 == 0  # the others hold a value
    base = index ^ ((units >> 10).astype(np.int64) << ((units & 0x200) >> 6))
    if (base[inner] | 0xFF).max(initial=0) >= units.size:
        raise unfit()
    values = units[base[inner & (units & 0x100 != 0)]] & 0x7FFFFFFF
    if values.size and int(values.max()) >= len(strings):
        raise unfit()
    return blob


def stored_charsmaps(model: bytes) -> list[bytes]:
    """The tables in a serialized sentencepiece model: field 2 of its normalizer, field 3, and denormalizer, field 5.

    RuntimeError for what is no protobuf message.
    """
    normalizers = [value for number, value in _fields(model) if number in (3, 5)]
    return [value for normalizer in normalizers for number, value in _fields(normalizer) if number == 2]


def _fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """The fields of a message with bytes in them (wire type 2), as (number, bytes)."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        kind = tag & 7
        length = {1: 8, 5: 4}.get(kind, 0)
        if kind in (0, 2):
            length, at = _varint(message, at) if kind == 2 else (0, _varint(message, at)[1])
        elif not length:
            raise RuntimeError(f"a field of the wire type {kind}")
        if at + length > len(message):
            raise RuntimeError("a field that is longer than the file")
        if kind == 2:
            yield tag >> 3, message[at : at + length]
        at += length


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """A varint and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(message):
            raise RuntimeError("a number that does not end")
        value |= (message[at] & 0x7F) << shift
        at += 1
        if message[at - 1] < 0x80:
            return value, at
    raise RuntimeError("a number of over ten bytes")
