"""Calls in the text of an answer, by the form that the model writes them in."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from edgellm.messages.events import Event, ToolCallBegin, ToolCallDelta, ToolCallEnd
from edgellm.messages.growing_text import GrowingText, NotACall, Steps
from edgellm.messages.shapes import JSON, CallForm
from edgellm.messages.values import (
    argument_json,
    as_json,
    captured,
    escaped,
    items,
    kinds_of,
    loads,
    value,
)

NAME = re.compile(r"[^\s\"'<>{}()\[\],=]{1,256}")
ARGUMENT_KEYS = ("arguments", "parameters")  # models mix them up


@dataclass
class ToolCall:
    """A call of a message: ``arguments`` is the JSON text of an object."""

    id: str
    name: str
    arguments: str

    def to_dict(self) -> dict[str, Any]:
        """As the OpenAI protocol has it."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


@dataclass
class Running:
    """The call that is being read."""

    index: int
    id: str
    name: str
    written: list[str] = field(default_factory=list)


def tool_schemas(tools: Sequence[Mapping[str, Any]] | None) -> dict[str, dict[str, Any]]:
    """Name -> properties of the arguments, for tools in the form of the OpenAI protocol or the functions alone."""
    found = {}
    for tool in tools or ():
        function = tool.get("function", tool)
        if isinstance(function, Mapping) and isinstance(function.get("name"), str):
            parameters = function.get("parameters")
            properties = parameters.get("properties") if isinstance(parameters, Mapping) else None
            found[function["name"]] = dict(properties) if isinstance(properties, Mapping) else {}
    return found


