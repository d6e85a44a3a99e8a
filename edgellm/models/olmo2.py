"""OLMo 2 and 3: norms stand behind each block and not before, q and k are normed over all heads together.

In OLMo 3 three of four layers slide; their rotation is never scaled.
"""

from __future__ import annotations

import numpy as np

from edgellm.formats.model_file import ModelFile
from edgellm.kernels.program import Program
from edgellm.kernels.rope import Rope
from edgellm.models.parts.blocks import AFTER, LayerKind, ProgramBuilder, build_decoder, the_rope
from edgellm.models.parts.checkpoint_config import CheckpointConfig
from edgellm.models.parts.checkpoint_form import (
    DECODER_LAYER,
    QK_NORMS,
    CheckpointForm,
    TypedMetadata,
    decoder_metadata,
    layer_kinds,
    refuse_activation,
    refuse_windows,
)
from edgellm.models.parts.checkpoint_rope import frequency_factors, rotation, rotations_by_layer
from edgellm.models.parts.hparams import integer, read_rope, real
from edgellm.models.parts.local_layers import local_layers

PERIOD = 4
BASE = 500000.0  # of both rotations, where the settings of an OLMo 3 have none


def build(gguf: ModelFile) -> Program:
    """x += norm(attention of x);  x += norm(ffn of x): see ``build_decoder``."""
    window = integer(gguf, "attention.sliding_window", 0)
    slides = local_layers(gguf, integer(gguf, "block_count"), PERIOD) if window else []

    def ropes(m: ProgramBuilder) -> dict[str, Rope]:
        wide = the_rope(m, adjacent=False)
        base = real(gguf, "rope.freq_base_swa", real(gguf, "rope.freq_base", 10000.0))
        return {"wide": wide, "near": read_rope(gguf, m.hp, base, adjacent=False, scaled=False)}

    def kinds(i: int) -> LayerKind:
        return LayerKind("near", window) if window and slides[i] else LayerKind("wide")

    return build_decoder(gguf, adjacent=False, norms=AFTER, qk_norms="rows", ropes=ropes, kinds=kinds)


def checkpoint_metadata(config: CheckpointConfig) -> TypedMetadata:
    """The keys of this architecture, from config.json."""
    refuse_activation(config, "silu", "swish")
    if config.model_type == "olmo2":
        refuse_windows(config)
        return decoder_metadata(config, "olmo2")
    wide, near = rotations_by_layer(config, bases=(BASE, BASE))
    if near.kind != "default":
        raise config.refuse(f"{near.key}.rope_type", "sliding layers whose rotation is not scaled", near.kind)
    found = decoder_metadata(config, "olmo2", lambda _: wide)
    slides = layer_kinds(config, lambda i: (i + 1) % PERIOD != 0)
    found["olmo2.attention.sliding_window"] = (config.integer("sliding_window"), "UINT32")
    found["olmo2.attention.sliding_window_pattern"] = (np.array(slides), "ARRAY[BOOL]")
    if near.base != wide.base:
        found["olmo2.rope.freq_base_swa"] = (near.base, "FLOAT32")
    return found


def wide_factors(config: CheckpointConfig) -> dict[str, np.ndarray]:
    """The divisors of the layers that see everything; sliding layers have none."""
    rope = rotation(config) if config.model_type == "olmo2" else rotations_by_layer(config, bases=(BASE, BASE))[0]
    return frequency_factors(rope)


CHECKPOINT = CheckpointForm(
    classes={
        "Olmo2ForCausalLM": "olmo2",
        "Olmo2Model": "olmo2",
        "Olmo3ForCausalLM": "olmo3",
        "Olmo3Model": "olmo3",
    },
    metadata=checkpoint_metadata,
    extra=wide_factors,
    layer={name: there for name, there in DECODER_LAYER.items() if name != "input_layernorm"}
    | QK_NORMS
    | {"post_attention_layernorm": "post_attention_norm", "post_feedforward_layernorm": "post_ffw_norm"},
)
