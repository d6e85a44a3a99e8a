"""How attention is dealt out: every cut of every tile and head exactly once, in pieces small enough for all threads."""

from __future__ import annotations

import ctypes
import dataclasses

import numpy as np
import pytest

from edgellm.kernels.cpu.lib import layout
from edgellm.kernels.cpu.run.attention_work import AttentionWork
from edgellm.kernels.kv import KVLayer
from edgellm.kernels.narrowing import output_tail
from edgellm.kernels.ops import Add, ApplyRope, Attention, Matmul, Op, RMSNorm, SelectOutputs
from edgellm.kernels.program import Buffer, Program

WINDOW = 100
LAYERS = (KVLayer(3, 64, 64), KVLayer(1, 256, 256, WINDOW), KVLayer(8, 128, 128))
HEADS = (9, 4, 8)
FIELDS = layout.PART_NBYTES // 4


def program(*ops: Op) -> Program:
    attention = tuple(Attention("q", "attn", i, n, 1.0) for i, n in enumerate(HEADS))
    buffers = {name: Buffer(name, 8) for name in ("x", "attn", "proj", "h")} | {
        "logits": Buffer("logits", 8, "outputs")
    }
    return Program("test", (*attention, *ops), buffers, {}, LAYERS, {}, 8, 4096, 8)


def work_of(n_threads: int) -> AttentionWork:
    return AttentionWork(program(), n_threads)


def parts_at(address: int, n_shapes: int = 3) -> list[np.ndarray]:
    """The parts (n, fields) of each layer."""
    pairs = np.ctypeslib.as_array((ctypes.c_int64 * (2 * n_shapes)).from_address(address)).reshape(n_shapes, 2)
    return [
        np.ctypeslib.as_array((ctypes.c_int32 * (n * FIELDS)).from_address(a)).reshape(n, FIELDS).copy()
        for a, n in pairs.tolist()
    ]


def deal(depths: list[tuple[int, int]], n_threads: int) -> list[np.ndarray]:
    """The parts of each layer, for sequences of (first position, tokens)."""
    work = work_of(n_threads)
    positions = np.concatenate([np.arange(p, p + n) for p, n in depths]).astype(np.int32)
    starts = [0, *np.cumsum([n for _, n in depths]).tolist()]
    sequences = np.repeat(np.arange(len(depths)), [n for _, n in depths]).astype(np.int32)
    fields = work.plan(positions, positions, starts, sequences)
    assert work.plan(positions, positions, starts, sequences) == {}
    return parts_at(fields["PARTS"])


def test_a_growing_text_has_the_parts_of_its_position() -> None:
    growing, address = work_of(2), 0
    for position in range(0, 1300, 3):
        own = np.array([position], np.int32)
        one = own, own, [0, 1], np.zeros(1, np.int32)
        address = growing.plan(*one).get("PARTS", address)
        fresh = work_of(2)
        for part, expected in zip(parts_at(address), parts_at(fresh.plan(*one)["PARTS"]), strict=True):
            np.testing.assert_array_equal(part, expected)


BATCHES = {
    "one token": [(0, 1)], "one deep token": [(5000, 1)], "prompt": [(0, 500)], "prompt at depth": [(3000, 70)],
    "streams": [(40 * i, 1) for i in range(16)], "one deep stream": [(20000, 1)] + [(9, 1)] * 15,
    "mixed": [(700, 1), (0, 300), (4000, 3)],
}  # fmt: skip


