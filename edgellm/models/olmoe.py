"""OLMoE: experts in every layer, and q and k are normed over all heads together.

The weights of a token's experts are their part of the softmax over all, so they do not sum to 1.
"""

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
    refuse_windows,
)
from edgellm.models.parts.experts import (
    EXPERT_MATRICES,
    STACKED_EXPERTS,
    expert_feed_forward,
    expert_metadata,
    read_experts,
)
from edgellm.models.parts.hparams import integer


def build(gguf: ModelFile) -> Program:
    """See ``build_decoder`` and ``expert_feed_forward``."""
    experts = read_experts(gguf, integer(gguf, "feed_forward_length", least=1), over="all")
    return build_decoder(
        gguf, adjacent=False, qk_norms="rows", ffn=lambda m, blk: expert_feed_forward(m, blk, experts, "silu")
    )


def checkpoint_metadata(config: CheckpointConfig) -> TypedMetadata:
    """The keys of this architecture, from config.json."""
    refuse_activation(config, "silu", "swish")
    refuse_windows(config)
    if config.flag("norm_topk_prob", False):
        raise config.refuse("norm_topk_prob", "models whose chosen experts' weights do not sum to 1 (false)")
    return decoder_metadata(config, "olmoe") | expert_metadata(config, "olmoe")


CHECKPOINT = CheckpointForm(
    classes={"OlmoeForCausalLM": "olmoe", "OlmoeModel": "olmoe"},
    metadata=checkpoint_metadata,
    layer=DECODER_LAYER | QK_NORMS | {"mlp.gate": "ffn_gate_inp"},
    experts=EXPERT_MATRICES,
    stacked=STACKED_EXPERTS,
)
