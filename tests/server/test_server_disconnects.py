"""Clients that leave, read slowly, or wait: blocks come back, and the answers of the others stay what they were."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import pytest
import tiny_models
from scripted_executor import scripted_llm
from served import served
from server_client import client_of, entry, scripted_server

from edgellm.engine.scheduler import LEAD
from edgellm.llm import LLM
from edgellm.loading import LoadOptions
from edgellm.server.app import App
from edgellm.server.models import ModelEntry, Models
from edgellm.server.server import Server
from edgellm.server.watchdog import Watchdog

CHAT = "/v1/chat/completions"


def post(url: str, path: str, body: dict[str, Any]) -> socket.socket:
    """A connection on which the request has been sent."""
    parts = urlsplit(url)
    assert parts.hostname is not None and parts.port is not None
    connection = socket.create_connection((parts.hostname, parts.port), timeout=120)
    data = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n"
    )
    connection.sendall(head.encode() + b"Connection: close\r\n\r\n" + data)
    return connection


def read_all(connection: socket.socket) -> bytes:
    """The whole reply."""
    with connection, connection.makefile("rb") as file:
        return file.read()


def text_of(reply: bytes) -> str:
    """The content of a streamed chat, out of its chunks."""
    lines = [line for line in reply.split(b"\n") if line.startswith(b"data: {")]
    assert b"data: [DONE]" in reply, reply[-300:]
    choices = [choice for line in lines for choice in json.loads(line[6:])["choices"]]
    return "".join(choice["delta"].get("content") or "" for choice in choices)


def wait_until(true: Any) -> None:
    for _ in range(2000):
        if true():
            return
        time.sleep(0.01)
    pytest.fail("it did not happen")


def is_free(llm: LLM) -> bool:
    return not llm.engine.scheduler.requests


def checked_empty(llm: LLM) -> None:
    """No block is held by anybody, by the cache's own book-keeping."""
    llm.engine.call(lambda cache, executor: cache.check([]))


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("when", ["queued", "reading", "answering"])
def test_a_client_that_leaves_frees_its_blocks(stream: bool, when: str) -> None:
    llm = scripted_llm(lambda prompt: "word " * 3000, n_ctx=8192, n_parallel=1, max_tokens_per_step=64)
    llm.executor.pause_s = 0.01
    server = scripted_server(llm)
    prompt = "river " * (3000 if when == "reading" else 1)
    body = {"messages": [{"role": "user", "content": prompt}], "stream": stream}
    with served(server) as url:
        first = (
            post(url, CHAT, {**body, "messages": [{"role": "user", "content": "x " * 8000}]})
            if when == "queued"
            else None
        )
        if first is not None:
            wait_until(lambda: len(llm.engine.scheduler.requests) == 1)
        before = len(llm.engine.scheduler.requests)
        connection = post(url, CHAT, body)
        wait_until(lambda: len(llm.engine.scheduler.requests) == before + 1)
        if when == "answering":
            wait_until(lambda: any(one.generated > 2 for one in llm.engine.scheduler.requests))  # type: ignore[attr-defined]
        connection.close()
        wait_until(lambda: len(llm.engine.scheduler.requests) == before)
        if first is not None:
            first.close()
        wait_until(lambda: is_free(llm) and server.active == 0)
        checked_empty(llm)


