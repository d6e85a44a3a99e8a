"""BERT's shape, which its kin share: a norm behind every block; positions by rows, by rotation or by distance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from edgellm.formats.model_file import ModelFile
from edgellm.kernels.ops import ApplyRope
from edgellm.kernels.ops.elementwise import Curve
from edgellm.kernels.program import Program
from edgellm.models.parts.blocks import ProgramBuilder
from edgellm.models.parts.encoder import check_sees_both_ways, finish_encoder
from edgellm.models.parts.hparams import read_hparams, read_rope, real

Positions = Literal["rows", "rotated", "distances"]
"""A row is added for each, or they turn q and k, or scores fade by the distance."""


def build_post_norm(gguf: ModelFile, ffn: Callable[[ProgramBuilder, str], None], positions: Positions) -> Program:
    """x = norm(x + Wo attention(q, k, v));  x = norm(x + ffn(x)), of x = norm(token + type + position).

    Rows of q and k may be normed, and x once more, of what stands there and what attention read.

    ffn   adds the ops from x to proj
    """
    check_sees_both_ways(gguf)
    hp = read_hparams(gguf, eps_key="attention.layer_norm_epsilon")
    m = ProgramBuilder(gguf, hp)
    if positions == "rotated":
        m.ropes["rope"] = read_rope(gguf, hp, real(gguf, "rope.freq_base", 10000.0), adjacent=False)
    m.embed("x")
    if "token_types.weight" in gguf.tensors:
        m.add_rows("x", "token_types", "x", of="types", n_rows=gguf.tensors["token_types.weight"].shape[0])
    if positions == "rows":
        m.add_rows("x", "position_embd", "x", of="positions", n_rows=hp.context_length)
    m.layer_norm("x", "token_embd_norm", "x", needs_bias=True)
    for i in range(hp.n_layer):
        blk = f"blk.{i}"
        q, k, v = project_qkv(m, "x", blk)
        q, k = _normed(m, q, f"{blk}.attn_q_norm", "q_normed"), _normed(m, k, f"{blk}.attn_k_norm", "k_normed")
        if positions == "rotated":
            m.ops += [ApplyRope(x, hp.head_dim_k, "rope") for x in (q, k)]
        m.self_attention(q, k, v, "attn", fades=positions == "distances")
        m.linear("attn", f"{blk}.attn_output", "proj", hp.n_embd)
        has_second = f"{blk}.attn_norm_2.weight" in gguf.tensors
        normed = "once" if has_second else "x"
        m.add("x", "proj", normed)
        m.layer_norm(normed, f"{blk}.attn_output_norm", normed, needs_bias=True)
        if has_second:
            m.add(normed, "x", "x")
            m.layer_norm("x", f"{blk}.attn_norm_2", "x", needs_bias=True)
        ffn(m, blk)
        m.add("x", "proj", "x")
        m.layer_norm("x", f"{blk}.layer_output_norm", "x", needs_bias=True)
    return finish_encoder(m)


def _normed(m: ProgramBuilder, x: str, name: str, out: str) -> str:
    """The buffer of the norm of x, where the file has one of this name, else x."""
    if f"{name}.weight" not in m.gguf.tensors:
        return x
    m.layer_norm(x, name, m.buffer(out, m.buffers[x].width), needs_bias=True)
    return out


def project_qkv(m: ProgramBuilder, x: str, blk: str) -> tuple[str, str, str]:
    """The buffers of q, k and v of x, by three matrices or by one with the rows of all."""
    hp = m.hp
    widths = (hp.n_head * hp.head_dim_k, hp.n_head_kv * hp.head_dim_k, hp.n_head_kv * hp.head_dim_v)
    if f"{blk}.attn_qkv.weight" not in m.gguf.tensors:
        for name, width in zip("qkv", widths, strict=True):
            m.linear(x, f"{blk}.attn_{name}", name, width)
        return "q", "k", "v"
    m.linear(x, f"{blk}.attn_qkv", "qkv", sum(widths))
    return m.part("qkv", 0, widths[0]), m.part("qkv", widths[0], widths[1]), m.part("qkv", sum(widths[:2]), widths[2])


def curved(curve: Curve) -> Callable[[ProgramBuilder, str], None]:
    """proj = Wdown curve(Wup x)"""

    def ffn(m: ProgramBuilder, blk: str) -> None:
        m.linear("x", f"{blk}.ffn_up", "up", m.hp.n_ff)
        m.activate("up", "up", curve)
        m.linear("up", f"{blk}.ffn_down", "proj", m.hp.n_embd)

    return ffn
