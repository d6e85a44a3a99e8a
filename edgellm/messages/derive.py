"""How a model writes messages, seen from what its chat template makes of some that are known.

Names, keys and values of the probes occur nowhere else, so what lies between them are the template's markers. What is
the same before the first call and between two belongs to each call, the rest to all of them together.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from typing import Any

from edgellm.messages.probes import (
    ARGUMENTS,
    CONTENT,
    IDS,
    KEYS,
    NAMES,
    REASONING,
    THINKING,
    VALUES,
    Probes,
    call,
    common_head,
    common_tail,
    tags,
)
from edgellm.messages.shapes import PYTHON, CallForm, Dialect, Field, Middle, Pair

TYPED: dict[str, Any] = {
    "integer": 7171,
    "number": 71.5,
    "boolean": True,
    "null": None,
    "object": {"z": 1},
    "array": [7171],
}
MIRRORED = re.compile(r"</([^<>]+)>")


@dataclass
class Span:
    """Where a call stands in a text, and the form it shows."""

    start: int
    end: int
    form: CallForm


# -- reasoning and content -----------------------------------------------------------------------------------------


def derive_reasoning(probes: Probes) -> Pair | None:
    """The markers of the reasoning; None where the template shows none."""
    for arguments in THINKING:
        for content, calls in ((CONTENT, ()), ("", (call(0, ARGUMENTS),))):
            answer = probes.answer(content, calls, REASONING, **arguments)
            if answer is not None and REASONING in answer:
                return _reasoning_of(probes, answer)
    return None


def _reasoning_of(probes: Probes, answer: str) -> Pair | None:
    before, _, after = answer.partition(REASONING)
    close = next((tag for tag in tags(after) if not tag.isspace()), "")
    if mirrored := MIRRORED.fullmatch(close):
        found = before.rfind(f"<{mirrored[1]}>")
        return Pair(before[found:], _with_blanks(after, close)) if found >= 0 else None
    opened = before[len(common_head(before, common_head(probes.before, probes.prompt))) :]
    if not opened.strip() or close in probes.ends or not close.startswith("<"):
        return None
    return Pair(opened, _with_blanks(after, close))


def _with_blanks(text: str, tag: str) -> str:
    """A tag with the blanks before and behind it."""
    end = text.index(tag) + len(tag)
    return text[: end + len(text[end:]) - len(text[end:].lstrip())]


def derive_content(probes: Probes, reasoning: Pair | None) -> Pair | None:
    """The markers of the content, of models that have some."""
    head = probes.before[len(common_head(probes.before, probes.prompt)) :]
    for marker in reasoning or ():
        head = head.replace(marker.strip(), "") if marker.strip() else head
    close = next((tag for tag in tags(probes.after) if not tag.isspace()), "")
    opened = head.strip()
    if opened.startswith("<") and opened.endswith(">") and "assistant" not in opened.lower() and close:
        return Pair(opened, close)
    return None


# -- calls ---------------------------------------------------------------------------------------------------------


def derive_calls(probes: Probes) -> CallForm | None:
    """How calls are written; None where the template leaves them out or writes them in no form that is known here."""
    answer = probes.answer("", (call(0, ARGUMENTS),))
    one = probes.written(answer)[1] if answer is not None else ""
    first = find_call(one, 0)
    if first is None:
        return None
    turned = probes.written(probes.answer("", (call(0, dict(reversed(ARGUMENTS.items()))),)) or "")[1]
    form = replace(first.form, sorts=0 <= turned.find(KEYS[0]) < turned.find(KEYS[1]))
    answer = probes.answer("", (call(0, ARGUMENTS), call(1, ARGUMENTS)))
    two = probes.written(answer)[1] if answer is not None else ""
    second = find_call(two, 1)
    if form.mode == "tagged":
        form = replace(form, middles=_middles(probes, form))
    if form.listed:
        return replace(form, section=Pair(one[: first.start].lstrip(), one[first.end :].rstrip()))
    if second is None:
        each = Pair(one[: first.start].lstrip(), one[first.end :].rstrip())
        return replace(form, each=each, one=True)
    first = find_call(two, 0)
    if first is None or first.end > second.start:
        return None
    return _each_and_section(form, two[: first.start], two[first.end : second.start], two[second.end :])


def _each_and_section(form: CallForm, head: str, between: str, tail: str) -> CallForm:
    """What stands before, between and behind two calls: the markers of each, and those of all."""
    opened = common_tail(between, head)
    rest = between[: len(between) - len(opened)]
    closed = common_head(rest, tail)
    middle = rest[len(closed) :]
    section = Pair(head[: len(head) - len(opened)].lstrip(), tail[len(closed) :].rstrip())
    blanks = middle + opened[: len(opened) - len(opened.lstrip())]
    if not opened.strip():
        section, opened = Pair(section.open + opened, section.close), ""
    if not closed.strip():
        section, blanks, closed = Pair(section.open, closed + section.close), closed + blanks, ""
    return replace(form, section=section, each=Pair(opened.lstrip(), closed.rstrip()), between=blanks)


def find_call(text: str, number: int) -> Span | None:
    """The call of a probe in a text."""
    name = text.find(NAMES[number])
    if name < 0:
        return None
    after = name + len(NAMES[number])
    for read in (_json_call, _python_call, _header_call, _dialect_call, _tagged_call):
        if (found := read(text, number, name, after)) is not None:
            return found
    return None


def _json_call(text: str, number: int, name: int, after: int) -> Span | None:
    """The outermost JSON that has the name in it."""
    for start in [at for at in range(name) if text[at] in "{["]:
        try:
            found, size = json.JSONDecoder().raw_decode(text[start:])
        except (ValueError, RecursionError):
            continue
        if start + size < after:
            continue
        calls = found if isinstance(found, list) else [found]
        keys = next((keys for entry in calls if (keys := _keys(entry, number))), None)
        if keys is None:
            return None
        form = CallForm("json", keys=keys, number=_number(calls[0]), listed=isinstance(found, list))
        return Span(start, start + size, form)
    return None


def _number(entry: Any) -> str:
    """The key that an object begins with, where a number stands under it."""
    key, value = next(iter(entry.items())) if isinstance(entry, dict) and entry else ("", "")
    return key if str(value).isdigit() else ""


def _keys(entry: Any, number: int) -> tuple[str, str, str] | None:
    """The keys of name, arguments and id in an object."""
    if not isinstance(entry, dict):
        return None
    if entry.get(NAMES[number]) == ARGUMENTS:
        return "", "", ""
    of = {value: key for key, value in entry.items() if isinstance(value, str)}
    arguments = [key for key, value in entry.items() if value == ARGUMENTS]
    if NAMES[number] not in of or not arguments:
        return None
    return of[NAMES[number]], arguments[0], of.get(IDS[number], "")


def _python_call(text: str, number: int, name: int, after: int) -> Span | None:
    """[name(key='value'), ...]"""
    found = re.match(rf"\(\s*{KEYS[0]}\s*=\s*['\"]", text[after:])
    start, end = text.rfind("[", 0, name), text.find(")]", after)
    if not found or start < 0 or end < 0:
        return None
    return Span(start, end + 2, CallForm("python", listed=True, dialect=PYTHON))


def _head_before(text: str, name: int, after: int, stop: int, number: int) -> tuple[int, tuple[Field, ...]]:
    """Where a head begins, and its fields: the name, and the id where it is written there too."""
    before, behind = text.rfind(IDS[number], 0, name), text.find(IDS[number], after, stop)
    if before >= 0:
        return before, (Field("id", text[before + len(IDS[number]) : name]), Field("name", text[after:stop]))
    if behind >= 0:
        rest = behind + len(IDS[number])
        return name, (Field("name", text[after:behind]), Field("id", text[rest:stop]))
    if counted := re.match(rf":{number}(?=\D)", text[after:stop]):
        return name, (Field("name", ":"), Field("", text[after + counted.end() : stop]))
    return name, (Field("name", text[after:stop]),)


def _header_call(text: str, number: int, name: int, after: int) -> Span | None:
    """The name, a marker, the arguments as JSON."""
    start = text.find("{", after)
    try:
        found, size = json.JSONDecoder().raw_decode(text[start:]) if start >= 0 else (None, 0)
    except (ValueError, RecursionError):
        return None
    if found != ARGUMENTS:
        return None
    begin, head = _head_before(text, name, after, start, number)
    return Span(begin, start + size, CallForm("header", head=head))


def _dialect_call(text: str, number: int, name: int, after: int) -> Span | None:
    """name{key:<quote>value<quote>}"""
    found = re.match(rf"\{{{KEYS[0]}:(\S+?){VALUES[0]}", text[after:])
    if found is None:
        return None
    end = text.find(f"{VALUES[1]}{found[1]}}}", after)
    if end < 0:
        return None
    dialect = Dialect(quotes=(found[1],), escapes=False, bare_keys=True, constants=PYTHON.constants)
    form = CallForm("header", head=(Field("name", ""),), dialect=dialect)
    return Span(name, end + len(VALUES[1] + found[1]) + 1, form)


def _tagged_call(text: str, number: int, name: int, after: int) -> Span | None:
    """A marker, the key, a marker and the value for each argument; the end lies behind the last one's marker."""
    places, at = [], after
    for needle in (KEYS[0], VALUES[0], KEYS[1], VALUES[1]):
        if (found := text.find(needle, at)) < 0:
            return None
        at = found + len(needle)
        places.append((found, at))
    (key, key_end), (value, value_end), (next_key, _), (_, last) = places
    behind, between = text[after:key], text[value_end:next_key]
    opened = common_tail(between, behind).lstrip()
    closed = common_head(between[: len(between) - len(opened)], text[last:]).rstrip()
    begin, head = _head_before(text, name, after, key - len(opened), number)
    if not opened or not closed or not text[key_end:value].strip():
        return None
    form = CallForm("tagged", head=head, argument=Pair(opened, closed))
    return Span(begin, last + len(closed), replace(form, middles=(Middle(text[key_end:value]),)))


def _middles(probes: Probes, form: CallForm) -> tuple[Middle, ...]:
    """What stands between key and value for each type, where the types differ in it."""
    plain = form.middles[0].text
    kinds: dict[str, list[str]] = {plain: ["string"]}
    for kind, value in TYPED.items():
        answer = probes.answer("", (call(0, {KEYS[0]: value}),))
        text = (answer or "").rpartition(NAMES[0])[2]
        at = text.find(KEYS[0]) + len(KEYS[0])
        if answer is None or text.find(KEYS[0]) < 0:
            continue
        shown = (json.dumps(value), str(value))
        places = [place for written in shown if (place := text.find(written, at)) >= 0]
        middle = plain if text.startswith(plain, at) else text[at : min(places, default=at)]
        if middle.strip():
            kinds.setdefault(middle, []).append(kind)
    if len(kinds) == 1:
        return (Middle(plain),)
    return tuple(Middle(text, tuple(named)) for text, named in kinds.items())
