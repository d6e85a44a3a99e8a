"""A conversation as a tree: every message has one parent, and the leaf says which branch is being read."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from edgellm.generation import TokenLogprob
from edgellm.sessions.records import LEFT_OUT

TITLE_LENGTH = 60  # characters of the first message
MAX_TITLE_TEXT = 10_000  # looked at for them
THINK, END_THINK = "<think>", "</think>"
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def new_id() -> int:
    """An id that no other program draws, fit for SQLite's 64 signed bits."""
    return secrets.randbits(62) + 1


@dataclass(eq=False)
class MessageNode:
    """One message. Only the last one of a path grows.

    tokens          of an answer, each with what the model thought likely in its place; empty for other messages
    finish_reason   as of ``GenerationChunk``; None while it grows, and for ever if the program was killed then
    timings         counts and times of the answer, as ``Timings.as_dict`` gives them
    """

    role: str
    text: str = ""
    parent: MessageNode | None = None
    model: str = ""
    finish_reason: str | None = None
    tokens: list[TokenLogprob] = field(default_factory=list)
    timings: dict[str, float] = field(default_factory=dict)
    children: list[MessageNode] = field(default_factory=list, repr=False)
    id: int = field(default_factory=new_id)
    created: float = field(default_factory=time.time)
    visited: MessageNode | None = field(default=None, repr=False)  # the child that was read last

    def path(self) -> list[MessageNode]:
        """The messages from the first one to this one."""
        nodes = [self]
        while (parent := nodes[-1].parent) is not None:
            nodes.append(parent)
        return nodes[::-1]

    def parts(self) -> tuple[str, str]:
        """(what it thought, what it said) of an answer with a thinking part between its marks."""
        head, opened, rest = self.text.partition(THINK)
        if opened and not head.strip():
            thought, closed, said = rest.partition(END_THINK)
            return thought.strip("\n"), said.lstrip("\n") if closed else ""
        thought, closed, said = self.text.partition(END_THINK)  # the template may have opened it
        if closed and self.role == "assistant":
            return thought.strip("\n"), said.lstrip("\n")
        return "", self.text


class MessageTree:
    """All messages of a session. ``leaf`` is the last message of the branch that is being read, None without one."""

    def __init__(self) -> None:
        self.roots: list[MessageNode] = []
        self.leaf: MessageNode | None = None

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __iter__(self) -> Iterator[MessageNode]:
        """Every message, each after its parent, in the order in which siblings came."""
        waiting = self.roots[::-1]
        while waiting:
            node = waiting.pop()
            yield node
            waiting += node.children[::-1]

    @property
    def path(self) -> list[MessageNode]:
        """The branch that is being read."""
        return self.leaf.path() if self.leaf is not None else []

    def add(self, role: str, text: str = "", parent: MessageNode | None = None, **fields: Any) -> MessageNode:
        """A new message behind ``parent`` (None: a first one); it becomes the leaf."""
        return self.attach(MessageNode(role, text, **fields), parent)

    def attach(self, node: MessageNode, parent: MessageNode | None) -> MessageNode:
        """Put a message that belongs nowhere yet behind ``parent``."""
        node.parent = parent
        self.siblings(node).append(node)
        self.select(node)
        return node

    def fill(self, nodes: Sequence[MessageNode], leaf: MessageNode | None = None) -> None:
        """Take messages with their parents, each after its own, and read the branch of ``leaf``, else of the last."""
        for node in nodes:
            self.siblings(node).append(node)
        for node in reversed(nodes):  # what came last was read last
            while (parent := node.parent) is not None and parent.visited is None:
                parent.visited, node = node, parent
        if nodes:
            self.select(leaf if leaf is not None else nodes[-1])

    def siblings(self, node: MessageNode) -> list[MessageNode]:
        """The messages in the same place, itself included."""
        return self.roots if node.parent is None else node.parent.children

    def select(self, node: MessageNode) -> None:
        """Read the branch that goes through ``node``, down to where it was left last."""
        for step in node.path():
            if step.parent is not None:
                step.parent.visited = step
        while node.children:
            node = node.visited if node.visited in node.children else node.children[-1]
        self.leaf = node

    def turn(self, node: MessageNode, step: int) -> MessageNode:
        """Go to the sibling ``step`` places on, round and round; gives it."""
        siblings = self.siblings(node)
        other = siblings[(siblings.index(node) + step) % len(siblings)]
        self.select(other)
        return other

    def cut(self, node: MessageNode) -> None:
        """Take a message and all that follows it out of the tree."""
        siblings = self.siblings(node)
        at = siblings.index(node)
        siblings.remove(node)
        if self.leaf is not None and node in self.leaf.path():
            if siblings:
                self.select(siblings[min(at, len(siblings) - 1)])
            else:
                self.leaf = node.parent


@dataclass
class Session:
    """A chat: its tree and what it was led with.

    title      given by the user; empty: taken from the first message
    model      the name it was last answered by
    system     the system message, "" for none
    settings   sampling fields and limits that the user set, over the model's own
    notes      what could not be taken of it when it was loaded
    """

    tree: MessageTree = field(default_factory=MessageTree)
    title: str = ""
    model: str = ""
    system: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    id: int = field(default_factory=new_id)
    created: float = field(default_factory=time.time)
    notes: list[str] = field(default_factory=list)

    @property
    def shown_title(self) -> str:
        """The title, or the beginning of the first message."""
        return self.title or title_of(next((node.text for node in self.tree.roots if node.role == "user"), ""))


def title_of(text: str) -> str:
    """The first words of a text on one line."""
    line = " ".join(_CONTROL.sub(" ", text[:MAX_TITLE_TEXT]).split())
    return line if len(line) <= TITLE_LENGTH else line[: TITLE_LENGTH - 1].rstrip() + "…"


def left_out_of(path: Sequence[MessageNode]) -> int:
    """How many of the messages the prompt of the last answer went without, those of the system not counted."""
    answer = next((node for node in reversed(path) if node.role == "assistant" and node.timings), None)
    return int(answer.timings.get(LEFT_OUT, 0)) if answer is not None else 0


def left_out_span(path: Sequence[MessageNode], left_out: int) -> range:
    """The places of the messages that a prompt goes without."""
    head = next((i for i, node in enumerate(path) if node.role != "system"), 0)
    return range(head, head + left_out)


def prompt_messages(system: str, path: Sequence[MessageNode], left_out: int = 0) -> list[dict[str, Any]]:
    """What a model is told of a branch: thinking parts under the name that templates know them by."""
    out = left_out_span(path, left_out)
    path = [*path[: out.start], *path[out.stop :]]
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    for node in path:
        thought, said = node.parts()
        message = {"role": node.role, "content": said}
        if thought:
            message["reasoning_content"] = thought
        messages.append(message)
    return messages
