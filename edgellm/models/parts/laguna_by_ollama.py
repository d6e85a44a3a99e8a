"""Files of Laguna that Ollama's converter wrote: the same numbers under other names than llama.cpp's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from edgellm.formats.errors import UnsupportedError
from edgellm.formats.findings import short
from edgellm.formats.model_file import ModelFile, ModelTensor
from edgellm.models.parts.hparams import file_name, hparam_error, integer, key_of

if TYPE_CHECKING:
    from edgellm.formats.gguf import QuantizedTensor

SIGN = "attention.sink_enabled"
"""A key that this converter always writes, and llama.cpp's never."""
RENAMED = {
    "rope.swa.freq_base": "rope.freq_base_swa",
    "rope.swa.dimension_count": "rope.dimension_count_swa",
    "rope.scaling.beta_fast": "rope.scaling.yarn_beta_fast",
    "rope.scaling.beta_slow": "rope.scaling.yarn_beta_slow",
    "rope.scaling.attn_factor": "rope.scaling.yarn_attn_factor",  # all of the magnitude
}
ONLY: dict[str, tuple[Any, ...]] = {
    SIGN: (False,),
    "attention.gating_type": (1,),  # a gate for each head
    "attention.qk_norm": (True,),
    "decoder_sparse_step": (1,),
    "rope.swa.scaling.type": ("", "default", "linear"),
    "rope.swa.scaling.factor": (1,),
}
SAID_AGAIN = ("attention.layer_types", "rope.partial_rotary_factor", "rope.swa.partial_rotary_factor", "dense_layers")
"""By the pattern of layers that slide, the numbers of dimensions that are rotated, and that of the dense layers."""
UNSCALED = ("", "default")


@dataclass(frozen=True)
class LagunaByOllama:
    """A ``ModelFile`` under llama.cpp's names."""

    path: Path
    architecture: str
    metadata: Mapping[str, Any]
    tensors: Mapping[str, ModelTensor]
    overrides: Mapping[str, Any]


def under_usual_names(gguf: ModelFile) -> ModelFile:
    """The file itself, or one that Ollama's converter wrote as llama.cpp's would be; tensors of gates keep their data.

    UnsupportedError ``MODEL_KEY_UNKNOWN`` for a variant that llama.cpp's form has no place for.
    """
    prefix = gguf.architecture + "."
    if prefix + SIGN not in gguf.metadata:
        return gguf
    found = dict(gguf.metadata)
    for key in (*ONLY, "rope.scaling.type", "rope.scaling.beta_fast", "rope.scaling.beta_slow"):
        if isinstance(value := found.get(prefix + key), np.ndarray):
            raise hparam_error(gguf, key, value, "one value, not an array")
    for key, allowed in ONLY.items():
        if (value := found.pop(prefix + key, allowed[0])) not in allowed:
            raise UnsupportedError(
                f"{file_name(gguf)}: {prefix}{key} is {short(value)}; edgellm runs models of it that have "
                f"{' or '.join(map(repr, allowed))}. Take another model of the architecture.",
                code="MODEL_KEY_UNKNOWN",
            )
    _check_dense_layers(gguf)
    scales = found.get(prefix + "rope.scaling.type", "") not in UNSCALED
    for key in [key for key in found if key.startswith(prefix)]:
        name = key.removeprefix(prefix)
        value = found.pop(key)
        unset = name in ("rope.scaling.beta_fast", "rope.scaling.beta_slow") and not value
        if name in SAID_AGAIN or unset or (name.startswith("rope.scaling.") and not scales):
            continue
        found[prefix + RENAMED.get(name, name)] = value
    n_layer = integer(gguf, "block_count", least=1)
    found.setdefault(key_of(gguf, "attention.sliding_window_pattern"), np.zeros(n_layer, np.bool_))
    tensors = dict(gguf.tensors)
    for name in [name for name in tensors if ".attn_g." in name]:
        usual = name.replace(".attn_g.", ".attn_gate.")
        tensors[usual] = replace(cast("QuantizedTensor", tensors.pop(name)), name=usual)
    return LagunaByOllama(gguf.path, gguf.architecture, found, tensors, gguf.overrides)


def _check_dense_layers(gguf: ModelFile) -> None:
    """FormatError where layers without experts are others than the first ones, which are counted."""
    dense, n = gguf.metadata.get(key_of(gguf, "dense_layers")), integer(gguf, "leading_dense_block_count", 0)
    if dense is not None and list(np.atleast_1d(dense)) != list(range(n)):
        raise hparam_error(gguf, "dense_layers", dense, f"those before leading_dense_block_count, which is {n}")
