"""A cluster for the time of a command: one that runs already, or one of this machine that ends with it."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import ray

from edgellm import loading
from edgellm.formats.errors import EdgeLLMError, ParameterError
from edgellm.machine.paths import typed_file

STORE_NBYTES = 200 << 20  # of Ray's object store here: parts of answers are small


@contextmanager
def connected(address: str | None) -> Iterator[None]:
    """Connect to the cluster at an address, "auto" for the one of this machine.

    None starts one of this machine alone, which ``edgellm.ray.use_token`` guards, and ends it.
    """
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
        yield
    finally:
        ray.shutdown()


def from_anywhere(models: Sequence[str], options: loading.LoadOptions) -> tuple[tuple[str, ...], loading.LoadOptions]:
    """The same by whole paths, where they name files that are here: processes of a cluster stand in other folders."""
    return tuple(str(_whole(one)) for one in models), replace(
        options,
        draft=None if options.draft is None else _whole(options.draft),
        lora=tuple(one._replace(path=Path(_whole(one.path))) for one in options.lora),
        control_vectors=tuple(one._replace(path=Path(_whole(one.path))) for one in options.control_vectors),
    )


def _whole(name: str | Path) -> str | Path:
    with suppress(ParameterError):  # what cannot be a path is a name
        if (path := typed_file(name)) is not None:
            return path.absolute()
    return name
