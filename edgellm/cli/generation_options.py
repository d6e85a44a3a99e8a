"""The options that ``run`` and ``chat`` share beside sampling: the model, the context, the template, when to stop."""

from __future__ import annotations

from typing import Any

import click

from edgellm.cli import standard_input
from edgellm.cli.adapter_options import adapter_options
from edgellm.cli.options import (
    WholeNumber,
    cache_type_options,
    device_options,
    draft_option,
    option_group,
    override_option,
)
from edgellm.engine.speculation import SPECULATIONS
from edgellm.formats import text_file
from edgellm.formats.errors import FormatError
from edgellm.formats.json_text import parse_json
from edgellm.machine.paths import typed_file, typed_path

generation_options = option_group(
    click.option("-m", "--model", "model_option", metavar="MODEL", help="A name, a .gguf file, hf:owner/repo:QUANT."),
    click.option("-n", "--predict", "--n-predict", "n_predict", type=WholeNumber(-1), default=-1, metavar="N",
                 help="Tokens to make at most; -1 goes on to the end."),
    click.option("-c", "--ctx-size", "n_ctx", type=WholeNumber(0), default=None, metavar="N",
                 help="Tokens of context; 0 takes all that the model was trained for."),
    click.option("-t", "--threads", "n_threads", type=WholeNumber(1), default=None, metavar="N",
                 help="Threads.  [default: physical cores]"),
    device_options,
    adapter_options,
    cache_type_options,
    click.option("-sys", "--system-prompt", "system", metavar="TEXT", help="System message."),
    click.option("-sysf", "--system-prompt-file", "system_file", type=click.Path(), help="File with it."),
    click.option("-r", "--reverse-prompt", "stops", multiple=True, metavar="TEXT", help="Stop before TEXT."),
    click.option("--chat-template", "chat_template", metavar="NAME|JINJA|FILE", help="Instead of the model's own."),
    click.option("--chat-template-file", "template_file", type=click.Path(), help="File with a chat template."),
    click.option("--chat-template-kwargs", "template_kwargs", metavar="JSON", help='For the template: {"key": value}.'),
    override_option,
    draft_option,
    click.option("--speculate", type=click.Choice(SPECULATIONS), default=None,
                 help="Speculative decoding: the same answer, sooner where it repeats the prompt or itself."),
    click.option("--force", is_flag=True, help="Load even when the free memory looks too small."),
    click.option("-v", "--verbose", "--show-timings", "timings", is_flag=True, help="Timings on standard error."),
)  # fmt: skip


def read_text(path: str) -> str:
    """A text file; ``-`` is standard input. FormatError for what is no text, OSError for what cannot be opened."""
    return standard_input.read_all() if path == "-" else text_file.read_text(typed_path(path))


def without_last_newline(text: str) -> str:
    """A prompt as llama.cpp takes it out of a file: the end of the last line is the file's, not the prompt's."""
    return text.removesuffix("\n")


def system_message(values: dict[str, Any]) -> str | None:
    """The system message of ``-sys`` or ``-sysf``."""
    if values["system"] is not None and values["system_file"] is not None:
        raise click.UsageError("-sys and -sysf both give a system message. Give one of them.")
    if values["system_file"] is not None:
        return without_last_newline(read_text(values["system_file"]))
    given: str | None = values["system"]
    return given


def template_source(values: dict[str, Any]) -> str | None:
    """A template's name or Jinja text: ``--chat-template`` also takes the path of a file."""
    if values["template_file"] is not None:
        return read_text(values["template_file"])
    given: str | None = values["chat_template"]
    if given is not None and "{" not in given and typed_file(given):
        return read_text(given)
    return given


def template_arguments(values: dict[str, Any]) -> dict[str, Any]:
    """The JSON object of ``--chat-template-kwargs``."""
    if values["template_kwargs"] is None:
        return {}
    try:
        arguments = parse_json(values["template_kwargs"], "--chat-template-kwargs", "PARAMETER", advice="")
    except FormatError as error:
        raise click.UsageError(str(error).strip()) from None
    if not isinstance(arguments, dict):
        raise click.UsageError('--chat-template-kwargs must be a JSON object such as {"enable_thinking": false}.')
    return arguments
