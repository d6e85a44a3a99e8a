"""The sampling flags of ``run`` and ``chat``, made from the rows of ``edgellm.sampling.options``."""

from __future__ import annotations

from typing import Any

import click

from edgellm.cli.options import option_group
from edgellm.formats.errors import ParameterError
from edgellm.sampling.options import BY_FIELD, SamplingOption


class _Value(click.ParamType):
    """A value read by a row's ``parse``."""

    def __init__(self, option: SamplingOption) -> None:
        self.option = option
        self.name = option.metavar

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return self.option.parse(value)
        except (ValueError, OverflowError):
            return self.fail(f"{value!r} is not {self.option.expected}.", param, ctx)


sampling_options = option_group(
    click.option("--ignore-eos", is_flag=True, default=None, help="Go on after the end token."),
    *(click.option(row.field, *row.flags, type=_Value(row), metavar=row.metavar, help=row.help)
      for row in BY_FIELD.values()),
)  # fmt: skip
"""Every sampling flag; the values arrive under the names of the fields, None when left out."""


def given_sampling(values: dict[str, Any]) -> dict[str, Any]:
    """The sampling fields among a command's values that the user gave; a value out of range is wrong usage."""
    given = {name: values[name] for name in (*BY_FIELD, "ignore_eos") if values.get(name) is not None}
    if given:
        from edgellm.sampling import SamplingParams  # brings NumPy

        try:
            SamplingParams(**given)
        except ParameterError as error:
            raise click.UsageError(str(error)) from None
    return given
