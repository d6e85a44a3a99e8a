"""The text of Qwen3-VL with experts: as the dense one, and every feed-forward is a mixture of experts."""

from __future__ import annotations

from edgellm.formats.model_file import ModelFile
from edgellm.kernels.program import Program
from edgellm.models import qwen3moe
from edgellm.models.parts.checkpoint_config import CheckpointConfig
from edgellm.models.parts.checkpoint_form import (
    DECODER_LAYER,
    QK_NORMS,
    CheckpointForm,
    TypedMetadata,
    factors_of,
)
from edgellm.models.parts.experts import (
    EXPERT_MATRICES,
    STACKED_EXPERTS,
    expert_metadata,
    refuse_dense_layers,
)
from edgellm.models.qwen2vl import rotation_by_sections
from edgellm.models.qwen3vl import seeing_metadata


def build(gguf: ModelFile) -> Program:
    """The text is that of Qwen 3 with experts."""
    return qwen3moe.build(gguf)


def checkpoint_metadata(config: CheckpointConfig) -> TypedMetadata:
    """The keys of this architecture, from config.json."""
    refuse_dense_layers(config)
    found = seeing_metadata(config, "qwen3vlmoe") | expert_metadata(config, "qwen3vlmoe")
    found["qwen3vlmoe.expert_feed_forward_length"] = (config.integer("moe_intermediate_size"), "UINT32")
    return found


CHECKPOINT = CheckpointForm(
    classes={"Qwen3VLMoeForConditionalGeneration": "qwen3_vl_moe"},
    metadata=checkpoint_metadata,
    layer=DECODER_LAYER | QK_NORMS | {"mlp.gate": "ffn_gate_inp"},
    experts=EXPERT_MATRICES,
    stacked=STACKED_EXPERTS,
    turned_experts=True,
    extra=factors_of(rotation_by_sections),
)
