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
from edgellm.structured.token_trie import TokenTrie


class Constraint:
    """Follows one answer; see ``TokenMask``. Not shared between threads.

    A forced token is one that the grammar's next bytes are certain to become. Where there are such, they alone are
    allowed, so an answer has the same tokens whether they are sampled or put in.
    """

    def __init__(self, trie: TokenTrie, matcher: Any) -> None:
        self._trie, self._matcher = trie, matcher
        self._forced: deque[int] = deque(matcher.compute_ff_tokens())
        self._masks: deque[AllowedTokens] = deque()  # of the next position, and behind the first tokens of ``_draft``
        self._draft: deque[int] = deque()
        self._job: Future[list[AllowedTokens]] | None = None

    @property
    def complete(self) -> bool:
        """See ``TokenMask``."""
        self._settle()
        return bool(self._matcher.is_stopped())

    def prepare(self, draft: Sequence[int] = ()) -> int:
        """See ``TokenMask``."""
        if not draft:
            if self._job is None and not self._masks:
                self._job = self._trie.threads.submit(self._compute, ())
            return 0
        self._settle()
        n = int(self._matcher.validate_tokens(list(draft)))
        self._masks.clear()
        self._draft = deque(draft[:n])
        self._job = self._trie.threads.submit(self._compute, tuple(draft[:n]))
        return n

    def allowed(self) -> AllowedTokens:
        """See ``TokenMask``."""
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
        if not self._forced and not self._matcher.is_stopped():
            self._forced.extend(self._matcher.compute_ff_tokens())

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
                break
            n += 1
            masks.append(self._mask())
        if n:
            self._matcher.rollback(n)
        return masks

    def _mask(self) -> AllowedTokens:
        bits = self._matcher.compute_bitmask()
        self._check()
        return AllowedTokens.of_bits(bits, self._trie.n_vocab)

    def _check(self) -> None:
        if self._matcher.is_error():
            raise EdgeLLMError(f"The grammar cannot be followed any further: {self._matcher.get_error()}")
