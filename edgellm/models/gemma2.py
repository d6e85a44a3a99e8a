"""Gemma 2: every other layer sees a sliding window, scores and logits are capped, norms stand before and after blocks.

Files store norm weights with the 1 already added.
"""

from __future__ import annotations

import math
from dataclasses import replace

from edgellm.formats.model_file import ModelFile
from edgellm.kernels.program import Program
from edgellm.models.parts.blocks import AROUND, LayerKind, Scales, build_decoder, feed_forward
from edgellm.models.parts.checkpoint_config import CheckpointConfig
from edgellm.models.parts.checkpoint_form import (
    GEMMA_LAYER,
    CheckpointForm,
    TypedMetadata,
    decoder_metadata,
    layer_kinds,
    refuse_activation,
)
from edgellm.models.parts.hparams import integer, real

N_LAYER_27B = 46  # the only size whose attention scale is not 1/sqrt(head size), https://arxiv.org/abs/2408.00118


def build(gguf: ModelFile) -> Program:
    """x += norm(Wo attention(rope(q), rope(k), v));  x += norm(Wdown (gelu(Wgate h) * Wup h))."""
    window = integer(gguf, "attention.sliding_window", 4096)
    softcap, logits_cap = real(gguf, "attn_logit_softcapping", 50.0), real(gguf, "final_logit_softcapping", 30.0)
    return build_decoder(
        gguf,
        adjacent=False,
        norms=AROUND,
        scales=replace(gemma_scales(gguf, N_LAYER_27B), softcap=softcap, logits_cap=logits_cap),
        kinds=lambda i: LayerKind(window=0 if i % 2 else window),
        ffn=lambda m, blk: feed_forward(m, blk, "gelu"),
    )


def gemma_scales(gguf: ModelFile, n_layer_27b: int) -> Scales:
    """Embeddings are scaled by the width; scores, of a model of so many layers, by the share of it that a head has."""
    n_embd = integer(gguf, "embedding_length")
    scores = 1 / math.sqrt(n_embd / integer(gguf, "attention.head_count", least=1))
    return Scales(math.sqrt(n_embd), scores=scores if integer(gguf, "block_count") == n_layer_27b else None)


def check_scores(config: CheckpointConfig, n_layer_27b: int) -> None:
    """UnsupportedError for a scale of scores that is not that of ``gemma_scales``, as GGUF has no key for it."""
    share = config.integer("hidden_size") / config.integer("num_attention_heads")
    scale = share if config.n_layer == n_layer_27b else config.head_dim
    if config.real("query_pre_attn_scalar") != scale:
        raise config.refuse("query_pre_attn_scalar", f"{scale:g} for models of this shape")


def checkpoint_metadata(config: CheckpointConfig) -> TypedMetadata:
    """The keys of this architecture, from config.json. UnsupportedError for a scale that GGUF has no key for."""
    refuse_activation(config, "gelu_pytorch_tanh", keys=("hidden_activation",))
    check_scores(config, N_LAYER_27B)
    if layer_kinds(config, lambda i: i % 2 == 0) != [i % 2 == 0 for i in range(config.n_layer)]:
        raise config.refuse("layer_types", "models of this architecture whose every other layer slides, the first too")
    found = decoder_metadata(config, "gemma2")
    found["gemma2.attention.sliding_window"] = (config.integer("sliding_window"), "UINT32")
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        cap = config.real(name, 0.0)
        if cap <= 0:
            raise config.refuse(name, "models of this architecture with a cap above 0", cap)
        found[f"gemma2.{name}"] = (cap, "FLOAT32")
    return found


CHECKPOINT = CheckpointForm(
    classes={"Gemma2ForCausalLM": "gemma2", "Gemma2Model": "gemma2"},
    metadata=checkpoint_metadata,
    layer=GEMMA_LAYER,
    norm_shift=1.0,
)
