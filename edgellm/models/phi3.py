"""Phi 3 and 4: llama with one matrix for q, k and v and one for gate and up, and frequencies for long contexts."""

from __future__ import annotations

import math

import numpy as np

from edgellm.formats.model_file import ModelFile
from edgellm.kernels.program import Program
from edgellm.models.parts.blocks import build_decoder, long_rope
from edgellm.models.parts.checkpoint_config import CheckpointConfig
from edgellm.models.parts.checkpoint_form import (
    DECODER_LAYER,
    CheckpointForm,
    TypedMetadata,
    decoder_metadata,
    refuse_activation,
    refuse_windows,
)
from edgellm.models.parts.checkpoint_rope import Rotation, rotated_dims, rotation
from edgellm.models.parts.hparams import integer

LONG = ("longrope", "su")  # two names of one scaling


def build(gguf: ModelFile) -> Program:
    """See ``build_decoder``. The window counts, as the models were trained; llama.cpp leaves it out."""
    window = integer(gguf, "attention.sliding_window", 0)
    return build_decoder(gguf, adjacent=False, window=window, ropes=lambda m: {"rope": long_rope(m, adjacent=False)})


def checkpoint_metadata(config: CheckpointConfig) -> TypedMetadata:
    """The keys of this architecture, from config.json."""
    refuse_activation(config, "silu", "swish")
    refuse_windows(config)
    rope = rotation_or_long(config)
    found = decoder_metadata(config, "phi3", rotation_or_long)
    window = 0 if config.get("sliding_window") is None else config.integer("sliding_window")
    found["phi3.attention.sliding_window"] = (window, "UINT32")
    found["phi3.rope.dimension_count"] = (rotated_dims(config), "UINT32")
    found["phi3.rope.scaling.original_context_length"] = (rope.original_length, "UINT32")
    if rope.kind in LONG:
        found["phi3.rope.scaling.attn_factor"] = (long_magnitude(rope), "FLOAT32")
    return found


def rotation_or_long(config: CheckpointConfig) -> Rotation:
    """A plain one, or one with other frequencies for long contexts."""
    return rotation(config, ("default", *LONG), ("partial_rotary_factor",))


def long_magnitude(rope: Rotation) -> float:
    """What rotated heads are multiplied by."""
    if rope.numbers.get("attention_factor") is not None:
        return rope.positive("attention_factor")
    factor = rope.positive("factor", rope.config.integer("max_position_embeddings") / rope.original_length)
    return math.sqrt(1 + math.log(factor) / math.log(rope.original_length)) if factor > 1 else 1.0


def long_and_short_factors(config: CheckpointConfig) -> dict[str, np.ndarray]:
    """What frequencies are divided by, in a context of the first training's length and in a longer one."""
    rope = rotation_or_long(config)
    if rope.kind not in LONG:
        return {}
    found, n = {}, rotated_dims(config) // 2
    for kind in ("long", "short"):
        key, numbers = f"{rope.key}.{kind}_factor", rope.numbers.get(f"{kind}_factor")
        if not isinstance(numbers, list) or len(numbers) != n or any(config.real_of(key, x) <= 0 for x in numbers):
            raise config.wrong(key, numbers, f"{n} numbers above 0")
        found[f"rope_factors_{kind}.weight"] = np.array(numbers, np.float32)
    return found


CHECKPOINT = CheckpointForm(
    classes={"Phi3ForCausalLM": "phi3", "Phi3Model": "phi3"},
    metadata=checkpoint_metadata,
    biases=lambda _: frozenset(),
    layer=DECODER_LAYER | {"self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up"},
    extra=long_and_short_factors,
    extra_is_usual=True,
)
