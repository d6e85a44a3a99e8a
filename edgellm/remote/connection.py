"""One request to a server of models: JSON there, JSON or an event stream back, and a name for every failure.

Redirects are not followed and no proxy is asked: the server is the one that the user named, and the key is for it.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import ssl
import threading
from collections.abc import Generator, Iterator
from concurrent.futures import Future
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from edgellm.engine.requests import CancelFlag
from edgellm.formats.errors import (
    ContextFullError,
    EdgeLLMError,
    FormatError,
    ModelNotFoundError,
    ParameterError,
    RemoteError,
)
from edgellm.formats.json_text import parse_json
from edgellm.machine.terminal import one_line

CONNECT_S = 10.0
SILENT_S = 300.0  # a server that reads a long prompt says nothing, or a comment now and then
LOAD_S = 1800.0  # until a model is loaded, from a slow disk too
LOOK_S = 0.05  # between two looks whether the answer is still wanted
MAX_JSON_NBYTES = 16 << 20
MAX_LINE_NBYTES = 4 << 20  # of an event stream
MAX_SAID = 600  # characters of a server's own words in an error


class Address(NamedTuple):
    """Where a server is: the path stands before that of every endpoint, without ``/v1``."""

    secure: bool
    host: str
    port: int
    path: str

    @property
    def authority(self) -> str:
        """``host:port``, the port left out where it is the usual one."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.secure else 80) else f"{host}:{self.port}"

    def __str__(self) -> str:
        return f"{'https' if self.secure else 'http'}://{self.authority}{self.path}"


def parse_address(url: str) -> Address:
    """The address that a user typed: ``http://127.0.0.1:8080``, with or without ``/v1``. ParameterError."""
    text = url.strip()
    if "@" in text:  # first, and anywhere: no other error may repeat what stands before it
        raise ParameterError("--server may not hold a password, nor an @. Give the key by EDGELLM_API_KEY.")
    text = text if "://" in text else f"http://{text}"
    shown = one_line(text.partition("?")[0] + "?..." * ("?" in text))  # a query may hold a key
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError as error:
        raise ParameterError(f"--server {shown!r}: {error}. Write it as http://127.0.0.1:8080.") from None
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ParameterError(f"--server {shown!r} is no address. Write it as http://127.0.0.1:8080.")
    if not text.isascii() or any(letter <= " " for letter in text):
        raise ParameterError(f"--server {shown!r}: an address is ASCII without blanks.")
    path = parts.path.rstrip("/").removesuffix("/v1").rstrip("/")
    secure = parts.scheme == "https"
    return Address(secure, parts.hostname, port or (443 if secure else 80), path)


