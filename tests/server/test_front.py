"""Several servers behind one address: an answer survives the server that makes it, and the client sees one of it."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import random
import threading
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("msgspec", reason="the server needs its extra: pip install edgellm[server]")
pytest.importorskip("httpx2", reason="starlette's client needs it: pip install httpx2")
pytest.importorskip("gguf", reason="the judge of files: pip install gguf")

import msgspec
from starlette.testclient import TestClient
from tiny_models import write_tiny_model

from edgellm.loading import Kind, LoadOptions
from edgellm.server import bodies
from edgellm.server.app import App, Asked
from edgellm.server.errors import ServerError
from edgellm.server.front import Front
from edgellm.server.models import ModelEntry, Models
from edgellm.server.prefix_keys import MAX_KEYS, PrefixMemory, prefix_keys
from edgellm.server.rate_limit import RateLimit
from edgellm.server.relay import Chunk, Made, Part, RelayedCall, Whole, parts
from edgellm.server.response_cache import ResponseCache, cache_key
from edgellm.server.routes import all_routes, call_route
from edgellm.server.security import Access
from edgellm.server.server import Server

OPTIONS = LoadOptions(n_ctx=128, n_threads=1, n_parallel=4)
ROUTES = {(row.route.method, row.route.path): row.route for row in all_routes()}


class Gone(Exception):
    """A server is no more."""


class Servers:
    """Sends to one server or another; ``deaths`` says after how many parts each of the next ones is gone."""

    def __init__(self, path: Path) -> None:
        self.server = Server(Models([ModelEntry(("tiny",), path)], OPTIONS))
        self.deaths: list[int] = []
        self.calls: list[RelayedCall] = []
        self.prefixes: list[Sequence[int]] = []

    async def send(self, model: str, call: RelayedCall, prefix: Sequence[int]) -> AsyncGenerator[Part, None]:
        assert model == "tiny"
        self.calls.append(call)
        self.prefixes.append(prefix)
        left = self.deaths.pop(0) if self.deaths else -1
        source = parts(self.server, ROUTES[call.method, call.path], call)
        try:
            async for part in source:
                if left == 0:
                    raise Gone
                left -= 1
                yield part
        finally:
            await source.aclose()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("front") / "tiny.gguf", n_embd=64, n_ff=64, n_head=1, n_head_kv=1)


@pytest.fixture(scope="module")
def servers(model: Path) -> Servers:
    return Servers(model)


@pytest.fixture(scope="module")
def front(servers: Servers, model: Path) -> Iterator[TestClient]:
    app = Front(Server(Models([ModelEntry(("tiny",), model)], OPTIONS)), servers.send, (Gone,))
    with TestClient(app, base_url="http://localhost", raise_server_exceptions=False) as client:
        yield client


@pytest.fixture(scope="module")
def alone(model: Path) -> Iterator[TestClient]:
    server = Server(Models([ModelEntry(("tiny",), model)], OPTIONS))
    with TestClient(App(server), base_url="http://localhost", raise_server_exceptions=False) as client:
        yield client


CHAT = [{"role": "user", "content": "the rain in the"}]
STREAMS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": CHAT, "max_tokens": 12},
    "/v1/completions": {"prompt": "the rain", "max_tokens": 12},
    "/v1/responses": {"input": "the rain", "max_output_tokens": 12},
    "/v1/messages": {"messages": CHAT, "max_tokens": 12},
    "/api/chat": {"messages": CHAT, "options": {"num_predict": 12, "temperature": 0}},
    "/completion": {"prompt": "the rain", "n_predict": 12},
}


def ask(client: TestClient, path: str, stream: bool = True, **more: Any) -> str:
    body = {"model": "tiny", "stream": stream, **STREAMS[path], **more}
    if path != "/api/chat":
        body.setdefault("temperature", 0)
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.text


def plain(text: str) -> list[Any]:
    """The events without ids, times and counts of what was in the cache."""
    unlike = ("id", "created", "created_at", "completed_at", "timings", "request_id", "item_id", "usage")

    def cut(value: Any) -> Any:
        if isinstance(value, dict):
            return {
                name: cut(one)
                for name, one in value.items()
                if name not in unlike and not name.endswith("duration") and not name.startswith("prompt_eval")
            }
        return [cut(one) for one in value] if isinstance(value, list) else value

    lines = [line.removeprefix("data: ") for line in text.splitlines() if line and not line.startswith((":", "event"))]
    return [line if line == "[DONE]" else cut(json.loads(line)) for line in lines]


@pytest.mark.parametrize("path", STREAMS)
def test_a_stream_goes_on_when_its_server_is_gone(
    front: TestClient, alone: TestClient, servers: Servers, path: str
) -> None:
    whole = plain(ask(alone, path))
    rng = random.Random(path)
    for deaths in ([0], [1], [2], [5, 3], [rng.randrange(12) for _ in range(4)]):
        servers.deaths, servers.calls = list(deaths), []
        text = ask(front, path)
        assert plain(text) == whole, deaths
        assert len(servers.calls) == len(deaths) + 1 - len(servers.deaths)
        ids = {json.loads(line[6:]).get("id") for line in text.splitlines() if line.startswith('data: {"id"')}
        assert len(ids) <= 1, "one answer has one id"


@pytest.mark.parametrize("path", STREAMS)
def test_a_whole_answer_is_made_again_when_its_server_is_gone(
    front: TestClient, alone: TestClient, servers: Servers, path: str
) -> None:
    servers.deaths = [0]
    assert plain(ask(front, path, False)) == plain(ask(alone, path, False))


def test_an_answer_goes_on_from_its_tokens(front: TestClient, alone: TestClient, servers: Servers) -> None:
    servers.deaths, servers.calls = [8], []
    assert plain(ask(front, "/v1/completions")) == plain(ask(alone, "/v1/completions"))
    first, second = servers.calls
    assert not first.known and len(second.known) >= 6 and first.key == second.key
    # the second server read them in one step: what it counts as generated is all the same the whole answer
    servers.deaths, servers.calls = [8], []
    drawn = ask(front, "/v1/completions", temperature=1.5, ignore_eos=True)
    texts = "".join(event["choices"][0]["text"] for event in plain(drawn) if event != "[DONE]")
    assert len(servers.calls) == 2 and texts


def test_the_seed_of_a_client_and_several_answers_are_drawn_again_alike(
    front: TestClient, alone: TestClient, servers: Servers
) -> None:
    for more in ({"seed": 7, "temperature": 1.5}, {"seed": 7, "temperature": 1.5, "n": 3}, {"n": 2, "logprobs": 2}):
        servers.deaths = [9]
        text = ask(front, "/v1/completions", **more)
        assert servers.deaths == [] and told(text) == told(ask(alone, "/v1/completions", **more)), more


def told(text: str) -> dict[int, list[Any]]:
    """The chunks of each choice; which comes first is chance."""
    found: dict[int, list[Any]] = {}
    for event in plain(text):
        for choice in event["choices"] if event != "[DONE]" else ():
            found.setdefault(choice["index"], []).append(choice)
    return found


def test_answers_without_a_seed_differ_and_those_of_one_request_too(front: TestClient) -> None:
    body = {"model": "tiny", "prompt": "the rain", "max_tokens": 24, "temperature": 2, "n": 3, "ignore_eos": True}
    texts = [choice["text"] for _ in range(2) for choice in front.post("/v1/completions", json=body).json()["choices"]]
    assert len(set(texts)) == 6


def test_a_request_that_ends_every_server_is_given_up(front: TestClient, servers: Servers) -> None:
    servers.deaths = [0] * 9
    response = front.post("/v1/completions", json={"model": "tiny", "prompt": "a", "max_tokens": 4})
    assert response.status_code == 503 and "in a row" in response.json()["error"]["message"]
    assert len(servers.deaths) == 4
    servers.deaths = [3] * 9
    text = ask(front, "/v1/completions")
    assert "in a row" in text and text.startswith("data: ")
    servers.deaths = []


def test_what_is_wrong_is_said_as_by_one_server(front: TestClient, alone: TestClient, servers: Servers) -> None:
    servers.calls = []
    wrong: list[tuple[str, dict[str, Any], int]] = [
        ("/v1/completions", {"model": "tiny", "prompt": "a", "flavour": 1}, 0),
        ("/v1/completions", {"model": "none", "prompt": "a"}, 0),
        ("/v1/completions", {"model": "tiny", "prompt": "a " * 400}, 1),
        ("/v1/chat/completions", {"model": "tiny", "messages": CHAT, "tool_choice": "required"}, 1),
    ]
    for path, body, n_calls in wrong:
        servers.calls = []
        one, other = front.post(path, json=body), alone.post(path, json=body)
        assert one.status_code == other.status_code >= 400 and one.json() == other.json()
        assert len(servers.calls) == n_calls, "what can be refused here does not travel"
    for path in ("/slots", "/metrics", "/v1/responses/resp_1"):
        assert front.get(path).status_code == 501
    for path in ("/v1/models", "/api/tags", "/health", "/openapi.json", "/v1/models/tiny"):
        assert front.get(path).status_code == 200
    refused = front.post("/v1/responses", json={"model": "tiny", "input": "a", "previous_response_id": "resp_1"})
    assert refused.status_code == 400 and "several servers" in refused.json()["error"]["message"]


def test_what_failed_and_what_never_began_leaves_its_place(model: Path) -> None:
    servers, server = Servers(model), Server(Models([ModelEntry(("tiny",), model)], OPTIONS), max_requests=2)
    front = Front(server, servers.send, (Gone,))

    async def ask_all() -> None:
        for number in range(6):
            with pytest.raises(ServerError) as caught:
                await asked(front, "/v1/completions", {"model": "tiny", "prompt": "a " * 400})
            assert caught.value.status == 400 and server.active == 0, number
        for number in range(4):
            reply = await asked(front, "/v1/completions", {"model": "tiny", "prompt": "the", "stream": True})
            await reply.source.aclose()  # the client left before a step was made
            assert server.active == 0, number
        await servers.server.models.close()

    gc.disable()
    try:
        asyncio.run(ask_all())
    finally:
        gc.enable()


async def asked(front: Front, path: str, body: Any, **more: Any) -> Any:
    """The front's reply to a request that was let in."""
    row = next(row for row in all_routes() if row.route.path == path)
    raw = b"" if row.route.body is None else json.dumps(body).encode()
    asking = Asked(row.route, row.protocol, raw, more.get("headers", {}), {}, more.get("query", {}), "10.0.0.1")
    return await front.respond(asking)


