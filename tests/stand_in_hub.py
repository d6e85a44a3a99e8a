"""A web server on this machine that plays a file host, a Hugging Face hub and a package index, honestly or not.

Each path has its bytes and a list of faults, one used up by each request; after them the server is honest: ranges,
ETag, If-Range. All requests are kept, with their headers.
"""

from __future__ import annotations

import hashlib
import json
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Resource:
    """What lies under a path."""

    body: bytes
    etag: str | None
    kind: str = "application/octet-stream"
    faults: list[Fault] = field(default_factory=list)


class Handler(BaseHTTPRequestHandler):
    """Answers one request; the faults below use its methods too."""

    protocol_version = "HTTP/1.1"
    server: StandIn

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.server.requests.append((self.path, dict(self.headers)))
        resource = self.server.resources.get(self.path.split("?")[0])
        if resource is None:
            self.status(404)
        elif resource.faults:
            resource.faults.pop(0)(self, resource)
        else:
            self.honest(resource)

    def honest(self, resource: Resource) -> None:
        """What a good server does."""
        start = self.wanted_start(resource)
        if start >= len(resource.body) > 0:
            self.begin(416, {"Content-Range": f"bytes */{len(resource.body)}", "Content-Length": "0"}, resource)
            return
        body = resource.body[start:]
        headers = {"Content-Length": str(len(body))}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(resource.body) - 1}/{len(resource.body)}"
        self.begin(206 if start else 200, headers, resource)
        self.wfile.write(body)

    def wanted_start(self, resource: Resource) -> int:
        if self.headers.get("If-Range", resource.etag) != resource.etag:
            return 0
        return int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))

    def begin(self, status: int, headers: dict[str, str], resource: Resource | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if resource is not None:
            self.send_header("Content-Type", resource.kind)
            if resource.etag:
                self.send_header("ETag", resource.etag)
        self.end_headers()

    def status(self, status: int, **headers: str) -> None:
        self.begin(status, {"Content-Length": "0", **headers})

    def hang_up(self) -> None:
        """Cut the connection without a goodbye."""
        self.wfile.flush()
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()


Fault = Callable[[Handler, Resource], None]


class StandIn(ThreadingHTTPServer):
    """The server; ``url`` is its address."""

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.resources: dict[str, Resource] = {}
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.leaving = threading.Event()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are part of the play."""

    def serve(self, path: str, body: bytes, *faults: Fault, etag: str | None = "", kind: str = "") -> str:
        """Put ``body`` under ``path`` and give its URL. The ETag is made of the bytes unless given; None for none."""
        tag = f'"{hashlib.md5(body).hexdigest()}"' if etag == "" else etag
        self.resources[path] = Resource(body, tag, kind or "application/octet-stream", list(faults))
        return self.url + path

    def serve_repository(self, repo: str, files: dict[str, bytes], *, lfs: bool = True) -> None:
        """Play a hub's repository: the list of files with their checksums, and the files at commit ``c0ffee``."""
        siblings = []
        for name, body in files.items():
            self.serve(f"/{repo}/resolve/c0ffee/{name}", body)
            sha256 = hashlib.sha256(body).hexdigest()
            entry: dict[str, Any] = {"rfilename": name, "size": len(body)}
            if lfs:
                entry["lfs"] = {"sha256": sha256, "size": len(body), "pointerSize": 135}
            siblings.append(entry)
        answer = json.dumps({"id": repo, "modelId": repo, "sha": "c0ffee", "siblings": siblings}).encode()
        self.serve(f"/api/models/{repo}", answer, kind="application/json")

    def serve_index(self, project: str, *wheels: tuple[str, bytes], hashes: bool = True) -> str:
        """Play a package index that holds the wheels of one project; gives the index's URL."""
        links = []
        for name, body in wheels:
            url = self.serve(f"/files/{name}", body, etag=None)
            fragment = f"#sha256={hashlib.sha256(body).hexdigest()}" if hashes else ""
            links.append(f'<a href="{url}{fragment}">{name}</a><br/>')
        page = "<!DOCTYPE html><html><body>" + "\n".join(links) + "</body></html>"
        self.serve(f"/simple/{project}/", page.encode(), kind="text/html")
        return f"{self.url}/simple"

    def asked(self, path: str) -> list[dict[str, str]]:
        """The headers of all requests for a path."""
        return [headers for where, headers in self.requests if where == path]


@contextmanager
def stand_in() -> Iterator[StandIn]:
    """A running server, gone afterwards."""
    server = StandIn()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.leaving.set()
        server.shutdown()
        server.server_close()
        thread.join()


# --- faults: what a bad server does to one request -----------------------------------------------------------


def cut_after(nbytes: int) -> Fault:
    """Promise all of the file and hang up after ``nbytes`` of it."""

    def fault(handler: Handler, resource: Resource) -> None:
        start = handler.wanted_start(resource)
        headers = {"Content-Length": str(len(resource.body) - start)}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(resource.body) - 1}/{len(resource.body)}"
        handler.begin(206 if start else 200, headers, resource)
        handler.wfile.write(resource.body[start : start + nbytes])
        handler.wfile.flush()
        handler.close_connection = True

    return fault


