"""A program whose queries read only the blocks of the cache that can matter most to them, and lose none for ever.

This is Quest's way (Tang et al., 2024): of the keys of every full block the least and the largest number of each
dimension are kept, which bound what a query makes of any of them. A token reads its own block and those with the
largest bounds, for each head of the cache by itself; the others stay where they are, for the next one. Each token
chooses by its own query, be it of a prompt or of an answer, so it has the same bits in any batch and any chunking, and
what is known of a text can be shared as ever.

The first two layers read everything, as there attention is spread; so do layers with a window, which see little.
"""

from __future__ import annotations

from dataclasses import replace

from edgellm import arguments
from edgellm.arguments import KVKeep
from edgellm.formats.errors import UnsupportedError
from edgellm.kernels.kv import BLOCK_TOKENS, KVLayer
from edgellm.kernels.ops.attention import Attention, StoreKV
from edgellm.kernels.ops.full_blocks import BoundKeys, ChooseBlocks, PackKV
from edgellm.kernels.program import Buffer, Op, Program

WHOLE_LAYERS = 2
STEP_TOKENS = 256  # what is read is a multiple of it: the cuts that attention is summed in
MAX_TOKENS = 1 << 19  # of a context in which is chosen


def read_throughout(name: str, value: str | None) -> KVKeep | None:
    """``arguments.kv_keep`` where a text has no end of a prompt. UnsupportedError for what is kept there."""
    keep = arguments.kv_keep(name, value)
    if keep is not None and keep.way == "snapkv":
        raise UnsupportedError(
            f"{name} is {value}, which keeps keys at the end of a prompt, and this reads texts that have none. Take "
            "quest:TOKENS, or leave it out.",
            code="KV_KEEP",
        )
    return keep


def with_kept_keys(program: Program, keep: KVKeep | None, n_ctx: int) -> Program:
    """The program with what ``keep`` asks of it; what is kept at the end of a prompt is the engine's affair.

    n_ctx   the longest text that it is to read: there is room for no more choices than that
    """
    if keep is None or keep.way != "quest":
        return program
    return with_chosen_blocks(program, min(keep.n_tokens, -(-n_ctx // STEP_TOKENS) * STEP_TOKENS))


def check_chosen_context(program: Program, n_ctx: int) -> None:
    """UnsupportedError where blocks are chosen in a context of more than can be."""
    if n_ctx > MAX_TOKENS and any(isinstance(layer, KVLayer) and layer.n_chosen for layer in program.cache_layers):
        raise UnsupportedError(
            f"The context has {n_ctx} tokens; kv_keep=quest chooses among the blocks of up to {MAX_TOKENS}. Take a "
            "smaller one, or leave kv_keep out.",
            code="KV_KEEP",
        )


def with_chosen_blocks(program: Program, n_tokens: int) -> Program:
    """The program in which a token reads the keys and values of at most ``n_tokens`` positions in most layers.

    UnsupportedError where keys are values, too.
    """
    read = list(dict.fromkeys(op.layer for op in program.ops if isinstance(op, Attention)))
    whole = [layer for layer in read if not program.kv_layer(layer).window]
    chosen = set(whole) - set(read[:WHOLE_LAYERS])
    if read and not whole:
        raise UnsupportedError(
            f"{program.architecture} has no layer that reads a whole context. Leave kv_keep out.", code="KV_KEEP"
        )
    if any(program.kv_layer(layer).latent for layer in whole):
        raise UnsupportedError(
            f"{program.architecture} has keys that are values, too, in which no blocks are chosen. Leave kv_keep out.",
            code="KV_KEEP",
        )
    n = n_tokens // BLOCK_TOKENS
    layers = tuple(
        replace(layer, n_chosen=n) if i in chosen and isinstance(layer, KVLayer) else layer
        for i, layer in enumerate(program.cache_layers)
    )
    buffers, ops = dict(program.buffers), list[Op]()
    packs = {op.newest: op.layer for op in program.ops if isinstance(op, PackKV)}
    for op in program.ops:
        if isinstance(op, Attention) and op.layer in chosen:
            width = program.kv_layer(op.layer).n_kv_heads * n
            name = f"chosen_blocks_{width}"
            buffers[name] = Buffer(name, width, dtype="int32")
            ops += [ChooseBlocks(op.q, name, op.layer, op.n_heads), replace(op, chosen=name)]
            continue
        ops.append(op)
        if isinstance(op, StoreKV) and packs.get(op.layer, op.layer) in chosen:
            ops.append(BoundKeys(packs[op.layer], op.layer) if op.layer in packs else BoundKeys(op.layer))
    adapted = program.adapted and with_chosen_blocks(program.adapted, n_tokens)
    return replace(program, ops=tuple(ops), buffers=buffers, cache_layers=layers, adapted=adapted)
