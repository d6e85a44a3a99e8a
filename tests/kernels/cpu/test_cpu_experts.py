"""Experts on the CPU: who is sent where, and that a token's bits are its own whoever shares its experts."""

from __future__ import annotations

import numpy as np
import pytest
from cpu_programs import FORMS, cpu_executor

from edgellm.kernels.cpu.compile import trials
from edgellm.kernels.ops import ExpertMatmul, ExpertSum, Route
from edgellm.kernels.ops.sketch import Sketch
from edgellm.kernels.program import Batch
from edgellm.kernels.reference import ReferenceExecutor

N_TOKENS, N_EXPERT, N_USED = 17, 6, 3


def sketch_of(quant: str, n_in: int = 256, n_out: int = 100) -> Sketch:
    """A mixture of experts: the router's logits are an input."""
    s = trials.sketch(max_tokens=N_TOKENS)
    ids, probs, y, out = s.buffer(N_USED, "int32"), s.buffer(N_USED), s.buffer(N_USED * n_out), s.buffer(n_out)
    s.emit("route", Route(s.input(N_EXPERT), ids, probs))
    s.emit("product", ExpertMatmul(s.input(n_in), ids, s.tensor(quant, (N_EXPERT, n_out, n_in)), y, N_USED))
    s.emit("sum", ExpertSum(y, probs, out))
    return s


def results(s: Sketch, logits: np.ndarray, *, form: str = FORMS[0], step: int = N_TOKENS, reference: bool = False):  # type: ignore[no-untyped-def]
    """What the ops after the first write, (n_tokens, width) each, ``step`` tokens at a time."""
    program = s.program()
    s.inputs[next(iter(s.inputs))] = logits
    if reference:
        executor = ReferenceExecutor(program, 1, N_TOKENS)
    else:
        executor = cpu_executor(program, 1, 2, N_TOKENS, form)
    parts = []
    for first in range(0, N_TOKENS, step):
        batch = Batch.single(program, [0] * min(step, N_TOKENS - first))
        ids = program.ops[1].ids  # type: ignore[attr-defined]
        found = trials.outputs_of_ops(executor, batch, s.inputs, first)[2:]
        parts.append([*found, executor._read(ids).copy() if not reference else found[0]])
    executor.close()
    return [np.concatenate(arrays) for arrays in zip(*parts, strict=True)]


LOGITS = np.random.default_rng(5).standard_normal((N_TOKENS, N_EXPERT)).astype(np.float32)
ROUTES = {
    "each its own": LOGITS,
    "all to the same": np.tile(LOGITS[:1], (N_TOKENS, 1)),
    "two alike": np.concatenate([LOGITS[:-1], LOGITS[3:4]]),
    "all tied": np.zeros((N_TOKENS, N_EXPERT), np.float32),
    "one far ahead": LOGITS + 200 * (np.arange(N_EXPERT) == 4).astype(np.float32),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("quant", ["F16", "Q8_0", "Q4_K", "Q6_K"])
@pytest.mark.parametrize("routes", ROUTES)
def test_a_token_has_the_same_bits_in_every_chunk_and_whoever_shares_its_experts(
    routes: str, quant: str, form: str
) -> None:
    s = sketch_of(quant)
    whole = results(s, ROUTES[routes], form=form)
    for step in (1, 2, 5):
        for one, other in zip(whole, results(s, ROUTES[routes], form=form, step=step), strict=True):
            assert np.array_equal(one[-len(other) :], other[-len(one) :])
    judge = results(s, ROUTES[routes], reference=True)
    for one, expected in zip(whole[:2], judge[:2], strict=True):
        assert trials.nmse(one, expected) <= trials.SUPERBLOCK_LIMIT


def test_of_equal_logits_the_lower_id_comes_first() -> None:
    logits = np.zeros((N_TOKENS, N_EXPERT), np.float32)
    logits[1, [2, 5]] = 1
    logits[2, 0] = -0.0
    ids = results(sketch_of("F32"), logits)[2]
    assert ids[0].tolist() == ids[2].tolist() == [0, 1, 2]
    assert ids[1].tolist() == [2, 5, 0]


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
def test_logits_that_are_no_numbers_choose_different_experts(bad: float) -> None:
    logits = LOGITS.copy()
    logits[2:5] = bad
    logits[7, 1] = bad
    ids = results(sketch_of("Q8_0"), logits)[2]
    assert all(len(set(row)) == N_USED and 0 <= min(row) <= max(row) < N_EXPERT for row in ids.tolist())
