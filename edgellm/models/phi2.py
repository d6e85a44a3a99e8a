"""Phi 1, 1.5 and 2: one LayerNorm for attention and feed-forward, which stand side by side, and biases everywhere."""

from __future__ import annotations

from edgellm.formats.model_file import ModelFile
from edgellm.kernels.program import Program
from edgellm.models.command_r import COHERE_LAYER, SIDE_BY_SIDE
from edgellm.models.parts.blocks import build_decoder, plain_feed_forward
from edgellm.models.parts.checkpoint_config import CheckpointConfig
from edgellm.models.parts.checkpoint_form import (
    QKV,
    CheckpointForm,
    TypedMetadata,
    decoder_metadata,
    refuse_activation,
    typed_metadata,
    with_layer_norms,
)
from edgellm.models.parts.checkpoint_rope import rotated_dims, rotation_of_a_part


def build(gguf: ModelFile) -> Program:
    """x += attention(h) + Wdown gelu(Wup h), h = norm(x): see ``build_decoder``."""
    return build_decoder(
        gguf,
        adjacent=False,
        layer_norms=True,
        needs_bias="qkvonl",
        norms=SIDE_BY_SIDE,
        ffn=lambda m, blk: plain_feed_forward(m, blk, "gelu", needs_bias=True),
    )


def checkpoint_metadata(config: CheckpointConfig) -> TypedMetadata:
    """The keys of this architecture, from config.json."""
    refuse_activation(config, "gelu_new", "gelu_pytorch_tanh")
    if config.flag("qk_layernorm", False):
        raise config.refuse("qk_layernorm", "models of this architecture without it (false)")
    found = decoder_metadata(config, "phi2", rotation_of_a_part, eps_key="layer_norm_eps")
    return with_layer_norms(found, "phi2") | typed_metadata("phi2", {"rope.dimension_count": rotated_dims(config, 0.5)})


CHECKPOINT = CheckpointForm(
    classes={"PhiForCausalLM": "phi", "PhiModel": "phi"},
    metadata=checkpoint_metadata,
    biases=lambda _: QKV | {"attn_output", "ffn_up", "ffn_down", "attn_norm"},
    layer=COHERE_LAYER | {"self_attn.dense": "attn_output", "mlp.fc1": "ffn_up", "mlp.fc2": "ffn_down"},
    around={"model.embed_tokens": "token_embd", "model.final_layernorm": "output_norm", "lm_head": "output"},
    around_biases=frozenset(("output_norm", "output")),
    extra=lambda _: {},
)
