"""No answer breaks its schema: JSON-Schema-Test-Suite and the jsonschema package judge."""

from __future__ import annotations

import itertools
import json
import os
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from structured_walks import takes, walk

from edgellm.formats.errors import EdgeLLMError
from edgellm.formats.gguf import GGUFFile
from edgellm.structured import compile_grammar
from edgellm.tokenizer import Tokenizer

pytest.importorskip("llguidance", reason="structured output is the extra `structured`")
ANNOTATIONS = ("content.json",)  # by draft 7 they may be kept, by later drafts they say nothing
SUITE = os.environ.get("JSON_SCHEMA_TEST_SUITE", "")
PATTERNS = ("^[a-z]+$", "a|b", "^x-", "[0-9]{2,4}", "^(foo|bar)[0-9]*$", "\\d+", "^.{3}$", "é+")
FORMATS = ("date", "time", "date-time", "email", "ipv4", "ipv6", "uuid", "hostname", "uri", "duration", "int32")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tokenizer]:
    path = tiny_models.write_tiny_model(tmp_path_factory.mktemp("models") / "tiny.gguf")
    with GGUFFile.open(path) as file:
        yield Tokenizer.from_gguf(file.metadata)


@pytest.mark.slow
@pytest.mark.parametrize("draft", ["draft4", "draft6", "draft7", "draft2019-09", "draft2020-12"])
def test_no_invalid_instance_of_the_official_suite_is_taken(
    tokenizer: Tokenizer, draft: str, record_property: Any
) -> None:
    folder = Path(SUITE) / "tests" / draft
    if not SUITE or not folder.is_dir():
        pytest.skip("set JSON_SCHEMA_TEST_SUITE to a copy of json-schema-org/JSON-Schema-Test-Suite")
    counts: Counter[str] = Counter()
    wrong = []
    for file in sorted([*folder.glob("*.json"), *folder.glob("optional/**/*.json")]):
        if file.name in ANNOTATIONS:
            continue
        for group in json.loads(file.read_text("utf-8")):
            schema = (
                {True: {}, False: {"not": {}}}[group["schema"]]
                if isinstance(group["schema"], bool)
                else group["schema"]
            )
            try:
                grammar = compile_grammar(tokenizer, json_schema=schema)
            except EdgeLLMError:
                counts["schemas refused"] += 1
                continue
            counts["schemas kept"] += 1
            for test in group["tests"]:
                taken = any(
                    takes(grammar, tokenizer, text)
                    for text in spellings(plain(test["data"]) if test["valid"] else test["data"])
                )
                counts["valid taken" if taken else "valid not taken"] += test["valid"]
                if taken and not test["valid"]:
                    wrong.append((file.name, group["description"], test["description"]))
    print(draft, dict(counts))
    assert not wrong
    assert counts["valid taken"] > 9 * counts["valid not taken"] and counts["schemas kept"] > counts["schemas refused"]


