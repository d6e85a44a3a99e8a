"""Which layers of a model see a window: the key ``attention.sliding_window_pattern``, a period or a flag for each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from edgellm.formats.model_file import ModelFile
from edgellm.models.parts.hparams import hparam_error, integer, key_of

KEY = "attention.sliding_window_pattern"


def local_layers(
    gguf: ModelFile, n_layer: int, period: int, *, global_first: bool = False, n_drafts: int = 0
) -> list[bool]:
    """Which layers slide: all but one of ``period`` where the file does not say another one, or its own array.

    global_first   the first of them is the one that does not, else the last
    n_drafts       blocks behind the layers, which the array may leave out
    """
    pattern = gguf.metadata.get(key_of(gguf, KEY))
    if isinstance(pattern, np.ndarray):
        if pattern.shape not in ((n_layer,), (n_layer + n_drafts,)):
            raise hparam_error(gguf, KEY, f"an array of {pattern.size}", f"one value for each of {n_layer} layers")
        return [bool(local) for local in pattern[:n_layer]]
    period = integer(gguf, KEY, period, least=1)
    return sliding_by(period, n_layer, global_first=global_first)


def sliding_by(period: int, n_layer: int, *, global_first: bool) -> list[bool]:
    """One of so many layers does not slide."""
    return [(i + (not global_first)) % period != 0 for i in range(n_layer)]


def layers_read(gguf: ModelFile, kinds: Sequence[str], n_shared: int) -> list[int]:
    """Whose keys each layer reads: its own, or for the last ``n_shared`` those of the last of its kind before them.

    FormatError where there is none.
    """
    last = {kind: i for i, kind in enumerate(kinds[: max(len(kinds) - n_shared, 0)])}
    for i, kind in enumerate(kinds):
        if kind not in last:
            expected = f"a layer before them of the kind of layer {i}"
            raise hparam_error(gguf, "attention.shared_kv_layers", n_shared, expected)
    return [min(i, last[kind]) for i, kind in enumerate(kinds)]


def pattern_metadata(sliding: Sequence[bool], *, global_first: bool) -> tuple[Any, str]:
    """The key's value: the period, where there is one, else a flag for every layer."""
    for period in range(1, len(sliding) + 2):
        if list(sliding) == sliding_by(period, len(sliding), global_first=global_first):
            return period, "UINT32"
    return np.array(sliding), "ARRAY[BOOL]"
