"""The gated delta rule: the reference's numbers, and the same bits in any chunking, beside whatever others."""

from __future__ import annotations

import numpy as np
import pytest
from cpu_programs import FORMS, assert_chunks_change_no_bit, cpu_executor

from edgellm.formats.gguf import QuantizedTensor
from edgellm.formats.quant_types import QUANT_TYPES
from edgellm.kernels.kv import StateLayer
from edgellm.kernels.ops import DeltaGates, DeltaRule, SelectOutputs
from edgellm.kernels.ops.embed import Embed
from edgellm.kernels.program import Batch, Buffer, Program

N_VOCAB = 61


def float_tensor(name: str, values: np.ndarray) -> QuantizedTensor:
    values = np.ascontiguousarray(values, np.float32)
    return QuantizedTensor(name, values.shape, QUANT_TYPES["F32"], values.view(np.uint8).reshape(len(values), -1))


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
    made = program(2, 4, 48, tiled=True)
    rng = np.random.default_rng(3)
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
