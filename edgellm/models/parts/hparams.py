"""The numbers that a model file gives about itself, read by their GGUF keys and held to formats/hparam_checks.py.

What a program needs beyond a range is checked here, before anything is computed from it; shapes of tensors are compared
with these numbers in ``blocks``. Keys are written without the architecture: ``block_count`` is ``llama.block_count`` in
a llama file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from edgellm.formats.errors import EdgeLLMError, FormatError, UnsupportedError
from edgellm.formats.findings import override_error, short
from edgellm.formats.hparam_checks import RANGES
from edgellm.formats.model_file import ModelFile
from edgellm.kernels.rope import Rope, frequencies, linear_scaling, yarn_magnitude, yarn_scaling

BROKEN_FILE = "The file is damaged or was converted wrongly: download it again, or take another conversion."


@dataclass(frozen=True)
class HParams:
    """The sizes of a decoder. ``n_rot`` is the number of rotated dimensions of a head.

    by_layer   field -> its value in each layer, for those that ``read_hparams`` was asked for; the fields themselves
               have the largest
    """

    n_vocab: int
    context_length: int
    n_layer: int
    n_embd: int
    n_ff: int
    n_head: int
    n_head_kv: int
    head_dim_k: int
    head_dim_v: int
    n_rot: int
    eps: float
    by_layer: Mapping[str, Sequence[int]] = field(default_factory=dict)

    def layer(self, i: int) -> HParams:
        """The sizes in layer ``i``."""
        return replace(self, by_layer={}, **{name: values[i] for name, values in self.by_layer.items()})


BY_LAYER = {"n_head": "attention.head_count", "n_head_kv": "attention.head_count_kv", "n_ff": "feed_forward_length"}
"""Fields that may differ from layer to layer in some architectures."""


def read_hparams(
    gguf: ModelFile,
    by_layer: Sequence[str] = (),
    *,
    n_ff: int | None = None,
    eps: float | None = None,
    eps_key: str = "attention.layer_norm_rms_epsilon",
) -> HParams:
    """The sizes from the metadata. FormatError ``MODEL_HPARAMS`` for a missing key, a range or a ratio that is off.

    by_layer   names of BY_LAYER that the architecture reads layer by layer, 0 for a layer without; all others must be
               alike in all layers
    n_ff, eps  for architectures whose files need not say it
    eps_key    what the norms add, under the name that the architecture has for it
    """
    n_layer, n_embd = integer(gguf, "block_count"), integer(gguf, "embedding_length")

    def size(name: str, default: int | None = None) -> int:
        if name not in by_layer:
            return integer(gguf, BY_LAYER[name], default, least=1)
        found[name] = integers(gguf, BY_LAYER[name], n_layer, default)
        return max(found[name])

    found: dict[str, list[int]] = {}
    n_head = size("n_head")
    n_head_kv = size("n_head_kv", n_head)
    each = (found.get(name, [n] * n_layer) for name, n in (("n_head", n_head), ("n_head_kv", n_head_kv)))
    for q, kv in zip(*each, strict=True):
        if kv and q % kv:
            raise hparam_error(gguf, "attention.head_count_kv", kv, f"a divisor of attention.head_count, which is {q}")
    if key_of(gguf, "attention.key_length") not in gguf.metadata and n_embd % n_head:
        raise hparam_error(gguf, "embedding_length", n_embd, f"a multiple of attention.head_count, which is {n_head}")
    head_dim_k = integer(gguf, "attention.key_length", n_embd // n_head)
    n_rot = integer(gguf, "rope.dimension_count", head_dim_k, least=2)
    if n_rot % 2 or n_rot > head_dim_k:
        raise hparam_error(gguf, "rope.dimension_count", n_rot, f"an even number up to the head size {head_dim_k}")
    return HParams(
        n_vocab=_vocab_size(gguf),
        context_length=integer(gguf, "context_length"),
        n_layer=n_layer,
        n_embd=n_embd,
        n_ff=size("n_ff", n_ff),
        n_head=n_head,
        n_head_kv=n_head_kv,
        head_dim_k=head_dim_k,
        head_dim_v=integer(gguf, "attention.value_length", n_embd // n_head),
        n_rot=n_rot,
        eps=real(gguf, eps_key, eps),
        by_layer=found,
    )


def read_recurrent_hparams(gguf: ModelFile) -> HParams:
    """The sizes of a model that has neither attention nor feed-forwards: those of them are 0."""
    return HParams(
        n_vocab=_vocab_size(gguf),
        context_length=integer(gguf, "context_length"),
        n_layer=integer(gguf, "block_count"),
        n_embd=integer(gguf, "embedding_length"),
        n_ff=0,
        n_head=0,
        n_head_kv=0,
        head_dim_k=0,
        head_dim_v=0,
        n_rot=0,
        eps=real(gguf, "attention.layer_norm_rms_epsilon"),
    )


def read_rope(
    gguf: ModelFile,
    hp: HParams,
    base: float,
    *,
    adjacent: bool,
    factors: np.ndarray | None = None,
    scaled: bool = True,
    truncate: bool = True,
    long: bool = False,
) -> Rope:
    """The rotation of the file: ``base``, divided by ``factors``, then scaled as the ``rope.scaling.*`` keys say.

    truncate   whether YaRN's ramp begins and ends at whole dimensions
    long       ``factors`` are those of LongRoPE
    """
    inv_freq = frequencies(hp.n_rot, base)
    if factors is not None:
        inv_freq = inv_freq / factors
    scaling = gguf.metadata.get(key_of(gguf, "rope.scaling.type"), "linear")
    if not isinstance(scaling, str):
        raise hparam_error(gguf, "rope.scaling.type", scaling, "a text", "GGUF_KEY_TYPE")
    factor = real(gguf, "rope.scaling.factor", real(gguf, "rope.scale_linear", 0.0)) or 1.0
    magnitude = real(gguf, "rope.scaling.attn_factor", 1.0)
    if not scaled:
        return Rope(adjacent, inv_freq)
    if scaling == "none" or (scaling == "longrope" and long):
        return Rope(adjacent, inv_freq, magnitude)
    if scaling == "linear":
        return Rope(adjacent, linear_scaling(inv_freq, factor), magnitude)
    if scaling == "yarn":
        extrapolation = real(gguf, "rope.scaling.yarn_ext_factor", -1.0)
        inv_freq = yarn_scaling(
            inv_freq,
            base,
            factor,
            original_context_length=integer(gguf, "rope.scaling.original_context_length", hp.context_length),
            beta_fast=real(gguf, "rope.scaling.yarn_beta_fast", 32.0),
            beta_slow=real(gguf, "rope.scaling.yarn_beta_slow", 1.0),
            extrapolation=1.0 if extrapolation < 0 else extrapolation,  # below 0 means: not set
            truncate=truncate,
        )
        every = real(gguf, "rope.scaling.yarn_log_multiplier", 0.0)
        return Rope(adjacent, inv_freq, magnitude * yarn_magnitude(factor) / yarn_magnitude(factor, every))
    raise UnsupportedError(
        f"{file_name(gguf)}: rope.scaling.type is {scaling!r}; edgellm knows none, linear and yarn. "
        "Take a conversion of the model with its original context length."
    )


def integer(gguf: ModelFile, key: str, default: int | None = None, *, least: int = 0) -> int:
    """A whole number in its range and from ``least``; an array counts as its value where all layers have the same."""
    value = _found(gguf, key, default)
    if isinstance(value, np.ndarray) and value.size:
        if (value != value[0]).any():
            raise UnsupportedError(
                f"{file_name(gguf)}: {key_of(gguf, key)} differs from layer to layer, and edgellm runs models whose "
                f"layers are alike. Take another model of the {gguf.architecture} architecture."
            )
        value = value[0].item()
    return _whole(gguf, key, value, least)


def integers(gguf: ModelFile, key: str, n_layer: int, default: int | None = None) -> list[int]:
    """A whole number for each layer: an array of them, or one for all."""
    value = _found(gguf, key, default)
    each = value.tolist() if isinstance(value, np.ndarray) else value  # of a checkpoint it is a list already
    if not isinstance(each, list):
        return [_whole(gguf, key, each)] * n_layer
    if len(each) != n_layer:
        raise hparam_error(gguf, key, f"an array of {len(each)}", f"one value for each of {n_layer} layers")
    return [_whole(gguf, key, one) for one in each]


def _whole(gguf: ModelFile, key: str, value: object, least: int = 0) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise hparam_error(gguf, key, value, "a whole number", "GGUF_KEY_TYPE")
    _check_range(gguf, key, value, least)
    return value


def real(gguf: ModelFile, key: str, default: float | None = None) -> float:
    """A number in its range; NaN is in none."""
    value = _found(gguf, key, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise hparam_error(gguf, key, value, "a number", "GGUF_KEY_TYPE")
    _check_range(gguf, key, value)
    return float(value)


def flag(gguf: ModelFile, key: str, default: bool) -> bool:
    """A truth value."""
    value = gguf.metadata.get(key_of(gguf, key), default)
    if not isinstance(value, bool):
        raise hparam_error(gguf, key, value, "true or false", "GGUF_KEY_TYPE")
    return value


def key_of(gguf: ModelFile, key: str) -> str:
    """The whole key in this file."""
    return f"{gguf.architecture}.{key}"


def file_name(gguf: ModelFile) -> str:
    """The file's name for a message."""
    return Path(gguf.path).name


