"""Beam search finds the texts and the scores that transformers finds, alone or beside other answers."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapter_files import ATTENTION, lora_pairs, write_lora
from test_models import MODELS, transformers_model
from tiny_models import write_tiny_model, write_transformers_model

import edgellm
from edgellm.engine import scheduler
from edgellm.engine.beams import BeamSearch, NextTokens, follow, likeliest
from edgellm.engine.cache import KVCache, pool_blocks
from edgellm.engine.engine import Engine
from edgellm.engine.scheduler import Scheduler
from edgellm.formats.gguf import GGUFFile
from edgellm.kernels.cache_types import DEFAULT, PACKED, QUANTIZED
from edgellm.kernels.reference import ReferenceExecutor
from edgellm.models import build_program
from edgellm.sampling import Sampler, SamplingParams

N_CTX = 128
PROMPT = np.random.default_rng(3).integers(0, 131, 35).tolist()
NEVER: Any = "never"
SEARCHES: list[dict[str, Any]] = [
    {"num_beams": 1},
    {"num_beams": 4},
    {"num_beams": 3, "length_penalty": 0.0, "early_stopping": NEVER},
    {"num_beams": 3, "length_penalty": 2.0, "early_stopping": NEVER},
    {"num_beams": 4, "length_penalty": -1.0},
    {"num_beams": 3, "early_stopping": True},
]


def open_engine(program: Any, n_parallel: int = 2) -> Engine:
    blocks = pool_blocks(program.cache_layers, N_CTX, 64, n_parallel)
    executor = ReferenceExecutor(program, blocks, 64)
    return Engine(executor, KVCache(executor.pool, N_CTX))


@pytest.mark.parametrize("name", ["llama", "gemma2", "lfm2", "qwen3next"])
def test_texts_and_scores_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="the judge of beams is transformers on torch")
    model = transformers_model(*MODELS[name])
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(3)  # texts that differ enough to be told apart, and end now and then
    with GGUFFile.open(write_transformers_model(tmp_path / "model.gguf", model)) as gguf:
        engine = open_engine(build_program(gguf))
        eog_ids = ends_of(engine)
        for options in SEARCHES if name == "llama" else SEARCHES[1::2]:
            n = options["num_beams"]
            judged = model.generate(
                torch.tensor([PROMPT]), do_sample=False, max_new_tokens=12, eos_token_id=eog_ids, pad_token_id=1,
                num_return_sequences=n, return_dict_in_generate=True, output_scores=True, use_cache=False,
                **{"length_penalty": 1.0, "early_stopping": False, **options},
            )  # fmt: skip
            search = BeamSearch(eog_ids=eog_ids, max_tokens=12, **options)
            assert follow(engine, PROMPT, search, (), None)
            for beam, expected in zip(search.finished, judged.sequences[:, len(PROMPT) :].tolist(), strict=True):
                assert [*beam.tokens, *[1] * (len(expected) - len(beam.tokens))] == expected, options
            if n > 1:  # of one beam transformers tells no score
                scores = [beam.score for beam in search.finished]
                np.testing.assert_allclose(scores, judged.sequences_scores.numpy(), atol=2e-4)
        thread = engine._thread
        if thread is not None:
            thread.join(60)
        engine.cache.check([])
        engine.close()


def ends_of(engine: Engine) -> list[int]:
    """Two tokens that likely texts have soon, as those that end them."""
    tokens = list(engine.generate(PROMPT, Sampler(SamplingParams(temperature=0), 131), max_tokens=9))
    return [int(tokens[3].token or 0), int(tokens[8].token or 0)]


def test_a_search_is_that_over_all_texts_where_there_are_as_many_beams() -> None:
    """Texts of three tokens out of four, by a table of what follows what."""
    table = np.log(np.random.default_rng(1).dirichlet(np.ones(4), 5))
    search = BeamSearch(16, (), 3)
    while not search.is_over:
        last = [beam.tokens[-1] if beam.tokens else 4 for beam in search.running]
        search.step([NextTokens(list(range(4)), table[token].tolist()) for token in last])
    scored = {
        text: sum(table[a][b] for a, b in itertools.pairwise((4, *text))) / 3
        for text in itertools.product(range(4), repeat=3)
    }
    best = sorted(scored, key=lambda text: -scored[text])[:16]
    assert [beam.tokens for beam in search.finished] == best
    np.testing.assert_allclose([beam.score for beam in search.finished], [scored[text] for text in best])


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[edgellm.LLM]:
    path = write_tiny_model(tmp_path_factory.mktemp("models") / "tiny.gguf", n_embd=64, n_ff=64, head_dim=16)
    with edgellm.load(path, n_threads=1, n_ctx=N_CTX) as loaded:
        yield loaded


def test_the_library_gives_the_best_answer_its_score_and_the_others(llm: edgellm.LLM) -> None:
    best = llm.generate("the other thing", num_beams=4, num_return_sequences=3, max_tokens=8)
    assert len(best.beams) == 3 and best.beams[0] is best and best.timings.generation_n == len(best.tokens) <= 8
    scores = [beam.score for beam in best.beams]
    assert scores == sorted(scores, key=lambda score: -(score or 0)) and len({beam.tokens for beam in best.beams}) == 3
    prompt = llm.prompt_ids("the other thing")
    rows = llm.score([*prompt, *best.tokens]).logprobs
    assert best.score == pytest.approx(float(rows[-len(best.tokens) :].sum()) / len(best.tokens), abs=1e-5)
    greedy = llm.generate("the other thing", temperature=0, max_tokens=8)
    assert llm.generate("the other thing", num_beams=1, max_tokens=8).tokens == greedy.tokens
    assert llm.generate("the other thing", num_beams=2, max_tokens=0) == ""


@pytest.mark.parametrize("kept", [DEFAULT, next(iter(QUANTIZED)), *PACKED])
def test_searches_beside_answers_and_without_room_find_the_same(kept: str, tmp_path: Path, drafts: bool) -> None:
    """The cache has blocks for one context: the beams and the answers preempt each other."""
    path = write_tiny_model(tmp_path / "tiny.gguf", n_embd=64, n_ff=64, n_head=2, n_head_kv=1, head_dim=32)
    types = {"cache_type_k": kept, "cache_type_v": kept}
    with edgellm.load(path, n_threads=1, n_ctx=N_CTX, speculate="ngram" if drafts else None, **types) as llm:
        searched_beside_answers(llm)


def searched_beside_answers(llm: edgellm.LLM) -> None:
    prompts = [f"{word} thing and the word " * 3 for word in ("the", "an", "in")]

    def alone(prompt: str) -> Any:
        beams = llm.generate(prompt, num_beams=4, max_tokens=20).tokens
        return beams, llm.generate(prompt, max_tokens=40, seed=1).tokens

    expected, found = {prompt: alone(prompt) for prompt in prompts}, dict[str, Any]()
    threads = [threading.Thread(target=lambda p=prompt: found.update({p: alone(p)})) for prompt in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert found == expected


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 0},
        {"num_beams": 2, "num_return_sequences": 3},
        {"num_beams": 2, "length_penalty": float("nan")},
        {"num_beams": 2, "length_penalty": 10**400},
        {"num_beams": 2, "length_penalty": -1e4},
        {"num_beams": 2, "early_stopping": "soon"},
        {"num_beams": 2, "early_stopping": 1},
        {"num_beams": 2, "temperature": 0.5},
        {"num_beams": 2, "stop": "x"},
        {"num_beams": 2, "regex": "x"},
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused_by_name(llm: edgellm.LLM, options: dict[str, Any]) -> None:
    with pytest.raises(edgellm.ParameterError, match=list(options)[-1]):
        llm.generate("the", max_tokens=4, **options)


def test_a_search_that_is_cancelled_gives_what_it_has(llm: edgellm.LLM) -> None:
    flag = threading.Event()
    flag.set()
    assert llm.generate("the", num_beams=2, max_tokens=9, cancel=flag).finish_reason == "cancelled"


def test_texts_that_lack_blocks_go_on_as_soon_as_others_give_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of eight texts of 220 tokens few fit at once; nobody looks for free blocks in the meantime."""
    path = write_tiny_model(tmp_path / "tiny.gguf", "llama", n_layer=1)
    n_waits, reserve = list[bool](), Scheduler._reserve

    def reserved(self: Scheduler, request: Any, n: int) -> bool:
        n_waits.append(not (found := reserve(self, request, n)))
        return found

    monkeypatch.setattr(Scheduler, "_reserve", reserved)
    monkeypatch.setattr(scheduler, "POLL_S", 1e6)
    with edgellm.load(path, n_threads=1, n_ctx=256) as llm, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(llm.generate, list(range(5, 205)), num_beams=8, max_tokens=20)
        try:
            assert len(answer.result(60).tokens) > 0
        finally:
            monkeypatch.setattr(scheduler, "POLL_S", 0.05)
    assert any(n_waits)


