"""Nemotron 4 and Minitron: LayerNorms, a feed-forward that squares what is above 0, a part of each head rotated."""

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
    with_layer_norms,
)
from edgellm.models.parts.checkpoint_rope import rotated_dims, rotation_of_a_part


def build(gguf: ModelFile) -> Program:
    """x += Wo attention(rope(q), rope(k), v);  x += Wdown relu(Wup h)^2: see ``build_decoder``."""
    return build_decoder(
        gguf,
        adjacent=False,
        layer_norms=True,
        needs_bias="n",
        ffn=lambda m, blk: plain_feed_forward(m, blk, "relu_squared"),
    )


def checkpoint_metadata(config: CheckpointConfig) -> TypedMetadata:
    """The keys of this architecture, from config.json."""
    refuse_activation(config, "relu2")
    refuse_windows(config)
    found = with_layer_norms(decoder_metadata(config, "nemotron", rotation_of_a_part, eps_key="norm_eps"), "nemotron")
    n_rot = rotated_dims(config, 0.5)
    if int(config.head_dim * config.real("rope_percent", n_rot / config.head_dim)) != n_rot:
        raise config.refuse("rope_percent", f"what partial_rotary_factor stands for, {n_rot} of {config.head_dim}")
    sizes = {"vocab_size": config.integer("vocab_size"), "rope.dimension_count": n_rot}
    return found | typed_metadata("nemotron", sizes)


def _biases(config: CheckpointConfig) -> frozenset[str]:
    of_blocks = frozenset(("ffn_up", "ffn_down")) if config.flag("mlp_bias", False) else frozenset()
    return attention_biases(config) | of_blocks | {"attn_norm", "ffn_norm"}


CHECKPOINT = CheckpointForm(
    classes={"NemotronForCausalLM": "nemotron", "NemotronModel": "nemotron"},
    metadata=checkpoint_metadata,
    biases=_biases,
    around_biases=frozenset(("output_norm",)),
    norm_shift=1.0,
    extra=lambda _: {},
)
