"""/v1/chat/completions: the shape of answers and streams, errors that name the field."""

from __future__ import annotations

from typing import Any

from scripted_executor import scripted_llm
from server_client import client_of, events, real_server, scripted_server

from edgellm.server.server import Server

__all__ = ["real_server"]

HELLO = [{"role": "user", "content": "Hello!"}]
PATH = "/v1/chat/completions"


def ask(server: Server, **body: Any) -> Any:
    with client_of(server) as client:
        return client.post(PATH, json={"messages": HELLO, **body})


def test_a_whole_answer_has_what_clients_read() -> None:
    reply = ask(scripted_server(scripted_llm(["It is three degrees."])), model="scripted", temperature=0).json()
    assert reply["object"] == "chat.completion" and reply["model"] == "scripted" and reply["id"].startswith("chatcmpl-")
    (choice,) = reply["choices"]
    assert choice["finish_reason"] == "stop" and choice["logprobs"] is None
    assert choice["message"] == {"role": "assistant", "content": "It is three degrees.", "refusal": None}
    usage = reply["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 0}


def test_a_stream_is_role_then_deltas_then_reason_then_usage_then_done() -> None:
    server = scripted_server(scripted_llm(["It is three degrees."] * 2))
    with client_of(server) as client:
        body = {"messages": HELLO, "stream": True, "temperature": 0}
        with_usage = client.post(PATH, json={**body, "stream_options": {"include_usage": True}})
        without = client.post(PATH, json=body)
    assert with_usage.headers["content-type"] == "text/event-stream"
    *chunks, last, done = events(with_usage.text)
    assert done == "[DONE]" and last["choices"] == [] and last["usage"]["completion_tokens"] > 3
    assert all(chunk["usage"] is None for chunk in chunks)
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in [*chunks, last]}) == 1
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": "", "refusal": None} and deltas[-1] == {}
    assert all("role" not in delta for delta in deltas[1:])
    assert "".join(delta.get("content", "") for delta in deltas) == "It is three degrees."
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons[-1] == "stop" and set(reasons[:-1]) == {None}
    plain = events(without.text)
    assert plain[-1] == "[DONE]" and not any("usage" in chunk for chunk in plain[:-1])


def test_several_choices_come_with_their_numbers_and_share_one_prompt() -> None:
    reply = ask(scripted_server(scripted_llm(["One.", "Two.", "Three."])), n=3, temperature=0).json()
    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2]
    assert {choice["message"]["content"] for choice in reply["choices"]} == {"One.", "Two.", "Three."}


def test_logprobs_of_a_stream_are_those_of_the_whole_answer(real_server: Server) -> None:
    body = {"max_tokens": 8, "temperature": 0, "logprobs": True, "top_logprobs": 2}
    whole = ask(real_server, **body).json()["choices"][0]
    chunks = events(ask(real_server, **body, stream=True).text)[:-1]
    streamed = [one for chunk in chunks for one in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert streamed == whole["logprobs"]["content"] and len(streamed) == 8
    assert all(len(one["top_logprobs"]) == 2 and bytes(one["bytes"]).decode() == one["token"] for one in streamed)
    assert "".join(one["token"] for one in streamed) == whole["message"]["content"]


def test_the_second_request_takes_the_prompt_from_the_cache(real_server: Server) -> None:
    body = {"messages": [{"role": "user", "content": "river " * 200}], "max_tokens": 1}
    with client_of(real_server) as client:
        first, second = (client.post(PATH, json=body).json()["usage"] for _ in range(2))
    assert second["prompt_tokens_details"]["cached_tokens"] == first["prompt_tokens"] - 1
