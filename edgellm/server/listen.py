"""Listen on a port until a signal: answers under way get some time to end, then all models are freed."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Callable

import uvicorn

from edgellm.formats.errors import EdgeLLMError
from edgellm.server.app import App
from edgellm.server.server import Server

GRACE_S = 10  # for answers under way, once told to stop
IDLE_CONNECTION_S = 75  # longer than clients keep theirs, so that none sends into a closed one

Ready = Callable[[Callable[[], None]], None]


def open_socket(host: str, port: int) -> socket.socket:
    """A listening socket, port 0 takes a free one. EdgeLLMError PORT with what to do where it cannot be had."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, proto)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(2048)
        except BaseException:
            listener.close()
            raise
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            what = f"port {port} of {host} is taken by another program. Take another one: --port {port + 1}"
        elif error.errno in (errno.EACCES, errno.EPERM):
            what = f"port {port} needs more rights. Take one from 1024 on."
        else:
            what = f"{host}, port {port}: {error.strerror or error}. Give an address of this machine."
        raise EdgeLLMError(what, code="PORT") from error
    return listener


def url_of(listener: socket.socket) -> str:
    """Where it can be reached."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _Listener(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, ready: Ready) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._ready(self._stop)

    def _stop(self) -> None:
        self.should_exit = True


def serve(server: Server, listener: socket.socket, ready: Ready, *, preload: bool = False) -> None:
    """Serve until SIGINT or SIGTERM; ``ready`` is called once requests are answered, with a function that stops it all.

    preload   load the first model before that; raises what loading raises
    """
    asyncio.run(_serve(server, listener, ready, preload))


async def _serve(server: Server, listener: socket.socket, ready: Ready, preload: bool) -> None:
    try:
        if preload:
            async with server.models.lease(None, kinds=()):
                pass
        config = uvicorn.Config(
            App(server),
            lifespan="on",
            log_config=None,
            log_level="critical",  # the application says what went wrong
            access_log=False,
            server_header=False,
            proxy_headers=False,
            ws="none",
            timeout_keep_alive=IDLE_CONNECTION_S,
            timeout_graceful_shutdown=GRACE_S,
        )
        await _Listener(config, ready).serve(sockets=[listener])
    finally:
        listener.close()
        await server.models.close()
