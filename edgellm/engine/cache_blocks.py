"""The blocks of the cache's pool: which are free and who uses them, and the nodes of the tree that finds them again.

Sequences take blocks of a group, or slots, and give them back; a node of the tree owns those that are findable by their
tokens. What is to be shared or let go of is the affair of cache.py.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from edgellm.kernels.kv import BLOCK_TOKENS, CacheGroup


class Node:
    """One block of tokens in the prefix tree; ``blocks[g]`` is where group g holds it, -1 where it does not.

    A node of fewer than 32 tokens is the end of a released sequence. It has no children, and is only copied from.

    snapshots   up to 31 tokens that follow the block -> the slot with the state behind them
    users       sequences in use whose path it is on
    """

    __slots__ = ("blocks", "children", "parent", "snapshots", "tokens", "users")

    def __init__(self, parent: Node | None, tokens: tuple[int, ...], n_groups: int) -> None:
        self.parent = parent
        self.tokens = tokens
        self.children: dict[tuple[int, ...], Node] = {}
        self.blocks = [-1] * n_groups
        self.snapshots: dict[tuple[int, ...], int] = {}
        self.users = 0

    @property
    def is_first(self) -> bool:
        """Whether texts begin with it."""
        return self.parent is not None and self.parent.parent is None

    @property
    def holds_nothing(self) -> bool:
        """Whether the tree can do without it."""
        return not (self.children or self.snapshots or self.users or max(self.blocks, default=-1) >= 0)


class BlockGroup:
    """The blocks of a group of layers: which are free, how many sequences use each, which node of the tree has it.

    Of a group of states they are slots, and a node has one as a snapshot.
    """

    def __init__(self, index: int, group: CacheGroup, n_blocks: int) -> None:
        self.index = index
        self.window = group.window
        self.is_newest = group.kind == "newest"
        self.held, self.first_read = group.held, group.first_read
        self.free = list(range(n_blocks - 1, -1, -1))
        self.references = [0] * n_blocks
        self.owner: list[Node | None] = [None] * n_blocks
        self.unused: OrderedDict[int, None] = OrderedDict()  # held by the tree alone, next to go first

    @property
    def n_available(self) -> int:
        """Blocks that may be given away."""
        return len(self.free) + len(self.unused)

    def share(self, block: int) -> None:
        """One user more."""
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
        """The first block that a query at ``position`` looks at; of the newest ones number 0 beside it.

        The last full block counts as looked at even by a tiny window: it ties the sequence to the prefix tree. The
        newest blocks need not, for beside them there are those that are packed.
        """
        first = int(self.first_read(position))
        return first if self.is_newest else max(0, min(position // BLOCK_TOKENS - 1, first))


def subtree(node: Node) -> Iterator[Node]:
    """The node and all below it."""
    stack = [node]
    while stack:
        node = stack.pop()
        yield node
        stack.extend(node.children.values())
