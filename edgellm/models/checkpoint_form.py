"""What a Hugging Face checkpoint of an architecture looks like, and what its GGUF file is to say of it.

Each architecture file has one ``CheckpointForm``: the names its tensors go by, what happens to their numbers, and the
metadata that its own ``build`` reads back. The keys are those that llama.cpp's converter writes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edgellm.formats.checkpoint import wrong_config
from edgellm.formats.errors import UnsupportedError
from edgellm.formats.findings import short

TypedMetadata = dict[str, tuple[Any, str]]

# a decoder layer's modules in transformers -> in GGUF
DECODER_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
QK_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
DECODER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


@dataclass(frozen=True)
class CheckpointConfig:
    """config.json of a checkpoint, read by key and type; whatever is off is named with the file."""

    folder: Path
    values: Mapping[str, Any]

    def get(self, key: str) -> Any:
        """The value as it stands there, None when it is missing."""
        return self.values.get(key)

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number from 1 to 2^31."""
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if type(value) is not int or not 1 <= value < 1 << 31:
            raise wrong_config(self.folder, key, value, "a whole number from 1")
        return value

    def real(self, key: str, default: float | None = None) -> float:
        """A finite number."""
        return self.real_of(key, self.values.get(key), default)

    def real_of(self, key: str, value: Any, default: float | None = None) -> float:
        """A finite number that was found under ``key``."""
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise wrong_config(self.folder, key, value, "a number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """A truth value."""
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise wrong_config(self.folder, key, value, "true or false")
        return value

    def refuse(self, key: str, expected: str) -> UnsupportedError:
        """The error of a setting that edgellm's form of the architecture does not have."""
        return UnsupportedError(
            f"{self.folder.name}/config.json: {key} is {short(self.values.get(key))}; edgellm converts {expected}. "
            "Take another model of this family.",
            code="CHECKPOINT_CONFIG",
        )

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        n_embd, n_head = self.integer("hidden_size"), self.integer("num_attention_heads")
        if self.get("head_dim") is None and n_embd % n_head:
            raise wrong_config(self.folder, "hidden_size", n_embd, f"a multiple of num_attention_heads ({n_head})")
        return self.integer("head_dim", n_embd // n_head)

    @property
    def n_layer(self) -> int:
        """Number of decoder layers."""
        n_layer = self.integer("num_hidden_layers")
        if n_layer > 512:
            raise wrong_config(self.folder, "num_hidden_layers", n_layer, "up to 512")
        return n_layer

    def rope(self, layers: str = "full_attention") -> dict[str, Any]:
        """The rotation of a kind of layers: ``rope_theta``, ``rope_type`` and its numbers, from any spelling."""
        found = self.get("rope_parameters")
        if found is None:
            found = self.get("rope_scaling") or {}
        if not isinstance(found, dict):
            raise wrong_config(self.folder, "rope_scaling", found, "an object")
        if layers in found:
            found = found[layers]
            if not isinstance(found, dict):
                raise wrong_config(self.folder, f"rope_parameters.{layers}", found, "an object")
        rope = {"rope_type": found.get("type", "default"), **found}
        if rope.get("rope_theta") is None:
            rope["rope_theta"] = self.get("rope_theta")
        return rope


def _no_extra(config: CheckpointConfig) -> dict[str, np.ndarray]:
    return {}


@dataclass(frozen=True)
class CheckpointForm:
    """How one architecture is kept in a checkpoint.

    classes       names in config.json's ``architectures``; the first is the usual one
    model_types   names in its ``model_type``
    metadata      the keys of the architecture, without tokenizer and name
    layer         modules of a layer: name in the checkpoint -> name in GGUF
    pairs_heads   rows of q and k are reordered, so that rotated pairs are neighbours
    norm_shift    added to every norm weight
    extra         tensors that the checkpoint has only as numbers of its config, by GGUF name
    space_prefix  whether a text starts with a space, where the tokenizer itself does not say
    ties_embeddings  whether the output's matrix is the embedding, where config.json does not say
    """

    classes: tuple[str, ...]
    model_types: tuple[str, ...]
    metadata: Callable[[CheckpointConfig], TypedMetadata]
    layer: Mapping[str, str] = field(default_factory=lambda: DECODER_LAYER)
    pairs_heads: bool = False
    norm_shift: float = 0.0
    extra: Callable[[CheckpointConfig], dict[str, np.ndarray]] = _no_extra
    space_prefix: bool = True
    ties_embeddings: bool = False

    def tensor_name(self, name: str, n_layer: int) -> str | None:
        """The GGUF name of a checkpoint's tensor (``model.layers.3.mlp.up_proj.weight``), None for an unknown one."""
        module, _, parameter = name.rpartition(".")
        if parameter not in ("weight", "bias"):
            return None
        if module in DECODER:
            return f"{DECODER[module]}.{parameter}"
        head, _, rest = module.removeprefix("model.layers.").partition(".")
        known = self.layer.get(rest) if module.startswith("model.layers.") and head.isdecimal() else None
        return f"blk.{int(head)}.{known}.{parameter}" if known and int(head) < n_layer else None


def decoder_metadata(config: CheckpointConfig, architecture: str) -> TypedMetadata:
    """The keys that all decoders share. UnsupportedError for a rotation that edgellm does not have."""
    n_head = config.integer("num_attention_heads")
    found: TypedMetadata = {
        "block_count": (config.n_layer, "UINT32"),
        "context_length": (config.integer("max_position_embeddings"), "UINT32"),
        "embedding_length": (config.integer("hidden_size"), "UINT32"),
        "feed_forward_length": (config.integer("intermediate_size"), "UINT32"),
        "attention.head_count": (n_head, "UINT32"),
        "attention.head_count_kv": (config.integer("num_key_value_heads", n_head), "UINT32"),
    }
    found |= _rope_metadata(config, config.rope())
    found["attention.layer_norm_rms_epsilon"] = (config.real("rms_norm_eps", 1e-6), "FLOAT32")
    if config.get("head_dim") is not None:
        found["attention.key_length"] = found["attention.value_length"] = (config.head_dim, "UINT32")
    return {f"{architecture}.{key}": value for key, value in found.items()}


def _rope_metadata(config: CheckpointConfig, rope: Mapping[str, Any]) -> TypedMetadata:
    kind = rope["rope_type"]
    found: TypedMetadata = {}
    if kind in ("linear", "yarn"):
        factor = config.real_of("rope_scaling.factor", rope.get("factor"))
        found |= {"rope.scaling.type": (kind, "STRING"), "rope.scaling.factor": (factor, "FLOAT32")}
    if kind == "yarn":
        length = rope.get("original_max_position_embeddings") or config.integer("max_position_embeddings")
        if type(length) is not int or not 1 <= length < 1 << 31:
            raise wrong_config(config.folder, "original_max_position_embeddings", length, "a whole number from 1")
        found["rope.scaling.original_context_length"] = (length, "UINT32")
        found |= _yarn_metadata(config, rope, factor)
    elif kind not in ("default", "linear", "llama3", None):
        raise UnsupportedError(
            f"{config.folder.name}/config.json: the rotation is scaled by {short(kind)}; edgellm knows linear, yarn "
            "and llama3. Take a checkpoint with the model's original context length.",
            code="CHECKPOINT_CONFIG",
        )
    found["rope.freq_base"] = (config.real_of("rope_theta", rope.get("rope_theta"), 10000.0), "FLOAT32")
    return found


def _yarn_metadata(config: CheckpointConfig, rope: Mapping[str, Any], factor: float) -> TypedMetadata:
    """transformers gives the whole magnitude; a GGUF reader multiplies its own, 1 + 0.1 ln(factor), by attn_factor."""
    found: TypedMetadata = {}
    for name in ("beta_fast", "beta_slow"):
        if rope.get(name) is not None:
            value = config.real_of(f"rope_scaling.{name}", rope[name])
            found[f"rope.scaling.yarn_{name}"] = (value, "FLOAT32")
    if rope.get("mscale") or rope.get("mscale_all_dim") or rope.get("truncate") is False:
        raise UnsupportedError(
            f"{config.folder.name}/config.json: yarn with mscale or without truncation is not what edgellm "
            "rotates with. Take a checkpoint with the model's original context length.",
            code="CHECKPOINT_CONFIG",
        )
    if rope.get("attention_factor") is not None:
        magnitude = config.real_of("rope_scaling.attention_factor", rope["attention_factor"])
        found["rope.scaling.attn_factor"] = (magnitude / (1 + 0.1 * math.log(max(1.0, factor))), "FLOAT32")
    return found


def llama3_frequency_factors(config: CheckpointConfig) -> dict[str, np.ndarray]:
    """``rope_freqs.weight`` of Llama 3.1 and later: long waves are slowed by ``factor``, short ones left alone."""
    rope = config.rope()
    if rope["rope_type"] != "llama3":
        return {}
    factor, low, high, length = (
        config.real_of(f"rope_scaling.{key}", rope.get(key), default)
        for key, default in (
            ("factor", 8.0),
            ("low_freq_factor", 1.0),
            ("high_freq_factor", 4.0),
            ("original_max_position_embeddings", 8192.0),
        )
    )
    base = config.real_of("rope_theta", rope.get("rope_theta"), 10000.0)
    if not (factor > 0 and length > 0 and 0 < low < high and base > 1):
        raise wrong_config(config.folder, "rope_scaling", rope, "positive numbers, low_freq_factor < high_freq_factor")
    dim = config.head_dim
    wavelengths = 2 * math.pi * base ** (np.arange(0, dim, 2) / dim)
    smooth = np.clip((length / wavelengths - low) / (high - low), 0, 1)
    return {"rope_freqs.weight": (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)}


def refuse_activation(config: CheckpointConfig, *known: str) -> None:
    """UnsupportedError for an activation that is not the architecture's own."""
    for key in ("hidden_act", "hidden_activation"):
        if config.get(key) is not None and config.get(key) not in known:
            raise config.refuse(key, " or ".join(known))


def refuse_sliding_layers(config: CheckpointConfig) -> None:
    """UnsupportedError when some layers slide, in an architecture whose layers do not."""
    kinds = config.get("layer_types")
    if config.flag("use_sliding_window", False) and isinstance(config.get("sliding_window"), int):
        raise config.refuse("use_sliding_window", "models of this architecture whose layers see the whole context")
    if isinstance(kinds, list) and any(kind != "full_attention" for kind in kinds):
        raise config.refuse("layer_types", "models of this architecture whose layers see the whole context")
