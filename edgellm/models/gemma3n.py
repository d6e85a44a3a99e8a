"""Gemma 3n (text): the residual stream is several (AltUp), of which each layer computes on one.

    streams         they are predicted before a layer and corrected behind it, by numbers of each token's own
    LAuReL          beside attention stands a product of low rank
    per-layer       each layer adds to the other streams what it makes of the token's own row in a second table
    sparsity        in the first layers all but the largest few activations are cut off
    shared keys     the last layers keep none of their own and read those of the last layer of their kind that does

Feed-forwards may differ in width from layer to layer, as a MatFormer's do. Norm weights are stored as they are, scores
are not scaled, values are normed without a weight.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from edgellm.formats.model_file import ModelFile
from edgellm.kernels.ops import (
    AddToStreams,
    GaussianTopK,
    HeadMatmul,
    JoinHeads,
    MatchMagnitude,
    Matmul,
    MixStreams,
    RMSNorm,
    Scale,
    ScaleColumns,
    Softcap,
)
from edgellm.kernels.program import Program
from edgellm.models.gemma4 import Kind, Layer, attention, per_layer_inputs
from edgellm.models.parts.blocks import ProgramBuilder, project_logits, rope_factors
from edgellm.models.parts.gemma3n_checkpoint import GEMMA3N_FORM
from edgellm.models.parts.hparams import HParams, hparam_error, integer, key_of, read_hparams, read_rope, real
from edgellm.models.parts.local_layers import layers_read, local_layers

CHECKPOINT = GEMMA3N_FORM
PERIOD = 5
WITH_KEYS = 20
"""Layers that keep keys, where the file does not say how many share them."""
SPARSE, DEVIATIONS = 10, 1.6448533535003662
"""Likewise how many cut activations off, and where: a twentieth of a normal distribution is above."""


@dataclass(frozen=True)
class Streams:
    """How many streams there are, which of them a layer computes on, and how wide a row of the second table is."""

    n: int
    active: int
    own: int


def build(gguf: ModelFile) -> Program:
    """x = p_a + norm(attention);  x = (x + laurel) / sqrt(2);  x += norm(ffn), of one of the predicted streams p;
    x_i = p_i + (1 + c_i) (x - p_a);  x_i += norm((gelu(x_a Wg^T) * own) Wp^T) but for the first."""
    hp = read_hparams(gguf, by_layer=("n_ff",))
    m = ProgramBuilder(gguf, hp)
    streams, layers, factors = _read_streams(gguf), read_layers(gguf, hp), _read_sparsity(gguf, hp)
    _rotations(m)
    m.embed("x", math.sqrt(hp.n_embd))
    per_layer_inputs(m, streams.own)
    _split(m, streams)
    caches: dict[int, int] = {}
    for i, (layer, factor) in enumerate(zip(layers, factors, strict=True)):
        blk, m.hp = f"blk.{i}", layer.hp
        active = _predict(m, blk, streams)
        m.rms_norm(active, f"{blk}.attn_norm", "h")
        _low_rank(m, blk)
        caches[i] = attention(m, blk, layer, caches.get(layer.reads), values=True)
        m.rms_norm("proj", f"{blk}.post_attention_norm", "proj")
        m.add(active, "proj", "x")
        m.add("x", "laurel", "x")
        m.ops.append(Scale("x", "x", 1 / math.sqrt(2)))
        m.rms_norm("x", f"{blk}.ffn_norm", "h")
        _feed_forward(m, blk, factor)
        m.rms_norm("proj", f"{blk}.post_ffw_norm", "proj")
        m.add("x", "proj", "x")
        _correct(m, blk, streams, active)
        _add_own_input(m, blk, i, streams)
    m.hp = hp
    _merge(m, streams)
    project_logits(m, cap=real(gguf, "final_logit_softcapping", 30.0))
    return m.finish()


def _read_streams(gguf: ModelFile) -> Streams:
    n, active = integer(gguf, "altup.num_inputs", 4), integer(gguf, "altup.active_idx", 0)
    if active >= n:
        raise hparam_error(gguf, "altup.active_idx", active, f"less than altup.num_inputs, which is {n}")
    return Streams(n, active, integer(gguf, "embedding_length_per_layer_input", least=1))


def read_layers(gguf: ModelFile, hp: HParams) -> list[Layer]:
    """The layers, by the keys. FormatError for sizes that do not go together, and for keys that nobody keeps."""
    if hp.head_dim_v != hp.head_dim_k:
        expected = f"the size of keys, which is {hp.head_dim_k}"
        raise hparam_error(gguf, "attention.value_length", hp.head_dim_v, expected)
    wide, near = Kind("wide", hp, 0), Kind("near", hp, integer(gguf, "attention.sliding_window", least=1))
    kinds = [near if slides else wide for slides in local_layers(gguf, hp.n_layer, PERIOD)]
    n_shared = integer(gguf, "attention.shared_kv_layers", max(hp.n_layer - WITH_KEYS, 0))
    layers = []
    for i, reads in enumerate(layers_read(gguf, [kind.name for kind in kinds], n_shared)):
        if not (own := hp.layer(i)).n_ff:
            raise hparam_error(gguf, "feed_forward_length", 0, f"1 or more in each layer, as in layer {i}")
        layers.append(Layer(kinds[i], own, reads))
    return layers


def _read_sparsity(gguf: ModelFile, hp: HParams) -> list[float]:
    """Of each layer how many deviations above the mean activations are cut off; -infinity cuts none."""
    key = "activation_sparsity_scale"
    found = gguf.metadata.get(key_of(gguf, key))
    if found is None:
        return [DEVIATIONS if i < SPARSE else -math.inf for i in range(hp.n_layer)]
    values = found.tolist() if isinstance(found, np.ndarray) else found  # of a checkpoint it is a list already
    if not isinstance(values, list) or len(values) != hp.n_layer:
        raise hparam_error(gguf, key, found, f"an array of one number for each of {hp.n_layer} layers")
    for value in values:
        if not isinstance(value, float) or math.isnan(value) or value > 10:
            raise hparam_error(gguf, key, value, "numbers up to 10, or minus infinity")
    return values


def _rotations(m: ProgramBuilder) -> None:
    base = real(m.gguf, "rope.freq_base", 1e6)
    m.ropes["wide"] = read_rope(m.gguf, m.hp, base, adjacent=False, factors=rope_factors(m))
    base = real(m.gguf, "rope.freq_base_swa", 1e4)
    m.ropes["near"] = read_rope(m.gguf, m.hp, base, adjacent=False, scaled=False)


def _split(m: ProgramBuilder, streams: Streams) -> None:
    """streams = [x | x W_1^T | x W_2^T ...], each as long as x."""
    n_embd, n = m.hp.n_embd, streams.n - 1
    weight = m.weight("altup_proj.weight", n, n_embd, n_embd)
    m.tensors[weight] = replace(m.tensors[weight], shape=(n * n_embd, n_embd))  # one product, of the rows of all
    m.ops.append(Matmul("x", weight, m.buffer("others", n * n_embd)))
    m.ops.append(MatchMagnitude("others", "x", "others"))
    m.ops.append(JoinHeads("x", "others", m.buffer("streams", streams.n * n_embd), n_embd))


def _coefficients(m: ProgramBuilder, x: str, blk: str, name: str, out: str, n: int, n_out: int) -> None:
    """out = tanh(norm(x) / n_embd Wr^T) W^T: numbers of a token's own"""
    hp = m.hp
    norm = m.scaled(f"{blk}.altup_router_norm.weight", 1 / hp.n_embd, hp.n_embd)
    m.ops.append(RMSNorm(x, norm, m.buffer("router_in", hp.n_embd), hp.eps))
    m.linear("router_in", f"{blk}.altup_router", "modality", n)
    m.ops.append(Softcap("modality", "modality", 1.0))
    m.linear("modality", f"{blk}.{name}", out, n_out)


