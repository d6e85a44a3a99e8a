"""A second floor below the prefix tree: what requests compute is written to files, and read where the tree misses.

The engine's thread only copies: a block when it is full, a piece of at most ``PIECE_NBYTES`` in a step when it comes
back. A thread of its own, alive while it has work, hashes, reads and writes; reading goes first, a piece ahead for each
request. What is restored is a step like any other, whose numbers come from files: the same reservation, the same
commit, the same bits. A file that is missing or wrong ends the restoring, and the rest is computed.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from time import monotonic
from typing import NamedTuple

from edgellm.engine import cache
from edgellm.engine.cache import KVCache
from edgellm.engine.cache_file import ABSENT, SavedState, layout_of
from edgellm.engine.prefix_files import PrefixFiles, block_name, hash_behind, state_name
from edgellm.formats.errors import EdgeLLMError
from edgellm.kernels.kv import BLOCK_TOKENS, CachePool

PIECE_NBYTES = 8 << 20  # copied in a step
PIECE_TOKENS = 256  # at most: a window's group of blocks has room for a step
WAITING_NBYTES = 128 << 20  # copied and not written yet
HANGS_S = 5.0  # without a piece, a disk has stopped working
AHEAD = 8  # pieces read ahead for all requests, and one for each
HASH_NBYTES = 113  # of a hash that waits
FLUSH_S = 10.0  # for what is still to be written at the end


class Piece(NamedTuple):
    """Tokens up to position ``end``: the files of their blocks by number, and that of the state behind them."""

    end: int
    blocks: dict[int, SavedState]
    state: SavedState | None

    def fill(self, pool: CachePool, group: int, block: int, target: int) -> None:
        """Write a block, or the state, into the pool; as ``KVCache.take_over`` asks for it."""
        is_state = pool.groups[group].kind == "state"
        source = self.state if is_state or block not in self.blocks else self.blocks[block]
        assert source is not None, "the piece was read whole"
        pool.write_block(group, target, source.blocks[group][0])


class Reading:
    """Pieces on their way from the disk to one request; ``over`` when there will be none but those that are here.

    texts   the hashes of the texts that end in one of its blocks
    """

    def __init__(self, pieces: Iterator[Piece | None], texts: Collection[str], wake: Callable[[], None]) -> None:
        self.pieces, self.texts, self.wake = pieces, texts, wake
        self.ready: deque[Piece] = deque()
        self.over = False
        self.moved = monotonic()  # when the last piece came, or the reading began

    def read_one(self) -> None:
        """On the disk's thread."""
        try:
            piece = next(self.pieces, None)
        except BaseException:
            self.over = True
            raise
        self.moved = monotonic()
        if piece is None:
            self.over = True
        elif not self.over:  # it is still wanted
            self.ready.append(piece)
        self.wake()

    @property
    def hangs(self) -> bool:
        """Whether nothing has come for so long that computing is faster."""
        return not self.ready and monotonic() - self.moved > HANGS_S


