"""A JSON schema as llguidance keeps it: what it would keep too loosely is made tighter, or refused by name.

llguidance itself refuses the keywords that it does not have; some of them are written here in others that it has. It
reads a schema as draft 2020-12 does, with two habits: an object has its properties in the schema's order, and a known
``format`` must be kept. A format that no draft names (``int32``, ``password``) says nothing, as the drafts have it, nor
does ``contentMediaType``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from edgellm.formats.errors import ParameterError, UnsupportedError
from edgellm.structured.ecma_regex import rust_regex
from edgellm.structured.regex_cost import check_repeats

Rule = Callable[[dict[str, Any], str], None]  # changes a schema, or raises with its place

MAX_DEPTH = 64  # schemas within schemas
MAX_SCHEMAS = 10_000
MAX_DEPENDENT = 5  # properties of one object that others depend on; each may or may not be there
MAX_OPTIONAL = 480  # properties of one object; the parser has four items for each, 2,000 in all
# keyword -> how its value holds schemas
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas", "dependencies")
_ONES = (
    "items", "additionalItems", "additionalProperties", "contains", "contentSchema", "else", "if", "not",
    "propertyNames", "then", "unevaluatedItems", "unevaluatedProperties",
)  # fmt: skip
# what also says which properties and items are evaluated
_IN_PLACE = frozenset((
    "$ref", "$dynamicRef", "$recursiveRef", "allOf", "anyOf", "oneOf", "not", "if", "then", "else", "dependentSchemas",
    "dependencies", "contains",
))  # fmt: skip
_COUNTS = ("maxItems", "minItems", "maxLength", "minLength", "maxProperties", "minProperties")
_FORMATS = frozenset((
    "date-time", "date", "time", "duration", "email", "idn-email", "hostname", "idn-hostname", "ipv4", "ipv6", "uri",
    "uri-reference", "iri", "iri-reference", "uuid", "uri-template", "json-pointer", "relative-json-pointer", "regex",
))  # fmt: skip

_LEAP = r"(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:[02468][048]|[13579][26])00)"  # years
_DATE = (
    r"(?:[0-9]{4}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    rf"|02-(?:0[1-9]|1[0-9]|2[0-8]))|{_LEAP}-02-29)"
)
_TIME = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,9})?(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9]|-[A-Za-z0-9]){0,30}"  # no two hyphens together: "xn--" needs Unicode's tables
# llguidance's patterns also take the 30th of February, leap seconds at any time, and names that no host can have
_TIGHTER = {
    "date": f"^{_DATE}$",
    "time": f"^{_TIME}$",
    "date-time": f"^{_DATE}T{_TIME}$",
    "hostname": rf"^{_LABEL}(?:\.{_LABEL}){{0,3}}$",
}


def kept_schema(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema to hand on; nothing that it accepts is refused by ``schema``.

    UnsupportedError for what cannot be kept, ParameterError for what is no schema or is too large, by its place.
    """
    return _Rewriter().schema(schema, "#", 0)


