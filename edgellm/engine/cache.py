"""Who owns which block of the KV pool: sequences, and a tree of blocks that can be found again by their tokens.

A sequence has one block table for each attention window of the model. Blocks are counted references: when a block of
32 tokens is full it enters the prefix tree, where a later sequence that begins with the same tokens shares it. A block
that nobody uses stays findable until its place is needed; the one left alone longest goes first. Blocks are never
written once they are shared: a sequence that parts from a known one in the middle of a block gets a copy.

Layers with a sliding window keep only their window. A prefix of length p is known again if every group still holds
what position p looks at.

Nothing here computes. One thread at a time; the engine sees to that.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

import numpy as np

from edgellm.formats.errors import ContextFullError
from edgellm.kernels.kv import BLOCK_TOKENS, CacheLayer, CachePool, groups_of

SPARE_WINDOWS = 3  # kept ends of other prompts, for a layer group with a sliding window
SNAPSHOTS = 32  # kept states of other positions


def n_blocks_of(n_tokens: int) -> int:
    """Blocks that hold n tokens."""
    return -(-n_tokens // BLOCK_TOKENS)


def pool_blocks(layers: SequenceOf[CacheLayer], n_ctx: int, max_tokens: int, n_parallel: int = 1) -> tuple[int, ...]:
    """Blocks that each group of layers needs for ``n_parallel`` sequences of ``n_ctx`` tokens at once.

    Full attention: the whole contexts and one copied block. A window: the windows, the step that is being computed
    (``max_tokens`` of all sequences together), and room for the ends of a few other prompts, so that coming back to
    them costs nothing; never more than the whole.
    """
    whole = n_parallel * n_blocks_of(n_ctx) + 1
    counts = []
    for group in groups_of(layers):
        if group.kind == "all":
            counts.append(whole)
        elif group.kind == "window":
            live = n_parallel * (n_blocks_of(group.window) + 2) + n_blocks_of(max_tokens) + 1
            counts.append(min(whole, live + SPARE_WINDOWS * (n_blocks_of(group.window) + 1)))
        else:
            counts.append(2 * n_parallel + SNAPSHOTS)
    return tuple(counts)


class Node:
    """One block of tokens in the prefix tree; ``blocks[g]`` is where group g holds it, -1 where it does not.

    A node of fewer than 32 tokens is the end of a released sequence. It has no children, and is only copied from.
    """

    __slots__ = ("blocks", "children", "parent", "tokens")

    def __init__(self, parent: Node | None, tokens: tuple[int, ...], n_groups: int) -> None:
        self.parent = parent
        self.tokens = tokens
        self.children: dict[tuple[int, ...], Node] = {}
        self.blocks = [-1] * n_groups


class _Group:
    """The blocks of one window: which are free, how many sequences use each, which node of the tree has it."""

    def __init__(self, index: int, window: int, n_blocks: int) -> None:
        self.index = index
        self.window = window
        self.free = list(range(n_blocks - 1, -1, -1))
        self.references = [0] * n_blocks
        self.owner: list[Node | None] = [None] * n_blocks
        self.unused: OrderedDict[int, None] = OrderedDict()  # held by the tree alone, next to go first

    @property
    def n_available(self) -> int:
        return len(self.free) + len(self.unused)

    def share(self, block: int) -> None:
        if self.references[block] == 0:
            self.unused.pop(block, None)
        self.references[block] += 1

    def drop(self, block: int, *, soon: bool = False) -> None:
        """One user less. A block of the tree that nobody uses waits to be found again, in front when ``soon``."""
        assert self.references[block] > 0, "a block was dropped more often than shared"
        self.references[block] -= 1
        if self.references[block]:
            return
        if self.owner[block] is None:
            self.free.append(block)
        else:
            self.unused[block] = None
            if soon:
                self.unused.move_to_end(block, last=False)

    def disown(self, block: int) -> None:
        """The tree lets go of a block."""
        self.owner[block] = None
        if self.references[block] == 0:
            self.unused.pop(block, None)
            self.free.append(block)

    def first_needed(self, position: int) -> int:
        """The first block that a query at ``position`` looks at.

        The last full block counts as looked at even by a tiny window: it ties the sequence to the prefix tree.
        """
        if not self.window:
            return 0
        last_full = position // BLOCK_TOKENS - 1
        return max(0, min(last_full, (position - self.window + 1) // BLOCK_TOKENS))


@dataclass(eq=False)
class Sequence:
    """The tokens whose keys and values are held, and where. Changed by ``KVCache`` only.

    tokens     the ids of positions 0 .. length-1
    tables     one (max_blocks,) int32 array for each window: physical block of 32 positions, -1 where none is kept
    n_reused   tokens that were known when the sequence was opened
    """

    tables: tuple[np.ndarray, ...]
    shared: bool = True
    tokens: list[int] = field(default_factory=list)
    n_reused: int = 0
    closed: bool = False
    path: list[Node] = field(default_factory=list)  # the node of each full block, when shared
    first: list[int] = field(default_factory=list)  # first block kept, for each window
    end: list[int] = field(default_factory=list)  # one after the last block reserved, for each window
    checkpoint: int = 0

    @property
    def length(self) -> int:
        """Tokens held, and the position of the next one."""
        return len(self.tokens)


class KVCache:
    """Gives out the blocks of a pool to sequences of at most ``n_ctx`` tokens."""

    def __init__(self, pool: CachePool, n_ctx: int) -> None:
        self.pool = pool
        self.n_ctx = n_ctx
        self.max_blocks = n_blocks_of(n_ctx)
        self._groups = [_Group(i, g.window, n) for i, (g, n) in enumerate(zip(pool.groups, pool.n_blocks, strict=True))]
        self._root = Node(None, (), len(self._groups))

    def open(self, tokens: SequenceOf[int], *, shared: bool = True) -> Sequence:
        """A sequence that holds the longest known beginning of ``tokens``, but never all of them.

        The last token is always left to be computed, for its logits. ``shared=False`` gives a sequence that neither
        takes from the tree nor leaves anything in it.
        """
        tables = tuple(np.full(self.max_blocks, -1, np.int32) for _ in self._groups)
        sequence = Sequence(tables, shared=shared, first=[0] * len(self._groups), end=[0] * len(self._groups))
        if shared:
            for length, path, source in self._matches(tuple(tokens[: self.n_ctx]), len(tokens) - 1):
                if self._adopt(sequence, length, path, source):
                    sequence.tokens = list(tokens[:length])
                    sequence.n_reused = length
                    break
        return sequence

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
        end = n_blocks_of(sequence.length + n)
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
        for group in self._groups:
            table = sequence.tables[group.index]
            for b in range(sequence.end[group.index], end):
                table[b] = self._take(group)
            sequence.end[group.index] = max(end, sequence.end[group.index])

    def commit(self, sequence: Sequence, tokens: SequenceOf[int]) -> None:
        """The keys and values of ``tokens`` are computed and stored: full blocks become findable."""
        assert not sequence.closed, "commit() on a released sequence"
        sequence.tokens.extend(tokens)
        assert all(n_blocks_of(sequence.length) <= end for end in sequence.end), "commit() without reserve()"
        if sequence.shared:
            while (len(sequence.path) + 1) * BLOCK_TOKENS <= sequence.length:
                self._publish(sequence)

    def mark(self, sequence: Sequence) -> None:
        """Another sequence will likely part from this one here: what is in the windows now is kept longer."""
        sequence.checkpoint = sequence.length

    def release(self, sequence: Sequence, *, keep: bool = True) -> None:
        """The sequence is over; its blocks stay findable until their place is needed. May be called twice.

        ``keep=False`` makes everything that begins as this sequence does unknown (its values cannot be trusted).
        """
        if sequence.closed:
            return
        sequence.closed = True
        if not keep and sequence.path:
            self._cut(sequence.path[0])
        elif keep and sequence.shared and sequence.length % BLOCK_TOKENS:
            self._publish_end(sequence)
        for group in self._groups:
            table = sequence.tables[group.index]
            # the deepest first: a block is of no use without those before it
            for b in range(sequence.end[group.index] - 1, sequence.first[group.index] - 1, -1):
                group.drop(int(table[b]))
            table[:] = -1
        sequence.path.clear()

    def put_back(self, tokens: SequenceOf[int], first: SequenceOf[int], fill: Callable[[int, int, int], None]) -> int:
        """Make blocks findable that were computed elsewhere; how many of ``tokens`` are known then.

        first   for each window group the first block that there is; those before lie outside the window
        fill    called with (group, block of the sequence, target): write that block into the pool
        """
        held: list[tuple[_Group, int]] = []  # in use until the end: none may take the place of another
        node, n_known = self._root, 0
        for b in range(n_blocks_of(len(tokens))):
            part = tuple(tokens[b * BLOCK_TOKENS : (b + 1) * BLOCK_TOKENS])
            child = node.children.get(part)
            there = [group for group in self._groups if b >= first[group.index]]
            if not all(group.n_available or (child and child.blocks[group.index] >= 0) for group in there):
                break
            child = child or self._insert(node, part)
            for group in there:
                block = child.blocks[group.index]
                if block >= 0:
                    group.share(block)
                else:
                    block = child.blocks[group.index] = self._take(group)
                    group.owner[block] = child
                    fill(group.index, b, block)
                held.append((group, block))
            node, n_known = child, n_known + len(part)
        for group, block in reversed(held):  # the deepest goes first, as in release()
            group.drop(block)
        return n_known

    def blocks(self, sequence: Sequence) -> list[list[int]]:
        """For each group the blocks that hold the sequence, from ``sequence.first`` on."""
        end = n_blocks_of(sequence.length)
        return [table[first:end].tolist() for table, first in zip(sequence.tables, sequence.first, strict=True)]

    def n_used(self) -> tuple[int, ...]:
        """Blocks of each window group that sequences in use hold."""
        return tuple(len(g.references) - g.n_available for g in self._groups)

    def check(self, live: SequenceOf[Sequence]) -> None:
        """Count everything anew and compare (for tests): ``live`` are all the sequences in use."""
        nodes = list(_subtree(self._root))
        for group in self._groups:
            users = [0] * len(group.references)
            for sequence in live:
                table = sequence.tables[group.index]
                for b in range(self.max_blocks):
                    held = sequence.first[group.index] <= b < sequence.end[group.index]
                    assert (table[b] >= 0) == held, "a table and its bounds disagree"
                    if held:
                        users[int(table[b])] += 1
            assert users == group.references, "reference counts are wrong"
            owners = {n.blocks[group.index]: n for n in nodes if n.blocks[group.index] >= 0}
            assert owners == {b: n for b, n in enumerate(group.owner) if n is not None}, "tree and owners disagree"
            unused = {b for b in owners if not users[b]}
            assert unused == set(group.unused), "the list of unused blocks is wrong"
            free = {b for b in range(len(users)) if not users[b] and b not in owners}
            assert len(group.free) == len(free) and free == set(group.free), "the list of free blocks is wrong"

    # -- finding ---------------------------------------------------------------------------------------------------

    def _matches(self, tokens: tuple[int, ...], limit: int) -> Iterator[tuple[int, list[Node], Node | None]]:
        """Known beginnings of at most ``limit`` tokens, longest first: length, nodes of the full blocks, and the
        node that holds the rest of the last block."""
        path: list[Node] = []
        node, start = self._root, 0
        while start + BLOCK_TOKENS <= limit:
            child = node.children.get(tokens[start : start + BLOCK_TOKENS])
            if child is None:
                break
            path.append(child)
            node, start = child, start + BLOCK_TOKENS
        reach = [self._reach(group, path) for group in self._groups]
        rest = tokens[start:limit]
        ends = [(_common(child.tokens, rest), child) for child in node.children.values()]
        for n, child in sorted(((n, c) for n, c in ends if n), key=lambda end: -end[0]):
            if all(self._held(group, reach[group.index], path, child, start + n) for group in self._groups):
                yield start + n, path, child
        for depth in range(len(path), 0, -1):
            length = depth * BLOCK_TOKENS
            if all(self._held(group, reach[group.index], path[:depth], None, length) for group in self._groups):
                yield length, path[:depth], None

    def _reach(self, group: _Group, path: list[Node]) -> list[int]:
        """For each block of the path, the first of the unbroken run of held blocks that ends in it."""
        reach: list[int] = []
        for b, node in enumerate(path):
            unbroken = b and path[b - 1].blocks[group.index] >= 0
            reach.append(reach[-1] if unbroken else b)
            if node.blocks[group.index] < 0:
                reach[-1] = b + 1
        return reach

    def _held(self, group: _Group, reach: list[int], path: list[Node], source: Node | None, length: int) -> bool:
        """Whether the group has every block that a query at position ``length`` looks at."""
        first = group.first_needed(length)
        if source is not None and source.blocks[group.index] < 0:
            return False
        if first >= len(path):  # all of it lies in the source
            return True
        return path[-1].blocks[group.index] >= 0 and reach[len(path) - 1] <= first

    def _adopt(self, sequence: Sequence, length: int, path: list[Node], source: Node | None) -> bool:
        """Share the blocks of the path, copy the source. False when there is no block to copy to."""
        for group in self._groups:
            i = group.index
            sequence.first[i] = group.first_needed(length)
            sequence.end[i] = len(path)
            for b in range(sequence.first[i], len(path)):
                sequence.tables[i][b] = path[b].blocks[i]
                group.share(path[b].blocks[i])
            if source is not None:
                group.share(source.blocks[i])  # must not be given away as the target of its own copy
        possible = source is None or all(group.n_available for group in self._groups)
        for group in self._groups:
            i = group.index
            if source is not None:
                if possible:
                    sequence.tables[i][len(path)] = target = self._take(group)
                    self.pool.copy_block(i, source.blocks[i], target)
                    sequence.end[i] += 1
                group.drop(source.blocks[i])
            if not possible:
                for b in range(sequence.first[i], sequence.end[i]):
                    group.drop(int(sequence.tables[i][b]))
                sequence.tables[i][:] = -1
                sequence.first[i] = sequence.end[i] = 0
        if possible:
            sequence.path = list(path)
        return possible

    # -- the tree --------------------------------------------------------------------------------------------------

    def _publish(self, sequence: Sequence) -> None:
        """Put the next full block of the sequence into the tree, or take the one that is there already."""
        b = len(sequence.path)
        parent = sequence.path[-1] if b else self._root
        tokens = tuple(sequence.tokens[b * BLOCK_TOKENS : (b + 1) * BLOCK_TOKENS])
        node = parent.children.get(tokens)
        if node is None:
            node = self._insert(parent, tokens)
        for group in self._groups:
            table = sequence.tables[group.index]
            mine, known = int(table[b]), node.blocks[group.index]
            if known < 0:
                node.blocks[group.index] = mine
                group.owner[mine] = node
            elif known != mine:
                table[b] = known
                group.share(known)
                group.drop(mine)
        sequence.path.append(node)

    def _publish_end(self, sequence: Sequence) -> None:
        """Leave the last, partly filled block findable, unless the tree has these tokens already."""
        b = len(sequence.path)
        parent = sequence.path[-1] if b else self._root
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

    def _slide(self, sequence: Sequence, group: _Group) -> None:
        """Let go of the blocks that no position from the next one on looks at."""
        first = min(group.first_needed(sequence.length), sequence.end[group.index])
        table = sequence.tables[group.index]
        kept = group.first_needed(sequence.checkpoint)  # of the window at the mark
        for b in range(sequence.first[group.index], first):
            marked = kept <= b < n_blocks_of(sequence.checkpoint)
            group.drop(int(table[b]), soon=not marked)
            table[b] = -1
        sequence.first[group.index] = max(first, sequence.first[group.index])

    def _take(self, group: _Group) -> int:
        """A block for one user: a free one, or the one that was left alone longest."""
        if not group.free:
            self._evict(group)
        block = group.free.pop()
        group.references[block] = 1
        return block

    def _evict(self, group: _Group) -> None:
        block = next(iter(group.unused))
        node = group.owner[block]
        assert node is not None, "an unused block without an owner"
        if not group.window:
            self._cut(node)  # nothing after it can be reached without it
            return
        node.blocks[group.index] = -1
        group.disown(block)
        while node.parent is not None and not node.children and max(node.blocks) < 0:
            self._cut(node)
            node = node.parent

    def _cut(self, node: Node) -> None:
        """Take a node and everything below it out of the tree."""
        if node.parent is not None:
            node.parent.children.pop(node.tokens, None)
        for below in _subtree(node):
            for group in self._groups:
                if below.blocks[group.index] >= 0:
                    group.disown(below.blocks[group.index])
                    below.blocks[group.index] = -1


def _subtree(node: Node) -> Iterator[Node]:
    """The node and all below it."""
    stack = [node]
    while stack:
        node = stack.pop()
        yield node
        stack.extend(node.children.values())


def _common(a: SequenceOf[int], b: SequenceOf[int]) -> int:
    """Length of the common beginning."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))
