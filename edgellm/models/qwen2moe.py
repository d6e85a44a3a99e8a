"""Qwen 2 with experts: as the dense one, and every feed-forward is a mixture of experts and one that all tokens share.

The weights of a token's experts are their part of the softmax over all, so they do not sum to 1.
"""

from __future__ import annotations

from edgellm.formats.model_file import ModelFile
from edgellm.kernels.program import Program
from edgellm.models.parts.blocks import build_decoder
from edgellm.models.parts.checkpoint_config import CheckpointConfig
from edgellm.models.parts.checkpoint_form import (
    DECODER_LAYER,
    QKV,
    CheckpointForm,
    TypedMetadata,
    decoder_metadata,
    refuse_activation,
    refuse_windows,
)
from edgellm.models.parts.experts import (
    EXPERT_MATRICES,
    SHARED_EXPERT,
    STACKED_EXPERTS,
    expert_metadata,
    experts_and_shared,
    read_experts,
    refuse_dense_layers,
    shared_expert_metadata,
)
from edgellm.models.parts.hparams import integer


def build(gguf: ModelFile) -> Program:
    """As Qwen 2, but x += experts(h) + sigmoid(h w) shared(h).

    Without a width of their own experts share the feed-forward's, and the shared one has it whole.
    """
    n_ff = integer(gguf, "feed_forward_length", least=1)
    n_used = integer(gguf, "expert_used_count", least=1)
    width = integer(gguf, "expert_feed_forward_length", 0) or n_ff // n_used
    experts = read_experts(
        gguf, width, over="all", shared=integer(gguf, "expert_shared_feed_forward_length", 0) or n_ff
    )

    return build_decoder(gguf, adjacent=False, ffn=experts_and_shared(experts))


def checkpoint_metadata(config: CheckpointConfig) -> TypedMetadata:
    """The keys of this architecture, from config.json."""
    refuse_activation(config, "silu", "swish")
    refuse_windows(config)
    if config.flag("norm_topk_prob", False):
        raise config.refuse("norm_topk_prob", "models whose chosen experts' weights do not sum to 1 (false)")
    refuse_dense_layers(config)
    return (
        decoder_metadata(config, "qwen2moe")
        | expert_metadata(config, "qwen2moe")
        | shared_expert_metadata(config, "qwen2moe")
    )


CHECKPOINT = CheckpointForm(
    classes={"Qwen2MoeForCausalLM": "qwen2_moe", "Qwen2MoeModel": "qwen2_moe"},
    metadata=checkpoint_metadata,
    biases=lambda config: QKV if config.flag("qkv_bias", True) else frozenset(),
    layer=DECODER_LAYER | SHARED_EXPERT | {"mlp.gate": "ffn_gate_inp"},
    experts=EXPERT_MATRICES,
    stacked=STACKED_EXPERTS,
)
