"""Arguments that are written without JSON around them, as Lark: in tags, in Python, in the dialect of Gemma.

Each value keeps its JSON schema as the reader will understand what is written. Where the form cannot keep a part, the
value is refused by name if it has to be exact, and freer if not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from edgellm.formats.errors import UnsupportedError
from edgellm.messages.shapes import CallForm, Middle
from edgellm.messages.tool_schemas import ANNOTATIONS, DEFINITIONS, names_all
from edgellm.messages.values import kind_of, kinds_of
from edgellm.structured.ecma_regex import rust_regex
from edgellm.structured.regex_cost import check_repeats

TEXT_RULES = frozenset(("minLength", "maxLength", "pattern"))
OBJECT_RULES = frozenset(("properties", "required", "additionalProperties", "$defs", "definitions"))
LIST_RULES = frozenset(("items", "minItems", "maxItems"))
WORDS: dict[tuple[str, ...], str] = {
    ("boolean",): '("true" | "false" | "True" | "False")',
    ("null",): '("null" | "None")',
}
NUMBERS = ("integer", "number")
MAX_DEPTH = 16  # schemas in one another
MAX_SCHEMAS = 2000  # of one tool
MAX_ITEMS = 64  # of a list in a dialect of its own, whose count is written out
ANY = "(?s:.*)"
BARE_KEY = r"""/[^\s,:{}\[\]()"'<>=]+/"""
IDENTIFIER = r"/[\p{L}_]\w*/"
_PART = re.compile(r"\\.|\[\^?(?:\\.|[^\]\\])*\]|.", re.DOTALL)
_SLASH = re.compile(r"\\.|/", re.DOTALL)


class Lark(Protocol):
    """The grammar that is being written; each gives what stands for it in a rule."""

    def rule(self, body: str) -> str:
        """A new rule."""
        ...

    def recursive(self, body: Callable[[str], str]) -> str:
        """A rule that names itself."""
        ...

    def marker(self, text: str) -> str:
        """A marker."""
        ...

    def json(self, schema: Any, exact: bool) -> str:
        """A JSON value."""
        ...

    def text_before(self, marker: str, regex: str = "") -> str:
        """Text, which all of a regular expression matches, and a marker."""
        ...

    def in_order(self, parts: Sequence[tuple[str, bool]], comma: str) -> str:
        """Parts in their order, less those that need not come, with commas between."""
        ...


class Values:
    """Writes the values of one tool's arguments.

    exact   whether what cannot be kept is refused
    name    the tool's
    root    the schema of its arguments, for references
    """

    def __init__(self, lark: Lark, form: CallForm, name: str, root: Mapping[str, Any], exact: bool) -> None:
        self._lark, self._form, self._name, self._root, self._exact = lark, form, name, root, exact
        self._n = 0  # schemas looked at: references may go in circles

    def checked(self) -> None:
        """UnsupportedError where the arguments together have a rule that no list of arguments keeps."""
        self._only(self._root, OBJECT_RULES | {"type"}, "#")
        if missing := set(self._root.get("required") or ()) - set(self._root.get("properties") or ()):
            self._loses(f"the required property {sorted(map(str, missing))[0]}, which is not described", "#")
        if self._root.get("additionalProperties", False) is not False:
            self._loses("additionalProperties", "#")

    def any_arguments(self, comma: str) -> str:
        """Arguments of any names and values."""
        form = self._form
        if form.mode == "tagged":
            ends = form.middles[0].text.strip()[:1]
            pair = f"{self._lark.marker(form.argument.open)} /[^{re.escape(ends)}\\n]+/ {self.tagged({}, '#')}"
        else:
            name, equals = (BARE_KEY, ":") if form.dialect.bare_keys else (IDENTIFIER, "=")
            pair = f'{name} "{equals}" {self._any()}'
        one = self._lark.rule(pair)
        return self._lark.rule(f"({one} ({comma} {one})*)?")

    def _loses(self, what: str, place: str) -> None:
        if self._exact:
            raise UnsupportedError(
                f"The tool {self._name} is strict, and the form in which this model calls cannot keep {what} at "
                f"{place}. Leave it out, or do not ask for strict.",
                code="SCHEMA",
            )

    def _only(self, schema: Mapping[str, Any], known: frozenset[str], place: str) -> None:
        for rule in schema.keys() - known - ANNOTATIONS:
            self._loses(rule, place)

    # -- schemas ----------------------------------------------------------------------------------------------------

    def _resolved(self, schema: Any, place: str) -> Mapping[str, Any]:
        """A schema in place of a reference to it."""
        self._n += 1
        if self._n > MAX_SCHEMAS or place.count("/") > MAX_DEPTH:
            self._loses(f"more than {MAX_SCHEMAS} schemas, or {MAX_DEPTH} in one another", place)
            return {}
        for _ in range(MAX_DEPTH):
            if not isinstance(schema, Mapping):
                return {} if schema is not False else {"enum": []}
            if not isinstance(schema.get("$ref"), str):
                return schema
            self._only(schema, frozenset(("$ref",)), place)
            found: Any = self._root
            for part in schema["$ref"].removeprefix("#").split("/")[1:]:
                found = found.get(part) if isinstance(found, Mapping) else None
            if found is None:
                self._loses(f"the reference {schema['$ref']}", place)
                return {}
            schema = found
        self._loses("references to references", place)
        return {}

    def _choices(self, schema: Mapping[str, Any], place: str) -> list[Mapping[str, Any]]:
        """The schemas of a union, each of one type; the schema itself where it is none."""
        if schema.get("nullable"):
            rest = {key: rule for key, rule in schema.items() if key != "nullable"}
            return [*self._choices(rest, place), {"type": "null"}]
        every = schema.get("allOf")
        if isinstance(every, list) and len(every) == 1:
            inner = self._resolved(every[0], f"{place}/allOf")
            rest = {key: rule for key, rule in schema.items() if key != "allOf"}
            self._only({key: rule for key, rule in rest.items() if key in inner}, frozenset(), place)
            return self._choices({**rest, **inner}, f"{place}/allOf")
        union = next((key for key in ("anyOf", "oneOf") if isinstance(schema.get(key), list)), None)
        if union is not None:
            self._only(schema, frozenset((union, "type")), place)
            outer = {"type": schema["type"]} if "type" in schema else {}
            parts = [
                one
                for part in schema[union]
                for one in self._choices({**outer, **self._resolved(part, f"{place}/{union}")}, f"{place}/{union}")
            ]
            kinds = [kind for part in parts for kind in kinds_of(part)]
            if union == "oneOf" and len(set(kinds)) < max(len(kinds), len(parts)):
                self._loses("oneOf", place)
            return parts
        if isinstance(schema.get("type"), list):
            return [{**schema, "type": kind} for kind in schema["type"]]
        return [schema]

    def _whole(self, schema: Mapping[str, Any]) -> str:
        """A value in JSON, with what it refers to."""
        known = {key: self._root[key] for key in DEFINITIONS if key in self._root}
        return self._lark.json({**known, **schema}, self._exact)

    def _regex(self, schema: Mapping[str, Any], place: str) -> str:
        """What all of a text must match, in Lark; "" for any."""
        self._only(schema, TEXT_RULES | {"type"}, place)
        parts, most = [], schema.get("maxLength", "")
        if "minLength" in schema or "maxLength" in schema:
            parts.append(f"(?s:.{{{schema.get('minLength', 0)},{most}}})")
        pattern = schema.get("pattern")
        if isinstance(pattern, str) and ("\n" in pattern or _branches(pattern)):
            self._loses(f"the pattern {pattern}", place)
        elif isinstance(pattern, str):
            check_repeats(pattern, f"The pattern at {place}")
            ends = pattern.endswith("$") and not pattern.endswith("\\$")
            inner = rust_regex(pattern.removeprefix("^").removesuffix("$" if ends else ""), f"The pattern at {place}")
            parts.append(f"{'' if pattern.startswith('^') else ANY}{inner}{'' if ends else ANY}")
        for part in parts:
            check_repeats(part, f"The text at {place}")
        return " & ".join(f"/{_SLASH.sub(_escaped_slash, part)}/" for part in parts)

    # -- in tags ----------------------------------------------------------------------------------------------------

    def tagged(self, schema: Any, place: str) -> str:
        """What comes behind a key: a middle, a value and the closing marker; a middle may name the type."""
        schema = self._resolved(schema, place)
        if not any(middle.kinds for middle in self._form.middles):
            return self._tagged(schema, place, self._form.middles[0].text)
        parts = [self._resolved(part, place) for part in self._choices(schema, place)]
        written = [
            self._tagged(self._typed(part, fitting), place, middle.text)
            for part in parts
            for middle in self._form.middles
            if (fitting := _fitting(middle, part))
        ]
        return f"({' | '.join(written)})"

    def _typed(self, schema: Mapping[str, Any], kinds: list[str]) -> Mapping[str, Any]:
        """A schema of values of these types."""
        if isinstance(schema.get("enum"), list) and schema["enum"]:
            return {
                **schema,
                "enum": [one for one in schema["enum"] if kind_of(json.dumps(one, default=str)) & set(kinds)],
            }
        return schema if "type" in schema or "const" in schema else {**schema, "type": kinds}

    def _tagged(self, schema: Mapping[str, Any], place: str, before: str) -> str:
        form = self._form
        kinds = kinds_of(schema)
        middle = self._lark.marker(before)
        closed = form.argument.close
        if texts := texts_of(schema):
            self._text_kind(kinds, place)
            choice = " | ".join(quoted(text.encode()) for text in texts)
            return f"{middle} ({choice}) {self._lark.marker(closed)}"
        if kinds == ("string",) and "enum" not in schema and "const" not in schema:
            choices = self._choices(schema, place)
            regex = self._regex(choices[0], place) if len(choices) == 1 else ""
            return f"{middle} {self._lark.text_before(closed, regex)}"
        if not kinds or "string" in kinds:
            self._plain(schema, place)
            return f"{middle} {self._lark.text_before(closed)}"
        several = schema.get("nullable") or isinstance(schema.get("type"), list)
        parts = self._choices(schema, place) if several else [schema]
        return f"{middle} ({' | '.join(map(self._printed, parts))}) {self._lark.marker(closed)}"

    def _printed(self, schema: Mapping[str, Any]) -> str:
        """A value that is no text; templates print words of JSON or of Python."""
        word = None if self._ruled(schema) else WORDS.get(kinds_of(schema))
        return word or self._whole(schema)

    def _text_kind(self, kinds: tuple[str, ...], place: str) -> None:
        if kinds != ("string",):
            self._loses("texts of no type", place)

    def _ruled(self, schema: Mapping[str, Any]) -> bool:
        return bool(schema.keys() - ANNOTATIONS - {"type"})

    def _plain(self, schema: Mapping[str, Any], place: str) -> None:
        """Any text may come: it must be right whatever it says."""
        for part in self._choices(schema, place):
            part = self._resolved(part, place)
            self._only(part, frozenset(("type",)), place)

    # -- in a dialect -----------------------------------------------------------------------------------------------

    def value(self, schema: Any, place: str) -> str:
        """A value in the form's dialect."""
        return self._lark.rule(" | ".join(self._alternatives(self._resolved(schema, place), place)))

    def _alternatives(self, schema: Mapping[str, Any], place: str) -> Iterator[str]:
        for part in self._choices(schema, place):
            part = self._resolved(part, place)
            kinds = kinds_of(part)
            if texts := texts_of(part):
                yield from (self._quoted(text) for text in texts)
            elif len(kinds) == 1 and ("type" in part or not part.keys() & {"enum", "const"}):
                yield from self._of_kind(part, kinds[0], place)
            elif "enum" in part or "const" in part:
                self._loses("values of several types", place)
                yield self._any()
            else:
                self._only(part, frozenset(("type",)), place)
                yield self._any()

    def _of_kind(self, schema: Mapping[str, Any], kind: str, place: str) -> Iterator[str]:
        dialect = self._form.dialect
        if kind == "string":
            yield self._string(self._regex({**schema}, place))
        elif kind in ("boolean", "null"):
            self._only(schema, frozenset(("type",)), place)
            wanted = ("null",) if kind == "null" else ("true", "false")
            yield from (quoted(word.encode()) for word, value in dialect.constants.items() if value in wanted)
        elif kind in NUMBERS or not dialect.bare_keys:
            yield self._whole(schema)
        else:
            yield self._bare_object(schema, place) if kind == "object" else self._bare_list(schema, place)

    def _quoted(self, text: str) -> str:
        """A text in any of the quotes that there are; models have habits of their own."""
        dialect = self._form.dialect
        if not dialect.escapes:
            quote = self._lark.marker(dialect.quotes[0])
            return f"{quote} {quoted(text.encode())} {quote}"
        inner = json.dumps(text, ensure_ascii=False)[1:-1].replace('\\"', '"')
        written = (inner.replace(quote, "\\" + quote) for quote in dialect.quotes)
        return _either([quoted(f"{q}{w}{q}".encode()) for q, w in zip(dialect.quotes, written, strict=True)])

    def _string(self, regex: str = "") -> str:
        dialect = self._form.dialect
        if not dialect.escapes:
            return f"{self._lark.marker(dialect.quotes[0])} {self._lark.text_before(dialect.quotes[0], regex)}"
        return _either([self._string_in(quote, regex) for quote in dialect.quotes])

    def _string_in(self, quote: str, regex: str) -> str:
        if not regex:
            return self._lark.rule(rf"/{quote}([^{quote}\\\n]|\\.)*{quote}/")
        inner = self._lark.text_before("", rf"{regex} & /[^{quote}\\\n]*/")
        return f"{quoted(quote.encode())} {inner} {quoted(quote.encode())}"

    def _bare_object(self, schema: Mapping[str, Any], place: str) -> str:
        """{key:value,...}"""
        self._only(schema, OBJECT_RULES | {"type"}, place)
        properties, required = schema.get("properties") or {}, schema.get("required") or ()
        if missing := [name for name in required if name not in properties]:
            self._loses(f"the required property {missing[0]}, which is not described", place)
        others = schema.get("additionalProperties", False)
        if others is not False and (properties or others is not True):
            self._loses("additionalProperties", place)
        if not properties or not names_all(schema):
            return self._held()[0]
        names = sorted(properties) if self._form.sorts else list(properties)
        parts = [
            (f"{quoted(f'{name}:'.encode())} {self.value(properties[name], f'{place}/{name}')}", name in required)
            for name in names
        ]
        return f'"{{" {self._lark.in_order(parts, quoted(b","))} "}}"'

    def _bare_list(self, schema: Mapping[str, Any], place: str) -> str:
        """[value,...]"""
        self._only(schema, LIST_RULES | {"type"}, place)
        least, most = schema.get("minItems", 0), schema.get("maxItems")
        if least > MAX_ITEMS or (most or 0) > MAX_ITEMS:
            self._loses(f"more than {MAX_ITEMS} items", place)
            least, most = 0, None
        item = self.value(schema.get("items", {}), f"{place}/items")
        if most == 0:
            return '"[" "]"'
        more = f'("," {item}){{{max(least - 1, 0)},{"" if most is None else most - 1}}}'
        return f'"[" {item} {more} "]"' if least else f'"[" ({item} {more})? "]"'

    def _any(self) -> str:
        """Any value of the dialect."""
        words = [quoted(word.encode()) for word in self._form.dialect.constants]
        if not self._form.dialect.bare_keys:
            others = self._lark.json({"type": ["number", "object", "array"]}, False)
            return self._lark.rule(" | ".join([self._string(), *words, others]))
        return self._held()[1]

    def _held(self) -> tuple[str, str]:
        """Any object, and any value, of a dialect with bare keys."""
        words = " | ".join(quoted(word.encode()) for word in self._form.dialect.constants)
        number = self._lark.json({"type": "number"}, False)
        objects = []

        def body(name: str) -> str:
            pair = self._lark.rule(f'{BARE_KEY} ":" {name}')
            objects.append(self._lark.rule(f'"{{" ({pair} ("," {pair})*)? "}}"'))
            return f'{self._string()} | {number} | {words} | {objects[0]} | "[" ({name} ("," {name})*)? "]"'

        whole = self._lark.recursive(body)
        return objects[0], whole


def _fitting(middle: Middle, schema: Mapping[str, Any]) -> list[str]:
    """The types that a middle says of a value and that a schema allows."""
    if "type" in schema:
        known = set(kinds_of({"type": schema["type"]}))
        known |= {"integer"} if "number" in known else set()
    elif values := schema.get("enum") or ([schema["const"]] if "const" in schema else []):
        known = set().union(*(kind_of(json.dumps(value, default=str)) for value in values))
    else:
        return list(middle.kinds)
    return [kind for kind in middle.kinds if kind in known]


def texts_of(schema: Any) -> list[str]:
    """The texts that a schema allows, where it allows no other."""
    found = (
        schema.get("enum") or ([schema["const"]] if "const" in schema else []) if isinstance(schema, Mapping) else []
    )
    return list(found) if all(isinstance(text, str) and text for text in found) else []


def quoted(text: bytes) -> str:
    """A text in Lark; "" for none."""
    return json.dumps(text.decode("utf-8", "replace"), ensure_ascii=False) if text else ""


def _either(written: Sequence[str]) -> str:
    return written[0] if len(written) == 1 else f"({' | '.join(written)})"


def _branches(pattern: str) -> bool:
    """Whether a pattern has alternatives outside all groups: its anchors then belong to one of them."""
    depth = 0
    for part in _PART.findall(pattern):
        depth += (part == "(") - (part == ")")
        if part == "|" and not depth:
            return True
    return False


def _escaped_slash(found: re.Match[str]) -> str:
    return found.group() if len(found.group()) > 1 else "\\/"
