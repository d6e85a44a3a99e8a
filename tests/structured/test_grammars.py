"""Grammars: what they take, what they refuse by name, and limits that hold."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from structured_walks import may_end, takes

import edgellm
from edgellm.formats.errors import EdgeLLMError, ParameterError, UnsupportedError
from edgellm.formats.gguf import GGUFFile
from edgellm.structured import compile_grammar, lark_json
from edgellm.structured.gbnf import gbnf_to_lark
from edgellm.structured.token_trie import token_trie
from edgellm.tokenizer import Tokenizer

pytest.importorskip("llguidance", reason="structured output is the extra `structured`")

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tokenizer]:
    path = tiny_models.write_tiny_model(tmp_path_factory.mktemp("models") / "tiny.gguf")
    with GGUFFile.open(path) as file:
        yield Tokenizer.from_gguf(file.metadata)


TAKEN: list[tuple[dict[str, Any], list[str], list[str]]] = [
    (
        {"json_schema": PERSON},
        ['{"name": "Jo", "age": 3}', '{"name":"é\\n"}'],
        ["", "{}", '{\n"name": ""}', '{"age": 3, "name": "Jo"}', '{"name": "Jo", "age": -1}', '{"name": "Jo"} '],
    ),
    ({"json_schema": True}, ["{}", '{"a": [1, {"b": null}]}'], ["[]", "1", "null", '{"a"}']),
    ({"json_schema": {"enum": [1, "a", None]}}, ["1", '"a"', "null"], ["2", "a", '"b"']),
    ({"json_schema": {"type": "string", "format": "date"}}, ['"2024-02-29"'], ['"2023-02-29"', '"2024-13-01"', '"x"']),
    ({"json_schema": {"type": "string", "format": "time"}}, ['"23:59:59Z"'], ['"23:58:60Z"', '"24:00:00Z"']),
    ({"json_schema": {"type": "string", "format": "hostname"}}, ['"a.b-c.org"'], ['"xn--x"', '"-a.org"', '"a..b"']),
    ({"json_schema": {"type": "integer", "format": "int32", "maximum": 9.0}}, ["9", "-3"], ["10", "1.5"]),
    ({"json_schema": {"type": "array", "items": {"type": "null"}, "maxItems": 2.0}}, ["[]", "[null, null]"], ["[1]"]),
    ({"json_schema": {"type": "object", "x-guidance": {"lenient": True}}}, ["{}"], ["[]"]),
    ({"regex": "[a-c]{2}(x|yz)?"}, ["ab", "ccx", "abyz"], ["a", "abc", "abxx", "d"]),
    ({"lark": 'start: "a" inner? "b"\ninner: start | /[0-9]+/'}, ["ab", "a12b", "aabb"], ["a", "aab", "a1b2"]),
    ({"gbnf": 'root ::= x "." # end\nx ::= [a-z]+ | "\\x41" (x | "-"){1,2}'}, ["ab.", "A-.", "AAa."], ["A.", "b"]),
]  # fmt: skip


@pytest.mark.parametrize(("source", "good", "bad"), TAKEN, ids=lambda value: str(value)[:60])
def test_a_grammar_takes_what_it_means_and_nothing_else(
    tokenizer: Tokenizer, source: dict[str, Any], good: list[str], bad: list[str]
) -> None:
    grammar = compile_grammar(tokenizer, **source)
    assert {text: takes(grammar, tokenizer, text) for text in good + bad} == dict.fromkeys(good, True) | dict.fromkeys(
        bad, False
    )


DOUBLING = "".join(f"a{i} ::= a{i + 1} a{i + 1}\n" for i in range(40))
REFUSED: list[tuple[dict[str, Any], type[EdgeLLMError], str]] = [
    ({"json_schema": {"not": {"type": "null"}}}, UnsupportedError, "not"),
    ({"json_schema": {"type": "array", "uniqueItems": True}}, UnsupportedError, "uniqueItems"),
    ({"json_schema": {"if": {"type": "null"}, "then": {}}}, UnsupportedError, '"if"'),
    ({"json_schema": {"oneOf": [{"type": "integer"}, {"type": "number"}]}}, UnsupportedError, "oneOf"),
    ({"json_schema": {"type": "string", "format": "iri"}}, UnsupportedError, "iri"),
    ({"json_schema": {"type": "string", "pattern": "(?=a)b"}}, UnsupportedError, "look-around"),
    ({"json_schema": {"type": "object", "minProperties": 2}}, UnsupportedError, "minProperties is 2"),
    ({"json_schema": {"properties": {"a": {"$ref": "#/$defs/b", "$id": "x"}}}}, UnsupportedError, "properties/a"),
    ({"json_schema": {"$ref": "http://example.org/schema.json"}}, UnsupportedError, "example.org"),
    ({"json_schema": {"type": "strin"}}, UnsupportedError, "strin"),
    ({"json_schema": {"$ref": "#"}}, UnsupportedError, "nothing can fit"),
    ({"json_schema": {"enum": []}}, UnsupportedError, "Unsatisfiable"),
    ({"json_schema": {"properties": {"a": 3}}}, ParameterError, "properties/a"),
    ({"json_schema": {"const": float("nan")}}, ParameterError, "JSON"),
    ({"json_schema": {"type": "integer", "minimum": 10**400}}, ParameterError, "out of range"),
    ({"json_schema": False}, ParameterError, "json_schema"),
    ({"json_schema": [PERSON]}, ParameterError, "json_schema"),
    ({"regex": "("}, UnsupportedError, "regex"),
    ({"regex": "(a{1000}){1000}"}, ParameterError, "1,000,000 times"),
    ({"regex": "a" * 2_000_000}, ParameterError, "2000000 characters"),
    ({"lark": "start: ("}, UnsupportedError, "Lark grammar"),
    ({"lark": "start: start"}, UnsupportedError, "nothing can fit"),
    ({"gbnf": 'root ::= "a'}, ParameterError, "line 1"),
    ({"gbnf": "root ::= other"}, ParameterError, "other"),
    ({"gbnf": 'main ::= "a"'}, ParameterError, "root"),
    ({"gbnf": 'root ::= "\\q"'}, ParameterError, "escape"),
    ({"gbnf": "root ::= !<think>"}, UnsupportedError, "its id"),
    ({"gbnf": "root ::= " + "(" * 5000}, ParameterError, "nested"),
    ({"gbnf": f"root ::= a0\n{DOUBLING}a40 ::= [x]"}, ParameterError, "too large"),
    ({"gbnf": 'root ::= (("a"{1000}){1000}) root?'}, ParameterError, "states"),
    ({}, ParameterError, "Give one of"),
    ({"regex": "a", "lark": 'start: "a"'}, ParameterError, "Give one of"),
    ({"regex": "a", "begins": ""}, ParameterError, "begins"),
    ({"regex": "a", "begins": "x", "triggers": ["y"]}, ParameterError, "begins and triggers"),
]  # fmt: skip


@pytest.mark.parametrize(("source", "kind", "named"), REFUSED, ids=lambda value: str(value)[:60])
def test_what_cannot_be_kept_is_refused_by_name(
    tokenizer: Tokenizer, source: dict[str, Any], kind: type[EdgeLLMError], named: str
) -> None:
    with pytest.raises(kind) as refused:
        compile_grammar(tokenizer, **source)
    assert type(refused.value) is kind and named in str(refused.value)


def nested(n: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(n):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


def doubled(keyword: str) -> dict[str, Any]:
    defs = {f"d{i}": {keyword: [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(60)}
    return {"$ref": "#/$defs/d0", "$defs": {**defs, "d60": {"type": "string"}}}


HOSTILE = {
    "nested": nested(2000),
    "doubled allOf": doubled("allOf"),
    "doubled anyOf": doubled("anyOf"),
    "a million items": {"type": "array", "items": {"const": 1}, "minItems": 10**9},
    "optional properties": {"type": "object", "properties": {f"p{i}": {} for i in range(5000)}},
    "counts in a pattern": {"type": "string", "pattern": "(([a-z]+)*.{0,2000}){0,50}"},
    "no end": {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
    "long enum": {"enum": [f"value {i}" for i in range(20000)]},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_schema_is_kept_or_refused_and_never_takes_the_process_along(tokenizer: Tokenizer, name: str) -> None:
    try:
        constraint = compile_grammar(tokenizer, json_schema=HOSTILE[name]).constraint()
        assert constraint.allowed() is not None
    except EdgeLLMError as error:
        assert len(str(error)) < 2000


def test_a_grammar_is_made_once_for_a_tokenizer(tokenizer: Tokenizer) -> None:
    assert token_trie(tokenizer) is token_trie(tokenizer)
    assert compile_grammar(tokenizer, json_schema=PERSON) is compile_grammar(tokenizer, json_schema=dict(PERSON))
    assert compile_grammar(tokenizer, json_schema=PERSON) is not compile_grammar(
        tokenizer, json_schema=PERSON, begins="."
    )
    first, second = (compile_grammar(tokenizer, regex="ab|cd").constraint() for _ in range(2))
    first.accept(tokenizer.token_id("a"))
    assert second.allowed().flags[tokenizer.token_id("c")]  # answers do not share their state


# -- a later start -------------------------------------------------------------------------------------------------


def feed(constraint: Any, tokenizer: Tokenizer, text: str) -> None:
    """Accept single-byte tokens."""
    for byte in text.encode():
        token = next(i for i in range(tokenizer.n_vocab) if tokenizer.token_bytes(i) == bytes((byte,)))
        allowed = constraint.allowed()
        assert allowed is None or allowed.flags[token], (text, chr(byte))
        constraint.accept(token)


def test_a_constraint_that_must_begin_is_free_before_and_cannot_end_there(tokenizer: Tokenizer) -> None:
    constraint = compile_grammar(tokenizer, regex="[0-9]{2}", begins="END.").constraint()
    for text in ("xEN", "EENxEND"):
        feed(constraint, tokenizer, text)
        assert not may_end(constraint, tokenizer) and constraint.forced() is None and not constraint.complete
        allowed = constraint.allowed()
        assert allowed.flags.sum() == tokenizer.n_vocab - len(tokenizer.eog_ids)
    feed(constraint, tokenizer, ".")
    assert {tokenizer.token_bytes(i) for i in constraint.allowed().ids} <= {b"%d" % i for i in range(100)}
    feed(constraint, tokenizer, "42")
    assert constraint.complete


def test_a_constraint_behind_triggers_may_never_begin(tokenizer: Tokenizer) -> None:
    constraint = compile_grammar(tokenizer, lark='start: "()"', triggers=["<call>", "<c"]).constraint()
    feed(constraint, tokenizer, "some text <b <")
    assert constraint.allowed() is None and may_end(constraint, tokenizer)
    feed(constraint, tokenizer, "c")  # the shorter one has come
    assert not may_end(constraint, tokenizer)
    feed(constraint, tokenizer, "()")
    assert constraint.complete


def test_a_token_that_runs_beyond_the_text_goes_on_as_the_grammar_begins(tokenizer: Tokenizer) -> None:
    the, the_space = tokenizer.token_id("Ġthe"), tokenizer.token_id("Ġt")
    assert the is not None and the_space is not None
    for regex, may in (("he?r", True), ("x", False)):
        constraint = compile_grammar(tokenizer, regex=regex, triggers=[" t"]).constraint()
        allowed = constraint.allowed()
        assert (allowed is None or bool(allowed.flags[the])) == may  # " the" is " t" and "he", one token
        assert allowed is None or allowed.flags[the_space]
    constraint = compile_grammar(tokenizer, regex="he?r", triggers=[" t"]).constraint()
    constraint.accept(the)
    feed(constraint, tokenizer, "r")
    assert constraint.complete


def test_blanks_may_stand_before_json_that_begins_later(tokenizer: Tokenizer) -> None:
    for blanks in ("", " ", "\n\n"):
        constraint = compile_grammar(tokenizer, json_schema={"const": 1}, begins=".").constraint()
        feed(constraint, tokenizer, "a." + blanks + "1")
        assert may_end(constraint, tokenizer)


def test_marks_are_no_text_and_a_grammar_names_them(tokenizer: Tokenizer) -> None:
    start = tokenizer.token_id("<|im_start|>")
    assert start is not None
    text = compile_grammar(tokenizer, regex=r"(?s:.)*").constraint()
    assert not text.allowed().flags[start]
    feed(text, tokenizer, "<|im_start|>")  # spelled out it is text
    for source in ({"lark": 'start: <|im_start|> "a"'}, {"gbnf": 'root ::= <|im_start|> "a"'}):
        constraint = compile_grammar(tokenizer, **source).constraint()
        assert constraint.allowed().ids.tolist() == [start]
        constraint.accept(start)
        feed(constraint, tokenizer, "a")
        assert constraint.complete


def test_a_schema_in_a_lark_grammar_is_kept_by_the_same_rules(tokenizer: Tokenizer) -> None:
    grammar = compile_grammar(tokenizer, lark=f'start: "call " args\nargs: {lark_json(PERSON)}')
    assert takes(grammar, tokenizer, 'call {"name": "Jo"}') and not takes(grammar, tokenizer, 'call {"age": 1}')
    with pytest.raises(UnsupportedError, match="minProperties"):
        lark_json({"type": "object", "minProperties": 2})


# -- GBNF: a recognizer of its own judges ----------------------------------------------------------------------------


def random_gbnf(rng: random.Random) -> tuple[str, dict[str, Any]]:
    """A grammar over a, b, c as text, and as trees for ``ends``."""
    names = ["root", "x", "y"]

    def part(depth: int) -> tuple[str, Any]:
        kind = rng.choice(["text", "text", "class", "rule"] + (["seq", "alt", "repeat"] * 2 if depth else []))
        if kind == "text":
            text = "".join(rng.choices("abc", k=rng.randint(1, 2)))
            return f'"{text}"', ("seq", [("class", {c}) for c in text])
        if kind == "class":
            chars = rng.sample("abc", rng.randint(1, 2))
            if rng.random() < 0.3:
                return f"[^{''.join(chars)}d-\\U0010FFFF\\x00-\\x60]", ("class", set("abc") - set(chars))
            return f"[{''.join(chars)}]", ("class", set(chars))
        if kind == "rule":
            name = rng.choice(names[1:])
            return name, ("rule", name)
        if kind == "repeat":
            text, tree = part(depth - 1)
            mark, least, most = rng.choice([("*", 0, 9), ("+", 1, 9), ("?", 0, 1), ("{2}", 2, 2), ("{0,2}", 0, 2)])
            return f"({text}){mark}", ("repeat", tree, least, most)
        parts = [part(depth - 1) for _ in range(2)]
        return f"({(' ' if kind == 'seq' else ' | ').join(text for text, _ in parts)})", (
            kind,
            [tree for _, tree in parts],
        )

    rules = {name: part(3) for name in names}
    return "\n".join(f"{name} ::= {text}" for name, (text, _) in rules.items()), {
        n: tree for n, (_, tree) in rules.items()
    }


def language(rules: dict[str, Any], longest: int) -> set[str]:
    """All texts of at most so many characters, by a fixpoint over the rules."""
    known: dict[str, set[str]] = {name: set() for name in rules}

    def texts(tree: Any) -> set[str]:
        if tree[0] == "class":
            return set(tree[1])
        if tree[0] == "rule":
            return known[tree[1]]
        if tree[0] == "alt":
            return set().union(*map(texts, tree[1]))
        if tree[0] == "seq":
            found = {""}
            for part in tree[1]:
                inner = texts(part)
                found = {a + b for a in found for b in inner if len(a + b) <= longest}
            return found
        inner, found, now = texts(tree[1]), set(), {""}
        for n in range(tree[3] + 1):
            found |= now if n >= tree[2] else set()
            now = {a + b for a in now for b in inner if len(a + b) <= longest}
        return found

    while True:
        grown = {name: texts(tree) for name, tree in rules.items()}
        if grown == known:
            return known["root"]
        known = grown


@pytest.mark.parametrize("seed", range(60))
def test_gbnf_has_the_language_that_a_recognizer_finds(tokenizer: Tokenizer, seed: int) -> None:
    source, rules = random_gbnf(random.Random(seed))
    expected = language(rules, 4)
    try:
        grammar = compile_grammar(tokenizer, gbnf=source)
    except UnsupportedError as error:
        assert "nothing can fit" in str(error) and not expected
        return
    texts = ["".join(chars) for n in range(5) for chars in itertools.product("abc", repeat=n)]
    assert {text for text in texts if takes(grammar, tokenizer, text)} == expected, source


def test_published_gbnf_grammars_take_their_texts(tokenizer: Tokenizer) -> None:
    arithmetic = (
        'root ::= (expr "=" ws term "\\n")+\nexpr ::= term ([-+*/] term)*\nterm ::= ident | num | "(" ws expr ")" ws\n'
        "ident ::= [a-z] [a-z0-9_]* ws\nnum ::= [0-9]+ ws\nws ::= [ \\t\\n]*\n"
    )
    grammar = compile_grammar(tokenizer, gbnf=arithmetic)
    for text in ("a=b\n", "(a+b)*c2 = d \n", "1=2\n\n", "a=b\nc=d\n"):
        assert takes(grammar, tokenizer, text), text
    assert not takes(grammar, tokenizer, "a=b")
    assert gbnf_to_lark('root ::= [a-z]+ "x"').count("/") == 2  # what is regular is one expression


def test_without_the_package_it_says_what_to_install(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(edgellm.UnsupportedError, match=r"edgellm\[structured\]"):
        compile_grammar(tokenizer, regex="never compiled before")


def test_a_file_is_not_held_by_its_grammars(tmp_path: Path) -> None:
    import gc
    import weakref

    with GGUFFile.open(tiny_models.write_tiny_model(tmp_path / "tiny.gguf")) as file:
        tokenizer = Tokenizer.from_gguf(file.metadata)
    compile_grammar(tokenizer, regex="a", begins="b").constraint()
    gone = weakref.ref(tokenizer)
    del tokenizer
    gc.collect()
    assert gone() is None
