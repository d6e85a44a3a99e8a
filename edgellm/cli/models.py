"""From what the user typed to a model: the file behind a name, and a loaded model with progress on the way."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgellm.cli.generation_options import template_source
from edgellm.cli.progress import Progress
from edgellm.formats.errors import ModelNotFoundError
from edgellm.machine.paths import look_at, typed_path

if TYPE_CHECKING:
    from edgellm.formats.gguf import GGUFFile
    from edgellm.llm import LLM


def find_file(name: str) -> Path:
    """The file of a path or of a model that is here; never the network. ModelNotFoundError tells how to get it."""
    from edgellm.store.catalogue import catalogue, find

    path = find(name)
    if path is None and name in catalogue():
        raise ModelNotFoundError(f"{name}: not here yet. `edgellm pull {name}` brings it.")
    if path is None and look_at(typed_path(name)) is not None:
        return typed_path(name)  # a folder or a device: the reader says what is wrong with it
    if path is None:
        raise ModelNotFoundError(f"{name}: no such file, and no model of that name is here. See `edgellm list`.")
    return path


def open_file(name: str) -> GGUFFile:
    """The opened file of a path or of a model that is here."""
    from edgellm.formats.gguf import GGUFFile

    return GGUFFile.open(find_file(name))


def resolve(name: str, progress: Progress) -> Path:
    """The file of a path or a name; a model of the catalogue that is not here is pulled under a progress bar."""
    from edgellm.store.catalogue import resolve

    path = resolve(name, lambda done, total: progress.update("pull", done, total, name))
    progress.finish()
    return path


def load_options(values: dict[str, Any]) -> dict[str, Any]:
    """What ``edgellm.load`` is given besides the name; ``values`` are those of ``generation_options``."""
    return {
        "n_ctx": values["n_ctx"],
        "n_threads": values["n_threads"],
        "chat_template": template_source(values),
        "kv_overrides": values["overrides"] or None,
        "force": values["force"],
    }


def load_model(model: str, values: dict[str, Any], needs_template: bool) -> LLM:
    """The loaded model behind a name, ready to answer; ``values`` are those of ``generation_options``."""
    with Progress() as progress:
        progress.update("load", 0, None, model)  # importing the library takes part in it
        import edgellm

        llm = edgellm.load(model, progress=progress.update, **load_options(values))
        if needs_template:
            try:
                _ = llm.chat_template
            except BaseException:
                llm.close()
                raise
    return llm