@pytest.mark.parametrize("n_threads", [1, 2, 16])
@pytest.mark.parametrize("name", BATCHES)
def test_every_cut_is_done_once(name: str, n_threads: int) -> None:
    for layer, parts in zip(LAYERS, deal(BATCHES[name], n_threads), strict=True):
        size = layout.cut_blocks(layer.window) * 32
        wanted, found, starts = set(), [], np.cumsum([0, *(n for _, n in BATCHES[name])])
        for (first, n), start in zip(BATCHES[name], starts, strict=False):
            for token, head in np.ndindex(n, layer.n_kv_heads):
                lowest = max(0, first + token - layer.window + 1) // size if layer.window else 0
                wanted |= {(start + token, head, cut) for cut in range(lowest, (first + token) // size + 1)}
        for token, n_tokens, _, cut, n_cuts, head, n_heads, *_ in parts.tolist():
            ranges = np.ndindex(n_tokens, n_heads, n_cuts)
            found += [(token + t, head + h, cut + c) for t, h, c in ranges]
        assert len(set(found)) == len(found)
        assert wanted <= set(found)  # the first tokens of a tile do not see its last cut


@pytest.mark.parametrize("name", ["one deep token", "one deep stream"])
def test_a_long_context_is_shared(name: str) -> None:
    for layer, parts in zip(LAYERS, deal(BATCHES[name], 2), strict=True):
        cost = parts[:, 1] * parts[:, 4] * parts[:, 6]
        assert cost.max() <= max(cost.sum() / 4, layer.n_kv_heads)


def test_tokens_that_choose_are_by_themselves_and_no_tile_has_tokens_of_two_packed_blocks() -> None:
    """A head of such a token reads eight chosen blocks, one cut; the tokens before have no more blocks than that."""
    layers = (KVLayer(3, 64, 64, n_chosen=8), KVLayer(3, 64, 64, 0, False, "kivi2", "kivi2"))
    ops = (Attention("q", "attn", 0, 9, 1.0), Attention("q", "attn", 1, 9, 1.0, newest=2))
    layers += (KVLayer(3, 64, 64, newest=True),)
    whole = dataclasses.replace(program(), ops=ops, cache_layers=layers)
    positions = np.concatenate([np.arange(200, 300), np.arange(40, 41)]).astype(np.int32)
    work = AttentionWork(whole, 2)
    fields = work.plan(positions, positions, [0, 100, 101], np.repeat([0, 1], [100, 1]).astype(np.int32))
    choosing, packed = parts_at(fields["PARTS"], 2)
    first, n_tokens, cuts, n_heads, chosen = choosing[:, [0, 1, 4, 6, -1]].T
    assert np.array_equal(chosen == 1, positions[first] >= 256) and chosen.sum() == 44 * 3
    assert (n_tokens[chosen == 1] == 1).all() and (n_heads[chosen == 1] == 1).all() and (cuts[chosen == 1] == 1).all()
    last = packed[:, 0] + packed[:, 1] - 1
    assert np.array_equal(positions[packed[:, 0]] // 32, positions[last] // 32) and not packed[:, -1].any()


def test_the_tail_of_a_program_selects_what_it_reads() -> None:
    ops = (
        Matmul("attn", "w", "proj"), Add("x", "proj", "x"), RMSNorm("x", "n", "h", 1e-5), Matmul("h", "w", "proj"),
        Add("x", "proj", "x"), SelectOutputs("x", "x_out"), Matmul("x_out", "w", "logits"),
    )  # fmt: skip
    whole = program(*ops)
    whole.buffers["x_out"] = Buffer("x_out", 8, "outputs")
    tail = output_tail(whole)
    assert tail is not None
    assert tail.start == len(HEADS)
    assert [op.x for op in tail.ops if isinstance(op, SelectOutputs)] == ["attn", "x"]
    assert {b.rows for b in tail.buffers.values()} == {"outputs"}
    assert tail.ops[-1] == Matmul("x of outputs", "w", "logits")
    assert output_tail(program(Matmul("attn", "w", "x"), Attention("q", "attn", 0, 9, 1.0))).ops == ()  # type: ignore[union-attr]


def test_the_tail_begins_behind_the_last_op_that_mixes_rows() -> None:
    mixed = (Matmul("attn", "w", "h"), ApplyRope("h", 8, "r"), Add("h", "x", "x"), Matmul("x", "w", "logits"))
    tail = output_tail(program(*mixed))
    assert tail is not None and tail.start == len(HEADS) + 2, "a rotation goes by the positions of the step's rows"
    selected = SelectOutputs("x", "logits")
    for ops in ((selected, Attention("q", "attn", 0, 9, 1.0)), (selected, Add("x", "h", "x"))):
        assert output_tail(program(*ops)) is None
