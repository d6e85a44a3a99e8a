"""The ``edgellm`` command: finds the file of a command, and turns every way of ending into an exit status.

0 done, 1 an error with a message, 2 wrong usage, 130 stopped by Ctrl-C, 141 the reader of a pipe went away,
143 terminated.
"""

from __future__ import annotations

import importlib
import io
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Sequence
from types import FrameType

import click

from edgellm.formats.errors import EdgeLLMError
from edgellm.machine.terminal import EXIT_INTERRUPTED, echo, error_block, use_utf8

COMMANDS = (
    *("run", "chat", "embed", "serve", "batch", "sessions", "pull", "list", "show", "rm", "verify", "doctor", "bench"),
    *("perplexity", "quantize", "imatrix", "compare", "convert"),
)
"""Each is ``command`` in the file of the same name, in the order in which ``--help`` shows them."""

EXIT_BROKEN_PIPE = 141
COMPLETION_VARIABLE = "_EDGELLM_COMPLETE"


class LazyGroup(click.Group):
    """A group that imports the file of a command when it is needed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"edgellm.cli.{cmd_name}").command
        return command


def _print_version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        from importlib.metadata import version

        echo(f"edgellm {version('edgellm')}")
        ctx.exit()


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.option(
    "--version", is_flag=True, expose_value=False, is_eager=True, callback=_print_version, help="Show the version."
)
def edgellm() -> None:
    """Run GGUF language models on this machine.

    \b
    Examples:
      edgellm chat                                talk to the small default model
      edgellm run smollm2 "Name three rivers."    one answer, on standard output
      cat notes.txt | edgellm run smollm2 "Sum this up."
      edgellm bench -m model.gguf                 tokens per second on this machine

    EDGELLM_DEBUG=1 shows a traceback with an error and one line for each request.
    """


def debugging() -> bool:
    """Whether the user asked for tracebacks and request lines."""
    return os.environ.get("EDGELLM_DEBUG", "") not in ("", "0")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; every error is printed here and nowhere else."""
    use_utf8()
    in_main = threading.current_thread() is threading.main_thread()
    if in_main and signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN:
        signal.signal(signal.SIGTERM, _terminated)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            given = list(sys.argv[1:] if arguments is None else arguments)
            check_arguments(given)
            status = _run(given)
        sys.stdout.flush()
        return status
    except click.ClickException as error:
        said = io.StringIO()
        error.show(file=said)
        echo(said.getvalue(), err=True, nl=False)
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        echo("Stopped.", err=True)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # the interpreter flushes standard output once more at exit: give it somewhere to go
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return EXIT_BROKEN_PIPE
    except (EdgeLLMError, OSError, MemoryError) as error:
        if debugging():
            echo(traceback.format_exc(), err=True)
        echo(error_block(error), err=True)
        return 1


def check_arguments(arguments: Sequence[str]) -> None:
    """UsageError for one that is not UTF-8: only a path that is there may be so, or a new name in such a folder."""
    for number, argument in enumerate(arguments, 1):
        value = argument.partition("=")[2] if argument.startswith("-") and "=" in argument else argument
        folder, name = os.path.split(value)
        if _is_utf8(value) or os.path.lexists(value) or (_is_utf8(name) and os.path.isdir(folder)):
            continue
        shown = argument.encode("utf-8", "backslashreplace").decode()
        raise click.UsageError(
            f"argument {number}, {shown}, is not UTF-8. Set the terminal and the locale to UTF-8, or put the text into "
            "a file and turn that into UTF-8: iconv -f LATIN1 -t UTF-8"
        )


def _is_utf8(text: str) -> bool:
    """Whether all of it could be decoded; Python leaves half characters for bytes that could not."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _show_warning(message: Warning | str, *where: object, **more: object) -> None:
    """A warning as the user reads it: what it says, not the line of code that says it."""
    echo(f"Warning: {message}", err=True)


def _terminated(number: int, frame: FrameType | None) -> None:
    """Leave through every ``with`` block: one of them may have to give the terminal back."""
    sys.exit(128 + number)


def _run(arguments: list[str]) -> int:
    """What click's own ``main`` does, without its view of a broken pipe."""
    if instruction := os.environ.get(COMPLETION_VARIABLE):
        from click.shell_completion import shell_complete

        return shell_complete(edgellm, {}, "edgellm", COMPLETION_VARIABLE, instruction)
    try:
        with edgellm.make_context("edgellm", arguments) as ctx:
            status = edgellm.invoke(ctx)
    except click.exceptions.Exit as ending:
        return ending.exit_code
    return status if isinstance(status, int) else 0
