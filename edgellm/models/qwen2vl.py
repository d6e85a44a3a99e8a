"""The text of Qwen2-VL and Qwen2.5-VL: Qwen 2, rotated by positions of three parts, which are equal in a text."""

from __future__ import annotations

from edgellm.formats.model_file import ModelFile
from edgellm.kernels.program import Program
from edgellm.models.parts.blocks import build_decoder
from edgellm.models.parts.checkpoint_config import CheckpointConfig
from edgellm.models.parts.checkpoint_form import (
    QKV,
    CheckpointForm,
    TypedMetadata,
    decoder_metadata,
    factors_of,
    refuse_activation,
    refuse_sliding_layers,
)
from edgellm.models.parts.checkpoint_rope import Rotation, rope_sections, rotation


def build(gguf: ModelFile) -> Program:
    """See ``build_decoder``."""
    return build_decoder(gguf, adjacent=False, needs_bias="qkv")


def checkpoint_metadata(config: CheckpointConfig) -> TypedMetadata:
    """The keys of this architecture, from config.json."""
    refuse_activation(config, "silu", "swish")
    refuse_sliding_layers(config)
    found = decoder_metadata(config, "qwen2vl", rotation_by_sections)
    found["qwen2vl.rope.dimension_sections"] = (rope_sections(config, (16, 24, 24)), "ARRAY[INT32]")
    return found


def rotation_by_sections(config: CheckpointConfig) -> Rotation:
    """That of all layers, for a text; older settings call its kind "mrope"."""
    rope = rotation(config, ("default", "mrope", "linear", "yarn"), ("mrope_section", "mrope_interleaved"))
    return Rotation(config, rope.key, "default" if rope.kind == "mrope" else rope.kind, rope.base, rope.numbers)


CHECKPOINT = CheckpointForm(
    classes={
        "Qwen2VLForConditionalGeneration": "qwen2_vl",
        "Qwen2_5_VLForConditionalGeneration": "qwen2_5_vl",
    },
    metadata=checkpoint_metadata,
    biases=lambda _: QKV,
    extra=factors_of(rotation_by_sections),
)
