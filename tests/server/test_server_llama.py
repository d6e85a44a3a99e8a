"""llama-server's endpoints: the same names, on the real model."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
from server_client import client_of, events, real_server
from starlette.testclient import TestClient

from edgellm.server.server import Server

__all__ = ["real_server"]

FINAL = {
    *("index", "content", "tokens", "id_slot", "stop", "model", "tokens_predicted", "tokens_evaluated"),
    *("generation_settings", "prompt", "has_new_line", "truncated", "stop_type", "stopping_word", "tokens_cached"),
    "timings",
}
METRICS = (
    *("prompt_tokens_total", "prompt_tokens_cached_total", "prompt_seconds_total", "tokens_predicted_total"),
    *("tokens_predicted_seconds_total", "n_decode_total", "n_tokens_max", "spec_decode_num_draft_tokens_total"),
    *("spec_decode_num_accepted_tokens_total", "prompt_tokens_seconds", "predicted_tokens_seconds"),
    *("requests_processing", "requests_deferred", "kv_cache_usage_ratio", "n_busy_slots_per_decode"),
)


@pytest.fixture(scope="module")
def client(real_server: Server) -> Iterator[TestClient]:
    with client_of(real_server) as client:
        yield client


def complete(client: TestClient, **body: Any) -> Any:
    reply = client.post("/completion", json={"prompt": "1, 2, 3, 4,", "n_predict": 8, "temperature": 0, **body})
    assert reply.status_code == 200, reply.text
    return reply


def test_a_completion_has_llama_servers_fields_and_says_why_it_stopped(client: TestClient) -> None:
    whole = complete(client).json()
    assert whole.keys() == FINAL and whole["stop_type"] == "limit" and whole["tokens_predicted"] == 8
    assert whole["generation_settings"]["temperature"] == 0 and whole["generation_settings"]["n_predict"] == 8
    stopped = complete(client, stop=["7"]).json()
    assert (stopped["stop_type"], stopped["stopping_word"]) == ("word", "7") and stopped["content"] == " 5, 6, "
    assert complete(client, prompt=["a", "b"]).json()[1]["index"] == 1
    assert complete(client, response_fields=["content", "timings/prompt_n"]).json().keys() == {"content", "prompt_n"}


def test_a_streamed_completion_is_the_whole_one(client: TestClient) -> None:
    whole = complete(client, n_probs=2, return_tokens=True).json()
    chunks = events(complete(client, n_probs=2, stream=True).text)
    assert "".join(chunk["content"] for chunk in chunks) == whole["content"]
    assert [chunk["stop"] for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert [token for chunk in chunks for token in chunk["tokens"]] == whole["tokens"]
    rows = [row for chunk in chunks[:-1] for row in chunk["completion_probabilities"]]
    assert rows == whole["completion_probabilities"] and len(rows[0]["top_logprobs"]) == 2


def test_a_schema_and_a_grammar_are_kept(client: TestClient) -> None:
    pytest.importorskip("llguidance", reason="grammars need the extra: pip install edgellm[structured]")
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    whole = complete(client, json_schema=schema, n_predict=32).json()
    assert re.fullmatch(r'\{\s*"a"\s*:\s*[12]\s*\}', whole["content"].strip())
    assert complete(client, grammar='start: "yes" | "no"').json()["content"] in ("yes", "no")


def test_text_becomes_tokens_and_tokens_text_in_both_shapes(client: TestClient) -> None:
    text = "Rivers flow: Grüße 𒀀"
    plain = client.post("/tokenize", json={"content": text}).json()["tokens"]
    assert client.post("/tokenize", json={"prompt": text, "add_special_tokens": False}).json()["tokens"] == plain
    told = client.post("/detokenize", json={"tokens": plain}).json()
    assert told == {"content": text, "prompt": text}
    pieces = client.post("/tokenize", json={"content": text, "with_pieces": True}).json()["tokens"]
    raw = [one["piece"].encode() if isinstance(one["piece"], str) else bytes(one["piece"]) for one in pieces]
    assert b"".join(raw).decode() == text and any(isinstance(one["piece"], list) for one in pieces)
    assert client.post("/detokenize", json={"tokens": [10**6]}).json()["error"]["param"] == "tokens[0]"
    assert client.get("/tokenizer_info").json()["eos_token"] == "<|im_end|>"


def test_a_chat_is_shown_as_the_model_reads_it(client: TestClient) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}]}
    prompt = client.post("/apply-template", json=body).json()["prompt"]
    assert prompt.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    wrong = client.post("/apply-template", json={**body, "continue_final_message": True})
    assert wrong.status_code == 400 and wrong.json()["error"]["param"] == "continue_final_message"


def test_props_slots_and_metrics_have_their_names(client: TestClient, real_server: Server) -> None:
    props = client.get("/props").json()
    assert props["default_generation_settings"]["n_ctx"] == 2048 and props["total_slots"] == 4
    assert props["bos_token"] == "<|im_start|>" and "im_start" in props["chat_template"]
    assert [slot["is_processing"] for slot in client.get("/slots").json()] == [False] * 4
    complete(client)
    told = client.get("/metrics")
    assert told.headers["content-type"].startswith("text/plain; version=0.0.4")
    for name in METRICS:
        assert re.search(rf"^llamacpp:{name} [\d.e+-]+$", told.text, re.MULTILINE), name


def test_what_no_model_can_is_501_and_says_so(client: TestClient) -> None:
    body = {"input_prefix": "def f(", "input_suffix": "return x"}
    reply = client.post("/infill", json=body)
    assert reply.status_code == 501 and "middle" in reply.json()["error"]["message"]


def test_an_error_has_llama_servers_shape(client: TestClient) -> None:
    reply = client.post("/completion", json={"prompt": "x " * 5000})
    error = reply.json()["error"]
    assert reply.status_code == error["code"] == 400 and error["type"] == "exceed_context_size_error"
    assert error["n_ctx"] == 2048 and error["n_prompt_tokens"] > 2048
