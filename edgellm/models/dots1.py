"""dots.llm1: experts chosen by sigmoids and a bias behind the first layers, one that all tokens share, normed heads."""

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
    count_of,
    decoder_metadata,
    layer_kinds,
    refuse_activation,
    typed_metadata,
)
from edgellm.models.parts.experts import (
    EXPERT_MATRICES,
    SHARED_EXPERTS,
    SIGMOID,
    STACKED_EXPERTS,
    dense_then_experts,
    read_sigmoid_experts,
    with_groups,
)
from edgellm.models.parts.hparams import integer


def build(gguf: ModelFile) -> Program:
    """See ``build_decoder`` and ``dense_then_experts``."""
    experts = with_groups(gguf, read_sigmoid_experts(gguf))
    n_dense, n_shared = integer(gguf, "leading_dense_block_count", 0), integer(gguf, "expert_shared_count")
    ffn = dense_then_experts(experts, n_dense, n_shared * experts.n_ff)
    return build_decoder(gguf, adjacent=False, qk_norms="heads", ffn=ffn)


def checkpoint_metadata(config: CheckpointConfig) -> TypedMetadata:
    """The keys of this architecture, from config.json."""
    refuse_activation(config, "silu", "swish")
    first = count_of(config, "max_window_layers", config.n_layer)
    if any(layer_kinds(config, lambda i: config.get("sliding_window") is not None and i >= first)):
        raise config.refuse("layer_types", "models of this architecture whose layers see the whole context")
    return decoder_metadata(config, "dots1") | typed_metadata(
        "dots1",
        {
            "expert_count": config.integer("n_routed_experts"),
            "expert_used_count": config.integer("num_experts_per_tok"),
            "expert_feed_forward_length": config.integer("moe_intermediate_size"),
            "expert_shared_count": count_of(config, "n_shared_experts"),
            "expert_group_count": config.integer("n_group", 1),
            "expert_group_used_count": config.integer("topk_group", 1),
            "expert_weights_scale": config.real("routed_scaling_factor", 1.0),
            "expert_weights_norm": config.flag("norm_topk_prob", False),
            "expert_gating_func": SIGMOID,
            "leading_dense_block_count": count_of(config, "first_k_dense_replace", 0),
        },
    )


CHECKPOINT = CheckpointForm(
    classes={"Dots1ForCausalLM": "dots1", "Dots1Model": "dots1"},
    metadata=checkpoint_metadata,
    layer=DECODER_LAYER | QK_NORMS | SHARED_EXPERTS | {"mlp.gate": "ffn_gate_inp"},
    experts=EXPERT_MATRICES,
    stacked=STACKED_EXPERTS,
    bare={"mlp.gate.e_score_correction_bias": ("exp_probs_b.bias",)},
)
