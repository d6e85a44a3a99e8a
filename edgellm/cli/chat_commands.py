"""The commands of a chat: one row each. A command gets the session and the rest of its line, and gives text to show."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edgellm.cli.answer import timing_block
from edgellm.cli.chat_session import ChatSession, overflow_mode
from edgellm.formats.errors import ParameterError
from edgellm.formats.text_file import read_text
from edgellm.machine.paths import line_path
from edgellm.machine.terminal import fields
from edgellm.sampling.options import BY_FIELD, parse_setting
from edgellm.sessions.settings import checked

MAX_READ_NBYTES = 16 << 20


class LeaveChat(Exception):
    """The user has said goodbye."""


class AnswerAgain(Exception):
    """The user wants another answer to the last message."""


@dataclass(frozen=True)
class ChatCommand:
    """``/name argument``."""

    name: str
    argument: str
    help: str
    run: Callable[[ChatSession, str], str]


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
    if name.lstrip("-") in ("n", "predict", "n-predict", "n_predict"):
        try:
            session.conversation.options["max_tokens"] = max(int(text), -1)
        except ValueError:
            raise ParameterError(f"n is {text!r}; it takes a number of tokens, -1 for no limit.") from None
        return f"n_predict = {session.conversation.options['max_tokens']}"
    if name == "context_overflow":
        way = checked(name, text.strip())
        session.conversation.on_overflow = overflow_mode(way)
        return f"{name} = {way}"
    field, value = parse_setting(name, text.strip())
    session.conversation.llm.params(**{field: value})  # a value out of range ends here
    session.conversation.options[field] = value
    return f"{field} = {value}"


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
    rows = [(f"/{command.name} {command.argument}".rstrip(), command.help) for command in COMMANDS.values()]
    rows += [
        ('"""', "A message of several lines, up to the next three quotes; or end a line with \\."),
        ("Ctrl-C", "Stop the answer; once more to leave."),
    ]
    return fields(rows)


COMMANDS = {
    command.name: command
    for command in (
        ChatCommand("exit", "", "Leave. Ctrl-D and /bye do it too.", _exit),
        ChatCommand("regen", "", "Another answer to the last message.", _regenerate),
        ChatCommand("clear", "", "Forget the conversation; the system message stays.", _clear),
        ChatCommand("read", "FILE", "Send a text file with the next message.", _read),
        ChatCommand("system", "[TEXT]", "Show or change the system message.", _system),
        ChatCommand("set", "[PARAM VALUE]", "Show or change a sampling parameter, such as /set temp 0.2.", _set),
        ChatCommand("show", "", "The model and the settings.", _show),
        ChatCommand("save", "FILE", "Write the conversation to a file.", _save),
        ChatCommand("load", "FILE", "Go on with a conversation from a file.", _load),
        ChatCommand("stats", "", "Counts and times of the last answer.", _stats),
        ChatCommand("help", "", "This list.", _help),
    )
}
ALIASES = {"bye": "exit", "quit": "exit", "q": "exit", "?": "help", "regenerate": "regen"}


def is_command(text: str) -> bool:
    """Whether a message is a command; several lines that begin with a path, which a paste may bring, are none."""
    name = text[1:].split(maxsplit=1)[:1]
    return text.startswith("/") and ("\n" not in text or (name[:1] != [] and ALIASES.get(name[0], name[0]) in COMMANDS))


def run_command(session: ChatSession, line: str) -> str:
    """Run ``/name argument``; ParameterError for a name that is none."""
    name, argument = [*line[1:].split(maxsplit=1), "", ""][:2]
    command = COMMANDS.get(ALIASES.get(name, name))
    if command is None:
        raise ParameterError(f"there is no command /{name}. /help lists them; a space before the / sends it as text.")
    return command.run(session, argument.strip())


def _path(argument: str, usage: str) -> Path:
    if not argument:
        raise ParameterError(f"which file? Write {usage}.")
    return line_path(argument)
