"""A conversation: its messages, its settings, and the file it is kept in. Knows nothing about the terminal."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgellm.cli.answer import Answer, Request, stream_answer
from edgellm.formats.errors import FormatError, ParameterError

if TYPE_CHECKING:
    from edgellm.llm import LLM

FORMAT, VERSION = "edgellm-chat", 1
ROLES = ("system", "user", "assistant")


@dataclass
class ChatSession:
    """Changed by one user, one turn at a time.

    messages     what was said, the system message first where there is one
    attachments  texts of files that go with the next message: (name, text)
    last         the last answer, with its timings
    """

    llm: LLM
    model: str
    sampling: dict[str, Any] = field(default_factory=dict)
    n_predict: int = -1
    stops: tuple[str, ...] = ()
    template_arguments: dict[str, Any] = field(default_factory=dict)
    messages: list[dict[str, Any]] = field(default_factory=list)
    attachments: list[tuple[str, str]] = field(default_factory=list)
    last: Answer | None = None
    n_regenerated: int = 0

    def ask(self, text: str, write: Callable[[str], None]) -> Answer:
        """Answer one more message. On an error the conversation is as it was before."""
        parts = [f"{name}:\n```\n{content}\n```" for name, content in self.attachments]
        self.messages.append({"role": "user", "content": "\n\n".join([*parts, text])})
        try:
            answer = self._answer(write)
        except BaseException:
            self.messages.pop()
            raise
        if answer.stopped and not answer.text:  # as if it had not been asked: roles must go on taking turns
            del self.messages[-2:]
            return answer
        self.attachments, self.n_regenerated = [], 0
        return answer

    def regenerate(self, write: Callable[[str], None]) -> Answer:
        """Answer the last message once more, with the next seed where one is set."""
        if not any(message["role"] == "user" for message in self.messages):
            raise ParameterError("there is no message to answer again.")
        dropped = [self.messages.pop()] if self.messages[-1]["role"] == "assistant" else []
        self.n_regenerated += 1
        try:
            return self._answer(write)
        except BaseException:
            self.messages += dropped
            raise

    def clear(self) -> None:
        """Forget what was said; the system message stays."""
        self.messages = [message for message in self.messages if message["role"] == "system"]
        self.attachments, self.last = [], None

    @property
    def system(self) -> str | None:
        """The system message."""
        return next((message["content"] for message in self.messages if message["role"] == "system"), None)

    @system.setter
    def system(self, text: str | None) -> None:
        rest = [message for message in self.messages if message["role"] != "system"]
        self.messages = [{"role": "system", "content": text}, *rest] if text else rest

    def save(self, path: Path) -> None:
        """Write the conversation as JSON, whole or not at all."""
        record = {
            "format": FORMAT,
            "version": VERSION,
            "model": self.model,
            "messages": self.messages,
            "sampling": {key: value for key, value in self.sampling.items() if not isinstance(value, dict)},
        }
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump(record, file, ensure_ascii=False, indent=1)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise

    def load(self, path: Path) -> None:
        """Take the messages of a saved conversation in place of these. FormatError for any other file."""
        try:
            record = json.loads(path.read_text("utf-8"))
        except ValueError as error:
            raise FormatError(f"{path}: {error}. Expected a conversation that /save wrote.", code="CHAT_FILE") from None
        messages = record.get("messages") if isinstance(record, dict) and record.get("format") == FORMAT else None
        if not isinstance(messages, list) or not all(_is_message(message) for message in messages):
            raise FormatError(f"{path}: not a conversation that /save wrote.", code="CHAT_FILE")
        self.messages = [{"role": message["role"], "content": message["content"]} for message in messages]
        self.attachments, self.last = [], None

    def _answer(self, write: Callable[[str], None]) -> Answer:
        sampling = dict(self.sampling)
        if self.n_regenerated and sampling.get("seed", -1) >= 0:
            sampling["seed"] += self.n_regenerated
        request = Request(self.messages, sampling, self.n_predict, self.stops, self.template_arguments)
        self.last = stream_answer(self.llm, request, write)
        self.messages.append({"role": "assistant", "content": self.last.text})
        return self.last


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and value.get("role") in ROLES and isinstance(value.get("content"), str)
