"""The numbers that a model file gives about itself, read by their GGUF keys and held to a range.

Every number is checked here, before anything is computed from it; shapes of tensors are compared with these numbers
in ``blocks``. Keys are written without the architecture: ``block_count`` is ``llama.block_count`` in a llama file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgellm.formats.errors import EdgeLLMError, FormatError, UnsupportedError
from edgellm.formats.findings import override_error, short
from edgellm.kernels.rope import Rope, frequencies, linear_scaling, yarn_magnitude, yarn_scaling

if TYPE_CHECKING:
    from edgellm.formats.gguf import GGUFFile

# smallest and largest value of every key that is read; the largest models known stay far below
RANGES: dict[str, tuple[float, float]] = {
    "block_count": (1, 512),
    "context_length": (1, 1 << 24),
    "embedding_length": (1, 1 << 18),
    "feed_forward_length": (1, 1 << 20),
    "vocab_size": (1, 1 << 24),
    "expert_count": (0, 1 << 16),
    "attention.head_count": (1, 4096),
    "attention.head_count_kv": (1, 4096),
    "attention.key_length": (2, 4096),
    "attention.value_length": (1, 4096),
    "attention.layer_norm_rms_epsilon": (1e-12, 0.1),
    "attention.sliding_window": (0, 1 << 24),
    "attention.sliding_window_pattern": (1, 512),
    "rope.dimension_count": (2, 4096),
    "rope.freq_base": (1.0001, 1e15),
    "rope.freq_base_swa": (1.0001, 1e15),
    "rope.scale_linear": (0, 1e6),
    "rope.scaling.factor": (0, 1e6),
    "rope.scaling.attn_factor": (1e-3, 1e3),
    "rope.scaling.original_context_length": (1, 1 << 24),
    "rope.scaling.yarn_ext_factor": (-1, 1),
    "rope.scaling.yarn_beta_fast": (1e-3, 1e6),
    "rope.scaling.yarn_beta_slow": (1e-3, 1e6),
}

BROKEN_FILE = "The file is damaged or was converted wrongly: download it again, or take another conversion."


@dataclass(frozen=True)
class HParams:
    """The sizes of a decoder. ``n_rot`` is the number of rotated dimensions of a head."""

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


def read_hparams(gguf: GGUFFile) -> HParams:
    """The sizes from the metadata. FormatError ``MODEL_HPARAMS`` for a missing key, a range or a ratio that is off."""
    n_embd = integer(gguf, "embedding_length")
    n_head = integer(gguf, "attention.head_count")
    n_head_kv = integer(gguf, "attention.head_count_kv", n_head)
    if n_head % n_head_kv:
        raise hparam_error(
            gguf, "attention.head_count_kv", n_head_kv, f"a divisor of attention.head_count, which is {n_head}"
        )
    if key_of(gguf, "attention.key_length") not in gguf.metadata and n_embd % n_head:
        raise hparam_error(gguf, "embedding_length", n_embd, f"a multiple of attention.head_count, which is {n_head}")
    head_dim_k = integer(gguf, "attention.key_length", n_embd // n_head)
    n_rot = integer(gguf, "rope.dimension_count", head_dim_k)
    if n_rot % 2 or n_rot > head_dim_k:
        raise hparam_error(gguf, "rope.dimension_count", n_rot, f"an even number up to the head size {head_dim_k}")
    return HParams(
        n_vocab=_vocab_size(gguf),
        context_length=integer(gguf, "context_length"),
        n_layer=integer(gguf, "block_count"),
        n_embd=n_embd,
        n_ff=integer(gguf, "feed_forward_length"),
        n_head=n_head,
        n_head_kv=n_head_kv,
        head_dim_k=head_dim_k,
        head_dim_v=integer(gguf, "attention.value_length", n_embd // n_head),
        n_rot=n_rot,
        eps=real(gguf, "attention.layer_norm_rms_epsilon"),
    )


def read_rope(
    gguf: GGUFFile, hp: HParams, base: float, *, adjacent: bool, factors: np.ndarray | None = None, scaled: bool = True
) -> Rope:
    """The rotation of the file: ``base``, divided by ``factors``, then scaled as the ``rope.scaling.*`` keys say."""
    inv_freq = frequencies(hp.n_rot, base)
    if factors is not None:
        inv_freq = inv_freq / factors
    scaling = gguf.get(key_of(gguf, "rope.scaling.type"), str, "linear")
    factor = real(gguf, "rope.scaling.factor", real(gguf, "rope.scale_linear", 0.0)) or 1.0
    magnitude = real(gguf, "rope.scaling.attn_factor", 1.0)
    if not scaled:
        return Rope(adjacent, inv_freq)
    if scaling == "none":
        return Rope(adjacent, inv_freq, magnitude)
    if scaling == "linear":
        return Rope(adjacent, linear_scaling(inv_freq, factor), magnitude)
    if scaling == "yarn":
        return Rope(
            adjacent,
            _read_yarn(gguf, hp, inv_freq, base, factor),
            magnitude * yarn_magnitude(factor),
        )
    raise UnsupportedError(
        f"{file_name(gguf)}: rope.scaling.type is {scaling!r}; edgellm knows none, linear and yarn. "
        "Take a conversion of the model with its original context length."
    )


def _read_yarn(gguf: GGUFFile, hp: HParams, inv_freq: np.ndarray, base: float, factor: float) -> np.ndarray:
    extrapolation = real(gguf, "rope.scaling.yarn_ext_factor", -1.0)
    return yarn_scaling(
        inv_freq,
        base,
        factor,
        original_context_length=integer(gguf, "rope.scaling.original_context_length", hp.context_length),
        beta_fast=real(gguf, "rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=real(gguf, "rope.scaling.yarn_beta_slow", 1.0),
        extrapolation=1.0 if extrapolation < 0 else extrapolation,  # below 0 means: not set
    )


def integer(gguf: GGUFFile, key: str, default: int | None = None) -> int:
    """A whole number in its range; an array counts as its value where every layer has the same one."""
    value = _value(gguf, key, default)
    if isinstance(value, bool) or not isinstance(value, int):
        raise hparam_error(gguf, key, value, "a whole number", "GGUF_KEY_TYPE")
    _check_range(gguf, key, value)
    return value


def real(gguf: GGUFFile, key: str, default: float | None = None) -> float:
    """A number in its range; NaN is in none."""
    value = _value(gguf, key, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise hparam_error(gguf, key, value, "a number", "GGUF_KEY_TYPE")
    _check_range(gguf, key, value)
    return float(value)


def key_of(gguf: GGUFFile, key: str) -> str:
    """The whole key in this file."""
    return f"{gguf.architecture}.{key}"


def file_name(gguf: GGUFFile) -> str:
    """The file's name for a message."""
    return Path(gguf.path).name


