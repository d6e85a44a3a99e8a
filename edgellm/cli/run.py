"""``edgellm run``: one prompt, one answer on standard output."""

from __future__ import annotations

import os
import stat
import sys
from typing import Any

import click

from edgellm.cli.answer import stream_answer, timing_block
from edgellm.cli.generation_options import (
    generation_options,
    read_text,
    system_message,
    template_arguments,
)
from edgellm.cli.models import load_model
from edgellm.cli.output import EXIT_INTERRUPTED, echo, hand_over, json_text
from edgellm.cli.sampling_options import given_sampling, sampling_options
from edgellm.paths import path_if_there


@click.command("run")
@click.argument("arguments", nargs=-1, metavar="[MODEL] [PROMPT]...")
@click.option("-p", "--prompt", "prompt_option", metavar="TEXT", help="The prompt.")
@click.option("-f", "--file", "prompt_file", metavar="FILE", help="File with the prompt; - is standard input.")
@click.option("--raw", "-no-cnv", "--no-conversation", "raw", is_flag=True, help="Complete text, without a template.")
@click.option("--json", "as_json", is_flag=True, help="Write one JSON object: text, finish_reason, timings.")
@generation_options
@sampling_options
def command(arguments: tuple[str, ...], **values: Any) -> int:
    """Answer one prompt on standard output.

    Nothing but the answer goes there; progress, timings and errors go to standard error.

    The prompt is an argument, -p, -f, or comes from a pipe; with both, the piped text comes first. A single argument
    with a space in it is a prompt for the default model. The first Ctrl-C stops the answer, the second leaves; both
    end with status 130.

    \b
    Examples:
      edgellm run smollm2 "Name three rivers."
      cat notes.txt | edgellm run smollm2 "Sum this up." -n 200 --temp 0
      edgellm run -m model.gguf --raw -p "Once upon a time" --seed 7
    """
    model, words = split_arguments(arguments, values["model_option"], values)
    prompt = read_prompt(words, values["prompt_option"], values["prompt_file"])
    sampling = given_sampling(values)
    system = system_message(values)
    if values["raw"] and system is not None:
        raise click.UsageError("--raw completes text as it is; a system message (-sys) needs the chat template.")
    messages = [{"role": "system", "content": system}] if system is not None else []
    messages.append({"role": "user", "content": prompt})
    options = {"max_tokens": values["n_predict"], "stop": values["stops"], **sampling}
    if not values["raw"]:
        options["template_kwargs"] = template_arguments(values)
    with load_model(model, values, needs_template=not values["raw"]) as llm:
        answer = stream_answer(
            lambda **live: llm.stream(prompt if values["raw"] else messages, **options, **live),
            (lambda text: None) if values["as_json"] else hand_over,
        )
        if values["as_json"]:
            timings = None if answer.timings is None else answer.timings.as_dict()
            record = {"model": model, "text": answer.text, "finish_reason": answer.finish_reason, "timings": timings}
            echo(json_text(record, indent=None))
        elif answer.text and not answer.text.endswith("\n"):
            echo()
        if values["timings"]:
            echo(timing_block(answer, llm.n_ctx), err=True)
    return EXIT_INTERRUPTED if answer.stopped else 0


def split_arguments(arguments: tuple[str, ...], model: str | None, values: dict[str, Any]) -> tuple[str, list[str]]:
    """The model and the words of the prompt; see the help of the command."""
    from edgellm.paths import DEFAULT_MODEL

    if model is not None:
        return model, list(arguments)
    if not arguments:
        return DEFAULT_MODEL, []
    first, *words = arguments
    alone = not words and values["prompt_option"] is None and values["prompt_file"] is None
    if alone and any(c.isspace() for c in first) and path_if_there(first) is None:
        return DEFAULT_MODEL, [first]
    return first, words


def read_prompt(words: list[str], option: str | None, file: str | None) -> str:
    """The prompt from the one place that has it, behind whatever a pipe brings."""
    given = [text for text in (" ".join(words) or None, option) if text is not None]
    if file is not None:
        given.append(read_text(file))
    if len(given) > 1:
        raise click.UsageError("there is more than one prompt. Give it as an argument, with -p, or with -f.")
    if file != "-" and _is_piped():
        piped = read_text("-")
        given = [piped.rstrip() + "\n\n" + given[0]] if given and piped.strip() else given or [piped]
    if not given or not given[0].strip():
        raise click.UsageError("there is no prompt. Give it as an argument, with -p, -f, or through a pipe.")
    return given[0]


def _is_piped() -> bool:
    """Whether standard input is a pipe or a file; a terminal, a socket and /dev/null are not."""
    if sys.stdin is None:
        return False
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError):
        return True  # replaced by a test or a notebook
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)
