"""The short convolution: the reference's numbers, and the same bits in any chunking, beside whatever others."""

from __future__ import annotations

import numpy as np
import pytest
from cpu_programs import FORMS, assert_chunks_change_no_bit, assert_sequences_keep_to_their_slots, float_tensor

from edgellm.kernels.kv import StateLayer
from edgellm.kernels.ops import Add, SelectOutputs, ShortConv
from edgellm.kernels.ops.embed import Embed
from edgellm.kernels.program import Buffer, Program

N_VOCAB = 61


def program(width: int, n_taps: int) -> Program:
    """Two layers over embedded tokens; the logits are the first N_VOCAB columns of what they give."""
    rng = np.random.default_rng(width)
    tensors = {
        "embed": float_tensor("embed", rng.standard_normal((N_VOCAB, 3 * width))),
        **{f"conv{i}": float_tensor(f"conv{i}", rng.standard_normal((width, n_taps))) for i in range(2)},
    }
    buffers = [
        Buffer("bcx", 3 * width),
        *(Buffer(f"y{i}", width) for i in range(3)),
        Buffer("logits", width, "outputs"),
    ]
    ops = (
        Embed("embed", "bcx"),
        ShortConv("bcx", "conv0", "y0", 0),
        ShortConv("bcx", "conv1", "y1", 1),
        Add("y0", "y1", "y2"),
        SelectOutputs("y2", "logits"),
    )
    layers = (StateLayer((n_taps - 1) * width),) * 2
    return Program("conv", ops, {b.name: b for b in buffers}, tensors, layers, {}, min(width, N_VOCAB), 4096, width)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("width", "n_taps"), [(64, 3), (100, 4), (7, 2), (16, 1)])
def test_the_reference_agrees_and_chunks_change_no_bit(width: int, n_taps: int, form: str) -> None:
    made = program(width, n_taps)
    tokens = np.random.default_rng(1).integers(0, min(width, N_VOCAB), 40)
    assert_chunks_change_no_bit(made, tokens, form, rtol=1e-4)


def test_sequences_in_one_step_keep_to_their_own_slots_and_a_step_can_be_run_again() -> None:
    assert_sequences_keep_to_their_slots(program(48, 3), 48)