def reset_after(nbytes: int) -> Fault:
    """The same, with a reset of the connection."""

    def fault(handler: Handler, resource: Resource) -> None:
        cut_after(nbytes)(handler, resource)
        handler.hang_up()

    return fault


def stall_after(nbytes: int) -> Fault:
    """Send ``nbytes`` and then nothing, for as long as the server lives."""

    def fault(handler: Handler, resource: Resource) -> None:
        cut_after(nbytes)(handler, resource)
        handler.server.leaving.wait(60)

    return fault


def drip(nbytes: int, pause_s: float) -> Fault:
    """Send the file slowly, ``nbytes`` at a time."""

    def fault(handler: Handler, resource: Resource) -> None:
        start = handler.wanted_start(resource)
        cut_after(0)(handler, resource)
        for at in range(start, len(resource.body), nbytes):
            handler.wfile.write(resource.body[at : at + nbytes])
            handler.wfile.flush()
            handler.server.leaving.wait(pause_s)

    return fault


def answer(status: int, **headers: str) -> Fault:
    """Answer with a status and no body."""
    return lambda handler, resource: handler.status(status, **{k.replace("_", "-"): v for k, v in headers.items()})


def redirect(target: str, status: int = 302) -> Fault:
    """Send the client elsewhere."""
    return answer(status, Location=target)


def other_body(body: bytes, kind: str = "application/octet-stream") -> Fault:
    """Answer 200 with other bytes, whatever range was asked for."""

    def fault(handler: Handler, resource: Resource) -> None:
        handler.begin(200, {"Content-Length": str(len(body)), "Content-Type": kind})
        handler.wfile.write(body)

    return fault


def web_page(handler: Handler, resource: Resource) -> None:
    """A page where the file should be."""
    other_body(b"<!DOCTYPE html><html><body>Please log in.</body></html>", "text/html; charset=utf-8")(
        handler, resource
    )


def chunked(extra: bytes = b"", *, finish: bool = True) -> Fault:
    """The file without a length, with bytes too many, or without the last chunk."""

    def fault(handler: Handler, resource: Resource) -> None:
        handler.begin(200, {"Transfer-Encoding": "chunked"}, resource)
        for piece in (resource.body, extra):
            if piece:
                handler.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
        if finish:
            handler.wfile.write(b"0\r\n\r\n")
        handler.close_connection = True

    return fault


def wrong_range(shift: int) -> Fault:
    """A 206 that begins somewhere else than asked for."""

    def fault(handler: Handler, resource: Resource) -> None:
        start, total = handler.wanted_start(resource) + shift, len(resource.body)
        body = resource.body[start:]
        headers = {"Content-Length": str(len(body)), "Content-Range": f"bytes {start}-{total - 1}/{total}"}
        handler.begin(206, headers, resource)
        handler.wfile.write(body)

    return fault


def ranges_of_another_file(body: bytes) -> Fault:
    """A 206 of a newer version of the file, deaf to If-Range."""

    def fault(handler: Handler, resource: Resource) -> None:
        start = int(handler.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
        resource.body, resource.etag = body, '"newer"'
        headers = {"Content-Length": str(len(body) - start)}
        headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        handler.begin(206, headers, resource)
        handler.wfile.write(body[start:])

    return fault


def replaced_by(body: bytes) -> Fault:
    """Put a newer version of the file there, then answer honestly."""

    def fault(handler: Handler, resource: Resource) -> None:
        resource.body, resource.etag = body, '"newer"'
        handler.honest(resource)

    return fault
