"""``/name argument`` as a line of a chat: a table of commands, and how a line is read by it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from edgellm.formats.errors import ParameterError


@dataclass(frozen=True)
class Command:
    """One row. ``run`` gets the chat and the argument; ``key`` is a binding that does the same."""

    name: str
    argument: str
    help: str
    run: Callable[[Any, str], Any]
    key: str = ""

    @property
    def usage(self) -> str:
        """``/name ARGUMENT``."""
        return f"/{self.name} {self.argument}".rstrip()


class Commands(dict[str, Command]):
    """The rows by name, and other names for some of them."""

    def __init__(self, rows: Iterable[Command], aliases: Mapping[str, str]) -> None:
        super().__init__((row.name, row) for row in rows)
        self.aliases = aliases

    def has(self, text: str) -> bool:
        """Whether a message is a command; several lines that begin with a path, which a paste may bring, are none."""
        return text.startswith("/") and ("\n" not in text.strip() or self._named(text)[0] is not None)

    def run(self, chat: Any, line: str) -> Any:
        """Run ``/name argument``. ParameterError for a name that is none."""
        command, name, argument = self._named(line)
        if command is None:
            raise ParameterError(
                f"There is no command /{name}. /help lists them; a space before the / sends it as text."
            )
        return command.run(chat, argument.strip())

    def _named(self, line: str) -> tuple[Command | None, str, str]:
        name, argument = [*line[1:].split(maxsplit=1), "", ""][:2]
        return self.get(self.aliases.get(name, name)), name, argument
