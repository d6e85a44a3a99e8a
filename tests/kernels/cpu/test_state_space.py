"""Mamba-2's state space: the reference's numbers, and the same bits in any chunking, beside whatever others."""

from __future__ import annotations

import numpy as np
import pytest
from cpu_programs import FORMS, assert_chunks_change_no_bit, assert_sequences_keep_to_their_slots, float_tensor

from edgellm.formats.errors import UnsupportedError
from edgellm.kernels.cpu.run.lowering import work_nbytes
from edgellm.kernels.kv import StateLayer
from edgellm.kernels.ops import GatedNorm, SelectOutputs, SSMGates, SSMScan
from edgellm.kernels.ops.embed import Embed
from edgellm.kernels.program import Buffer, Program

N_VOCAB = 61


def program(heads: int, groups: int, dim: int, size: int) -> Program:
    """Scan and norm over embedded tokens; what they give are the logits. States fade at once, or hardly."""
    rng, inner = np.random.default_rng(dim), heads * dim
    widths = {"xbc": inner + 2 * groups * size, "dt": heads, "z": inner}
    tensors = {name: float_tensor(name, rng.standard_normal((N_VOCAB, width))) for name, width in widths.items()}
    columns = {"a": -np.exp(rng.uniform(-8, 6, (heads, 1))), "d": rng.standard_normal((heads, 1))}
    columns |= {"dt_bias": rng.standard_normal((1, heads)), "norm": rng.standard_normal((groups, inner // groups))}
    tensors |= {name: float_tensor(name, values) for name, values in columns.items()}
    named = {
        name: Buffer(name, width) for name, width in (widths | {"decay": heads, "rate": heads, "y": inner}).items()
    }
    ops = (
        *(Embed(name, name) for name in widths),
        SSMGates("dt", "a", "dt_bias", "decay", "rate"),
        SSMScan("xbc", "decay", "rate", "d", "y", 0, heads, groups),
        GatedNorm("y", "z", "norm", "y", 1e-5),
        SelectOutputs("y", "logits"),
    )
    named |= {"logits": Buffer("logits", inner, "outputs")}
    return Program("states", ops, named, tensors, (StateLayer(inner * size),), {}, inner, 4096, widths["xbc"])


SHAPES = [(1, 1, 16, 1), (6, 2, 80, 24), (4, 4, 64, 130), (2, 1, 128, 33)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("heads", "groups", "dim", "size"), SHAPES)
def test_the_reference_agrees_and_chunks_change_no_bit(heads: int, groups: int, dim: int, size: int, form: str) -> None:
    made = program(heads, groups, dim, size)
    tokens = np.random.default_rng(1).integers(0, min(made.n_vocab, N_VOCAB), 40)
    assert_chunks_change_no_bit(made, tokens, form, rtol=1e-3)


def test_sequences_in_one_step_keep_to_their_own_slots_and_a_step_can_be_run_again() -> None:
    assert_sequences_keep_to_their_slots(program(4, 2, 80, 24), N_VOCAB)


@pytest.mark.parametrize(("dim", "size", "named"), [(24, 8, "heads of 24"), (16, 513, "a state of 513")])
def test_a_size_without_a_kernel_is_named(dim: int, size: int, named: str) -> None:
    with pytest.raises(UnsupportedError, match=named):
        work_nbytes(program(2, 1, dim, size), 16, 2, FORMS[0])