def test_every_route_of_a_model_is_sent_on() -> None:
    from edgellm.server.front import NOT_HERE, SENT_ON

    here = {"/api/show", "/api/pull", "/api/create", "/api/copy", "/api/push", "/v1/responses/compact"}
    posts = {route.path for (method, _), route in ROUTES.items() if method == "POST"}
    assert posts - here - NOT_HERE.keys() == SENT_ON - {"/tokenizer_info", "/props"}
    assert not NOT_HERE.keys() & SENT_ON


def test_the_prefix_of_a_turn_is_that_of_the_next() -> None:
    system, question = (
        {"role": "system", "content": "be kind " * 60},
        {"role": "user", "content": "what is rain? " * 20},
    )
    first = prefix_keys({"messages": [system, question], "model": "a"})
    answer, more = {"role": "assistant", "content": "water"}, {"role": "user", "content": "and snow? " * 30}
    second = prefix_keys({"model": "a", "messages": [system, question, answer, more]})
    assert len(first) > 4 and second[: len(first)] == first
    other = prefix_keys({"messages": [system, more]})
    memory = PrefixMemory(len(first) + 2)
    memory.note(first)
    assert memory.n_known(second) == len(first) and memory.n_known(other) == 0
    memory.note(other)
    assert memory.n_known(other) == len(other) and memory.n_known(first) == 2
    assert prefix_keys(None) == prefix_keys([]) == prefix_keys({"prompt": 3}) == []


