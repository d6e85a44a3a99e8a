"""Who is let in: Host, Origin, key, JSON; what a request may not say; and errors of each protocol with the field."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from scripted_executor import scripted_llm
from server_client import client_of, scripted_server
from starlette.testclient import TestClient

from edgellm.formats.errors import ParameterError
from edgellm.server import bodies
from edgellm.server.app import App
from edgellm.server.security import Access

CHAT = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 2}


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    server = scripted_server(scripted_llm(lambda prompt: "Yes."), access=Access(keys=("secret", "other")))
    with client_of(server) as client:
        yield client


KEY = {"authorization": "Bearer secret"}


def test_an_address_open_to_others_needs_a_key() -> None:
    for host in ("0.0.0.0", "::", "192.168.1.5", "my-machine"):
        with pytest.raises(ParameterError, match="--api-key"):
            Access(host)
        Access(host, ("key",))
    for host in ("127.0.0.1", "127.3.4.5", "::1", "localhost"):
        Access(host)


def test_every_route_but_health_wants_the_key(client: TestClient) -> None:
    app = client.app
    assert isinstance(app, App)
    for route in app.routes():
        path = route.path.replace("{name:path}", "scripted")
        status = client.request(route.method, path, json={} if route.body else None).status_code
        assert (status == 401) != route.public, path
    assert client.get("/nowhere").status_code == 401
    for headers in (KEY, {"x-api-key": "other"}, {"authorization": "bearer secret"}):
        assert client.get("/v1/models", headers=headers).status_code == 200
    for headers in ({"authorization": "Bearer secre"}, {"authorization": "secret"}, {"x-api-key": "ü"}):
        raw = {name.encode(): value.encode() for name, value in headers.items()}
        assert client.get("/v1/models", headers=raw).status_code == 401


@pytest.mark.parametrize("path", ["/v1/models", "/health", "//evil.com/v1/models", "/v1/../v1/models"])
def test_the_path_alone_decides_and_never_the_host(client: TestClient, path: str) -> None:
    """A Host header that would make another URL of the request changes nothing."""
    sent: list[Any] = []

    async def ask() -> None:
        async def receive() -> Any:
            await asyncio.sleep(0)
            return {"type": "http.request", "body": b""}

        async def send(message: Any) -> None:
            sent.append(message)

        headers = [(b"host", b"localhost/health?x=")]
        scope = {"type": "http", "method": "GET", "path": path, "query_string": b"", "headers": headers}
        await client.app(scope, receive, send)  # type: ignore[arg-type]

    asyncio.run(ask())
    assert sent[0]["status"] == 403


@pytest.mark.parametrize("method", ["GET", "POST", "HEAD", "OPTIONS", "DELETE"])
def test_a_foreign_host_or_origin_is_refused_on_every_method(client: TestClient, method: str) -> None:
    for headers in (
        {"host": "evil.com"},
        {"host": "localhost.evil.com"},
        {"host": ""},
        {"origin": "https://evil.com"},
        {"origin": "null"},
        {"origin": "http://localhost.evil.com"},
        {"origin": "http://[::1"},
    ):
        assert client.request(method, "/v1/models", headers={**KEY, **headers}).status_code == 403, headers


def test_near_origins_may_call_and_read(client: TestClient) -> None:
    for origin in ("http://localhost:3000", "http://127.0.0.1:5173", "http://app.localhost"):
        reply = client.get("/v1/models", headers={**KEY, "origin": origin})
        assert reply.status_code == 200 and reply.headers["access-control-allow-origin"] == origin
        asked = client.options(CHAT, headers={"origin": origin, "access-control-request-method": "POST"})
        assert asked.status_code == 204 and "POST" in asked.headers["access-control-allow-methods"]
        assert "access-control-allow-credentials" not in asked.headers
    for host in ("localhost:8080", "127.0.0.1", "[::1]:8080", "192.168.1.5:8080", "a.localhost"):
        assert client.get("/v1/models", headers={**KEY, "host": host}).status_code == 200
    access = Access(names=frozenset({"proxy.example"}), origins=frozenset({"https://app.example"}))
    access.check({"host": "proxy.example", "origin": "https://app.example"}, public=True)


@pytest.mark.parametrize(
    "kind",
    ["text/plain", "application/x-www-form-urlencoded", "", "multipart/form-data", "application/json; charset=latin-1"],
)
def test_a_body_that_is_not_said_to_be_json_is_415(client: TestClient, kind: str) -> None:
    reply = client.post(CHAT, content=b'{"messages": []}', headers={**KEY, "content-type": kind})
    assert reply.status_code == 415 and reply.json()["error"]["param"] == "content-type"
    packed = client.post(
        CHAT, content=b"x", headers={**KEY, "content-type": "application/json", "content-encoding": "gzip"}
    )
    assert packed.status_code == 415


@pytest.mark.parametrize(
    "raw",
    [b"", b" ", b"[]", b"null", b"1", b'"x"', b"{", b'{"a": NaN}', b'{"a": 1e999}', b"\xff\xfe{}", b'{"a": "\xff"}',
     b'{"a":' * 5000 + b"1" + b"}" * 5000, b'{"messages":' + b"[" * 100 + b"]" * 100 + b"}", b'{"a": 1} {"b": 2}'],
)  # fmt: skip
def test_what_is_no_json_object_is_400_and_said(client: TestClient, raw: bytes) -> None:
    reply = client.post(CHAT, content=raw, headers={**KEY, "content-type": "application/json"})
    assert reply.status_code == 400 and reply.json()["error"]["message"].startswith("The body is")


def test_a_body_beyond_the_cap_is_413_also_without_a_length(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bodies, "MAX_BODY_NBYTES", 1000)
    headers = {**KEY, "content-type": "application/json"}
    assert client.post(CHAT, content=b" " * 1001, headers=headers).status_code == 413
    assert client.post(CHAT, content=iter([b" " * 600, b" " * 600]), headers=headers).status_code == 413
    lying = client.post(CHAT, content=b"{}", headers={**headers, "content-length": "9" * 30})
    assert lying.status_code == 413


def test_a_request_brings_no_template_file_or_address(client: TestClient) -> None:
    for field, body in (
        ("chat_template", {"chat_template": "{{ 1 }}"}),
        ("chat_template_kwargs.chat_template", {"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}),
        ("chat_template_kwargs.tokenize", {"chat_template_kwargs": {"tokenize": True}}),
        ("chat_template_kwargs.thinking", {"chat_template_kwargs": {"thinking": {"a": 1}}}),
        ("messages[0].content[0].type", _image("http://169.254.169.254/x")),
        ("messages[0].content[0].type", _image("file:///etc/passwd")),
        ("model", {"model": "/etc/passwd"}),
        ("model", {"model": "hf:owner/repo"}),
        ("guided_json", {"guided_json": {}}),
    ):
        reply = client.post(CHAT, json={**HELLO, **body}, headers=KEY)
        assert reply.status_code in (400, 404) and reply.json()["error"]["param"] == field


def _image(url: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]}


def test_a_full_server_says_when_to_come_back() -> None:
    server = scripted_server(scripted_llm(lambda prompt: "Yes."), max_requests=0)
    with client_of(server) as client:
        reply = client.post(CHAT, json=HELLO)
        assert reply.status_code == 503 and reply.headers["retry-after"] == "1"
        assert client.get("/health").status_code == 200
