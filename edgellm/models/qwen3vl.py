"""The text of Qwen3-VL: Qwen 3, rotated by positions of three parts, which are equal in a text.

Layers that would take something of a picture besides have nothing to add to a text.
"""

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
    factors_of,
    refuse_activation,
    refuse_windows,
)
from edgellm.models.parts.checkpoint_rope import rope_sections
from edgellm.models.qwen2vl import rotation_by_sections


def build(gguf: ModelFile) -> Program:
    """See ``build_decoder``."""
    return build_decoder(gguf, adjacent=False, qk_norms="heads")


def seeing_metadata(config: CheckpointConfig, architecture: str) -> TypedMetadata:
    """The keys of the family, from config.json."""
    refuse_activation(config, "silu", "swish")
    refuse_windows(config)
    found = decoder_metadata(config, architecture, rotation_by_sections)
    found[f"{architecture}.rope.dimension_sections"] = (rope_sections(config, (24, 20, 20)), "ARRAY[INT32]")
    taken = config.object_of("vision_config", config.get("vision_config")).get("deepstack_visual_indexes", [])
    if not isinstance(taken, list):
        raise config.wrong("vision_config.deepstack_visual_indexes", taken, "a list of layers")
    found[f"{architecture}.n_deepstack_layers"] = (len(taken), "UINT32")
    return found


CHECKPOINT = CheckpointForm(
    classes={"Qwen3VLForConditionalGeneration": "qwen3_vl"},
    metadata=lambda config: seeing_metadata(config, "qwen3vl"),
    layer=DECODER_LAYER | QK_NORMS,
    extra=factors_of(rotation_by_sections),
)
