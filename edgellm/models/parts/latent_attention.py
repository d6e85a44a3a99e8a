"""Attention whose keys and values are made of a few numbers for each token, which are all that the cache keeps.

A token's latent c, normed, and one rotated key k_r that all heads share. Of head h, with matrices K (n_nope, rank) and
V (d_v, rank) and a query [q_n | q_r]:

    score = (q_n K c + q_r k_r) scale          out = V sum p c

That is attention of one head of keys [c | k_r] whose values are the first part of them, for queries [q_n K | q_r]:
keys and values of the heads are never made. It is done so for prompts too, where they would cost less, because a token
is to have the same bits whatever stands in its batch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from edgellm.formats.model_file import ModelFile
from edgellm.kernels.kv import KVLayer
from edgellm.kernels.ops import ApplyRope, Attention, HeadMatmul, JoinHeads, RMSNorm, SplitHeads, StoreKV
from edgellm.kernels.rope import Rope, yarn_magnitude
from edgellm.models.parts.blocks import ProgramBuilder, the_rope
from edgellm.models.parts.hparams import HParams, hparam_error, integer, key_of, real


@dataclass(frozen=True)
class LatentSizes:
    """Widths of the latent, of a head's part that is not rotated, of the one that is, and of its values.

    q_rank   width that queries are made through, 0 where they are made at once
    split    whether K and V are tensors of their own, K turned; else they are the rows of one, head by head
    """

    rank: int
    n_nope: int
    n_rot: int
    d_v: int
    q_rank: int
    split: bool


def read_latent_sizes(gguf: ModelFile, hp: HParams) -> LatentSizes:
    """The sizes from the metadata. FormatError ``MODEL_HPARAMS`` for those that contradict each other."""
    rank, q_rank = integer(gguf, "attention.kv_lora_rank", least=1), integer(gguf, "attention.q_lora_rank", 0)
    split = key_of(gguf, "attention.key_length_mla") in gguf.metadata
    d_k, d_v, key = hp.head_dim_k, hp.head_dim_v, "attention.key_length"
    if split:  # then the usual keys are the sizes of what is kept
        for name, wanted in (("key_length", rank + hp.n_rot), ("value_length", rank), ("head_count_kv", 1)):
            if (found := integer(gguf, f"attention.{name}")) != wanted:
                expected = f"{wanted}, by attention.kv_lora_rank and rope.dimension_count"
                raise hparam_error(gguf, f"attention.{name}", found, expected)
        key = "attention.key_length_mla"
        d_k, d_v = integer(gguf, key, least=1), integer(gguf, "attention.value_length_mla", least=1)
    if d_k <= hp.n_rot:
        raise hparam_error(gguf, key, d_k, f"more than rope.dimension_count, which is {hp.n_rot}")
    return LatentSizes(rank, d_k - hp.n_rot, hp.n_rot, d_v, q_rank, split)


def latent_rotation(m: ProgramBuilder) -> tuple[Rope, float]:
    """The rotation, and what YaRN multiplies all scores with: the magnitude of ``mscale_all_dim``, squared.

    Files have a tenth of that number. Where they have it, the rotated part has no magnitude of its own.
    """
    rope = the_rope(m, adjacent=True)
    every = 10 * real(m.gguf, "rope.scaling.yarn_log_multiplier", 0.0)
    if not every or m.gguf.metadata.get(key_of(m.gguf, "rope.scaling.type")) != "yarn":
        return rope, 1.0
    factor = real(m.gguf, "rope.scaling.factor", 0.0) or 1.0
    return replace(rope, magnitude=1.0), yarn_magnitude(factor, every) ** 2


def latent_attention(m: ProgramBuilder, blk: str, s: LatentSizes, scale: float) -> None:
    """proj = attention of h; ``scale`` is of scores."""
    n_head, d_k = m.hp.n_head, s.n_nope + s.n_rot
    if s.q_rank:
        m.linear("h", f"{blk}.attn_q_a", "q_low", s.q_rank)
    else:
        m.linear("h", f"{blk}.attn_q", "q_heads", n_head * d_k)
    m.linear("h", f"{blk}.attn_kv_a_mqa", "k", s.rank + s.n_rot)
    if s.q_rank:
        m.rms_norm("q_low", f"{blk}.attn_q_a_norm", "q_low")
        m.linear("q_low", f"{blk}.attn_q_b", "q_heads", n_head * d_k)
    q_nope, q_rot = m.buffer("q_nope", n_head * s.n_nope), m.buffer("q_rot", n_head * s.n_rot)
    latent, k_rot = m.part("k", 0, s.rank), m.part("k", s.rank, s.n_rot)
    norm = m.weight(f"{blk}.attn_kv_a_norm.weight", s.rank)
    keys, values = _head_matrices(m, blk, s)
    layer = m.cache_layer(KVLayer(1, s.rank + s.n_rot, s.rank, latent=True))
    m.ops += [
        SplitHeads("q_heads", q_nope, q_rot, s.n_nope),
        ApplyRope(q_rot, s.n_rot, "rope"),
        RMSNorm(latent, norm, latent, m.hp.eps),
        ApplyRope(k_rot, s.n_rot, "rope"),
        replace(keys, x=q_nope, out=m.buffer("q_latent", n_head * s.rank)),
        JoinHeads("q_latent", q_rot, m.buffer("q", n_head * (s.rank + s.n_rot)), s.rank),
        StoreKV("k", None, layer),
        Attention("q", m.buffer("attn_latent", n_head * s.rank), layer, n_head, scale),
        replace(values, x="attn_latent", out=m.buffer("attn", n_head * s.d_v)),
    ]
    m.linear("attn", f"{blk}.attn_output", "proj", m.hp.n_embd)


def _head_matrices(m: ProgramBuilder, blk: str, s: LatentSizes) -> tuple[HeadMatmul, HeadMatmul]:
    """The products with K and with V, still without buffers."""
    n_head = m.hp.n_head
    if s.split:
        keys = m.weight(f"{blk}.attn_k_b.weight", n_head, s.rank, s.n_nope)
        values = m.weight(f"{blk}.attn_v_b.weight", n_head, s.d_v, s.rank)
        return HeadMatmul("", keys, "", n_head), HeadMatmul("", values, "", n_head)
    both = m.weight(f"{blk}.attn_kv_b.weight", n_head * (s.n_nope + s.d_v), s.rank)
    return (
        HeadMatmul("", both, "", n_head, (0, s.n_nope), turned=True),
        HeadMatmul("", both, "", n_head, (s.n_nope, s.d_v)),
    )
