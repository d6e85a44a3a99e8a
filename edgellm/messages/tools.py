"""Tools: what callers pass as one, and Python functions as tools, described by their signatures and docstrings."""

from __future__ import annotations

import dataclasses
import enum
import inspect
import json
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Union

from edgellm import arguments
from edgellm.formats.errors import ParameterError

NAME = re.compile(r"[A-Za-z0-9_.\-]{1,128}")
SIMPLE: dict[Any, dict[str, Any]] = {
    str: {"type": "string"},
    int: {"type": "integer"},
    float: {"type": "number"},
    bool: {"type": "boolean"},
    type(None): {"type": "null"},
    list: {"type": "array"},
    dict: {"type": "object"},
    tuple: {"type": "array"},
    Any: {},
    inspect.Parameter.empty: {},
}
EXPECTED = "a Python function, or a description {'type': 'function', 'function': {'name': ..., 'parameters': ...}}"
# "Args:" and a line for each, ":param x:", or numpy's underlined "Parameters"
_SECTION = re.compile(r"^\s*(Args|Arguments|Parameters|Returns?|Raises|Yields|Examples?|Notes?)\s*:?\s*$")
_GOOGLE = re.compile(r"^(\s+)\*{0,2}(\w+)\s*(?:\([^)]*\))?\s*:\s*(.*)$")
_SPHINX = re.compile(r"^\s*:(?:param|parameter|arg)\s+(?:[\w\[\], .|]+\s+)?(\w+)\s*:\s*(.*)$")
_NUMPY = re.compile(r"^\*{0,2}(\w+)\s*(?::.*)?$")


def as_tools(tools: Sequence[Any] | None) -> list[dict[str, Any]] | None:
    """The descriptions of tools; ParameterError for what is none, or for two of one name."""
    if tools is None:
        return None
    described = [as_tool(tool) for tool in arguments.items("tools", tools, f"a list; each is {EXPECTED}")]
    names = [tool["function"]["name"] for tool in described]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ParameterError(f"tools has {twice[0]!r} twice. Give each tool a name of its own.")
    return described


def as_tool(tool: Any) -> dict[str, Any]:
    """The description of one tool, in the form of the OpenAI protocol."""
    if callable(tool) and not isinstance(tool, Mapping):
        return function_tool(tool)
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise arguments.wrong("A tool", tool, EXPECTED)
    if not NAME.fullmatch(function["name"]):
        raise arguments.wrong("The name of a tool", function["name"], "1 to 128 letters, digits, '_', '-' or '.'")
    parameters = function.get("parameters")
    if parameters is not None and not isinstance(parameters, Mapping):
        raise arguments.wrong(f"parameters of the tool {function['name']}", parameters, "a JSON schema")
    return {"type": "function", "function": dict(function)}


def function_tool(function: Callable[..., Any]) -> dict[str, Any]:
    """A Python function as a tool: its name, its docstring, and a JSON schema of its parameters.

    ParameterError for parameters that no JSON can fill.
    """
    name = getattr(function, "__name__", type(function).__name__)
    if not NAME.fullmatch(name):
        raise ParameterError(f"The function {name} cannot be a tool by that name. Give it one with def.")
    told, about = read_docstring(inspect.getdoc(function) or "")
    properties, required = {}, []
    for parameter, kind in parameters_of(function):
        schema = schema_of(kind, f"{name}({parameter.name})")
        if parameter.name in about:
            schema = {**schema, "description": about[parameter.name]}
        if parameter.default is inspect.Parameter.empty:
            required.append(parameter.name)
        elif isinstance(parameter.default, str | int | float | bool):
            schema = {**schema, "default": parameter.default}
        properties[parameter.name] = schema
    schema = {"type": "object", "properties": properties, "required": required}
    return {"type": "function", "function": {"name": name, "description": told, "parameters": schema}}


