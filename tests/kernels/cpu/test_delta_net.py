"""The gated delta rule: the reference's numbers, and the same bits in any chunking, beside whatever others."""

from __future__ import annotations

import numpy as np
import pytest
from cpu_programs import FORMS, assert_chunks_change_no_bit, assert_sequences_keep_to_their_slots, float_tensor

from edgellm.kernels.kv import StateLayer
from edgellm.kernels.ops import DeltaGates, DeltaRule, SelectOutputs
from edgellm.kernels.ops.embed import Embed
from edgellm.kernels.program import Buffer, Program

N_VOCAB = 61


def program(n_k: int, n_v: int, dim: int, *, tiled: bool) -> Program:
    """The rule over embedded tokens; what it gives are the logits."""
    rng = np.random.default_rng(dim)
    widths = {"qkv": (2 * n_k + n_v) * dim, "alpha": n_v, "beta": n_v}
    tensors = {name: float_tensor(name, rng.standard_normal((N_VOCAB, width))) for name, width in widths.items()}
    vectors = {"a": -np.exp(rng.standard_normal((1, n_v))), "dt": rng.standard_normal((1, n_v))}
    tensors |= {name: float_tensor(name, values) for name, values in vectors.items()}
    buffers = [*(Buffer(name, width) for name, width in (widths | {"decay": n_v, "rate": n_v, "y": n_v * dim}).items())]
    ops = (
        *(Embed(name, name) for name in widths),
        DeltaGates("alpha", "beta", "a", "dt", "decay", "rate"),
        DeltaRule("qkv", "decay", "rate", "y", 0, n_k, n_v, tiled),
        SelectOutputs("y", "logits"),
    )
    named = {b.name: b for b in (*buffers, Buffer("logits", n_v * dim, "outputs"))}
    return Program("delta", ops, named, tensors, (StateLayer(n_v * dim * dim),), {}, n_v * dim, 4096, widths["qkv"])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("n_k", "n_v", "dim", "tiled"), [(1, 1, 16, False), (2, 6, 80, True), (2, 4, 128, False)])
def test_the_reference_agrees_and_chunks_change_no_bit(n_k: int, n_v: int, dim: int, tiled: bool, form: str) -> None:
    made = program(n_k, n_v, dim, tiled=tiled)
    tokens = np.random.default_rng(1).integers(0, min(made.n_vocab, N_VOCAB), 40)
    assert_chunks_change_no_bit(made, tokens, form, rtol=1e-3)


def test_sequences_in_one_step_keep_to_their_own_slots_and_a_step_can_be_run_again() -> None:
    assert_sequences_keep_to_their_slots(program(2, 4, 48, tiled=True), N_VOCAB)