class Connection:
    """The way to one server. Used from any thread: each request has a connection of its own."""

    def __init__(self, address: Address, key: str | None = None) -> None:
        if key and not (key.isascii() and key.isprintable() and key == key.strip()):
            raise ParameterError("The API key must be letters, digits and signs of ASCII, without blanks around it.")
        self.address, self._key = address, key

    def ask(
        self, method: str, path: str, body: Any = None, silent_s: float = SILENT_S, cancel: CancelFlag | None = None
    ) -> Any:
        """The JSON of a whole reply. EdgeLLMError as ``_refusal`` names it, RemoteError for what is no reply."""
        with self._sent(method, path, body, silent_s, cancel) as response:
            data = response.read(MAX_JSON_NBYTES + 1)
            if cancel is not None and cancel.is_set():
                raise self.lost("it was not waited for")
        if len(data) > MAX_JSON_NBYTES:
            raise self.nonsense(f"more than {MAX_JSON_NBYTES >> 20} MiB")
        return self.parsed(data)

    def events(self, path: str, body: Any, cancel: CancelFlag | None = None) -> Generator[Any, None, None]:
        """The data of a stream of server-sent events, up to ``[DONE]`` or the end. Closing it hangs up."""
        with self._sent("POST", path, body, SILENT_S, cancel) as response:
            if "text/event-stream" not in response.headers.get("Content-Type", ""):
                raise self.nonsense("no event stream")
            while line := response.readline(MAX_LINE_NBYTES + 1):
                if len(line) > MAX_LINE_NBYTES:
                    raise self.nonsense(f"a line of more than {MAX_LINE_NBYTES >> 20} MiB")
                name, _, data = line.partition(b":")
                if name.strip() != b"data":  # an event's name, a comment that keeps the line open
                    continue
                if data.strip() == b"[DONE]":
                    return
                if not line.endswith(b"\n"):
                    raise self.lost("the answer ended in the middle")
                yield self.parsed(data)

    def parsed(self, data: bytes) -> Any:
        """Bytes as JSON; RemoteError for what is none."""
        try:
            return parse_json(data, str(self.address), "REMOTE_REPLY", advice="", mends=True)
        except FormatError as error:
            raise self.nonsense(str(error)) from None

    def nonsense(self, what: str) -> RemoteError:
        """The error for a reply that is not the protocol's."""
        return RemoteError(
            f"{self.address} sent {one_line(what)[:MAX_SAID]}, which is no reply of an OpenAI-compatible server. "
            "Is the address right?",
            code="REMOTE_REPLY",
        )

    def lost(self, error: object) -> RemoteError:
        """The error for a connection that broke."""
        reason = one_line(str(error))[:MAX_SAID] or type(error).__name__
        return RemoteError(
            f"The connection to {self.address} was lost: {reason}. What had come is kept; try again.",
            code="REMOTE_LOST",
        )

    @contextlib.contextmanager
    def _sent(
        self, method: str, path: str, body: Any, silent_s: float, cancel: CancelFlag | None
    ) -> Iterator[http.client.HTTPResponse]:
        """The reply to a request; at the end, or once ``cancel`` is set, the line is cut."""
        connection = self._open() if cancel is None else self._open_unless(cancel)
        sock, over = connection.sock, threading.Event()
        try:
            with _named_failures(self):
                sock.settimeout(silent_s)
                if cancel is not None:
                    watch = threading.Thread(
                        target=_watch, args=(sock, cancel, over), name="edgellm-cancel", daemon=True
                    )
                    watch.start()
                data = None if body is None else json.dumps(body, ensure_ascii=False, allow_nan=False)
                encoded = None if data is None else data.encode("utf-8", "replace")
                connection.request(method, self.address.path + path, encoded, self._headers())
                response = connection.getresponse()
                if response.status != 200:
                    raise self._refusal(response, path)
                yield response
        finally:
            over.set()
            _hang_up(sock)
            connection.close()

    def _open_unless(self, cancel: CancelFlag) -> http.client.HTTPConnection:
        """``_open`` on a thread that is left behind once ``cancel`` is set: nothing breaks off a look for a name."""
        opened: Future[http.client.HTTPConnection] = Future()

        def connect() -> None:
            try:
                opened.set_result(self._open())
            except BaseException as error:
                opened.set_exception(error)

        threading.Thread(target=connect, name="edgellm-connect", daemon=True).start()
        while not cancel.is_set():
            with contextlib.suppress(TimeoutError):
                return opened.result(LOOK_S)
        opened.add_done_callback(_close_unused)
        raise self.lost("it was not waited for")

    def _open(self) -> http.client.HTTPConnection:
        address = self.address
        try:
            if address.secure:
                from edgellm.store.connection import tls_context

                connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                    address.host, address.port, timeout=CONNECT_S, context=tls_context()
                )
            else:
                connection = http.client.HTTPConnection(address.host, address.port, timeout=CONNECT_S)
            connection.connect()
        except ssl.SSLError as error:
            raise RemoteError(
                f"{address}: no secure connection: {error.reason or error}. SSL_CERT_FILE names one to trust.",
                code="REMOTE_TLS",
            ) from None
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise RemoteError(
                f"Nothing answers at {address}: {reason}. Start a server with `edgellm serve`, or give its "
                "address with --server.",
                code="REMOTE_UNREACHABLE",
            ) from None
        return connection

    def _headers(self) -> dict[str, str]:
        key = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        return {"Content-Type": "application/json", "Accept-Encoding": "identity", "User-Agent": "edgellm", **key}

    def _refusal(self, response: http.client.HTTPResponse, path: str) -> EdgeLLMError:
        """The error of a reply that is one."""
        status, data = response.status, response.read(MAX_SAID * 100)
        told: Any = None
        with contextlib.suppress(FormatError):
            told = parse_json(data, "", "REMOTE_REPLY", advice="", mends=True)
        if status in (301, 302, 303, 307, 308):
            where = one_line(response.headers.get("Location", ""))[:200]
            return RemoteError(f"{self.address} has moved to {where}. Give that address.", code="REMOTE_REPLY")
        return error_of(told, status, f"{self.address}{path}")


def error_of(told: Any, status: int, where: str) -> EdgeLLMError:
    """The error that a server's reply tells, with its own words, which are a stranger's."""
    error = told.get("error", told) if isinstance(told, dict) else {}
    fields = error if isinstance(error, dict) else {"message": error}
    said = fields.get("message") or fields.get("detail")
    if said and not isinstance(said, str):  # a list of faults, as FastAPI's
        said = json.dumps(said, ensure_ascii=False)
    words = one_line(said)[:MAX_SAID] if said else f"status {status} without a word"
    kind = f"{fields.get('type')} {fields.get('code')}"
    if status in (401, 403):
        return RemoteError(f"{where} lets nobody in without its key: {words}", code="REMOTE_KEY")
    if "exceed_context" in kind or "context_length" in kind:
        counts = {name: value for name in ("n_prompt_tokens", "n_ctx") if isinstance(value := fields.get(name), int)}
        return ContextFullError(words, n_tokens=counts.get("n_prompt_tokens", 0), n_ctx=counts.get("n_ctx", 0))
    if status == 404 and "model" in kind:
        return ModelNotFoundError(words)
    if status in (404, 405, 501):
        return RemoteError(f"{where}: {words}", code="REMOTE_MISSING")
    if status in (429, 503, 529):
        return RemoteError(f"{where} is busy: {words}", code="REMOTE_BUSY")
    if 400 <= status < 500:
        return ParameterError(words)
    return RemoteError(f"{where} failed: {words}", code="REMOTE_FAILED")


@contextlib.contextmanager
def _named_failures(connection: Connection) -> Iterator[None]:
    try:
        yield
    except EdgeLLMError:
        raise
    except TimeoutError:
        raise connection.lost("it has said nothing for too long") from None
    except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: a chunk size that is none
        raise connection.lost(error) from None


def _close_unused(opened: Future[http.client.HTTPConnection]) -> None:
    if opened.exception() is None:
        opened.result().close()


def _watch(sock: socket.socket, cancel: CancelFlag, over: threading.Event) -> None:
    """Cut the line when the answer is not wanted any more: a thread that waits for a byte does not look."""
    while not over.wait(LOOK_S):
        if cancel.is_set():
            _hang_up(sock)
            return


def _hang_up(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