def closed_schema(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A schema that a class gave, whose objects have the properties that are named and no others."""
    return _Rewriter(more=(_closed,)).schema(schema, "#", 0)


def names_are_free(schema: Any) -> bool:
    """Whether somewhere an object may have properties beside those that are named."""
    if not isinstance(schema, Mapping):
        return False
    named = any(schema.get(key) for key in ("properties", "patternProperties", "required"))
    if named and schema.get("additionalProperties") is not False:
        return True
    return any(names_are_free(part) for _, _, part in _inner(schema))


class _Rewriter:
    def __init__(self, more: tuple[Rule, ...] = ()) -> None:
        self.n = 0
        self.rules = (*more, *_RULES)

    def schema(self, schema: Any, place: str, depth: int) -> Any:
        self.n += 1
        if depth > MAX_DEPTH or self.n > MAX_SCHEMAS:
            limit = f"nested {MAX_DEPTH} deep" if depth > MAX_DEPTH else f"{MAX_SCHEMAS} schemas in it"
            raise ParameterError(f"The JSON schema is too large at {place}. Expected at most {limit}.", code="SCHEMA")
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, Mapping) or not all(isinstance(key, str) for key in schema):
            raise ParameterError(
                f"The JSON schema has {type(schema).__name__} at {place}, not a schema.", code="SCHEMA"
            )
        kept = dict(schema)
        kept.pop("x-guidance", None)  # would set llguidance's options
        for key, where, part in _inner(schema):
            if where is None:
                kept[key] = self.schema(part, f"{place}/{key}", depth + 1)
            else:
                if kept[key] is schema[key]:
                    kept[key] = kept[key].copy() if isinstance(kept[key], list) else dict(kept[key])
                kept[key][where] = self.schema(part, f"{place}/{key}/{where}", depth + 1)
        for rule in self.rules:
            rule(kept, place)
        return kept


def _inner(schema: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """The schemas in a schema: keyword, place within its value or None, schema."""
    for key, value in schema.items():
        if key in _LISTS and isinstance(value, list):
            yield from ((key, i, part) for i, part in enumerate(value))
        elif key in _MAPS and isinstance(value, Mapping):
            yield from ((key, name, part) for name, part in value.items() if not isinstance(part, list))
        elif key in _ONES and isinstance(value, bool | Mapping):
            yield key, None, value


def _unsupported(place: str, what: str) -> UnsupportedError:
    return UnsupportedError(f"The JSON schema cannot be kept: at {place} {what}.", code="SCHEMA")


def _closed(schema: dict[str, Any], place: str) -> None:
    if "properties" in schema:
        schema.setdefault("additionalProperties", False)


def _whole_counts(schema: dict[str, Any], place: str) -> None:
    for key in _COUNTS:
        if isinstance(schema.get(key), float) and schema[key].is_integer():
            schema[key] = int(schema[key])


def _no_id_beside_ref(schema: dict[str, Any], place: str) -> None:
    if "$ref" in schema and ("$id" in schema or "id" in schema):
        raise _unsupported(place, "$id stands beside $ref, which drafts read differently. Leave it out")


def _names_may_repeat(schema: dict[str, Any], place: str) -> None:
    """An object's free names are not kept apart, so a count of two or more of them would be worth nothing."""
    least, required = schema.get("minProperties"), schema.get("required")
    n_required = len(set(required)) if isinstance(required, list) else 0
    if isinstance(least, int) and least > n_required + 1:
        raise _unsupported(place, f"minProperties is {least}, of which {n_required} are required. Name more of them")


def _few_optional(schema: dict[str, Any], place: str) -> None:
    properties, required = schema.get("properties"), schema.get("required")
    if isinstance(properties, dict):
        n = len(properties.keys() - set(required if isinstance(required, list) else ()))
        if n > MAX_OPTIONAL:
            raise _unsupported(
                place, f"{n} properties are not required, more than {MAX_OPTIONAL}. Require more of them"
            )


def _patterns(schema: dict[str, Any], place: str) -> None:
    def kept(pattern: str) -> str:
        where = f"The pattern at {place}"
        check_repeats(pattern, where)
        return rust_regex(pattern, where)

    if isinstance(schema.get("pattern"), str):
        schema["pattern"] = kept(schema["pattern"])
    if isinstance(named := schema.get("patternProperties"), dict):
        schema["patternProperties"] = {kept(pattern): part for pattern, part in named.items()}


def _unevaluated(schema: dict[str, Any], place: str) -> None:
    """Where nothing beside it evaluates anything, it speaks of what is additional."""
    for key in ("unevaluatedProperties", "unevaluatedItems"):
        if schema.get(key) is True or schema.get(key) == {}:
            del schema[key]
    if schema.keys() & _IN_PLACE:
        return
    if "unevaluatedProperties" in schema:
        schema.setdefault("additionalProperties", schema.pop("unevaluatedProperties"))
    if "unevaluatedItems" in schema:
        listed = isinstance(schema.get("items"), list)
        schema.setdefault("additionalItems" if listed else "items", schema.pop("unevaluatedItems"))


def _property_names(schema: dict[str, Any], place: str) -> None:
    """The rule of the names where no property is named: those that it allows, and no others."""
    names = schema.get("propertyNames")
    if names is True or names == {}:
        del schema["propertyNames"]
    if not isinstance(names, dict) or not names or {"properties", "patternProperties"} & schema.keys():
        return
    rules, rest = names.keys() - {"type", "title", "description", "$comment"}, schema.get("additionalProperties", {})
    texts = names.get("enum", [names["const"]] if "const" in names else None)
    if names.get("type", "string") != "string":
        return
    if rules in ({"enum"}, {"const"}) and isinstance(texts, list):
        schema["properties"] = {text: rest for text in texts if isinstance(text, str)}
    elif rules == {"pattern"}:
        schema["patternProperties"] = {names["pattern"]: rest}
    elif rules <= {"minLength", "maxLength"}:
        most = names.get("maxLength", "")
        schema["patternProperties"] = {f"^[^]{{{names.get('minLength', 0)},{most}}}$": rest}
    else:
        return
    schema["additionalProperties"] = False
    del schema["propertyNames"]


def _dependent(schema: dict[str, Any], place: str) -> None:
    """Either a property is not there, or what depends on it holds."""
    found: list[tuple[str, Any]] = []
    for key in ("dependentRequired", "dependentSchemas", "dependencies"):
        if isinstance(schema.get(key), dict):
            found += schema.pop(key).items()
    if len(found) > MAX_DEPENDENT:
        raise _unsupported(place, f"{len(found)} properties have others depend on them, more than {MAX_DEPENDENT}")
    for name, needs in found:
        there: dict[str, Any] = {"required": [name, *needs] if isinstance(needs, list) else [name]}
        both = [there] if isinstance(needs, list) else [there, needs]
        choice = {"anyOf": [{"properties": {name: False}}, {"allOf": both}]}
        schema["allOf"] = [*schema.get("allOf", []), choice]


def _formats(schema: dict[str, Any], place: str) -> None:
    name = schema.get("format")
    if isinstance(name, str) and name not in _FORMATS:
        del schema["format"]
    elif isinstance(name, str) and name in _TIGHTER:
        if "pattern" in schema:
            schema["allOf"] = [*schema.get("allOf", []), {"pattern": schema.pop("pattern")}]
        schema["pattern"] = _TIGHTER[name]
        del schema["format"]


_RULES: tuple[Rule, ...] = (
    _whole_counts,
    _no_id_beside_ref,
    _names_may_repeat,
    _few_optional,
    _unevaluated,
    _property_names,
    _patterns,
    _formats,
    _dependent,
)