def hparam_error(gguf: ModelFile, key: str, value: object, expected: str, code: str = "MODEL_HPARAMS") -> EdgeLLMError:
    """What was found under ``key``, what was expected, what to do. ParameterError where the caller gave the value."""
    if key_of(gguf, key) in gguf.overrides:
        return override_error(key_of(gguf, key), f"is {short(value)}, expected {expected}", code)
    return FormatError(
        f"{file_name(gguf)}: {key_of(gguf, key)} is {value!r}, expected {expected}. {BROKEN_FILE}", code=code
    )


def _found(gguf: ModelFile, key: str, default: float | None) -> object:
    value = gguf.metadata.get(key_of(gguf, key), default)
    if value is None:
        raise FormatError(
            f"{file_name(gguf)}: the key {key_of(gguf, key)} is missing; a {gguf.architecture} model must have it. "
            f"{BROKEN_FILE}",
            code="MODEL_HPARAMS",
        )
    return value


def _check_range(gguf: ModelFile, key: str, value: float, least: float = -math.inf) -> None:
    low, high = max(RANGES[key][0], least), RANGES[key][1]
    if not low <= value <= high:
        raise hparam_error(gguf, key, value, f"{low:g} to {high:g}")


def _vocab_size(gguf: ModelFile) -> int:
    """Number of tokens; without a vocabulary in the file the key or the embedding's rows must say it."""
    tokens = gguf.metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, Sequence) and not isinstance(tokens, str) and tokens:
        return len(tokens)
    embedding = gguf.tensors.get("token_embd.weight")
    return integer(gguf, "vocab_size", embedding.shape[0] if embedding else None)
