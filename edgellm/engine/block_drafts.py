"""A draft of a whole block in one step (DFlash): behind what the model's layers have read, its last token and masks.

Two programs share one cache. One puts the rows of what was read into it, each in the place of its token; the other
reads the block, whose tokens see each other both ways, and leaves nothing that counts. A step costs the same for any
length, so the block is always whole, and as much of it is tried as its chances are worth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from edgellm.engine.cache import KVCache
from edgellm.engine.drafts import batch_of, likeliest
from edgellm.engine.nextn_drafts import GrowingRows, NextnDrafts
from edgellm.engine.speculation import Ask, Draft
from edgellm.kernels.program import Executor, HiddenExecutor


class BlockDrafts(NextnDrafts):
    """The ``DraftSource`` of such a file.

    executor   of the block's program, owned from now on, as are the other two
    keeper     of the one that keeps what was read, in the same cache
    block      tokens of a block, and the id of those that are to come
    ids, tell  see ``NextnDrafts``
    """

    def __init__(
        self,
        executor: HiddenExecutor,
        keeper: Executor,
        kv: KVCache,
        block: tuple[int, int],
        ids: np.ndarray | None = None,
        tell: Callable[[str], None] = lambda line: None,
    ) -> None:
        super().__init__(executor, kv, ids, of_tokens=True, tell=tell)
        self.keeper, (self.n_block, self.mask) = keeper, block
        self.n_beside = self.n_block

    def close(self) -> None:
        """See ``DraftSource``."""
        self.keeper.close()
        super().close()

    def _drafts(self, asked: Sequence[Ask], plain_s: float, row_s: float) -> list[Draft]:
        texts = [self._begin(ask) for ask in asked]
        active = [one for one in texts if one is not None]
        for fitting in self._fitting(active):
            self._keep(fitting)
        most = max(1, self.executor.max_tokens // self.n_block)
        for i in range(0, len(active), most):
            self._draft_blocks(active[i : i + most])
        return [Draft() if one is None else self._finished(one, ask) for one, ask in zip(texts, asked, strict=True)]

    def _fitting(self, active: Sequence[GrowingRows]) -> Iterator[list[GrowingRows]]:
        return super()._fitting(active) if active else iter(())

    def _keep(self, texts: Sequence[GrowingRows]) -> None:
        """Put what was read of the tokens before the last ones into the cache."""
        batch = batch_of([(one, one.ids) for one in texts], [False] * len(texts))
        states = np.stack([state for one in texts for state in one.states])
        self.keeper.run(replace(batch, embeddings=(np.arange(len(batch)), states)))
        for one in texts:
            self.cache.commit(one.sequence, one.ids)
            one.start, one.ids = one.start + len(one.ids), one.ids[-1:]

    def _draft_blocks(self, texts: Sequence[GrowingRows]) -> None:
        """The block behind each text, of which as many tokens are taken as are asked for."""
        n_block = self.n_block
        blocks = [(one, [*one.ids, *[self.mask] * (n_block - 1)]) for one in texts]
        batch = batch_of(blocks, [False] * len(texts))
        outputs = np.array([0 < i <= one.n for one in texts for i in range(n_block)])
        sees = np.repeat([one.start + n_block - 1 for one in texts], n_block).astype(np.int32)
        logits = iter(self.executor.run(replace(batch, outputs=outputs, sees=sees)))
        for one in texts:
            for _ in range(min(one.n, n_block - 1)):
                token, probability = likeliest(next(logits), self.executor.draw)
                one.add(token if self.ids is None else int(self.ids[token]), probability)
