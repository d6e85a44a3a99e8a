"""A server on a real port in a thread, for clients that are programs of their own."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator

import pytest
from server_client import Server

from edgellm.server.app import App

uvicorn = pytest.importorskip("uvicorn", reason="the server needs its extra: pip install edgellm[server]")


@contextlib.contextmanager
def served(server: Server) -> Iterator[str]:
    """Its address, such as ``http://127.0.0.1:40123``."""
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(App(server), log_level="error", lifespan="on", timeout_graceful_shutdown=2)
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        running.should_exit = True
        thread.join(20)
        listener.close()
