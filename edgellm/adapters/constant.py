"""An executor all of whose tokens have the same adapters, for whoever runs batches without an engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from edgellm.kernels.program import Batch, Executor, Hook


class WithAdapters:
    """Runs every batch with these scales; all else is the executor's own."""

    def __init__(self, executor: Executor, scales: Sequence[float]) -> None:
        self._executor, self._scales = executor, np.array(scales, np.float32)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._executor, name)

    def run(self, batch: Batch, hook: Hook | None = None) -> np.ndarray:
        """See ``Executor``."""
        return self._executor.run(replace(batch, adapters=np.tile(self._scales, (len(batch), 1))), hook)
