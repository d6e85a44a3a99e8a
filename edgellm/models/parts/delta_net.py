"""The gated delta-net of Qwen 3.5 and Qwen3-Next: its sizes, its ops, and the decoder that mixes it with attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from edgellm.formats.model_file import ModelFile
from edgellm.kernels.kv import StateLayer
from edgellm.kernels.ops import CausalConv, DeltaGates, DeltaRule
from edgellm.kernels.program import Program
from edgellm.models.parts.blocks import (
    ProgramBuilder,
    begin_nextn,
    finish_nextn,
    leave_out_drafts,
    project_logits,
    rope_factors,
    self_attention,
)
from edgellm.models.parts.hparams import HParams, hparam_error, integer, key_of, read_hparams, read_rope, real


@dataclass(frozen=True)
class DeltaNet:
    """``n_k`` key heads and ``n_v`` value heads of ``head_dim``, behind a convolution of ``n_taps``.

    tiled   value head h belongs to key head h % n_k, else to h // (n_v / n_k)
    """

    n_k: int
    n_v: int
    head_dim: int
    n_taps: int
    tiled: bool

    @property
    def n_qkv(self) -> int:
        """Columns of q, k and v together."""
        return (2 * self.n_k + self.n_v) * self.head_dim


def read_delta_net(gguf: ModelFile, *, tiled: bool) -> DeltaNet:
    """The sizes from the metadata. FormatError ``MODEL_HPARAMS`` for one that is off."""
    n_k, n_v = integer(gguf, "ssm.group_count", least=1), integer(gguf, "ssm.time_step_rank", least=1)
    head_dim, n_inner = integer(gguf, "ssm.state_size", least=1), integer(gguf, "ssm.inner_size", least=1)
    if n_v % n_k:
        raise hparam_error(gguf, "ssm.time_step_rank", n_v, f"a multiple of ssm.group_count, which is {n_k}")
    if n_inner != n_v * head_dim:
        raise hparam_error(gguf, "ssm.inner_size", n_inner, f"{n_v} heads of ssm.state_size, which is {head_dim}")
    return DeltaNet(n_k, n_v, head_dim, integer(gguf, "ssm.conv_kernel", least=2), tiled)


Inputs = Callable[[ProgramBuilder, str], None]
"""Adds the ops from h to qkv, z, alpha and beta of a layer."""


def delta_net(m: ProgramBuilder, blk: str, net: DeltaNet, inputs: Inputs) -> None:
    """proj = (RMSNorm(delta rule(conv(h Wqkv)^T)) * silu(h Wz^T)) Wout^T"""
    inputs(m, blk)
    conv = m.weight(f"{blk}.ssm_conv1d.weight", net.n_qkv, net.n_taps)
    layer = m.cache_layer(StateLayer((net.n_taps - 1) * net.n_qkv))
    m.ops.append(CausalConv("qkv", conv, m.like("qkv", "conv"), layer))
    dt = f"{blk}.ssm_dt" if f"{blk}.ssm_dt" in m.found else f"{blk}.ssm_dt.bias"  # as older files of Ollama's have it
    a, dt_bias = m.weight(f"{blk}.ssm_a", net.n_v), m.weight(dt, net.n_v)
    m.ops.append(DeltaGates("alpha", "beta", a, dt_bias, m.buffer("decay", net.n_v), m.buffer("rate", net.n_v)))
    layer = m.cache_layer(StateLayer(net.n_v * net.head_dim**2))
    m.ops.append(DeltaRule("conv", "decay", "rate", m.like("z", "delta"), layer, net.n_k, net.n_v, net.tiled))
    m.rms_norm("delta", f"{blk}.ssm_norm", "delta", net.head_dim)
    m.gated_unit("z", "delta", "delta", "silu")
    m.linear("delta", f"{blk}.ssm_out", "proj", m.hp.n_embd)


def qkv_and_z(m: ProgramBuilder, blk: str, net: DeltaNet) -> None:
    """qkv = h Wqkv^T, z = h Wz^T"""
    m.linear("h", f"{blk}.attn_qkv", "qkv", net.n_qkv)
    m.linear("h", f"{blk}.attn_gate", "z", net.n_v * net.head_dim)


def apart_inputs(net: DeltaNet) -> Inputs:
    """Each of a matrix of its own."""

    def inputs(m: ProgramBuilder, blk: str) -> None:
        qkv_and_z(m, blk, net)
        m.linear("h", f"{blk}.ssm_alpha", "alpha", net.n_v)
        m.linear("h", f"{blk}.ssm_beta", "beta", net.n_v)

    return inputs


def build_hybrid(
    gguf: ModelFile,
    net: DeltaNet,
    *,
    inputs: Inputs,
    ffn: Callable[[ProgramBuilder, str], None],
    n_ff: int | None = None,
    nextn: bool = False,
) -> Program:
    """x += mixer(RMSNorm(x)), a delta-net or gated attention;  x += ffn(RMSNorm(x)).

    Blocks behind the last one are drafts of the tokens that follow the next, and are left out.

    n_ff    the feed-forward's width, where the file need not say it
    nextn   the program of the first of those blocks, which has attention
    """
    hp = read_hparams(gguf, ("n_head_kv",), n_ff=n_ff)  # some files have an array with 0 for delta-nets
    if hp.n_head_kv < 1:
        raise hparam_error(gguf, "attention.head_count_kv", hp.n_head_kv, "1 or more in some layer")
    if hp.head_dim_k != hp.head_dim_v:
        expected = f"attention.key_length, which is {hp.head_dim_k}"
        raise hparam_error(gguf, "attention.value_length", hp.head_dim_v, expected)
    m = ProgramBuilder(gguf, hp)
    base = real(gguf, "rope.freq_base", 10000.0)
    m.ropes["rope"] = read_rope(gguf, hp, base, adjacent=False, factors=rope_factors(m))

    def layer(i: int, *, recurrent: bool) -> None:
        blk = f"blk.{i}"
        if not recurrent and hp.layer(i).n_head_kv != hp.n_head_kv:
            expected = f"{hp.n_head_kv} in each layer with attention"
            raise hparam_error(gguf, "attention.head_count_kv", hp.layer(i).n_head_kv, expected)
        m.rms_norm("x", f"{blk}.attn_norm", "h")
        if recurrent:
            delta_net(m, blk, net, inputs)
        else:
            self_attention(m, blk, qk_norms="heads", gated=True)
        m.add("x", "proj", "x")
        m.rms_norm("x", f"{blk}.post_attention_norm", "h")
        ffn(m, blk)
        m.add("x", "proj", "x")

    if nextn:
        first = begin_nextn(m)
        layer(first, recurrent=False)
        return finish_nextn(m, first)
    m.embed("x")
    for i, recurrent in enumerate(recurrent_layers(gguf, hp)[: hp.n_layer - leave_out_drafts(m)]):
        layer(i, recurrent=recurrent)
    project_logits(m)
    return m.finish()


def recurrent_layers(gguf: ModelFile, hp: HParams) -> list[bool]:
    """Which layers are delta-nets: all but each n-th, or as the array ``attention.recurrent_layers`` says."""
    key = "attention.recurrent_layers"
    if key_of(gguf, key) in gguf.metadata:
        value = gguf.metadata[key_of(gguf, key)]
        if not isinstance(value, np.ndarray | list):
            raise hparam_error(gguf, key, value, f"an array of {hp.n_layer}", "GGUF_KEY_TYPE")
        if len(value) != hp.n_layer:
            raise hparam_error(gguf, key, f"an array of {len(value)}", f"one value for each of {hp.n_layer} layers")
        return [bool(one) for one in value]
    interval = integer(gguf, "full_attention_interval", 4, least=1)
    return [(i + 1) % interval != 0 for i in range(hp.n_layer)]
