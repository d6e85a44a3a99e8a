"""OLMo 1: llama whose norms are LayerNorms without a weight; in some, queries, keys and values are cut off."""

from __future__ import annotations

from edgellm.formats.model_file import ModelFile
from edgellm.kernels.program import Program
from edgellm.models.parts.blocks import build_decoder
from edgellm.models.parts.checkpoint_config import CheckpointConfig
from edgellm.models.parts.checkpoint_form import (
    CheckpointForm,
    TypedMetadata,
    decoder_metadata,
    refuse_activation,
    refuse_windows,
)
from edgellm.models.parts.hparams import real

EPS = 1e-5


def build(gguf: ModelFile) -> Program:
    """See ``build_decoder``."""
    clamp = real(gguf, "attention.clamp_kqv", 0.0)
    return build_decoder(gguf, adjacent=True, layer_norms=True, bare_norms=True, clamp=clamp)


def checkpoint_metadata(config: CheckpointConfig) -> TypedMetadata:
    """The keys of this architecture, from config.json."""
    refuse_activation(config, "silu", "swish")
    refuse_windows(config)
    found = decoder_metadata(config, "olmo")
    del found["olmo.attention.layer_norm_rms_epsilon"]
    found["olmo.attention.layer_norm_epsilon"] = (EPS, "FLOAT32")
    if config.get("clip_qkv") is not None:
        if config.real("clip_qkv") <= 0:
            raise config.wrong("clip_qkv", config.get("clip_qkv"), "a number over 0, or null")
        found["olmo.attention.clamp_kqv"] = (config.real("clip_qkv"), "FLOAT32")
    return found


CHECKPOINT = CheckpointForm(
    classes={"OlmoForCausalLM": "olmo", "OlmoModel": "olmo"}, metadata=checkpoint_metadata, pairs_heads=True
)
