"""gpt-oss: experts with biases and a unit of their own, a sink in each head's softmax, every other layer slides.

YaRN's ramp lies between dimensions that are not rounded to whole ones, as the model was trained; GGUF has no key for
that.
"""

from __future__ import annotations

from edgellm.formats.model_file import ModelFile
from edgellm.kernels.program import Program
from edgellm.models.parts.blocks import LayerKind, ProgramBuilder, project_logits, rope_factors, self_attention
from edgellm.models.parts.checkpoint_config import CheckpointConfig
from edgellm.models.parts.checkpoint_form import (
    DECODER_LAYER,
    QKV,
    CheckpointForm,
    TypedMetadata,
    decoder_metadata,
    layer_kinds,
    refuse_activation,
)
from edgellm.models.parts.checkpoint_rope import Rotation, rotation
from edgellm.models.parts.experts import expert_feed_forward, expert_metadata, read_experts
from edgellm.models.parts.hparams import integer, read_hparams, read_rope, real


def build(gguf: ModelFile) -> Program:
    """x += Wo attention(rope(q), rope(k), v) + b;  x += experts(h)."""
    hp = read_hparams(gguf)
    m = ProgramBuilder(gguf, hp)
    experts = read_experts(gguf, needs_bias=True)
    window = integer(gguf, "attention.sliding_window")
    base = real(gguf, "rope.freq_base", 10000.0)
    m.ropes["rope"] = read_rope(gguf, hp, base, adjacent=False, factors=rope_factors(m), truncate=False)
    m.embed("x")
    for i in range(hp.n_layer):
        blk = f"blk.{i}"
        m.rms_norm("x", f"{blk}.attn_norm", "h")
        self_attention(m, blk, LayerKind(window=0 if i % 2 else window), needs_bias="qkvo", has_sinks=True)
        m.add("x", "proj", "x")
        m.rms_norm("x", f"{blk}.post_attention_norm", "h")
        expert_feed_forward(m, blk, experts, "clamped_swiglu")
        m.add("x", "proj", "x")
    project_logits(m)
    return m.finish()


def checkpoint_metadata(config: CheckpointConfig) -> TypedMetadata:
    """The keys of this architecture, from config.json."""
    refuse_activation(config, "silu", "swish")
    for key, wanted in (("swiglu_alpha", 1.702), ("swiglu_limit", 7.0)):
        if config.real(key, wanted) != wanted:
            raise config.refuse(key, f"{wanted:g} for models of this architecture")
    if layer_kinds(config, lambda i: i % 2 == 0) != [i % 2 == 0 for i in range(config.n_layer)]:
        raise config.refuse("layer_types", "models of this architecture whose every other layer slides, the first too")
    found = decoder_metadata(config, "gpt-oss", _rotation) | expert_metadata(config, "gpt-oss")
    found["gpt-oss.attention.sliding_window"] = (config.integer("sliding_window"), "UINT32")
    found["gpt-oss.expert_feed_forward_length"] = found["gpt-oss.feed_forward_length"]
    return found


def _rotation(config: CheckpointConfig) -> Rotation:
    """That of all layers. Every file of the architecture is read without truncation, so it must not ask for it."""
    found = rotation(config)
    if found.kind == "yarn" and found.numbers.get("truncate") is not False:
        raise config.refuse(f"{found.key}.truncate", "yarn without truncation (false) for a gpt_oss model", True)
    return Rotation(config, found.key, found.kind, found.base, found.numbers | {"truncate": None})


CHECKPOINT = CheckpointForm(
    classes={"GptOssForCausalLM": "gpt_oss", "GptOssModel": "gpt_oss"},
    metadata=checkpoint_metadata,
    biases=lambda config: (
        (QKV | {"attn_output"} if config.flag("attention_bias", True) else frozenset()) | {"ffn_gate_inp"}
    ),
    layer=DECODER_LAYER | {"post_attention_layernorm": "post_attention_norm", "mlp.router": "ffn_gate_inp"},
    bare={
        "self_attn.sinks": ("attn_sinks.weight",),
        "mlp.experts.gate_up_proj": ("ffn_gate_exps.weight", "ffn_up_exps.weight"),
        "mlp.experts.gate_up_proj_bias": ("ffn_gate_exps.bias", "ffn_up_exps.bias"),
        "mlp.experts.down_proj": ("ffn_down_exps.weight",),
        "mlp.experts.down_proj_bias": ("ffn_down_exps.bias",),
    },
    transposed_experts=True,
)
