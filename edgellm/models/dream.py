"""Dream (and DiffuCoder): Qwen 2.5's layers, whose tokens see all of their text; it writes by denoising.

It was made of a model that predicts the next token, and still does: the logits of a place are those of the row before.
"""

from __future__ import annotations

from edgellm.formats.model_file import ModelFile
from edgellm.kernels.program import Program
from edgellm.models.parts.checkpoint_config import CheckpointConfig
from edgellm.models.parts.checkpoint_form import (
    QKV,
    CheckpointForm,
    TypedMetadata,
    decoder_metadata,
    refuse_activation,
    refuse_windows,
)
from edgellm.models.parts.denoising import build_denoiser, denoising_metadata

MASK = 151666  # of a checkpoint that does not name it


def build(gguf: ModelFile) -> Program:
    """See ``build_denoiser``."""
    return build_denoiser(gguf, shifted=True, algorithm="entropy", block=0, adjacent=False, needs_bias="qkv")


def checkpoint_metadata(config: CheckpointConfig) -> TypedMetadata:
    """The keys of this architecture, from config.json."""
    refuse_activation(config, "silu", "swish")
    refuse_windows(config)
    return decoder_metadata(config, "dream") | denoising_metadata(config, "dream", shifted=True, mask=MASK)


CHECKPOINT = CheckpointForm(
    classes=dict.fromkeys(("DreamModel", "DreamForCausalLM"), "Dream"),
    metadata=checkpoint_metadata,
    biases=lambda _: QKV,
)
