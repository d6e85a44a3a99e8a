"""The form of calls as a grammar in llguidance's Lark: what forces a model to call a tool as its template writes it.

Markers that are tokens of their own stand as such; arguments keep the tool's JSON schema.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from edgellm.formats.errors import UnsupportedError
from edgellm.messages.shapes import CallForm, Shape
from edgellm.messages.values import kinds_of

if TYPE_CHECKING:
    from edgellm.tokenizer import Tokenizer

# as templates write JSON
JSON_OPTIONS = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": ", "coerce_one_of": True}
EMPTY = '""'
ANY_TEXT = r"/(.|\n)*/"
BOOLEANS = '("true" | "false" | "True" | "False")'  # templates print either
PLAIN = {
    "integer": "/-?(0|[1-9][0-9]{0,17})/",
    "number": r"/-?(0|[1-9][0-9]{0,17})(\.[0-9]{1,17})?([eE][+-]?[0-9]{1,3})?/",
    "null": '"null"',
}


class CallsGrammar:
    """Writes the grammar of one form; ``text`` is its Lark.

    tools      those that may be called
    parallel   several may
    behind     the marker that begins calls is there already: a trigger
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        shape: Shape,
        tools: Sequence[Mapping[str, Any]],
        *,
        parallel: bool = True,
        behind: bool = False,
    ) -> None:
        self._tokenizer, self._rules = tokenizer, list[str]()
        self._n = 0
        self._functions = [tool["function"] for tool in tools]
        if shape.channels is not None:
            start = self._channel_calls(shape)
        elif shape.calls is not None:
            start = self._section(shape.calls, parallel and not shape.calls.one, behind)
        else:
            raise UnsupportedError("The model has no form for calls that is known.", code="TOOLS")
        self.text = "\n".join([f"start: {start}", *self._rules])

    # -- pieces of Lark ----------------------------------------------------------------------------------------------

    def _rule(self, body: str) -> str:
        self._n += 1
        self._rules.append(f"r{self._n}: {body}")
        return f"r{self._n}"

    def _marker(self, text: str) -> str:
        """A text of a marker: tokens that are marks by their ids, the rest as it is."""
        parts, plain = [], b""
        for token in self._tokenizer.encode(text, False, parse_special=True) if text else ():
            if token in self._tokenizer.mark_ids:
                parts += [_quoted(plain), f"<[{token}]>"]
                plain = b""
            else:
                plain += self._tokenizer.token_bytes(token)
        return " ".join(part for part in [*parts, _quoted(plain)] if part)

    def _json(self, schema: Any) -> str:
        kept = {**schema, "x-guidance": JSON_OPTIONS} if isinstance(schema, Mapping) else schema
        return self._rule(f"%json {json.dumps(kept)}")

    def _text_before(self, marker: str) -> str:
        """Any text, and the marker behind it."""
        written = self._marker(marker)
        if written.startswith("<["):
            return f"{self._rule(ANY_TEXT)} {written}"
        first, _, rest = written.partition(" <[")
        return f"{self._lazy(json.loads(first))}" + (f" <[{rest}" if rest else "")

    def _lazy(self, stop: str) -> str:
        self._n += 1
        self._rules.append(f"r{self._n}[suffix={json.dumps(stop)}]: {ANY_TEXT}")
        return f"r{self._n}"

    # -- calls -------------------------------------------------------------------------------------------------------

    def _section(self, form: CallForm, parallel: bool, behind: bool) -> str:
        """All calls with their markers."""
        if form.listed:
            call = self._rule(" | ".join(self._call(form, function) for function in self._functions))
            more = f' ("," " "? {call})*' if parallel else ""
            opened = "" if behind else self._marker(form.section.open)
            return f'{opened} "[" {call}{more} "]" {self._marker(form.section.close)}'
        opened, closed = self._marker(form.each.open), self._closing(form)
        call = self._rule(" | ".join(self._call(form, function) for function in self._functions))
        between = " ".join(part for part in (closed, self._marker(form.between), opened) if part)
        more = f" ({between} {call})*" if parallel and between else ""
        first = self._marker(form.section.open) + " " + opened
        if behind:
            first = opened if form.section.open.strip() else ""
        return f"{first} {call}{more} {closed} {self._marker(form.section.close)}"

    def _closing(self, form: CallForm) -> str:
        """What ends a call; its blanks need not stand where arguments do not."""
        close = form.each.close
        blanks = _quoted(close[: len(close) - len(close.lstrip())].encode())
        written = self._marker(close.lstrip())
        return f"{blanks}? {written}" if blanks and form.mode == "tagged" else self._marker(close)

    def _call(self, form: CallForm, function: Mapping[str, Any]) -> str:
        writers = {"json": self._json_call, "header": self._header_call, "tagged": self._tagged_call}
        return writers.get(form.mode, self._python_call)(form, function)

    def _json_call(self, form: CallForm, function: Mapping[str, Any]) -> str:
        name, arguments, _ = form.keys
        named = {name: {"const": function["name"]}, arguments: parameters(function)}
        properties = named if name else {function["name"]: parameters(function)}
        schema = {"type": "object", "properties": properties, "required": list(properties)}
        definitions = {
            key: parameters(function)[key] for key in ("$defs", "definitions") if key in parameters(function)
        }
        return self._json({**schema, "additionalProperties": False, **definitions})

    def _head(self, form: CallForm, name: str) -> str:
        parts = []
        for kind, close in form.head:
            parts.append({"name": _quoted(name.encode()), "id": "/[a-zA-Z0-9]{9}/", "": "/[0-9]{1,3}/"}[kind])
            parts.append(self._marker(close))
        return " ".join(part for part in parts if part)

    def _header_call(self, form: CallForm, function: Mapping[str, Any]) -> str:
        head = self._head(form, function["name"])
        if not form.dialect.bare_keys:
            return self._rule(f"{head} {self._json(parameters(function))}")
        return self._rule(f'{head} "{{" {self._arguments(form, function, ":", ",")} "}}"')

    def _tagged_call(self, form: CallForm, function: Mapping[str, Any]) -> str:
        def written(key: str, schema: Any) -> str:
            return f"{self._marker(form.argument.open)} {_quoted(key.encode())} {self._tagged(form, schema)}"

        closed = form.each.close
        blanks = _quoted(closed[: len(closed) - len(closed.lstrip())].encode())
        return self._rule(f"{self._head(form, function['name'])} {self._in_order(form, function, blanks, written)}")

    def _tagged(self, form: CallForm, schema: Any) -> str:
        """What comes behind a key: a middle, a value and the closing marker."""
        kinds = kinds_of(schema)
        middles = [
            middle for middle in form.middles if not middle.kinds or set(middle.kinds) & set(kinds or ("string",))
        ]
        middle = self._marker((middles or form.middles)[0].text)
        closed = form.argument.close
        if texts := texts_of(schema):
            choice = " | ".join(_quoted(text.encode()) for text in texts)
            return f"{middle} ({choice}) {self._marker(closed)}"
        if not kinds or "string" in kinds:
            return f"{middle} {self._text_before(closed)}"
        value = BOOLEANS if kinds == ("boolean",) else self._json(schema)
        return f"{middle} {value} {self._marker(closed)}"

    def _python_call(self, form: CallForm, function: Mapping[str, Any]) -> str:
        name = _quoted(function["name"].encode())
        return self._rule(f'{name} "(" {self._arguments(form, function, "=", ", ")} ")"')

    def _arguments(self, form: CallForm, function: Mapping[str, Any], equals: str, comma: str) -> str:
        def written(key: str, schema: Any) -> str:
            return f"{_quoted((key + equals).encode())} {self._dialect_value(form, schema)}"

        return self._in_order(form, function, _quoted(comma.encode()), written)

    def _in_order(
        self, form: CallForm, function: Mapping[str, Any], comma: str, written: Callable[[str, Any], str]
    ) -> str:
        """Arguments in their order, less those that need not be given: rules for the first one and for those behind."""
        first, rest = "", ""
        arguments = arguments_of(function)
        for key, schema, required in reversed(sorted(arguments) if form.sorts else arguments):
            argument = self._rule(written(key, schema))
            without = ("", "") if required else (f" | {first or EMPTY}", f" | {rest or EMPTY}")
            first, rest = (
                self._rule(f"{argument} {rest}{without[0]}"),
                self._rule(f"{comma} {argument} {rest}{without[1]}"),
            )
        return first

    def _dialect_value(self, form: CallForm, schema: Any) -> str:
        kinds = kinds_of(schema) or ("string",)
        if texts := texts_of(schema):
            quote = self._marker(form.dialect.quotes[0])
            return self._rule(f"{quote} ({' | '.join(_quoted(text.encode()) for text in texts)}) {quote}")
        choices = []
        for kind in kinds:
            if kind == "string":
                choices.append(self._string(form))
            elif kind in ("boolean", "null"):
                wanted = ("null",) if kind == "null" else ("true", "false")
                constants = form.dialect.constants.items()
                choices += [_quoted(word.encode()) for word, value in constants if value in wanted]
            elif kind in PLAIN:
                choices.append(self._rule(PLAIN[kind]))
            elif form.dialect.bare_keys:
                choices.append(self._nested(form))
            else:
                choices.append(self._json(schema if len(kinds) == 1 else {"type": kind}))
        return self._rule(" | ".join(choices))

    def _string(self, form: CallForm) -> str:
        quote = form.dialect.quotes[0]
        if form.dialect.escapes:
            return self._rule(rf"/{quote}([^{quote}\\\n]|\\.)*{quote}/")
        return self._rule(f"{self._marker(quote)} {self._text_before(quote)}")

    def _nested(self, form: CallForm) -> str:
        """Any object or list of the dialect."""
        self._n += 1
        name = f"r{self._n}"
        words = " | ".join(_quoted(word.encode()) for word in form.dialect.constants)
        value = self._rule(f"{self._string(form)} | {self._rule(PLAIN['number'])} | {words} | {name}")
        pair = self._rule(f'/[A-Za-z_][A-Za-z0-9_]*/ ":" {value}')
        self._rules.append(f'{name}: "{{" ({pair} ("," {pair})*)? "}}" | "[" ({value} ("," {value})*)? "]"')
        return name

    # -- channels ----------------------------------------------------------------------------------------------------

    def _channel_calls(self, shape: Shape) -> str:
        """Reasoning, where there is any, and one call."""
        channels = shape.channels
        assert channels is not None, "asked for channels"
        calls = []
        for function in self._functions:
            name = _quoted(function["name"].encode())
            opened, closed = (self._marker(text) for text in channels.call)
            calls.append(self._rule(f"{opened} {name} {closed} {self._json(parameters(function))}"))
        if not channels.thinks:
            return " | ".join(calls)
        ends = self._marker(f"{channels.ends[0]}{channels.start}")
        return f"({self._marker(channels.thinks)} {self._rule(ANY_TEXT)} {ends})? ({' | '.join(calls)})"


def parameters(function: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema of a function's arguments: an object, without others than those it names unless it says so."""
    return {"properties": {}, "additionalProperties": False, **(function.get("parameters") or {}), "type": "object"}


def arguments_of(function: Mapping[str, Any]) -> list[tuple[str, Any, bool]]:
    """(name, schema, whether it must be given) of each argument."""
    schema = parameters(function)
    required = schema.get("required") or ()
    return [(key, value, key in required) for key, value in (schema.get("properties") or {}).items()]


def texts_of(schema: Any) -> list[str]:
    """The texts that a schema allows, where it allows no other."""
    found = (
        schema.get("enum") or ([schema["const"]] if "const" in schema else []) if isinstance(schema, Mapping) else []
    )
    return list(found) if all(isinstance(text, str) and text for text in found) else []


def _quoted(text: bytes) -> str:
    return json.dumps(text.decode("utf-8", "replace"), ensure_ascii=False) if text else ""
