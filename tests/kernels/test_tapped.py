"""A buffer that a program keeps for what drafts: whole behind any step, though few tokens want logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_models import write_tiny_model

from edgellm.formats.gguf import GGUFFile
from edgellm.kernels import executors
from edgellm.kernels.ops import Scale, SelectOutputs
from edgellm.kernels.program import Batch, Buffer, HiddenExecutor, Program
from edgellm.kernels.reference import ReferenceExecutor
from edgellm.models import build_program

TOKENS = [int(token) for token in np.random.default_rng(0).integers(3, 270, 40)]
SIZES = {"n_embd": 64, "n_ff": 64, "head_dim": 16, "n_layer": 4}


def tapped(program: Program, at: int) -> Program:
    """The program that keeps what stands in x before one of its ops."""
    kept = Buffer("kept", program.n_embd)
    ops = (*program.ops[:at], Scale("x", "kept", 1.0), *program.ops[at:])
    return replace(program, ops=ops, buffers=program.buffers | {"kept": kept}, tapped="kept")


@pytest.mark.parametrize("architecture", ["llama", "gemma4"])  # of the second the last layers keep nothing
def test_what_is_tapped_is_of_all_tokens_and_changes_no_logit(architecture: str, tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "model.gguf", architecture, "F32", **SIZES)
    with GGUFFile.open(path) as gguf:
        plain = build_program(gguf)
        end = next(i for i, op in enumerate(plain.ops) if isinstance(op, SelectOutputs))
        for at in (3, end // 2, end - 1, end):
            program = tapped(plain, at)
            judge = ReferenceExecutor(program, 8)
            judge.run(Batch.single(program, TOKENS, 0, "last"))
            found = [steps(one, pieces) for one in (plain, program) for pieces in ([40], [7, 1, 32])]
            for logits, _ in found:
                np.testing.assert_array_equal(logits, found[0][0])
            np.testing.assert_array_equal(found[2][1], found[3][1])
            assert found[2][1].shape == (40, 64)
            difference = found[2][1] - judge.last_tapped()  # the cache has 16 bits
            assert (difference**2).sum() < 1e-5 * (judge.last_tapped() ** 2).sum()


def steps(program: Program, pieces: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """The logits behind the last token, and what was tapped of all of them."""
    executor = executors.open_executor("cpu", program, 8, max_tokens=64)
    assert isinstance(executor, HiddenExecutor)
    start, rows = 0, []
    for n in pieces:
        logits = executor.run(Batch.single(program, TOKENS[start : start + n], start, "last")).copy()
        rows.append(executor.last_tapped().copy() if program.tapped else np.empty((0, 0)))
        start += n
    executor.close()
    return logits, np.concatenate(rows)
