"""The short convolution: the reference's numbers, and the same bits in any chunking, beside whatever others."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from cpu_programs import FORMS, assert_chunks_change_no_bit, cpu_executor

from edgellm.formats.gguf import QuantizedTensor
from edgellm.formats.quant_types import QUANT_TYPES
from edgellm.kernels.kv import StateLayer
from edgellm.kernels.ops import Add, SelectOutputs, ShortConv
from edgellm.kernels.ops.embed import Embed
from edgellm.kernels.program import Batch, Buffer, Program

N_VOCAB = 61


def float_tensor(name: str, values: np.ndarray) -> QuantizedTensor:
    values = np.ascontiguousarray(values, np.float32)
    return QuantizedTensor(name, values.shape, QUANT_TYPES["F32"], values.view(np.uint8).reshape(len(values), -1))


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
    made = program(48, 3)
    rng = np.random.default_rng(3)
    texts = [rng.integers(0, 48, n) for n in (20, 9, 14)]
    fast = cpu_executor(made, 8)
    alone = [fast.run(Batch.single(made, text)).copy() for text in texts]
    positions = np.concatenate([np.arange(n) for n in (12, 5, 1)]).astype(np.int32)
    first = Batch(
        tokens=np.concatenate([text[:n] for text, n in zip(texts, (12, 5, 1), strict=True)]).astype(np.int32),
        positions=positions,
        sequences=np.repeat(np.arange(3), (12, 5, 1)).astype(np.int32),
        outputs=np.ones(18, bool),
        tables=(np.array([[-1, 1], [-1, 4], [-1, 6]], np.int32),),
    )
    np.testing.assert_array_equal(
        fast.run(first), np.concatenate([a[:n] for a, n in zip(alone, (12, 5, 1), strict=True)])
    )
    second = dataclasses.replace(
        first,
        tokens=np.concatenate([texts[0][12:20], texts[2][1:14]]).astype(np.int32),
        positions=np.concatenate([np.arange(12, 20), np.arange(1, 14)]).astype(np.int32),
        sequences=np.repeat([0, 2], (8, 13)).astype(np.int32),
        outputs=np.ones(21, bool),
        tables=(np.array([[1, 2], [4, 5], [6, 7]], np.int32),),
    )
    for _ in range(3):
        np.testing.assert_array_equal(fast.run(second), np.concatenate([alone[0][12:], alone[2][1:]]))
    fast.close()
