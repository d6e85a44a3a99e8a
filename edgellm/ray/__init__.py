"""The server on many machines, by Ray (the extra ``ray``): replicas of models behind one address.

``app`` makes the Ray Serve application, for ``serve.run`` and ``edgellm serve --ray``; ``build`` makes it of plain
settings, for the files of ``serve deploy`` and of KubeRay. Ray starts processes, restarts them, counts their load and
moves parts of answers; what is about language models is the server's (server/front.py, server/relay.py).
``edgellm.ray.pipeline`` has a model whose layers stand on several machines. Only the command line imports this package.
"""

from __future__ import annotations

import os
import secrets
from typing import Any

__all__ = ["app", "build", "use_token"]

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # before Ray, which else tells its makers of each cluster


def use_token() -> None:
    """Guard the cluster that this process will start: its ports are open to other machines, to run code. Before Ray."""
    os.environ.update({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)})


def app(*models: str, **options: Any) -> Any:
    """The Ray Serve application that serves these models; see ``edgellm.ray.serving.app``."""
    from edgellm.ray.serving import app as made

    return made(*models, **options)


def build(args: dict[str, Any]) -> Any:
    """The same of the ``args`` of a Serve config file, which names ``edgellm.ray:build``; see config.py."""
    from edgellm.ray.config import build as built

    return built(args)
