"""A server that says what a test wants, byte for byte, and remembers what it was asked."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Say = Callable[[bytes], None]
MODELS = {"data": [{"id": "m"}]}


class StandIn:
    """``replies`` has for a path (status, body): JSON, or a function that writes an event stream piece by piece."""

    def __init__(self) -> None:
        self.replies: dict[str, tuple[int, Any]] = {"/v1/models": (200, MODELS)}
        self.asked: list[tuple[str, Any, str | None]] = []  # path, body, authorization
        self.left = threading.Event()  # a client hung up while it was talked to
        self.url = ""

    def streams(self, *events: Any) -> None:
        """A chat that answers with these events, then closes the line; bytes go as they are."""

        def write(say: Say) -> None:
            for event in events:
                say(event if isinstance(event, bytes) else b"data: " + json.dumps(event).encode() + b"\n\n")

        self.replies["/v1/chat/completions"] = (200, write)


@contextlib.contextmanager
def stand_in() -> Iterator[StandIn]:
    """One on a port of its own."""
    told = StandIn()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *arguments: Any) -> None:
            pass

        def do_GET(self) -> None:
            self.answer(None)

        def do_POST(self) -> None:
            self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def answer(self, body: Any) -> None:
            path = self.path.partition("?")[0]
            told.asked.append((path, body, self.headers.get("Authorization")))
            status, reply = told.replies.get(path, (404, {"error": {"message": "no such place"}}))
            if callable(reply):
                self.send_response(status)
                self.send_header("Content-Type", "text/event-stream")
                self.end_headers()
                try:
                    reply(self.say)
                except OSError:
                    told.left.set()
                return
            data = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def say(self, data: bytes) -> None:
            self.wfile.write(data)
            self.wfile.flush()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    told.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield told
    finally:
        server.shutdown()
        server.server_close()


def delta(text: str = "", reason: str | None = None, **more: Any) -> dict[str, Any]:
    """An event of a chat."""
    content = {"content": text} if text else {}
    return {"choices": [{"index": 0, "delta": {**content, **more}, "finish_reason": reason}]}
