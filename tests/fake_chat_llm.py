"""A model for the full-screen chat that needs no file: it answers by heart, word by word, and knows alternatives.

Its tokens are words with the space before them. What it says follows from the last message alone, so a screen made
with it is the same everywhere.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from typing import Any

from edgellm.engine.requests import Timings
from edgellm.formats.errors import FormatError
from edgellm.generation import GenerationChunk, TokenLogprob
from edgellm.sampling import SamplingParams

WORD_S = 0.005  # of an endless answer
PROMPT_ID = 1  # in front of every prompt
MARKDOWN = """\
Here is **quicksort**, with `pivot` in the middle:

```python
def quicksort(items):
    if len(items) <= 1:
        return items
    pivot = items[len(items) // 2]
    less = [x for x in items if x < pivot]
    return quicksort(less)  # and so on
```

| case | time |
|------|-----:|
| best | n log n |
| worst | n² |

1. It is *fast* in practice.
2. It needs little memory:
   - no copies in place
   - a small stack
"""
OTHERS = {  # what it could have said for a word, the likeliest first
    b"": (b" Rhine", b" Elbe", b" Oder", b" Main", b" Isar"),
    b" flows": (b" runs", b" is", b" crosses", b" passes", b" winds"),
    b" through": (b" across", b" past", b" from", b" into", b" along"),
}
PARTS = (0.5, 0.3, 0.1, 0.06, 0.04)  # of what their word leaves them
ANSWERS = {
    "sort": MARKDOWN,
    "think": "<think>\nThe user asks for a river.\nThe Danube is one.\n</think>\n\nThe **Danube**.",
    "river": "The Danube flows through ten countries, more than any other river.",
    "evil": "\x1b[31mred\x1b]52;c;ZXZpbA==\x07 [bold]markup[/bold] [link=file:///etc/passwd]x[/link] \u202egnirts",
    "forever": "on and " * 50_000,
    "code": "```\nfirst\n```\n\nthen\n\n```sh\nsecond\n```",
}


class FakeTokenizer:
    """Words as tokens; an id for each that was ever seen."""

    def __init__(self) -> None:
        self.words: list[bytes] = [b"", b"<prompt>"]
        self.ids: dict[bytes, int] = {}

    def id_of(self, word: bytes) -> int:
        if word not in self.ids:
            self.ids[word] = len(self.words)
            self.words.append(word)
        return self.ids[word]

    def encode(self, text: str) -> list[int]:
        words, word = [], ""
        for letter in text:
            if letter in " \n" and word.strip():
                words.append(word)
                word = ""
            word += letter
        return [self.id_of(w.encode("utf-8", "surrogatepass")) for w in [*words, word] if w]

    def token_bytes(self, token: int) -> bytes:
        return self.words[token]

    def decode(self, ids: list[int], special: bool = False) -> str:
        return b"".join(self.words[i] for i in ids).decode("utf-8", "replace")


class FakeChatLLM:
    """What the chat needs of an ``LLM``.

    requests   (prompt, options) of every call of ``stream``
    pace       when set, a chunk is given for each ``pace.release()``
    fail       an exception to raise in place of the next answer
    """

    n_ctx = 4096
    chat_template = "a template"

    def __init__(self, name: str = "fake", pace: threading.Semaphore | None = None) -> None:
        self.name = name
        self.tokenizer = FakeTokenizer()
        self.default_params = SamplingParams(min_p=0.1)
        self.requests: list[tuple[Any, dict[str, Any]]] = []
        self.pace = pace
        self.fail: Exception | None = None
        self.restored: list[int] = []
        self.closed = False

    def prompt_ids(self, messages: Any, **options: Any) -> list[int]:
        return [PROMPT_ID, *(token for message in messages for token in self.tokenizer.encode(message["content"]))]

    def tokenize(self, text: str, add_special: bool = True) -> list[int]:
        return self.tokenizer.encode(text)

    def answer_text(self, prompt: list[int], begun: list[int], thoughts: tuple[str, str]) -> str:
        return self.tokenizer.decode(begun)

    def stream(self, prompt: Any, **options: Any) -> Any:
        cancel, progress = options.pop("cancel"), options.pop("progress")
        assert options.pop("thoughts") == ("<think>", "</think>")
        self.requests.append((prompt, options))
        if self.fail is not None:
            failure, self.fail = self.fail, None
            raise failure
        return self._chunks(prompt, cancel, progress, options.get("max_tokens", -1))

    def _chunks(self, prompt: Any, cancel: Any, progress: Any, limit: int) -> Iterator[GenerationChunk]:
        if prompt and isinstance(prompt[0], int):
            text = " and so it went on."
        else:
            asked = prompt[-1]["content"]
            text = next((ANSWERS[key] for key in ANSWERS if key in asked), f"echo: {asked}")
        ids = self.tokenizer.encode(text)
        progress(len(prompt), len(prompt))
        n_made, reason = 0, "stop"
        for token in ids:
            if self.pace is not None:
                while not self.pace.acquire(timeout=0.02):
                    if cancel.is_set():
                        break
            if cancel.is_set():
                reason = "cancelled"
                break
            if 0 <= limit <= n_made:
                reason = "length"
                break
            n_made += 1
            if "on and" in text:
                time.sleep(WORD_S)
            yield GenerationChunk(
                self.tokenizer.words[token].decode("utf-8", "replace"),
                token,
                self.told(token, n_made),
                None,
                times(n_made),
            )
        yield GenerationChunk("", None, None, reason, times(n_made))  # type: ignore[arg-type]

    def told(self, token: int, number: int) -> TokenLogprob:
        """The word, sometimes surely, sometimes as the second choice, with others of which min-p cut some."""
        share = (0.97, 0.55, 0.34, 0.82, 0.25)[number % 5]
        rest = 0.98 - share  # the last 2 % are for words that are not told
        others = OTHERS.get(self.tokenizer.words[token], OTHERS[b""])
        words = [(token, share), *((self.tokenizer.id_of(w), rest * p) for w, p in zip(others, PARTS, strict=True))]
        words.sort(key=lambda pair: -pair[1])
        least = 0.1 * words[0][1]  # what min-p asks of a word
        kept = sum(p for _, p in words if p >= least)
        rows = [
            TokenLogprob(t, self.tokenizer.words[t], math.log(p), (), math.log(p / kept) if p >= least else None,
                         None if p >= least else "min_p")
            for t, p in words
        ]  # fmt: skip
        own = next(row for row in rows if row.token == token)
        return TokenLogprob(token, own.bytes, own.logprob, tuple(rows), own.after, own.cut_by)

    def save_state(self, path: Any, tokens: list[int]) -> int:
        path.write_bytes(bytes(len(tokens)))
        return len(tokens)

    def load_state(self, path: Any) -> list[int]:
        content = path.read_bytes()
        if content.strip(b"\0"):
            raise FormatError(f"{path.name}: its checksum is wrong.", code="KV_FILE")
        self.restored.append(len(content))
        return [0] * len(content)

    def close(self) -> None:
        self.closed = True


def times(n_made: int) -> Timings:
    """Plausible counts and times: 200 tokens a second."""
    return Timings(34, 21, 20.0, n_made, 5.0 * max(n_made - 1, 0), 45.0)
