"""GLM 4 of 2024 (glm-4-9b-chat): llama with a half of each head rotated, and one matrix for gate and up."""

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
    typed_metadata,
)
from edgellm.models.parts.checkpoint_rope import rotated_dims, rotation_of_a_part


def build(gguf: ModelFile) -> Program:
    """See ``build_decoder``."""
    return build_decoder(gguf, adjacent=True)


def checkpoint_metadata(config: CheckpointConfig) -> TypedMetadata:
    """The keys of this architecture, from config.json."""
    refuse_activation(config, "silu", "swish")
    refuse_windows(config)
    sizes = {"rope.dimension_count": rotated_dims(config, 0.5)}
    return decoder_metadata(config, "chatglm", rotation_of_a_part) | typed_metadata("chatglm", sizes)


CHECKPOINT = CheckpointForm(
    classes={"GlmForCausalLM": "glm", "GlmModel": "glm"},
    metadata=checkpoint_metadata,
    biases=lambda config: QKV if config.flag("attention_bias", True) else frozenset(),
    layer=DECODER_LAYER | {"mlp.gate_up_proj": "ffn_up"},
    extra=lambda _: {},
)
