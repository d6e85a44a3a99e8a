"""Gemma 2: every other layer sees a sliding window, scores and logits are capped, norms stand before and after blocks.

Files store norm weights with the 1 already added.
"""

from __future__ import annotations

import math

from edgellm.formats.model_file import ModelFile
from edgellm.kernels.ops import Softcap
from edgellm.kernels.program import Program
from edgellm.models.parts.blocks import (
    LayerKind,
    ProgramBuilder,
    feed_forward,
    project_logits,
    rope_factors,
    self_attention,
)
from edgellm.models.parts.checkpoint_config import CheckpointConfig
from edgellm.models.parts.checkpoint_form import (
    GEMMA_LAYER,
    CheckpointForm,
    TypedMetadata,
    decoder_metadata,
    layer_kinds,
    refuse_activation,
)
from edgellm.models.parts.hparams import integer, read_hparams, read_rope, real

N_LAYER_27B = 46  # the only size whose attention scale is not 1/sqrt(head size), https://arxiv.org/abs/2408.00118


def build(gguf: ModelFile) -> Program:
    """x += norm(Wo attention(rope(q), rope(k), v));  x += norm(Wdown (gelu(Wgate h) * Wup h))."""
    hp = read_hparams(gguf)
    m = ProgramBuilder(gguf, hp)
    base = real(gguf, "rope.freq_base", 10000.0)
    m.ropes["rope"] = read_rope(gguf, hp, base, adjacent=False, factors=rope_factors(m))
    window = integer(gguf, "attention.sliding_window", 4096)
    softcap, last_cap = real(gguf, "attn_logit_softcapping", 50.0), real(gguf, "final_logit_softcapping", 30.0)
    scale = 1 / math.sqrt(hp.n_embd / hp.n_head if hp.n_layer == N_LAYER_27B else hp.head_dim_k)
    m.embed("x", math.sqrt(hp.n_embd))
    for i in range(hp.n_layer):
        blk = f"blk.{i}"
        m.rms_norm("x", f"{blk}.attn_norm", "h")
        self_attention(m, blk, LayerKind(window=0 if i % 2 else window), scale=scale, softcap=softcap)
        m.rms_norm("proj", f"{blk}.post_attention_norm", "proj")
        m.add("x", "proj", "x")
        m.rms_norm("x", f"{blk}.ffn_norm", "h")
        feed_forward(m, blk, "gelu")
        m.rms_norm("proj", f"{blk}.post_ffw_norm", "proj")
        m.add("x", "proj", "x")
    project_logits(m)
    if last_cap:
        m.ops.append(Softcap(Program.output, Program.output, last_cap))
    return m.finish()


def checkpoint_metadata(config: CheckpointConfig) -> TypedMetadata:
    """The keys of this architecture, from config.json. UnsupportedError for a scale that GGUF has no key for."""
    refuse_activation(config, "gelu_pytorch_tanh", keys=("hidden_activation",))
    n_embd, n_head = config.integer("hidden_size"), config.integer("num_attention_heads")
    scale = n_embd / n_head if config.n_layer == N_LAYER_27B else config.head_dim
    if config.real("query_pre_attn_scalar") != scale:
        raise config.refuse("query_pre_attn_scalar", f"{scale:g} for models of this shape")
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
