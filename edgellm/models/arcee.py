"""Arcee (AFM): llama whose feed-forward has no gate and squares what is above 0."""

from __future__ import annotations

from edgellm.formats.model_file import ModelFile
from edgellm.kernels.program import Program
from edgellm.models.parts.blocks import build_decoder, plain_feed_forward
from edgellm.models.parts.checkpoint_config import CheckpointConfig
from edgellm.models.parts.checkpoint_form import (
    CheckpointForm,
    TypedMetadata,
    attention_biases,
    decoder_metadata,
    refuse_activation,
    refuse_windows,
    typed_metadata,
)


def build(gguf: ModelFile) -> Program:
    """x += Wo attention(rope(q), rope(k), v);  x += Wdown relu(Wup h)^2: see ``build_decoder``."""
    return build_decoder(gguf, adjacent=True, ffn=lambda m, blk: plain_feed_forward(m, blk, "relu_squared"))


def checkpoint_metadata(config: CheckpointConfig) -> TypedMetadata:
    """The keys of this architecture, from config.json."""
    refuse_activation(config, "relu2")
    refuse_windows(config)
    sizes = {"vocab_size": config.integer("vocab_size"), "rope.dimension_count": config.head_dim}
    return decoder_metadata(config, "arcee") | typed_metadata("arcee", sizes)


CHECKPOINT = CheckpointForm(
    classes={"ArceeForCausalLM": "arcee", "ArceeModel": "arcee"},
    metadata=checkpoint_metadata,
    biases=lambda config: (
        attention_biases(config)
        | (frozenset(("ffn_up", "ffn_down")) if config.flag("mlp_bias", False) else frozenset())
    ),
    pairs_heads=True,
)
