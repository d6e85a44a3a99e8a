"""MiniMax M2: experts in every layer, chosen by sigmoids and a bias; q and k are normed over all heads together."""

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
from edgellm.models.parts.checkpoint_rope import rotated_dims, rotation_of_a_part
from edgellm.models.parts.experts import (
    EXPERT_MATRICES,
    SIGMOID,
    STACKED_EXPERTS,
    expert_feed_forward,
    expert_metadata,
    read_sigmoid_experts,
)
from edgellm.models.parts.hparams import integer


def build(gguf: ModelFile) -> Program:
    """See ``build_decoder`` and ``expert_feed_forward``."""
    experts = read_sigmoid_experts(gguf, integer(gguf, "feed_forward_length", least=1), normed=True)
    return build_decoder(
        gguf, adjacent=False, qk_norms="rows", ffn=lambda m, blk: expert_feed_forward(m, blk, experts, "silu")
    )


def checkpoint_metadata(config: CheckpointConfig) -> TypedMetadata:
    """The keys of this architecture, from config.json."""
    refuse_activation(config, "silu", "swish")
    refuse_windows(config)
    kinds = config.get("attn_type_list")
    if kinds is not None and kinds != [1] * config.n_layer:
        raise config.refuse("attn_type_list", f"models with softmax attention (1) in all {config.n_layer} layers")
    n_ff, n_rot = config.integer("intermediate_size"), config.get("rotary_dim")
    if n_rot is not None and (type(n_rot) is not int or n_rot % 2 or not 2 <= n_rot <= config.head_dim):
        raise config.wrong("rotary_dim", n_rot, f"an even number up to {config.head_dim}")
    return (
        decoder_metadata(config, "minimax-m2", rotation_of_a_part)
        | expert_metadata(config, "minimax-m2")
        | {
            "minimax-m2.rope.dimension_count": (n_rot or rotated_dims(config), "UINT32"),
            "minimax-m2.expert_feed_forward_length": (n_ff, "UINT32"),
            "minimax-m2.expert_gating_func": (SIGMOID, "UINT32"),
        }
    )


CHECKPOINT = CheckpointForm(
    classes={"MiniMaxM2ForCausalLM": "minimax_m2", "MiniMaxM2Model": "minimax_m2"},
    metadata=checkpoint_metadata,
    biases=lambda _: frozenset(),
    layer=DECODER_LAYER | QK_NORMS | {"mlp.gate": "ffn_gate_inp", "block_sparse_moe.gate": "ffn_gate_inp"},
    experts=EXPERT_MATRICES | {"w1": "ffn_gate_exps", "w3": "ffn_up_exps", "w2": "ffn_down_exps"},
    stacked=STACKED_EXPERTS,
    bare=dict.fromkeys(
        ("mlp.e_score_correction_bias", "block_sparse_moe.e_score_correction_bias"), ("exp_probs_b.bias",)
    ),
    extra=lambda _: {},
)
