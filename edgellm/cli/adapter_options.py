"""The options for adapters and control vectors, with llama.cpp's names, and what they say to the library."""

from __future__ import annotations

import re
from typing import Any

import click

from edgellm.cli.options import WholeNumber, option_group
from edgellm.formats.errors import ParameterError
from edgellm.machine.paths import path_if_there, typed_path

_SCALED = re.compile(r"(.+):(-?\d{1,6}(?:\.\d{1,6})?)", re.ASCII | re.DOTALL)
_NAMED = re.compile(r"([\w.-]{1,64})=(.+)", re.ASCII | re.DOTALL)


def parse_adapter(text: str) -> tuple[str, str, float]:
    """``[NAME=]FILE[:SCALE]`` as (file, name, scale); a file that is called so as a whole is taken as one."""
    if path_if_there(text) is not None:
        return text, "", 1.0
    named = _NAMED.fullmatch(text)
    name, rest = (named[1], named[2]) if named else ("", text)
    scaled = None if path_if_there(rest) is not None else _SCALED.fullmatch(rest)
    return (scaled[1], name, float(scaled[2])) if scaled else (rest, name, 1.0)


def _read(ctx: click.Context, param: click.Parameter, texts: tuple[str, ...]) -> tuple[tuple[str, str, float], ...]:
    found = tuple(parse_adapter(text) for text in texts)
    for file, _, _ in found:
        try:
            typed_path(file)
        except ParameterError as error:
            raise click.BadParameter(str(error)) from None
    return found


adapter_options = option_group(
    click.option("--lora", "lora", multiple=True, callback=_read, metavar="[NAME=]FILE[:SCALE]",
                 help="A LoRA adapter (GGUF) for the model; may be given more than once."),
    click.option("--control-vector", "control_vectors", multiple=True, callback=_read, metavar="[NAME=]FILE[:SCALE]",
                 help="A control vector, which steers what layers make; may be given more than once."),
    click.option("--control-vector-layer-range", "control_vector_layers", type=(WholeNumber(1), WholeNumber(1)),
                 default=None, metavar="FIRST LAST", help="The layers it counts in.  [default: all it has]"),
)  # fmt: skip
"""Adapters of the model; ``adapter_values`` gives them as the library takes them."""


def adapter_values(values: dict[str, Any]) -> dict[str, Any]:
    """What ``adapter_options`` say, by the names of ``edgellm.load``; nothing where they say nothing."""
    found: dict[str, Any] = {}
    for name in ("lora", "control_vectors"):
        if given := values.get(name):
            from edgellm.adapters.chosen import checked_scale
            from edgellm.adapters.loading import AdapterChoice

            found[name] = tuple(
                AdapterChoice(typed_path(file), called, checked_scale(name, scale)) for file, called, scale in given
            )
    if values.get("control_vector_layers") is not None:
        found["control_vector_layers"] = values["control_vector_layers"]
    return found
