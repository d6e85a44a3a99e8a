"""``edgellm run``: one prompt, one answer on standard output."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from edgellm.arguments import MOST_LENGTH_PENALTY
from edgellm.cli import standard_input
from edgellm.cli.answer import Answer, say_notices, stream_answer, timing_block
from edgellm.cli.form_options import form_options, given_form
from edgellm.cli.generation_options import (
    generation_options,
    read_text,
    system_message,
    template_arguments,
    without_last_newline,
)
from edgellm.cli.models import load_model
from edgellm.cli.options import Number, WholeNumber
from edgellm.cli.sampling_options import given_sampling, sampling_options
from edgellm.formats.errors import ModelNotFoundError
from edgellm.machine.paths import path_if_there
from edgellm.machine.terminal import EXIT_INTERRUPTED, echo, hand_over, json_text

if TYPE_CHECKING:
    from edgellm.llm import LLM

# a name of the catalogue, a reference, a path that is written plainly; no blank, no quote, ? ! , or letter beyond ASCII
_MODEL_NAME = re.compile(r"[A-Za-z0-9_.~/\\:+=@-]+|https?://\S+")


@click.command("run")
@click.argument("arguments", nargs=-1, metavar="[MODEL] [PROMPT]...")
@click.option("-p", "--prompt", "prompt_option", metavar="TEXT", help="The prompt.")
@click.option("-f", "--file", "prompt_file", metavar="FILE", help="File with the prompt; - is standard input.")
@click.option("--no-stdin", is_flag=True, help="Do not read standard input.")
@click.option("--raw", "-no-cnv", "--no-conversation", "raw", is_flag=True, help="Complete text, without a template.")
@click.option("--json", "as_json", is_flag=True, help="Write one JSON object: text, finish_reason, timings.")
@click.option("--num-beams", type=WholeNumber(1, 128), help="Beam search in place of sampling.")
@click.option(
    "--length-penalty",
    type=Number(-MOST_LENGTH_PENALTY, MOST_LENGTH_PENALTY),
    help="Of beam search: more than 0 favours long answers.",
)
@click.option("--tools", "tools_file", metavar="FILE.py", help="Let the model call the functions of this file.")
@generation_options
@form_options
@sampling_options
def command(arguments: tuple[str, ...], **values: Any) -> int:
    """Answer one prompt on standard output.

    Nothing but the answer goes there; progress, timings and errors go to standard error.

    The prompt is an argument, -p, -f, or standard input. Beside a prompt, standard input is read too and comes first
    when it is a pipe, a file from its start, or a connection that has something at once; --no-stdin leaves it alone,
    say in a loop that reads lines from a pipe. A single argument that no model can be called, such as one with a space
    in it, is a prompt for the default model. The first Ctrl-C stops the answer, the second leaves; both end with status
    130.

    With --tools the model may call the functions that a Python file defines. They are run as they are, with the rights
    of this program; each call is shown on standard error.

    \b
    Examples:
      edgellm run smollm2 "Name three rivers."
      cat notes.txt | edgellm run smollm2 "Sum this up." -n 200 --temp 0
      edgellm run -m model.gguf --raw -p "Once upon a time" --seed 7
      edgellm run "Where does the Rhine end?" --json-schema '{"properties": {"country": {"type": "string"}}}'
    """
    model, words = split_arguments(arguments, values["model_option"], values)
    named = values["model_option"] is None and model in arguments[:1]
    prompt = read_prompt(words, values)
    if not prompt.strip():
        taken = f" {model} was taken as the model." if named else ""
        raise click.UsageError(f"there is no prompt. Give it as an argument, with -p, -f, or through a pipe.{taken}")
    sampling = given_sampling(values)
    system = system_message(values)
    if values["raw"] and system is not None:
        raise click.UsageError("--raw completes text as it is; a system message (-sys) needs the chat template.")
    if values["raw"] and values["tools_file"] is not None:
        raise click.UsageError("--raw completes text as it is; --tools needs the chat template.")
    messages = [{"role": "system", "content": system}] if system is not None else []
    messages.append({"role": "user", "content": prompt})
    options = {"max_tokens": values["n_predict"], "stop": values["stops"], **sampling, **given_form(values)}
    if not values["raw"]:
        options["template_kwargs"] = template_arguments(values)
    if values["length_penalty"] is not None and values["num_beams"] is None:
        raise click.UsageError("--length-penalty is for beam search. Give --num-beams too.")
    beams = {name: values[name] for name in ("num_beams", "length_penalty") if values[name] is not None}
    answers = _answerer(values["tools_file"], beams)
    with _loaded(model, values, named) as llm:
        write = (lambda text: None) if values["as_json"] else hand_over
        answer, more = answers(llm, prompt if values["raw"] else messages, options, write)
        if values["as_json"]:
            timings = None if answer.timings is None else answer.timings.as_dict()
            record = {"model": model, "text": answer.text, "finish_reason": answer.finish_reason, "timings": timings}
            echo(json_text({**record, **more}, indent=None))
        elif answer.text and not answer.text.endswith("\n"):
            echo()
        say_notices(llm)
        if values["timings"]:
            echo(timing_block(answer, llm.n_ctx, getattr(llm, "runs_on", "")), err=True)
    return EXIT_INTERRUPTED if answer.stopped else 0


def _answerer(tools_file: str | None, beams: dict[str, Any]) -> Callable[..., tuple[Answer, dict[str, Any]]]:
    """What answers, with the functions of a file or without: (answer, what else JSON shall have of it)."""
    if beams and tools_file is not None:
        raise click.UsageError("--num-beams does not go together with --tools.")
    if beams:
        from edgellm.beam_search import answer_chunks

        return lambda llm, prompt, options, write: (
            stream_answer(partial(answer_chunks, llm, prompt, **beams, **options), write),
            {},
        )
    if tools_file is not None:
        from edgellm.cli.tools import answer_with_tools, functions_of

        return partial(answer_with_tools, functions_of(tools_file))
    return lambda llm, prompt, options, write: (stream_answer(partial(llm.stream, prompt, **options), write), {})


def _loaded(model: str, values: dict[str, Any], named: bool) -> LLM:
    """The model; where its name is no model's, a word about what it may have been instead."""
    try:
        return load_model(model, values, needs_template=not values["raw"])
    except ModelNotFoundError as error:
        if not named or not str(error).startswith(f"{model}: "):  # it may be of an adapter, or of what drafts
            raise
        raise ModelNotFoundError(
            f"{error} The first argument is the model. If it is part of the prompt, give all of that with -p.",
            code=error.code,
        ) from error


