"""Qwen 2 and 2.5: llama with biases on q, k and v, and pairs half a head apart."""

from __future__ import annotations

from edgellm.formats.model_file import ModelFile
from edgellm.kernels.program import Program
from edgellm.models.parts.blocks import build_decoder
from edgellm.models.parts.checkpoint_form import QKV, CheckpointForm, plain_metadata


def build(gguf: ModelFile) -> Program:
    """See ``build_decoder``."""
    return build_decoder(gguf, adjacent=False, needs_bias="qkv")


CHECKPOINT = CheckpointForm(
    classes={"Qwen2ForCausalLM": "qwen2", "Qwen2Model": "qwen2"},
    metadata=plain_metadata,
    biases=lambda _: QKV,
)
