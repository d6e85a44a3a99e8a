"""Blocks of prompts as files of a folder: found by the text they stand for, bounded in bytes, trusted once proved.

A block's name is a hash over the key of the model and all tokens up to the block's end, so it is of use exactly where a
prompt begins with these. A file is one of cache_file.py whose model is the hash of what comes before the block:

    ab/ab12....kv              the keys and values of 32 tokens
    ab/ab12...-07-cd34....kv   the state behind 7 more tokens than the hash ab12... has, with their keys and values; or
                               behind 32, whose keys and values are in a file of their own

Several programs may share the folder: files appear whole, and one that is gone or wrong is as one that never was. The
files that were used longest ago are removed when there is no room. Nothing else in the folder is touched.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import stat
import time
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgellm.engine import cache_file
from edgellm.engine.cache_file import ABSENT, SavedState
from edgellm.formats.errors import EdgeLLMError, FormatError
from edgellm.kernels.kv import BLOCK_TOKENS

NAME = re.compile(r"([0-9a-f]{32})(?:-(\d\d)-([0-9a-f]{32}))?\.kv")
PART = re.compile(r"\.[0-9a-f-]{32,68}\.kv\..*\.part")
PART_S = 3600.0  # so old, the writer of a part is dead
BELOW = "prefixes"  # the one folder in the user's that is ours
ROOM = 0.9  # so full is the folder after old files were removed
LOOKS = 32  # at what others have written, while as much is written as the folder may hold
PAUSE_S = 60.0  # without writing, once the disk is full


def hash_behind(before: str, tokens: Sequence[int]) -> str:
    """The hash of a text, from that of its beginning and the tokens that follow."""
    return hashlib.sha256(before.encode() + np.asarray(tokens, "<i4").tobytes()).hexdigest()


def block_name(text: str) -> str:
    """Of the block that ends the text of this hash."""
    return f"{text[:32]}.kv"


def state_name(before: str, tokens: Sequence[int]) -> str:
    """Of the state behind ``tokens``, at most 32, that follow the text of the hash ``before``."""
    return f"{before[:32]}-{len(tokens):02d}-{hash_behind(before, tokens)[:32]}.kv"


def private_folder(folder: Path) -> None:
    """Make the place for the files below a folder, for this user alone; EdgeLLMError CACHE_DIR when it cannot be."""
    place = folder / BELOW
    try:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = os.lstat(place)
        mine = not hasattr(os, "getuid") or status.st_uid == os.getuid()
        if not stat.S_ISDIR(status.st_mode) or not mine:
            raise PermissionError(0, "it is a link or another user's")
        if os.name == "posix" and status.st_mode & 0o077:
            os.chmod(place, 0o700)
        around = folder.stat().st_mode
        if os.name == "posix" and around & stat.S_IWOTH and not around & stat.S_ISVTX:
            raise PermissionError(0, "everybody may put another folder in its place")
    except OSError as error:
        raise _refused(place, error) from error


def _refused(place: Path, error: OSError) -> EdgeLLMError:
    return EdgeLLMError(
        f"{place}: {error.strerror or error}. The cache needs a folder that this user alone can write.",
        code="CACHE_DIR",
    )


class PrefixFiles:
    """The files of one model in a folder that is this user's alone; EdgeLLMError CACHE_DIR when it cannot be.

    key      of the model: what must be the same for the numbers to be of use
    layout   as ``cache_file.layout_of`` gives it
    limit    bytes of all files of the folder, other models' too
    largest  bytes that one of this model may have beside its header
    One thread writes, another may look.
    """

    def __init__(self, folder: Path, key: str, layout: dict[str, Any], limit: int, largest: int) -> None:
        self.folder, self.key, self.layout, self.limit = folder / BELOW, key, layout, limit
        self._header = 1024 + len(json.dumps(layout))
        self._largest = largest + self._header
        self.unwritable_until = 0.0
        self._sizes: dict[str, int] = {}
        self._ends: dict[str, list[tuple[int, str]]] = {}  # hash before a state -> how far behind it, and what text
        self._written = 0  # bytes since the folder was looked at
        private_folder(folder)
        try:
            self._look()
        except OSError as error:
            raise _refused(self.folder, error) from error

    def has(self, name: str) -> bool:
        """Whether there was such a file when it was last looked for."""
        return name in self._sizes

    def state_behind(self, before: str, tokens: Sequence[int]) -> int:
        """The most of ``tokens`` behind which a state is known, 0 for none."""
        ends = sorted(self._ends.get(before[:32], ()), reverse=True)
        return next((n for n, text in ends if n <= len(tokens) and hash_behind(before, tokens[:n])[:32] == text), 0)

    def states_of(self, before: str) -> list[str]:
        """The names of the states at most 32 tokens behind a text."""
        return [f"{before[:32]}-{n:02d}-{text}.kv" for n, text in self._ends.get(before[:32], ())]

    def read(self, name: str, before: str, tokens: Sequence[int], *, begins: bool = False) -> SavedState | None:
        """The file of these tokens behind the text ``before``; None, with a warning, when it is something else.

        begins   whether there is nothing before them
        """
        try:
            if (size := self._path(name).stat().st_size) > self._largest:
                raise FormatError(f"{name}: it has {size} bytes.", code="KV_FILE")
            found = cache_file.read(self._path(name), before)
            is_this = found.tokens == list(tokens) and found.layout == self.layout
            if is_this and list(found.first) == self._first(name, len(tokens), begins):
                return found
            raise FormatError(f"{name}: it is of another text.", code="KV_FILE")
        except FileNotFoundError:
            self._forget(name)
        except (OSError, FormatError) as error:
            self._forget(name)  # so that it is written anew
            self._warn(f"A file of the prefix cache is left alone: {error}")
        return None

    def _first(self, name: str, n_tokens: int, begins: bool) -> list[int]:
        """For each group 0 where a file of this name has its block, or its state, else ``ABSENT``."""
        is_state = "-" in name
        keys = not is_state or n_tokens < BLOCK_TOKENS  # else they are in a file of their own
        kinds = [kind for kind, *_ in self.layout["groups"]]
        there = {"state": is_state, "newest": keys and (begins or "state" in kinds)}
        return [0 if there.get(kind, keys) else ABSENT for kind in kinds]

    def write(
        self, name: str, before: str, tokens: Sequence[int], first: Sequence[int], blocks: Iterable[bytes]
    ) -> None:
        """Keep a file. A disk that is full, or wrong, is told, and left in peace for a while."""
        blocks = list(blocks)
        if self.has(name) or time.monotonic() < self.unwritable_until:
            return
        path = self._path(name)
        try:
            self._make_room(sum(map(len, blocks)) + self._header)
            path.parent.mkdir(mode=0o700, exist_ok=True)
            cache_file.write(path, before, tokens, first, self.layout, blocks)
            nbytes = path.stat().st_size
        except FileNotFoundError:  # another program has just made room, or somebody has removed all
            with contextlib.suppress(EdgeLLMError):
                private_folder(self.folder.parent)
            return
        except OSError as error:
            self.unwritable_until = time.monotonic() + PAUSE_S
            self._warn(f"Prefixes are not kept for {PAUSE_S:.0f} s: {self.folder}: {error.strerror or error}.")
            return
        self._written += nbytes
        self._remember(name, nbytes)

    def touch(self, names: Iterable[str]) -> None:
        """They were used: the last one last."""
        for name in filter(self.has, names):
            with contextlib.suppress(OSError):
                os.utime(self._path(name))

    def remove(self, names: Iterable[str]) -> None:
        """Their numbers are not to be trusted."""
        for name in filter(self.has, list(names)):
            self._forget(name)
            with contextlib.suppress(OSError):
                self._path(name).unlink()

    def _path(self, name: str) -> Path:
        return self.folder / name[:2] / name

    def _remember(self, name: str, nbytes: int) -> None:
        self._sizes[name] = nbytes
        found = NAME.fullmatch(name)
        assert found is not None, "a name of our own making"
        before, n, text = found.groups()
        if n is not None and (int(n), text) not in self._ends.setdefault(before, []):
            self._ends[before].append((int(n), text))

    def _forget(self, name: str) -> None:
        self._sizes.pop(name, None)
        found = NAME.fullmatch(name)
        if found is not None and found[2] is not None:
            kept = [end for end in self._ends.get(found[1], ()) if end != (int(found[2]), found[3])]
            self._ends[found[1]] = kept

    def _make_room(self, nbytes: int) -> None:
        """Remove what was used longest ago, until so much more fits."""
        full = sum(self._sizes.values()) + nbytes > self.limit
        if not full and self._written < self.limit // LOOKS:
            return
        files = self._look()  # others may have written and removed
        total = sum(size for _, size, _ in files)
        for _, size, name in sorted(files):
            if total + nbytes <= ROOM * self.limit:
                break
            with contextlib.suppress(FileNotFoundError):
                self._path(name).unlink()
            self._forget(name)
            total -= size
        if total + nbytes > self.limit:
            raise OSError(0, f"a file of {nbytes} bytes does not fit into {self.limit}")

    def _look(self) -> list[tuple[int, int, str]]:
        """(time of the last use, size, name) of every file that is ours by name."""
        files = []
        now = time.time()
        for folder in list(os.scandir(self.folder)):
            if not re.fullmatch("[0-9a-f]{2}", folder.name) or not folder.is_dir(follow_symlinks=False):
                continue
            for entry in os.scandir(folder):
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat(follow_symlinks=False)
                    if NAME.fullmatch(entry.name) and entry.name[:2] == folder.name and stat.S_ISREG(status.st_mode):
                        files.append((status.st_mtime_ns, status.st_size, entry.name))
                    elif PART.fullmatch(entry.name) and now - status.st_mtime > PART_S:
                        os.unlink(entry.path)
        self._written = 0
        there = {name for _, _, name in files}
        for name in [name for name in self._sizes if name not in there]:
            self._forget(name)
        for _, size, name in files:
            self._remember(name, size)
        return files

    def _warn(self, text: str) -> None:
        with contextlib.suppress(RuntimeWarning):  # where warnings are errors: there is no caller here to have it
            warnings.warn(text, RuntimeWarning, stacklevel=2)
