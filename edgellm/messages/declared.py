"""The form that a checkpoint declares: transformers' ``response_template``, as far as markers can say it.

It is a table of regular expressions, and a stranger's: what is literal text, blanks and named fields in them becomes
markers, and nothing of a file is ever run as an expression. Whatever asks for more is refused, and the form is found
another way.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from edgellm.formats.errors import UnsupportedError
from edgellm.formats.json_text import parse_json
from edgellm.messages.shapes import JSON, PYTHON, CallForm, Dialect, Field, Middle, Pair, Shape

KEY = "tokenizer.response_template"  # of a GGUF file, as JSON text
MAX_PATTERN = 2000  # characters
REASONING = ("reasoning_content", "thinking", "reasoning")
_TOKEN = re.compile(
    r"\(\?P<(?P<group>\w+)>(?:[^()\\\[]|\\.|\[(?:[^\]\\]|\\.)*\])*\)"  # a named field, whatever it may hold
    r"|\\(?P<escaped>[^\w\s])"
    r"|(?P<blank>\\s[*+]\??|\\n\?|\\n[*+]?|\n|\[\\s\]\*)"
    r"|(?P<end>\$|\\Z)"
    r"|(?P<literal>[^\\\[\](){}.*+?^$|])"
)


class Piece(NamedTuple):
    """Literal text, or a named field."""

    text: str
    is_field: bool = False


def declared(template: str | Mapping[str, Any]) -> Shape:
    """The form of a ``response_template``; UnsupportedError for what it cannot be made of."""
    if isinstance(template, str):
        template = parse_json(template, KEY, "FORM")
    if not isinstance(template, Mapping) or template.get("version", 1) != 1:
        raise refused("its version")
    fields = template.get("fields")
    if not isinstance(fields, Mapping) or not all(isinstance(field, Mapping) for field in fields.values()):
        raise refused("its fields")
    if unknown := sorted(fields.keys() - {*REASONING, "content", "tool_calls"}):
        raise refused(f"the field {unknown[0]}")
    if "open" in fields.get("content", {}) or "open_pattern" in fields.get("content", {}):
        raise refused("text that is in no field")
    reasoning = next((fields[name] for name in REASONING if name in fields), None)
    calls = fields.get("tool_calls")
    return Shape(
        reasoning=_reasoning(reasoning) if reasoning is not None else None,
        calls=_calls(calls) if calls is not None else None,
        source="declared",
    )


def refused(what: str) -> UnsupportedError:
    """The error of a part that is not kept."""
    return UnsupportedError(f"The model's response_template has {what}, which edgellm cannot read.", code="FORM")


def _reasoning(field: Mapping[str, Any]) -> Pair:
    close = _literal(_first(field, "close"))
    pattern = field.get("open_pattern")
    if isinstance(pattern, str) and pattern.startswith("(?="):  # there is reasoning where it ends: the prompt opens it
        if not close.startswith("</"):
            raise refused("reasoning without a beginning")
        return Pair(f"<{close[2:].strip()}", close)
    return Pair(_literal(_first(field, "open")), close)


def _calls(field: Mapping[str, Any]) -> CallForm:
    opened, closed = _first(field, "open"), _literal(_first(field, "close"))
    content, arguments = field.get("content", "text"), field.get("content_args") or {}
    name, value = _transform(field)
    if content == "python-call-list":
        return CallForm("python", section=Pair(_literal(opened), closed), listed=True, dialect=PYTHON)
    if content == "json" and name.startswith("content") and value.startswith("content"):
        keys = name.partition(".")[2] or "name", value.partition(".")[2] or "arguments", ""
        return CallForm("json", each=Pair(_literal(opened), closed), keys=keys)
    if content == "json" and field.get("transform_each"):
        return CallForm("json", section=Pair(_literal(opened), closed), keys=(name, value, ""), listed=True)
    before, head = _head(opened, name)
    if value != "content":
        raise refused("a transform of another kind")
    if content == "json":
        return CallForm("header", each=Pair(before, closed), head=head, dialect=_dialect(arguments))
    if content == "xml-inline":
        argument, middle = _argument(str(arguments.get("tag_pattern", "")))
        if unfinished := re.search(r"<(\w+)=$", before):  # its end is left to the skipping of what matches nothing
            closed = f"\n</{unfinished[1]}>\n{closed}"
        return CallForm("tagged", each=Pair(before, closed), head=head, argument=argument, middles=(middle,))
    raise refused(f"calls of the kind {content}")


def _transform(field: Mapping[str, Any]) -> tuple[str, str]:
    """The names that the function's name and arguments come from."""
    function = (field.get("transform") or {}).get("function") if isinstance(field.get("transform"), Mapping) else None
    if function == "{content}" or (function is None and "transform" not in field):
        return "content", "content"
    if not isinstance(function, Mapping):
        raise refused("a transform of another kind")
    names = [str(function.get(key, "")) for key in ("name", "arguments")]
    if not all(re.fullmatch(r"\{[\w.]+\}", name) for name in names):
        raise refused("a transform of another kind")
    return names[0][1:-1], names[1][1:-1]


