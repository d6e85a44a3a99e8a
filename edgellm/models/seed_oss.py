"""Seed-OSS: Qwen 2 with heads of a size of their own; its second norm has another name."""

from __future__ import annotations

from edgellm.formats.model_file import ModelFile
from edgellm.kernels.program import Program
from edgellm.models.parts.blocks import BlockNorms, build_decoder
from edgellm.models.parts.checkpoint_config import CheckpointConfig
from edgellm.models.parts.checkpoint_form import (
    DECODER_LAYER,
    FEED_FORWARD,
    QKV,
    CheckpointForm,
    TypedMetadata,
    decoder_metadata,
    refuse_activation,
    refuse_windows,
)


def build(gguf: ModelFile) -> Program:
    """See ``build_decoder``."""
    return build_decoder(gguf, adjacent=False, norms=BlockNorms(ffn="post_attention_norm"))


def checkpoint_metadata(config: CheckpointConfig) -> TypedMetadata:
    """The keys of this architecture, from config.json."""
    refuse_activation(config, "silu", "swish")
    refuse_windows(config)
    return decoder_metadata(config, "seed_oss")


def checkpoint_biases(config: CheckpointConfig) -> frozenset[str]:
    """The modules that have a bias."""
    found = QKV if config.flag("attention_bias", True) else frozenset()
    found |= {"attn_output"} if config.flag("attention_out_bias", False) else frozenset()
    return found | (FEED_FORWARD if config.flag("mlp_bias", False) else frozenset())


CHECKPOINT = CheckpointForm(
    classes={"SeedOssForCausalLM": "seed_oss", "SeedOssModel": "seed_oss"},
    metadata=checkpoint_metadata,
    biases=checkpoint_biases,
    layer=DECODER_LAYER | {"post_attention_layernorm": "post_attention_norm"},
)
