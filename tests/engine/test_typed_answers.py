"""Answers over keys and values in fewer bits: the same whatever was known, whoever is beside, and when preempted."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models

import edgellm
from edgellm.formats.errors import ParameterError, UnsupportedError

PROMPTS = [[(7 * i * (k + 1) + k) % 240 + 3 for i in range(n)] for k, n in enumerate((150, 40, 97, 33, 120, 64))]
TYPES = [("q8_0", "q8_0"), ("q4_0", "iq4_nl")]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    return tiny_models.write_tiny_model(folder / "tiny.gguf", "gemma3", context_length=512)


def told(llm: edgellm.LLM, prompt: list[int], n: int = 12, **options: Any) -> tuple[list[int], list[float]]:
    said = llm.generate(prompt, temperature=0, max_tokens=n, logprobs=2, ignore_eos=True, **options)
    return said.tokens, [one.logprob for one in said.logprobs]


@pytest.fixture(params=TYPES, ids="-".join)
def types(request: pytest.FixtureRequest) -> Iterator[dict[str, str]]:
    yield dict(zip(("cache_type_k", "cache_type_v"), request.param, strict=True))


def test_an_answer_is_that_of_a_cold_start(path: Path, types: dict[str, str]) -> None:
    """Behind a prefix that is shared, one that parts in a block, and in steps of any size; with a draft, too."""
    expected = []
    for prompt in PROMPTS:
        with edgellm.load(path, n_ctx=512, n_threads=1, **types) as llm:
            expected.append(told(llm, prompt))
    for options in ({"max_tokens_per_step": 7}, {"speculate": "ngram"}):
        with edgellm.load(path, n_ctx=512, **types, **options) as llm:
            told(llm, [*PROMPTS[0][:70], 5, 6, 7])
            for _ in range(2):
                assert [told(llm, prompt) for prompt in PROMPTS] == expected, options
            llm.engine.call(lambda cache, executor: cache.check([]))


def test_answers_beside_each_other_are_those_they_give_alone(path: Path, types: dict[str, str]) -> None:
    """Also where the cache has no room for all of them, and some are preempted."""
    with edgellm.load(path, n_ctx=512, **types) as llm:
        expected = [told(llm, prompt, 100) for prompt in PROMPTS]
    with edgellm.load(path, n_ctx=512, n_parallel=1, **types) as llm:
        found: list[Any] = [None] * len(PROMPTS)

        def ask(i: int) -> None:
            found[i] = told(llm, PROMPTS[i], 100)

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(PROMPTS))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == expected
        llm.engine.call(lambda cache, executor: cache.check([]))


def test_fewer_bits_need_less_memory(path: Path) -> None:
    found = []
    for kept in ("f16", "q8_0", "q4_0"):
        with edgellm.load(path, n_ctx=512, cache_type_k=kept, cache_type_v=kept) as llm:
            assert llm.memory_estimate.kv == llm.engine.cache.pool.nbytes
            found.append(llm.memory_estimate.kv)
    assert [round(found[0] * 9 / 16 / n, 6) for n in found[2:]] == [2.0] and found[1] * 32 == found[0] * 17


def test_what_cannot_be_is_refused_by_name(path: Path, tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match="cache_type_k is 'q3_0'"):
        edgellm.load(path, cache_type_k="q3_0")
    odd = tiny_models.write_tiny_model(tmp_path / "odd.gguf", "llama", head_dim=48)
    with pytest.raises(UnsupportedError, match="heads of 48 dimensions; q4_0 takes multiples of 32"):
        edgellm.load(odd, cache_type_v="q4_0")