def test_a_search_tells_what_its_prompt_took_and_what_was_known_of_it(tmp_path: Path) -> None:
    path, prompt = write_tiny_model(tmp_path / "tiny.gguf", "llama", n_layer=1), list(range(5, 105))
    with edgellm.load(path, n_threads=1, n_ctx=256) as llm:
        first, second = (llm.generate(prompt, num_beams=2, max_tokens=6).timings for _ in range(2))
    assert (first.prompt_n, first.reused_n) == (100, 0) and second.reused_n >= 64
    assert 0 < first.prompt_ms == first.time_to_first_token_ms and first.generation_ms > 0


def test_no_beams_is_an_answer_like_any_other_and_a_stream_has_none(llm: edgellm.LLM) -> None:
    plain = llm.generate("the", temperature=0, max_tokens=4)
    assert llm.generate("the", temperature=0, max_tokens=4, num_beams=None) == plain
    assert asyncio.run(llm.agenerate("the", temperature=0, max_tokens=4, num_beams=None)) == plain
    for ask in (llm.stream, llm.events):
        with pytest.raises(edgellm.ParameterError, match="num_beams is for generate alone"):
            ask("the", num_beams=2)


def test_a_search_has_the_adapters_that_it_chooses(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "tiny.gguf", "llama", "Q8_0", n_embd=64, n_ff=64, head_dim=32)
    lora = write_lora(tmp_path / "one.gguf", lora_pairs(path, ATTENTION, size=0.4))
    prompt, beams = list(range(5, 25)), {"num_beams": 3, "max_tokens": 6, "num_return_sequences": 3}
    with edgellm.load(path, n_threads=1, n_ctx=256) as llm:
        plain = llm.generate(prompt, **beams)
    with edgellm.load(path, n_threads=1, n_ctx=256, lora=lora) as llm:
        with_it, without = llm.generate(prompt, **beams), llm.generate(prompt, **beams, lora={})
        assert llm.generate(prompt, **beams, lora="one").score == with_it.score != without.score
        with pytest.raises(edgellm.ParameterError, match="lora"):
            llm.generate(prompt, **beams, lora="two")
    assert (without.tokens, without.score) == (plain.tokens, plain.score)


def test_what_the_executor_finds_of_a_vocabulary_is_what_numpy_finds(llm: edgellm.LLM) -> None:
    rng, draw = np.random.default_rng(1), llm.executor.draw
    assert draw is not None
    for banned in ([], [3, 700, 999]):
        logits = rng.permutation(np.linspace(-8, 8, 1000)).astype(np.float32)
        plain, found = (likeliest(logits, 12, np.array(banned, np.int64), by) for by in (None, draw))
        assert found.ids == plain.ids
        np.testing.assert_allclose(found.logprobs, plain.logprobs, atol=1e-5)
