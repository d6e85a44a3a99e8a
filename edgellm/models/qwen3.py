"""Qwen 3 (dense): no biases, every head of q and k is normed before it is rotated."""

from __future__ import annotations

from edgellm.formats.model_file import ModelFile
from edgellm.kernels.program import Program
from edgellm.models.parts.blocks import build_decoder
from edgellm.models.parts.checkpoint_form import DECODER_LAYER, QK_NORMS, CheckpointForm, plain_metadata


def build(gguf: ModelFile) -> Program:
    """See ``build_decoder``."""
    return build_decoder(gguf, adjacent=False, qk_norms="heads")


CHECKPOINT = CheckpointForm(
    classes={"Qwen3ForCausalLM": "qwen3", "Qwen3Model": "qwen3"},
    metadata=plain_metadata,
    layer=DECODER_LAYER | QK_NORMS,
)
