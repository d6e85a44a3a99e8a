"""What an architecture reads of a model, be it an open GGUF file or one that is still to be written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np


class ModelTensor(Protocol):
    """A tensor: its shape, outermost dimension first, and its float32 values."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def dequantize(self) -> np.ndarray: ...


class ModelFile(Protocol):
    """Metadata and tensors under their GGUF names. ``overrides``: the metadata values that the caller gave."""

    @property
    def path(self) -> Path: ...

    @property
    def architecture(self) -> str: ...

    @property
    def metadata(self) -> Mapping[str, Any]: ...

    @property
    def tensors(self) -> Mapping[str, ModelTensor]: ...

    @property
    def overrides(self) -> Mapping[str, Any]: ...
