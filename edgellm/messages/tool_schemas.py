"""What tools say of their arguments, as far as a grammar of calls needs to know it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

MAX_DEPTH = 32  # schemas within schemas
ANNOTATIONS = frozenset((
    "title", "description", "default", "examples", "$comment", "deprecated", "readOnly", "writeOnly", "example",
    "$schema", "$id", "nullable",
))  # fmt: skip
DEFINITIONS = ("$defs", "definitions")
# what may bring an object other properties than "properties" names
NAMING = frozenset((
    "$ref", "anyOf", "oneOf", "allOf", "if", "then", "else", "patternProperties", "dependentSchemas",
    "unevaluatedProperties",
))  # fmt: skip

# keyword -> what its value is; all else about a schema is for llguidance to judge
_KINDS: dict[str, type | tuple[type, ...]] = {
    "properties": Mapping,
    "required": list,
    "enum": list,
    "type": (str, list),
    "pattern": str,
    "$ref": str,
    "$defs": Mapping,
    "definitions": Mapping,
    **dict.fromkeys(("anyOf", "oneOf", "allOf"), list),
    **dict.fromkeys(("minItems", "maxItems", "minLength", "maxLength"), int),
    **dict.fromkeys(("items", "additionalProperties"), (Mapping, bool)),
}


def name_of(tool: Mapping[str, Any]) -> str:
    """The name of a tool."""
    return str(tool["function"]["name"])


def is_strict(tool: Mapping[str, Any]) -> bool:
    """Whether its arguments have to keep all of its schema."""
    return bool(tool["function"].get("strict"))


def parameters(function: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema of a function's arguments: an object, without others than those it names unless it says so.

    One that is nothing but a reference is what it refers to.
    """
    found = _referred(function.get("parameters") or {})
    return {"properties": {}, "additionalProperties": False, **found, "type": "object"}


def _referred(root: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a root refers to, with its definitions; the root itself where it refers to nothing, or in a circle."""
    known = {key: root[key] for key in DEFINITIONS if key in root}
    schema = root
    for _ in range(MAX_DEPTH):
        reference = schema.get("$ref")
        if not isinstance(reference, str) or schema.keys() - ANNOTATIONS - {"$ref", "type", *DEFINITIONS}:
            break
        found: Any = root
        for part in reference.removeprefix("#").split("/")[1:]:
            found = found.get(part) if isinstance(found, Mapping) else None
        if found is root or not isinstance(found, Mapping):
            return root
        schema = {**known, **found}
    return root if "$ref" in schema else schema


def names_all(schema: Mapping[str, Any]) -> bool:
    """Whether an object can have no other properties than those it names, and names all that it must have."""
    names = schema.get("properties") or {}
    is_closed = schema.get("additionalProperties", False) is False and not schema.keys() & NAMING
    return is_closed and set(schema.get("required") or ()) <= set(names)


def arguments_of(function: Mapping[str, Any]) -> list[tuple[str, Any, bool]]:
    """(name, schema, whether it must be given) of each argument."""
    schema = parameters(function)
    required = schema.get("required") or ()
    return [(key, value, key in required) for key, value in (schema.get("properties") or {}).items()]


def freed(function: Mapping[str, Any]) -> dict[str, Any]:
    """A function whose arguments may be any."""
    return {"name": function["name"], "parameters": {"additionalProperties": True}}


def is_well_formed(schema: Any, depth: int = 0) -> bool:
    """Whether keywords have values of their kinds, and nothing is nested too deeply."""
    if isinstance(schema, bool):
        return True
    if not isinstance(schema, Mapping) or depth > MAX_DEPTH:
        return False
    if not all(isinstance(schema[key], kind) for key, kind in _KINDS.items() if key in schema):
        return False
    if not all(isinstance(name, str) for name in schema.get("required", ())):
        return False
    return all(is_well_formed(part, depth + 1) for part in _parts(schema))


def _parts(schema: Mapping[str, Any]) -> Iterable[Any]:
    for key in ("properties", "$defs", "definitions"):
        yield from schema.get(key, {}).values()
    for key in ("anyOf", "oneOf", "allOf"):
        yield from schema.get(key, ())
    yield from (schema[key] for key in ("items", "additionalProperties") if key in schema)
