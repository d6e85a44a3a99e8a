"""LFM2 with experts: as the dense one, and behind the first layers every feed-forward is a mixture of experts."""

from __future__ import annotations

from edgellm.formats.model_file import ModelFile
from edgellm.kernels.program import Program
from edgellm.models.lfm2 import LFM2_AROUND, LFM2_LAYER, build_lfm2, lfm2_metadata
from edgellm.models.parts.checkpoint_config import CheckpointConfig
from edgellm.models.parts.checkpoint_form import CheckpointForm, TypedMetadata
from edgellm.models.parts.experts import SIGMOID, dense_then_experts, expert_metadata, read_sigmoid_experts
from edgellm.models.parts.hparams import integer


def build(gguf: ModelFile) -> Program:
    """See ``build_lfm2`` and ``expert_feed_forward``."""
    n_dense = integer(gguf, "leading_dense_block_count", 0)
    return build_lfm2(gguf, dense_then_experts(read_sigmoid_experts(gguf, normed=True), n_dense))


def checkpoint_metadata(config: CheckpointConfig) -> TypedMetadata:
    """The keys of this architecture, from config.json."""
    for key, wanted in (("norm_topk_prob", True), ("use_expert_bias", True)):
        if config.flag(key, wanted) is not wanted:
            raise config.refuse(key, "models of this architecture with it")
    if config.real("routed_scaling_factor", 1.0) != 1:
        raise config.refuse("routed_scaling_factor", "1 for models of this architecture")
    n_dense = config.get("num_dense_layers")
    if type(n_dense) is not int or not 0 <= n_dense <= config.n_layer:
        raise config.wrong("num_dense_layers", n_dense, f"a whole number up to {config.n_layer}")
    found = lfm2_metadata(config, "lfm2moe", config.integer("intermediate_size"))
    return (
        found
        | expert_metadata(config, "lfm2moe")
        | {
            "lfm2moe.expert_feed_forward_length": (config.integer("moe_intermediate_size"), "UINT32"),
            "lfm2moe.leading_dense_block_count": (n_dense, "UINT32"),
            "lfm2moe.expert_gating_func": (SIGMOID, "UINT32"),
        }
    )


CHECKPOINT = CheckpointForm(
    classes={"Lfm2MoeForCausalLM": "lfm2_moe", "Lfm2MoeModel": "lfm2_moe"},
    metadata=checkpoint_metadata,
    biases=lambda config: frozenset(),
    layer=LFM2_LAYER | {"feed_forward.gate": "ffn_gate_inp"},
    around=LFM2_AROUND,
    experts={"w1": "ffn_gate_exps", "w3": "ffn_up_exps", "w2": "ffn_down_exps"},
    stacked={
        "feed_forward.experts.gate_up_proj": ("ffn_gate_exps", "ffn_up_exps"),
        "feed_forward.experts.down_proj": ("ffn_down_exps",),
    },
    bare={"feed_forward.expert_bias": ("exp_probs_b.bias",)},
)
