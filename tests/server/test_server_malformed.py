"""Malformed requests, a table for each protocol: never 5xx, and the error names the field."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from scripted_executor import scripted_llm
from server_client import client_of, scripted_server
from starlette.testclient import TestClient

BIG = 2**63
WRONG_NUMBERS: list[Any] = [-2, BIG, -BIG * 2, 10**400, "1", [], {}, 1e300, True]
WRONG_TEXTS: list[Any] = [1, [1], {}, True]
WRONG_FLAGS: list[Any] = ["true", 1, [], {}]
WRONG_LISTS: list[Any] = ["x", 1, {}, [1], [None]]

BIASES = [
    [],
    "x",
    {"x": 1},
    {"-1": 1},
    {"1": "x"},
    {"1": 1e300},
    {"1" * 40: 1},
    dict.fromkeys(map(str, range(2000)), 1),
]
SAMPLING: dict[str, list[Any]] = {
    **dict.fromkeys(("temperature", "top_p", "min_p", "typical_p", "mirostat", "min_keep"), WRONG_NUMBERS),
    **dict.fromkeys(("xtc_probability", "repeat_penalty", "dry_allowed_length", "top_k"), WRONG_NUMBERS[:-3]),
    "seed": [BIG, -BIG - 1, "1", [], 1.5, 10**400],
    "presence_penalty": [1001, -1001, "1", [], BIG],
    "logit_bias": BIASES,
    "samplers": [["nope"], "x", [1], ["top_k"] * 99],
    "dry_sequence_breakers": [[""], [1], "x", ["x" * 99]],
    "ignore_eos": WRONG_FLAGS,
}
COMMON = {
    **SAMPLING,
    "stream": WRONG_FLAGS,
    "stop": [1, [1], {}, ["x"] * 99, "x" * 9999, [["x"]]],
    "model": [*WRONG_TEXTS, "nope", "../scripted", "x" * 99_999],
    "unknown_field": [1, None, "x"],
}
BASES: dict[str, tuple[str, dict[str, Any], dict[str, list[Any]]]] = {
    "chat": (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1},
        {
            **COMMON,
            "messages": [[], "x", {}, [1], [{}], [{"role": 1}], [{"role": "x"}], [{"role": "user", "content": 1}], [[]],
                         [{"role": "user", "content": [{}]}], [{"role": "user", "content": [{"type": "audio"}]}],
                         [{"role": "assistant", "tool_calls": [{}]}], [{"role": "assistant", "tool_calls": "x"}], None],
            "max_tokens": WRONG_NUMBERS,
            "n": [0, -1, 17, BIG, "1", 1.5],
            "logprobs": [1, "x", []],
            "top_logprobs": [-1, 21, "x", 5],
            "tools": ["x", [1], [{}], [{"type": "x", "function": {"name": "f"}}], [{"function": {"name": ""}}],
                      [{"function": {"name": "f", "parameters": 1}}]],
            "tool_choice": ["x", 1, {}, {"function": {"name": "f"}}, "required"],
            "response_format": ["json", {}, {"type": "x"}, {"type": "json_schema"},
                                {"type": "json_schema", "json_schema": {"schema": 1}}],
            "stream_options": ["x", {"include_usage": "x"}, []],
            "reasoning_effort": ["x", 1],
            "reasoning_budget_tokens": WRONG_NUMBERS,
            "chat_template_kwargs": ["x", [], {"x": 1}, {"enable_thinking": [1]}],
            "parallel_tool_calls": WRONG_FLAGS,
        },
    ),
    "completions": (
        "/v1/completions",
        {"prompt": "Hi", "max_tokens": 1},
        {
            **COMMON,
            "prompt": [1, {}, [], [[]], [["x"]], [1, "x"], ["x", 1], [-1], [2**31], [10**6], [[10**6]], None, [True],
                       "", ["x"] * 999],
            "max_tokens": WRONG_NUMBERS,
            "n": [0, -1, 17, BIG, "1"],
            "logprobs": [-1, 21, "x", []],
            "echo": WRONG_FLAGS,
            "suffix": ["x", 1],
            "best_of": [0, 17, "x"],
        },
    ),
    "llama": (
        "/completion",
        {"prompt": "Hi", "n_predict": 1},
        {
            **COMMON,
            "prompt": [1, {}, [], [[]], [["x"]], [1, "x"], [-1], [10**6], None, ""],
            "n_predict": WRONG_NUMBERS,
            "n_probs": [-1, 1001, "x", []],
            "json_schema": ["x", 1, []],
            "grammar": [1, [], "x" * 300_000],
            "response_fields": ["x", [1], ["x"] * 99],
            "return_tokens": WRONG_FLAGS,
            "post_sampling_probs": WRONG_FLAGS,
            "adaptive_target": [2, -2, "x"],
            "timings_per_token": WRONG_FLAGS,
        },
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with client_of(scripted_server(scripted_llm(lambda prompt: "Yes."))) as client:
        yield client


def cases(protocol: str) -> list[tuple[str, dict[str, Any], str]]:
    path, base, wrong = BASES[protocol]
    """Each wrong value, asked for as a whole and as a stream."""
    return [
        (path, {**base, **how, field: value}, field)
        for how in ({}, {"stream": True})
        for field, values in wrong.items()
        for value in values
    ]


@pytest.mark.parametrize("protocol", BASES)
def test_no_malformed_request_is_a_server_error_and_each_names_its_field(client: TestClient, protocol: str) -> None:
    tried = 0
    for path, body, field in cases(protocol):
        reply = client.post(path, content=json.dumps(body), headers={"content-type": "application/json"})
        shown = f"{field}={str(body[field])[:60]}: {reply.status_code} {reply.text[:200]}"
        assert reply.status_code in (400, 404), shown
        error = reply.json()["error"]
        assert (error["param"] or "").split(".")[0].split("[")[0] == field or field in error["message"], shown
        tried += 1
    assert tried >= 280
