"""A server on a real port in a thread, for clients that are programs of their own."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

import pytest
from server_client import Server

pytest.importorskip("uvicorn", reason="the server needs its extra: pip install edgellm[server]")

from edgellm.server import listen


@contextlib.contextmanager
def served(server: Server) -> Iterator[str]:
    """Its address, such as ``http://127.0.0.1:40123``. All is freed at the end, the models too."""
    listener = listen.open_socket("127.0.0.1", 0)
    url, started, stops = listen.url_of(listener), threading.Event(), []

    def ready(stop: Callable[[], None]) -> None:
        stops.append(stop)
        started.set()

    thread = threading.Thread(target=listen.serve, args=(server, listener, ready), daemon=True)
    thread.start()
    try:
        assert started.wait(30)
        yield url
    finally:
        for stop in stops:
            stop()
        thread.join(30)
