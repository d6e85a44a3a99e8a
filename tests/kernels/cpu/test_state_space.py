"""Mamba-2's state space: the reference's numbers, and the same bits in any chunking, beside whatever others."""

from __future__ import annotations

import numpy as np
import pytest
from cpu_programs import FORMS, assert_chunks_change_no_bit, cpu_executor
from test_delta_net import N_VOCAB, float_tensor

from edgellm.formats.errors import UnsupportedError
from edgellm.kernels.cpu.run.lowering import work_nbytes
from edgellm.kernels.kv import StateLayer
from edgellm.kernels.ops import GatedNorm, SelectOutputs, SSMGates, SSMScan
from edgellm.kernels.ops.embed import Embed
from edgellm.kernels.program import Batch, Buffer, Program


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
    made, rng = program(4, 2, 80, 24), np.random.default_rng(3)
    texts = [rng.integers(0, N_VOCAB, n) for n in (20, 9, 14)]
    fast = cpu_executor(made, 8)
    alone = [fast.run(Batch.single(made, text)).copy() for text in texts]

    def step(table: list[list[int]], parts: dict[int, tuple[int, int]]) -> None:
        """Of each sequence the tokens from one position to another."""
        spans = [np.arange(*span) for span in parts.values()]
        batch = Batch(
            tokens=np.concatenate([texts[i][span] for i, span in zip(parts, spans, strict=True)]).astype(np.int32),
            positions=np.concatenate(spans).astype(np.int32),
            sequences=np.repeat([*parts], [len(span) for span in spans]).astype(np.int32),
            outputs=np.ones(sum(map(len, spans)), bool),
            tables=(np.array(table, np.int32),),
        )
        expected = np.concatenate([alone[i][span] for i, span in zip(parts, spans, strict=True)])
        np.testing.assert_array_equal(fast.run(batch), expected)

    step([[-1, 1], [-1, 4], [-1, 6]], {0: (0, 12), 1: (0, 5), 2: (0, 1)})
    for _ in range(3):
        step([[1, 2], [4, 5], [6, 7]], {0: (12, 20), 2: (1, 14)})
    step([[2, 0], [4, 4], [7, 7]], {1: (5, 9)})  # into the slot that it is read from
    fast.close()


@pytest.mark.parametrize(("dim", "size", "named"), [(24, 8, "heads of 24"), (16, 513, "a state of 513")])
def test_a_size_without_a_kernel_is_named(dim: int, size: int, named: str) -> None:
    with pytest.raises(UnsupportedError, match=named):
        work_nbytes(program(2, 1, dim, size), 16, 2)
