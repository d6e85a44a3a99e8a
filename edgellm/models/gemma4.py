"""Gemma 4 (text): layers that slide and layers that see everything differ in their heads, and three parts may be there.

    shared keys     the last layers keep none of their own and read those of the last layer of their kind that does
    per-layer       each layer adds what it makes of the token's own row in a second table of embeddings
    experts         they stand beside the feed-forward, each with norms of its own

Norm weights are stored as they are, scores are not scaled, values are normed without a weight. Heads of layers that see
everything may have no values, which are then their keys as they are before norm and rotation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from edgellm.formats.model_file import ModelFile
from edgellm.kernels.kv import KVLayer
from edgellm.kernels.ops import Add, ApplyRope, Attention, Embed, RMSNorm, Scale, StoreKV
from edgellm.kernels.program import Program
from edgellm.models.gemma3 import PERIOD
from edgellm.models.parts.blocks import ProgramBuilder, feed_forward, project_logits, rope_factors
from edgellm.models.parts.experts import Experts, expert_feed_forward, read_experts
from edgellm.models.parts.gemma4_checkpoint import GEMMA4_FORM
from edgellm.models.parts.hparams import HParams, hparam_error, integer, key_of, read_hparams, read_rope, real
from edgellm.models.parts.local_layers import layers_read, local_layers

CHECKPOINT = GEMMA4_FORM


@dataclass(frozen=True)
class Kind:
    """What sets the layers of a kind apart: the name that ends their buffers and is their rotation, sizes, window."""

    name: str
    hp: HParams
    window: int


@dataclass(frozen=True)
class Layer:
    """A layer of a kind. ``reads`` is the layer whose keys and values it attends to: itself, or an earlier one."""

    kind: Kind
    hp: HParams
    reads: int


def build(gguf: ModelFile) -> Program:
    """x += norm(attention);  x += norm(ffn [+ experts]);  x += norm((gelu(x Wg^T) * own) Wp^T);  x *= scale."""
    hp = read_hparams(gguf, by_layer=("n_head_kv", "n_ff"))
    m = ProgramBuilder(gguf, hp)
    layers = read_layers(gguf, hp)
    own = integer(gguf, "embedding_length_per_layer_input", 0)
    routed = integer(gguf, "expert_count", 0) > 0 or "blk.0.ffn_gate_inp.weight" in gguf.tensors
    experts = read_experts(gguf) if routed else None
    _rotations(m, layers)
    m.embed("x", math.sqrt(hp.n_embd))
    if own:
        per_layer_inputs(m, own)
    caches: dict[int, int] = {}
    for i, layer in enumerate(layers):
        blk, m.hp = f"blk.{i}", layer.hp
        m.rms_norm("x", f"{blk}.attn_norm", "h")
        caches[i] = attention(m, blk, layer, caches.get(layer.reads), values=_has_values(m, i, layers))
        m.rms_norm("proj", f"{blk}.post_attention_norm", "proj")
        m.add("x", "proj", "x")
        m.rms_norm("x", f"{blk}.ffn_norm", "h")
        feed_forward(m, blk, "gelu", of=f"_{layer.hp.n_ff}", out="proj" if experts is None else "dense")
        if experts is not None:
            beside_experts(m, blk, experts)
        m.rms_norm("proj", f"{blk}.post_ffw_norm", "proj")
        m.add("x", "proj", "x")
        if own:
            add_own_input(m, blk, i, own)
        if f"{blk}.layer_output_scale.weight" in gguf.tensors:
            m.ops.append(Scale("x", "x", m.number(f"{blk}.layer_output_scale.weight")))
    project_logits(m, cap=real(gguf, "final_logit_softcapping", 0.0))
    return m.finish()


def read_layers(gguf: ModelFile, hp: HParams) -> list[Layer]:
    """The layers, by the keys. FormatError for sizes that do not go together, and for keys that nobody keeps."""
    pattern = "attention.sliding_window_pattern"
    if not isinstance(found := gguf.metadata.get(key_of(gguf, pattern)), np.ndarray):
        raise hparam_error(gguf, pattern, found, f"an array of one value for each of {hp.n_layer} layers")
    wide = Kind("wide", hp, 0)
    near = Kind("near", _near_sizes(gguf, hp), integer(gguf, "attention.sliding_window", least=1))
    for suffix, kind in (("", wide), ("_swa", near)):
        if kind.hp.head_dim_v != kind.hp.head_dim_k:
            key = f"attention.value_length{suffix}"
            raise hparam_error(gguf, key, kind.hp.head_dim_v, f"the size of keys, which is {kind.hp.head_dim_k}")
    n_shared = integer(gguf, "attention.shared_kv_layers", 0)
    kinds = [near if slides else wide for slides in local_layers(gguf, hp.n_layer, PERIOD)]
    all_reads, layers = layers_read(gguf, [kind.name for kind in kinds], n_shared), []
    for i, (kind, reads) in enumerate(zip(kinds, all_reads, strict=True)):
        sizes = hp.layer(i)
        for name, key in (("n_head_kv", "attention.head_count_kv"), ("n_ff", "feed_forward_length")):
            if not getattr(sizes, name):
                raise hparam_error(gguf, key, 0, f"1 or more in each layer, as in layer {i}")
        if (there := hp.layer(reads).n_head_kv) != sizes.n_head_kv:
            expected = f"{there} in layer {i}, as in layer {reads}, whose keys it reads"
            raise hparam_error(gguf, "attention.head_count_kv", sizes.n_head_kv, expected)
        own = replace(sizes, head_dim_k=kind.hp.head_dim_k, head_dim_v=kind.hp.head_dim_v, n_rot=kind.hp.n_rot)
        layers.append(Layer(kind, own, reads))
    return layers


def _near_sizes(gguf: ModelFile, hp: HParams) -> HParams:
    head_dim = integer(gguf, "attention.key_length_swa")
    n_rot = integer(gguf, "rope.dimension_count_swa", head_dim, least=2)
    if n_rot % 2 or n_rot > head_dim:
        raise hparam_error(gguf, "rope.dimension_count_swa", n_rot, f"an even number up to the head size {head_dim}")
    return replace(hp, head_dim_k=head_dim, head_dim_v=integer(gguf, "attention.value_length_swa"), n_rot=n_rot)


def _rotations(m: ProgramBuilder, layers: list[Layer]) -> None:
    """Layers that see everything divide their frequencies by a tensor: by so much, for most, that they stand still."""
    for kind in dict.fromkeys(layer.kind.name for layer in layers):
        m.hp = next(layer.hp for layer in layers if layer.kind.name == kind)
        if kind == "wide":
            base, factors = real(m.gguf, "rope.freq_base", 1e6), rope_factors(m, required=True)
            m.ropes[kind] = read_rope(m.gguf, m.hp, base, adjacent=False, factors=factors)
        else:
            base = real(m.gguf, "rope.freq_base_swa", 1e4)
            m.ropes[kind] = read_rope(m.gguf, m.hp, base, adjacent=False, scaled=False)


def _has_values(m: ProgramBuilder, i: int, layers: list[Layer]) -> bool:
    """Whether a layer has a matrix for its values: those that slide must, of the others all or none."""
    alike = [j for j, layer in enumerate(layers) if layer.reads == j and layer.kind is layers[i].kind]
    return layers[i].kind.window > 0 or any(f"blk.{j}.attn_v.weight" in m.gguf.tensors for j in alike)


def attention(m: ProgramBuilder, blk: str, layer: Layer, shared: int | None, *, values: bool) -> int:
    """proj = attention(rope(norm(q)), rope(norm(k)), norm(v)) Wo^T; the cache that it reads, ``shared`` or its own."""
    hp, rope = layer.hp, layer.kind.name
    q, k, v, out = (f"{x}_{rope}_{hp.n_head_kv}" for x in ("q", "k", "v", "attn"))
    m.linear("h", f"{blk}.attn_q", q, hp.n_head * hp.head_dim_k)
    m.rms_norm(q, f"{blk}.attn_q_norm", q, hp.head_dim_k)
    m.ops.append(ApplyRope(q, hp.head_dim_k, rope))
    if shared is None:
        n_kv = hp.n_head_kv * hp.head_dim_k
        m.linear("h", f"{blk}.attn_k", k, n_kv)
        if values:
            m.linear("h", f"{blk}.attn_v", v, n_kv)
        m.ops.append(RMSNorm(v if values else k, m.ones(hp.head_dim_v), m.like(k, v), hp.eps))
        m.rms_norm(k, f"{blk}.attn_k_norm", k, hp.head_dim_k)
        m.ops.append(ApplyRope(k, hp.head_dim_k, rope))
        shared = m.cache_layer(KVLayer(hp.n_head_kv, hp.head_dim_k, hp.head_dim_v, layer.kind.window))
        m.ops.append(StoreKV(k, v, shared))
    else:  # files keep the matrices that such a layer was trained with before it lost them
        m.used |= {f"{blk}.{name}.weight" for name in ("attn_k", "attn_v", "attn_k_norm")}
    m.ops.append(Attention(q, m.like(q, out), shared, hp.n_head, 1.0))
    m.linear(out, f"{blk}.attn_output", "proj", hp.n_embd)
    return shared


def beside_experts(m: ProgramBuilder, blk: str, experts: Experts) -> None:
    """proj = norm(dense) + norm(experts(norm(x))), where the router has a norm of its own."""
    hp = m.hp
    m.rms_norm("dense", f"{blk}.post_ffw_norm_1", "dense")
    m.rms_norm("x", f"{blk}.pre_ffw_norm_2", "expert_in")
    scale = m.scaled(f"{blk}.ffn_gate_inp.scale", 1 / math.sqrt(hp.n_embd), hp.n_embd)
    m.ops.append(RMSNorm("x", scale, m.like("x", "router_in"), hp.eps))
    expert_feed_forward(m, blk, experts, "gelu", x="expert_in", router_in="router_in")
    m.rms_norm("proj", f"{blk}.post_ffw_norm_2", "proj")
    m.add("dense", "proj", "proj")


def per_layer_inputs(m: ProgramBuilder, width: int) -> None:
    """own = (norm(x Wp^T / sqrt(n_embd)) + sqrt(width) table[token]) / sqrt(2): ``width`` columns for each layer."""
    hp, half = m.hp, 1 / math.sqrt(2)
    whole = hp.n_layer * width
    table = m.weight("per_layer_token_embd.weight", hp.n_vocab, whole)
    m.ops.append(Embed(table, m.buffer("own_token", whole), half * math.sqrt(width), embeds=False))
    m.linear("x", "per_layer_model_proj", "own", whole)
    # a norm of x / c is one of x whose eps is c^2 times as large
    m.ops.append(RMSNorm("own", m.scaled("per_layer_proj_norm.weight", half, width), "own", hp.eps * hp.n_embd))
    m.ops.append(Add("own", "own_token", "own"))


def add_own_input(m: ProgramBuilder, blk: str, i: int, width: int) -> None:
    """x += norm((gelu(x Wg^T) * own_i) Wp^T)"""
    m.linear("x", f"{blk}.inp_gate", "own_gate", width)
    m.gated_unit("own_gate", m.part("own", i * width, width), "own_gate", "gelu")
    m.linear("own_gate", f"{blk}.proj", "proj", m.hp.n_embd)
    m.rms_norm("proj", f"{blk}.post_norm", "proj")
    m.add("x", "proj", "x")