def test_survivors_of_random_disconnects_get_what_they_would_alone() -> None:
    """Real model, real sockets: some leave while they wait, are read, or are answered."""
    server = Server(Models([entry()], LoadOptions(n_ctx=1024, n_parallel=3, max_tokens_per_step=128)))
    dice = random.Random(7)
    bodies = [
        {
            "messages": [{"role": "user", "content": f"Count from {n}. " + "river " * dice.choice((1, 40, 200))}],
            "max_tokens": 12,
            "seed": n,
            "stream": True,
        }
        for n in range(16)
    ]
    with served(server) as url:
        alone = [text_of(read_all(post(url, CHAT, body))) for body in bodies]
        (model,) = server.models.loaded()
        assert model.llm is not None
        leaves = {n: dice.random() * 1.5 for n in dice.sample(range(len(bodies)), 5)}
        got: dict[int, str] = {}

        def talk(n: int) -> None:
            connection = post(url, CHAT, bodies[n])
            if n in leaves:
                time.sleep(leaves[n])
                connection.close()
            else:
                got[n] = text_of(read_all(connection))

        threads = [threading.Thread(target=talk, args=(n,)) for n in range(len(bodies))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert got == {n: alone[n] for n in range(len(bodies)) if n not in leaves}
        wait_until(lambda: is_free(model.llm) and server.active == 0)  # type: ignore[arg-type]
        checked_empty(model.llm)


STREAMS, LEAVING = 64, 0.3


def answer_of(reply: bytes) -> tuple[str, str]:
    """Text and finish reason of a chat, streamed or not."""
    head, _, body = reply.partition(b"\r\n\r\n")
    if b"text/event-stream" in head:
        lines = [line for line in body.split(b"\n") if line.startswith(b"data: {")]
        ends = [one["finish_reason"] for line in lines for one in json.loads(line[6:])["choices"]]
        return text_of(reply), ends[-1]
    (choice,) = json.loads(body)["choices"]
    return choice["message"]["content"], choice["finish_reason"]


async def talked(url: str, body: dict[str, Any], patience: float | None, dice: random.Random) -> bytes | None:
    """The reply to one request, or None of a client that leaves: before it reads anything, or in mid-answer."""
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    data = json.dumps(body).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
    writer.write(head.encode() + f"Content-Length: {len(data)}\r\n\r\n".encode() + data)
    try:
        if patience is None:
            return await reader.read(-1)
        if dice.random() < 0.5:
            await asyncio.sleep(patience)
        else:
            for _ in range(dice.randrange(1, 6)):
                await reader.read(dice.randrange(1, 400))
        return None
    finally:
        writer.close()


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "n_requests"), [("gemma3", 500), ("qwen35", 200)])
def test_hundreds_of_requests_of_which_a_third_leaves_leak_nothing_and_change_nobody(
    architecture: str, n_requests: int, tmp_path: Path
) -> None:
    """64 streams for which there are blocks of two: they wait, share steps, are preempted, leave, and none notices."""
    path = tiny_models.write_tiny_model(tmp_path / "tiny.gguf", architecture)
    server = Server(Models([ModelEntry(("tiny",), path)], LoadOptions(n_ctx=256, n_parallel=2, max_tokens_per_step=64)))
    dice = random.Random(11)
    bodies = [
        {
            "messages": [{"role": "user", "content": dice.choice("abc") * 20 + str(n) * dice.choice((1, 9, 40))}],
            "max_tokens": dice.randrange(1, 24),
            "temperature": dice.choice((0, 1.2)),
            "seed": n,
            "stream": n % 3 > 0,
        }
        for n in range(48)
    ]
    wrong: list[int] = []
    counts = {"left": 0, "answered": 0}

    async def stream(url: str, numbers: Iterator[int], alone: list[tuple[str, str]]) -> None:
        for _ in numbers:
            n = dice.randrange(len(bodies))
            leaves = dice.random() < LEAVING
            reply = await talked(url, bodies[n], dice.random() * 0.2 if leaves else None, dice)
            counts["left" if leaves else "answered"] += 1
            if reply is not None and answer_of(reply) != alone[n]:
                wrong.append(n)

    async def everybody(url: str) -> None:
        alone = [answer_of(await talked(url, body, None, dice) or b"") for body in bodies]
        numbers = iter(range(n_requests))
        await asyncio.gather(*(stream(url, numbers, alone) for _ in range(STREAMS)))

    with served(server) as url:
        asyncio.run(everybody(url))
        (model,) = server.models.loaded()
        assert model.llm is not None and not wrong
        assert counts["left"] > n_requests / 4 and sum(counts.values()) == n_requests
        wait_until(lambda: is_free(model.llm) and server.active == 0 and model.leases == 0)  # type: ignore[arg-type]
        checked_empty(model.llm)


