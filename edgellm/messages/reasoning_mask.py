"""A form of an answer begins behind the reasoning, and reasoning may have a budget.

``ReasoningMask`` stands before another mask. It lets the reasoning pass, whether the prompt has opened it or the model
does so itself, ends it when its tokens are spent, and hands over to the other mask where the answer begins.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from edgellm.messages.shapes import Pair
from edgellm.sampling.mask import AllowedTokens, TokenMask

if TYPE_CHECKING:
    from edgellm.tokenizer import Tokenizer

MAX_BLANKS = 2  # tokens between the reasoning and the answer


class ReasoningMask:
    """See ``TokenMask``. Not shared between threads.

    pair     the markers of the reasoning
    inner    the mask of what follows; None where all may
    opened   the prompt ends inside the reasoning
    budget   tokens of reasoning at most, None without limit
    """

    def __init__(
        self, tokenizer: Tokenizer, pair: Pair, inner: TokenMask | None, *, opened: bool, budget: int | None = None
    ) -> None:
        self._tokenizer, self._inner, self._budget = tokenizer, inner, budget
        self._close = pair.close.strip().encode()
        self._close_ids = tokenizer.encode(pair.close, False, parse_special=True)
        opening = tokenizer.encode(pair.open.strip(), False, parse_special=True)
        self._opening = opening if opening and opening[0] in tokenizer.mark_ids else []
        self._n_opening = 0  # tokens of it that have come
        self._must_open = False  # the first of them could begin nothing else
        self._blanks = {token for text in ("\n", "\n\n", " ") if (token := single(tokenizer, text)) is not None}
        self._inside, self._may_open, self._begun = opened, not opened and bool(self._opening), False
        self._n = self._n_blanks = 0
        self._tail = b""
        self._ending: deque[int] = deque()  # tokens that end the reasoning, to be put in
        self._crossing: dict[bytes, list[int]] = {}

    @property
    def complete(self) -> bool:
        """See ``TokenMask``."""
        return self._begun and self._inner is not None and self._inner.complete

    def prepare(self, draft: Sequence[int] = ()) -> int:
        """See ``TokenMask``."""
        if self._inside or self._ending or not self._begun:
            if self._inner is not None and not draft and not self._inside:
                self._inner.prepare()
            return 0
        return self._inner.prepare(draft) if self._inner is not None else len(draft)

    def allowed(self) -> AllowedTokens | None:
        """See ``TokenMask``."""
        if self._ending:
            return AllowedTokens.only(self._ending[0], self._tokenizer.n_vocab)
        if self._inside:
            return self._allowed_inside()
        if self._must_open and self._may_open:
            return AllowedTokens.only(self._opening[self._n_opening], self._tokenizer.n_vocab)
        found = self._inner.allowed() if self._inner is not None else None
        if found is None or self._begun:
            return found
        flags = found.flags.copy()
        if self._may_open:
            flags[self._opening[0]] = True
        elif self._n_blanks < MAX_BLANKS:
            flags[list(self._blanks)] = True
        return AllowedTokens(None, flags)

    def forced(self) -> int | None:
        """See ``TokenMask``."""
        if self._ending:
            return self._ending[0]
        return self._inner.forced() if self._begun and self._inner is not None else None

    def accept(self, token: int) -> None:
        """See ``TokenMask``."""
        if self._inside:
            self._accept_inside(token)
        elif self._opens(token):
            self._n_opening += 1
            self._inside = self._n_opening == len(self._opening)
            self._may_open = not self._inside
        elif not self._begun and self._is_blank(token):
            self._n_blanks += 1
        else:
            if self._inner is not None:
                for begun in self._opening[: self._n_opening] if self._may_open else ():  # of another mark
                    self._inner.accept(begun)
                self._inner.accept(token)
            self._begun, self._may_open = True, False

    def _opens(self, token: int) -> bool:
        """Whether it is the next of the marker that opens the reasoning. An answer may begin as the marker does."""
        if not self._may_open or token != self._opening[self._n_opening]:
            return False
        if self._n_opening == 0 and len(self._opening) > 1 and self._inner is not None:
            found = self._inner.allowed()
            if found is not None and found.flags[token]:
                return False
            self._must_open = found is not None
        return True

    def _is_blank(self, token: int) -> bool:
        """Whether it stands between reasoning and answer and is no part of either."""
        if token not in self._blanks or self._n_blanks >= MAX_BLANKS or self._inner is None:
            return False
        found = self._inner.allowed()
        return found is not None and not found.flags[token]

    def _accept_inside(self, token: int) -> None:
        self._n += 1
        if self._ending:
            self._ending.popleft()
            self._inside = bool(self._ending)
            return
        seen = self._tail + self._tokenizer.token_bytes(token)
        self._tail = seen[-len(self._close) :]
        if self._close in seen:
            self._inside = False
        elif self._budget is not None and self._n >= self._budget:
            self._ending.extend(self._close_ids)

    def _allowed_inside(self) -> AllowedTokens | None:
        """All tokens; where something must follow, none that ends the answer, or is reasoning and answer in one."""
        if self._inner is None:
            return None
        flags = np.ones(self._tokenizer.n_vocab, bool)
        flags[list(self._tokenizer.eog_ids)] = False
        for n in range(1, len(self._close)):
            if self._tail.endswith(self._close[:n]):
                flags[self._crosses(self._close[n:])] = False
        return AllowedTokens(None, flags)

    def _crosses(self, rest: bytes) -> list[int]:
        """The tokens that end the marker, of which ``rest`` is missing, and go on with what is no blank."""
        if rest not in self._crossing:
            pieces = ((token, self._tokenizer.token_bytes(token)) for token in range(self._tokenizer.n_vocab))
            self._crossing[rest] = [
                token for token, piece in pieces if piece.startswith(rest) and piece[len(rest) :].strip()
            ]
        return self._crossing[rest]


def single(tokenizer: Tokenizer, text: str) -> int | None:
    """The one token of a text, if it is one."""
    ids = tokenizer.encode(text, False)
    return ids[0] if len(ids) == 1 else None
