"""Run the application on a cluster, or on one that is started here, until a signal; then take it down again."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from typing import Any

import ray
from ray import serve
from ray.serve.context import _get_global_client

from edgellm.formats.errors import EdgeLLMError
from edgellm.ray.room import cpus_wanting
from edgellm.ray.serving import app

NAME = "edgellm"
STORE_NBYTES = 200 << 20  # of Ray's object store here: parts of answers are small
LOGGING = {"log_level": "WARNING", "enable_access_log": False}


def run(
    models: tuple[str, ...], host: str, port: int, address: str | None, ready: Callable[[str], None], **options: Any
) -> None:
    """Serve until SIGINT or SIGTERM; ``options`` are those of ``app``.

    address   of a cluster that runs, "auto" for the one of this machine; None starts one of this machine alone, which
              ``edgellm.ray.use_token`` guards
    ready     called with the address of the server once it answers
    """
    is_there = False
    terminated = signal.getsignal(signal.SIGTERM)
    try:
        if address is None:
            # without an address it would be the cluster of RAY_ADDRESS, or one that somebody else started here
            ray.init(address="local", object_store_memory=STORE_NBYTES, include_dashboard=False, log_to_driver=False)
        else:
            ray.init(address=address, log_to_driver=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise EdgeLLMError(f"Ray at {address or 'this machine'}: {error}", code="RAY") from error
    signal.signal(signal.SIGTERM, terminated)  # Ray's own ends the process at once
    try:
        _check_room(len(models), options)
        serve.start(http_options={"host": host, "port": port}, logging_config=LOGGING)
        _check_address(_get_global_client().http_config, host, port)
        is_there = True
        try:
            serve.run(app(*models, **options), name=NAME, logging_config=LOGGING)
        except RuntimeError as error:
            raise EdgeLLMError(f"Ray Serve could not start: {_cause(error)}", code="RAY") from error
        ready(f"http://{host}:{port}")
        while True:
            time.sleep(1)
    finally:
        if address is None:
            serve.shutdown()
        elif is_there:
            serve.delete(NAME)
        ray.shutdown()


def _check_address(config: Any, host: str, port: int) -> None:
    """EdgeLLMError where Serve runs already and listens elsewhere: who may ask was checked for this address."""
    if (config.host, config.port) != (host, port):
        raise EdgeLLMError(
            f"Ray Serve runs there already, at {config.host}:{config.port}, and not at {host}:{port}. Give its address "
            "with --host and --port, and a key where other machines reach it, or end it first.",
            code="RAY",
        )


def _check_room(n_models: int, options: dict[str, Any]) -> None:
    """EdgeLLMError where the least replicas want more CPUs than are free: Ray would wait for them for ever."""
    least = options["replicas"] if isinstance(options["replicas"], int) else options["replicas"][0]
    wanted = n_models * least * (options["options"].n_threads or 1)
    if (found := cpus_wanting(wanted)) is not None:
        raise EdgeLLMError(
            f"{n_models * least} replicas with {options['options'].n_threads or 1} threads want {wanted} CPUs, and "
            f"{found}. Take fewer --replicas or --threads, add machines, or end what has them.",
            code="RAY",
        )


def _cause(error: BaseException) -> str:
    """The last line of what Ray tells of a replica's end, which is the reason."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