def _predict(m: ProgramBuilder, blk: str, streams: Streams) -> str:
    """predicted_i = streams_i + sum of c_ij streams_j; the one that the layer computes on."""
    n, n_embd = streams.n, m.hp.n_embd
    active = m.part("streams", streams.active * n_embd, n_embd)
    _coefficients(m, active, blk, "altup_predict_coef", "mixing", n, n * n)
    m.ops.append(MixStreams("streams", "mixing", m.like("streams", "predicted")))
    return m.part("predicted", streams.active * n_embd, n_embd)


def _low_rank(m: ProgramBuilder, blk: str) -> None:
    """laurel = h + norm(h Wl^T Wr^T); the rank is what the first matrix has rows."""
    left = m.found.get(f"{blk}.laurel_l.weight")
    rank = left.shape[0] if left is not None else 1  # without it the next line says so
    m.linear("h", f"{blk}.laurel_l", f"rank_{rank}", rank)
    m.linear(f"rank_{rank}", f"{blk}.laurel_r", "laurel", m.hp.n_embd)
    m.rms_norm("laurel", f"{blk}.laurel_post_norm", "laurel")
    m.add("laurel", "h", "laurel")


def _feed_forward(m: ProgramBuilder, blk: str, factor: float) -> None:
    """proj = (gelu(cut(h Wgate^T)) * h Wup^T) Wdown^T, where cut is max(. - (mean + factor deviations), 0)"""
    n_ff = m.hp.n_ff
    gate, up, ffn = f"gate_{n_ff}", f"up_{n_ff}", f"ffn_{n_ff}"
    m.linear("h", f"{blk}.ffn_gate", gate, n_ff)
    if factor > -math.inf:
        m.ops.append(GaussianTopK(gate, gate, factor))
    m.linear("h", f"{blk}.ffn_up", up, n_ff)
    m.gated_unit(gate, up, ffn, "gelu")
    m.linear(ffn, f"{blk}.ffn_down", "proj", m.hp.n_embd)


