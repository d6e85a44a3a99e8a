"""Llama 2 and 3, Mistral, SmolLM2 and everything else that was converted as ``llama``.

GGUF files of this architecture store q and k with their rows reordered, so that rotated pairs are neighbours.
"""

from __future__ import annotations

import math

from edgellm.formats.model_file import ModelFile
from edgellm.kernels.program import Program
from edgellm.models.parts.blocks import (
    ProgramBuilder,
    feed_forward,
    project_logits,
    project_qkv,
    refuse_experts,
    rope_factors,
)
from edgellm.models.parts.checkpoint_config import CheckpointConfig
from edgellm.models.parts.checkpoint_form import (
    FEED_FORWARD,
    CheckpointForm,
    TypedMetadata,
    attention_biases,
    decoder_metadata,
    layer_kinds,
    refuse_activation,
)
from edgellm.models.parts.hparams import integer, read_hparams, read_rope, real


def build(gguf: ModelFile) -> Program:
    """x += Wo attention(rope(q), rope(k), v);  x += Wdown (silu(Wgate h) * Wup h), each of h = RMSNorm(x)."""
    hp = read_hparams(gguf)
    refuse_experts(gguf)
    m = ProgramBuilder(gguf, hp)
    base = real(gguf, "rope.freq_base", 10000.0)
    m.ropes["rope"] = read_rope(gguf, hp, base, adjacent=True, factors=rope_factors(m))
    window = integer(gguf, "attention.sliding_window", 0)  # Mistral 7B v0.1, where the converter kept it
    m.embed("x")
    for i in range(hp.n_layer):
        blk = f"blk.{i}"
        m.rms_norm("x", f"{blk}.attn_norm", "h")
        project_qkv(m, blk)
        m.apply_rope("q", "rope")
        m.apply_rope("k", "rope")
        m.attention("q", "k", "v", "attn", scale=1 / math.sqrt(hp.head_dim_k), window=window)
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
    found = decoder_metadata(config, "llama")
    found["llama.vocab_size"] = (config.integer("vocab_size"), "UINT32")
    found["llama.rope.dimension_count"] = (config.head_dim, "UINT32")
    window = config.get("sliding_window") if config.model_type == "mistral" else None
    if len({window is not None, *layer_kinds(config, lambda _: window is not None)}) > 1:
        raise config.refuse("layer_types", "models of this architecture whose layers all slide, or none")
    if window is not None:
        found["llama.attention.sliding_window"] = (config.integer("sliding_window"), "UINT32")
    return found


def checkpoint_biases(config: CheckpointConfig) -> frozenset[str]:
    """The modules that have a bias; none in Mistral."""
    return attention_biases(config) | (FEED_FORWARD if config.flag("mlp_bias", False) else frozenset())


CHECKPOINT = CheckpointForm(
    classes={
        "LlamaForCausalLM": "llama",
        "LLaMAForCausalLM": "llama",
        "MistralForCausalLM": "mistral",
        "LlamaModel": "llama",
        "MistralModel": "mistral",
    },
    metadata=checkpoint_metadata,
    biases=checkpoint_biases,
    pairs_heads=True,
)
