"""What a grammar costs at each token, and whether answers keep their schemas.

    python benchmarks/structured.py smollm2 gemma3-270m            # the share of a decode step, in-process
    python benchmarks/structured.py --answers smollm2              # 20 schemas at temperatures 0 and 1, judged
    python benchmarks/structured.py --masks smollm2                # the mask alone, per position

A decode step is timed with and without a grammar, alternating, over the same number of tokens: sampled tokens alone
(``forced`` off), so that what forced tokens save is told apart from what masks cost. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

import edgellm
from edgellm.sampling import Sampler
from edgellm.structured import compile_grammar
from edgellm.structured.answer_form import answer_form
from edgellm.structured.token_trie import token_trie

PROMPT = "Write a record in JSON about a person who likes rivers."
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "city": {"type": "string", "maxLength": 40},
        "likes": {"type": "array", "items": {"type": "string", "maxLength": 24}, "minItems": 3, "maxItems": 6},
    },
    "required": ["name", "age", "city", "likes"],
    "additionalProperties": False,
}
TEXT = {"type": "string", "minLength": 400}  # what most of an answer is: a string, nearly every token allowed
GBNF = r"""
root ::= line+
line ::= name ": " value (", " value)* "\n"
name ::= [A-Z] [a-z]+ (" " [A-Z] [a-z]+)?
value ::= "-"? [0-9]+ ("." [0-9]+)? | "\"" [^"\n]+ "\""
"""
# answers that do not end by themselves within a run
ENDLESS: dict[str, dict[str, Any]] = {
    "free": {},
    "string": {"response_format": TEXT},
    "records": {"response_format": {"type": "array", "items": PERSON, "minItems": 100}},
    "regex": {"regex": r"([A-Z][a-z]+( [a-z]+){2,12}[.!?] ?){100,200}"},
    "gbnf": {"grammar": GBNF},
}
SCHEMAS: list[dict[str, Any]] = [
    PERSON,
    {"enum": ["red", "green", "blue"]},
    {"type": "boolean"},
    {"type": "integer", "minimum": 1, "maximum": 10},
    {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
    {"type": "string", "format": "date"},
    {"type": "string", "format": "uuid"},
    {"type": "string", "format": "email", "maxLength": 40},
    {"type": "string", "pattern": "^[A-Z]{2}[0-9]{4}$"},
    {"type": "string", "minLength": 3, "maxLength": 12},
    {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}, "minItems": 2, "maxItems": 4},
    {"type": "array", "prefixItems": [{"type": "boolean"}, {"enum": ["a", "b"]}], "items": False, "minItems": 2},
    {"anyOf": [{"type": "null"}, {"type": "integer", "minimum": 0, "maximum": 99}]},
    {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"], "additionalProperties": False},
    {"type": "object", "additionalProperties": {"type": "boolean"}, "minProperties": 1, "maxProperties": 2},
    {"type": "object", "properties": {"at": {"type": "string", "format": "date-time"}}, "required": ["at"],
     "additionalProperties": False},
    {"oneOf": [{"type": "object", "properties": {"kind": {"const": kind}, "n": {"type": "integer", "maximum": 999}},
                "required": ["kind", "n"], "additionalProperties": False} for kind in ("circle", "square")]},
    {"$ref": "#/$defs/node", "$defs": {"node": {"type": "object", "properties": {
        "v": {"enum": [0, 1, 2, 3]}, "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/leaf"}]}},
        "required": ["v", "next"], "additionalProperties": False}, "leaf": {"type": "object", "properties": {
            "v": {"enum": [1, 2]}}, "required": ["v"], "additionalProperties": False}}},
    {"allOf": [{"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]},
               {"properties": {"b": {"enum": [1, 2, 3]}}, "required": ["b"], "maxProperties": 2}]},
    {"type": "object", "properties": {"host": {"type": "string", "format": "hostname", "maxLength": 30},
                                      "port": {"type": "integer", "minimum": 1, "maximum": 65535}},
     "required": ["host", "port"], "additionalProperties": False},
]  # fmt: skip


def decode_seconds(llm: edgellm.LLM, n: int, **options: Any) -> float:
    """Seconds for each token after the first."""
    answer = llm.generate(PROMPT, max_tokens=n, temperature=options.pop("temperature"), seed=1, **options)
    assert len(answer.tokens) == n, f"{len(answer.tokens)} tokens came"
    return answer.timings.generation_ms / 1e3 / (n - 1)


def measure_steps(llm: edgellm.LLM, n: int, rounds: int) -> dict[str, Any]:
    """The median decode step without a grammar, and what each grammar adds to it: medians of paired runs."""
    forced, Sampler.forced = Sampler.forced, lambda self: None  # type: ignore[method-assign]
    ends = dict.fromkeys(llm.tokenizer.eog_ids, False)
    results: dict[str, Any] = {}
    try:
        for temperature in (0, 1):
            common = {"temperature": temperature, "logit_bias": ends}
            times: dict[str, list[float]] = {kind: [] for kind in ENDLESS}
            for _ in range(rounds + 1):
                for kind, more in ENDLESS.items():
                    times[kind].append(decode_seconds(llm, n, **common, **more))
            free = times.pop("free")[1:]
            results[f"temperature {temperature}"] = {"free_ms": round(1e3 * statistics.median(free), 3)} | {
                kind: round(statistics.median(t / f for t, f in zip(found[1:], free, strict=True)) - 1, 4)
                for kind, found in times.items()
            }
    finally:
        Sampler.forced = forced  # type: ignore[method-assign]
    return results


def measure_forced(llm: edgellm.LLM, rounds: int) -> dict[str, Any]:
    """A whole answer with and without forced tokens: seconds and steps."""
    forced, found = Sampler.forced, {}
    for name, method in (("forced", forced), ("sampled", lambda self: None)):
        Sampler.forced = method  # type: ignore[method-assign]
        answers = [
            llm.generate(PROMPT, max_tokens=300, temperature=0, response_format=PERSON) for _ in range(rounds + 1)
        ]
        seconds = statistics.median(answer.timings.generation_ms for answer in answers[1:]) / 1e3
        found[name] = {"tokens": len(answers[0].tokens), "seconds": round(seconds, 4)}
    Sampler.forced = forced  # type: ignore[method-assign]
    return found


def measure_masks(llm: edgellm.LLM, n: int) -> dict[str, Any]:
    """Microseconds of one thread for each part, over the positions of an answer: others on the machine do not count."""
    started = time.thread_time()
    token_trie(llm.tokenizer)
    found: dict[str, Any] = {"trie_s": round(time.thread_time() - started, 3)}
    ends = dict.fromkeys(llm.tokenizer.eog_ids, False)
    for kind, given in ENDLESS.items():
        if kind == "free":
            continue
        started = time.thread_time()
        form = answer_form(llm.tokenizer, *(given.get(name) for name in ("response_format", "regex", "grammar")))
        compile_ms = 1e3 * (time.thread_time() - started)
        answer = llm.generate(PROMPT, max_tokens=n, temperature=1, seed=1, logit_bias=ends, **given)
        assert form is not None, "each kind has a form"
        found[kind] = {"grammar_ms": round(compile_ms, 2)} | mask_us(form.source.constraint(), answer.tokens)
    return found | {f"sample_us, temperature {t}": sample_us(llm, t) for t in (0, 1)}


def mask_us(constraint: Any, tokens: Sequence[int]) -> dict[str, Any]:
    """Microseconds of the mask and of going on, over the tokens of an answer."""
    times: dict[str, list[float]] = {"mask": [], "accept": []}
    for token in tokens:
        for name, step in (("mask", constraint.allowed), ("accept", lambda token=token: constraint.accept(token))):
            started = time.thread_time()
            step()
            times[name].append(1e6 * (time.thread_time() - started))
    return {
        f"{name}_us": {
            "mean": round(statistics.mean(us), 1),
            "median": round(statistics.median(us), 1),
            "most": round(max(us), 1),
        }
        for name, us in times.items()
    }


def sample_us(llm: edgellm.LLM, temperature: float) -> dict[str, float]:
    """Microseconds of one thread to choose a token, with every token free and within a string."""
    n_vocab = llm.program.n_vocab
    logits = (3 * np.random.default_rng(1).standard_normal(n_vocab)).astype(np.float32)
    constraint = compile_grammar(llm.tokenizer, json_schema=TEXT).constraint()
    while (allowed := constraint.allowed()) is not None and allowed.ids is not None:  # the opening quote
        constraint.accept(int(allowed.ids[0]))
    found = {}
    for name, mask in (("free", None), ("string", constraint)):
        params = edgellm.SamplingParams(temperature=temperature, seed=1)
        sampler = Sampler(params, n_vocab, draw=llm.executor.draw, mask=mask)
        times = []
        for _ in range(200):
            started = time.thread_time()
            sampler.sample(logits)
            times.append(1e6 * (time.thread_time() - started))
        found[name] = round(statistics.median(times), 1)
    return found


def measure_answers(llm: edgellm.LLM) -> dict[str, Any]:
    """How many answers to the schemas are valid, cut at the limit, or wrong."""
    import jsonschema

    counts = {"valid": 0, "cut": 0, "wrong": 0}
    for schema in SCHEMAS:
        judge = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER)
        for temperature in (0, 1):
            answer = llm.generate(PROMPT, max_tokens=300, temperature=temperature, seed=1, response_format=schema)
            if answer.finish_reason != "stop":
                counts["cut"] += 1
            elif judge.is_valid(answer.parsed):
                counts["valid"] += 1
            else:
                counts["wrong"] += 1
                print("wrong:", repr(str(answer)), schema)
    return counts


def main() -> None:
    """Measure the models that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--answers", action="store_true", help="judge answers in place of measuring steps")
    parser.add_argument("--masks", action="store_true", help="the mask alone")
    parser.add_argument("-n", type=int, default=96, help="tokens of a run")
    parser.add_argument("-r", "--rounds", type=int, default=5)
    given = parser.parse_args()
    results: dict[str, Any] = {}
    for name in given.models:
        with edgellm.load(name, n_ctx=2048) as llm:
            if given.answers:
                results[name] = measure_answers(llm)
            elif given.masks:
                results[name] = measure_masks(llm, given.n)
            else:
                results[name] = measure_steps(llm, given.n, given.rounds) | measure_forced(llm, given.rounds)
        for key, value in results[name].items():
            print(f"{name:14} {key:16} {value}")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
