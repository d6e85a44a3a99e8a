"""Laguna: layers differ in their number of heads, and what attention gives is multiplied by softplus of a gate.

Layers that slide turn all of a head, the others a part of it, by another base. Experts are chosen by sigmoids and a
bias, behind the first layers; one is for all tokens.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from edgellm.formats.model_file import ModelFile
from edgellm.kernels.kv import KVLayer
from edgellm.kernels.ops import ApplyRope, Attention, SoftplusGate, StoreKV
from edgellm.kernels.program import Program
from edgellm.models.parts.blocks import ProgramBuilder, project_logits, rope_factors
from edgellm.models.parts.checkpoint_config import CheckpointConfig
from edgellm.models.parts.checkpoint_form import (
    DECODER_LAYER,
    QK_NORMS,
    CheckpointForm,
    TypedMetadata,
    decoder_metadata,
    layer_kinds,
    leading_dense_layers,
    refuse_activation,
    typed_metadata,
)
from edgellm.models.parts.checkpoint_rope import Rotation, rotated_part, rotations_by_layer
from edgellm.models.parts.experts import (
    EXPERT_MATRICES,
    SHARED_EXPERT,
    SHARED_EXPERTS,
    SIGMOID,
    STACKED_EXPERTS,
    dense_then_experts,
    expert_metadata,
    read_sigmoid_experts,
    shared_expert_metadata,
)
from edgellm.models.parts.hparams import HParams, hparam_error, integer, key_of, read_hparams, read_rope, real
from edgellm.models.parts.laguna_by_ollama import under_usual_names
from edgellm.models.parts.local_layers import local_layers

PERIOD = 4
BASES = (5e5, 1e4)
PER_HEAD, PER_ELEMENT = "per-head", "per-element"


def build(gguf: ModelFile) -> Program:
    """x += Wo (attention * softplus(Wg h));  x += ffn(h), each of h = RMSNorm(x)."""
    gguf = under_usual_names(gguf)
    hp = read_hparams(gguf, by_layer=("n_head",))
    if not min(hp.by_layer["n_head"]):
        raise hparam_error(gguf, "attention.head_count", 0, "1 or more in each layer")
    m = ProgramBuilder(gguf, hp)
    window = integer(gguf, "attention.sliding_window", 0)
    slides = local_layers(gguf, hp.n_layer, PERIOD, global_first=True) if window else [False] * hp.n_layer
    _rotations(m, slides)
    experts = read_sigmoid_experts(gguf, normed=True)
    n_dense = integer(gguf, "leading_dense_block_count")
    ffn = dense_then_experts(experts, n_dense, integer(gguf, "expert_shared_feed_forward_length", least=1))
    m.embed("x")
    for i in range(hp.n_layer):
        blk, m.hp = f"blk.{i}", hp.layer(i)
        m.rms_norm("x", f"{blk}.attn_norm", "h")
        _attention(m, blk, window if slides[i] else 0)
        m.add("x", "proj", "x")
        m.rms_norm("x", f"{blk}.ffn_norm", "h")
        ffn(m, blk)
        m.add("x", "proj", "x")
    project_logits(m)
    return m.finish()


def _rotations(m: ProgramBuilder, slides: list[bool]) -> None:
    hp = m.hp
    if not all(slides):
        factors = rope_factors(m)
        base = real(m.gguf, "rope.freq_base", BASES[0])
        rope = read_rope(m.gguf, hp, base, adjacent=False, factors=factors)
        m.ropes["wide"] = replace(rope, magnitude=_magnitude(m.gguf, rope.magnitude))
    if any(slides):
        base = real(m.gguf, "rope.freq_base_swa", real(m.gguf, "rope.freq_base", BASES[1]))
        m.ropes["near"] = read_rope(m.gguf, _near(m.gguf, hp), base, adjacent=False, scaled=False)


def _magnitude(gguf: ModelFile, usual: float) -> float:
    """That of YaRN. llama.cpp's converter writes the checkpoint's ``attention_factor``, which is all of it."""
    if gguf.metadata.get(key_of(gguf, "rope.scaling.type")) != "yarn":
        return usual
    return real(gguf, "rope.scaling.yarn_attn_factor", usual)


def _near(gguf: ModelFile, hp: HParams) -> HParams:
    n_rot = integer(gguf, "rope.dimension_count_swa", hp.n_rot, least=2)
    if n_rot % 2 or n_rot > hp.head_dim_k:
        expected = f"an even number up to the head size {hp.head_dim_k}"
        raise hparam_error(gguf, "rope.dimension_count_swa", n_rot, expected)
    return replace(hp, n_rot=n_rot)


def _attention(m: ProgramBuilder, blk: str, window: int) -> None:
    """proj = Wo (attention * softplus(Wg h)); a value of the gate is for a head or for a dimension of one."""
    hp, rope = m.hp, "near" if window else "wide"
    q, out = f"q_{hp.n_head}", f"attn_{hp.n_head}"
    m.linear("h", f"{blk}.attn_q", q, hp.n_head * hp.head_dim_k)
    m.linear("h", f"{blk}.attn_k", "k", hp.n_head_kv * hp.head_dim_k)
    m.linear("h", f"{blk}.attn_v", "v", hp.n_head_kv * hp.head_dim_v)
    for x, name in ((q, "attn_q_norm"), ("k", "attn_k_norm")):
        m.rms_norm(x, f"{blk}.{name}", x, hp.head_dim_k)
        m.ops.append(ApplyRope(x, hp.head_dim_k, rope))
    layer = m.cache_layer(KVLayer(hp.n_head_kv, hp.head_dim_k, hp.head_dim_v, window))
    m.ops.append(StoreKV("k", "v", layer))
    width = hp.n_head * hp.head_dim_v
    m.ops.append(Attention(q, m.buffer(out, width), layer, hp.n_head, 1 / math.sqrt(hp.head_dim_k)))
    found = m.gguf.tensors.get(f"{blk}.attn_gate.weight")
    n_gates = width if found is not None and found.shape[0] == width else hp.n_head
    gate = f"gate_{n_gates}"
    m.linear("h", f"{blk}.attn_gate", gate, n_gates)
    m.ops.append(SoftplusGate(out, gate, out))
    m.linear(out, f"{blk}.attn_output", "proj", hp.n_embd)


def checkpoint_metadata(config: CheckpointConfig) -> TypedMetadata:
    """The keys of this architecture, from config.json."""
    refuse_activation(config, "silu", "swish")
    if config.get("gating") not in (None, True, PER_HEAD, PER_ELEMENT):
        raise config.refuse("gating", f"true, {PER_HEAD} or {PER_ELEMENT}")
    wide, near = _both(config)
    if near.kind != "default":
        raise config.refuse(f"{near.key}.rope_type", "layers that slide whose rotation is not scaled", near.kind)
    slides = layer_kinds(config, lambda _: False)
    found = decoder_metadata(config, "laguna", lambda _: wide)
    found["laguna.attention.head_count"] = (_heads(config), "ARRAY[INT32]")
    found |= expert_metadata(config, "laguna")
    sizes: dict[str, float] = {
        "vocab_size": config.integer("vocab_size"),
        "rope.dimension_count": _rotated(config, wide),
        "expert_weights_norm": True,
        "expert_weights_scale": config.real("moe_routed_scaling_factor", 1.0),
        "expert_gating_func": SIGMOID,
        "leading_dense_block_count": _n_dense(config),
    }
    if any(slides):
        found["laguna.attention.sliding_window_pattern"] = (np.array(slides), "ARRAY[BOOL]")
        sizes |= {"attention.sliding_window": config.integer("sliding_window"), "rope.freq_base_swa": near.base}
        sizes["rope.dimension_count_swa"] = rotated_part(near, 1.0)
    return found | shared_expert_metadata(config, "laguna") | typed_metadata("laguna", sizes)


def _both(config: CheckpointConfig) -> tuple[Rotation, Rotation]:
    near = config.object_of("swa_rope_parameters", config.get("swa_rope_parameters"))
    if near:  # the first form: that of layers that see everything stands alone
        wide = config.object_of("rope_parameters", config.get("rope_parameters"))
        if "full_attention" in wide or near.get("partial_rotary_factor") is None:
            expected = "settings with it beside one rotation, and with its own partial_rotary_factor"
            raise config.refuse("swa_rope_parameters", expected)
        wide = {"partial_rotary_factor": config.get("partial_rotary_factor")} | wide
        both = {"full_attention": wide, "sliding_attention": near}
        config = replace(config, values={**config.values, "rope_parameters": both})
    return rotations_by_layer(config, ("default", "linear", "yarn"), BASES, ("partial_rotary_factor",))


def _rotated(config: CheckpointConfig, wide: Rotation) -> int:
    """Dimensions that are rotated where a layer sees everything: without any settings of rotations, half a head."""
    n = rotated_part(wide, 1.0 if config.get("rope_parameters") else 0.5)
    if int(config.head_dim * config.real("partial_rotary_factor", n / config.head_dim)) != n:
        raise config.refuse("partial_rotary_factor", f"what {wide.key} stands for, {n} of {config.head_dim}")
    return n


def _n_dense(config: CheckpointConfig) -> int:
    """Layers at the start that have no experts: the first one, where nothing says which."""
    only = config.get("mlp_only_layers")
    n = leading_dense_layers(config, len(only) if isinstance(only, list) else 1)
    if only is not None and only != list(range(n)):
        raise config.refuse("mlp_only_layers", f"the first layers alone, which are {list(range(n))}")
    return n


def _heads(config: CheckpointConfig) -> list[int]:
    """The number of heads of each layer."""
    heads = config.get("num_attention_heads_per_layer")
    if heads is None:
        return [config.integer("num_attention_heads")] * config.n_layer
    if not isinstance(heads, list) or len(heads) != config.n_layer:
        raise config.wrong("num_attention_heads_per_layer", heads, f"a number for each of {config.n_layer} layers")
    return [config.integer_of("num_attention_heads_per_layer", n) for n in heads]


CHECKPOINT = CheckpointForm(
    classes={"LagunaForCausalLM": "laguna", "LagunaModel": "laguna"},
    metadata=checkpoint_metadata,
    layer=DECODER_LAYER
    | QK_NORMS
    | SHARED_EXPERTS
    | {name: there for name, there in SHARED_EXPERT.items() if not name.endswith("_gate")}
    | {"mlp.gate": "ffn_gate_inp", "self_attn.g_proj": "attn_gate"},
    experts=EXPERT_MATRICES,
    stacked=STACKED_EXPERTS,
    bare=dict.fromkeys(
        ("mlp.gate.e_score_correction_bias", "mlp.experts.e_score_correction_bias"), ("exp_probs_b.bias",)
    ),
    extra=lambda _: {},
)
