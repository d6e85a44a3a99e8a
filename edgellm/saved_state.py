"""What a model has read of a prompt, kept in a file for another program: the face of ``engine/cache_file.py``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgellm import arguments
from edgellm.engine.cache_file import model_key, read, restore, save
from edgellm.formats.errors import EdgeLLMError, ParameterError

if TYPE_CHECKING:
    from edgellm.loading import Model


def save_state(model: Model, path: str | Path, tokens: Sequence[int], variant: str = "") -> int:
    """See ``LLM.save_state``; ``variant`` as in ``KVCache.open``."""
    target, ids = arguments.path("path", path, new=True), arguments.token_ids("tokens", tokens)
    key = model_key(model.gguf, model.engine.executor, variant)
    with _named_failures(target):
        n_saved = model.engine.call(lambda cache, executor: save(target, cache, ids, key, variant))
    if not n_saved:
        raise ParameterError(
            f"None of these {len(ids)} tokens is in the cache, so there is nothing to save. Let the model read "
            "them first: generate(tokens, max_tokens=0).",
            code="KV_EMPTY",
        )
    return n_saved


def load_state(model: Model, path: str | Path, variant: str = "") -> list[int]:
    """See ``LLM.load_state``."""
    source = arguments.path("path", path)
    with _named_failures(source):
        state = read(source, model_key(model.gguf, model.engine.executor, variant))
    if model.engine.scheduler.disk is not None:
        model.engine.scheduler.disk.writes = False  # what is computed on top of it is not this executor's alone
    return model.engine.call(lambda cache, executor: restore(cache, state, variant))


@contextlib.contextmanager
def _named_failures(path: Path) -> Iterator[None]:
    """What the system says of a file, as an error of ours."""
    try:
        yield
    except OSError as error:
        raise EdgeLLMError(
            f"{path}: {error.strerror or error}. Check the path, its rights, and the room on the disk.", code="KV_FILE"
        ) from error