def parameters_of(function: Callable[..., Any]) -> list[tuple[inspect.Parameter, Any]]:
    """The parameters of a function and their types; ParameterError for those that have no name."""
    name = getattr(function, "__name__", str(function))
    try:
        signature = inspect.signature(function)
        inner = function if inspect.isroutine(function) else type(function).__call__
        hints = typing.get_type_hints(inner, include_extras=True)
    except (TypeError, ValueError, NameError) as error:
        raise ParameterError(f"The function {name} cannot be a tool: {error}. Give it plain type hints.") from None
    unnamed = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    for parameter in signature.parameters.values():
        if parameter.kind in unnamed:
            raise ParameterError(
                f"The function {name} cannot be a tool: {parameter} cannot be given by name. Write out its parameters."
            )
    return [(p, hints.get(p.name, inspect.Parameter.empty)) for p in signature.parameters.values()]


def schema_of(kind: Any, where: str) -> dict[str, Any]:
    """The JSON schema of a type hint; ParameterError for a type that has none."""
    if (isinstance(kind, type) or kind is Any) and kind in SIMPLE:
        return dict(SIMPLE[kind])
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        texts = [text for text in (_described(note) for note in inner[1:]) if text]
        return {**schema_of(inner[0], where), **({"description": texts[0]} if texts else {})}
    if origin is Literal:
        return _choices(list(inner))
    if origin in (Union, types.UnionType):
        return _union([schema_of(one, where) for one in inner])
    if origin is dict:
        values = schema_of(inner[1], where)
        return {"type": "object", **({"additionalProperties": values} if values else {})}
    if origin is tuple and Ellipsis not in inner:
        each = [schema_of(one, where) for one in inner]
        return {"type": "array", "prefixItems": each, "minItems": len(each), "maxItems": len(each)}
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return {"type": "array", "items": schema_of(inner[0], where)}
    if isinstance(kind, type):
        return _class_schema(kind, where)
    raise _no_schema(kind, where)


def _no_schema(kind: Any, where: str) -> ParameterError:
    return ParameterError(
        f"{where}: the type {getattr(kind, '__name__', kind)} has no JSON form. Take str, int, float, bool, list, "
        "dict, Literal, an Enum, a dataclass, a TypedDict or a pydantic model."
    )


def _described(note: Any) -> str:
    return note if isinstance(note, str) else getattr(note, "description", None) or ""


def _choices(values: list[Any]) -> dict[str, Any]:
    kinds = {type(value) for value in values}
    kind = SIMPLE.get(kinds.pop(), {}) if len(kinds) == 1 else {}
    return {**kind, "enum": values}


def _union(each: list[dict[str, Any]]) -> dict[str, Any]:
    """Optional as "nullable", several plain types as a list of names, others as alternatives."""
    rest = [schema for schema in each if schema != {"type": "null"}]
    if {} in rest:
        return {}
    if all(schema.keys() == {"type"} for schema in each):
        names = [schema["type"] for schema in each]
        return {"type": names if len(names) > 1 else names[0]}
    return {"anyOf": each} if len(each) > 1 else each[0]


def _class_schema(kind: type, where: str) -> dict[str, Any]:
    if hasattr(kind, "model_json_schema"):
        return kind.model_json_schema()
    if issubclass(kind, enum.Enum):
        return _choices([member.value for member in kind])
    if dataclasses.is_dataclass(kind) or typing.is_typeddict(kind):
        hints = typing.get_type_hints(kind, include_extras=True)
        required = sorted(getattr(kind, "__required_keys__", ()))
        if dataclasses.is_dataclass(kind):
            missing = dataclasses.MISSING
            fields = dataclasses.fields(kind)
            required = [f.name for f in fields if f.default is missing and f.default_factory is missing]
        properties = {name: schema_of(hint, f"{where}.{name}") for name, hint in hints.items()}
        return {"type": "object", "properties": properties, "required": required}
    raise _no_schema(kind, where)