# what the official suite tells of: schema, instances that it takes, instances that it does not; () where it is refused
CASES: list[tuple[dict[str, Any], tuple[str, ...], tuple[str, ...]]] = [
    ({"properties": {"foo": {"type": "integer"}}}, ('{"foo": 1, "b\\n": 2}', '"x"'),
     ('{"foo": "1"}', r'{"\u0066oo": "1"}')),
    ({"patternProperties": {"^🐲*$": {"type": "integer"}}}, ('{"🐲": 1}', '{"x": ""}'),
     ('{"🐲": "a"}', r'{"\ud83d\udc32": "a"}', '{"": "a"}')),
    ({"required": ["a"], "minProperties": 2}, ('{"a": 1, "b": 2}',), ('{"a": 1}', r'{"a": 1, "\u0061": 2}')),
    ({"pattern": r"^\S$"}, ('"a"',), ('" "', '"﻿"', '" "')),
    ({"pattern": r"^[^\s]$"}, ('"a"', '""'), ('"﻿"', '"　"')),
    ({"pattern": r"^\s$"}, ('"﻿"', '" "'), ('""', '"a"')),
    ({"pattern": r"^[\S ]$"}, ('"a"', '" "'), ('" "',)),
    ({"pattern": r"^.$"}, ('""', '"."'), ('"\\r"', '" "', '"\\n"')),
    ({"pattern": r"^\d\w$"}, ('"3_"',), ('"٣a"', '"3é"')),
    ({"pattern": r"^[[&&a~]$"}, ('"["', '"&"', '"~"'), ('"b"',)),
    ({"pattern": r"^[^[]$"}, ('"a"',), ('"["',)),
    ({"pattern": "a"}, ('"xax"', "1"), ('"xbx"',)),
    ({"dependentRequired": {"bar": ["foo"]}}, ("{}", '{"foo": 1}', '{"bar": 2, "foo": 1}', "1"), ('{"bar": 2}',)),
    ({"dependencies": {"bar": {"properties": {"foo": {"type": "integer"}}}}}, ('{"foo": "a"}', '{"foo": 1, "bar": 1}'),
     ('{"bar": 1, "foo": "a"}',)),
    ({"propertyNames": {"pattern": "^a+$"}}, ('{"aa": 1}', "{}", "[]"), ('{"ab": 1}',)),
    ({"propertyNames": {"maxLength": 3}}, ('{"abc": 1}',), ('{"abcd": 1}',)),
    ({"propertyNames": {"enum": ["a", "b"]}, "additionalProperties": {"type": "null"}}, ('{"b": null}',),
     ('{"c": null}', '{"a": 1}')),
    ({"properties": {"a": {}}, "unevaluatedProperties": False}, ('{"a": 1}',), ('{"a": 1, "b": 2}',)),
    ({"prefixItems": [{"type": "null"}], "unevaluatedItems": False}, ("[null]",), ("[null, 1]", "[1]")),
    ({"not": {"type": "integer"}}, (), ()),
    ({"uniqueItems": True}, (), ()),
    ({"contains": {"type": "null"}}, (), ()),
    ({"if": {"type": "null"}, "then": False}, (), ()),
    ({"propertyNames": {"pattern": "^a"}, "properties": {"b": {}}}, (), ()),
    ({"allOf": [{"properties": {"a": {}}}], "unevaluatedProperties": False}, (), ()),
    ({"type": "string", "format": "regex"}, (), ()),
    ({"oneOf": [{"type": "integer"}, {"minimum": 2}]}, (), ()),
    ({"$ref": "http://json-schema.org/draft-07/schema#"}, (), ()),
    ({"pattern": "^[+--]$"}, (), ()),
    ({"pattern": "^(?=a)"}, (), ()),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "good", "bad"), CASES, ids=lambda value: str(value)[:60])
def test_a_schema_takes_what_the_drafts_say_or_is_refused(
    tokenizer: Tokenizer, schema: dict[str, Any], good: tuple[str, ...], bad: tuple[str, ...]
) -> None:
    if not good:
        with pytest.raises(EdgeLLMError, match=r"cannot be kept|hyphen"):
            compile_grammar(tokenizer, json_schema=schema)
        return
    grammar = compile_grammar(tokenizer, json_schema=schema)
    assert [takes(grammar, tokenizer, text) for text in good] == [True] * len(good)
    assert [takes(grammar, tokenizer, text) for text in bad] == [False] * len(bad)


def spellings(data: Any) -> Iterator[str]:
    """JSON texts of a value, small objects in each order of their properties."""
    yield json.dumps(data)
    yield json.dumps(data, ensure_ascii=False)
    if isinstance(data, dict) and 1 < len(data) <= 4:
        yield from (json.dumps(dict(order)) for order in itertools.permutations(data.items()))


def plain(data: Any) -> Any:
    """The same value with whole numbers as such: a grammar may want 1 for 1.0."""
    if isinstance(data, list):
        return [plain(part) for part in data]
    if isinstance(data, dict):
        return {key: plain(part) for key, part in data.items()}
    return int(data) if isinstance(data, float) and data.is_integer() and abs(data) < 1e16 else data


def random_schema(rng: random.Random, depth: int = 0) -> dict[str, Any]:
    kinds = ["string", "integer", "number", "boolean", "enum", "const", "any"]
    kind = rng.choice(
        kinds + (["object", "object", "array", "array", "anyOf", "allOf", "oneOf", "$ref"] if depth < 3 else [])
    )
    maker = _MAKERS.get(kind)
    return maker(rng, depth) if maker else {} if kind == "any" else {"type": kind}


