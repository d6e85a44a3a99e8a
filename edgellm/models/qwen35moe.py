"""Qwen 3.5 and 3.6 with experts: as the dense ones, and every feed-forward is a mixture and a shared expert."""

from __future__ import annotations

from edgellm.formats.model_file import ModelFile
from edgellm.kernels.program import Program
from edgellm.models.parts.checkpoint_config import CheckpointConfig
from edgellm.models.parts.checkpoint_form import CheckpointForm, TypedMetadata
from edgellm.models.parts.delta_net import apart_inputs, build_hybrid, read_delta_net
from edgellm.models.parts.delta_net_checkpoint import (
    DELTA_LAYER,
    DELTA_NUMBERS,
    DELTA_VECTORS,
    delta_metadata,
    value_columns,
    value_rows,
)
from edgellm.models.parts.experts import (
    EXPERT_MATRICES,
    SHARED_EXPERT,
    STACKED_EXPERTS,
    expert_metadata,
    experts_and_shared,
    read_experts,
    shared_expert_metadata,
)
from edgellm.models.parts.hparams import integer


def build(gguf: ModelFile, *, nextn: bool = False) -> Program:
    """As Qwen 3.5, but x += experts(h) + sigmoid(h w) shared(h)."""
    net = read_delta_net(gguf, tiled=True)
    experts = read_experts(gguf, shared=integer(gguf, "expert_shared_feed_forward_length", least=1))
    ffn = experts_and_shared(experts)
    return build_hybrid(gguf, net, inputs=apart_inputs(net), ffn=ffn, n_ff=experts.n_ff, nextn=nextn)


def checkpoint_metadata(config: CheckpointConfig) -> TypedMetadata:
    """The keys of this architecture, from config.json."""
    n_ff = config.integer("moe_intermediate_size")
    return (
        delta_metadata(config, "qwen35moe", n_ff=n_ff)
        | expert_metadata(config, "qwen35moe")
        | shared_expert_metadata(config, "qwen35moe")
    )


CHECKPOINT = CheckpointForm(
    classes={
        "Qwen3_5MoeForCausalLM": "qwen3_5_moe_text",
        "Qwen3_5MoeForConditionalGeneration": "qwen3_5_moe",
        "Qwen3_5MoeTextModel": "qwen3_5_moe_text",
    },
    metadata=checkpoint_metadata,
    layer=DELTA_LAYER | SHARED_EXPERT | {"mlp.gate": "ffn_gate_inp"},
    bare=DELTA_VECTORS,
    numbers=DELTA_NUMBERS,
    row_orders=value_rows,
    column_orders=value_columns,
    experts=EXPERT_MATRICES,
    stacked=STACKED_EXPERTS,
    extra=lambda _: {},
    norm_shift=1.0,
)
