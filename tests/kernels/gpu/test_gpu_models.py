"""Real models on a GPU have the CPU executor's greedy text."""

from __future__ import annotations

from pathlib import Path

import pytest
from gpu_device import device

import edgellm

PROMPT = "The three largest rivers of Europe are"


def greedy(path: Path, executor: str, n: int) -> tuple[int, ...]:
    with edgellm.load(path, executor=executor, n_ctx=128, max_tokens_per_step=64) as llm:
        return llm.generate(PROMPT, temperature=0, max_tokens=n).tokens


@pytest.mark.slow
@pytest.mark.parametrize("model", ["smollm2_path", "gemma_path"])
def test_the_greedy_text_is_that_of_the_cpu(model: str, request: pytest.FixtureRequest) -> None:
    name, path = device("gpu"), request.getfixturevalue(model)
    assert greedy(path, name, 10) == greedy(path, "cpu", 10)