def split_arguments(arguments: tuple[str, ...], model: str | None, values: dict[str, Any]) -> tuple[str, list[str]]:
    """The model and the words of the prompt; see the help of the command."""
    from edgellm.store import DEFAULT_MODEL

    if model is not None:
        return model, list(arguments)
    if not arguments:
        return DEFAULT_MODEL, []
    first, *words = arguments
    alone = not words and values["prompt_option"] is None and values["prompt_file"] is None
    return (DEFAULT_MODEL, [first]) if alone and not may_be_model(first) else (first, words)


def may_be_model(text: str) -> bool:
    """Whether a lone argument may be a model's name or path; anything else is a prompt."""
    return bool(_MODEL_NAME.fullmatch(text)) or text.lower().endswith(".gguf") or path_if_there(text) is not None


def read_prompt(words: list[str], values: dict[str, Any]) -> str:
    """The prompt from the one place that has it, behind whatever standard input brings; "" when there is none."""
    file, no_stdin = values["prompt_file"], values["no_stdin"]
    if file == "-" and no_stdin:
        raise click.UsageError("-f - reads standard input, and --no-stdin does not. Give one of them.")
    given = [text for text in (" ".join(words) or None, values["prompt_option"]) if text is not None]
    if file is not None and file != "-":
        given.append(without_last_newline(read_text(file)))
    if len(given) > 1:
        raise click.UsageError("there is more than one prompt. Give it as an argument, with -p, or with -f.")
    brought = None
    if "-" in (values["system_file"], values["template_file"]):
        no_stdin = True  # it is one of these
    if file == "-" or not (given or no_stdin or standard_input.is_terminal()):
        brought = standard_input.read_all()
    elif not no_stdin:
        brought = standard_input.brought_along()
    if brought is not None and brought.strip():
        given = [brought.rstrip() + "\n\n" + given[0]] if given else [without_last_newline(brought)]
    return given[0] if given else ""
