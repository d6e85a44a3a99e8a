"""Values as models write them, in JSON, Python or a dialect of their own, written anew as JSON while they grow."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from edgellm.messages.growing_text import GrowingText, NotACall, Steps
from edgellm.messages.shapes import JSON, PYTHON, Dialect

MAX_DEPTH = 60  # of nested arguments, as of those that a template is given

NUMBER = re.compile(r"-?(?:0|[1-9]\d{0,4000})(?:\.\d{1,4000})?(?:[eE][+-]?\d{1,4})?")
WORD = re.compile(r"[^\s,:{}\[\]()\"'<>=]*")
SIMPLE_ESCAPES = '"\\/bfnrt'
HEX = re.compile(r"[0-9a-fA-F]+")
HALF = re.compile(r"[dD][89a-fA-F]..")  # of a pair that is one character; alone it is none, and no UTF-8 has it
WHOLE = re.compile(r"\\u[dD][89abAB]..\\u[dD][c-fC-F][0-9a-fA-F]{2}")

Write = Callable[[str], Any]


def escaped(text: str) -> str:
    """``text`` as it stands inside a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def value(text: GrowingText, dialect: Dialect, write: Write, depth: int = 0) -> Steps:
    """Read one value and write it as JSON; NotACall where there is none."""
    c = yield from text.space()
    if c and c in "{[":
        if depth >= MAX_DEPTH:
            raise NotACall
        yield from items(text, dialect, write, depth, is_object=c == "{")
    elif (quote := (yield from opening_quote(text, dialect))) is not None:
        write('"')
        yield from string(text, quote, dialect, write)
        write('"')
    else:
        write((yield from word(text, dialect)))


def items(text: GrowingText, dialect: Dialect, write: Write, depth: int, *, is_object: bool) -> Steps:
    """An object or a list from its opening bracket on."""
    close = "}" if is_object else "]"
    write("{" if is_object else "[")
    text.at += 1
    n = 0
    while True:
        c = yield from text.space()
        if c == close and not n:
            break
        if n:
            write(", ")
        n += 1
        if is_object:
            yield from key(text, dialect, write)
        yield from value(text, dialect, write, depth + 1)
        c = yield from text.space()
        if c == close:
            break
        if c != ",":
            raise NotACall
        text.at += 1
    text.at += 1
    write(close)


def key(text: GrowingText, dialect: Dialect, write: Write) -> Steps:
    """The key of an object and its colon."""
    yield from text.space()
    quote = yield from opening_quote(text, dialect)
    write('"')
    if quote is not None:
        yield from string(text, quote, dialect, write)
    elif dialect.bare_keys:
        name, _ = yield from text.name_before([":"])
        if not name or not WORD.fullmatch(name):
            raise NotACall
        write(escaped(name))
        text.at -= 1
    else:
        raise NotACall
    yield from text.expect(":")
    write('": ')


def opening_quote(text: GrowingText, dialect: Dialect) -> Steps:
    """What begins a string here, which is read; None where none does."""
    for quote in dialect.quotes:
        if (yield from text.have(len(quote))) == quote:
            text.at += len(quote)
            return quote
    return None


def string(text: GrowingText, quote: str, dialect: Dialect, write: Write) -> Steps:
    """The rest of a string."""
    if not dialect.escapes:
        if (yield from text.until([quote], lambda piece: write(escaped(piece)))) is None:
            raise NotACall
        return
    run = re.compile(rf"[^{quote}\\]*")
    while True:
        found = run.match(text.text, text.at)
        if found is not None and found.end() > text.at:
            text.at = found.end()
            write(escaped(found.group()))
        c = yield from text.peek()
        if not c:
            raise NotACall
        if c == quote:
            text.at += 1
            return
        if c == "\\":
            yield from escape(text, write)


