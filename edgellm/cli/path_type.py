"""A path as a value on the command line, by the rules of everywhere: ``~`` is a home, what can be none is told."""

from __future__ import annotations

from typing import Any

import click

from edgellm.formats.errors import ParameterError
from edgellm.machine.paths import typed_path


class TypedPath(click.Path):
    """Gives a Path; ``exists`` as in click.Path asks for a file that is there."""

    def __init__(self, *, exists: bool = False) -> None:
        super().__init__(exists=exists, dir_okay=not exists)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            path = typed_path(value)
        except ParameterError as error:
            self.fail(str(error), param, ctx)
        super().convert(path, param, ctx)
        return path