def test_a_slow_reader_holds_back_its_own_answer_and_no_one_elses() -> None:
    llm = scripted_llm(lambda prompt: "a long line of words " * 1500, n_ctx=8192, n_parallel=4)
    server = scripted_server(llm)
    slow, quick = (
        {"messages": [{"role": "user", "content": text}], "stream": True, "max_tokens": n}
        for text, n in (("Hi", 6000), ("Ho", 40))
    )

    async def ask(app: App, body: dict[str, Any], reads: asyncio.Event) -> bytes:
        """Over ASGI, by a client that takes a few chunks and then nothing before ``reads``."""
        requests: Iterator[Any] = iter([{"type": "http.request", "body": json.dumps(body).encode()}])
        got = []

        async def receive() -> Any:
            return next(requests, None) or await asyncio.Future()

        async def send(message: Any) -> None:
            if len(got) > 5:
                await reads.wait()
            got.append(message.get("body", b""))

        headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
        await app({"type": "http", "method": "POST", "path": CHAT, "headers": headers}, receive, send)
        return b"".join(got)

    async def talk() -> None:
        app, never, always = App(server), asyncio.Event(), asyncio.Event()
        always.set()
        first = asyncio.create_task(ask(app, slow, never))
        while not any(len(one.mailbox) >= LEAD for one in llm.engine.scheduler.requests):
            await asyncio.sleep(0.01)
        (held,) = llm.engine.scheduler.requests
        said = held.n_wanted
        assert text_of(await ask(app, quick, always)).startswith("a long line")
        assert held in llm.engine.scheduler.requests and held.n_wanted == said
        first.cancel()
        await asyncio.wait({first})

    asyncio.run(talk())
    wait_until(lambda: is_free(llm) and server.active == 0)
    checked_empty(llm)


def test_a_prompt_that_takes_long_is_answered_at_once_with_headers_and_pings(monkeypatch: pytest.MonkeyPatch) -> None:
    from edgellm.server import sse

    monkeypatch.setattr(sse, "PING_S", 0.05)
    llm = scripted_llm(["Done."], max_tokens_per_step=32)
    llm.executor.pause_s = 0.05
    with served(scripted_server(llm)) as url:
        body = {"messages": [{"role": "user", "content": "river " * 400}], "stream": True}
        reply = read_all(post(url, CHAT, body))
    first, rest = reply.index(b'"role":"assistant"'), reply.index(b'"content":"Done')
    assert first < reply.index(b": ping") < rest


def test_a_step_that_never_ends_is_noticed_and_the_model_is_loaded_anew(capfd: pytest.CaptureFixture[str]) -> None:
    llms = [scripted_llm(lambda prompt: "First.", n_ctx=512), scripted_llm(lambda prompt: "Second.", n_ctx=512)]
    server = scripted_server(llms[0])
    server.models._load = lambda entry: llms[1]
    server.watchdog.stuck_s = 0.2
    release = threading.Event()
    run = llms[0].executor.run

    def hang(*arguments: Any) -> Any:
        release.wait(60)
        return run(*arguments)

    llms[0].executor.run = hang  # type: ignore[method-assign]
    body = {"messages": [{"role": "user", "content": "Hi"}]}
    with client_of(server) as client:
        reply = client.post(CHAT, json=body)
        assert reply.status_code == 503 and "no step" in reply.json()["error"]["message"]
        assert client.get("/health").status_code == 503
        assert client.post(CHAT, json=body).json()["choices"][0]["message"]["content"] == "Second."
        release.set()
        wait_until(lambda: not llms[0].engine.is_running())
        assert client.get("/health").status_code == 200
    assert "the stacks:" in capfd.readouterr().err


def test_the_pieces_of_a_long_step_are_no_hang() -> None:
    given_up: list[Any] = []
    scheduler = SimpleNamespace(n_steps=3, n_looks=0)
    engine = SimpleNamespace(scheduler=scheduler, is_wanted=lambda: True, abandon=given_up.append)
    one = SimpleNamespace(name="m", llm=SimpleNamespace(engine=engine))
    watchdog = Watchdog(SimpleNamespace(loaded=lambda: [one], forget=lambda entry: entry.llm), stuck_s=-1.0)  # type: ignore[arg-type]
    for _ in range(3):
        watchdog.look()
        scheduler.n_looks += 1
    assert not given_up
    watchdog.look()
    watchdog.look()
    assert len(given_up) == 1