def _string(rng: random.Random, depth: int) -> dict[str, Any]:
    more = rng.choice(
        [{}, {"minLength": 1, "maxLength": 4}, {"pattern": rng.choice(PATTERNS)}, {"format": rng.choice(FORMATS)}]
    )
    return {"type": "string", **more}


def _number(rng: random.Random, depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": rng.choice(["integer", "number"])}
    for key, low, high in (("inimum", -100, 40), ("aximum", 50, 5000)):
        bound = rng.choice([rng.randint(low, high), round(rng.uniform(low, high), rng.randint(0, 4))])
        schema |= {} if rng.random() < 0.4 else {rng.choice([f"m{key}", f"exclusiveM{key}"]): bound}
    return schema | ({} if rng.random() < 0.7 else {"multipleOf": rng.choice([2, 3, 7, 0.5, 0.25, 1.5])})


def _object(rng: random.Random, depth: int) -> dict[str, Any]:
    names = rng.sample(["a", "b", "name", "x-1", "foo1", "é"], rng.randint(0, 4))
    schema: dict[str, Any] = {"type": "object", "properties": {name: random_schema(rng, depth + 1) for name in names}}
    schema["required"] = rng.sample(names, rng.randint(0, len(names))) + ["zz"] * (rng.random() < 0.15)
    schema |= rng.choice([{}, {"additionalProperties": False}, {"additionalProperties": random_schema(rng, depth + 1)}])
    if rng.random() < 0.2:
        schema["patternProperties"] = {rng.choice(PATTERNS): random_schema(rng, depth + 1)}
    if rng.random() < 0.2 and names:
        schema["dependentRequired"] = {names[0]: rng.sample(["zz", *names], 1)}
    if rng.random() < 0.1:
        schema = {"type": "object", "propertyNames": rng.choice([{"pattern": rng.choice(PATTERNS)}, {"maxLength": 2}])}
    return schema | rng.choice([{}, {}, {"minProperties": rng.randint(0, 3)}, {"maxProperties": rng.randint(1, 4)}])


def _array(rng: random.Random, depth: int) -> dict[str, Any]:
    least = rng.randint(0, 2)
    schema = {"type": "array", "minItems": least, "maxItems": least + rng.randint(0, 3)}
    if rng.random() < 0.3:
        schema["prefixItems"] = [random_schema(rng, depth + 1) for _ in range(2)]
    return schema | rng.choice([{}, {"items": random_schema(rng, depth + 1)}, {"items": False}])


_MAKERS: dict[str, Any] = {
    "string": _string,
    "integer": _number,
    "number": _number,
    "object": _object,
    "array": _array,
    "enum": lambda rng, depth: {"enum": rng.sample([1, 2.5, "a", "b c", None, True, [1, "z"], 'é"\\'], 3)},
    "const": lambda rng, depth: {"const": rng.choice([1, "x", None, {"a": [1, 2]}, 3.25, "\n\t"])},
    "$ref": lambda rng, depth: {"$ref": "#/$defs/d"},
    "anyOf": lambda rng, depth: {"anyOf": [random_schema(rng, depth + 1) for _ in range(2)]},
    "allOf": lambda rng, depth: {"allOf": [random_schema(rng, depth + 1) for _ in range(2)]},
    "oneOf": lambda rng, depth: {"oneOf": [random_schema(rng, depth + 1) for _ in range(2)]},
}


@pytest.mark.parametrize("seed", range(40))
def test_random_answers_to_random_schemas_are_valid(tokenizer: Tokenizer, seed: int) -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema judges the answers")
    for number in range(10):
        rng = random.Random(1000 * seed + number)
        schema = random_schema(rng)
        link = {"anyOf": [{"$ref": "#/$defs/d"}, {"type": "null"}]}
        schema["$defs"] = {
            "d": {"type": "object", "properties": {"v": random_schema(rng, 3), "n": link}, "required": ["v"]}
        }
        try:
            grammar = compile_grammar(tokenizer, json_schema=schema)
        except EdgeLLMError:
            continue
        judge = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER)
        for _ in range(2):
            tokens = walk(grammar, tokenizer, rng)
            if tokens is not None:
                text = b"".join(map(tokenizer.token_bytes, tokens)).decode()
                judge.validate(json.loads(text))
