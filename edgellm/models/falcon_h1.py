"""Falcon-H1: attention and Mamba-2 side by side in every layer, of the same input; files have its multipliers in the
weights.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from edgellm.formats.model_file import ModelFile
from edgellm.kernels.ops import RMSNorm
from edgellm.kernels.program import Program
from edgellm.models.parts.blocks import (
    ProgramBuilder,
    feed_forward,
    project_logits,
    rope_factors,
    self_attention,
)
from edgellm.models.parts.checkpoint_config import CheckpointConfig
from edgellm.models.parts.checkpoint_form import (
    DECODER_LAYER,
    FEED_FORWARD,
    CheckpointForm,
    TypedMetadata,
    attention_biases,
    decoder_metadata,
    refuse_activation,
)
from edgellm.models.parts.hparams import read_hparams, read_rope, real
from edgellm.models.parts.mamba2 import mamba2, read_mamba2
from edgellm.models.parts.mamba2_checkpoint import (
    MAMBA2_NUMBERS,
    SIZES_OF_MAMBA,
    mamba2_biases,
    mamba2_layer,
    mamba2_metadata,
    mamba2_shapes,
    mamba2_vectors,
)


def build(gguf: ModelFile) -> Program:
    """x += attention(h) + mamba2(h), x += FFN(RMSNorm(x))"""
    net, hp = read_mamba2(gguf), read_hparams(gguf)
    m = ProgramBuilder(gguf, hp)
    base = real(gguf, "rope.freq_base", 10000.0)
    m.ropes["rope"] = read_rope(gguf, hp, base, adjacent=False, factors=rope_factors(m))
    m.embed("x")
    for i in range(hp.n_layer):
        blk = f"blk.{i}"
        m.rms_norm("x", f"{blk}.attn_norm", "h")
        self_attention(m, blk)
        mamba2(m, blk, net, "ssm", needs_norm=False)
        m.add("proj", "ssm", "proj")
        m.add("x", "proj", "x")
        # the one norm whose name ends without .weight
        m.ops.append(RMSNorm("x", m.weight(f"{blk}.ffn_norm", hp.n_embd), "h", hp.eps))
        feed_forward(m, blk, "silu")
        m.add("x", "proj", "x")
    project_logits(m)
    return m.finish()


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def _with_sizes(config: CheckpointConfig) -> CheckpointConfig:
    """The settings with the widths that others leave: of the state's inputs, and of a head of them."""
    inner = config.integer("mamba_expand") * config.integer("hidden_size")
    inner, n_heads = config.integer("mamba_d_ssm", inner), config.integer("mamba_n_heads")
    head_dim = config.get("mamba_d_head")
    if inner % n_heads or head_dim not in (None, "auto", inner // n_heads):
        raise config.wrong("mamba_d_head", head_dim, f"mamba_d_ssm ({inner}) over mamba_n_heads ({n_heads})")
    return replace(config, values={**config.values, "mamba_d_head": inner // n_heads})


def checkpoint_metadata(config: CheckpointConfig) -> TypedMetadata:
    """The keys of this architecture, from config.json."""
    refuse_activation(config, "silu", "swish")
    config = _with_sizes(config)
    if config.flag("mamba_rms_norm", False) and config.flag("mamba_norm_before_gate", True):
        raise config.refuse("mamba_norm_before_gate", "models that gate first (false), or without mamba_rms_norm")
    if config.flag("tie_word_embeddings", False):
        one, other = config.real("embedding_multiplier", 1.0), config.real("lm_head_multiplier", 1.0)
        if one != other:
            raise config.refuse("tie_word_embeddings", "tied models whose two multipliers are the same")
    found = decoder_metadata(config, "falcon-h1") | mamba2_metadata(config, "falcon-h1", SIZES_OF_MAMBA)
    return found | {"falcon-h1.vocab_size": (config.integer("vocab_size"), "UINT32")}


def _reals(config: CheckpointConfig, key: str, n: int) -> list[float]:
    """Numbers under a key, ones where there are none."""
    found = config.get(key)
    if found is None:
        return [1.0] * n
    if not isinstance(found, list) or len(found) != n:
        raise config.wrong(key, found, f"{n} numbers")
    return [config.real_of(key, one) for one in found]


def multipliers(config: CheckpointConfig) -> dict[str, float | np.ndarray]:
    """What weights and biases are multiplied by, so that the activations need not be."""
    config = _with_sizes(config)
    names = ("attention_in", "attention_out", "key", "ssm_in", "ssm_out", "embedding", "lm_head")
    of = {name: config.real(f"{name}_multiplier", 1.0) for name in names}
    gate, down = _reals(config, "mlp_multipliers", 2)
    n_heads, groups = (
        config.integer("mamba_n_heads"),
        config.integer("mamba_n_groups") * config.integer("mamba_d_state"),
    )
    inner = n_heads * config.integer("mamba_d_head")
    parts = np.repeat(_reals(config, "ssm_multipliers", 5), [inner, inner, groups, groups, n_heads])  # z, x, B, C, dt
    return {
        "token_embd.weight": of["embedding"],
        "output.weight": of["lm_head"],
        "attn_q.weight": of["attention_in"],
        "attn_k.weight": of["attention_in"] * of["key"],
        "attn_k.bias": of["key"],
        "attn_v.weight": of["attention_in"],
        **dict.fromkeys(("attn_output.weight", "attn_output.bias"), of["attention_out"]),
        "ssm_in.weight": of["ssm_in"] * parts,
        "ssm_in.bias": parts,
        **dict.fromkeys(("ssm_out.weight", "ssm_out.bias"), of["ssm_out"]),
        **dict.fromkeys(("ffn_gate.weight", "ffn_gate.bias"), gate),
        **dict.fromkeys(("ffn_down.weight", "ffn_down.bias"), down),
    }


def _biases(config: CheckpointConfig) -> frozenset[str]:
    found = attention_biases(config) | mamba2_biases(config, "mamba_conv_bias", "mamba_proj_bias", "projectors_bias")
    return found | (FEED_FORWARD if config.flag("mlp_bias", False) else frozenset())


CHECKPOINT = CheckpointForm(
    classes={"FalconH1ForCausalLM": "falcon_h1", "FalconH1Model": "falcon_h1"},
    metadata=checkpoint_metadata,
    biases=_biases,
    layer={name.replace("mlp.", "feed_forward."): place for name, place in DECODER_LAYER.items()}
    | mamba2_layer("mamba"),
    around={"model.embed_tokens": "token_embd", "model.final_layernorm": "output_norm", "lm_head": "output"},
    bare={**mamba2_vectors("mamba"), "pre_ff_layernorm.weight": ("ffn_norm",)},
    numbers=MAMBA2_NUMBERS,
    factors=multipliers,
    shapes=lambda config: mamba2_shapes(_with_sizes(config), SIZES_OF_MAMBA),
    extra=lambda _: {},
)
