"""``edgellm rm``: delete models that were pulled."""

from __future__ import annotations

import click

from edgellm.machine.terminal import echo, human_bytes


@click.command("rm")
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
def command(names: tuple[str, ...]) -> None:
    """Delete models from the store. Files elsewhere are never touched.

    \b
    Example:
      edgellm rm smollm2
    """
    from edgellm.store.catalogue import remove

    for name in names:
        echo(f"{name}: removed, {human_bytes(remove(name))} free again", err=True)