def _head(opened: Sequence[Piece], name: str) -> tuple[str, tuple[Field, ...]]:
    """What stands before the name of a call, and the name."""
    if [piece.is_field for piece in opened] not in ([False, True], [False, True, False]) or opened[1].text != name:
        raise refused("a beginning of calls of another kind")
    return opened[0].text, (Field("name", opened[2].text if len(opened) > 2 else ""),)


def _argument(pattern: str) -> tuple[Pair, Middle]:
    """The markers of an argument."""
    pieces = next(iter(_alternatives(pattern)))
    if [piece.text if piece.is_field else "" for piece in pieces] != ["", "key", "", "value", ""]:
        raise refused("arguments of another kind")
    return Pair(pieces[0].text, pieces[4].text), Middle(pieces[2].text)


def _dialect(arguments: Mapping[str, Any]) -> Dialect:
    delimiters = arguments.get("string_delims") or []
    if not delimiters:
        return JSON
    pairs = [tuple(pair) for pair in delimiters]
    if len(pairs) != 1 or len(set(pairs[0])) != 1 or not arguments.get("unquoted_keys"):
        raise refused("strings of another kind")
    return Dialect(quotes=(str(pairs[0][0]),), escapes=False, bare_keys=True, constants=PYTHON.constants)


def _first(field: Mapping[str, Any], kind: str) -> list[Piece]:
    """The first marker of a field that is more than the end of the text; none at all is nothing."""
    given = field.get(kind)
    if isinstance(given, list) and given:
        given = given[0]
    if isinstance(given, str):
        return [Piece(given)]
    pattern = field.get(f"{kind}_pattern")
    if pattern is None:
        return []
    return next((pieces for pieces in _alternatives(str(pattern)) if pieces), [])


def _literal(pieces: Sequence[Piece]) -> str:
    if any(piece.is_field for piece in pieces):
        raise refused("a named group where a marker stands")
    return "".join(piece.text for piece in pieces)


def _alternatives(pattern: str) -> Iterator[list[Piece]]:
    """The texts that an expression matches: its alternatives, in literal text, blanks and named fields."""
    if len(pattern) > MAX_PATTERN:
        raise refused("a long expression")
    grouped = re.match(r"\(\?:((?:[^()\\]|\\.)*)\)(.*)", pattern, re.DOTALL)
    bodies = [f"{one}{grouped[2]}" for one in _split(grouped[1])] if grouped else _split(pattern)
    for body in bodies:
        for one in _split(body):
            yield _pieces(one)


def _split(pattern: str) -> list[str]:
    """The parts between bars that are not escaped and in no group."""
    return re.findall(r"(?:\\.|\((?:[^()\\]|\\.)*\)|[^|\\()])+", pattern)


def _pieces(body: str) -> list[Piece]:
    """The pieces of an expression without alternatives; blanks become one."""
    found: list[Piece] = []
    at = 0
    while at < len(body):
        token = _TOKEN.match(body, at)
        if token is None:
            raise refused(f"the expression {json.dumps(body[at : at + 20])}")
        at = token.end()
        kind = token.lastgroup or ""
        if kind == "group":
            found.append(Piece(token["group"], True))
        elif kind != "end":
            text = "\n" if kind == "blank" else token[kind]
            if found and not found[-1].is_field:
                found[-1] = Piece(found[-1].text + text)
            else:
                found.append(Piece(text))
    return [piece for piece in found if piece.text != "\n"] if len(found) == 1 else found
