"""Servers that are not edgellm's, or mean harm: what they lack is done without, what they send is bounded and named."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from stand_in_server import Say, delta, stand_in

from edgellm.formats.errors import ContextFullError, EdgeLLMError, ParameterError, RemoteError
from edgellm.generation import Generation
from edgellm.remote.connection import Connection, parse_address
from edgellm.remote.model import RemoteServer

HANG_S = 60
QUESTION = [{"role": "user", "content": "Hi"}]


def test_addresses_are_read_as_users_write_them() -> None:
    for text, means in {
        "127.0.0.1:8080": "http://127.0.0.1:8080",
        "http://box/v1/": "http://box",
        "https://box:443/llm/v1": "https://box/llm",
        "http://[::1]:9": "http://[::1]:9",
    }.items():
        assert str(parse_address(text)) == means
    for text in ("", "ftp://x", "http://u:p@x", "http://x:99999", "http://x/?a=b", "http://x y", "http://ü"):
        with pytest.raises(ParameterError, match="--server"):
            parse_address(text)


def test_no_error_about_an_address_repeats_a_secret_in_it() -> None:
    for text in (
        "http://u:secret@h/?x", "http://u:secret@h:99999", "ftp://u:secret@h", "u:secret@h x", "http://u:sec/secret@h",
        "http://h/?key=secret", "http://h:x/?key=secret", "http://h y/?key=secret", "http://u:secret@[h",
    ):  # fmt: skip
        with pytest.raises(ParameterError, match="--server") as refused:
            parse_address(text)
        assert "secret" not in str(refused.value), text


def test_a_server_of_openais_protocol_alone_is_asked_for_nothing_else() -> None:
    with stand_in() as server:
        usage = {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 2}}
        server.streams(
            delta(role="assistant"), delta("Hel"), delta("lo"), delta(reason="stop"), usage, b"data: [DONE]\n"
        )
        remote = RemoteServer(server.url, "the-key").open()
        answer = Generation.of(remote.stream(QUESTION, temperature=0.5, max_tokens=-1, sampler_trace=True))
        path, body, key = server.asked[-1]
    assert answer.text == "Hello" and answer.finish_reason == "stop" and remote.n_ctx == 0
    assert (answer.timings.prompt_n, answer.timings.generation_n) == (5, 2)
    assert path == "/v1/chat/completions" and key == "Bearer the-key"
    assert body == {
        "model": "m",
        "messages": QUESTION,
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0.5,
    }


NO_LOGPROBS = {
    "OpenAI's form": (400, {"error": {"message": "logprobs is not supported"}}),
    "FastAPI's form": (422, {"detail": [{"type": "extra_forbidden", "loc": ["body", "logprobs"], "msg": "Extra"}]}),
    "an object": (400, {"error": {"message": {"logprobs": "unknown field"}}}),
}


@pytest.mark.parametrize("form", NO_LOGPROBS)
def test_a_server_without_log_probabilities_answers_without_them(form: str) -> None:
    with stand_in() as server:
        server.replies["/v1/chat/completions"] = NO_LOGPROBS[form]
        remote = RemoteServer(server.url).open()
        with pytest.raises(ParameterError, match="logprobs"):
            list(remote.stream(QUESTION, logprobs=4))
        assert "logprobs" in server.asked[-2][1] and "logprobs" not in server.asked[-1][1]
        server.streams(delta("yes"), delta(reason="stop"))
        assert Generation.of(remote.stream(QUESTION, logprobs=4)).text == "yes"


def test_a_connection_lost_in_mid_answer_keeps_the_text_and_is_told() -> None:
    with stand_in() as server:
        server.streams(delta("The Danube"))
        remote = RemoteServer(server.url).open()
        talk = remote.conversation()
        with pytest.raises(RemoteError) as lost:
            talk.send("Which river?")
        assert lost.value.code == "REMOTE_LOST"
        assert [message.content for message in talk.messages] == ["Which river?", "The Danube"]


def test_a_line_that_ends_within_is_a_lost_connection_or_the_end_that_was_asked_for() -> None:
    with stand_in() as server:
        server.streams(delta("The Danube"), b'data: {"choi')
        remote = RemoteServer(server.url).open()
        with pytest.raises(RemoteError) as lost:
            list(remote.stream(QUESTION))
        assert lost.value.code == "REMOTE_LOST"
        cancel = threading.Event()

        def write(say: Say) -> None:
            say(b'data: {"choi')
            cancel.set()
            while True:
                threading.Event().wait(0.02)
                say(b" ")

        server.replies["/v1/chat/completions"] = (200, write)
        assert [chunk.finish_reason for chunk in remote.stream(QUESTION, cancel=cancel)] == ["cancelled"]


def test_hanging_up_reaches_a_server_that_says_nothing() -> None:
    with stand_in() as server:

        def wait(say: Say) -> None:
            for _ in range(3000):
                say(b": still reading\n\n")
                threading.Event().wait(0.02)

        server.replies["/v1/chat/completions"] = (200, wait)
        remote = RemoteServer(server.url).open()
        cancel = threading.Event()
        threading.Timer(0.3, cancel.set).start()
        chunks = list(remote.stream(QUESTION, cancel=cancel))
        assert [chunk.finish_reason for chunk in chunks] == ["cancelled"] and server.left.wait(HANG_S)


LLAMA = {"default_generation_settings": {"n_ctx": 64}}


def test_counting_is_broken_off_while_the_server_is_silent() -> None:
    with stand_in() as server:
        silent = threading.Event()
        server.replies["/props"] = (200, LLAMA)
        remote = RemoteServer(server.url).open()
        waiting = {"/apply-template": lambda cancel: remote.prompt_ids(QUESTION, cancel=cancel)}
        waiting["/tokenize"] = lambda cancel: remote.tokenize("Hi", cancel=cancel)
        for path, count in waiting.items():
            cancel = threading.Event()

            def wait(say: Say, cancel: threading.Event = cancel) -> None:
                cancel.set()
                silent.wait(HANG_S)

            server.replies[path] = (200, wait)
            with pytest.raises(RemoteError) as stopped:
                count(cancel)
            assert stopped.value.code == "REMOTE_LOST" and not silent.is_set()
        silent.set()


def test_an_answer_is_broken_off_while_no_connection_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    with stand_in() as server:
        remote = RemoteServer(server.url).open()
        cancel, let, closed = threading.Event(), threading.Event(), threading.Event()

        class Unused:
            sock = None

            def close(self) -> None:
                closed.set()

        def slow(self: Connection) -> Any:
            cancel.set()
            assert let.wait(HANG_S), "waited for"
            return Unused()

        monkeypatch.setattr(Connection, "_open", slow)
        assert [chunk.finish_reason for chunk in remote.stream(QUESTION, cancel=cancel)] == ["cancelled"]
        let.set()
        assert closed.wait(HANG_S)  # what is made after all is not kept


STRANGE: dict[str, tuple[Any, str]] = {
    "no JSON": ([b"data: {oops\n\n"], "REMOTE_REPLY"),
    "no object": ([b"data: [1]\n\n"], "REMOTE_REPLY"),
    "too deep": ([b"data: " + b"[" * 100_000 + b"\n\n"], "REMOTE_REPLY"),
    "an endless line": ([b"data: " + b"x" * (5 << 20)], "REMOTE_REPLY"),
    "an error in the stream": ([delta("a"), {"error": {"message": "it \x1b[31mbroke", "code": 500}}], "REMOTE_FAILED"),
    "an error of words": ([{"error": "full"}], "REMOTE_FAILED"),
    "nothing": ([], "REMOTE_LOST"),
}


@pytest.mark.parametrize("what", STRANGE)
def test_what_is_no_answer_is_an_error_with_a_name(what: str) -> None:
    events, code = STRANGE[what]
    with stand_in() as server:
        server.streams(*events)
        with pytest.raises(EdgeLLMError) as raised:
            list(RemoteServer(server.url).open().stream(QUESTION))
    assert raised.value.code == code and "\x1b" not in str(raised.value) and len(str(raised.value)) < 1500


def test_odd_fields_are_passed_over() -> None:
    odd = [
        {"choices": None},
        {"choices": [7]},
        {"choices": [{"delta": [], "logprobs": {"content": 3}}]},
        {"choices": [{"delta": {"content": {"x": 1}}, "finish_reason": 9}], "usage": {"prompt_tokens": -4}},
        {"choices": [], "timings": {"prompt_n": "many", "predicted_ms": 1e300, "cache_n": True}},
        {"choices": [], "prompt_progress": {"total": -1, "processed": "x"}},
    ]
    rows = [
        {"token": "a", "logprob": 5, "bytes": [97]},
        {"token": "b", "logprob": "x", "bytes": [999]},
        {"bytes": 1},
        {"token": "c", "logprob": -1, "id": 3, "top_logprobs": [{"token": "d", "logprob": -2}, 4]},
    ]
    told = delta("abc")
    told["choices"][0]["logprobs"] = {"content": rows}
    with stand_in() as server:
        server.streams(*odd, told, delta(reason="tool_calls"))
        answer = Generation.of(RemoteServer(server.url).open().stream(QUESTION, logprobs=2))
    assert answer.text == "abc" and answer.finish_reason == "stop"
    assert [(row.bytes, row.logprob, len(row.top)) for row in answer.logprobs] == [
        (b"a", 0.0, 0), (b"b", None, 0), (b"c", -1.0, 1),
    ]  # fmt: skip
    assert all(value >= 0 for value in answer.timings)


def test_replies_that_are_refusals_have_their_names() -> None:
    cases: list[tuple[int, Any, type[EdgeLLMError], str]] = [
        (400, {"error": {"type": "exceed_context_size_error", "message": "long", "n_ctx": 8}}, ContextFullError, ""),
        (429, {"detail": "slow down"}, RemoteError, "REMOTE_BUSY"),
        (500, b"<html>", RemoteError, "REMOTE_FAILED"),
        (301, b"", RemoteError, "REMOTE_REPLY"),
        (200, {"choices": []}, RemoteError, "REMOTE_REPLY"),
    ]
    with stand_in() as server:
        remote = RemoteServer(server.url).open()
        for status, reply, kind, code in cases:
            server.replies["/v1/chat/completions"] = (status, reply)
            with pytest.raises(kind) as raised:
                list(remote.stream(QUESTION))
            assert not code or raised.value.code == code
    with stand_in() as server:
        for reply in ({"data": "x"}, b"\x00", [1]):
            server.replies["/v1/models"] = (200, reply)
            with pytest.raises(RemoteError) as nonsense:
                RemoteServer(server.url).models()
            assert nonsense.value.code == "REMOTE_REPLY"
        server.replies["/v1/models"] = (200, {"data": [{"id": 4}, {"id": "x" * 9999}, 7, {"id": "ok"}]})
        assert [model.name for model in RemoteServer(server.url).models()] == ["ok"]


def with_rows(event: dict[str, Any], *rows: Any) -> dict[str, Any]:
    """An event of a chat, with tokens."""
    event["choices"][0]["logprobs"] = {"content": list(rows)}
    return event


def test_tokens_and_their_alternatives_are_bounded_in_number_and_length(monkeypatch: pytest.MonkeyPatch) -> None:
    from edgellm.remote import answer

    others = [{"token": f"{i} " + "x" * 5000, "logprob": -2} for i in range(50)]
    row = {"token": "y" * 5000, "bytes": [121] * 5000, "logprob": -1, "top_logprobs": others}
    with stand_in() as server:
        server.streams(*(with_rows(delta("abc"), row) for _ in range(20)), delta(reason="stop"))
        remote = RemoteServer(server.url).open()
        told = Generation.of(remote.stream(QUESTION, logprobs=3)).logprobs
        assert [len(token.top) for token in told] == [3] * 20
        assert max(len(one.bytes) for token in told for one in (token, *token.top)) <= 256
        assert not any(token.top for token in Generation.of(remote.stream(QUESTION)).logprobs)
        monkeypatch.setattr(answer, "MAX_KEPT_NBYTES", 10 * 4 * 256)
        with pytest.raises(RemoteError, match="stop talking"):
            list(remote.stream(QUESTION, logprobs=3))


def test_an_answer_without_tokens_has_none_for_its_marks_either() -> None:
    with stand_in() as server:
        server.streams(delta(reasoning_content="Hm."), delta("Yes"), delta(reason="stop"))
        answer = Generation.of(RemoteServer(server.url).open().stream(QUESTION, logprobs=2))
    assert answer.text == "<think>\nHm.\n</think>\n\nYes" and answer.logprobs == ()


def test_tokens_of_an_event_without_text_go_with_the_next_text() -> None:
    def row(spelled: bytes) -> dict[str, Any]:
        return {"token": spelled.decode("utf-8", "replace"), "bytes": list(spelled), "logprob": -1}

    halves = "🙂".encode()
    with stand_in() as server:
        server.streams(
            with_rows(delta(), row(b"<think>")), with_rows(delta(reasoning_content="Hm."), row(b"Hm.")),
            with_rows(delta(), row(b"\n</")), with_rows(delta(), row(b"think>")), with_rows(delta(), row(b"\n\n")),
            with_rows(delta("So "), row(b"So ")), with_rows(delta(), row(halves[:2])),
            with_rows(delta("🙂"), row(halves[2:])), with_rows(delta(reason="stop"), row(b"<|im_end|>")),
        )  # fmt: skip
        answer = Generation.of(RemoteServer(server.url).open().stream(QUESTION, logprobs=2))
    assert answer.text == "<think>\nHm.\n</think>\n\nSo 🙂"
    assert b"".join(token.bytes for token in answer.logprobs).decode() == answer.text
    assert [token.bytes for token in answer.logprobs][-3:] == [b"So ", halves[:2], halves[2:]]
