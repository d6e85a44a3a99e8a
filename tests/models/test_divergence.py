"""What the CPU's rounding costs: the divergence of its answers from those of the reference, for each architecture.

Measured with 4 layers of Q4_K, gpt-oss's experts in MXFP4, logits as wide as a trained model's: 1e-6 to 1e-5 where a
norm does not make it less. Where two experts are all but equal rounding may choose the other one, which in a router of
random numbers one or two of 400 rows see; then a row and those behind it have another answer, and are left out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import EXPERTS, write_tiny_model

from edgellm.formats.gguf import GGUFFile
from edgellm.kernels.cpu.run.executor import CPUExecutor
from edgellm.kernels.ops import Op, Route
from edgellm.kernels.program import Batch
from edgellm.kernels.reference import ReferenceExecutor
from edgellm.models import build_program

N_TOKENS, SHARP = 96, 4.0  # logits of random weights say little: they are made as wide as a trained model's
LIMIT = 1e-4
ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "granite", "lfm2", "qwen35", *EXPERTS)
SEEDS = {"ernie4_5-moe": 1}  # of whose weights no row below 16 sees two experts all but equal
TYPES = {name: "MXFP4" if name == "gpt-oss" else "Q4_K" for name in ARCHITECTURES}


def log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64) * SHARP / logits.std()
    wide -= wide.max(axis=1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_mean_divergence_of_cpu_and_reference_is_small(architecture: str, tmp_path: Path) -> None:
    quants = {"_exps.weight": TYPES[architecture], "token_embd.weight": "Q8_0"}
    quant = "Q8_0" if architecture == "gpt-oss" else "Q4_K"
    path = write_tiny_model(
        tmp_path / "model.gguf", architecture, quant, quants=quants, n_layer=4, seed=SEEDS.get(architecture, 0)
    )
    with GGUFFile.open(path) as gguf:
        program = build_program(gguf)
        tokens = np.random.default_rng(1).integers(3, program.n_vocab, N_TOKENS)
        batch = Batch.single(program, tokens)
        fast, chosen = CPUExecutor(program, 4, 2, N_TOKENS), list[np.ndarray]()

        def hook(_: int, op: Op, read: Any) -> None:
            if isinstance(op, Route):
                chosen.append(np.sort(read(op.ids), axis=1))

        found, expected = (log_softmax(executor.run(batch, hook)) for executor in (fast, ReferenceExecutor(program)))
        fast.close()
    n = len(chosen) // 2
    other = [(a != b).any(axis=1) for a, b in zip(chosen[:n], chosen[n:], strict=True)]
    alike = N_TOKENS if not np.any(other) else int(np.argmax(np.any(other, axis=0)))
    assert alike >= 16
    assert (np.exp(expected) * (expected - found))[:alike].sum(axis=1).mean() <= LIMIT
