"""Qwen 3 with experts: as the dense one, and every feed-forward is a mixture of experts."""

from __future__ import annotations

from edgellm.formats.model_file import ModelFile
from edgellm.kernels.program import Program
from edgellm.models.parts.blocks import build_decoder
from edgellm.models.parts.checkpoint_config import CheckpointConfig
from edgellm.models.parts.checkpoint_form import (
    DECODER_LAYER,
    QK_NORMS,
    CheckpointForm,
    TypedMetadata,
    decoder_metadata,
    refuse_activation,
    refuse_sliding_layers,
)
from edgellm.models.parts.experts import (
    EXPERT_MATRICES,
    STACKED_EXPERTS,
    expert_feed_forward,
    expert_metadata,
    read_experts,
    refuse_dense_layers,
)


def build(gguf: ModelFile) -> Program:
    """As Qwen 3, but x += experts(h): see ``expert_feed_forward``."""
    experts = read_experts(gguf)
    return build_decoder(
        gguf, adjacent=False, qk_norms="heads", ffn=lambda m, blk: expert_feed_forward(m, blk, experts, "silu")
    )


def checkpoint_metadata(config: CheckpointConfig) -> TypedMetadata:
    """The keys of this architecture, from config.json."""
    refuse_activation(config, "silu", "swish")
    refuse_sliding_layers(config)
    if not config.flag("norm_topk_prob", False):
        raise config.refuse("norm_topk_prob", "models whose chosen experts' weights sum to 1 (true)", value=False)
    refuse_dense_layers(config)
    return (
        decoder_metadata(config, "qwen3moe")
        | expert_metadata(config, "qwen3moe")
        | {"qwen3moe.expert_feed_forward_length": (config.integer("moe_intermediate_size"), "UINT32")}
    )


CHECKPOINT = CheckpointForm(
    classes={"Qwen3MoeForCausalLM": "qwen3_moe", "Qwen3MoeModel": "qwen3_moe"},
    metadata=checkpoint_metadata,
    layer=DECODER_LAYER | QK_NORMS | {"mlp.gate": "ffn_gate_inp"},
    experts=EXPERT_MATRICES,
    stacked=STACKED_EXPERTS,
)
