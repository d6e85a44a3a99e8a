"""Rows of the embedding, looked up by token."""

from __future__ import annotations

from typing import Any

from edgellm.kernels.cpu.kernels.float_matmul import make_float_embed_row
from edgellm.kernels.cpu.kernels.quantized_matmul import family_of
from edgellm.kernels.cpu.lib import layout as at
from edgellm.kernels.cpu.lib import simd as v
from edgellm.kernels.cpu.weights import FLOAT


def make_embed(quant: str) -> Any:
    """The kernel out[t] = scale * weight[token[t]]."""
    if quant in FLOAT:
        embed_row = make_float_embed_row(quant)
    else:
        family, weights = family_of(quant)
        embed_row = family.make_embed_row(weights)

    def embed(op, step, thread, n_threads):
        args = v.arguments(op, at.EMBED)
        scratch = v.load_i64(step + at.SCRATCH) + thread * v.load_i64(step + at.SCRATCH_NBYTES)
        factor = v.f32_of(v.f64_from_bits(args.scale))
        for t in range(thread, v.load_i64(step + at.N_TOKENS), n_threads):
            token = v.load_i32(v.load_i64(step + at.TOKENS) + t * 4)
            embed_row(args.w + token * args.w_row, args.width, factor, args.out + t * args.out_row, scratch)

    return embed
