"""Answers of models that must keep a form: on a tiny random model, and on the real ones where they are."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from speculation_trials import Oracle, free_drafts

import edgellm
from edgellm.engine.scheduler import Scheduler
from edgellm.formats.errors import EdgeLLMError, ParameterError
from edgellm.sampling import Sampler
from edgellm.structured import compile_grammar

pytest.importorskip("llguidance", reason="structured output is the extra `structured`")

FORM = {
    "type": "object",
    "properties": {
        "name_of_person": {"type": "string", "maxLength": 4},
        "kind": {"enum": ["reader", "writer"]},
        "numbers": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 3},
    },
    "required": ["name_of_person", "kind", "numbers"],
    "additionalProperties": False,
}
SAMPLING: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 1.0, "seed": 5},
    {"temperature": 1.5, "seed": 6, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
    {"temperature": 1.2, "seed": 7, "xtc_probability": 0.7, "xtc_threshold": 0.01},
    {"seed": 8, "mirostat": 2},
    {"seed": 9, "temperature": 1.0, "repeat_penalty": 1.3, "dry_multiplier": 0.8},
]


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[edgellm.LLM]:
    path = tiny_models.write_tiny_model(tmp_path_factory.mktemp("models") / "tiny.gguf", context_length=1024)
    with edgellm.load(path, n_threads=2, n_parallel=4) as loaded:
        yield loaded


def ask(llm: edgellm.LLM, prompt: str = "the", n: int = 200, **options: Any) -> edgellm.Generation:
    return llm.generate(prompt, max_tokens=n, **{"response_format": FORM, "temperature": 0, **options})


@pytest.mark.parametrize("sampling", SAMPLING, ids=str)
def test_an_answer_keeps_its_schema_and_ends_by_itself(llm: edgellm.LLM, sampling: dict[str, Any]) -> None:
    answer = ask(llm, **sampling)
    assert answer.finish_reason == "stop" and answer.stop is None
    parsed = answer.parsed
    assert parsed == json.loads(answer) and list(parsed) == ["name_of_person", "kind", "numbers"]
    assert parsed["kind"] in ("reader", "writer") and len(parsed["numbers"]) <= 3 and len(parsed["name_of_person"]) <= 4
    assert b"".join(map(llm.tokenizer.token_bytes, answer.tokens)).decode() == answer


@pytest.mark.parametrize("sampling", SAMPLING, ids=str)
def test_forced_tokens_and_reports_change_no_token(
    llm: edgellm.LLM, sampling: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = ask(llm, **sampling)
    reported = ask(llm, logprobs=2, **sampling)
    assert reported.tokens == quick.tokens and len(reported.logprobs) == len(quick.tokens)
    monkeypatch.setattr(Sampler, "forced", lambda self: None)
    assert ask(llm, **sampling).tokens == quick.tokens


@pytest.mark.parametrize("sampling", SAMPLING, ids=str)
@pytest.mark.parametrize("begins", [None, "e"])
def test_speculation_changes_no_token(
    llm: edgellm.LLM, sampling: dict[str, Any], begins: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    grammar = compile_grammar(llm.tokenizer, json_schema=FORM, begins=begins)
    options = {"response_format": None, "grammar": grammar, **sampling}
    plain = ask(llm, **options)
    text, n_vocab = [*llm.prompt_ids("the"), *plain.tokens], llm.tokenizer.n_vocab
    monkeypatch.setattr(Scheduler, "_tokens_per_s", lambda self, n: n)
    for right in (0.6, 1.0):
        monkeypatch.setattr(llm.engine, "_drafter", lambda right=right: Oracle(n_vocab, [text], right))
        for forced in (True, False):
            with monkeypatch.context() as patch:
                if not forced:
                    patch.setattr(Sampler, "forced", lambda self: None)
                answer = ask(llm, **options)
            assert (answer.tokens, answer.finish_reason) == (plain.tokens, plain.finish_reason)
            assert right < 1.0 or answer.timings.accepted_n > 0


def test_a_draft_model_changes_no_token(llm: edgellm.LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free_drafts(monkeypatch)
    draft = tiny_models.write_tiny_model(tmp_path / "draft.gguf", quant="Q4_0", context_length=1024)
    with edgellm.load(llm.path, n_threads=1, draft=draft) as drafting:
        for sampling in SAMPLING[:2]:
            answer, plain = ask(drafting, **sampling), ask(llm, **sampling)
            assert (answer.tokens, answer.finish_reason) == (plain.tokens, plain.finish_reason)
            assert answer.timings.drafted_n > 0


def test_answers_side_by_side_are_each_as_alone(llm: edgellm.LLM) -> None:
    jobs: list[dict[str, Any]] = [
        {"prompt": "the", "seed": 1, "temperature": 1.0},
        {"prompt": "a b", "seed": 2, "temperature": 1.0, "response_format": {"type": "json_object"}, "n": 40},
        {"prompt": "and", "seed": 3, "temperature": 1.0, "response_format": None, "n": 40},
        {"prompt": "xyz", "seed": 4, "temperature": 1.0, "response_format": None, "regex": "[a-z]{20} (yes|no)"},
    ]
    alone = [ask(llm, **job).tokens for job in jobs]
    together: dict[int, tuple[int, ...]] = {}
    threads = [
        threading.Thread(target=lambda i=i, job=job: together.update({i: ask(llm, **job).tokens}))
        for i, job in enumerate(jobs)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert [together[i] for i in range(len(jobs))] == alone


def test_cut_answers_say_so_and_are_not_parsed(llm: edgellm.LLM) -> None:
    cut = ask(llm, n=5)
    assert (cut.finish_reason, len(cut.tokens)) == ("length", 5)
    stopped = ask(llm, stop='"kind')
    assert stopped.finish_reason == "stop" and stopped.stop == '"kind' and "kind" not in stopped
    for answer in (cut, stopped):
        with pytest.raises(EdgeLLMError, match="cut by") as refused:
            _ = answer.parsed
        assert refused.value.code == "ANSWER_CUT"
    with pytest.raises(ParameterError, match="response_format"):
        _ = ask(llm, response_format=None, n=2).parsed


def test_the_likeliest_token_that_ends_the_answer_is_banned_until_it_may_come(llm: edgellm.LLM) -> None:
    bias = dict.fromkeys(llm.tokenizer.eog_ids, 1e4)
    answer = ask(llm, response_format=None, regex="[a-z]{3,9}", logit_bias=bias)
    assert answer.finish_reason == "stop" and answer.stop in llm.tokenizer.eog_ids
    assert len(answer) - len(llm.tokenizer.token_bytes(answer.tokens[-1])) < 3 <= len(answer)
    endless = ask(llm, response_format=None, regex="[a-z]{3,9}", ignore_eos=True)
    assert (len(endless), endless.finish_reason, endless.stop) == (9, "stop", None)


def test_regex_lark_gbnf_and_compiled_grammars(llm: edgellm.LLM) -> None:
    compiled = compile_grammar(llm.tokenizer, regex="[0-9]{4}")
    for options, pattern in (
        ({"regex": "(red|green) [0-9]{2}"}, "(red|green) [0-9]{2}"),
        ({"grammar": 'start: "<" /[a-z]+/ ">"'}, "<[a-z]+>"),
        ({"grammar": 'root ::= ("x" | "y"){3}'}, "[xy]{3}"),
        ({"grammar": compiled}, "[0-9]{4}"),
    ):
        answer = ask(llm, response_format=None, temperature=1, seed=2, **options)
        assert re.fullmatch(pattern, answer), answer
    for wrong in ({"grammar": 3}, {"regex": 3}, {"response_format": 3}, {"regex": "a", "grammar": "b"}):
        with pytest.raises(ParameterError):
            ask(llm, **{"response_format": None, **wrong})


def test_response_formats_of_the_openai_protocol(llm: edgellm.LLM) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "form", "strict": True, "schema": FORM}}
    assert ask(llm, response_format=form).tokens == ask(llm).tokens
    assert ask(llm, response_format={"type": "json_object"}, logit_bias={"}": 99}).parsed == {}
    assert ask(llm, response_format={"type": "text"}, n=8) == ask(llm, response_format=None, n=8)
    with pytest.raises(ParameterError, match="no schema"):
        ask(llm, response_format={"type": "json_schema", "json_schema": {"name": "form"}})


def test_a_class_in_and_an_object_out(llm: edgellm.LLM) -> None:
    pydantic = pytest.importorskip("pydantic", reason="a class of pydantic's")
    msgspec = pytest.importorskip("msgspec", reason="a class of msgspec's")
    limited = pydantic.constr(max_length=5)
    person = pydantic.create_model("Person", name=(limited, ...), age=(int, pydantic.Field(ge=0, lt=9)))
    told = ask(llm, response_format=person).parsed
    assert isinstance(told, person) and len(told.name) <= 5 and 0 <= told.age < 9
    struct = msgspec.defstruct("Flag", [("on", bool)])
    flag = ask(llm, response_format=struct, temperature=1, seed=3).parsed
    assert isinstance(flag, struct) and isinstance(flag.on, bool)
    never = pydantic.create_model(
        "Never", on=(bool, ...), __validators__={"no": pydantic.field_validator("on")(lambda cls, value: 1 / 0)}
    )
    with pytest.raises(EdgeLLMError, match="Never"):
        _ = ask(llm, response_format=never).parsed
    with pytest.raises(ParameterError, match="no JSON schema"):
        ask(llm, response_format=threading.Lock().__class__)


def test_async_answers_are_parsed_too(llm: edgellm.LLM) -> None:
    answer = asyncio.run(llm.agenerate("the", max_tokens=200, temperature=0, response_format=FORM))
    assert answer.tokens == ask(llm).tokens and answer.parsed == ask(llm).parsed


def test_reasoning_is_free_and_the_answer_behind_it_keeps_the_schema(llm: edgellm.LLM) -> None:
    grammar = compile_grammar(llm.tokenizer, json_schema=FORM, begins="|")
    for seed in range(5):
        options = {"response_format": None, "temperature": 1.5, "seed": seed, "n": 900}
        answer = ask(llm, grammar=grammar, logit_bias={"|": 6}, **options)
        ends = dict.fromkeys(llm.tokenizer.eog_ids, False)
        free = ask(llm, logit_bias={"|": 6, **ends}, **options)
        before, found, behind = answer.partition("|")
        assert found and json.loads(behind) and free.startswith(before)


CHAT = "Write a record about a person who likes rivers."
REAL_FORMS = [FORM, {"type": "array", "items": {"enum": ["Rhine", "Nile", "Amazon"]}, "minItems": 1, "maxItems": 3}]


@pytest.mark.parametrize("fixture", ["smollm2_path", "gemma_path"])
def test_real_models_keep_schemas_at_any_temperature(fixture: str, request: pytest.FixtureRequest) -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema judges the answers")
    path: Path = request.getfixturevalue(fixture)
    with edgellm.load(path, n_ctx=1024, speculate="ngram") as llm:
        for form in REAL_FORMS:
            for temperature in (0, 1):
                answer = llm.generate(CHAT, response_format=form, temperature=temperature, seed=1, max_tokens=200)
                assert answer.finish_reason == "stop"
                jsonschema.validate(answer.parsed, form)
