"""The server on many machines, by Ray (the extra ``ray``): replicas of models behind one address.

``app`` makes the Ray Serve application, for ``serve.run``, for a file of ``serve deploy`` and for KubeRay; ``edgellm
serve --ray`` runs it. Ray starts processes, restarts them, counts their load and moves parts of answers; what is about
language models is the server's (server/front.py, server/relay.py). Only the command line imports this package.
"""

from __future__ import annotations

import os
from typing import Any

__all__ = ["app"]

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # before Ray, which else tells its makers of each cluster


def app(*models: str, **options: Any) -> Any:
    """The Ray Serve application that serves these models; see ``edgellm.ray.serving.app``."""
    from edgellm.ray.serving import app as made

    return made(*models, **options)
