"""A model that needs no file: it repeats what it was told, word by word. For tests of the command line.

Run as a program it is the command line with this model behind every name, for tests in a terminal of their own.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import edgellm
from edgellm.conversation import Conversation
from edgellm.engine.requests import Timings
from edgellm.generation import GenerationChunk

WORD_S = 0.02  # of an endless answer


class FakeLLM:
    """Answers "echo: <last message>"; to a message with the word "forever" it never stops talking.

    requests   (prompt, options) of every call of ``stream``
    fail       an exception to raise in place of the next answer
    on_chunk   called with the number of each chunk before it is given
    """

    n_ctx = 64
    chat_template = "a template"

    def __init__(self, load_options: dict[str, Any] | None = None) -> None:
        self.load_options = load_options or {}
        self.requests: list[tuple[Any, dict[str, Any]]] = []
        self.fail: Exception | None = None
        self.on_chunk: Callable[[int], None] = lambda i: None
        self.closed = False

    def stream(self, prompt: Any, **options: Any) -> Iterator[GenerationChunk]:
        cancel, progress = options.pop("cancel"), options.pop("progress")
        messages = prompt if isinstance(prompt, str) else [as_dict(message) for message in prompt]
        self.requests.append((messages, options))
        if self.fail is not None:
            failure, self.fail = self.fail, None
            raise failure
        text = prompt if isinstance(prompt, str) else messages[-1]["content"]
        return self._chunks(text, cancel, progress, options.get("max_tokens", -1))

    def _chunks(self, text: str, cancel: Any, progress: Any, limit: int) -> Iterator[GenerationChunk]:
        words = ["echo:", *text.split(" ")]
        if "forever" in text:
            words += ["on"] * 100_000
        progress(len(words), len(words))
        reason = "stop"
        for i, word in enumerate(words):
            self.on_chunk(i)
            if cancel.is_set():
                reason = "cancelled"
                break
            if 0 <= limit <= i:
                reason = "length"
                break
            if "forever" in text:
                time.sleep(WORD_S)
            yield GenerationChunk(word if i == 0 else f" {word}", i, None, None, timings(len(words), i + 1))
        yield GenerationChunk("", None, None, reason, timings(len(words), i + 1))  # type: ignore[arg-type]

    def prompt_ids(self, messages: Any, **options: Any) -> list[int]:
        return [0 for message in messages for _ in f"role {as_dict(message)['content']}".split()]

    def conversation(self, system: str | None = None, **options: Any) -> Conversation:
        return Conversation(self, system, options)  # type: ignore[arg-type]

    def close(self) -> None:
        self.closed = True

    def __enter__(self) -> FakeLLM:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def as_dict(message: Any) -> dict[str, Any]:
    """A message as role and content."""
    plain = message if isinstance(message, dict) else message.to_dict()
    return {"role": plain["role"], "content": plain["content"]}


def timings(n_prompt: int, n_made: int) -> Timings:
    """Plausible counts and times."""
    return Timings(n_prompt, 1, 10.0, n_made, 5.0 * n_made, 12.0)


def load(name: Any, progress: Any = None, **options: Any) -> FakeLLM:
    """In place of ``edgellm.load``."""
    return FakeLLM({"name": str(name), **options})


if __name__ == "__main__":
    edgellm.load = load  # type: ignore[assignment]
    from edgellm.cli import main

    sys.exit(main())
