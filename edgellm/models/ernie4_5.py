"""ERNIE 4.5 (dense): llama that was trained with rotated pairs as neighbours, so no rows are reordered."""

from __future__ import annotations

from edgellm.formats.model_file import ModelFile
from edgellm.kernels.program import Program
from edgellm.models.parts.blocks import build_decoder
from edgellm.models.parts.checkpoint_config import CheckpointConfig
from edgellm.models.parts.checkpoint_form import (
    FEED_FORWARD,
    QKV,
    CheckpointForm,
    TypedMetadata,
    decoder_metadata,
    refuse_activation,
    refuse_windows,
)


def build(gguf: ModelFile) -> Program:
    """See ``build_decoder``."""
    return build_decoder(gguf, adjacent=True)


def checkpoint_metadata(config: CheckpointConfig) -> TypedMetadata:
    """The keys of this architecture, from config.json."""
    refuse_activation(config, "silu", "swish")
    refuse_windows(config)
    return decoder_metadata(config, "ernie4_5")


CHECKPOINT = CheckpointForm(
    classes={"Ernie4_5ForCausalLM": "ernie4_5", "Ernie4_5_ForCausalLM": "ernie4_5", "Ernie4_5Model": "ernie4_5"},
    metadata=checkpoint_metadata,
    biases=lambda config: QKV | {"attn_output"} | FEED_FORWARD if config.flag("use_bias", False) else frozenset(),
)
