"""``edgellm serve``: models over HTTP, for programs that speak OpenAI's, llama-server's and other protocols."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgellm.arguments import MAX_TOKENS_PER_STEP
from edgellm.cli.generation_options import template_source
from edgellm.cli.options import device_options, device_values, option_group, override_option
from edgellm.cli.progress import ProgressBar
from edgellm.engine.speculation import DRAFTERS
from edgellm.formats.errors import UnsupportedError
from edgellm.machine.terminal import echo

if TYPE_CHECKING:
    from edgellm.server.models import ModelEntry
    from edgellm.server.server import Server

_UNITS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


class Duration(click.ParamType):
    """Seconds, or 90s, 5m, 1h; -1 is for ever."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        found = re.fullmatch(r"(-?\d{1,9}(?:\.\d{1,3})?)(ms|s|m|h)?", str(value), re.ASCII)
        if found is None:
            self.fail(f"{value!r} is no duration; write 300, 90s, 5m, 1h, or -1 for ever.", param, ctx)
        return float(found[1]) * _UNITS[found[2] or "s"]


# 8080 is llama-server's, which its clients try first
serve_options = option_group(
    click.option("--host", default="127.0.0.1", show_default=True, help="Address; any but loopback needs --api-key."),
    click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True,
                 help="Port; 0 takes a free one. Clients of Ollama look at 11434."),
    click.option("--api-key", "keys", multiple=True, envvar="EDGELLM_API_KEY", metavar="KEY",
                 help="What clients must send; may be given more than once."),
    click.option("-a", "--alias", "aliases", multiple=True, metavar="NAME", help="A further name of the first model."),
    click.option("-c", "--ctx-size", "--n-ctx", "n_ctx", type=click.IntRange(0), default=None, metavar="N",
                 help="Tokens of context of each model; 0 takes all that it was trained for."),
    click.option("-np", "--parallel", "n_parallel", type=click.IntRange(1, 4096), default=4, show_default=True,
                 metavar="N", help="Whole contexts kept at once; more requests may run."),
    click.option("-b", "--batch-size", "max_tokens_per_step", type=click.IntRange(1, MAX_TOKENS_PER_STEP), default=512,
                 show_default=True, metavar="N",
                 help="Prompt tokens of a step; fewer let others in, and what a client left be freed, sooner."),
    click.option("-t", "--threads", "n_threads", type=click.IntRange(1), default=None, metavar="N",
                 help="Threads.  [default: physical cores]"),
    click.option("--keep-alive", type=Duration(), default=-1, metavar="TIME",
                 help="How long an idle model stays: 300, 5m, 1h; -1 until another needs its memory.  [default: -1]"),
    click.option("--memory", "memory_gib", type=click.FloatRange(0, min_open=True), default=None, metavar="GIB",
                 help="Memory of all models.  [default: what is free at the start]"),
    click.option("--cache-dir", type=click.Path(), default=None, metavar="DIR",
                 help="Keep what was read in this folder, for the next start too; this user alone can read it."),
    click.option("--cache-size", "cache_gib", type=click.FloatRange(0, 1 << 20, min_open=True), default=8,
                 show_default=True, metavar="GIB", help="What that folder may hold; the oldest are dropped."),
    click.option("--max-requests", type=click.IntRange(1, 100_000), default=128, show_default=True, metavar="N",
                 help="Requests under way or waiting; one more is told to come back."),
    click.option("--allowed-host", "names", multiple=True, metavar="NAME", help="A further name in the Host header."),
    click.option("--allowed-origin", "origins", multiple=True, metavar="ORIGIN", help="A web page that may call."),
    click.option("--chat-template", "chat_template", metavar="NAME|JINJA|FILE", help="Instead of the models' own."),
    click.option("--chat-template-file", "template_file", type=click.Path(), help="File with a chat template."),
    click.option("--speculate", type=click.Choice(tuple(DRAFTERS)), default=None,
                 help="Speculative decoding: the same answers, sooner where they repeat the prompt or themselves."),
    override_option,
    device_options,
    click.option("--force", is_flag=True, help="Load even when the free memory looks too small."),
)  # fmt: skip


@click.command("serve")
@click.argument("models", nargs=-1, metavar="[MODEL]...")
@serve_options
def command(models: tuple[str, ...], **values: Any) -> int:
    """Serve models over HTTP on this machine.

    MODEL is a name of the catalogue, a .gguf file, or a reference; without one all models that are here are served. The
    first is loaded at once, the others when they are asked for. Without a key only this machine is let in.

    \b
    Examples:
      edgellm serve smollm2
      edgellm serve model.gguf --port 9000 -c 16384 --parallel 8
      edgellm serve --host 0.0.0.0 --api-key "$KEY"
    """
    try:
        from edgellm.server import listen
    except ImportError as error:
        raise UnsupportedError(
            f"serve needs {error.name}, which is not installed. It comes with: pip install 'edgellm[server]'",
            code="EXTRA_MISSING",
        ) from error
    with ProgressBar() as progress:
        server = _server(models, values, progress)
        listener = listen.open_socket(values["host"], values["port"])

        def ready(stop: Callable[[], None]) -> None:
            server.models.progress = None  # what is loaded later shows no bar between the lines of others
            progress.finish()
            url = listen.url_of(listener)
            echo(f"edgellm serves {_names(server)} at {url}/v1, a page to chat at {url}/  (Ctrl-C stops)")

        listen.serve(server, listener, ready, preload=bool(models))
    return 0


def _server(models: tuple[str, ...], values: dict[str, Any], progress: ProgressBar) -> Server:
    from edgellm.cli.models import fetched
    from edgellm.loading import LoadOptions
    from edgellm.memory import GIB
    from edgellm.server.models import Models, named
    from edgellm.server.security import Access
    from edgellm.server.server import Server

    access = Access(values["host"], values["keys"], frozenset(values["names"]), frozenset(values["origins"]))
    options = LoadOptions(
        n_ctx=values["n_ctx"],
        n_threads=values["n_threads"],
        **device_values(values),
        chat_template=template_source(values),
        kv_overrides=values["overrides"] or None,
        max_tokens_per_step=values["max_tokens_per_step"],
        force=values["force"],
        n_parallel=values["n_parallel"],
        speculate=values["speculate"],
        cache_dir=values["cache_dir"],
        cache_nbytes=max(1, int(values["cache_gib"] * GIB)),
    )
    if options.cache_dir is not None:
        from edgellm.engine.prefix_files import private_folder

        private_folder(Path(options.cache_dir))
    entries: list[ModelEntry] | None = None
    if models:
        entries = named(models, lambda name: fetched(name, progress), values["aliases"])
    elif values["aliases"]:
        raise click.UsageError("--alias names the first MODEL, and none is given.")
    return Server(
        Models(
            entries,
            options,
            keep_alive=None if values["keep_alive"] < 0 else values["keep_alive"],
            budget=None if values["memory_gib"] is None else int(values["memory_gib"] * GIB),
            progress=progress.update,
            tell=partial(echo, err=True),
        ),
        access,
        values["max_requests"],
    )


def _names(server: Server) -> str:
    names = server.models.names()
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
