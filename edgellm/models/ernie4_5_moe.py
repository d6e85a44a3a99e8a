"""ERNIE 4.5 with experts: as the dense one, and behind the first layers some have experts and one for all tokens.

Experts are chosen by their softmax and a bias, and weighed by their softmax among the chosen.
"""

from __future__ import annotations

from edgellm.formats.model_file import ModelFile
from edgellm.kernels.program import Program
from edgellm.models.parts.blocks import build_decoder
from edgellm.models.parts.checkpoint_config import CheckpointConfig
from edgellm.models.parts.checkpoint_form import (
    DECODER_LAYER,
    FEED_FORWARD,
    QKV,
    CheckpointForm,
    TypedMetadata,
    count_of,
    decoder_metadata,
    refuse_activation,
    refuse_windows,
    typed_metadata,
)
from edgellm.models.parts.experts import (
    EXPERT_MATRICES,
    SHARED_EXPERTS,
    STACKED_EXPERTS,
    dense_then_experts,
    read_experts,
)
from edgellm.models.parts.hparams import integer

DRAFTS = r"model\.mtp_(block|emb_norm|hidden_norm|linear_proj)\..*"
"""Of the tokens that follow the next."""


def build(gguf: ModelFile) -> Program:
    """See ``build_decoder`` and ``dense_then_experts``."""
    biased = any(name.endswith("exp_probs_b.bias") for name in gguf.tensors)
    experts = read_experts(gguf, biased=biased)
    n_dense, step = (
        integer(gguf, "leading_dense_block_count", 0),
        integer(gguf, "interleave_moe_layer_step", 1, least=1),
    )
    n_shared = integer(gguf, "expert_shared_feed_forward_length", 0)
    return build_decoder(gguf, adjacent=True, ffn=dense_then_experts(experts, n_dense, n_shared, step=step))


def checkpoint_metadata(config: CheckpointConfig) -> TypedMetadata:
    """The keys of this architecture, from config.json."""
    refuse_activation(config, "silu", "swish")
    refuse_windows(config)
    if config.get("moe_layer_end_index") not in (None, -1, config.n_layer - 1):
        raise config.refuse("moe_layer_end_index", f"models with experts up to their last layer, {config.n_layer - 1}")
    n_ff, n_shared = config.integer("moe_intermediate_size"), count_of(config, "moe_num_shared_experts")
    return decoder_metadata(config, "ernie4_5-moe") | typed_metadata(
        "ernie4_5-moe",
        {
            "expert_count": config.integer("moe_num_experts"),
            "expert_used_count": config.integer("moe_k"),
            "expert_feed_forward_length": n_ff,
            "expert_shared_count": n_shared,
            "expert_shared_feed_forward_length": n_shared * n_ff,
            "interleave_moe_layer_step": config.integer("moe_layer_interval", 1),
            "leading_dense_block_count": count_of(config, "moe_layer_start_index"),
        },
    )


CHECKPOINT = CheckpointForm(
    classes={"Ernie4_5_MoeForCausalLM": "ernie4_5_moe", "Ernie4_5_MoeModel": "ernie4_5_moe"},
    metadata=checkpoint_metadata,
    biases=lambda config: QKV | {"attn_output"} | FEED_FORWARD if config.flag("use_bias", False) else frozenset(),
    renames=((r"^ernie\.", "model."),),
    layer=DECODER_LAYER | SHARED_EXPERTS | {"mlp.gate": "ffn_gate_inp"},
    experts=EXPERT_MATRICES,
    stacked=STACKED_EXPERTS,
    bare=dict.fromkeys(
        ("mlp.moe_statics.e_score_correction_bias", "mlp.gate.moe_statics.e_score_correction_bias"),
        ("exp_probs_b.bias",),
    ),
    leaves_out=lambda _: DRAFTS,
)