def escape(text: GrowingText, write: Write) -> Steps:
    """A backslash and what belongs to it; before a character that means nothing it stands for itself."""
    pair = yield from text.have(2)
    if len(pair) < 2:
        raise NotACall
    c, size = pair[1], {"u": 6, "x": 4}.get(pair[1], 2)
    digits = (yield from text.have(size))[2:]
    if c in SIMPLE_ESCAPES:
        write(pair)
    elif c == "'":
        write(c)
    elif size > 2 and len(digits) == size - 2 and HEX.fullmatch(digits):
        if HALF.fullmatch(digits):
            both = yield from text.have(2 * size)
            size, whole = (2 * size, both) if WHOLE.fullmatch(both) else (size, "\\ufffd")
            write(whole)
        else:
            write(f"\\u{digits:0>4}")
    else:
        size = 1
        write("\\\\")
    text.at += size


def word(text: GrowingText, dialect: Dialect) -> Steps:
    """A number or a constant, as JSON."""
    while True:
        found = WORD.match(text.text, text.at)
        assert found is not None, "the pattern takes nothing, too"
        if found.end() < len(text.text) or not (yield from text.more()):
            break
    text.at = found.end()
    if found.group() in dialect.constants:
        return dialect.constants[found.group()]
    if NUMBER.fullmatch(found.group()) and abs(loads(found.group())) < math.inf:
        return found.group()
    raise NotACall


def captured(text: GrowingText, dialect: Dialect = JSON) -> Steps:
    """The JSON text of the next value."""
    found: list[str] = []
    yield from value(text, dialect, found.append)
    return "".join(found)


def loads(text: str) -> Any:
    """JSON that a model wrote; NotACall where it is none after all."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # also numbers with more digits than Python takes
        raise NotACall from None


def as_json(written: str, dialects: Sequence[Dialect] = (JSON, PYTHON)) -> str | None:
    """The JSON text of a whole value that is written in one of the dialects; None where it is in none."""
    for dialect in dialects:
        text = GrowingText()
        text.text, text.ended, text.keeps = written, True, True
        found: list[str] = []
        steps = value(text, dialect, found.append)
        try:
            next(steps, None)
            if not written[text.at :].strip():
                loads("".join(found))
                return "".join(found)
        except NotACall:
            continue
    return None


def kinds_of(schema: Any) -> tuple[str, ...]:
    """The JSON types that a schema names, in order; () where it names none."""
    if not isinstance(schema, dict):
        return ()
    kinds = schema.get("type")
    found = [kind for kind in ([kinds] if isinstance(kinds, str) else _listed(kinds)) if isinstance(kind, str)]
    for union in ("anyOf", "oneOf", "allOf"):
        for choice in _listed(schema.get(union)):
            found.extend(kinds_of(choice))
    for example in (*_listed(schema.get("enum")), *([schema["const"]] if "const" in schema else ())):
        if not kinds and isinstance(example, str):
            found.append("string")
    if schema.get("nullable"):
        found.append("null")
    return tuple(dict.fromkeys(found))


def _listed(found: Any) -> list[Any]:
    return found if isinstance(found, list) else []


def argument_json(written: str, kinds: Sequence[str]) -> str:
    """The JSON text of an argument that was written without quotes, by the types that its schema names.

    Without any the text counts as JSON where it is some, as templates print values; else it is a string.
    """
    if tuple(kinds) != ("string",) and (found := as_json(written.strip())) is not None:
        if not kinds or kind_of(found) & set(kinds):
            return found
        if "boolean" in kinds and found in ("0", "1"):
            return "true" if found == "1" else "false"
    if "boolean" in kinds and written.strip().lower() in ("true", "false"):
        return written.strip().lower()
    return json.dumps(written, ensure_ascii=False)


def kind_of(text: str) -> set[str]:
    """The JSON types that a JSON text is of."""
    loaded = loads(text)
    if isinstance(loaded, bool):
        return {"boolean"}
    if isinstance(loaded, int) or (isinstance(loaded, float) and loaded.is_integer()):
        return {"integer", "number"}
    names = {float: "number", str: "string", list: "array", dict: "object", type(None): "null"}
    return {names[type(loaded)]}
