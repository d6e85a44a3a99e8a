"""Ling 2 and Ring 2 (BailingMoE 2): experts chosen by sigmoids and a bias, in groups, behind the first layers.

Every head of q and k is normed, and half of it is rotated. Sarvam's models are of it, too.
"""

from __future__ import annotations

from edgellm.formats.model_file import ModelFile
from edgellm.kernels.program import Program
from edgellm.models.bailingmoe import BAILING_AROUND, BAILING_LAYER, bailing_biases, bailing_metadata
from edgellm.models.parts.blocks import build_decoder
from edgellm.models.parts.checkpoint_config import CheckpointConfig
from edgellm.models.parts.checkpoint_form import CheckpointForm, TypedMetadata, typed_metadata
from edgellm.models.parts.checkpoint_rope import rotated_dims, rotation_of_a_part
from edgellm.models.parts.experts import (
    EXPERT_MATRICES,
    SIGMOID,
    dense_then_experts,
    read_sigmoid_experts,
    with_groups,
)
from edgellm.models.parts.hparams import integer


def build(gguf: ModelFile) -> Program:
    """See ``build_decoder`` and ``dense_then_experts``."""
    experts = with_groups(gguf, read_sigmoid_experts(gguf))
    n_dense, n_shared = integer(gguf, "leading_dense_block_count", 0), integer(gguf, "expert_shared_count")
    each = integer(gguf, "expert_shared_feed_forward_length", 0) or experts.n_ff
    ffn = dense_then_experts(experts, n_dense, n_shared * each)
    return build_decoder(gguf, adjacent=False, qk_norms="heads", ffn=ffn)


def checkpoint_metadata(config: CheckpointConfig) -> TypedMetadata:
    """The keys of this architecture, from config.json."""
    found = bailing_metadata(config, "bailingmoe2", rotation_of_a_part)
    n_rot = rotated_dims(config, 0.5)
    if config.get("rotary_dim") not in (None, n_rot):
        raise config.refuse("rotary_dim", f"what partial_rotary_factor stands for, which is {n_rot}")
    return found | typed_metadata(
        "bailingmoe2",
        {
            "rope.dimension_count": n_rot,
            "expert_shared_feed_forward_length": config.integer("moe_intermediate_size"),
            "expert_group_count": config.integer("n_group", 1),
            "expert_group_used_count": config.integer("topk_group", 1),
            "expert_weights_scale": config.real("routed_scaling_factor", 1.0),
            "expert_gating_func": SIGMOID,
        },
    )


CHECKPOINT = CheckpointForm(
    classes={"BailingMoeV2ForCausalLM": "bailing_moe"},
    metadata=checkpoint_metadata,
    biases=bailing_biases,
    layer=BAILING_LAYER
    | {
        "attention.query_key_value": "attn_qkv",
        "attention.query_layernorm": "attn_q_norm",
        "attention.key_layernorm": "attn_k_norm",
    },
    around=BAILING_AROUND,
    experts=EXPERT_MATRICES,
    bare={"mlp.gate.expert_bias": ("exp_probs_b.bias",)},
    needs_class=True,
    settings="bailing_moe_v2",
    extra=lambda _: {},
)
