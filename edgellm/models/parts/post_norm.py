"""BERT's shape, which its kin share: a norm behind every block, and positions by a table of rows or by rotation."""

from __future__ import annotations

from collections.abc import Callable

from edgellm.formats.model_file import ModelFile
from edgellm.kernels.ops import ApplyRope
from edgellm.kernels.ops.elementwise import Curve
from edgellm.kernels.program import Program
from edgellm.models.parts.blocks import ProgramBuilder
from edgellm.models.parts.encoder import check_sees_both_ways, finish_encoder
from edgellm.models.parts.hparams import read_hparams, read_rope, real


def build_post_norm(gguf: ModelFile, ffn: Callable[[ProgramBuilder, str], None], *, rotates: bool) -> Program:
    """x = norm(x + Wo attention(q, k, v));  x = norm(x + ffn(x)), of x = norm(token + type + position).

    ffn       adds the ops from x to proj
    rotates   positions turn q and k, and no row is added
    """
    check_sees_both_ways(gguf)
    hp = read_hparams(gguf, eps_key="attention.layer_norm_epsilon")
    m = ProgramBuilder(gguf, hp)
    if rotates:
        m.ropes["rope"] = read_rope(gguf, hp, real(gguf, "rope.freq_base", 10000.0), adjacent=False)
    m.embed("x")
    if "token_types.weight" in gguf.tensors:
        m.add_rows("x", "token_types", "x", of="types", n_rows=gguf.tensors["token_types.weight"].shape[0])
    if not rotates:
        m.add_rows("x", "position_embd", "x", of="positions", n_rows=hp.context_length)
    m.layer_norm("x", "token_embd_norm", "x", needs_bias=True)
    for i in range(hp.n_layer):
        blk = f"blk.{i}"
        q, k, v = project_qkv(m, "x", blk)
        if rotates:
            m.ops += [ApplyRope(x, hp.head_dim_k, "rope") for x in (q, k)]
        m.self_attention(q, k, v, "attn")
        m.linear("attn", f"{blk}.attn_output", "proj", hp.n_embd)
        m.add("x", "proj", "x")
        m.layer_norm("x", f"{blk}.attn_output_norm", "x", needs_bias=True)
        ffn(m, blk)
        m.add("x", "proj", "x")
        m.layer_norm("x", f"{blk}.layer_output_norm", "x", needs_bias=True)
    return finish_encoder(m)


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
