"""What ``serve`` and ``batch`` share: which models, how they are loaded, and what they may take."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgellm.arguments import MAX_TOKENS_PER_STEP
from edgellm.cli.adapter_options import adapter_options, adapter_values
from edgellm.cli.generation_options import template_source
from edgellm.cli.options import (
    Number,
    WholeNumber,
    cache_type_options,
    cache_type_values,
    device_options,
    device_values,
    draft_option,
    option_group,
    override_option,
)
from edgellm.cli.progress import ProgressBar
from edgellm.engine.speculation import SPECULATIONS
from edgellm.formats.errors import UnsupportedError
from edgellm.machine.terminal import echo

if TYPE_CHECKING:
    from edgellm.loading import LoadOptions
    from edgellm.server.models import ModelEntry, Models

model_options = option_group(
    click.option("-c", "--ctx-size", "--n-ctx", "n_ctx", type=WholeNumber(0), default=None, metavar="N",
                 help="Tokens of context of each model; 0 takes all that it was trained for."),
    click.option("-np", "--parallel", "n_parallel", type=WholeNumber(1, 4096), default=4, show_default=True,
                 metavar="N", help="Whole contexts kept at once; more requests may run."),
    click.option("-b", "--batch-size", "max_tokens_per_step", type=WholeNumber(1, MAX_TOKENS_PER_STEP), default=512,
                 show_default=True, metavar="N",
                 help="Prompt tokens of a step; fewer let others in, and what a client left be freed, sooner."),
    click.option("-t", "--threads", "n_threads", type=WholeNumber(1), default=None, metavar="N",
                 help="Threads.  [default: physical cores; with --ray 1]"),
    click.option("--memory", "memory_gib", type=Number(0, min_open=True), default=None, metavar="GIB",
                 help="Memory of all models.  [default: what is free at the start]"),
    click.option("--cache-dir", type=click.Path(), default=None, metavar="DIR",
                 help="Keep what was read in this folder, for the next start too; this user alone can read it."),
    click.option("--cache-size", "cache_gib", type=Number(0, 1 << 20, min_open=True), default=8,
                 show_default=True, metavar="GIB", help="What that folder may hold; the oldest are dropped."),
    click.option("--chat-template", "chat_template", metavar="NAME|JINJA|FILE", help="Instead of the models' own."),
    click.option("--chat-template-file", "template_file", type=click.Path(), help="File with a chat template."),
    draft_option,
    click.option("--speculate", type=click.Choice(SPECULATIONS), default=None,
                 help="Speculative decoding: the same answers, sooner where they repeat the prompt or themselves."),
    override_option,
    device_options,
    adapter_options,
    cache_type_options,
    click.option("--force", is_flag=True, help="Load even when the free memory looks too small."),
)  # fmt: skip


def needs_extra(command: str, error: ImportError, extra: str = "server") -> UnsupportedError:
    """What a command says that lacks a package."""
    return UnsupportedError(
        f"{command} needs {error.name}, which is not installed. It comes with: pip install 'edgellm[{extra}]'",
        code="EXTRA_MISSING",
    )


OF_ONE_SERVER = (("aliases", "--alias"), ("memory_gib", "--memory"), ("cache_dir", "--cache-dir"),
                 ("keep_alive", "--keep-alive"))  # fmt: skip


def begin_ray(models: Sequence[str], values: dict[str, Any]) -> None:
    """What goes before Ray is imported. UsageError for what several processes cannot share, and for models unsaid."""
    if not models:
        raise click.UsageError("--ray needs the models by name: each of its processes has them.")
    source = click.get_current_context().get_parameter_source
    for name, flag in OF_ONE_SERVER:
        if source(name) not in (None, click.core.ParameterSource.DEFAULT):
            raise click.UsageError(f"{flag} is of one server and does not go with --ray.")
    if values["ray_address"] is None:
        from edgellm.ray import use_token

        use_token()


def load_options(values: dict[str, Any], n_models: int) -> LoadOptions:
    """How models are loaded, as ``model_options`` say; the folder of the cache is made private.

    n_models   that the command names; UsageError for adapters of none or several
    """
    from edgellm.loading import LoadOptions
    from edgellm.memory import GIB

    options = LoadOptions(
        n_ctx=values["n_ctx"],
        n_threads=values["n_threads"],
        **device_values(values),
        **_adapters(values, n_models),
        **cache_type_values(values),
        chat_template=template_source(values),
        kv_overrides=values["overrides"] or None,
        max_tokens_per_step=values["max_tokens_per_step"],
        force=values["force"],
        n_parallel=values["n_parallel"],
        speculate=values["speculate"],
        draft=values["draft"],
        cache_dir=values["cache_dir"],
        cache_nbytes=max(1, int(values["cache_gib"] * GIB)),
    )
    if options.cache_dir is not None:
        from edgellm.engine.prefix_files import private_folder

        private_folder(Path(options.cache_dir))
    return options


def _adapters(values: dict[str, Any], n_models: int) -> dict[str, Any]:
    """The adapters of the only model; with --lora-init-without-apply at rest."""
    found = adapter_values(values)
    if found and n_models != 1:
        raise click.UsageError("--lora and --control-vector are for one model: name it, and no other.")
    if values.get("idle") and "lora" in found:
        found["lora"] = tuple(choice._replace(idle=True) for choice in found["lora"])
    return found


def models_of(
    names: Sequence[str],
    values: dict[str, Any],
    progress: ProgressBar,
    aliases: Sequence[str] = (),
    keep_alive: float | None = None,
    interactive: bool = True,
) -> Models:
    """The models of a server: those of these names, else all that are here."""
    from edgellm.cli.models import fetched
    from edgellm.loading import prove_drafts
    from edgellm.memory import GIB
    from edgellm.server.models import Models, named

    draft = None if values["draft"] is None else fetched(values["draft"], progress)
    options = load_options(values | {"draft": draft}, len(names))
    entries: list[ModelEntry] | None = None
    if names:
        entries = named(names, lambda name: fetched(name, progress), aliases)
    prove_drafts([entry.path for entry in entries or ()], options)
    return Models(
        entries,
        options,
        keep_alive=keep_alive,
        budget=None if values["memory_gib"] is None else int(values["memory_gib"] * GIB),
        progress=progress.update,
        tell=partial(echo, err=True),
        interactive=interactive,
    )
