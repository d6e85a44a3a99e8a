"""The application of plain settings: what a Serve config file has under ``args``, and the key from the environment.

import_path: edgellm.ray:build
args:
  models: [smollm2]
  replicas: [1, 4]
  threads: 4
  context: 8192
"""

from __future__ import annotations

import os
from dataclasses import fields
from typing import Any

from edgellm import loading
from edgellm.formats.errors import ParameterError
from edgellm.ray.serving import Serving, app
from edgellm.server.security import Access

LOADING = {"context": "n_ctx", "threads": "n_threads", "parallel": "n_parallel", "batch_size": "max_tokens_per_step"}
"""Settings of how a replica loads its model, and what ``LoadOptions`` calls them."""

SERVING = frozenset(one.name for one in fields(Serving)) - {"access"}
PAIRS = ("replicas", "rate_limit")  # lists in a file


def build(args: dict[str, Any]) -> Any:
    """The Ray Serve application.

    models          names, references, or paths that every machine has
    allowed_hosts   names of this server in the Host header; the key is the environment's EDGELLM_API_KEY
    others          those of ``LOADING``, and the fields of ``Serving``; pairs are lists

    ParameterError for a name that is none of them.
    """
    known = {"models", "allowed_hosts", *LOADING, *SERVING}
    if unknown := sorted(set(args) - known):
        raise ParameterError(f"args: {unknown[0]!r} is no setting. There are: {', '.join(sorted(known))}.")
    models = args.get("models", ())
    if not isinstance(models, list | tuple) or not all(isinstance(one, str) for one in models):
        raise ParameterError(f"args: models is {models!r}. It must be a list of names.")
    serving = {name: value for name, value in args.items() if name in SERVING}
    serving |= {name: tuple(serving[name]) for name in PAIRS if isinstance(serving.get(name), list)}
    key = os.environ.get("EDGELLM_API_KEY")
    if not key:
        raise ParameterError("EDGELLM_API_KEY is not set. It must have the key that clients send.")
    access = Access("0.0.0.0", (key,), frozenset(args.get("allowed_hosts", ())))
    how = {ours: args[name] for name, ours in LOADING.items() if name in args}
    return app(*models, options=loading.LoadOptions(**{"n_parallel": 4, **how}), access=access, **serving)
