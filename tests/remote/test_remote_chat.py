"""A model behind a server is used as one of this machine: answers, thoughts, tokens, figures, stopping, errors."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from scripted_executor import scripted_llm
from served import served
from server_client import Server, real_server, scripted_server
from tool_template import TOOL_TEMPLATE

from edgellm.cli import main
from edgellm.formats.errors import ContextFullError, ModelNotFoundError, RemoteError
from edgellm.generation import Generation
from edgellm.remote.model import RemoteServer

__all__ = ["real_server"]
HANG_S = 60
QUESTION = [{"role": "user", "content": "Which river?"}]
THOUGHTS = "<think>\nA river is asked for.\n</think>\n\nThe Danube."


def test_an_answer_has_the_text_the_tokens_and_the_figures_of_the_library(real_server: Server) -> None:
    asked: dict[str, Any] = {"max_tokens": 12, "temperature": 0, "logprobs": 3}
    with served(real_server) as url:
        remote = RemoteServer(url).open("smollm2")
        answer = Generation.of(remote.stream(QUESTION, **asked))
        ids = remote.prompt_ids(QUESTION)
        llm = real_server.models.loaded()[0].llm
        assert llm is not None
        own = llm.generate(QUESTION, **asked)
        assert remote.n_ctx == llm.n_ctx and ids == llm.prompt_ids(QUESTION)
        assert remote.default_params.top_k == llm.default_params.top_k
    assert answer.text == own.text and answer.finish_reason == own.finish_reason == "length"
    assert answer.tokens == own.tokens
    assert [row.bytes for row in answer.logprobs] == [row.bytes for row in own.logprobs]
    assert [[(other.token, other.bytes) for other in row.top] for row in answer.logprobs] == [
        [(other.token, other.bytes) for other in row.top] for row in own.logprobs
    ]
    assert (answer.timings.prompt_n, answer.timings.generation_n) == (own.timings.prompt_n, own.timings.generation_n)
    assert answer.timings.generation_tps > 0 and answer.timings.time_to_first_token_ms > 0


def test_what_was_thought_comes_between_the_marks_that_sessions_know_and_goes_back_apart() -> None:
    llm = scripted_llm([THOUGHTS, "Yes."], TOOL_TEMPLATE)
    with served(scripted_server(llm)) as url, RemoteServer(url).open() as remote:
        talk = remote.conversation()
        answer = talk.send("Which river?", logprobs=2)
        assert answer.text == THOUGHTS
        assert b"".join(row.bytes for row in answer.logprobs).decode().split() == THOUGHTS.split()
        talk.send("Sure?")
        assert "A river is asked for." in llm.tokenizer.decode(llm.engine.executor.script.prompts[-1])  # type: ignore[attr-defined]


def test_an_answer_is_gone_on_with_from_its_text(real_server: Server) -> None:
    begun = [*QUESTION, {"role": "assistant", "content": "The capital of France is"}]
    with served(real_server) as url:
        remote = RemoteServer(url).open()
        kwargs = {"continue_final_message": True}
        answer = Generation.of(remote.stream(begun, max_tokens=4, temperature=0, template_kwargs=kwargs))
    assert "Paris" in answer.text


def test_stopping_and_closing_end_the_servers_work() -> None:
    llm = scripted_llm(lambda prompt: "on and " * 2000)
    llm.engine.executor.pause_s = 0.01  # type: ignore[attr-defined]
    server = scripted_server(llm)
    with served(server) as url:
        remote = RemoteServer(url).open()
        cancel = threading.Event()
        chunks = remote.stream(QUESTION, cancel=cancel)
        pieces = [next(chunks).text for _ in range(5)]
        cancel.set()
        rest = list(chunks)
        assert "".join(pieces).startswith("on and") and rest[-1].finish_reason == "cancelled"
        _idle(server)
        chunks = remote.stream(QUESTION)
        next(chunks)
        chunks.close()
        _idle(server)


def _idle(server: Server) -> None:
    deadline = time.monotonic() + HANG_S
    while server.active:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_errors_say_what_is_wrong_in_words() -> None:
    from edgellm.server.security import Access

    llm = scripted_llm(["never"], n_ctx=64)
    with served(scripted_server(llm, access=Access(keys=("right",)))) as url:
        with pytest.raises(RemoteError, match="key") as wrong:
            RemoteServer(url, "wrong").models()
        assert wrong.value.code == "REMOTE_KEY" and "wrong" not in str(wrong.value).replace("missing or wrong", "")
        server = RemoteServer(f"{url}/v1/", "right")
        with pytest.raises(ModelNotFoundError, match="scripted"):
            server.open("other")
        with pytest.raises(ContextFullError):
            list(server.open().stream([{"role": "user", "content": "word " * 200}]))
    with pytest.raises(RemoteError, match="edgellm serve") as gone:
        server.models()
    assert gone.value.code == "REMOTE_UNREACHABLE"


@pytest.fixture
def url(real_server: Server) -> Iterator[str]:
    with served(real_server) as address:
        yield address


def test_the_plain_chat_talks_to_a_server_and_hides_the_key(
    url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGELLM_API_KEY", "not-asked-for")
    monkeypatch.setattr("sys.stdin", open("/dev/null"))  # noqa: SIM115
    words = ["chat", "--plain", "--server", url, "-n", "8", "--temp", "0", "-p", "Hello"]
    assert main(words) == 0
    told = capsys.readouterr()
    assert told.out.strip() and "not-asked-for" not in told.out + told.err


def test_options_of_a_model_here_are_refused_with_a_server(capsys: pytest.CaptureFixture[str]) -> None:
    for flags in (
        ["-c", "512"],
        ["-t", "2"],
        ["--device", "cpu"],
        ["--speculate", "ngram"],
        ["--draft", "m"],
        ["--lora", "m"],
        ["--control-vector", "m"],
        ["--control-vector-layer-range", "1", "2"],
        ["--force"],
    ):
        assert main(["chat", "--plain", "--server", "http://127.0.0.1:1", *flags]) == 2
        assert flags[0] in capsys.readouterr().err
