"""How a draft model reads the text of a model: by the same ids where their vocabularies agree, else by the text.

Two files of one family have one vocabulary, but for a few ids at the end and the names of marks. Any other draft model
gets the text: whole words are in its own ids once for all, the last word anew each time, and what it drafts comes back
as text too. A text without spaces is cut where both sides have the ids apart that they have together. That costs some
drafts and never an answer, which the large model alone decides.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from edgellm.engine.draft_model import Reading, SameIds
from edgellm.tokenizer import Tokenizer
from edgellm.tokenizer.vocabulary import TokenType

LEAST_SHARED = 0.9  # of the larger vocabulary, for ids that are the same
MAX_END = 64  # tokens of a text without words, which are encoded again for each draft
CUTS = range(16, 32)  # tokens from the end of such a text, behind which it may be cut


class _Text(NamedTuple):
    text: str
    special: bool


def reading_of(tokenizer: Tokenizer, draft: Tokenizer, n_vocab: int, n_draft_vocab: int) -> Callable[[], Reading]:
    """Makes what reads a text of one model for the other; the models compute logits for so many ids."""
    if have_same_ids(tokenizer, draft):
        return partial(SameIds, min(n_vocab, n_draft_vocab, tokenizer.n_vocab, draft.n_vocab))
    return partial(TextReading, tokenizer, draft)


def have_same_ids(one: Tokenizer, other: Tokenizer) -> bool:
    """Whether two vocabularies have the same text for every id that both have, marks left out."""
    a, b = one.vocabulary, other.vocabulary
    shared = min(len(a.tokens), len(b.tokens))
    if one.kind != other.kind or shared < LEAST_SHARED * max(len(a.tokens), len(b.tokens)):
        return False
    if a.tokens[:shared] == b.tokens[:shared]:
        return True
    texts = (TokenType.NORMAL, TokenType.BYTE)
    both = zip(a.tokens[:shared], b.tokens[:shared], a.types.tolist(), b.types.tolist(), strict=False)
    return not any(x != y and (s in texts or t in texts) for x, y, s, t in both)


class TextReading:
    """The ``Reading`` of a draft model with a vocabulary of its own."""

    def __init__(self, tokenizer: Tokenizer, draft: Tokenizer) -> None:
        self.tokenizer, self.draft = tokenizer, draft
        probe = draft.encode("a", False)
        self._adds_space = bool(probe) and draft.token_bytes(probe[0]).startswith(b" ")
        self._words: list[int] = []  # in the draft model's ids
        self._n_done = 0  # tokens that are in them
        self._end: Sequence[int] = ()  # the tokens behind those
        self._max_end = MAX_END

    def read(self, tokens: Sequence[int]) -> tuple[Sequence[int], int] | None:
        """See ``Reading``."""
        if not self._words:
            self._words = list(self.draft.special.prefix)
            prefix = self.tokenizer.special.prefix
            self._n_done = len(prefix) if tuple(tokens[: len(prefix)]) == tuple(prefix) else 0
        last = len(tokens) - 1
        while last > self._n_done and not self._begins_word(tokens[last]):
            last -= 1
        if last > self._n_done:
            self._words += self._ids(tokens[self._n_done : last])
            self._n_done = last
        self._end = tokens[self._n_done :]
        end = self._ids(self._end)
        if len(self._end) > self._max_end:
            end = self._cut(end)
        ids = [*self._words, *end]
        return (ids, len(self._words)) if ids else None

    def write(self, draft: Sequence[int]) -> list[int]:
        """See ``Reading``."""
        n = next((i for i, token in enumerate(draft) if self.draft.is_control(token)), len(draft))
        more = b"".join(map(self.draft.token_bytes, draft[:n]))
        known = b"".join(map(self.tokenizer.token_bytes, self._end))
        text = _whole(known + more)
        ids = self.tokenizer.encode(text, False)
        if ids[: len(self._end)] == list(self._end):
            return ids[len(self._end) :]
        return self.tokenizer.encode(_whole(more), False)

    def _cut(self, ids: list[int]) -> list[int]:
        """Take what stands before a cut into the words; ``ids`` are those of the end, what is left of them comes back.

        Where there is none it is looked for again when the end is twice as long.
        """
        for n in CUTS:
            first, last = self._ids(self._end[:-n]), self._ids(self._end[-n:])
            if [*first, *last] == ids:
                self._words += first
                self._n_done += len(self._end) - n
                self._end, self._max_end = self._end[-n:], MAX_END
                return last
        self._max_end = 2 * len(self._end)
        return ids

    def _begins_word(self, token: int) -> bool:
        return self.tokenizer.is_control(token) or self.tokenizer.token_bytes(token)[:1] in (b" ", b"\n")

    def _ids(self, tokens: Sequence[int]) -> list[int]:
        """These tokens in the draft model's ids; marks are marks where it has one of that name."""
        segments: list[_Text] = []
        plain: list[bytes] = []

        def flush() -> None:
            if text := _whole(b"".join(plain)):
                # a space that the draft model's tokenizer puts before a text stands there already
                segments.append(_Text(text.removeprefix(" ") if self._adds_space else text, special=False))
            plain.clear()

        for token in tokens:
            if not self.tokenizer.is_control(token):
                plain.append(self.tokenizer.token_bytes(token))
                continue
            flush()
            segments.append(_Text(self.tokenizer.token_bytes(token).decode("utf-8", "replace"), special=True))
        flush()
        return self.draft.encode_segments(segments, False)


def _whole(data: bytes) -> str:
    """The text of bytes, without a character at the end that is not whole yet."""
    return codecs.getincrementaldecoder("utf-8")("replace").decode(data)
