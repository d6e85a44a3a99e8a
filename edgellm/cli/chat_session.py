"""What a chat adds to a conversation: files read into it, another answer, the file it is kept in."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgellm.cli.answer import Answer, stream_answer
from edgellm.formats.errors import FormatError, ParameterError
from edgellm.formats.json_text import parse_json
from edgellm.formats.text_file import read_text
from edgellm.machine.atomic import whole_file

if TYPE_CHECKING:
    from edgellm.chat_template import Message
    from edgellm.conversation import Conversation

FORMAT, VERSION = "edgellm-chat", 1
ROLES = ("system", "user", "assistant")


@dataclass
class ChatSession:
    """Changed by one user, one turn at a time.

    model          the name it was asked for by
    conversation   the messages so far, and the options of every turn
    attachments    texts of files that go with the next message: (name, text)
    last           the last answer, with its timings
    """

    model: str
    conversation: Conversation
    attachments: list[tuple[str, str]] = field(default_factory=list)
    last: Answer | None = None
    n_regenerated: int = 0

    def ask(self, text: str, write: Callable[[str], None]) -> Answer:
        """Answer one more message. After an error, or stopped before a word, all is as if it had not been asked."""
        parts = [f"{name}:\n```\n{content}\n```" for name, content in self.attachments]
        self.n_regenerated = 0
        answer = self._answer("\n\n".join([*parts, text]), write, list(self.conversation.messages))
        if answer.text or not answer.stopped:
            self.attachments = []
        return answer

    def regenerate(self, write: Callable[[str], None]) -> Answer:
        """Answer the last message once more, with the next seed where one is set. An error, or a stop before a word,
        leaves the answer that is there."""
        before = list(self.conversation.messages)
        message = self.conversation.undo()
        if message is None:
            raise ParameterError("There is no message to answer again. Write one first.")
        self.n_regenerated += 1
        return self._answer(str(message.content), write, before)

    def summarize(self, write: Callable[[str], None]) -> Answer:
        """Go on from a summary that the model makes of what was said; stopped, nothing is changed."""
        self.last = stream_answer(self.conversation.summarizing, write)
        return self.last

    def clear(self) -> None:
        """Forget what was said; the system message stays."""
        self.conversation.clear()
        self.attachments, self.last = [], None

    @property
    def system(self) -> str | None:
        """The system message."""
        return next((str(message.content) for message in self.conversation.messages if message.role == "system"), None)

    @system.setter
    def system(self, text: str) -> None:
        from edgellm.chat_template import Message

        rest = [message for message in self.conversation.messages if message.role != "system"]
        self.conversation.messages = [Message("system", text), *rest]

    def save(self, path: Path) -> None:
        """Write the conversation as JSON, whole or not at all."""
        record = {
            "format": FORMAT,
            "version": VERSION,
            "model": self.model,
            "messages": [{"role": message.role, "content": message.content} for message in self.conversation.messages],
        }
        with whole_file(path, private=True) as file:
            file.write(json.dumps(record, ensure_ascii=False, indent=1).encode())

    def load(self, path: Path) -> None:
        """Take the messages of a saved conversation in place of these. FormatError for any other file."""
        from edgellm.chat_template import Message

        record = parse_json(read_text(path), str(path), "CHAT_FILE", advice="Expected a conversation that /save wrote.")
        messages = record.get("messages") if isinstance(record, dict) and record.get("format") == FORMAT else None
        if not isinstance(messages, list) or not all(_is_message(message) for message in messages):
            raise FormatError(f"{path}: not a conversation that /save wrote.", code="CHAT_FILE")
        self.conversation.messages = [Message(message["role"], message["content"]) for message in messages]
        self.conversation.left_out = 0
        self.attachments, self.last = [], None

    def _answer(self, text: str, write: Callable[[str], None], before: list[Message]) -> Answer:
        """``before`` are the messages to go back to where nothing comes of it: roles must go on taking turns."""
        seed = self.conversation.options.get("seed", -1)
        options = {"seed": seed + self.n_regenerated} if seed >= 0 else {}
        try:
            self.last = stream_answer(lambda **live: self.conversation.stream(text, **options, **live), write)
        except BaseException:
            self.conversation.messages = before
            raise
        if self.last.stopped and not self.last.text:
            self.conversation.messages = before
        return self.last


def overflow_mode(way: str) -> str:
    """The setting ``context_overflow`` as a conversation has it."""
    return "error" if way == "stop" else way


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and value.get("role") in ROLES and isinstance(value.get("content"), str)
