"""Gemma 3 (text): most layers see a sliding window, norms stand before and after each block.

Files store norm weights with the 1 already added. Local layers rotate with a base of their own and are never scaled.
"""

from __future__ import annotations

import numpy as np

from edgellm.formats.model_file import ModelFile
from edgellm.kernels.program import Program
from edgellm.kernels.rope import Rope
from edgellm.models.gemma2 import check_scores, gemma_scales
from edgellm.models.parts.blocks import AROUND, LayerKind, ProgramBuilder, build_decoder, feed_forward, the_rope
from edgellm.models.parts.checkpoint_config import CheckpointConfig
from edgellm.models.parts.checkpoint_form import (
    GEMMA_LAYER,
    QK_NORMS,
    CheckpointForm,
    TypedMetadata,
    decoder_metadata,
    layer_kinds,
    refuse_activation,
)
from edgellm.models.parts.checkpoint_rope import frequency_factors, rotations_by_layer
from edgellm.models.parts.hparams import integer, read_rope, real
from edgellm.models.parts.local_layers import local_layers, pattern_metadata, sliding_by

PERIOD = 6
N_LAYER_27B = 62  # the only size whose attention scale is not 1/sqrt(head size), https://arxiv.org/abs/2503.19786


def build(gguf: ModelFile) -> Program:
    """x += norm(Wo attention(rope(norm(q)), rope(norm(k)), v));  x += norm(Wdown (gelu(Wgate h) * Wup h))."""
    window = integer(gguf, "attention.sliding_window")
    slides = local_layers(gguf, integer(gguf, "block_count"), PERIOD)
    return build_decoder(
        gguf,
        adjacent=False,
        norms=AROUND,
        qk_norms="heads",
        scales=gemma_scales(gguf, N_LAYER_27B),
        ropes=both_rotations,
        kinds=lambda i: LayerKind("local", window) if slides[i] else LayerKind("global"),
        ffn=lambda m, blk: feed_forward(m, blk, "gelu"),
    )


def both_rotations(m: ProgramBuilder) -> dict[str, Rope]:
    """Of layers that see everything, and of those that slide."""
    near = real(m.gguf, "rope.freq_base_swa", 1e4)
    return {
        "global": the_rope(m, adjacent=False, base=1e6),
        "local": read_rope(m.gguf, m.hp, near, adjacent=False, scaled=False),
    }


def checkpoint_metadata(config: CheckpointConfig) -> TypedMetadata:
    """The keys of this architecture, from config.json. UnsupportedError for a scale that GGUF has no key for."""
    if config.flag("use_bidirectional_attention", False):
        raise config.refuse("use_bidirectional_attention", "models of this class whose tokens see what is behind them")
    return shared_metadata(config)


def shared_metadata(config: CheckpointConfig) -> TypedMetadata:
    """Those that say nothing of which way a token sees."""
    refuse_activation(config, "gelu_pytorch_tanh")
    check_scores(config, N_LAYER_27B)
    wide, near = rotations_by_layer(config)
    if near.kind != "default":
        raise config.refuse(f"{near.key}.rope_type", "sliding layers whose rotation is not scaled", near.kind)
    found = decoder_metadata(config, "gemma3", lambda _: wide)
    if "gemma3.rope.scaling.attn_factor" in found:
        raise config.refuse(f"{wide.key}.attention_factor", "yarn without it", wide.numbers)
    found["gemma3.attention.sliding_window"] = (config.integer("sliding_window"), "UINT32")
    found |= _sliding_layers(config)
    found["gemma3.rope.freq_base_swa"] = (near.base, "FLOAT32")
    return found


def _sliding_layers(config: CheckpointConfig) -> TypedMetadata:
    """Nothing where five of six layers slide; a period, or a flag for every layer, where it is otherwise."""
    period = config.integer("sliding_window_pattern", PERIOD)
    sliding = layer_kinds(config, lambda i: (i + 1) % period != 0)
    if sliding == sliding_by(PERIOD, config.n_layer, global_first=False):
        return {}
    return {"gemma3.attention.sliding_window_pattern": pattern_metadata(sliding, global_first=False)}


def wide_factors(config: CheckpointConfig) -> dict[str, np.ndarray]:
    """The divisors of the layers that see everything; sliding layers have none."""
    return frequency_factors(rotations_by_layer(config)[0])


CHECKPOINT = CheckpointForm(
    classes={"Gemma3ForCausalLM": "gemma3_text", "Gemma3ForConditionalGeneration": "gemma3"},
    metadata=checkpoint_metadata,
    extra=wide_factors,
    layer=GEMMA_LAYER | QK_NORMS,
    norm_shift=1.0,
    space_prefix=False,
)
