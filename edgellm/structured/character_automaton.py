"""Automata over characters, as far as a grammar's lexemes must be compared: can one go on where another has ended?"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from edgellm.formats.errors import ParameterError

MAX_CHAR = 0x10FFFF
MAX_STATES = 20_000
MAX_PAIRS = 200_000

Ranges = tuple[tuple[int, int], ...]


@dataclass
class Automaton:
    """A nondeterministic automaton: state 0 begins, state 1 accepts.

    steps   state -> (ranges of characters, next state)
    empty   state -> states that are reached without a character
    """

    steps: list[list[tuple[Ranges, int]]] = field(default_factory=lambda: [[], []])
    empty: list[list[int]] = field(default_factory=lambda: [[], []])

    @classmethod
    def of(cls, node: Any, chars: type, seq: type, alt: type) -> Automaton:
        """That of a tree of these three and of repetitions (``part``, ``least``, ``most``)."""
        automaton = cls()
        automaton._add(node, 0, 1, (chars, seq, alt))
        return automaton

    def _state(self) -> int:
        if len(self.steps) >= MAX_STATES:
            raise ParameterError(
                f"A part of the grammar needs more than {MAX_STATES} states. Repeat less.", code="GRAMMAR"
            )
        self.steps.append([])
        self.empty.append([])
        return len(self.steps) - 1

    def _add(self, node: Any, start: int, end: int, kinds: tuple[Any, Any, Any]) -> None:
        chars, seq, alt = kinds
        if isinstance(node, chars):
            self.steps[start].append((node.ranges, end))
        elif isinstance(node, alt):
            for part in node.parts:
                self._add(part, start, end, kinds)
        elif isinstance(node, seq):
            for part in node.parts:
                after = self._state()
                self._add(part, start, after, kinds)
                start = after
            self.empty[start].append(end)
        else:
            self._repeat(node, start, end, kinds)

    def _repeat(self, node: Any, start: int, end: int, kinds: tuple[Any, Any, Any]) -> None:
        for _ in range(node.least):
            after = self._state()
            self._add(node.part, start, after, kinds)
            start = after
        for _ in range((node.most or node.least) - node.least):
            self.empty[start].append(end)
            after = self._state()
            self._add(node.part, start, after, kinds)
            start = after
        if node.most is None:  # a state of its own: nothing else may come back to where the loop begins
            loop = self._state()
            self.empty[start].append(loop)
            self._add(node.part, loop, loop, kinds)
            start = loop
        self.empty[start].append(end)

    def closed(self, states: Iterable[int]) -> frozenset[int]:
        """These states and all that are reached from them without a character."""
        found, todo = set(states), list(states)
        while todo:
            for state in self.empty[todo.pop()]:
                if state not in found:
                    found.add(state)
                    todo.append(state)
        return frozenset(found)

    @property
    def nullable(self) -> bool:
        """Whether it accepts the empty text."""
        return 1 in self.closed((0,))

    @property
    def first(self) -> set[tuple[int, int]]:
        """Ranges of the characters that it may begin with."""
        return {span for state in self.closed((0,)) for ranges, _ in self.steps[state] for span in ranges}


def meet(left: Iterable[tuple[int, int]], right: Iterable[tuple[int, int]]) -> bool:
    """Whether two sets of ranges share a character."""
    return any(a <= d and c <= b for a, b in left for c, d in right)


def runs_over(shorter: Automaton, longer: Automaton, followers: set[tuple[int, int]]) -> bool:
    """Whether ``longer`` may go on with a follower where ``shorter`` has just ended behind the same text."""
    todo = [(p, q) for p in shorter.closed((0,)) for q in longer.closed((0,))]
    seen = set(todo)
    while todo:
        p, q = todo.pop()
        for ranges, after in shorter.steps[p]:
            for other, beyond in longer.steps[q]:
                if not meet(ranges, other):
                    continue
                ends, reached = shorter.closed((after,)), longer.closed((beyond,))
                if 1 in ends and any(meet(step, followers) for state in reached for step, _ in longer.steps[state]):
                    return True
                new = {(a, b) for a in ends for b in reached} - seen
                seen |= new
                todo.extend(new)
        if len(seen) > MAX_PAIRS:
            return True
    return False
