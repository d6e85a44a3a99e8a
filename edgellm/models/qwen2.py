"""Qwen 2 and 2.5: llama with biases on q, k and v, and pairs half a head apart."""

from __future__ import annotations

import math

from edgellm.formats.model_file import ModelFile
from edgellm.kernels.program import Program
from edgellm.models.parts.blocks import ProgramBuilder, feed_forward, project_logits, project_qkv, rope_factors
from edgellm.models.parts.checkpoint_config import CheckpointConfig
from edgellm.models.parts.checkpoint_form import (
    QKV,
    CheckpointForm,
    TypedMetadata,
    decoder_metadata,
    refuse_activation,
    refuse_sliding_layers,
)
from edgellm.models.parts.hparams import read_hparams, read_rope, real


def build(gguf: ModelFile) -> Program:
    """x += Wo attention(rope(q), rope(k), v);  x += Wdown (silu(Wgate h) * Wup h), each of h = RMSNorm(x)."""
    hp = read_hparams(gguf)
    m = ProgramBuilder(gguf, hp)
    base = real(gguf, "rope.freq_base", 10000.0)
    m.ropes["rope"] = read_rope(gguf, hp, base, adjacent=False, factors=rope_factors(m))
    m.embed("x")
    for i in range(hp.n_layer):
        blk = f"blk.{i}"
        m.rms_norm("x", f"{blk}.attn_norm", "h")
        project_qkv(m, blk, needs_bias=True)
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
    return decoder_metadata(config, "qwen2")


CHECKPOINT = CheckpointForm(
    classes={"Qwen2ForCausalLM": "qwen2", "Qwen2Model": "qwen2"},
    metadata=checkpoint_metadata,
    biases=lambda _: QKV,
)
