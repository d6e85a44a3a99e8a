"""What tools say of their arguments, as far as a grammar of calls needs to know it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

MAX_DEPTH = 32  # schemas within schemas

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
    """The schema of a function's arguments: an object, without others than those it names unless it says so."""
    return {"properties": {}, "additionalProperties": False, **(function.get("parameters") or {}), "type": "object"}


def arguments_of(function: Mapping[str, Any]) -> list[tuple[str, Any, bool]]:
    """(name, schema, whether it must be given) of each argument."""
    schema = parameters(function)
    required = schema.get("required") or ()
    return [(key, value, key in required) for key, value in (schema.get("properties") or {}).items()]


def freed(function: Mapping[str, Any]) -> dict[str, Any]:
    """A function whose arguments may be any; those that are described keep their names."""
    properties = (function.get("parameters") or {}).get("properties")
    names: dict[str, Any] = {key: {} for key in properties} if isinstance(properties, Mapping) else {}
    return {"name": function["name"], "parameters": {"properties": names, "additionalProperties": True}}


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
