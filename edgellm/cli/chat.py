"""``edgellm chat``: the full-screen chat in a terminal, else a conversation line by line."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgellm.cli.answer import Answer, say_notices, timing_block
from edgellm.cli.chat_commands import COMMANDS, AnswerAgain, LeaveChat
from edgellm.cli.chat_session import ChatSession, overflow_mode
from edgellm.cli.generation_options import (
    generation_options,
    read_text,
    system_message,
    template_arguments,
    without_last_newline,
)
from edgellm.cli.line_input import LineInput
from edgellm.cli.models import load_model, load_options
from edgellm.cli.sampling_options import given_sampling, sampling_options
from edgellm.context_overflow import ChatTooLongError, turns
from edgellm.formats.errors import ContextFullError, EdgeLLMError, FormatError, ParameterError
from edgellm.machine.terminal import EXIT_INTERRUPTED, echo, error_block, hand_over
from edgellm.sessions.settings import OVERFLOW_WAYS, checked

if TYPE_CHECKING:
    from edgellm.remote.model import RemoteServer

HERE_ALONE = {
    "n_ctx": "-c", "n_threads": "-t", "executor": "--device", "gpu_layers": "-ngl", "cpu_moe": "--cpu-moe",
    "cache_type_k": "-ctk", "cache_type_v": "-ctv", "kv_keep": "--kv-keep",
    "chat_template": "--chat-template",
    "template_file": "--chat-template-file", "overrides": "--override-kv", "speculate": "--speculate",
    "draft": "--draft", "force": "--force", "lora": "--lora", "control_vectors": "--control-vector",
    "control_vector_layers": "--control-vector-layer-range",
}  # fmt: skip
"""Options that say how a model is loaded."""

CUT_OFF = {
    "length": "(cut off: -n is used up)",
    "context_full": "(cut off: the context is full; /set context_overflow drop_oldest goes on without the oldest "
    "turns, /clear begins anew)",
}


@click.command("chat")
@click.argument("model_argument", required=False, metavar="[MODEL]")
@click.option("-p", "--prompt", "first", metavar="TEXT", help="The first message.")
@click.option("-f", "--file", "first_file", metavar="FILE", help="File with the first message.")
@click.option("--plain", is_flag=True, help="Line by line, without the full screen; nothing is saved.")
@click.option("--continue", "go_on", is_flag=True, help="Go on with the chat that was changed last.")
@click.option("--session", metavar="NAME", help="Go on with this chat; `edgellm sessions` shows the names.")
@click.option("--server", metavar="URL", help="Talk to the models of a server there: `edgellm serve`, or one like it.")
@click.option(
    "--api-key",
    "key",
    envvar="EDGELLM_API_KEY",
    metavar="KEY",
    help="What the server asks for; in EDGELLM_API_KEY no list of processes shows it.",
)
@click.option(
    "--context-overflow",
    "overflow",
    type=click.Choice(OVERFLOW_WAYS),
    help="When a message does not fit the context: ask, leave the oldest turns out, or stop.  [default: ask]",
)
@generation_options
@sampling_options
def command(model_argument: str | None, **values: Any) -> int:
    """Talk to a model. Without MODEL it is the small default one.

    In a terminal this is a full-screen chat: F1 shows all keys, and every chat is saved as it happens. With --plain,
    or without a terminal, it goes line by line: /help lists the commands. The first Ctrl-C stops the answer, the
    second leaves.

    \b
    Examples:
      edgellm chat
      edgellm chat --continue
      edgellm chat model.gguf -sys "Answer in one sentence." --temp 0.3
      edgellm chat --server http://127.0.0.1:8080
    """
    from edgellm.store import DEFAULT_MODEL

    if model_argument is not None and values["model_option"] is not None:
        raise click.UsageError("the model is given twice. Give it as an argument or with -m.")
    model = model_argument or values["model_option"]
    first = without_last_newline(read_text(values["first_file"])) if values["first_file"] else values["first"]
    server = remote_server(values)
    if not values["plain"] and has_screen():
        return full_screen(model, first, values, server)
    if values["go_on"] or values["session"]:
        raise click.UsageError("--continue and --session need the full-screen chat, and that a terminal.")
    return line_chat(model or ("" if server is not None else DEFAULT_MODEL), first, values, server)


def has_screen() -> bool:
    """Whether there is a terminal that can be drawn on."""
    return sys.stdin.isatty() and sys.stdout.isatty() and os.environ.get("TERM", "") != "dumb"


def remote_server(values: dict[str, Any]) -> RemoteServer | None:
    """The server of ``--server``. UsageError for options of a model that is loaded here."""
    if values["server"] is None:
        return None
    context = click.get_current_context()
    for name, flag in HERE_ALONE.items():
        if context.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT:
            raise click.UsageError(f"{flag} is for a model on this machine; with --server it is set where that starts.")
    from edgellm.remote.model import RemoteServer

    return RemoteServer(values["server"], values["key"])


def full_screen(model: str | None, first: str | None, values: dict[str, Any], server: RemoteServer | None) -> int:
    """The Textual application, with what the command line said."""
    from edgellm.tui.run import Start, run_chat

    settings: dict[str, Any] = {**given_sampling(values)}
    if values["n_predict"] >= 0:
        settings["max_tokens"] = checked("max_tokens", values["n_predict"])
    if values["stops"]:
        settings["stop"] = list(values["stops"])
    if values["overflow"]:
        settings["context_overflow"] = values["overflow"]
    if arguments := template_arguments(values):
        settings["template_kwargs"] = arguments
    system = system_message(values)
    loading = load_options(values) if server is None else {}
    if server is not None and not (model or values["go_on"] or values["session"]):
        model = server.first()  # that it is not there is told before the screen
    start = Start(model, first, system, settings, loading, values["go_on"], values["session"], server)
    return run_chat(start)


def line_chat(model: str, first: str | None, values: dict[str, Any], server: RemoteServer | None) -> int:
    """The conversation line by line."""
    sampling, system = given_sampling(values), system_message(values)
    arguments = template_arguments(values)
    options = {"max_tokens": values["n_predict"], "stop": values["stops"], "template_kwargs": arguments, **sampling}
    if server is not None:
        model = server.full_name(model) if model else server.first()
    opened = load_model(model, values, needs_template=True) if server is None else server.open(model)
    with opened as llm:
        lines = LineInput(_history())
        conversation = llm.conversation(system, **options)
        conversation.on_overflow = overflow_mode(values["overflow"] or ("ask" if lines.interactive else "stop"))
        session = ChatSession(model, conversation)
        if lines.interactive:
            context = f", {llm.n_ctx} tokens of context" if llm.n_ctx else ""
            echo(f"{model}{context}. /help lists the commands.", err=True)
        try:
            return ChatLoop(session, lines, values["timings"]).run(first)
        finally:
            lines.close()


def _history() -> Path | None:
    """The file of the lines that were typed; a user without a home has none."""
    from edgellm.machine.paths import config_dir

    with contextlib.suppress(ParameterError):
        return config_dir() / "history"
    return None


class ChatLoop:
    """Reads lines, runs commands, shows answers. Two Ctrl-C without a line between them end it."""

    def __init__(self, session: ChatSession, lines: LineInput, timings: bool) -> None:
        self.session, self.lines, self.timings = session, lines, timings
        self.interrupts = 0

    def run(self, first: str | None = None) -> int:
        """Until the user leaves; the exit status."""
        if first is not None:
            try:
                self._turn(first)
            except LeaveChat:
                return 0
        while True:
            try:
                line = self.lines.read()
            except FormatError as error:
                if not self.lines.interactive:
                    raise
                echo(error_block(error), err=True)
                continue
            except KeyboardInterrupt:
                echo()
                self.interrupts += 1
                if self.interrupts > 1:
                    return EXIT_INTERRUPTED
                echo("Ctrl-C once more, Ctrl-D or /exit leaves.", err=True)
                continue
            if line is None:
                if self.lines.interactive:
                    echo()
                return 0
            self.interrupts = 0
            try:
                if line.strip():
                    self._turn(line)
            except LeaveChat:
                return 0

    def _turn(self, line: str) -> None:
        """One line of the user: a command or a message. An error is shown and the chat goes on."""
        try:
            if COMMANDS.has(line):
                try:
                    echo(COMMANDS.run(self.session, line), err=not self.lines.interactive)
                except AnswerAgain:
                    self._show(self.session.regenerate, summary=False)
            else:
                self._show(lambda write: self.session.ask(line, write))
        except (EdgeLLMError, OSError) as error:
            echo(error_block(error), err=True)
            if isinstance(error, ContextFullError) and not self.lines.interactive:
                echo("--context-overflow drop_oldest leaves the oldest turns out of the context.", err=True)

    def _show(self, answering: Callable[[Callable[[str], None]], Answer], *, summary: bool = True) -> None:
        """Show one answer; when the chat is longer than the context, after the user has said what to do."""
        conversation = self.session.conversation
        before = conversation.on_overflow, conversation.left_out
        try:
            try:
                self._answer(answering)
            except ChatTooLongError as error:
                choices = long_chat_choices(error, summary=summary and len(conversation.messages) > 1)
                if not self.lines.interactive or not choices:
                    raise
                if not self._make_room(error, choices):
                    echo("(not sent)", err=True)
                    return
                self._answer(answering)
        finally:
            conversation.on_overflow = before[0]
        if conversation.left_out > before[1]:
            echo(f"(the oldest {conversation.left_out} messages are left out of the context)", err=True)

    def _make_room(self, error: ChatTooLongError, choices: dict[str, str]) -> bool:
        """Ask what to do and do it; False: nothing."""
        echo(str(error), err=True)
        chosen = self.lines.choose(choices)
        if chosen == "s":
            echo("The summary that the chat goes on from:", err=True)
            self._answer(self.session.summarize)
            return not self.session.last.stopped if self.session.last else False
        if chosen:
            self.session.conversation.on_overflow = "drop_oldest" if chosen == "d" else "error"
        return bool(chosen)

    def _answer(self, answering: Callable[[Callable[[str], None]], Answer]) -> None:
        """Stream one answer and say how it ended, if not by itself."""
        answer = answering(hand_over)
        if answer.text and not answer.text.endswith("\n"):
            echo()
        if self.lines.interactive:
            echo()
        if answer.stopped:
            self.interrupts += 1
            echo("(stopped)", err=True)
        elif answer.finish_reason in CUT_OFF:
            echo(CUT_OFF[answer.finish_reason], err=True)
        say_notices(self.session.conversation.llm)
        if self.timings:
            echo(timing_block(answer, self.session.conversation.llm.n_ctx), err=True)
        sys.stdout.flush()


def long_chat_choices(error: ChatTooLongError, *, summary: bool) -> dict[str, str]:
    """What may be done about a chat that is longer than the context, by the letter that chooses it."""
    choices = {}
    if error.n_turns:
        choices["d"] = f"leave out the oldest {turns(error.n_turns)} ({error.n_kept:,} tokens stay)"
    if summary:
        choices["s"] = "begin anew with a summary"
    if error.n_free > 0:
        choices["w"] = f"send it as it is ({error.n_free:,} tokens for the answer)"
    return choices
