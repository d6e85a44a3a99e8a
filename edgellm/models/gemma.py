"""Gemma: llama with a GELU, wide embeddings multiplied by the root of their width, and heads wider than those.

Files store norm weights with the 1 already added.
"""

from __future__ import annotations

import math

from edgellm.formats.model_file import ModelFile
from edgellm.kernels.program import Program
from edgellm.models.parts.blocks import Scales, build_decoder, feed_forward
from edgellm.models.parts.checkpoint_config import CheckpointConfig
from edgellm.models.parts.checkpoint_form import (
    CheckpointForm,
    TypedMetadata,
    decoder_metadata,
    refuse_activation,
    refuse_windows,
)
from edgellm.models.parts.hparams import integer


def build(gguf: ModelFile) -> Program:
    """See ``build_decoder``."""
    scales = Scales(embeddings=math.sqrt(integer(gguf, "embedding_length")))
    return build_decoder(gguf, adjacent=False, scales=scales, ffn=lambda m, blk: feed_forward(m, blk, "gelu"))


def checkpoint_metadata(config: CheckpointConfig) -> TypedMetadata:
    """The keys of this architecture, from config.json; its "gelu" is the tanh form by another name."""
    refuse_activation(config, "gelu_pytorch_tanh", "gelu", keys=("hidden_act",))
    refuse_windows(config)
    return decoder_metadata(config, "gemma")


CHECKPOINT = CheckpointForm(
    classes={"GemmaForCausalLM": "gemma", "GemmaModel": "gemma"},
    metadata=checkpoint_metadata,
    norm_shift=1.0,
)
