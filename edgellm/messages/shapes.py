"""The parts that a model's way of writing messages is made of: markers, and where names and arguments stand.

A marker is literal text. Blanks in it and around it count for nothing, as models are loose with them: where a marker
has some, any number may stand.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple


class Pair(NamedTuple):
    """What stands before and behind a part of a message."""

    open: str
    close: str


NOTHING = Pair("", "")


@dataclass(frozen=True)
class Dialect:
    """How values are written.

    quotes      what begins and ends a string
    escapes     whether a backslash means something in one
    bare_keys   keys of objects stand without quotes
    constants   how true, false and null are spelled
    """

    quotes: tuple[str, ...] = ('"',)
    escapes: bool = True
    bare_keys: bool = False
    constants: dict[str, str] = field(default_factory=lambda: {"true": "true", "false": "false", "null": "null"})

    def __hash__(self) -> int:
        return hash((self.quotes, self.bare_keys))


JSON = Dialect()
PYTHON = Dialect(
    quotes=("'", '"'),
    constants={**JSON.constants, "True": "true", "False": "false", "None": "null"},
)


class Field(NamedTuple):
    """Something at the head of a call, and the marker behind it; "" where the arguments follow at once."""

    kind: Literal["name", "id", ""]
    close: str


class Middle(NamedTuple):
    """What stands between the name of an argument and its value, and what it says of the value.

    kinds   JSON types that are written behind it; () where it says nothing and the tool's schema decides
    """

    text: str
    kinds: tuple[str, ...] = ()


@dataclass(frozen=True)
class CallForm:
    """How calls are written: ``section.open (each.open CALL each.close)+ section.close``; any of these may be "".

    mode       "json"     CALL is an object with the name and the arguments under ``keys``; several may be a list.
                          The key of the name may be "": then the name is the key and the arguments its value
               "header"   ``head``, then the arguments as one object
               "tagged"   ``head``, then for each argument ``argument.open NAME middle VALUE argument.close``
               "python"   name(argument=value, ...); several are a list
    keys       JSON keys of name, arguments and id ("" where there is none)
    number     JSON key before that of the name under which the template counts the calls; "" where there is none
    listed     whether the template writes calls as a list
    between    blanks between two calls, for those who write them
    one        the template takes no second call
    sorts      it writes arguments in the order of their names
    id_of      how ids must look: the template of Kimi writes them in place of names
    """

    mode: Literal["json", "header", "tagged", "python"]
    section: Pair = NOTHING
    each: Pair = NOTHING
    keys: tuple[str, str, str] = ("name", "arguments", "")
    number: str = ""
    listed: bool = False
    between: str = ""
    head: tuple[Field, ...] = ()
    argument: Pair = NOTHING
    middles: tuple[Middle, ...] = ()
    dialect: Dialect = JSON
    one: bool = False
    sorts: bool = False
    id_of: str = ""

    @property
    def begin(self) -> str:
        """What every first call begins with; "" where nothing announces one."""
        return (self.section.open or self.each.open).strip()


class Header(NamedTuple):
    """A kind of header, by a regular expression; a group ``name`` is that of a call."""

    pattern: str
    kind: Literal["content", "reasoning", "call"]


class Channels(NamedTuple):
    """Messages in parts: ``start``, a header that begins with one of ``heads``, ``open``, the text of the part, and one
    of ``ends`` (Harmony).

    The generation prompt may have written the beginning of the first one. ``headers`` say by the first that matches
    what a part is; the text of a call is its arguments as JSON. ``call`` is the header that a grammar makes for one,
    ``thinks`` that of reasoning, ``says`` that of the answer. ``begins`` is what stands before the name in every header
    of a call, wherever that is; text may have it as well.
    """

    start: str
    heads: tuple[str, ...]
    open: str
    ends: tuple[str, ...]
    headers: tuple[Header, ...]
    call: Pair
    thinks: str = ""
    says: str = ""
    begins: str = ""


@dataclass(frozen=True)
class Shape:
    """What a reader needs to know of a model.

    reasoning   its markers; the generation prompt may have written the first one already
    content     what stands around the content, in models that mark it
    calls       None where the model has no form for calls that is known
    channels    in place of all that
    source      where it is from: "declared", "derived", "built-in" or "plain"
    takes_tools whether the template shows tools to the model
    """

    reasoning: Pair | None = None
    content: Pair | None = None
    calls: CallForm | None = None
    channels: Channels | None = None
    source: str = "plain"
    takes_tools: bool = True

    def opened_by(self, prompt: str) -> bool:
        """Whether the text of a prompt ends inside the reasoning."""
        return self.reasoning is not None and prompt.rstrip().endswith(self.reasoning.open.strip())

    def texts(self) -> list[str]:
        """All markers: tokens that spell a part of one are read, other control tokens are no text."""
        found = [*(self.reasoning or ()), *(self.content or ())]
        if self.channels is not None:
            found += [self.channels.start, *self.channels.heads, self.channels.open, *self.channels.ends]
            found += [*self.channels.call, self.channels.call.close.strip(), self.channels.thinks, self.channels.says]
        if (calls := self.calls) is not None:
            found += [*calls.section, *calls.each, *calls.argument, *calls.dialect.quotes]
            found += [*(field.close for field in calls.head), *(middle.text for middle in calls.middles)]
        return [text for text in found if text.strip()]

    @property
    def call_begins(self) -> str:
        """What tells that a call begins; "" where nothing does."""
        if self.channels is not None:
            return self.channels.begins or self.channels.call.open
        return self.calls.begin if self.calls is not None else ""

    @property
    def has_calls(self) -> bool:
        """Whether calls can be read."""
        headers = self.channels.headers if self.channels is not None else ()
        return self.calls is not None or any(header.kind == "call" for header in headers)


class Match(NamedTuple):
    """Where a marker was found: [start, end); ``end`` is -1 where the text ends inside it."""

    start: int
    end: int


def pieces(marker: str) -> tuple[str, ...]:
    """The parts of a marker between its blanks; one that is nothing but blanks is itself."""
    return tuple(marker.split()) or (marker,) * bool(marker)


def match_at(text: str, at: int, parts: tuple[str, ...]) -> Match | None:
    """A marker at exactly this place, whole or as far as the text goes."""
    start = at
    for number, part in enumerate(parts):
        while number and at < len(text) and text[at].isspace():
            at += 1
        if not text.startswith(part, at):
            cut = len(text) - at < len(part) and part.startswith(text[at:])
            return Match(start, -1) if cut else None
        at += len(part)
    return Match(start, at)


def find(text: str, at: int, markers: tuple[tuple[str, ...], ...], ended: bool = False) -> tuple[Match, int] | None:
    """The first of some markers from ``at`` on and its number: the longest of several at one place.

    One that the text stops inside of comes before all that begin later and before shorter ones at its place, until the
    text has ended.
    """
    starts = {parts[0][0] for parts in markers if parts}
    for start in range(at, len(text)):
        if text[start] not in starts:
            continue
        matches = ((match_at(text, start, parts), number) for number, parts in enumerate(markers) if parts)
        found = [(match, number) for match, number in matches if match and not (ended and match.end < 0)]
        if found:
            return min(found, key=lambda row: (row[0].end >= 0, -row[0].end))
    return None
