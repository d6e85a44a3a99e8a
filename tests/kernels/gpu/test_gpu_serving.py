"""Fifty prompts on a GPU have the same tokens alone, among others, with a cold cache and with a warm one."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from answers_together import answers_together
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


def test_packed_keys_go_from_device_to_device_and_have_the_same_tokens_cold_warm_and_together(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Prompts that part from others in the middle, over the end of a run, in a cache that has no room for them all."""
    folder, name = tmp_path_factory.mktemp("m"), device("gpu")
    path = tiny_models.write_tiny_model(folder / "m.gguf", "llama", "Q8_0", context_length=512)
    types = {"n_ctx": 384, "max_tokens_per_step": 64, "cache_type_k": "kivi2", "cache_type_v": "kivi2"}
    rng = np.random.default_rng(4)
    text = rng.integers(3, 259, 300).tolist()
    given = [[*text[:n], *rng.integers(3, 259, 20).tolist()] for n in (0, 90, 110, 128, 150, 260)]
    options = {"max_tokens": 40, "temperature": 0, "ignore_eos": True}
    cold = []
    for prompt in given:
        with edgellm.load(path, executor=name, **types) as llm:
            cold.append(llm.generate(prompt, **options).tokens)
    with edgellm.load(path, executor=name, n_parallel=2, **types) as llm:
        assert [llm.generate(prompt, **options).tokens for prompt in given * 2] == cold * 2
        assert answers_together(llm, given, options) == [list(tokens) for tokens in cold]
        llm.engine.call(lambda cache, executor: cache.check([]))
        planned = llm.memory_estimate.kv
        assert planned == llm.engine.cache.pool.nbytes
        llm.generate(given[-1], **options)
        n_saved = llm.save_state(folder / "gpu.kv", given[-1])
    for first, second, state in (("cpu", name, "cpu.kv"), (name, "cpu", "gpu.kv")):
        with edgellm.load(path, executor=first, **types) as llm:
            expected = llm.generate(given[-1], **options).tokens
            assert llm.save_state(folder / "cpu.kv", given[-1]) == n_saved or state == "gpu.kv"
        with edgellm.load(path, executor=second, **types) as llm:
            llm.load_state(folder / state)
            said = llm.generate(given[-1], **options)
            assert said.timings.reused_n >= 256 and said.tokens == expected
