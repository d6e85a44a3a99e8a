"""Gemma 3 (text): most layers see a sliding window, norms stand before and after each block.

Files store norm weights with the 1 already added. Local layers rotate with a base of their own and are never scaled.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from edgellm.formats.errors import UnsupportedError
from edgellm.kernels.program import Program
from edgellm.models.blocks import ProgramBuilder, feed_forward, norm_qk_heads, project_logits, project_qkv
from edgellm.models.hparams import (
    HParams,
    file_name,
    hparam_error,
    integer,
    key_of,
    read_hparams,
    read_rope,
    real,
)

if TYPE_CHECKING:
    from edgellm.formats.gguf import GGUFFile

N_LAYER_27B = 62  # the only size whose attention scale is not 1/sqrt(head size), https://arxiv.org/abs/2503.19786


def build(gguf: GGUFFile) -> Program:
    """x += norm(Wo attention(rope(norm(q)), rope(norm(k)), v));  x += norm(Wdown (gelu(Wgate h) * Wup h))."""
    hp = read_hparams(gguf)
    if real(gguf, "final_logit_softcapping", 0.0):
        raise UnsupportedError(
            f"{file_name(gguf)}: {key_of(gguf, 'final_logit_softcapping')} is set; edgellm runs Gemma 3 models without "
            "it, as they were published. Take another conversion of the model."
        )
    m = ProgramBuilder(gguf, hp)
    m.ropes["global"] = read_rope(gguf, hp, real(gguf, "rope.freq_base", 1e6), adjacent=False)
    m.ropes["local"] = read_rope(gguf, hp, real(gguf, "rope.freq_base_swa", 1e4), adjacent=False, scaled=False)
    window = integer(gguf, "attention.sliding_window")
    scale = 1 / math.sqrt(hp.n_embd / hp.n_head if hp.n_layer == N_LAYER_27B else hp.head_dim_k)
    m.embed("x", scale=math.sqrt(hp.n_embd))
    for i, local in enumerate(local_layers(gguf, hp)):
        blk = f"blk.{i}"
        rope = "local" if local else "global"
        m.rms_norm("x", f"{blk}.attn_norm", "h")
        project_qkv(m, blk)
        norm_qk_heads(m, blk)
        m.apply_rope("q", rope)
        m.apply_rope("k", rope)
        m.attention("q", "k", "v", "attn", scale=scale, window=window if local else 0)
        m.linear("attn", f"{blk}.attn_output", "proj", hp.n_embd)
        m.rms_norm("proj", f"{blk}.post_attention_norm", "proj")
        m.add("x", "proj", "x")
        m.rms_norm("x", f"{blk}.ffn_norm", "h")
        feed_forward(m, blk, "gelu")
        m.rms_norm("proj", f"{blk}.post_ffw_norm", "proj")
        m.add("x", "proj", "x")
    project_logits(m)
    return m.finish()


def local_layers(gguf: GGUFFile, hp: HParams) -> list[bool]:
    """Which layers slide: five of six, every n-th not, or as the array ``attention.sliding_window_pattern`` says."""
    key = "attention.sliding_window_pattern"
    pattern = gguf.metadata.get(key_of(gguf, key))
    if isinstance(pattern, np.ndarray):
        if pattern.shape != (hp.n_layer,):
            raise hparam_error(gguf, key, f"an array of {pattern.size}", f"one value for each of {hp.n_layer} layers")
        return [bool(local) for local in pattern]
    period = integer(gguf, key, 6)
    return [(i + 1) % period != 0 for i in range(hp.n_layer)]