def test_a_large_body_is_read_on_a_thread_and_no_further_than_its_keys_go(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Counted(list[int]):
        n = 0

        def __iter__(self) -> Iterator[int]:
            for one in super().__iter__():
                self.n += 1
                yield one

    tokens = Counted(range(300_000))
    keys = prefix_keys({"input": tokens})
    assert len(keys) == MAX_KEYS and tokens.n < 20_000
    assert prefix_keys({"input": list(range(20_000))}) == keys, "what is behind makes no difference"

    threads: list[Any] = []

    def noted(data: Any) -> list[int]:
        threads.append(threading.current_thread())
        return []

    async def ask_all() -> None:
        front = two_models(model, [], Access(), cache=ResponseCache(1 << 20))
        for n in (1, 300_000):
            await asked(front, "/v1/embeddings", {"input": [7] * n})
            assert (threads.pop() is threading.main_thread()) == (n == 1)

    monkeypatch.setattr("edgellm.server.front.prefix_keys", noted)
    asyncio.run(ask_all())
    decode = bodies.decode

    def read(raw: bytes, body: Any) -> Any:
        threads.append(threading.current_thread())
        return decode(raw, body)

    monkeypatch.setattr(bodies, "decode", read)
    server = Server(Models([ModelEntry(("tiny",), model)], OPTIONS))
    for n in (1, 300_000):  # and by the servers behind it
        with contextlib.suppress(ServerError):
            raw = json.dumps({"input": [7] * n, "flavour": 1}).encode()
            asyncio.run(call_route(server, ROUTES["POST", "/v1/embeddings"], raw))
        assert (threads.pop() is threading.main_thread()) == (n == 1)


def test_a_body_is_read_once(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[bytes] = []
    decode = msgspec.json.decode

    def noted(raw: bytes, **more: Any) -> Any:
        read.append(bytes(raw))
        return decode(raw, **more)

    monkeypatch.setattr(msgspec.json, "decode", noted)
    body = {"prompt": "the sun", "temperature": 0}
    asyncio.run(asked(two_models(model, [], Access(), cache=ResponseCache(1 << 20)), "/v1/completions", body))
    assert read == [json.dumps(body).encode()]


def test_a_client_that_asks_too_often_waits() -> None:
    clock = [0.0]
    limit = RateLimit(60, 3, clock=lambda: clock[0])
    for _ in range(3):
        limit.check("a")
    with pytest.raises(ServerError) as caught:
        limit.check("a")
    assert caught.value.status == 429 and caught.value.headers["retry-after"] == "1"
    limit.check("b")
    clock[0] = 1.0
    limit.check("a")
    with pytest.raises(ServerError):
        limit.check("a")


def test_what_is_the_same_again_is_answered_from_the_cache(model: Path) -> None:
    servers, server = Servers(model), Server(Models([ModelEntry(("tiny",), model)], OPTIONS))
    app = Front(server, servers.send, (Gone,), RateLimit(6, 6), ResponseCache(1 << 20))
    with TestClient(app, base_url="http://localhost") as client:
        for stream in (False, True):
            servers.calls = []
            bodies = [
                {"model": "tiny", "prompt": "the sun", "max_tokens": 4, "temperature": 0, "stream": stream},
                {"stream": stream, "temperature": 0, "prompt": "the sun", "max_tokens": 4, "model": "tiny"},
            ]
            first, second = (client.post("/v1/completions", json=body) for body in bodies)
            assert first.text == second.text and len(servers.calls) == 1
            assert "x-edgellm-cache" not in first.headers and second.headers["x-edgellm-cache"] == "hit"
        for _ in range(2):
            client.post("/v1/completions", json={"model": "tiny", "prompt": "the sun", "max_tokens": 1})
        assert len(servers.calls) == 3, "what is drawn is drawn again"
        limited = client.post("/v1/completions", json={"model": "tiny", "prompt": "the sun"})
        assert limited.status_code == 429 and limited.json()["error"]["code"] == "rate_limit_exceeded"


DRAWN: dict[str, Any] = {"dynatemp_range": 0.5, "samplers": ["top_k"], "adaptive_target": 0.5}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/completion"])
def test_what_draws_at_temperature_0_too_is_not_kept_and_is_drawn_again(model: Path, path: str, stream: bool) -> None:
    servers, server = Servers(model), Server(Models([ModelEntry(("tiny",), model)], OPTIONS))
    app = Front(server, servers.send, (Gone,), cache=ResponseCache(1 << 20))
    with TestClient(app, base_url="http://localhost") as client:
        for name, value in DRAWN.items():
            if name == "adaptive_target" and path != "/completion":
                continue
            servers.calls = []
            body = {"model": "tiny", **STREAMS[path], "temperature": 0, "stream": stream, name: value}
            for _ in range(2):
                response = client.post(path, json=body)
                assert response.status_code == 200, response.text
            assert len(servers.calls) == 2, name
    with TestClient(Front(server, servers.send, (Gone,)), base_url="http://localhost") as client:
        if stream:  # with a seed, what a lost server had drawn is drawn again by the next
            more = {"dynatemp_range": 2, "seed": 7, "ignore_eos": True}
            whole = plain(ask(client, path, **more))
            servers.deaths = [8]
            assert plain(ask(client, path, **more)) == whole and servers.deaths == []


def two_models(model: Path, asked_for: list[str], access: Access, **more: Any) -> Front:
    """A front of two models; the servers behind it tell their model's name."""

    async def send(name: str, call: RelayedCall, prefix: Sequence[int]) -> AsyncGenerator[Part, None]:
        asked_for.append(name)
        yield Whole(200, "application/json", json.dumps(name).encode(), {})

    entries = [ModelEntry((name,), model) for name in ("one", "two")]
    return Front(Server(Models(entries, OPTIONS), access), send, (Gone,), **more)


def test_the_cache_gives_a_reply_to_the_same_key_the_same_path_and_the_same_model_alone(model: Path) -> None:
    told: list[str] = []
    front = two_models(model, told, Access(keys=("first", "second")), cache=ResponseCache(1 << 20))
    body = {"prompt": "the sun", "temperature": 0}

    async def ask_all() -> None:
        def content(reply: Any) -> Any:
            return json.loads(reply.content)

        first, second = {"authorization": "Bearer first"}, {"x-api-key": "second"}
        for n, (headers, more) in enumerate([(first, {}), (second, {}), (first, {"model": "two"})], 1):
            for _ in range(2):
                await asked(front, "/v1/completions", {**body, **more}, headers=headers)
            assert len(told) == n, "each is asked once"
        assert told == ["one", "one", "two"]
        # as one server: a body means the first model, whatever the query says; without a body the query names it
        for path, query, name in (
            ("/v1/completions", {"model": "two"}, "one"),
            ("/props", {"model": "two"}, "two"),
            ("/tokenizer_info", {}, "one"),
        ):
            assert content(await asked(front, path, body, headers=first, query=query)) == name

    asyncio.run(ask_all())


def test_who_names_no_model_means_one_of_the_kind_that_a_server_alone_would_take(model: Path) -> None:
    told: list[str] = []
    front = two_models(model, told, Access())

    async def ask_all() -> None:
        chat, *_ = await front.server.models.usable()
        facts = await front.server.models.facts(chat)
        kinds: list[Kind] = ["chat", "embedding", "rerank"]
        entries = [ModelEntry((kind,), model, facts=replace(facts, kind=kind)) for kind in kinds]
        front.server.models = Models(entries, OPTIONS)
        for path, body, kind in (
            ("/rerank", {"query": "a", "documents": ["b"]}, "rerank"),
            ("/v1/rerank", {"query": "a", "documents": ["b"]}, "rerank"),
            ("/v1/embeddings", {"input": "a"}, "embedding"),
            ("/embedding", {"content": "a"}, "embedding"),
            ("/v1/completions", {"prompt": "a"}, "chat"),
            ("/tokenize", {"content": "a"}, "chat"),
        ):
            await asked(front, path, body)
            assert told.pop() == kind, path

    asyncio.run(ask_all())


def test_a_limit_is_for_each_key_however_it_is_sent_and_without_keys_for_each_address(model: Path) -> None:
    def allowed(access: Access, many: list[dict[str, str]]) -> int:
        front = two_models(model, [], access, limit=RateLimit(1, 2))

        async def ask_all() -> int:
            n = 0
            with contextlib.suppress(ServerError):
                for headers in many:
                    await asked(front, "/v1/completions", {"prompt": "a"}, headers=headers)
                    n += 1
            return n

        return asyncio.run(ask_all())

    junk = [{"authorization": f"Bearer junk{n}", "x-api-key": "key"} for n in range(5)]
    blanks: list[dict[str, str]] = [
        {"authorization": f"{word} {' ' * n}key"} for n, word in enumerate(("Bearer", "bearer", "BEARER"))
    ]
    for many in (junk, blanks, [{"x-api-key": "key"}, *blanks]):
        assert allowed(Access(keys=("key",)), many) == 2
        assert allowed(Access(), many) == 2
    several = [{"x-api-key": key} for key in ("key", "other", "key", "other", "key")]
    assert allowed(Access(keys=("key", "other")), several) == 4


def test_the_cache_is_bounded() -> None:
    cache = ResponseCache(10_000)
    for number in range(100):
        cache.keep(b"%d" % number, [Chunk(bytes(200))])
    assert cache.used <= 10_000 and cache.get(b"0") is None and cache.get(b"99") is not None
    cache.keep(b"large", [Chunk(bytes(5000)), Made(())])
    assert cache.get(b"large") is None
    assert cache_key("/v1/completions", {"temperature": 0.5}) is None
    assert cache_key("/v1/responses", {"temperature": 0}) is None
    assert cache_key("/v1/embeddings", {"input": "a"}) is not None
    names = ("caf\udce9", "caf\udcea", "caf\ufffd")  # two files whose names are no UTF-8, and what clients see of both
    assert len({cache_key("/v1/embeddings", {"input": "a"}, (name, "key")) for name in names}) == 3
