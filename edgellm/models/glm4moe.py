"""GLM 4.5 to 4.7 with experts, chosen by sigmoids and a bias, and one that all tokens share; half of a head is rotated.

The first layers have none. Every head of q and k is normed in some of its models.
"""

from __future__ import annotations

from edgellm.formats.model_file import ModelFile
from edgellm.kernels.program import Program
from edgellm.models.parts.blocks import BlockNorms, build_decoder
from edgellm.models.parts.checkpoint_config import CheckpointConfig
from edgellm.models.parts.checkpoint_form import (
    DECODER_LAYER,
    QK_NORMS,
    QKV,
    CheckpointForm,
    TypedMetadata,
    count_of,
    decoder_metadata,
    refuse_activation,
    refuse_windows,
)
from edgellm.models.parts.checkpoint_rope import rotated_dims, rotation_of_a_part
from edgellm.models.parts.experts import (
    EXPERT_MATRICES,
    SHARED_EXPERTS,
    SIGMOID,
    STACKED_EXPERTS,
    dense_then_experts,
    read_sigmoid_experts,
)
from edgellm.models.parts.hparams import integer

QK = ("attn_q_norm.weight", "attn_k_norm.weight")


def build(gguf: ModelFile, *, nextn: bool = False) -> Program:
    """See ``build_decoder`` and ``dense_then_experts``."""
    experts = read_sigmoid_experts(gguf)
    n_dense, n_shared = integer(gguf, "leading_dense_block_count", 0), integer(gguf, "expert_shared_count")
    return build_decoder(
        gguf,
        adjacent=False,
        qk_norms="heads" if any(name.endswith(QK) for name in gguf.tensors) else "none",
        norms=BlockNorms(ffn="post_attention_norm"),
        ffn=dense_then_experts(experts, n_dense, n_shared * experts.n_ff),
        nextn=nextn,
    )


def checkpoint_metadata(config: CheckpointConfig) -> TypedMetadata:
    """The keys of this architecture, from config.json."""
    refuse_activation(config, "silu", "swish")
    refuse_windows(config)
    for key in ("n_group", "topk_group"):
        if config.integer(key, 1) != 1:
            raise config.refuse(key, "models of this architecture whose experts are one group (1)")
    found = decoder_metadata(config, "glm4moe", rotation_of_a_part)
    whole = {
        "rope.dimension_count": rotated_dims(config, 0.5),
        "expert_count": config.integer("n_routed_experts"),
        "expert_used_count": config.integer("num_experts_per_tok"),
        "expert_feed_forward_length": config.integer("moe_intermediate_size"),
        "expert_shared_count": count_of(config, "n_shared_experts"),
        "leading_dense_block_count": count_of(config, "first_k_dense_replace"),
        "expert_gating_func": SIGMOID,
    }
    found |= {f"glm4moe.{key}": (value, "UINT32") for key, value in whole.items()}
    found["glm4moe.expert_weights_scale"] = (config.real("routed_scaling_factor", 1.0), "FLOAT32")
    found["glm4moe.expert_weights_norm"] = (config.flag("norm_topk_prob", True), "BOOL")
    return found


def checkpoint_layer() -> dict[str, str]:
    """The modules of a layer."""
    others = {"post_attention_layernorm": "post_attention_norm", "mlp.gate": "ffn_gate_inp"}
    return DECODER_LAYER | QK_NORMS | SHARED_EXPERTS | others


CHECKPOINT = CheckpointForm(
    classes={"Glm4MoeForCausalLM": "glm4_moe", "Glm4MoeModel": "glm4_moe"},
    metadata=checkpoint_metadata,
    biases=lambda config: QKV if config.flag("attention_bias", False) else frozenset(),
    layer=checkpoint_layer(),
    experts=EXPERT_MATRICES,
    stacked=STACKED_EXPERTS,
    bare={"mlp.gate.e_score_correction_bias": ("exp_probs_b.bias",)},
    extra=lambda _: {},
)
