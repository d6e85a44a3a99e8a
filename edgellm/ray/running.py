"""Run the application on a cluster, or on one that is started here, until a signal; then take it down again."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from ray import serve
from ray.serve.context import _get_global_client

from edgellm.formats.errors import EdgeLLMError
from edgellm.loading import LoadOptions
from edgellm.ray.cluster import connected, from_anywhere
from edgellm.ray.room import cpus_wanting
from edgellm.ray.same_file import proved
from edgellm.ray.serving import app
from edgellm.server.listen import GRACE_S
from edgellm.server.models import named
from edgellm.store import catalogue

NAME = "edgellm"
LOOK_S = 0.2
LOGGING = {"log_level": "WARNING", "enable_access_log": False}


def run(
    models: tuple[str, ...], host: str, port: int, address: str | None, ready: Callable[[str], None], **options: Any
) -> None:
    """Serve until SIGINT or SIGTERM; ``options`` are those of ``app``.

    address   of a cluster that runs, "auto" for the one of this machine; None starts one of this machine alone, which
              ``edgellm.ray.use_token`` guards
    ready     called with the address of the server once it answers
    """
    models, how = from_anywhere(models, options.pop("options", LoadOptions(n_parallel=4)))
    if address is None:  # these are all files that there will be: what is wrong with them shows before anything starts
        for entry in named(models, catalogue.fetched):
            proved(entry.path, how)
    with connected(address):
        before = _deployed()
        if before is None:  # else those that it replaces have them
            _check_room(len(models), options.get("replicas", 1), how.n_threads or 1)
        serve.start(http_options={"host": host, "port": port}, logging_config=LOGGING)
        _check_address(_get_global_client().http_config, host, port)
        mine: float | None = None
        try:
            try:
                serve.run(app(*models, options=how, **options), name=NAME, logging_config=LOGGING)
            except RuntimeError as error:
                raise EdgeLLMError(f"Ray Serve could not start: {_cause(error)}", code="RAY") from error
            mine = _deployed()
            ready(f"http://{host}:{port}")
            while True:
                time.sleep(1)
        finally:
            # what an update has replaced is the update's, and what a failed one was to replace stays
            if before is None if mine is None else mine == _deployed():
                _end()


def _deployed() -> float | None:
    """When the application was deployed that is there now."""
    found = serve.status().applications.get(NAME)
    return None if found is None else found.last_deployed_time_s


def _end() -> None:
    """Let no more requests in, and wait for answers under way as long as a server alone does; Ray ends the rest."""
    serve.delete(NAME, _blocking=False)
    until = time.monotonic() + GRACE_S
    while NAME in serve.status().applications and time.monotonic() < until:
        time.sleep(LOOK_S)


def _check_address(config: Any, host: str, port: int) -> None:
    """EdgeLLMError where Serve runs already and listens elsewhere: who may ask was checked for this address."""
    if (config.host, config.port) != (host, port):
        raise EdgeLLMError(
            f"Ray Serve runs there already, at {config.host}:{config.port}, and not at {host}:{port}. Give its address "
            "with --host and --port, and a key where other machines reach it, or end it first.",
            code="RAY",
        )


def _check_room(n_models: int, replicas: int | tuple[int, int], n_threads: int) -> None:
    """EdgeLLMError where the least replicas want more CPUs than are free: Ray would wait for them for ever."""
    n = n_models * (replicas if isinstance(replicas, int) else replicas[0])
    if (found := cpus_wanting(n * n_threads)) is not None:
        raise EdgeLLMError(
            f"{n} replicas with {n_threads} threads want {n * n_threads} CPUs, and {found}. Take fewer --replicas or "
            "--threads, add machines, or end what has them.",
            code="RAY",
        )


def _cause(error: BaseException) -> str:
    """The last line of what Ray tells of a replica's end, which is the reason."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