def _correct(m: ProgramBuilder, blk: str, streams: Streams, active: str) -> None:
    """streams_i = predicted_i + (1 + c_i) (x - predicted of the active one)"""
    _coefficients(m, "x", blk, "altup_correct_coef", "correction", streams.n, streams.n)
    m.add("x", active, "innovation", -1.0)
    m.ops.append(AddToStreams("predicted", "innovation", "streams", "correction"))


def _add_own_input(m: ProgramBuilder, blk: str, i: int, streams: Streams) -> None:
    """streams_i += norm((gelu(s x_a Wg^T) * own_i) Wp^T), but for the first of them"""
    n_embd, own = m.hp.n_embd, streams.own
    scale = m.weight(f"{blk}.altup_correct_scale.weight", n_embd)
    m.ops.append(ScaleColumns(m.part("streams", streams.active * n_embd, n_embd), scale, m.buffer("h", n_embd)))
    m.linear("h", f"{blk}.inp_gate", "own_gate", own)
    m.gated_unit("own_gate", m.part("own", i * own, own), "own_gate", "gelu")
    m.linear("own_gate", f"{blk}.proj", "proj", n_embd)
    m.rms_norm("proj", f"{blk}.post_norm", "proj")
    m.ops.append(AddToStreams("streams", "proj", "streams", None, 1))


def _merge(m: ProgramBuilder, streams: Streams) -> None:
    """x = the mean of the first stream and of the others x_i W_i^T, each as long as the first."""
    n_embd, n = m.hp.n_embd, streams.n - 1
    weight = m.weight("altup_unembd_proj.weight", n, n_embd, n_embd)
    first, rest = m.part("streams", 0, n_embd), m.part("streams", n_embd, n * n_embd)
    m.ops.append(HeadMatmul(rest, weight, "others", n))
    m.ops.append(MatchMagnitude("others", first, "others"))
    for i in range(n):
        m.add("x" if i else first, m.part("others", i * n_embd, n_embd), "x")
    m.ops.append(Scale("x", "x", 1 / streams.n))