def hparam_error(gguf: GGUFFile, key: str, value: object, expected: str, code: str = "MODEL_HPARAMS") -> EdgeLLMError:
    """What was found under ``key``, what was expected, what to do. ParameterError where the caller gave the value."""
    if key_of(gguf, key) in gguf.overrides:
        return override_error(key_of(gguf, key), f"is {short(value)}, expected {expected}", code)
    return FormatError(
        f"{file_name(gguf)}: {key_of(gguf, key)} is {value!r}, expected {expected}. {BROKEN_FILE}", code=code
    )


def _value(gguf: GGUFFile, key: str, default: float | None) -> object:
    value = gguf.metadata.get(key_of(gguf, key), default)
    if value is None:
        raise FormatError(
            f"{file_name(gguf)}: the key {key_of(gguf, key)} is missing; a {gguf.architecture} model must have it. "
            f"{BROKEN_FILE}",
            code="MODEL_HPARAMS",
        )
    if isinstance(value, np.ndarray) and value.size:
        if (value != value[0]).any():
            raise UnsupportedError(
                f"{file_name(gguf)}: {key_of(gguf, key)} differs from layer to layer, and edgellm runs models whose "
                f"layers are alike. Take another model of the {gguf.architecture} architecture."
            )
        return value[0].item()
    return value


def _check_range(gguf: GGUFFile, key: str, value: float) -> None:
    low, high = RANGES[key]
    if not low <= value <= high:
        raise hparam_error(gguf, key, value, f"{low:g} to {high:g}")


def _vocab_size(gguf: GGUFFile) -> int:
    """Number of tokens; without a vocabulary in the file the key or the embedding's rows must say it."""
    tokens = gguf.metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, Sequence) and not isinstance(tokens, str) and tokens:
        return len(tokens)
    embedding = gguf.tensors.get("token_embd.weight")
    return integer(gguf, "vocab_size", embedding.shape[0] if embedding else None)
