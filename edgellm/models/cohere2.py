"""Command R7B and Command A: as Command R, and three of four layers slide; the others are not rotated."""

from __future__ import annotations

import numpy as np

from edgellm.formats.model_file import ModelFile
from edgellm.kernels.program import Program
from edgellm.models.command_r import COHERE_LAYER, SIDE_BY_SIDE, cohere_metadata, logit_scale
from edgellm.models.parts.blocks import LayerKind, build_decoder
from edgellm.models.parts.checkpoint_config import CheckpointConfig
from edgellm.models.parts.checkpoint_form import CheckpointForm, TypedMetadata, layer_kinds
from edgellm.models.parts.hparams import integer
from edgellm.models.parts.local_layers import local_layers

PERIOD = 4


def build(gguf: ModelFile) -> Program:
    """x += attention(h) + ffn(h), h = norm(x): see ``build_decoder``."""
    window = integer(gguf, "attention.sliding_window", least=1)
    slides = local_layers(gguf, integer(gguf, "block_count"), PERIOD)
    return build_decoder(
        gguf,
        adjacent=True,
        norms=SIDE_BY_SIDE,
        scales=logit_scale(gguf),
        layer_norms=True,
        kinds=lambda i: LayerKind(window=window) if slides[i] else LayerKind(None),
    )


def checkpoint_metadata(config: CheckpointConfig) -> TypedMetadata:
    """The keys of this architecture, from config.json."""
    period = config.integer("sliding_window_pattern", PERIOD)
    slides = layer_kinds(config, lambda i: (i + 1) % period != 0)
    found = cohere_metadata(config, "cohere2")
    found["cohere2.attention.sliding_window"] = (config.integer("sliding_window"), "UINT32")
    found["cohere2.vocab_size"] = (config.integer("vocab_size"), "UINT32")
    found["cohere2.rope.dimension_count"] = (config.head_dim, "UINT32")
    if slides != [(i + 1) % PERIOD != 0 for i in range(config.n_layer)]:
        found["cohere2.attention.sliding_window_pattern"] = (np.array(slides), "ARRAY[BOOL]")
    return found


CHECKPOINT = CheckpointForm(
    classes={"Cohere2ForCausalLM": "cohere2", "Cohere2Model": "cohere2"},
    metadata=checkpoint_metadata,
    layer=COHERE_LAYER,
)
