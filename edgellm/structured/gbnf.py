"""llama.cpp's grammar notation (GBNF) as Lark for llguidance, with the same language.

GBNF speaks of characters, llguidance of lexemes that a lexer cuts greedily. What does not refer to itself is regular
and becomes one lexeme as large as possible: a grammar without recursion is a single regular expression. Where two
lexemes could be cut in another place than the grammar means, the one that goes on too far is taken apart, in the end
into single characters, so that the parser decides and not the lexer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from edgellm.formats.errors import ParameterError, UnsupportedError
from edgellm.structured.character_automaton import MAX_CHAR, Automaton, Ranges, runs_over

MAX_REPEAT = 1 << 16
MAX_DEPTH = 64
MAX_PARTS = 50_000


class Chars(NamedTuple):
    """One character out of ranges of code points."""

    ranges: Ranges


class Seq(NamedTuple):
    """One after the other."""

    parts: tuple[Any, ...]


class Alt(NamedTuple):
    """One of these."""

    parts: tuple[Any, ...]


class Repeat(NamedTuple):
    """``least`` times or more, ``most`` at most; None: no end."""

    part: Any
    least: int
    most: int | None


class Ref(NamedTuple):
    """Another rule."""

    name: str


class Token(NamedTuple):
    """A token in llguidance's spelling: ``<think>``, ``<[7]>``, ``<[^7]>``."""

    text: str


class Lexeme(NamedTuple):
    """A regular part that the lexer cuts as one; ``part`` holds nothing but characters."""

    part: Any


def gbnf_to_lark(text: str) -> str:
    """The grammar in llguidance's Lark. ParameterError for what is no GBNF, by its line."""
    rules = _Reader(text).rules()
    if "root" not in rules:
        raise ParameterError(
            "The GBNF grammar has no rule named root. Name the one that is the whole answer.", code="GRAMMAR"
        )
    missing = {ref for body in rules.values() for ref in _refs(body)} - rules.keys()
    if missing:
        raise ParameterError(f"The GBNF grammar refers to {sorted(missing)[0]}, which has no rule.", code="GRAMMAR")
    return _Writer(rules).lark()


# -- reading -------------------------------------------------------------------------------------------------------

_NAME = re.compile(r"[\w-]+")
_BLANK = re.compile(r"(?:[ \t]|#[^\r\n]*)*")
_BLANK_LINES = re.compile(r"(?:\s|#[^\r\n]*)*")
_TOKEN = re.compile(r"(!?)<(\[[0-9]+\]|[^<>\s]+)>")
_COUNT = re.compile(r"\{\s*([0-9]+)\s*(?:(,)\s*([0-9]*)\s*)?\}")
_ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|(.))", re.DOTALL)
_ESCAPED = {"n": "\n", "r": "\r", "t": "\t"} | {c: c for c in '"\\[]-^./'}
_REPEATS: dict[str, tuple[int, int | None]] = {"*": (0, None), "+": (1, None), "?": (0, 1)}


