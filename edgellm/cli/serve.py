"""``edgellm serve``: models over HTTP, for programs that speak OpenAI's, llama-server's and other protocols."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from edgellm.cli.options import Number, WholeNumber, option_group
from edgellm.cli.progress import ProgressBar
from edgellm.cli.serving_options import begin_ray, load_options, model_options, models_of, needs_extra
from edgellm.machine.terminal import echo

if TYPE_CHECKING:
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
    click.option("--port", type=WholeNumber(0, 65535), default=8080, show_default=True,
                 help="Port; 0 takes a free one. Clients of Ollama look at 11434."),
    click.option("--api-key", "keys", multiple=True, envvar="EDGELLM_API_KEY", metavar="KEY",
                 help="What clients must send; may be given more than once."),
    click.option("-a", "--alias", "aliases", multiple=True, metavar="NAME", help="A further name of the first model."),
    model_options,
    click.option("--keep-alive", type=Duration(), default=-1, metavar="TIME",
                 help="How long an idle model stays: 300, 5m, 1h; -1 until another needs its memory.  [default: -1]"),
    click.option("--max-requests", type=WholeNumber(1, 100_000), default=128, show_default=True, metavar="N",
                 help="Requests under way or waiting; one more is told to come back."),
    click.option("--allowed-host", "names", multiple=True, metavar="NAME", help="A further name in the Host header."),
    click.option("--allowed-origin", "origins", multiple=True, metavar="ORIGIN", help="A web page that may call."),
    click.option("--lora-init-without-apply", "idle", is_flag=True,
                 help="Load adapters with the scale 0; requests and /lora-adapters choose."),
)  # fmt: skip


class Replicas(click.ParamType):
    """A number, or the least and the most of them."""

    name = "replicas"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | tuple[int, int]:
        found = re.fullmatch(r"([1-9]\d{0,3})(?:-([1-9]\d{0,3}))?", str(value), re.ASCII)
        if found is None or (found[2] and int(found[2]) < int(found[1])):
            self.fail(f"{value!r} is neither a number such as 2 nor the least and the most such as 1-4.", param, ctx)
        return (int(found[1]), int(found[2])) if found[2] else int(found[1])


ray_options = option_group(
    click.option("--ray", is_flag=True, help="Serve by Ray: replicas of each model behind this address."),
    click.option("--ray-address", metavar="ADDRESS",
                 help="A cluster that runs; auto is this machine's.  [default: start one here]"),
    click.option("--replicas", type=Replicas(), default="1", show_default=True, metavar="N|MIN-MAX",
                 help="With --ray: processes of each model; of a range as many as its requests need."),
    click.option("--rate-limit", type=Number(0, min_open=True), default=None, metavar="N",
                 help="With --ray: requests a minute of one client."),
    click.option("--response-cache", "response_cache_mib", type=WholeNumber(0), default=0, metavar="MIB",
                 help="With --ray: memory for replies that would be the same again.  [default: none]"),
)  # fmt: skip


@click.command("serve")
@click.argument("models", nargs=-1, metavar="[MODEL]...")
@serve_options
@ray_options
def command(models: tuple[str, ...], **values: Any) -> int:
    """Serve models over HTTP on this machine.

    MODEL is a name of the catalogue, a .gguf file, or a reference; without one all models that are here are served. The
    first is loaded at once, the others when they are asked for. Without a key only this machine is let in.

    \b
    Examples:
      edgellm serve smollm2
      edgellm serve model.gguf --port 9000 -c 16384 --parallel 8
      edgellm serve --host 0.0.0.0 --api-key "$KEY"
      edgellm serve smollm2 --ray --replicas 1-4 -t 4
    """
    if values["ray"] or values["ray_address"]:
        return _serve_by_ray(models, values)
    if values["rate_limit"] or values["response_cache_mib"] or values["replicas"] != 1:
        raise click.UsageError("--replicas, --rate-limit and --response-cache go with --ray.")
    try:
        from edgellm.server import listen
    except ImportError as error:
        raise needs_extra("serve", error) from error
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


def _serve_by_ray(models: tuple[str, ...], values: dict[str, Any]) -> int:
    begin_ray(models, values)
    if not values["port"]:
        raise click.UsageError("--port 0 does not go with --ray: each machine of a cluster would take another one.")
    try:
        from edgellm.ray.running import run
        from edgellm.server.security import Access
    except ImportError as error:
        raise needs_extra("serve --ray", error, "ray") from error
    limit = values["rate_limit"]
    run(
        models,
        values["host"],
        values["port"],
        values["ray_address"],
        lambda url: echo(f"edgellm serves {', '.join(models)} by Ray at {url}/v1  (Ctrl-C stops)"),
        options=load_options(values, len(models)),
        replicas=values["replicas"],
        access=Access(values["host"], values["keys"], frozenset(values["names"]), frozenset(values["origins"])),
        max_requests=values["max_requests"],
        rate_limit=None if limit is None else (limit, max(1, int(limit))),
        response_cache_nbytes=values["response_cache_mib"] << 20,
    )
    return 0


def _server(models: tuple[str, ...], values: dict[str, Any], progress: ProgressBar) -> Server:
    from edgellm.server.security import Access
    from edgellm.server.server import Server

    access = Access(values["host"], values["keys"], frozenset(values["names"]), frozenset(values["origins"]))
    if values["aliases"] and not models:
        raise click.UsageError("--alias names the first MODEL, and none is given.")
    keep_alive = None if values["keep_alive"] < 0 else values["keep_alive"]
    return Server(models_of(models, values, progress, values["aliases"], keep_alive), access, values["max_requests"])


def _names(server: Server) -> str:
    names = server.models.names()
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
