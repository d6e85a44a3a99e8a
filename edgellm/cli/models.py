"""From what the user typed to a model: the file behind a name, and a loaded model with progress on the way."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgellm.cli.adapter_options import adapter_values
from edgellm.cli.generation_options import template_source
from edgellm.cli.options import cache_type_values, device_values
from edgellm.cli.progress import ProgressBar

if TYPE_CHECKING:
    from edgellm.formats.gguf import GGUFFile
    from edgellm.llm import LLM


def open_file(name: str) -> GGUFFile:
    """The opened file of a path or of a model that is here."""
    from edgellm.formats.gguf import GGUFFile
    from edgellm.store.catalogue import installed

    return GGUFFile.open(installed(name))


def fetched(name: str, progress: ProgressBar) -> Path:
    """The file of a path or a name; a model of the catalogue that is not here is pulled under a progress bar."""
    from edgellm.store import catalogue

    path = catalogue.fetched(name, progress.of("pull", name))
    progress.finish()
    return path


def load_options(values: dict[str, Any]) -> dict[str, Any]:
    """What ``edgellm.load`` is given besides the name; ``values`` are those of ``generation_options``."""
    return {
        "n_ctx": values["n_ctx"],
        "n_threads": values["n_threads"],
        **device_values(values),
        **adapter_values(values),
        **cache_type_values(values),
        "chat_template": template_source(values),
        "kv_overrides": values["overrides"] or None,
        "speculate": values["speculate"],
        "draft": values["draft"],
        "force": values["force"],
    }


def load_model(model: str, values: dict[str, Any], needs_template: bool) -> LLM:
    """The loaded model behind a name, ready to answer; ``values`` are those of ``generation_options``."""
    with ProgressBar() as progress:
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
