"""``--tools FILE``: the functions of a Python file, which the model may call and this program then runs.

Nothing is run that the user has not named: only the functions that the file itself defines become tools.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import json
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click

from edgellm.cli.answer import Answer
from edgellm.cli.interrupt import StopOnInterrupt
from edgellm.cli.progress import ProgressBar
from edgellm.machine.paths import typed_path
from edgellm.machine.terminal import note, one_line

if TYPE_CHECKING:
    from edgellm.llm import LLM

MODULE = "edgellm_tools"
MAX_SHOWN = 200  # characters of a result


def functions_of(path: str) -> list[Callable[..., Any]]:
    """The functions that a Python file defines, those with an underscore before their names left out.

    UsageError for a file that cannot be run, or that defines none.
    """
    file = typed_path(path)
    spec = importlib.util.spec_from_file_location(MODULE, file, loader=None)
    if not file.is_file() or spec is None or spec.loader is None:
        raise click.UsageError(f"--tools {path}: there is no such Python file. Give the path of one that ends in .py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[MODULE] = module  # where type hints of its classes are looked up
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever the user's program runs into
        raise click.UsageError(f"--tools {path} failed: {type(error).__name__}: {one_line(str(error))}.") from error
    defined = [value for name, value in vars(module).items() if not name.startswith("_") and inspect.isfunction(value)]
    functions: list[Callable[..., Any]] = [function for function in defined if function.__module__ == MODULE]
    if not functions:
        raise click.UsageError(f"--tools {path} defines no function. Write one with type hints and a docstring.")
    return functions


def answer_with_tools(
    functions: Sequence[Callable[..., Any]],
    llm: LLM,
    messages: Sequence[Any],
    options: dict[str, Any],
    write: Callable[[str], None],
) -> tuple[Answer, dict[str, Any]]:
    """The answer to messages, and the ``steps`` before it, which standard error shows; the first Ctrl-C ends it."""
    from edgellm.messages.events import ContentDelta, Event, PromptProgress

    pieces: list[str] = []
    with ProgressBar() as progress, StopOnInterrupt() as interrupt:

        def on_event(event: Event) -> None:
            if isinstance(event, PromptProgress):
                progress.update("prefill", event.done, event.total)
            elif isinstance(event, ContentDelta):
                progress.finish()
                pieces.append(event.text)
                write(event.text)

        shown = [_shown(function, progress.finish) for function in functions]
        reply = llm.chat(messages, tools=shown, on_event=on_event, cancel=interrupt.flag, **options)
    content: Any = reply.content
    answer = Answer("".join(pieces), content.finish_reason, content.timings, interrupt.stopped)
    return answer, {"steps": [message.to_dict() for message in reply.steps]}


def _shown(function: Callable[..., Any], before: Callable[[], None]) -> Callable[..., Any]:
    """A function that says on standard error how it was called and what came of it."""

    def told(arguments: dict[str, Any], what: str) -> None:
        before()
        given = ", ".join(f"{name}={json.dumps(value, default=str)}" for name, value in arguments.items())
        text = one_line(f"{function.__name__}({given}) {what}")
        note(text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]} ...")

    def done(arguments: dict[str, Any], result: Any) -> Any:
        told(arguments, f"-> {result!r}")
        return result

    @functools.wraps(function)
    def run(**arguments: Any) -> Any:
        try:
            result = function(**arguments)
        except Exception as error:
            told(arguments, f"failed: {type(error).__name__}: {error}")
            raise
        if not inspect.isawaitable(result):
            return done(arguments, result)

        async def awaited() -> Any:
            return done(arguments, await result)

        return awaited()

    return run
