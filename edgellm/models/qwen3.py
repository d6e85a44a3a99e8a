"""Qwen 3 (dense): no biases, every head of q and k is normed before it is rotated."""

from __future__ import annotations

import math

from edgellm.formats.model_file import ModelFile
from edgellm.kernels.program import Program
from edgellm.models.parts.blocks import (
    ProgramBuilder,
    feed_forward,
    norm_qk_heads,
    project_logits,
    project_qkv,
    rope_factors,
)
from edgellm.models.parts.checkpoint_config import CheckpointConfig
from edgellm.models.parts.checkpoint_form import (
    DECODER_LAYER,
    QK_NORMS,
    CheckpointForm,
    TypedMetadata,
    decoder_metadata,
    refuse_activation,
    refuse_sliding_layers,
)
from edgellm.models.parts.hparams import read_hparams, read_rope, real


def build(gguf: ModelFile) -> Program:
    """x += Wo attention(rope(norm(q)), rope(norm(k)), v);  x += Wdown (silu(Wgate h) * Wup h), h = RMSNorm(x)."""
    hp = read_hparams(gguf)
    m = ProgramBuilder(gguf, hp)
    base = real(gguf, "rope.freq_base", 10000.0)
    m.ropes["rope"] = read_rope(gguf, hp, base, adjacent=False, factors=rope_factors(m))
    m.embed("x")
    for i in range(hp.n_layer):
        blk = f"blk.{i}"
        m.rms_norm("x", f"{blk}.attn_norm", "h")
        project_qkv(m, blk)
        norm_qk_heads(m, blk)
        m.apply_rope("q", "rope")
        m.apply_rope("k", "rope")
        m.attention("q", "k", "v", "attn", scale=1 / math.sqrt(hp.head_dim_k))
        m.linear("attn", f"{blk}.attn_output", "proj", hp.n_embd)
        m.add("x", "proj", "x")
        m.rms_norm("x", f"{blk}.ffn_norm", "h")
        feed_forward(m, blk, "silu")
        m.add("x", "proj", "x")
    project_logits(m)
    return m.finish()


def checkpoint_metadata(config: CheckpointConfig) -> TypedMetadata:
    """The keys of this architecture, from config.json."""
    refuse_activation(config, "silu", "swish")
    refuse_sliding_layers(config)
    return decoder_metadata(config, "qwen3")


CHECKPOINT = CheckpointForm(
    classes={"Qwen3ForCausalLM": "qwen3", "Qwen3Model": "qwen3"},
    metadata=checkpoint_metadata,
    layer=DECODER_LAYER | QK_NORMS,
)
