"""Who owns which block of the cache's pool: sequences, and a tree of blocks that can be found again by their tokens.

A sequence has one block table for each group of layers. Blocks are counted references: when a block of
32 tokens is full it enters the prefix tree, where a later sequence that begins with the same tokens shares it. A block
that nobody uses stays findable until its place is needed; the one left alone longest goes first. Blocks are never
written once they are shared: a sequence that parts from a known one in the middle of a block gets a copy.

Layers with a sliding window keep only their window. A prefix of length p is known again if every group still holds
what position p looks at.

A recurrent layer has no positions to look at: it has a state after each token, in a slot. A step reads one slot and
writes another, so until it is committed the sequence is what it was, and a slot that was read may be kept: as a
snapshot of its position, from which sequences with the same beginning go on. Snapshots are made where one will likely
be wanted: before the last token of a prompt, at the end of an answer, where a prompt leaves a known one, and now and
then in a long text.

Nothing here computes. One thread at a time; the engine sees to that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from edgellm.engine.cache_blocks import BlockGroup, Node, subtree
from edgellm.formats.errors import ContextFullError
from edgellm.kernels.kv import BLOCK_TOKENS, CacheLayer, CachePool, groups_of

SPARE_WINDOWS = 3  # kept ends of other prompts, for a layer group with a sliding window
SPARE_BEGINNINGS = 16  # kept first blocks of other prompts, where the newest blocks are not packed
SNAPSHOTS = (4, 512)  # least and most
SNAPSHOT_NBYTES = 32 << 20  # for snapshots, or as much as keys and values of a quarter of the context
LEAST_SPACING = 512  # tokens between the snapshots of a long text
Fill = Callable[[int, int, int], None]


def n_blocks_of(n_tokens: int) -> int:
    """Blocks that hold n tokens."""
    return -(-n_tokens // BLOCK_TOKENS)


def pool_blocks(layers: SequenceOf[CacheLayer], n_ctx: int, max_tokens: int, n_parallel: int = 1) -> tuple[int, ...]:
    """Blocks that each group of layers needs for ``n_parallel`` sequences of ``n_ctx`` tokens at once.

    Full attention: the whole contexts and one copied block. A window: the windows, the step that is being computed
    (``max_tokens`` of all sequences together), and room for the ends of a few other prompts, so that coming back to
    them costs nothing; never more than the whole. States: two slots for each sequence, and the snapshots.
    """
    whole = n_parallel * n_blocks_of(n_ctx) + 1
    counts = []
    for group in groups_of(layers):
        mine = [layer for layer in layers if layer.group == group]
        if group.kind == "all":
            counts.append(whole)
        elif group.kind != "state":
            live = n_parallel * (n_blocks_of(group.window) + 2) + n_blocks_of(max_tokens) + 1
            live += n_parallel + SPARE_BEGINNINGS if group.kind == "newest" else 0
            counts.append(min(whole, live + SPARE_WINDOWS * (n_blocks_of(group.window) + 1)))
        else:
            quarter = sum(layer.seen_nbytes(n_ctx // 4) for layer in layers if layer not in mine)
            n = max(quarter, SNAPSHOT_NBYTES) // sum(layer.seen_nbytes(1) for layer in mine)
            counts.append(2 * n_parallel + min(max(n, SNAPSHOTS[0]), SNAPSHOTS[1]))
    return tuple(counts)


class _Match(NamedTuple):
    """A known beginning: the nodes of its full blocks, the node that holds the rest, the slot of its state."""

    length: int
    path: list[Node]
    source: Node | None = None
    slot: int = -1


@dataclass(eq=False)
class Sequence:
    """The tokens whose keys and values are held, and where. Changed by ``KVCache`` only.

    root       of the tree that it takes from and leaves in, None for neither
    tokens     the ids of positions 0 .. length-1
    tables     an int32 array for each group: (max_blocks,) physical block of 32 positions, -1 where none is kept, or
               (2,) the slot that the next step reads and the one that it writes, -1 for none
    n_reused   tokens that were known when the sequence was opened
    stops      positions where a step is to end, for a snapshot
    """

    tables: tuple[np.ndarray, ...]
    root: Node | None
    tokens: list[int] = field(default_factory=list)
    n_reused: int = 0
    closed: bool = False
    path: list[Node] = field(default_factory=list)  # the node of each full block, when shared
    first: list[int] = field(default_factory=list)  # first block kept, for each group
    end: list[int] = field(default_factory=list)  # one after the last block reserved, for each group
    checkpoint: int = 0
    dropped: int = 0  # positions that it had and holds no more, of its first ones
    stops: list[int] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Tokens computed, and the position of the next one in the text."""
        return len(self.tokens)

    @property
    def n_held(self) -> int:
        """Positions held, and the place of the next one in its blocks."""
        return len(self.tokens) - self.dropped


