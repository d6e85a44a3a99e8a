"""The commands of a chat: one row each. A command gets the session and the rest of its line, and gives text to show."""

from __future__ import annotations

from pathlib import Path

from edgellm.cli.answer import timing_block
from edgellm.cli.chat_session import ChatSession, overflow_mode
from edgellm.formats.errors import ParameterError
from edgellm.formats.text_file import read_text
from edgellm.machine.paths import line_path
from edgellm.machine.terminal import fields
from edgellm.sampling.options import BY_FIELD
from edgellm.sessions.commands import Command, Commands
from edgellm.sessions.settings import typed

MAX_READ_NBYTES = 16 << 20


class LeaveChat(Exception):
    """The user has said goodbye."""


class AnswerAgain(Exception):
    """The user wants another answer to the last message."""


def _exit(session: ChatSession, argument: str) -> str:
    raise LeaveChat


def _regenerate(session: ChatSession, argument: str) -> str:
    raise AnswerAgain


def _clear(session: ChatSession, argument: str) -> str:
    session.clear()
    return "The conversation is empty."


def _read(session: ChatSession, argument: str) -> str:
    path = _path(argument, "/read FILE")
    text = read_text(path, MAX_READ_NBYTES)
    session.attachments.append((path.name, text))
    return f"{path.name}: {len(text)} characters, they go with your next message."


def _system(session: ChatSession, argument: str) -> str:
    if argument:
        session.system = argument
    return f"System message: {session.system or 'none'}"


def _set(session: ChatSession, argument: str) -> str:
    if not argument:
        return _settings(session)
    name, _, text = argument.partition(" ")
    name, value = typed(name, text)
    if value is None or name == "n_ctx":
        raise ParameterError("Write /set NAME VALUE, such as /set temp 0.2; n_ctx is for the start, with -c.")
    if name == "context_overflow":
        session.conversation.on_overflow = overflow_mode(value)
    else:
        session.conversation.options[name] = value
    return f"{'n_predict' if name == 'max_tokens' else name} = {value}"


def _show(session: ChatSession, argument: str) -> str:
    left_out = session.conversation.left_out
    said = [message for message in session.conversation.messages if message.role != "system"]
    return fields(
        (
            ("model", session.model),
            ("context", f"{session.conversation.llm.n_ctx} tokens"),
            ("messages", f"{len(said)}, the oldest {left_out} left out of the context" if left_out else len(said)),
            ("when it is full", session.conversation.on_overflow.replace("error", "stop")),
            ("system", session.system or "none"),
            ("settings", _settings(session)),
        )
    )


def _settings(session: ChatSession) -> str:
    options = session.conversation.options
    given = [f"{name} = {options[name]}" for name in BY_FIELD if name in options]
    if options["max_tokens"] >= 0:
        given.append(f"n_predict = {options['max_tokens']}")
    known = ", ".join(BY_FIELD)
    return "\n".join(given) if given else f"the model's own. /set changes n_predict, context_overflow, {known}."


def _save(session: ChatSession, argument: str) -> str:
    path = _path(argument, "/save FILE")
    session.save(path)
    return f"{path}: {len(session.conversation.messages)} messages."


def _load(session: ChatSession, argument: str) -> str:
    path = _path(argument, "/load FILE")
    session.load(path)
    return f"{path}: {len(session.conversation.messages)} messages."


def _stats(session: ChatSession, argument: str) -> str:
    return timing_block(session.last, session.conversation.llm.n_ctx) if session.last else "There is no answer yet."


def _help(session: ChatSession, argument: str) -> str:
    rows = [(command.usage, command.help) for command in COMMANDS.values()]
    rows += [
        ('"""', "A message of several lines, up to the next three quotes; or end a line with \\."),
        ("Ctrl-C", "Stop the answer; once more to leave."),
    ]
    return fields(rows)


COMMANDS = Commands(
    (
        Command("exit", "", "Leave. Ctrl-D and /bye do it too.", _exit),
        Command("regen", "", "Another answer to the last message.", _regenerate),
        Command("clear", "", "Forget the conversation; the system message stays.", _clear),
        Command("read", "FILE", "Send a text file with the next message.", _read),
        Command("system", "[TEXT]", "Show or change the system message.", _system),
        Command("set", "[PARAM VALUE]", "Show or change a sampling parameter, such as /set temp 0.2.", _set),
        Command("show", "", "The model and the settings.", _show),
        Command("save", "FILE", "Write the conversation to a file.", _save),
        Command("load", "FILE", "Go on with a conversation from a file.", _load),
        Command("stats", "", "Counts and times of the last answer.", _stats),
        Command("help", "", "This list.", _help),
    ),
    {"bye": "exit", "quit": "exit", "q": "exit", "?": "help", "regenerate": "regen"},
)


def _path(argument: str, usage: str) -> Path:
    if not argument:
        raise ParameterError(f"which file? Write {usage}.")
    return line_path(argument)
