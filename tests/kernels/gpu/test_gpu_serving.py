"""Fifty prompts on a GPU have the same tokens alone, among others, with a cold cache and with a warm one."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from gpu_device import device

import edgellm

tiny_models = pytest.importorskip("tiny_models", reason="the gguf package writes the test models")

N_PROMPTS, N_TOKENS = 50, 8


@pytest.fixture(scope="module", params=["gemma3", "qwen35"])
def llm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    name = device("gpu")
    path = tiny_models.write_tiny_model(tmp_path_factory.mktemp("m") / "m.gguf", request.param, "Q8_0")
    with edgellm.load(path, executor=name, n_ctx=1024, max_tokens_per_step=64) as opened:
        yield opened


def prompts() -> list[list[int]]:
    rng = np.random.default_rng(4)
    return [rng.integers(3, 259, rng.integers(1, 40)).tolist() for _ in range(N_PROMPTS)]


def answer(llm: Any, i: int, prompt: list[int]) -> tuple[int, ...]:
    temperature = 0.0 if i % 3 else 0.9
    return llm.generate(prompt, max_tokens=N_TOKENS, temperature=temperature, seed=i).tokens


def test_fifty_prompts_have_the_same_tokens_alone_and_together_cold_and_warm(llm: Any) -> None:
    given = prompts()
    cold = [answer(llm, i, prompt) for i, prompt in enumerate(given)]
    assert [answer(llm, i, prompt) for i, prompt in enumerate(given)] == cold, "warm"
    together: dict[int, tuple[int, ...]] = {}
    sizes, first = [2, 3, 4, 9, 16, 16], 0
    for size in sizes:
        chosen = range(first, min(first + size, N_PROMPTS))
        threads = [threading.Thread(target=lambda i=i: together.update({i: answer(llm, i, given[i])})) for i in chosen]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        first += size
    assert [together[i] for i in range(N_PROMPTS)] == cold


def test_answers_that_come_together_are_drawn_together(llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, plain = [], llm.executor.decode_together

    def noted(batch: Any, *arguments: Any) -> list[int]:
        sizes.append(len(batch))
        return plain(batch, *arguments)

    monkeypatch.setattr(llm.executor, "decode_together", noted)
    found: list[Any] = []
    threads = [
        threading.Thread(target=lambda i=i: found.append(llm.generate([5, 6, i], max_tokens=64, temperature=0)))
        for i in range(7, 13)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(sizes) > 1 and len(found) == 6