class KVCache:
    """Gives out the blocks of a pool to sequences of at most ``n_ctx`` tokens."""

    def __init__(self, pool: CachePool, n_ctx: int) -> None:
        self.pool = pool
        self.n_ctx = n_ctx
        self.max_blocks = n_blocks_of(n_ctx)
        groups = [BlockGroup(i, g, n) for i, (g, n) in enumerate(zip(pool.groups, pool.n_blocks, strict=True))]
        self._states = groups.pop() if pool.groups and pool.groups[-1].kind == "state" else None
        self._groups = groups
        self._roots: dict[str, Node] = {}
        n_slots = len(self._states.references) if self._states else 1
        self._spacing = max(LEAST_SPACING, n_blocks_of(2 * n_ctx // n_slots) * BLOCK_TOKENS)

    def open(self, tokens: SequenceOf[int], *, shared: bool = True, variant: str = "") -> Sequence:
        """A sequence that holds the longest known beginning of ``tokens``, but never all of them.

        The last token is always left to be computed, for its logits. ``shared=False`` gives a sequence that neither
        takes from the tree nor leaves anything in it. ``variant`` names what else makes the numbers, such as an
        adapter: what one variant has computed another does not find.
        """
        sizes = (2 if group.kind == "state" else self.max_blocks for group in self.pool.groups)
        tables = tuple(np.full(size, -1, np.int32) for size in sizes)
        root = self._root(variant) if shared else None
        sequence = Sequence(tables, root, first=[0] * len(tables), end=[0] * len(tables))
        if root is None:
            return sequence
        limit = min(len(tokens) - 1, self.n_ctx)
        wanted = tuple(tokens[:limit])
        path = self._path(root, wanted)
        for match in self._matches(root, path, wanted):
            if self._adopt(sequence, match):
                sequence.tokens, sequence.n_reused = list(tokens[: match.length]), match.length
                break
        if self._states:
            start, node = len(path) * BLOCK_TOKENS, path[-1] if path else root
            rest = wanted[start : start + BLOCK_TOKENS]
            parting = start + max((_common(known, rest) for known in (*node.children, *node.snapshots)), default=0)
            sequence.stops = sorted({n for n in (parting, limit) if n > sequence.length})
        root.users += 1
        return sequence

    def room(self, sequence: Sequence) -> int:
        """How many tokens the next step may have at most: it is to end where a snapshot is wanted."""
        length = sequence.length
        if self._states is None or sequence.root is None:
            return self.n_ctx
        stop = min(length // self._spacing * self._spacing + self._spacing, *sequence.stops, self.n_ctx)
        return max(1, stop - length)

    def reserve(self, sequence: Sequence, n: int) -> None:
        """Blocks for the next n positions; what lies before every window is let go of.

        ContextFullError when the context ends before, or when no block is left (code ``CACHE_FULL``). Nothing is
        reserved then.
        """
        assert not sequence.closed, "reserve() on a released sequence"
        if sequence.length + n > self.n_ctx:
            raise ContextFullError(
                f"The context is full: {sequence.length} + {n} tokens, it has room for {self.n_ctx}. "
                "Shorten the conversation or load the model with a larger context."
            )
        end = n_blocks_of(sequence.n_held + n)
        for group in self._groups:
            self._slide(sequence, group)
        for group in self._groups:
            missing = end - sequence.end[group.index]
            if missing > group.n_available:
                raise ContextFullError(
                    f"The KV cache has {group.n_available} free blocks, {missing} are needed. "
                    "Wait for another conversation to end or load the model with a larger context.",
                    code="CACHE_FULL",
                )
        if self._states and sequence.tables[self._states.index][1] < 0:
            if not self._states.n_available:
                raise ContextFullError(
                    "The cache has no free state. Wait for another conversation to end.", code="CACHE_FULL"
                )
            sequence.tables[self._states.index][1] = self._take(self._states)
        for group in self._groups:
            table = sequence.tables[group.index]
            for b in range(sequence.end[group.index], end):
                table[b] = self._take(group)
            sequence.end[group.index] = max(end, sequence.end[group.index])

    def commit(self, sequence: Sequence, tokens: SequenceOf[int], n_computed: int | None = None) -> None:
        """``tokens`` are computed, stored and accepted: full blocks become findable.

        n_computed   tokens that its state is behind, where fewer are accepted: the sequence stays as it was then, and
                     they are to be computed again
        """
        assert not sequence.closed, "commit() on a released sequence"
        if self._states and n_computed is not None and len(tokens) < n_computed:
            return
        sequence.tokens.extend(tokens)
        held = (end for group, end in zip(self.pool.groups, sequence.end, strict=True) if group.kind != "state")
        assert all(n_blocks_of(sequence.n_held) <= end for end in held), "commit() without reserve()"
        if sequence.root is not None:
            while (len(sequence.path) + 1) * BLOCK_TOKENS <= sequence.length:
                self._publish(sequence)
        if self._states:
            self._turn(sequence)

    def take_over(self, sequence: Sequence, tokens: SequenceOf[int], fill: Fill) -> None:
        """Commit tokens that were computed elsewhere, to blocks that are reserved; ``fill`` as in ``put_back``."""
        start, end = sequence.length // BLOCK_TOKENS, n_blocks_of(sequence.length + len(tokens))
        for group in self._groups:
            held = group.held(sequence.first[group.index], end)
            if group.is_newest:  # of what is packed only the first one was kept
                needed = group.first_needed(sequence.length + len(tokens))
                held = [b for b in held if b == 0 or b >= needed]
                self._slide(sequence, group, sequence.length + len(tokens))
            for b in held:
                if b >= start:
                    fill(group.index, b, int(sequence.tables[group.index][b]))
        if self._states:
            fill(self._states.index, 0, int(sequence.tables[self._states.index][1]))
        self.commit(sequence, tokens)
        sequence.n_reused = sequence.length

    def snapshot_of(self, sequence: Sequence) -> int:
        """The slot that is kept as a snapshot of what the sequence is now, -1 for none."""
        if self._states is None or (node := sequence.path[-1] if sequence.path else sequence.root) is None:
            return -1
        return node.snapshots.get(tuple(sequence.tokens[len(sequence.path) * BLOCK_TOKENS :]), -1)

    def mark(self, sequence: Sequence) -> None:
        """Another sequence will likely part from this one here: what is in the windows now is kept longer."""
        sequence.checkpoint = sequence.n_held

    def release(self, sequence: Sequence, *, keep: bool = True) -> None:
        """The sequence is over; its blocks stay findable until their place is needed. May be called twice.

        ``keep=False`` makes everything that begins as this sequence does unknown (its values cannot be trusted).
        """
        if sequence.closed:
            return
        sequence.closed = True
        if not keep and sequence.path:
            self._cut(sequence.path[0])
        elif keep and sequence.root is not None and sequence.length:
            self._leave(sequence)
        if sequence.root is not None:
            sequence.root.users -= 1
        self._let_go(sequence)

    def shrink(self, sequence: Sequence, n_far: int, make_room: Callable[[], bool]) -> np.ndarray:
        """Let a sequence of whole blocks hold but ``n_far`` positions before its last block; the blocks for these.

        It leaves the tree: what it holds from now on is its own. ``make_room`` has others give up blocks, and says
        whether one did; without any CACHE_FULL is raised, and the sequence is good for nothing but to be released.
        """
        n, shift = n_far // BLOCK_TOKENS, (sequence.length - n_far) // BLOCK_TOKENS - 1
        assert sequence.n_held == sequence.length == (n + shift + 1) * BLOCK_TOKENS, "not of whole blocks"
        targets = np.zeros(n, np.int64)
        for group in self._groups:
            table, i = sequence.tables[group.index], group.index
            if group.window:
                self._slide(sequence, group)
                assert sequence.first[i] >= shift, "a window that is longer than what is held"
            else:
                for b in range(n + shift - 1, -1, -1):
                    group.drop(int(table[b]))
                    table[b] = -1
                sequence.first[i] = n + shift
            table[:] = np.concatenate([table[shift:], np.full(shift, -1, np.int32)])
            sequence.first[i], sequence.end[i] = sequence.first[i] - shift, sequence.end[i] - shift
        self._leave_tree(sequence)
        sequence.dropped, sequence.checkpoint = shift * BLOCK_TOKENS, 0
        for group in (group for group in self._groups if not group.window):
            while group.n_available < n:
                if not make_room():
                    raise ContextFullError(
                        f"The KV cache has {group.n_available} free blocks, {n} are needed. Load the model with a "
                        "larger context.",
                        code="CACHE_FULL",
                    )
            targets[:] = [self._take(group) for _ in range(n)]
            sequence.tables[group.index][:n], sequence.first[group.index] = targets, 0
        return targets

    def _leave_tree(self, sequence: Sequence) -> None:
        for node in reversed(sequence.path):
            node.users -= 1
            self._prune(node)
        sequence.path.clear()
        sequence.stops.clear()
        if sequence.root is not None:
            sequence.root.users -= 1
            sequence.root = None

    def _root(self, variant: str) -> Node:
        """The root of a variant's tree, in place of those that hold nothing any more."""
        if variant not in self._roots:
            self._roots = {name: root for name, root in self._roots.items() if not root.holds_nothing}
        return self._roots.setdefault(variant, Node(None, (), len(self._groups)))

    def put_back(self, tokens: SequenceOf[int], first: SequenceOf[int], fill: Fill, variant: str = "") -> int:
        """Make blocks findable that were computed elsewhere; how many of ``tokens`` are known then.

        first   for each group the first block that there is; those before lie outside the window or are
                packed, see ``CacheGroup.held``
        fill    called with (group, block of the sequence, target): write that block into the pool; of a group of states
                block 0 is the state behind the last token
        """
        held_by = [set(group.held(first[group.index], n_blocks_of(len(tokens)))) for group in self._groups]
        held: list[tuple[BlockGroup, int]] = []  # in use until the end: none may take the place of another
        node, n_known = self._root(variant), 0
        parent = deepest = node

        def take(group: BlockGroup, block: int) -> int:
            target = self._take(group)
            held.append((group, target))
            fill(group.index, block, target)  # findable only once it is whole
            return target

        try:
            for b in range(n_blocks_of(len(tokens))):
                part = tuple(tokens[b * BLOCK_TOKENS : (b + 1) * BLOCK_TOKENS])
                child = node.children.get(part)
                there = [group for group in self._groups if b in held_by[group.index]]
                if not all(group.n_available or (child and child.blocks[group.index] >= 0) for group in there):
                    break
                child = deepest = child or self._insert(node, part)
                for group in there:
                    if (block := child.blocks[group.index]) >= 0:
                        group.share(block)
                        held.append((group, block))
                    else:
                        block = child.blocks[group.index] = take(group, b)
                        group.owner[block] = child
                parent, node, n_known = node, child, n_known + len(part)
            if self._states:
                rest = () if len(node.tokens) == BLOCK_TOKENS else node.tokens
                owner = parent if rest else node
                if n_known < len(tokens) or not self._states.n_available:
                    n_known = 0
                elif rest not in owner.snapshots:
                    self._keep_snapshot(owner, rest, take(self._states, 0))
        finally:
            for group, block in reversed(held):  # the deepest goes first, as in release()
                group.drop(block)
            self._prune(deepest)
        return n_known

    def blocks(self, sequence: Sequence) -> list[list[int]]:
        """For each group the blocks that hold the sequence, from ``sequence.first`` on."""
        held = zip(self.pool.groups, sequence.tables, sequence.first, strict=True)
        end = n_blocks_of(sequence.n_held)
        return [table[[0] if group.kind == "state" else group.held(a, end)].tolist() for group, table, a in held]

    def n_used(self) -> tuple[int, ...]:
        """Blocks, and slots, of each group that sequences in use hold."""
        groups = [*self._groups, *([self._states] if self._states else [])]
        return tuple(len(g.references) - g.n_available for g in groups)

    def check(self, live: SequenceOf[Sequence]) -> None:
        """Count everything anew and compare (for tests): ``live`` are all the sequences in use."""
        nodes = [node for root in self._roots.values() for node in subtree(root)]
        for group in self._groups:
            users = [0] * len(group.references)
            for sequence in live:
                table = sequence.tables[group.index]
                held = set(group.held(sequence.first[group.index], sequence.end[group.index]))
                for b in range(self.max_blocks):
                    assert (table[b] >= 0) == (b in held), "a table and its bounds disagree"
                    if b in held:
                        users[int(table[b])] += 1
            self._check(group, users, {n.blocks[group.index]: n for n in nodes if n.blocks[group.index] >= 0})
        if self._states:
            users = [0] * len(self._states.references)
            for sequence in live:
                for slot in sequence.tables[self._states.index]:
                    if slot >= 0:
                        users[int(slot)] += 1
            self._check(self._states, users, {slot: node for node in nodes for slot in node.snapshots.values()})
        for node in (node for node in nodes if node.parent is not None):
            assert not node.holds_nothing, "the tree has a node of no use"
            assert node.users == sum(node in sequence.path for sequence in live), "the users of a node are wrong"

    def _check(self, group: BlockGroup, users: list[int], owners: dict[int, Node]) -> None:
        assert users == group.references, "reference counts are wrong"
        assert owners == {b: n for b, n in enumerate(group.owner) if n is not None}, "tree and owners disagree"
        unused = {b for b in owners if not users[b]}
        assert unused == set(group.unused), "the list of unused blocks is wrong"
        free = {b for b in range(len(users)) if not users[b] and b not in owners}
        assert len(group.free) == len(free) and free == set(group.free), "the list of free blocks is wrong"

    # -- finding ---------------------------------------------------------------------------------------------------

    def _path(self, root: Node, tokens: tuple[int, ...]) -> list[Node]:
        """The nodes of the full blocks that ``tokens`` begin with."""
        path: list[Node] = []
        node: Node | None = root
        for start in range(0, len(tokens) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
            node = (node or root).children.get(tokens[start : start + BLOCK_TOKENS])
            if node is None:
                break
            path.append(node)
        return path

    def _matches(self, root: Node, path: list[Node], tokens: tuple[int, ...]) -> Iterator[_Match]:
        """Known beginnings of ``tokens``, longest first; ``path`` is theirs."""
        reach = [self._reach(group, path) for group in self._groups]
        for depth in range(len(path), -1, -1):
            start, node = depth * BLOCK_TOKENS, path[depth - 1] if depth else root
            for n, source, slot in self._ends(node, tokens[start : start + BLOCK_TOKENS], depth == len(path)):
                length = start + n
                if length and all(self._held(g, reach[g.index], path[:depth], source, length) for g in self._groups):
                    yield _Match(length, path[:depth], source, slot)

    def _ends(self, node: Node, rest: tuple[int, ...], last: bool) -> Iterator[tuple[int, Node | None, int]]:
        """How many tokens behind a node are known, longest first, the node that has them, the slot of the state.

        last   the path ends here: only its children may hold a part of the rest
        """
        children = list(node.children.values())
        if self._states:
            for known in sorted(node.snapshots, key=len, reverse=True):
                if rest[: len(known)] == known:
                    sources: list[Node | None] = [None]
                    if known and self._groups:
                        sources = [child for child in children if child.tokens[: len(known)] == known]
                    yield from ((len(known), source, node.snapshots[known]) for source in sources)
            return
        if last:
            found = [(_common(child.tokens, rest), child) for child in children]
            yield from ((n, child, -1) for n, child in sorted(found, key=lambda end: -end[0]) if n)
        yield 0, None, -1

    def _reach(self, group: BlockGroup, path: list[Node]) -> list[int]:
        """For each block of the path, the first of the unbroken run of held blocks that ends in it."""
        reach: list[int] = []
        for b, node in enumerate(path):
            unbroken = b and path[b - 1].blocks[group.index] >= 0
            reach.append(reach[-1] if unbroken else b)
            if node.blocks[group.index] < 0:
                reach[-1] = b + 1
        return reach

    def _held(self, group: BlockGroup, reach: list[int], path: list[Node], source: Node | None, length: int) -> bool:
        """Whether the group has every block that a query at position ``length`` looks at."""
        first = group.first_needed(length)
        if source is not None and source.blocks[group.index] < 0:
            return False
        if group.is_newest and path and path[0].blocks[group.index] < 0:
            return False
        if first >= len(path):  # all of it lies in the source
            return True
        return path[-1].blocks[group.index] >= 0 and reach[len(path) - 1] <= first

    def _adopt(self, sequence: Sequence, match: _Match) -> bool:
        """Share the blocks of the path and the state, copy the source. False when there is no block to copy to.

        Whatever a copy raises, nothing is held then.
        """
        path, source = match.path, match.source
        sequence.path = list(path)
        for node in path:
            node.users += 1
        if self._states:
            self._states.share(match.slot)
            sequence.tables[self._states.index][0] = match.slot
        for group in self._groups:
            i = group.index
            sequence.first[i] = group.first_needed(match.length)
            sequence.end[i] = len(path)
            for b in group.held(sequence.first[i], len(path)):
                sequence.tables[i][b] = path[b].blocks[i]
                group.share(path[b].blocks[i])
        return source is None or self._copy_end(sequence, source)

    def _copy_end(self, sequence: Sequence, source: Node) -> bool:
        """A copy of the source behind what the sequence shares, which is let go of when there is none."""
        sources = [(group, source.blocks[group.index]) for group in self._groups]
        for group, block in sources:
            group.share(block)  # must not be given away as the target of its own copy
        copied = False
        try:
            if all(group.n_available for group in self._groups):
                for group, block in sources:
                    i = group.index
                    sequence.tables[i][len(sequence.path)] = target = self._take(group)
                    sequence.end[i] += 1
                    self.pool.copy_block(i, block, target)
                copied = True
        finally:
            for group, block in sources:
                group.drop(block)
            if not copied:
                self._let_go(sequence)
        return copied

    def _let_go(self, sequence: Sequence) -> None:
        """Hold nothing more: neither blocks nor states nor a path."""
        for group in self._groups:
            i = group.index
            # the deepest first: a block is of no use without those before it
            for b in reversed(group.held(sequence.first[i], sequence.end[i])):
                group.drop(int(sequence.tables[i][b]))
            sequence.first[i] = sequence.end[i] = 0
        if self._states:
            for slot in sequence.tables[self._states.index].tolist():
                if slot >= 0:
                    self._states.drop(slot)
        for table in sequence.tables:
            table[:] = -1
        for node in reversed(sequence.path):
            node.users -= 1
            self._prune(node)
        sequence.path.clear()

    # -- states ----------------------------------------------------------------------------------------------------

    def _turn(self, sequence: Sequence) -> None:
        """The state that was written is the one to read; keep it where a snapshot is wanted."""
        assert self._states is not None
        table = sequence.tables[self._states.index]
        read, written = table.tolist()
        table[:] = written, -1
        if read >= 0 and self._states.owner[read] is None and self._states.references[read] == 1:
            table[1] = read  # nobody else's: the next step may write there
        elif read >= 0:
            self._states.drop(read)
        while sequence.stops and sequence.stops[0] <= sequence.length:
            sequence.stops.pop(0)
            self._leave(sequence)
        if sequence.length % self._spacing == 0 and sequence.root is not None:
            self._leave(sequence)

    def _leave(self, sequence: Sequence) -> None:
        """Leave the sequence findable as it is, with the last, partly filled block and its state."""
        if sequence.length % BLOCK_TOKENS and self._groups:
            self._publish_end(sequence)
        if self._states:
            self._snapshot(sequence)

    def _snapshot(self, sequence: Sequence) -> None:
        assert self._states is not None and sequence.root is not None
        node = sequence.path[-1] if sequence.path else sequence.root
        rest = tuple(sequence.tokens[len(sequence.path) * BLOCK_TOKENS :])
        slot = int(sequence.tables[self._states.index][0])
        known = node.snapshots.get(rest, -1)
        if known < 0 and self._states.owner[slot] is None:
            self._keep_snapshot(node, rest, slot)
        elif known in self._states.unused:
            self._states.unused.move_to_end(known)

    def _keep_snapshot(self, node: Node, rest: tuple[int, ...], slot: int) -> None:
        assert self._states is not None
        node.snapshots[rest] = slot
        self._states.owner[slot] = node

    # -- the tree --------------------------------------------------------------------------------------------------

    def _publish(self, sequence: Sequence) -> None:
        """Put the next full block of the sequence into the tree, or take the one that is there already."""
        b = len(sequence.path)
        parent = sequence.path[-1] if b else sequence.root
        assert parent is not None, "a sequence of its own has no place in the tree"
        tokens = tuple(sequence.tokens[b * BLOCK_TOKENS : (b + 1) * BLOCK_TOKENS])
        node = self._insert(parent, tokens)  # also where it is known: an end that it continues may have its blocks
        for group in self._groups:
            table = sequence.tables[group.index]
            mine, known = int(table[b]), node.blocks[group.index]
            if mine < 0:  # it was taken over, and is packed
                continue
            if known < 0:
                node.blocks[group.index] = mine
                group.owner[mine] = node
            elif known != mine:
                table[b] = known
                group.share(known)
                group.drop(mine)
        node.users += 1
        sequence.path.append(node)

    def _publish_end(self, sequence: Sequence) -> None:
        """Leave the last, partly filled block findable, unless the tree has these tokens already."""
        b = len(sequence.path)
        parent = sequence.path[-1] if b else sequence.root
        assert parent is not None, "a sequence of its own has no place in the tree"
        tokens = tuple(sequence.tokens[b * BLOCK_TOKENS :])
        if any(c.tokens[: len(tokens)] == tokens and min(c.blocks) >= 0 for c in parent.children.values()):
            return
        node = self._insert(parent, tokens)
        for group in self._groups:
            known = node.blocks[group.index]
            if known >= 0:
                group.disown(known)
            mine = int(sequence.tables[group.index][b])
            node.blocks[group.index] = mine
            group.owner[mine] = node

    def _insert(self, parent: Node, tokens: tuple[int, ...]) -> Node:
        """A child of ``parent``, in place of the ends that it continues."""
        for child in list(parent.children.values()):
            if len(child.tokens) < len(tokens) and tokens[: len(child.tokens)] == child.tokens:
                self._cut(child)
        return parent.children.setdefault(tokens, Node(parent, tokens, len(self._groups)))

    def _slide(self, sequence: Sequence, group: BlockGroup, position: int | None = None) -> None:
        """Let go of the blocks that no position from the next one on, or the one given, looks at."""
        needed = group.first_needed(sequence.n_held if position is None else position)
        first = min(needed, sequence.end[group.index])
        table = sequence.tables[group.index]
        kept = group.first_needed(sequence.checkpoint)  # of the window at the mark
        for b in range(max(sequence.first[group.index], int(group.is_newest)), first):
            marked = kept <= b < n_blocks_of(sequence.checkpoint)
            group.drop(int(table[b]), soon=not marked)
            table[b] = -1
        sequence.first[group.index] = max(first, sequence.first[group.index])

    def _take(self, group: BlockGroup) -> int:
        """A block for one user: a free one, or the one that was left alone longest."""
        if not group.free:
            self._evict(group)
        block = group.free.pop()
        group.references[block] = 1
        return block

    def _evict(self, group: BlockGroup) -> None:
        block = next(iter(group.unused))
        node = group.owner[block]
        assert node is not None, "an unused block without an owner"
        if group is self._states:
            node.snapshots = {rest: slot for rest, slot in node.snapshots.items() if slot != block}
        elif not group.window or (group.is_newest and node.is_first):
            self._cut(node)  # nothing after it can be reached without it
            return
        else:
            node.blocks[group.index] = -1
        group.disown(block)
        self._prune(node)

    def _prune(self, node: Node) -> None:
        """Take a node out of the tree when it is of no use, then those above it."""
        while node.parent is not None and node.holds_nothing:
            if node.parent.children.get(node.tokens) is node:
                del node.parent.children[node.tokens]
            node = node.parent

    def _cut(self, node: Node) -> None:
        """Take a node and everything below it out of the tree."""
        if node.parent is not None:
            node.parent.children.pop(node.tokens, None)
        for below in subtree(node):
            for group in self._groups:
                if below.blocks[group.index] >= 0:
                    group.disown(below.blocks[group.index])
                    below.blocks[group.index] = -1
            for slot in below.snapshots.values():
                assert self._states is not None
                self._states.disown(slot)
            below.snapshots.clear()


def _common(a: SequenceOf[int], b: SequenceOf[int]) -> int:
    """Length of the common beginning."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))
