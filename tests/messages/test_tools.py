"""Python functions as tools: described as transformers describes them, called with what they ask for."""

from __future__ import annotations

import dataclasses
import enum
import json
from typing import Annotated, Any, Literal, TypedDict

import jsonschema
import pytest

from edgellm.formats.errors import ParameterError
from edgellm.messages.tools import ToolBox, as_tools, function_tool, result_text


class Unit(enum.Enum):
    """A unit."""

    C = "celsius"
    F = "fahrenheit"


@dataclasses.dataclass
class Place:
    """A place."""

    city: str
    floor: int = 0


class Span(TypedDict):
    """From and to."""

    start: int
    end: int


def simple(city: str, days: int, ratio: float, metric: bool) -> str:
    """Looks something up.

    Args:
        city: The city, with
            a second line.
        days: How many.
        ratio: A part.
        metric: Which units.

    Returns:
        The answer.
    """
    return f"{city} {days} {ratio} {metric}"


def containers(names: list[str], table: dict[str, int], anything: dict, either: int | str, maybe: str | None) -> None:
    """Takes containers.

    Args:
        names: Names.
        table: A table.
        anything: Whatever.
        either: One of two.
        maybe: Perhaps.
    """


def described(annotated: Annotated[int, "from the hint"], unit: Literal["a", "b"] = "a", kind: Unit = Unit.C) -> None:
    """Speaks in other ways.

    :param unit: from Sphinx
    """


def numpy_style(first: int, second: str = "x") -> None:
    """Speaks numpy.

    Parameters
    ----------
    first : int
        The first.
    second : str, optional
        The second,
        in two lines.

    Returns
    -------
    None
    """


def structured(place: Place, span: Span, places: list[Place], when: Place | None = None) -> str:
    """Takes structures."""
    return f"{place.city} {span['end']} {[p.floor for p in places]} {when}"


@pytest.mark.parametrize("function", [simple, containers])
def test_a_function_is_described_as_transformers_describes_it(function: Any) -> None:
    judge = pytest.importorskip("transformers.utils.chat_template_utils", reason="transformers judges the schema")
    expected = judge.get_json_schema(function)["function"]
    expected.pop("return", None)
    found = function_tool(function)["function"]
    for name, schema in expected["parameters"]["properties"].items():
        mine = found["parameters"]["properties"][name]
        if schema.pop("nullable", False):  # its word for what JSON Schema calls a type
            schema["type"] = [schema["type"], "null"]
        assert mine == schema, name
    assert found["name"] == expected["name"] and found["description"] == expected["description"]
    assert found["parameters"]["required"] == expected["parameters"]["required"]


def test_docstrings_and_hints_of_other_styles() -> None:
    properties = function_tool(described)["function"]["parameters"]["properties"]
    assert properties["annotated"] == {"type": "integer", "description": "from the hint"}
    assert properties["unit"] == {"type": "string", "enum": ["a", "b"], "description": "from Sphinx", "default": "a"}
    assert properties["kind"] == {"type": "string", "enum": ["celsius", "fahrenheit"]}
    function = function_tool(numpy_style)["function"]
    assert function["description"] == "Speaks numpy."
    assert {name: schema["description"] for name, schema in function["parameters"]["properties"].items()} == {
        "first": "The first.",
        "second": "The second, in two lines.",
    }


def test_structures_have_schemas_and_arrive_as_what_they_are() -> None:
    schema = function_tool(structured)["function"]["parameters"]
    jsonschema.Draft202012Validator.check_schema(schema)
    given = {"place": {"city": "Rome"}, "span": {"start": 1, "end": 2}, "places": [{"city": "a", "floor": 3}]}
    jsonschema.validate(given, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**given, "span": {"start": 1}}, schema)
    box = ToolBox([structured])
    call = {"function": {"name": "structured", "arguments": json.dumps(given)}}
    assert box.begin(call) == "Rome 2 [3] None"


def test_pydantic_models_are_taken() -> None:
    pydantic = pytest.importorskip("pydantic", reason="pydantic makes the model")
    model = pydantic.create_model("Point", x=(int, ...), y=(int, 0))

    def move(point: model) -> int:  # type: ignore[valid-type]
        """Moves."""
        return point.x + point.y

    move.__annotations__["point"] = model
    assert function_tool(move)["function"]["parameters"]["properties"]["point"]["required"] == ["x"]
    assert ToolBox([move]).begin({"function": {"name": "move", "arguments": '{"point": {"x": 4}}'}}) == 4
    with pytest.raises(ValueError, match="x"):
        ToolBox([move]).begin({"function": {"name": "move", "arguments": '{"point": {}}'}})


def test_methods_and_callables_are_tools_too() -> None:
    class Desk:
        """Answers."""

        def ask(self, question: str) -> str:
            """Asks."""
            return question[::-1]

    box = ToolBox([Desk().ask])
    assert box.described is not None and box.described[0]["function"]["parameters"]["required"] == ["question"]
    assert box.begin({"function": {"name": "ask", "arguments": '{"question": "abc"}'}}) == "cba"


def takes_a_set(x: set[int]) -> None:
    """No."""


def takes_anything(*args: int) -> None:
    """No."""


def takes_names(**kwargs: int) -> None:
    """No."""


def takes_unknown(x: Nobody) -> None:  # type: ignore[name-defined]  # noqa: F821
    """No."""


@pytest.mark.parametrize("function", [takes_a_set, takes_anything, takes_names, takes_unknown, lambda x: x])
def test_what_no_json_can_fill_is_refused_by_name(function: Any) -> None:
    with pytest.raises(ParameterError, match=getattr(function, "__name__", "lambda")):
        as_tools([function])


def test_results_become_text() -> None:
    assert result_text("as it is") == "as it is"
    assert result_text({"a": [1, None]}) == '{"a": [1, null]}'
    assert result_text(None) == "null"
    assert result_text(Place("Köln")) == '{"city": "Köln", "floor": 0}'
    assert result_text(object()).startswith('"<object')
