"""LFM2: most layers are short convolutions with a state of a few rows, the others attention as in Qwen 3."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from edgellm.formats.model_file import ModelFile
from edgellm.kernels.kv import StateLayer
from edgellm.kernels.ops import ShortConv
from edgellm.kernels.program import Program
from edgellm.models.parts.blocks import (
    ProgramBuilder,
    feed_forward,
    project_logits,
    rope_factors,
    self_attention,
)
from edgellm.models.parts.checkpoint_config import CheckpointConfig
from edgellm.models.parts.checkpoint_form import CheckpointForm, TypedMetadata, decoder_metadata
from edgellm.models.parts.hparams import integer, read_hparams, read_rope, real

CONV, ATTENTION = "conv", "full_attention"


def build(gguf: ModelFile) -> Program:
    """See ``build_lfm2``."""
    return build_lfm2(gguf, lambda m, blk: feed_forward(m, blk, "silu"))


def build_lfm2(gguf: ModelFile, ffn: Callable[[ProgramBuilder, str], None]) -> Program:
    """x += op(RMSNorm(x)), x += FFN(RMSNorm(x)); op is Wout (c * conv(b * x)) of [b|c|x] = Win h, or attention.

    A layer without key heads is a convolution.
    """
    hp = read_hparams(gguf, by_layer=("n_head_kv",))
    # older files of Ollama's name the last norm by its place, and some say a width of feed-forwards that is not theirs
    by_place = "output_norm.weight" in gguf.tensors and "token_embd_norm.weight" not in gguf.tensors
    gate = gguf.tensors.get("blk.0.ffn_gate.weight")
    if by_place and gate is not None:
        hp = replace(hp, n_ff=gate.shape[0])
    m = ProgramBuilder(gguf, hp)
    n_taps = integer(gguf, "shortconv.l_cache")
    base = real(gguf, "rope.freq_base", 1e6)
    m.ropes["rope"] = read_rope(gguf, hp, base, adjacent=False, factors=rope_factors(m))
    m.embed("x")
    for i in range(hp.n_layer):
        blk = f"blk.{i}"
        m.hp = hp.layer(i)
        m.rms_norm("x", f"{blk}.attn_norm", "h")
        if m.hp.n_head_kv:
            self_attention(m, blk, qk_norms="heads")
        else:
            m.linear("h", f"{blk}.shortconv.in_proj", "bcx", 3 * hp.n_embd)
            weight = m.weight(f"{blk}.shortconv.conv.weight", hp.n_embd, n_taps)
            layer = m.cache_layer(StateLayer((n_taps - 1) * hp.n_embd))
            m.ops.append(ShortConv("bcx", weight, m.buffer("conv", hp.n_embd), layer))
            m.linear("conv", f"{blk}.shortconv.out_proj", "proj", hp.n_embd)
        m.add("x", "proj", "x")
        m.rms_norm("x", f"{blk}.ffn_norm", "h")
        ffn(m, blk)
        m.add("x", "proj", "x")
    project_logits(m, norm="output_norm" if by_place else "token_embd_norm")
    return m.finish()


def lfm2_metadata(config: CheckpointConfig, architecture: str, n_ff: int) -> TypedMetadata:
    """The keys of the family, from config.json."""
    kinds = config.get("layer_types")
    if kinds is None:
        attends = config.get("full_attn_idxs")
        kinds = [ATTENTION if attends is None or i in attends else CONV for i in range(config.n_layer)]
    if not isinstance(kinds, list) or len(kinds) != config.n_layer or any(k not in (CONV, ATTENTION) for k in kinds):
        raise config.refuse("layer_types", f"{CONV} or {ATTENTION} for each of {config.n_layer} layers")
    n_head_kv = config.integer("num_key_value_heads", config.integer("num_attention_heads"))
    found = decoder_metadata(config, architecture, n_ff=n_ff, eps_key="norm_eps")
    return found | {
        f"{architecture}.attention.head_count_kv": (
            [n_head_kv * (kind == ATTENTION) for kind in kinds],
            "ARRAY[INT32]",
        ),
        f"{architecture}.shortconv.l_cache": (config.integer("conv_L_cache", 3), "UINT32"),
        f"{architecture}.vocab_size": (config.integer("vocab_size"), "UINT32"),
    }


def _feed_forward_length(config: CheckpointConfig) -> int:
    """The width that the settings stand for: two thirds, then up to a multiple, where it adjusts itself."""
    key = "block_ff_dim" if config.get("block_ff_dim") is not None else "intermediate_size"
    n_ff, multiple = config.integer(key), config.integer("block_multiple_of", 256)
    if not config.flag("block_auto_adjust_ff_dim", True):
        return n_ff
    n_ff = int(config.real("block_ffn_dim_multiplier", 1.0) * int(2 * n_ff / 3))
    return -(-n_ff // multiple) * multiple


LFM2_LAYER = {
    "operator_norm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_output",
    "self_attn.q_layernorm": "attn_q_norm",
    "self_attn.k_layernorm": "attn_k_norm",
    "conv.conv": "shortconv.conv",
    "conv.in_proj": "shortconv.in_proj",
    "conv.out_proj": "shortconv.out_proj",
    "ffn_norm": "ffn_norm",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w3": "ffn_up",
    "feed_forward.w2": "ffn_down",
}
LFM2_AROUND = {"model.embed_tokens": "token_embd", "model.embedding_norm": "token_embd_norm", "lm_head": "output"}
CHECKPOINT = CheckpointForm(
    classes={"Lfm2ForCausalLM": "lfm2", "Lfm2Model": "lfm2"},
    metadata=lambda config: lfm2_metadata(config, "lfm2", _feed_forward_length(config)),
    biases=lambda config: frozenset(),
    layer=LFM2_LAYER,
    around=LFM2_AROUND,
)
