"""``edgellm pull``: bring models here."""

from __future__ import annotations

import click

from edgellm.cli.progress import ProgressBar
from edgellm.machine.terminal import echo, human_bytes


@click.command("pull")
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
def command(names: tuple[str, ...]) -> None:
    """Download models and keep them.

    NAME is a name that `edgellm list` shows, hf:owner/repository[:QUANT], hf:owner/repository/file.gguf, or an
    https: address. A download that was cut off goes on where it stopped; what is here already is not fetched again.

    \b
    Examples:
      edgellm pull smollm2
      edgellm pull hf:bartowski/Qwen2.5-0.5B-Instruct-GGUF:Q4_K_M
    """
    from edgellm.store.catalogue import pull

    for name in names:
        with ProgressBar() as progress:
            path = pull(name, progress.of("pull", name))
        echo(f"{name}: {path} ({human_bytes(path.stat().st_size)})", err=True)
