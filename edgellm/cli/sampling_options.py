"""The sampling flags of ``run`` and ``chat``, made from the rows of ``edgellm.sampling.options``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from edgellm.formats.errors import ParameterError
from edgellm.sampling.options import BY_FIELD, SAMPLING_OPTIONS, SamplingOption

F = TypeVar("F", bound=Callable[..., Any])


class _Value(click.ParamType):
    """A value read by a row's ``parse``."""

    def __init__(self, option: SamplingOption) -> None:
        self.option = option
        self.name = option.metavar

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return self.option.parse(value)
        except (ValueError, OverflowError):
            return self.fail(f"{value!r} is not what it takes ({self.option.metavar}).", param, ctx)


def sampling_options(function: F) -> F:
    """Give a command every sampling flag; the values arrive under the names of the fields, None when left out."""
    for option in reversed(SAMPLING_OPTIONS):
        function = click.option(
            option.field, *option.flags, type=_Value(option), metavar=option.metavar, default=None, help=option.help
        )(function)
    ignore_eos = click.option("--ignore-eos", is_flag=True, default=None, help="Go on after the end token.")
    return ignore_eos(function)


def given_sampling(values: dict[str, Any]) -> dict[str, Any]:
    """The sampling fields among a command's values that the user gave; a value out of range is wrong usage."""
    given = {name: values[name] for name in (*BY_FIELD, "ignore_eos") if values.get(name) is not None}
    if given:
        check_sampling(given)
    return given


def check_sampling(given: dict[str, Any]) -> None:
    """Refuse a value out of range before a model is loaded for it."""
    from edgellm.sampling import SamplingParams

    try:
        SamplingParams(**given)
    except ParameterError as error:
        raise click.UsageError(str(error)) from None
