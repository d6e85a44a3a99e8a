"""Every family of experts, delta-nets and sliding layers: an answer is the same whatever way its tokens came about."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from answers_together import answers_together
from quantize_plans import FAMILIES
from tiny_models import write_tiny_model

import edgellm

PROMPT = [11, 12, 13, 14, 15] * 14 + [20, 21]
SEEDED: dict[str, Any] = {"max_tokens": 12, "temperature": 0.9, "seed": 5, "ignore_eos": True}


@pytest.mark.parametrize("architecture", [*FAMILIES, "gemma", "gemma2"])
def test_an_answer_is_that_of_a_cold_run(architecture: str, tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "model.gguf", architecture, n_layer=3)

    def load(**options: Any) -> edgellm.LLM:
        return edgellm.load(path, n_threads=2, **{"n_ctx": 256, **options})

    with load() as llm:  # warm, and saved
        cold = list(llm.generate(PROMPT, **SEEDED).tokens)
        warm = llm.generate(PROMPT, **SEEDED)
        assert list(warm.tokens) == cold and warm.timings.reused_n > 0
        turn = [*PROMPT, *cold, 30, 31]
        second = llm.generate(turn, **SEEDED)
        assert second.timings.reused_n == len(PROMPT) + len(cold) - 1
        llm.save_state(tmp_path / "state", [*PROMPT, *cold])
    for n in (1, 7, 64, 512):  # in chunks
        with load(max_tokens_per_step=n) as llm:
            assert list(llm.generate(PROMPT, **SEEDED).tokens) == cold, n
            assert list(llm.generate(turn, **SEEDED).tokens) == list(second.tokens), n
    with load() as llm:  # restored
        llm.load_state(tmp_path / "state")
        restored = llm.generate(turn, **SEEDED)
        assert restored.timings.reused_n > len(PROMPT) and list(restored.tokens) == list(second.tokens)
    with load(speculate="ngram") as llm:  # speculated
        assert list(llm.generate(PROMPT, **SEEDED).tokens) == cold
    prompts = [PROMPT, [50, *PROMPT], [51, *PROMPT]]
    with load(n_ctx=128, n_parallel=1) as llm:  # preempted: there is room for one
        answers = answers_together(llm, prompts, SEEDED)
    with load(n_parallel=3) as llm:
        assert answers_together(llm, prompts, SEEDED) == answers
    assert answers[0] == cold
