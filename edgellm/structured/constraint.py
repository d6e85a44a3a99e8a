"""One answer on its way through a grammar: the ``TokenMask`` that sampler and engine ask.

Everything that walks the vocabulary runs on the trie's thread, where llguidance lets go of the interpreter: the mask of
the next position is worked out while the executor computes its logits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

from edgellm.formats.errors import EdgeLLMError
from edgellm.sampling.mask import AllowedTokens
from edgellm.structured.start import Start
from edgellm.structured.token_trie import TokenTrie


class Constraint:
    """Follows one answer; see ``TokenMask``. Not shared between threads.

    A forced token is one that the grammar's next bytes are certain to become. Where there are such, they alone are
    allowed, so an answer has the same tokens whether they are sampled or put in.

    matcher   llguidance's, at the beginning of the grammar
    start     where the grammar begins; None: with the first token
    """

    def __init__(self, trie: TokenTrie, matcher: Any, start: Start | None = None) -> None:
        self._trie, self._matcher, self._start = trie, matcher, start
        self._tail = b""  # the end of what has come before the grammar begins
        self._forced: deque[int] = deque()
        self._masks: deque[AllowedTokens] = deque()  # of the next position, and behind the first tokens of ``_draft``
        self._draft: deque[int] = deque()
        self._job: Future[list[AllowedTokens]] | None = None
        if start is None:
            self._look_ahead()

    @property
    def complete(self) -> bool:
        """See ``TokenMask``."""
        if self._start is not None:
            return False
        self._settle()
        return bool(self._matcher.is_stopped())

    def prepare(self, draft: Sequence[int] = ()) -> int:
        """See ``TokenMask``."""
        if self._start is not None:
            return self._n_free(draft)
        if not draft:
            if self._job is None and not self._masks and not self._forced:
                self._job = self._trie.threads.submit(self._compute, ())
            return 0
        self._settle()
        n = int(self._matcher.validate_tokens(list(draft)))
        self._masks.clear()
        self._draft = deque(draft[:n])
        self._job = self._trie.threads.submit(self._compute, tuple(draft[:n]))
        return n

    def allowed(self) -> AllowedTokens | None:
        """See ``TokenMask``."""
        if self._start is not None:
            return self._start.allowed(self._tail)
        if self._forced:
            return AllowedTokens.only(self._forced[0], self._trie.n_vocab)
        self._settle()
        if not self._masks:
            self._masks.extend(self._compute(()))
        return self._masks[0]

    def forced(self) -> int | None:
        """See ``TokenMask``."""
        return self._forced[0] if self._forced else None

    def accept(self, token: int) -> None:
        """See ``TokenMask``."""
        if self._start is not None:
            self._accept_free(self._start, token)
            return
        self._settle()
        self._matcher.consume_token(token)
        self._check()
        if self._masks:
            self._masks.popleft()
        if not self._draft or self._draft.popleft() != token:
            self._draft.clear()
            self._masks.clear()
        if self._forced:
            self._forced.popleft()
        if not self._forced:
            self._look_ahead()

    # -- before the grammar begins ---------------------------------------------------------------------------------

    def _accept_free(self, start: Start, token: int) -> None:
        self._tail, behind = start.after(self._tail, self._trie.pieces[token])
        if behind is None or token in self._trie.eog_ids:
            return
        if behind:
            self._matcher.consume_token(self._trie.ids[behind])  # ``allowed`` has seen to it that this is one
            self._check()
        self._start = None
        self._look_ahead()

    def _n_free(self, draft: Sequence[int]) -> int:
        """How many tokens of a draft may come, at most to where the grammar begins."""
        assert self._start is not None
        tail = self._tail
        for n, token in enumerate(draft):
            allowed = self._start.allowed(tail)
            if allowed is not None and not allowed.flags[token]:
                return n
            tail, behind = self._start.after(tail, self._trie.pieces[token])
            if behind is not None:
                return n + 1
        return len(draft)

    # -- on the matcher --------------------------------------------------------------------------------------------

    def _look_ahead(self) -> None:
        if not self._matcher.is_stopped():
            self._forced.extend(self._matcher.compute_ff_tokens())
            self._check()

    def _settle(self) -> None:
        """Wait until nothing else uses the matcher."""
        if self._job is not None:
            job, self._job = self._job, None
            self._masks.extend(job.result())

    def _compute(self, draft: Sequence[int]) -> list[AllowedTokens]:
        """What may come next, and behind each of these tokens; the matcher stays where it was."""
        masks, n = [self._mask()], 0
        for token in draft:
            if not self._matcher.consume_token(token) or self._matcher.is_stopped():
                n += not self._matcher.is_error()
                break
            n += 1
            masks.append(self._mask())
        if n:
            self._matcher.rollback(n)
        self._check()
        return masks

    def _mask(self) -> AllowedTokens:
        bits = self._matcher.compute_bitmask()
        self._check()
        return AllowedTokens.of_bits(bits, self._trie.n_vocab)

    def _check(self) -> None:
        if self._matcher.is_error():
            raise EdgeLLMError(
                f"The answer cannot be kept to its grammar any further: {reason(self._matcher)}. Use another.",
                code="GRAMMAR_LIMIT",
            )


def reason(matcher: Any) -> str:
    """What is wrong, in llguidance's words; "NoExtension..." is its word for a grammar that nothing fits."""
    text = matcher.get_error().replace("<non-verbose/>", "").strip()
    return "nothing can fit it" if text.startswith("NoExtension") else text.replace("\n", " ")
