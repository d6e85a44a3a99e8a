"""MiniCPM 1, 2 and 4: llama with numbers that multiply embeddings, what blocks add, and logits; long rotations."""

from __future__ import annotations

import math

from edgellm.formats.model_file import ModelFile
from edgellm.kernels.program import Program
from edgellm.models.parts.blocks import Scales, build_decoder, long_rope
from edgellm.models.parts.checkpoint_config import CheckpointConfig
from edgellm.models.parts.checkpoint_form import (
    CheckpointForm,
    TypedMetadata,
    attention_biases,
    decoder_metadata,
    refuse_activation,
    typed_metadata,
)
from edgellm.models.parts.hparams import hparam_error, integer, real
from edgellm.models.phi3 import LONG, long_and_short_factors, long_magnitude, rotation_or_long

EMBEDDINGS, DEPTH, WIDTH = 12.0, 1.4, 256
"""What files of the first models do not say: two factors, and the width that logits are scaled to."""


def build(gguf: ModelFile) -> Program:
    """See ``build_decoder``."""
    n_layer, n_embd = integer(gguf, "block_count"), integer(gguf, "embedding_length")
    divisor = real(gguf, "logit_scale", n_embd / WIDTH)
    if divisor == 0:
        raise hparam_error(gguf, "logit_scale", divisor, "a number above 0, which logits are divided by")
    embeddings = real(gguf, "embedding_scale", EMBEDDINGS) or 1.0
    residual = real(gguf, "residual_scale", DEPTH / math.sqrt(n_layer)) or 1.0
    return build_decoder(
        gguf,
        adjacent=True,
        scales=Scales(embeddings, residual, None, 1 / divisor),
        ropes=lambda m: {"rope": long_rope(m, adjacent=True)},
    )


def checkpoint_metadata(config: CheckpointConfig) -> TypedMetadata:
    """The keys of this architecture, from config.json."""
    refuse_activation(config, "silu", "swish")
    rope = rotation_or_long(config)
    found = decoder_metadata(config, "minicpm", rotation_or_long)
    if rope.kind in LONG:
        found["minicpm.rope.scaling.type"] = ("longrope", "STRING")
        found["minicpm.rope.scaling.original_context_length"] = (rope.original_length, "UINT32")
        found["minicpm.rope.scaling.attn_factor"] = (long_magnitude(rope), "FLOAT32")
    depth = config.real("scale_depth", 1.0) / math.sqrt(config.n_layer)
    numbers = {
        "embedding_scale": config.real("scale_emb", 1.0),
        "residual_scale": depth,
        "logit_scale": config.integer("hidden_size") / config.integer("dim_model_base", 1),
    }
    for key, number in numbers.items():
        if number <= 0:
            raise config.wrong({"embedding_scale": "scale_emb"}.get(key, "scale_depth"), number, "a number above 0")
    return found | typed_metadata("minicpm", numbers)


CHECKPOINT = CheckpointForm(
    classes={"MiniCPMForCausalLM": "minicpm"},
    metadata=checkpoint_metadata,
    biases=attention_biases,
    pairs_heads=True,
    extra=long_and_short_factors,
    extra_is_usual=True,
)