class DiskCache:
    """The files of one model, and the thread that reads and writes them. ``close()`` writes what is left."""

    def __init__(self, files: PrefixFiles, cache: KVCache) -> None:
        self.files, self.cache, self.pool = files, cache, cache.pool
        kinds = [group.kind for group in self.pool.groups]
        self.has_states = "state" in kinds
        self.key_groups = [g for g, kind in enumerate(kinds) if kind != "state"]
        newest = [] if self.has_states else [g for g in self.key_groups if kinds[g] == "newest"]
        self.kept_groups = [g for g in self.key_groups if g not in newest]  # of what is not a text's first block
        # a run that is over is read as it is packed; of a state, which may end anywhere, what is newest is kept, too
        self.run_blocks = max((self.pool.groups[g].window // BLOCK_TOKENS for g in newest), default=1)
        nbytes = sum(map(self.pool.block_nbytes, self.key_groups))
        n_blocks = min(PIECE_TOKENS // BLOCK_TOKENS, PIECE_NBYTES // max(1, nbytes))
        self.piece_blocks = max(1, n_blocks // self.run_blocks) * self.run_blocks
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._readings: list[Reading] = []
        self._work: deque[tuple[int, str, Callable[[], None]]] = deque()
        self._waiting: set[str] = set()  # names
        self._nbytes = 0
        self._closed = False
        self.writes = True

    @classmethod
    def open(cls, folder: Path, key: str, cache: KVCache, limit: int) -> DiskCache:
        """In a folder, for the model of this key; EdgeLLMError CACHE_DIR when it is not for this user alone."""
        largest = sum(cache.pool.block_nbytes(group) for group in range(len(cache.pool.groups)))
        return cls(PrefixFiles(folder, key, layout_of(cache.pool), limit, largest), cache)

    def follow(self, tokens: list[int], variant: str = "") -> Trail:
        """For a request: its tokens, which only ever grow; ``variant`` as in ``KVCache.open``."""
        return Trail(self, tokens, variant)

    def has(self, name: str) -> bool:
        """Whether there is or will be such a file."""
        return self.files.has(name) or name in self._waiting

    @property
    def has_room(self) -> bool:
        """Whether more may be copied."""
        return self.writes and self._nbytes < WAITING_NBYTES

    def keep(self, name: str, before: str, tokens: Sequence[int], groups: dict[int, int]) -> None:
        """Copy the block, or slot, of each of these groups, and write them when there is time."""
        try:
            copies = [self.pool.read_block(group, block) for group, block in sorted(groups.items())]
        except (EdgeLLMError, MemoryError):
            return  # a device that is gone, say: the next step tells, this one is done
        first = [0 if group in groups else ABSENT for group in range(len(self.pool.groups))]
        self.do(partial(self.files.write, name, before, list(tokens), first, copies), name, sum(map(len, copies)))

    def do(self, work: Callable[[], None], name: str = "", nbytes: int = 0) -> None:
        """Have it done on the disk's thread."""
        with self._changed:
            if self._closed:
                return
            self._nbytes += nbytes
            if name:
                self._waiting.add(name)
            self._work.append((nbytes, name, work))
            self._go_on()

    def read(self, reading: Reading) -> None:
        """Have its pieces read."""
        with self._changed:
            if self._closed:
                reading.over = True
                return
            self._readings.append(reading)
            self._go_on()

    def is_read(self, text: str) -> bool:
        """Whether the block that ends this text is on its way to somebody."""
        with self._changed:
            return any(text in reading.texts for reading in self._readings if not reading.over)

    def look(self) -> None:
        """A piece was taken, or is no longer wanted."""
        with self._changed:
            self._go_on()

    def close(self) -> None:
        """Write what was copied, for some seconds at most. May be called twice."""
        with self._changed:
            self._readings.clear()
            deadline = monotonic() + FLUSH_S
            while self._work and self._thread is not None and (left := deadline - monotonic()) > 0:
                self._changed.wait(left)
            self._closed = True
            self._drop_work()

    def _go_on(self) -> None:
        self._changed.notify_all()
        if self._thread is None and (self._work or self._readings):
            thread = threading.Thread(target=self._run, name="edgellm-disk", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # no more threads may be made: nothing is read or kept
                for reading in self._readings:
                    reading.over = True
                self._drop_work()
            else:
                self._thread = thread

    def _drop_work(self) -> None:
        self._work.clear()
        self._waiting.clear()
        self._nbytes = 0

    def _run(self) -> None:
        try:
            while (work := self._next()) is not None:
                work()
        except BaseException:  # our own mistake; the next work has a new thread
            with self._changed:
                self._thread = None
            raise

    def _next(self) -> Callable[[], None] | None:
        """What to do next, reading before writing; None, and the thread ends, when there is nothing."""
        with self._changed:
            self._readings = [reading for reading in self._readings if reading.ready or not reading.over]
            n_ready = sum(len(reading.ready) for reading in self._readings)
            unread = [reading for reading in self._readings if not reading.over]
            for reading in sorted(unread, key=lambda reading: len(reading.ready)):
                if n_ready < AHEAD or not (reading.ready or n_ready >= 2 * AHEAD):
                    return reading.read_one
            if self._work:
                return self._write_one
            self._thread = None
            return None

    def _write_one(self) -> None:
        nbytes, name, work = self._work[0]
        try:
            work()
        finally:
            with self._changed:
                if self._work:  # not dropped meanwhile
                    self._nbytes -= nbytes
                    self._waiting.discard(name)
                    self._work.popleft()
                self._changed.notify_all()


class Trail:
    """What of one request is on the disk. Used on the engine's thread."""

    def __init__(self, disk: DiskCache, tokens: list[int], variant: str = "") -> None:
        self.disk, self.tokens = disk, tokens
        self.reading: Reading | None = None
        key = hash_behind(f"{disk.files.key} {variant}", ()) if variant else disk.files.key
        self._hashes = [key]  # of the text up to each full block
        self._n_kept = 0  # blocks that are written, or on their way

    def text(self, b: int) -> str:
        """The hash of the first b blocks, the last of which need not be full yet."""
        while len(self._hashes) <= b:
            start = (len(self._hashes) - 1) * BLOCK_TOKENS
            block = self.tokens[start : start + BLOCK_TOKENS]
            behind = hash_behind(self._hashes[-1], block)
            if len(block) < BLOCK_TOKENS:
                return behind  # not to be kept: there will be more in it
            self._hashes.append(behind)
        return self._hashes[b]

    # -- from the disk ---------------------------------------------------------------------------------------------

    def look_up(self, sequence: cache.Sequence, wake: Callable[[], None]) -> bool:
        """Begin to read what the disk has beyond the sequence, which was just opened; ``wake`` is called on a thread.

        False when another request already has it read: it will be in the cache soon.
        """
        self.stop()
        ends = self._ends(sequence.length, min(len(self.tokens) - 1, self.disk.cache.n_ctx))
        if ends:
            first = sequence.length // BLOCK_TOKENS + 1
            texts = [self.text(b) for b in range(first, max(first, ends[-1] // BLOCK_TOKENS) + 1)]
            if self.disk.is_read(texts[0]):
                return False
            self.reading = Reading(self._pieces(sequence.length, ends), frozenset(texts), wake)
            self.disk.read(self.reading)
        return True

    def stop(self) -> None:
        """Want no more of it."""
        if self.reading is not None:
            self.reading.over = True
            self.reading.ready.clear()
            self.reading = None
            self.disk.look()

    def take(self) -> Piece | None:
        """The next piece, once it is read; it stays until ``taken``."""
        return self.reading.ready[0] if self.reading is not None and self.reading.ready else None

    def taken(self) -> None:
        """It is in the cache."""
        assert self.reading is not None, "a piece of no reading"
        self.reading.ready.popleft()
        self.disk.look()

    def _ends(self, start: int, limit: int) -> list[int]:
        """Where the pieces end that go from ``start`` as far as the disk may have them."""
        files, first = self.disk.files, start // BLOCK_TOKENS
        end = first
        while (end + 1) * BLOCK_TOKENS <= limit:
            if self.disk.key_groups and not files.has(block_name(self.text(end + 1))):
                break
            end += 1
        if not self.disk.has_states:
            run, piece = self.disk.run_blocks, self.disk.piece_blocks
            end = end // run * run
            ends = [*range(first // run * run + piece, end, piece), end]
            return [b * BLOCK_TOKENS for b in ends if b * BLOCK_TOKENS > start]
        found: list[int] = []
        for b in range(first, end + 1):
            at, known = b * BLOCK_TOKENS, BLOCK_TOKENS - (1 if b == end and self.disk.key_groups else 0)
            n = files.state_behind(self.text(b), self.tokens[at : min(at + known, limit)])
            if n and at + n > start:
                found = [*(one for one in found if one % BLOCK_TOKENS == 0), at + n]
        return found

    def _pieces(self, start: int, ends: list[int]) -> Iterator[Piece | None]:
        """On the disk's thread; None once one cannot be read."""
        files = self.disk.files
        for end in ends:
            blocks, state = {}, None
            if self.disk.has_states:
                b = (end - 1) // BLOCK_TOKENS
                before, tokens = self._hashes[b], self.tokens[b * BLOCK_TOKENS : end]
                if (state := files.read(state_name(before, tokens), before, tokens)) is None:
                    yield None
            for b in range(start // BLOCK_TOKENS, end // BLOCK_TOKENS) if self.disk.key_groups else ():
                tokens = self.tokens[b * BLOCK_TOKENS : (b + 1) * BLOCK_TOKENS]
                found = files.read(block_name(self._hashes[b + 1]), self._hashes[b], tokens, begins=b == 0)
                if found is None:
                    yield None
                else:
                    blocks[b] = found
            yield Piece(end, blocks, state)
            start = end

    # -- to the disk -----------------------------------------------------------------------------------------------

    def keep(self, sequence: cache.Sequence) -> None:
        """A step was committed: write what is new and whole."""
        for b in range(self._n_kept, len(sequence.path) if self.disk.key_groups else 0):
            groups = self.disk.key_groups if b == 0 else self.disk.kept_groups
            blocks = {group: int(sequence.tables[group][b]) for group in groups}
            name = block_name(self.text(b + 1))
            if not self.disk.has(name) and min(blocks.values()) >= 0:
                if not self.disk.has_room:
                    return  # after the next step
                tokens = self.tokens[b * BLOCK_TOKENS : (b + 1) * BLOCK_TOKENS]
                self.disk.keep(name, self.text(b), tokens, blocks)
            self._n_kept = b + 1
        if (slot := self.disk.cache.snapshot_of(sequence)) >= 0:
            self._keep_state(sequence, slot)

    def end(self, sequence: cache.Sequence, keep: bool) -> None:
        """The request is over, its sequence not yet released. ``keep=False``: nothing of it is to be trusted."""
        self.stop()
        files, n = self.disk.files, len(sequence.path)
        if keep and not self.disk.has_room:
            return
        if keep and self.disk.has_states and sequence.length > sequence.n_reused:
            self._keep_state(sequence, int(sequence.tables[-1][0]))
        texts = [self.text(b) for b in range(n, -1, -1)]

        def names() -> Iterator[str]:
            for text in texts:  # the deepest first: a block is of no use without those before it
                yield from files.states_of(text)
                yield block_name(text)

        self.disk.do(lambda: files.touch(names()) if keep else files.remove(names()), nbytes=HASH_NBYTES * len(texts))

    def _keep_state(self, sequence: cache.Sequence, slot: int) -> None:
        b = (sequence.length - 1) // BLOCK_TOKENS
        before, tokens = self.text(b), self.tokens[b * BLOCK_TOKENS : sequence.length]
        name = state_name(before, tokens)
        if self.disk.has(name) or not self.disk.has_room:
            return
        groups = {len(self.disk.pool.groups) - 1: slot}
        if len(tokens) < BLOCK_TOKENS:  # its block will get no file of its own
            groups |= {group: int(sequence.tables[group][b]) for group in self.disk.key_groups}
        self.disk.keep(name, before, tokens, groups)