def read_docstring(text: str) -> tuple[str, dict[str, str]]:
    """What a docstring says of the function, and of each parameter: Google's, numpy's or Sphinx's form."""
    told: list[str] = []
    about: dict[str, str] = {}
    section, name, margin = "", "", 0
    for line in text.splitlines():
        if line.strip() and set(line.strip()) == {"-"}:
            continue
        if found := _SECTION.match(line):
            section, name, margin = found[1], "", 0
        elif found := _SPHINX.match(line):
            section, name = "Args", found[1]
            about[name] = found[2].strip()
        elif line.lstrip().startswith(":"):
            section, name = "Returns", ""
        elif section in ("Args", "Arguments", "Parameters"):
            found = _GOOGLE.match(line)
            if found and (not margin or len(found[1]) <= margin):
                margin, name = len(found[1]), found[2]
                about[name] = found[3].strip()
            elif found := _NUMPY.match(line):
                name = found[1]
                about[name] = ""
            elif name:
                about[name] = f"{about[name]} {line.strip()}".strip()
        elif not section:
            told.append(line)
    return "\n".join(told).strip(), about


class ToolBox:
    """The Python functions among the tools, to be run. ``described`` are all tools as JSON."""

    def __init__(self, tools: Sequence[Any] | None) -> None:
        tools = None if tools is None else arguments.items("tools", tools, f"a list; each is {EXPECTED}")
        self.described = as_tools(tools)
        self._functions = {
            described["function"]["name"]: tool
            for tool, described in zip(tools or (), self.described or (), strict=True)
            if callable(tool) and not isinstance(tool, Mapping)
        }

    def runs(self, calls: Sequence[Mapping[str, Any]]) -> bool:
        """Whether all of these are of Python functions, or of tools that nobody knows."""
        known = {tool["function"]["name"] for tool in self.described or ()}
        names = [call["function"]["name"] for call in calls]
        return bool(self._functions) and all(name in self._functions or name not in known for name in names)

    def begin(self, call: Mapping[str, Any]) -> Any:
        """What the function of a call returns, a coroutine where it is one; what it raises goes on."""
        name = call["function"]["name"]
        if name not in self._functions:
            raise ParameterError(f"There is no tool {name!r}. There are: {', '.join(self._functions)}.")
        function = self._functions[name]
        given = json.loads(call["function"]["arguments"] or "{}")
        kinds = {parameter.name: kind for parameter, kind in parameters_of(function)}
        return function(**{key: converted(value, kinds.get(key, Any)) for key, value in given.items()})


def converted(value: Any, kind: Any) -> Any:
    """A JSON value as the type that a function wants; ValueError or TypeError where it cannot be."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return converted(value, inner[0])
    if origin in (list, tuple) and isinstance(value, list):
        each = inner[0] if inner else Any
        return origin(converted(item, each) for item in value)
    if origin in (Union, types.UnionType):
        kinds = [one for one in inner if one is not type(None)]
        return value if value is None or len(kinds) != 1 else converted(value, kinds[0])
    if not isinstance(kind, type):
        return value
    if hasattr(kind, "model_validate"):
        return kind.model_validate(value)
    if issubclass(kind, enum.Enum):
        return kind(value)
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        hints = typing.get_type_hints(kind)
        return kind(**{key: converted(item, hints.get(key, Any)) for key, item in value.items()})
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind in (str, int, float, bool) and (not isinstance(value, kind) or (kind is int and isinstance(value, bool))):
        raise TypeError(f"expected {kind.__name__}, got {json.dumps(value)}")
    return value


def result_text(result: Any) -> str:
    """What a function returned, as the text of a tool message."""
    if isinstance(result, str):
        return result
    if hasattr(result, "model_dump_json"):
        return str(result.model_dump_json())
    if dataclasses.is_dataclass(result) and not isinstance(result, type):
        result = dataclasses.asdict(result)
    return json.dumps(result, ensure_ascii=False, default=str)


def error_text(error: Exception) -> str:
    """What a function raised, as the text of a tool message."""
    return json.dumps({"error": f"{type(error).__name__}: {error}"}, ensure_ascii=False)
