"""The form of calls as a grammar in llguidance's Lark: what forces a model to call a tool as its template writes it.

Markers that are tokens of their own stand as such; arguments keep the tool's JSON schema.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from edgellm.formats.errors import UnsupportedError
from edgellm.messages.shapes import CallForm, Channels, Shape
from edgellm.messages.tool_schemas import DEFINITIONS, arguments_of, freed, name_of, names_all, parameters
from edgellm.messages.values_grammar import ANY, Values, quoted
from edgellm.structured import lark_json

if TYPE_CHECKING:
    from edgellm.tokenizer import Tokenizer

# as templates write JSON
JSON_STYLE = {"item_separator": ", ", "key_separator": ": "}
# as much of a schema as a grammar has, for tools that are not strict
LOOSE = {**JSON_STYLE, "coerce_one_of": True}
EMPTY = '""'
KIND = "<|constrain|>"  # before what the arguments are written in, in the headers of Harmony
ANY_TEXT = r"/(.|\n)*/"
BLANKS = r"/[ \n]{1,4}/?"
LIST_BLANKS = r"/[ \n]{1,12}/?"  # a line break, and what the items of a list are indented by
NO_CALL = r"/[^\s\[{](.|\n)*/"  # an answer that does not begin as a call without markers does


class CallsGrammar:
    """Writes the grammar of one form; ``text`` is its Lark.

    tools      those that may be called
    parallel   several may
    behind     the marker that begins calls is there already: a trigger
    answer     the schema of an answer that may come in place of calls
    free       names of tools whose arguments may be any

    The arguments of a tool that is "strict" keep all of its schema: UnsupportedError for what the form cannot keep.
    Those of others keep what it can.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        shape: Shape,
        tools: Sequence[Mapping[str, Any]],
        *,
        parallel: bool = True,
        behind: bool = False,
        answer: Mapping[str, Any] | bool | None = None,
        free: Collection[str] = (),
    ) -> None:
        self._tokenizer, self._rules, self._behind = tokenizer, list[str](), behind
        self._shape, self._n = shape, 0
        self._functions = [freed(tool["function"]) if name_of(tool) in free else tool["function"] for tool in tools]
        self._answer = "" if answer is None else self.rule(lark_json(answer))
        if shape.channels is not None:
            start = self._channel_calls(shape.channels)
            if behind and not shape.call_begins:
                start = self._channel_answers(shape.channels, start, parallel)
        elif shape.calls is not None:
            start = self._section(shape.calls, parallel and not shape.calls.one)
            start = f"({start}) | {self._answer}" if self._answer else start
            if behind and not shape.call_begins:
                start = f"{BLANKS} ({start} | {NO_CALL})?"
        else:
            raise UnsupportedError("The model has no form for calls that is known.", code="TOOLS")
        self.text = "\n".join([f"start: {start}", *self._rules])

    # -- pieces of Lark ----------------------------------------------------------------------------------------------

    def _name(self, kind: str = "r") -> str:
        self._n += 1
        return f"{kind}{self._n}"

    def rule(self, body: str) -> str:
        """See ``Lark``."""
        name = self._name()
        self._rules.append(f"{name}: {body}")
        return name

    def recursive(self, body: Callable[[str], str]) -> str:
        """See ``Lark``."""
        name = self._name()
        self._rules.append(f"{name}: {body(name)}")
        return name

    def marker(self, text: str) -> str:
        """A text of a marker: tokens that are marks by their ids, the rest as it is."""
        parts, plain = [], b""
        for token in self._tokenizer.encode(text, False, parse_special=True) if text else ():
            if token in self._tokenizer.mark_ids:
                parts += [quoted(plain), f"<[{token}]>"]
                plain = b""
            else:
                plain += self._tokenizer.token_bytes(token)
        return " ".join(part for part in [*parts, quoted(plain)] if part)

    def json(self, schema: Any, exact: bool) -> str:
        """See ``Lark``; what is exact is kept or refused by name, the rest of what is not may be lost."""
        return self.rule(lark_json(schema, JSON_STYLE if exact else LOOSE))

    def text_before(self, marker: str, regex: str = "") -> str:
        """See ``Lark``."""
        body = ANY_TEXT
        if regex:
            body = self._name("T")
            self._rules.append(f"{body}: {regex}")
        written = self.marker(marker)
        if not written or written.startswith("<["):
            return f"{self.rule(body)} {written}"
        first, _, rest = written.partition(" <[")
        name = self._name()
        self._rules.append(f"{name}[suffix={json.dumps(json.loads(first))}]: {body}")
        return name + (f" <[{rest}" if rest else "")

    def in_order(self, parts: Sequence[tuple[str, bool]], comma: str) -> str:
        """See ``Lark``: rules for the first one and for those behind."""
        first, rest = "", ""
        for body, required in reversed(parts):
            part = self.rule(body)
            without = ("", "") if required else (f" | {first or EMPTY}", f" | {rest or EMPTY}")
            first, rest = self.rule(f"{part} {rest}{without[0]}"), self.rule(f"{comma} {part} {rest}{without[1]}")
        return first

    # -- calls -------------------------------------------------------------------------------------------------------

    def _section(self, form: CallForm, parallel: bool) -> str:
        """All calls with their markers."""
        call = self.rule(" | ".join(self._call(form, function) for function in self._functions))
        if form.listed:
            around, comma = (LIST_BLANKS, f'{LIST_BLANKS} "," {LIST_BLANKS}') if self._behind else ("", '"," " "?')
            more = f" ({comma} {call})*" if parallel else ""
            return f'{self._opening(form)} "[" {around} {call}{more} {around} "]" {self._ending(form)}'
        opened, closed = self.marker(form.each.open), self._closing(form)
        between = " ".join(part for part in (closed, BLANKS, opened) if part)
        more = f" ({between} {call})*" if parallel and (closed or opened or form.section.open) else ""
        return f"{self._opening(form)} {call}{more} {closed} {self._ending(form)}"

    def _opening(self, form: CallForm) -> str:
        """What begins all calls, or what is missing of it behind a trigger: blanks as the model likes."""
        each = "" if form.listed else form.each.open
        if not self._behind:
            return self.marker(form.section.open + each)
        if form.section.open.strip():
            return f"{BLANKS} {self.marker(each.lstrip())}"
        rest = each.strip() and each.lstrip()[len(each.strip()) :]
        return BLANKS if rest or (each and form.mode == "json") else ""

    def _ending(self, form: CallForm) -> str:
        """What ends all calls."""
        close = form.section.close
        return f"{BLANKS} {self.marker(close.lstrip())}" if self._behind and close else self.marker(close)

    def _closing(self, form: CallForm) -> str:
        """What ends a call; its blanks need not stand where arguments do not."""
        close = form.each.close
        blanks = quoted(close[: len(close) - len(close.lstrip())].encode())
        written = self.marker(close.lstrip())
        return f"{blanks}? {written}" if blanks and form.mode == "tagged" else self.marker(close)

    def _call(self, form: CallForm, function: Mapping[str, Any]) -> str:
        if form.mode == "json" or (form.mode == "header" and not form.dialect.bare_keys):
            return self._json_call(form, function)
        schema, strict = parameters(function), bool(function.get("strict"))
        values = Values(self, form, function["name"], schema, strict)
        values.checked()
        arguments = arguments_of(function)
        if form.sorts:
            arguments.sort(key=lambda row: row[0])

        def written(parts: Sequence[tuple[str, bool]], comma: str) -> str:
            return self.in_order(parts, comma) if names_all(schema) else values.any_arguments(comma)

        if form.mode == "tagged":
            closed = form.each.close
            comma = quoted(closed[: len(closed) - len(closed.lstrip())].encode())
            parts = [
                (f"{self.marker(form.argument.open)} {quoted(key.encode())} {values.tagged(one, f'#/{key}')}", required)
                for key, one, required in arguments
            ]
            return self.rule(f"{self._head(form, function['name'])} {written(parts, comma)}")
        is_header = form.mode == "header"
        equals, comma, opened, closed = (":", ",", "{", "}") if is_header else ("=", ", ", "(", ")")
        parts = [
            (f"{quoted((key + equals).encode())} {values.value(one, f'#/{key}')}", required)
            for key, one, required in arguments
        ]
        head = self._head(form, function["name"]) if is_header else quoted(function["name"].encode())
        return self.rule(f'{head} "{opened}" {written(parts, quoted(comma.encode()))} "{closed}"')

    def _json_call(self, form: CallForm, function: Mapping[str, Any]) -> str:
        strict = bool(function.get("strict"))
        if form.mode == "header":
            return self.rule(f"{self._head(form, function['name'])} {self.json(parameters(function), strict)}")
        name, arguments, call_id = form.keys
        named = {name: {"const": function["name"]}, arguments: parameters(function)}
        properties = named if name else {function["name"]: parameters(function)}
        written = {**_ids(form.number), **properties, **_ids(call_id)}
        schema = {"type": "object", "properties": written, "required": list(properties)}
        definitions = {key: parameters(function)[key] for key in DEFINITIONS if key in parameters(function)}
        return self.json({**schema, "additionalProperties": False, **definitions}, strict)

    def _head(self, form: CallForm, name: str) -> str:
        parts = []
        for kind, close in form.head:
            parts.append({"name": quoted(name.encode()), "id": "/[a-zA-Z0-9]{9}/", "": "/[0-9]{1,3}/"}[kind])
            parts.append(self.marker(close))
        return " ".join(part for part in parts if part)

    # -- channels ----------------------------------------------------------------------------------------------------

    def _channel_calls(self, channels: Channels) -> str:
        """Reasoning, where there is any, and one call, or the answer."""
        if self._behind and channels.begins:
            return self._begun_header(channels)
        calls = [f"{self.marker(channels.says)} {self._answer}"] if self._answer else []
        for function in self._functions:
            name = quoted(function["name"].encode())
            opened = "" if self._behind else self.marker(channels.call.open)
            arguments = self.json(parameters(function), bool(function.get("strict")))
            calls.append(self.rule(f"{opened} {name} {self.marker(channels.call.close)} {arguments}"))
        if not channels.thinks or self._behind:
            return " | ".join(calls)
        ends = self.marker(f"{channels.ends[0]}{channels.start}")
        return f"({self.marker(channels.thinks)} {self.rule(ANY_TEXT)} {ends})? ({' | '.join(calls)})"

    def _begun_header(self, channels: Channels) -> str:
        """What follows ``begins``: the rest of a call's header and the call, or of a text that only speaks of one.

        Behind such a text other messages may come, whose headers are looked at in the same way.
        """
        opened, (channel, _) = self.marker(channels.open), channels.heads
        mark, kind = self.marker(channel), self.marker(KIND)
        prose, head = self._name("T"), self._name("T")
        for name, of, without in ((prose, ANY, channels.open), (head, "[^<]+", channels.begins)):
            self._rules.append(f"{name}: /{of}/ & ~/{ANY}{re.escape(without)}{ANY}/")
        kinds = f"({mark} /[^<]+/?)? ({kind} /[^<]+/?)? {opened}"
        calls = [
            f"/{re.escape(function['name'])}(\\s[^<]*)?/ {kinds} "
            + self.json(parameters(function), bool(function.get("strict")))
            for function in self._functions
        ]

        call, texts = self.rule(" | ".join(calls)), list[str]()

        def body(name: str) -> str:
            others = f"{self.text_before(channels.ends[0])} {self.marker(channels.start)} {name}"
            texts.append(self.rule(f"{prose}? | {others}"))
            again = f"{mark}? {self.text_before(channels.begins, '/[^<]*/')} ({call} | {texts[0]})"
            return f"{head}? ({mark} {head}?)? ({kind} {head}?)? {opened} {texts[0]} | {again}"

        self.recursive(body)
        return f"{call} | {texts[0]}"

    def _channel_answers(self, channels: Channels, calls: str, parallel: bool) -> str:
        """An answer of channels whose calls nothing announces: text, and calls behind it or in its place."""
        one, again = self.rule(calls), self.marker(channels.start)
        text = self._name("T")
        self._rules.append(f"{text}: /{ANY}/ & ~/{ANY}{re.escape(channels.start)}{ANY}/")
        several = f"{one} ({again} {one})*" if parallel else one
        return f"({several}) | {self.marker(channels.says)} ({text} | {self.text_before(channels.start)} {several})"


def _ids(key: str) -> dict[str, Any]:
    """The property that tells calls apart, where there is such a key; it need not come."""
    return {key: {"type": ["string", "integer"]}} if key else {}