class CallReader:
    """Reads calls of one form; ``done`` are those that are whole, ``resume`` is where the text goes on behind the last.

    emit   takes the events
    """

    def __init__(
        self,
        text: GrowingText,
        form: CallForm,
        tools: Sequence[Mapping[str, Any]],
        emit: Callable[[Event], None],
        new_id: Callable[[], str],
    ) -> None:
        self.text, self.form, self.emit, self.new_id = text, form, emit, new_id
        self.schemas = tool_schemas(tools)
        self.done: list[ToolCall] = []
        self.resume = 0
        self._n = 0
        self._running: Running | None = None
        self._modes = {"json": self._json, "header": self._header, "tagged": self._tagged, "python": self._python}

    # -- the run of calls ------------------------------------------------------------------------------------------

    def section(self, *, bare: bool) -> Steps:
        """All calls that stand together, from behind the marker that begins them on; NotACall ends them."""
        self._running, self._bare = None, bare
        form, text = self.form, self.text
        if not bare and form.section.open:
            yield from text.expect(form.each.open)
        while True:
            yield from self._modes[form.mode]()
            self.resume = text.at
            if not (yield from self._next()):
                return

    def _next(self) -> Steps:
        """Whether another call follows; what comes between is read."""
        form, text = self.form, self.text
        if form.section.close and (yield from text.take(form.section.close)):
            self.resume = text.at
            return False
        while (c := (yield from text.space())) and c in ",;":
            text.at += 1
        if form.each.open:
            return form.section.open and (yield from text.take(form.each.open))
        return form.mode == "json" and c and c in "{["

    def start(self, name: str, call_id: str = "") -> None:
        """A call begins."""
        if not NAME.fullmatch(name) or (self._bare and name not in self.schemas):
            raise NotACall
        self._running = Running(self._n, call_id or self.new_id(), name)
        self._n += 1
        self.emit(ToolCallBegin(self._running.index, self._running.id, name))

    def write(self, piece: str) -> None:
        """More of its arguments."""
        assert self._running is not None, "arguments belong to a call"
        self._running.written.append(piece)
        self.emit(ToolCallDelta(self._running.index, piece))

    def end(self) -> None:
        """It is whole, or NotACall."""
        call = self._running
        assert call is not None, "what ends has begun"
        written = "".join(call.written)
        if not isinstance(loads(written), dict):
            raise NotACall
        self._running = None
        self.done.append(ToolCall(call.id, call.name, written))
        self.resume = self.text.at
        self.emit(ToolCallEnd(call.index))

    def one(self, name: str) -> Steps:
        """The arguments of a call whose name is known."""
        self._running, self._bare = None, False
        self.start(name)
        if (yield from self.text.space()) != "{":
            raise NotACall
        yield from items(self.text, self.form.dialect, self.write, 0, is_object=True)
        self.end()

    # -- JSON ------------------------------------------------------------------------------------------------------

    def _json(self) -> Steps:
        if (yield from self.text.space()) != "[":
            yield from self._call_object()
        else:
            self.text.at += 1
            while True:
                yield from self.text.space()
                yield from self._call_object()
                c = yield from self.text.space()
                self.text.at += 1
                if c == "]":
                    break
                if c != ",":
                    raise NotACall
        yield from self.text.take(self.form.each.close)

    def _call_object(self) -> Steps:
        """{"name": ..., "arguments": {...}} with keys in any order; without a marker nothing else may stand in it."""
        text, (name_key, arguments_key, id_key) = self.text, self.form.keys
        name, call_id, begun = "", "", False
        held = "{}"
        yield from text.expect("{")
        while True:
            if (yield from text.space()) != '"':
                raise NotACall
            key = loads((yield from captured(text)))
            yield from text.expect(":")
            if not name_key and not name:
                name, is_arguments = key, True
            else:
                is_arguments = key == arguments_key or key in ARGUMENT_KEYS
            if is_arguments and name and not begun:
                begun = True
                self.start(name, call_id)
                yield from self._object_value()
            elif is_arguments and not begun:
                held = object_text((yield from captured(text)))
            else:
                if self._bare and key not in (name_key, id_key, "type", "id"):
                    raise NotACall
                found = loads((yield from captured(text)))
                name = found if key == name_key and isinstance(found, str) else name
                call_id = found if key == id_key and isinstance(found, str) else call_id
            c = yield from text.space()
            text.at += 1
            if c == "}":
                break
            if c != ",":
                raise NotACall
        if not begun:
            self.start(name, call_id)
            self.write(held)
        self.end()

    def _object_value(self) -> Steps:
        """Arguments: an object, or a string that holds one."""
        if (yield from self.text.space()) == "{":
            yield from value(self.text, self.form.dialect, self.write)
        else:
            self.write(object_text((yield from captured(self.text))))

    # -- a header, then the arguments ------------------------------------------------------------------------------

    def _head(self, stops: Sequence[str]) -> Steps:
        """The fields before the arguments; ``stops`` end one that nothing stands behind, and are not read."""
        found = {"name": "", "id": "", "": ""}
        for kind, close in self.form.head:
            if close.strip():
                found[kind], _ = yield from self.text.name_before([close])
            else:
                before = self.text.at
                found[kind], _ = yield from self.text.name_before(stops)
                self.text.at = before
                yield from self.text.space()
                self.text.at += len(found[kind])
        name = found["name"]
        self.start(name, self.form.id_of.format(name=name, index=self._n) or found["id"])

    def _header(self) -> Steps:
        yield from self._head(["{"])
        form, text = self.form, self.text
        if (yield from text.space()) == "{":
            yield from items(text, form.dialect, self.write, 0, is_object=True)
        elif form.each.close and (yield from text.take(form.each.close)):
            self.write("{}")
        else:
            raise NotACall
        self.end()
        yield from text.take(form.each.close)
        self.resume = text.at

    # -- a tag for each argument -----------------------------------------------------------------------------------

    def _tagged(self) -> Steps:
        form, text = self.form, self.text
        yield from self._head([form.argument.open, form.each.close])
        assert self._running is not None, "a head begins a call"
        properties = self.schemas.get(self._running.name, {})
        self.write("{")
        n = 0
        while not (yield from text.take(form.each.close)):
            yield from text.expect(form.argument.open)
            key, number = yield from text.name_before([middle.text for middle in form.middles])
            middle = form.middles[number]
            self.write(f"{', ' if n else ''}{json.dumps(key, ensure_ascii=False)}: ")
            yield from self._tagged_value(middle.text, middle.kinds or kinds_of(properties.get(key)))
            n += 1
        self.write("}")
        self.end()

    def _tagged_value(self, before: str, kinds: Sequence[str]) -> Steps:
        """A value up to its closing tag, behind which another argument or the end of the call comes."""
        form, text, streams = self.form, self.text, tuple(kinds) == ("string",)
        found: list[str] = []
        trim = Trimmed(before, form.argument.close, (lambda t: self.write(escaped(t))) if streams else found.append)
        if streams:
            self.write('"')
        follow = [form.argument.open, form.each.close]
        end = yield from text.until([f"{form.argument.close} {marker}" for marker in follow], trim.add)
        if end is None:
            raise NotACall
        text.at = end[0]
        yield from text.expect(form.argument.close)
        trim.end()
        self.write('"' if streams else argument_json("".join(found), kinds))

    # -- Python ----------------------------------------------------------------------------------------------------

    def _python(self) -> Steps:
        text = self.text
        if (yield from text.space()) == "{":  # the other way of Llama
            yield from self._json()
            return
        listed = yield from text.take("[")
        while True:
            name, _ = yield from text.name_before(["("])
            self.start(name)
            self.write("{")
            n = 0
            while (yield from text.space()) != ")" or n:
                key, _ = yield from text.name_before(["="])
                if not key.isidentifier():
                    raise NotACall
                self.write(f'{", " if n else ""}"{key}": ')
                yield from value(text, self.form.dialect, self.write)
                n += 1
                c = yield from text.space()
                if c == ")":
                    break
                if c != ",":
                    raise NotACall
                text.at += 1
            text.at += 1
            self.write("}")
            self.end()
            c = yield from text.space()
            if not (listed and c == ","):
                break
            text.at += 1
        if listed and c == "]":
            text.at += 1
        yield from text.take(self.form.each.close)


class Trimmed:
    """Passes a text on without the line break that its tags put before and behind it.

    before, behind   the markers; what blanks they end and begin with are theirs
    """

    def __init__(self, before: str, behind: str, say: Callable[[str], Any]) -> None:
        self._before = before[len(before.rstrip()) :]
        self._behind = behind[: len(behind) - len(behind.lstrip())]
        self._say, self._held, self._first = say, "", True

    def add(self, text: str) -> None:
        """Blanks are held back until it is known whether they are the last ones."""
        text = self._held + text
        kept = text.rstrip()
        self._held = text[len(kept) :]
        self._give(kept)

    def end(self) -> None:
        """The closing tag is there."""
        text = self._held
        if self._first:
            text, self._first = text.removeprefix(self._before), False
        self._say(text.removesuffix(self._behind))

    def _give(self, text: str) -> None:
        if text and self._first:
            text, self._first = text.removeprefix(self._before), False
        if text:
            self._say(text)


def object_text(written: str) -> str:
    """The JSON text of arguments: an object as it is, one in a string, or none at all."""
    found = loads(written)
    if isinstance(found, str):
        inner = as_json(found, (JSON,))
        written, found = inner or "", loads(inner or "0")
    if found is None:
        return "{}"
    if not isinstance(found, dict):
        raise NotACall
    return written