class _Reader:
    def __init__(self, text: str) -> None:
        self.text, self.at, self.depth = text, 0, 0

    def rules(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        self.skip(_BLANK_LINES)
        while self.at < len(self.text):
            name = self.take(_NAME, "the name of a rule").group()
            self.skip(_BLANK)
            if not self.text.startswith("::=", self.at):
                raise self.wrong("::=")
            self.at += 3
            self.skip(_BLANK_LINES)
            found[name] = self.alternatives(_BLANK)
            if self.at < len(self.text) and self.text[self.at] not in "\r\n":
                raise self.wrong("the end of the rule")
            self.skip(_BLANK_LINES)
        return found

    def alternatives(self, blank: re.Pattern[str]) -> Any:
        parts = [self.sequence(blank)]
        while True:
            place = self.at
            self.skip(_BLANK_LINES)  # an alternative may begin on a line of its own
            if not self.text.startswith("|", self.at):
                self.at = place
                return Alt(tuple(parts)) if len(parts) > 1 else parts[0]
            self.at += 1
            self.skip(_BLANK_LINES)
            parts.append(self.sequence(blank))

    def sequence(self, blank: re.Pattern[str]) -> Any:
        parts = []
        while (part := self.item()) is not None:
            self.skip(blank)
            parts.append(self.repeated(part))
            self.skip(blank)
        return Seq(tuple(parts))

    def item(self) -> Any:
        here = self.text[self.at : self.at + 1]
        if here == '"':
            return self.literal()
        if here == "[":
            return self.char_class()
        if here == "(":
            self.at, self.depth = self.at + 1, self.depth + 1
            if self.depth > MAX_DEPTH:
                raise self.wrong(f"groups nested at most {MAX_DEPTH} deep")
            self.skip(_BLANK_LINES)
            inner = self.alternatives(_BLANK_LINES)
            if not self.text.startswith(")", self.at):
                raise self.wrong("a closing bracket")
            self.at, self.depth = self.at + 1, self.depth - 1
            return inner
        if here == ".":
            self.at += 1
            return Chars(((0, MAX_CHAR),))
        if here in ("<", "!"):
            return self.token()
        if (name := _NAME.match(self.text, self.at)) is not None:
            self.at = name.end()
            return Ref(name.group())
        return None

    def token(self) -> Token:
        negated, name = self.take(_TOKEN, "a token such as <think> or <[7]>").groups()
        if not negated:
            return Token(f"<{name}>")
        if not name.startswith("["):
            raise UnsupportedError(f"The GBNF grammar has !<{name}>. Write its id, as in !<[7]>.", code="GRAMMAR")
        return Token(f"<[^{name[1:-1]}]>")

    def literal(self) -> Seq:
        self.at += 1
        chars = []
        while not self.text.startswith('"', self.at):
            code = self.char()
            chars.append(Chars(((code, code),)))
        self.at += 1
        return Seq(tuple(chars))

    def char_class(self) -> Chars:
        self.at += 1
        negated = self.text.startswith("^", self.at)
        self.at += negated
        ranges = []
        while not self.text.startswith("]", self.at):
            low = high = self.char()
            if self.text.startswith("-", self.at) and not self.text.startswith("]", self.at + 1):
                self.at += 1
                high = self.char()
            if high < low:
                raise self.wrong("a range of characters from low to high")
            ranges.append((low, high))
        self.at += 1
        return Chars(_complement(ranges) if negated else tuple(sorted(ranges)))

    def char(self) -> int:
        if self.at >= len(self.text):
            raise self.wrong("more of a text or of a class of characters")
        if self.text[self.at] != "\\":
            self.at += 1
            return ord(self.text[self.at - 1])
        escape = self.take(_ESCAPE, "an escape such as \\n or \\x41")
        *codes, plain = escape.groups()
        code = next((int(code, 16) for code in codes if code), None)
        if code is None and plain in _ESCAPED:
            code = ord(_ESCAPED[plain])
        if code is None or code > MAX_CHAR:
            self.at = escape.start()
            raise self.wrong("an escape such as \\n or \\x41")
        return code

    def repeated(self, part: Any) -> Any:
        here = self.text[self.at : self.at + 1]
        if here in _REPEATS:
            self.at += 1
            return Repeat(part, *_REPEATS[here])
        if here != "{":
            return part
        least, comma, most = self.take(_COUNT, "a count such as {2} or {0,3}").groups()
        low, high = int(least), int(most) if most else None if comma else int(least)
        if (high is not None and high < low) or max(low, high or 0) > MAX_REPEAT:
            raise self.wrong(f"a count from low to high, at most {MAX_REPEAT}")
        return Repeat(part, low, high)

    def skip(self, blank: re.Pattern[str]) -> None:
        found = blank.match(self.text, self.at)
        self.at = found.end() if found else self.at

    def take(self, pattern: re.Pattern[str], expected: str) -> re.Match[str]:
        found = pattern.match(self.text, self.at)
        if found is None:
            raise self.wrong(expected)
        self.at = found.end()
        return found

    def wrong(self, expected: str) -> ParameterError:
        line, found = self.text.count("\n", 0, self.at) + 1, self.text[self.at : self.at + 20]
        return ParameterError(f"The GBNF grammar has {found!r} in line {line}. Expected {expected}.", code="GRAMMAR")


def _complement(ranges: list[tuple[int, int]]) -> Ranges:
    left, start = [], 0
    for low, high in sorted(ranges):
        if low > start:
            left.append((start, low - 1))
        start = max(start, high + 1)
    return tuple([*left, (start, MAX_CHAR)] if start <= MAX_CHAR else left)


# -- writing -------------------------------------------------------------------------------------------------------


def _parts(node: Any) -> tuple[Any, ...]:
    if isinstance(node, Repeat | Lexeme):
        return (node.part,)
    return node.parts if isinstance(node, Seq | Alt) else ()


def _refs(node: Any) -> Iterator[str]:
    if isinstance(node, Ref):
        yield node.name
    for part in _parts(node):
        yield from _refs(part)


def _has_token(node: Any) -> bool:
    return isinstance(node, Token) or any(map(_has_token, _parts(node)))


@dataclass
class _Writer:
    rules: dict[str, Any]
    split: set[Any] = field(default_factory=set)  # regular parts that must not be one lexeme
    n_parts: int = 0

    def lark(self) -> str:
        regular = self._regular_rules()
        bodies = {name: self._inlined(body, regular) for name, body in self.rules.items() if name not in regular}
        if "root" in regular:
            bodies = {"root": self._inlined(self.rules["root"], regular)}
        while True:
            trees = {name: self._cut(body) for name, body in bodies.items()}
            too_long = _runs_over(trees)
            if not too_long:
                return _text(trees)
            self.split |= too_long

    def _regular_rules(self) -> set[str]:
        """Rules that do not come back to themselves and hold no token."""
        regular: set[str] = set()
        while True:
            more = {
                name
                for name, body in self.rules.items()
                if name not in regular and set(_refs(body)) <= regular and not _has_token(body)
            }
            if not more:
                return regular
            regular |= more

    def _inlined(self, node: Any, regular: set[str], depth: int = 0) -> Any:
        """``node`` with the regular rules put in their places."""
        self.n_parts += 1
        if depth > 8 * MAX_DEPTH or self.n_parts > MAX_PARTS:
            raise ParameterError(
                f"The GBNF grammar is too large: its rules refer to one another more than {8 * MAX_DEPTH} deep, or "
                f"stand for more than {MAX_PARTS} parts in all. Use a smaller one.",
                code="GRAMMAR",
            )
        if isinstance(node, Ref):
            return self._inlined(self.rules[node.name], regular, depth + 1) if node.name in regular else node
        if isinstance(node, Seq | Alt):
            return node._replace(parts=tuple(self._inlined(part, regular, depth + 1) for part in node.parts))
        return node._replace(part=self._inlined(node.part, regular, depth + 1)) if isinstance(node, Repeat) else node

    def _cut(self, node: Any) -> Any:
        """``node`` with its largest regular parts as lexemes; neighbours in a sequence are one part."""
        if isinstance(node, Ref | Token):
            return node
        if _is_regular(node) and (isinstance(node, Chars) or node not in self.split):
            return Lexeme(node)
        if isinstance(node, Repeat):
            return node._replace(part=self._cut(node.part))
        if isinstance(node, Alt):
            return Alt(tuple(map(self._cut, node.parts)))
        joined: list[list[Any]] = []
        together = not _is_regular(node)  # a sequence that was taken apart stays so
        for part in node.parts:
            if together and joined and _is_regular(part) and _is_regular(joined[-1][-1]):
                joined[-1].append(part)
            else:
                joined.append([part])
        return Seq(tuple(self._cut(run[0] if len(run) == 1 else Seq(tuple(run))) for run in joined))


def _is_regular(node: Any) -> bool:
    return not isinstance(node, Ref | Token) and all(map(_is_regular, _parts(node)))


def _lexemes(node: Any) -> Iterator[Lexeme]:
    if isinstance(node, Lexeme):
        yield node
    else:
        for part in _parts(node):
            yield from _lexemes(part)


def _runs_over(trees: dict[str, Any]) -> set[Any]:
    """The parts whose lexeme could go on where another one, or itself, has ended and the grammar goes on."""
    lexemes = list(dict.fromkeys(lexeme for tree in trees.values() for lexeme in _lexemes(tree)))
    if len(lexemes) < 2 and not any(True for tree in trees.values() for _ in _refs(tree)):
        return set()
    automata = {lexeme: Automaton.of(lexeme.part, Chars, Seq, Alt) for lexeme in lexemes}
    followers = _followers(trees, automata)
    return {
        longer.part
        for longer in lexemes
        if not isinstance(longer.part, Chars)
        and any(runs_over(automata[lexeme], automata[longer], followers[lexeme]) for lexeme in lexemes)
    }


def _followers(trees: dict[str, Any], automata: dict[Lexeme, Automaton]) -> dict[Lexeme, set[tuple[int, int]]]:
    """Lexeme -> ranges of the characters that may come right behind it."""
    first: dict[str, tuple[set[tuple[int, int]], bool]] = {name: (set(), False) for name in trees}
    behind: dict[Any, set[tuple[int, int]]] = {name: set() for name in trees} | {lexeme: set() for lexeme in automata}

    def beginning(node: Any) -> tuple[set[tuple[int, int]], bool]:
        """What it may begin with, and whether it may be empty."""
        if isinstance(node, Lexeme):
            return set(automata[node].first), automata[node].nullable
        if isinstance(node, Ref):
            return first[node.name]
        if isinstance(node, Token):
            return set(), False
        if isinstance(node, Repeat):
            chars, empty = beginning(node.part)
            return chars, empty or not node.least
        found: set[tuple[int, int]] = set()
        for part in node.parts:
            chars, empty = beginning(part)
            found = found | chars
            if isinstance(node, Seq) and not empty:
                return found, False
        return found, isinstance(node, Seq) or any(beginning(part)[1] for part in node.parts)

    def walk(node: Any, after: set[tuple[int, int]]) -> None:
        if isinstance(node, Lexeme | Ref):
            behind[node if isinstance(node, Lexeme) else node.name] |= after
        elif isinstance(node, Repeat):
            walk(node.part, after if node.most == 1 else after | beginning(node.part)[0])
        elif isinstance(node, Alt):
            for part in node.parts:
                walk(part, after)
        elif isinstance(node, Seq):
            for part in reversed(node.parts):
                walk(part, after)
                chars, empty = beginning(part)
                after = chars | after if empty else chars

    def size() -> int:
        return sum(len(chars) + empty for chars, empty in first.values()) + sum(map(len, behind.values()))

    before = -1
    while before != size():
        before = size()
        for name, tree in trees.items():
            first[name] = beginning(tree)
            walk(tree, behind[name])
    return {lexeme: behind[lexeme] for lexeme in automata}


def _text(trees: dict[str, Any]) -> str:
    names = {name: f"r{i}" for i, name in enumerate(trees)} | {"root": "start"}
    terminals: dict[Any, str] = {}

    def written(node: Any) -> str:
        if isinstance(node, Token):
            return node.text
        if isinstance(node, Ref):
            return names[node.name]
        if isinstance(node, Lexeme):
            terminal = terminals.setdefault(node.part, f"T{len(terminals)}")
            return f"{terminal}?" if Automaton.of(node.part, Chars, Seq, Alt).nullable else terminal
        if isinstance(node, Repeat):
            return f"({written(node.part)}){{{node.least},{'' if node.most is None else node.most}}}"
        if not node.parts:
            return '""'
        return "(" + (" " if isinstance(node, Seq) else " | ").join(map(written, node.parts)) + ")"

    lines = [f"{names[name]}: {written(tree)}" for name, tree in trees.items()]
    lines += [f"{terminal}: /{_regex(part)}/" for part, terminal in terminals.items()]
    return "\n".join(["%llguidance {}", *lines])


def _regex(node: Any) -> str:
    if isinstance(node, Chars):
        if not node.ranges:
            return r"[^\x{0}-\x{10FFFF}]"
        return "[" + "".join(rf"\x{{{low:x}}}-\x{{{high:x}}}" for low, high in node.ranges) + "]"
    if isinstance(node, Repeat):
        return f"(?:{_regex(node.part)}){{{node.least},{'' if node.most is None else node.most}}}"
    return "(?:" + ("" if isinstance(node, Seq) else "|").join(map(_regex, node.parts)) + ")"
