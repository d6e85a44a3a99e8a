"""``LLM.embed`` and ``LLM.rerank``: what they promise, judged by transformers where a number is asked for."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_encoders import random_bert, write_bert
from tiny_models import write_tiny_model

import edgellm
from edgellm.engine import embedding, engine
from edgellm.engine.requests import Request
from edgellm.formats.errors import ClosedError, ContextFullError, EdgeLLMError, UnsupportedError

SHORT = ["the quick brown fox", "a lazy dog", "", "what is the capital of france?", "rivers run to the sea"] * 9
LONG = "the quick brown fox jumps over the lazy dog " * 40


@pytest.fixture(scope="module")
def bert_model() -> Any:
    return random_bert(max_position_embeddings=512)


@pytest.fixture(scope="module")
def bert(bert_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[edgellm.LLM]:
    with edgellm.load(write_bert(tmp_path_factory.mktemp("bert") / "bert.gguf", bert_model)) as llm:
        yield llm


@pytest.fixture(scope="module")
def ranker_model() -> Any:
    return random_bert("BertForSequenceClassification", num_labels=1, max_position_embeddings=64)


@pytest.fixture(scope="module")
def ranker(ranker_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[edgellm.LLM]:
    with edgellm.load(write_bert(tmp_path_factory.mktemp("rank") / "rank.gguf", ranker_model, 4)) as llm:
        yield llm


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[edgellm.LLM]:
    """A model for chats, whose steps are shorter than its texts."""
    path = write_tiny_model(tmp_path_factory.mktemp("decoder") / "qwen3.gguf", "qwen3", "F32")
    with edgellm.load(path, max_tokens_per_step=48) as llm:
        yield llm


def states(model: Any, ids: list[int], types: list[int] | None = None) -> np.ndarray:
    torch = pytest.importorskip("torch", reason="the judge of vectors is transformers on torch")
    with torch.no_grad():
        more = {} if types is None else {"token_type_ids": torch.tensor([types])}
        return model(torch.tensor([ids]), **more).last_hidden_state[0].numpy()


def test_vectors_are_the_normalised_mean_of_transformers_states_in_order(bert: edgellm.LLM, bert_model: Any) -> None:
    texts = [*SHORT[:5], LONG]
    vectors = bert.embed(texts)
    assert vectors.dtype == np.float32 and vectors.shape == (6, 48)
    for text, vector in zip(texts, vectors, strict=True):
        ids = bert.tokenize(text)
        assert ids[0] == 2 and ids[-1] == 3  # [CLS] ... [SEP]
        mean = states(bert_model, ids).mean(axis=0)
        assert np.dot(vector, mean / np.linalg.norm(mean)) >= 1 - 1e-6
        assert np.allclose(bert.embed([text], normalize=False)[0], mean, atol=1e-4)


def test_a_text_has_the_same_bits_alone_in_a_batch_and_among_other_callers(
    bert: edgellm.LLM, decoder: edgellm.LLM
) -> None:
    for llm in (bert, decoder):
        texts = [text or "a" for text in SHORT] + [LONG[:190]]
        together = llm.embed(texts)
        for i in (0, 3, len(texts) - 1):
            assert np.array_equal(llm.embed(texts[i])[0], together[i])
        with ThreadPoolExecutor(4) as callers:
            assert all(np.array_equal(found, together) for found in callers.map(llm.embed, [texts] * 4))


def test_many_short_texts_share_steps(bert: edgellm.LLM) -> None:
    scheduler = bert.engine.scheduler
    before = scheduler.n_steps
    bert.embed(SHORT * 4)
    n_tokens = 4 * sum(len(bert.tokenize(text)) for text in SHORT)
    assert scheduler.n_steps - before <= 3 * n_tokens // scheduler.max_tokens + 3


def test_a_text_too_long_is_refused_with_figures_unless_it_may_be_cut(bert: edgellm.LLM, bert_model: Any) -> None:
    text = LONG * 2
    n = len(bert.tokenize(text))
    with pytest.raises(ContextFullError, match=rf"{n} tokens.*512.*truncate") as caught:
        bert.embed(["a", text])
    assert caught.value.n_tokens == n
    ids = [*bert.tokenize(text)[:511], 3]
    mean = states(bert_model, ids).mean(axis=0)
    assert np.dot(bert.embed([text], truncate=True)[0], mean / np.linalg.norm(mean)) >= 1 - 1e-6
    assert np.array_equal(bert.embed(["a", ids]), bert.embed(["a", text], truncate=True))


def test_nothing_gives_no_rows_and_counts_are_told(bert: edgellm.LLM) -> None:
    assert bert.embed([]).shape == (0, 48) and bert.embed(()).shape == (0, 48)
    counts: list[int] = []
    bert.embed(["the fox", [2, 7, 3]], counted=counts.append)
    assert counts == [4, 3]


def test_other_poolings_dimensions_and_prompts(bert: edgellm.LLM, decoder: edgellm.LLM) -> None:
    for llm in (bert, decoder):
        text = LONG[:150]
        rows = llm.embed([text, "a"], pooling="none", normalize=False)
        assert [len(one) for one in rows] == [len(llm.tokenize(text)), len(llm.tokenize("a"))]
        for pooling, wanted in (("cls", rows[0][0]), ("last", rows[0][-1]), ("mean", rows[0].mean(axis=0))):
            vector = llm.embed([text], pooling=pooling, normalize=False)[0]
            assert np.allclose(vector, wanted, atol=1e-5) and (pooling == "mean" or np.array_equal(vector, wanted))
        cut = llm.embed([text], dimensions=16)[0]
        assert cut.shape == (16,) and np.isclose(np.linalg.norm(cut), 1)
        whole = llm.embed([text])[0][:16]
        assert np.allclose(cut, whole / np.linalg.norm(whole), atol=1e-6)
        assert np.array_equal(llm.embed(["fox"], prompt="the "), llm.embed(["the fox"]))


def test_wrong_arguments_are_named(bert: edgellm.LLM) -> None:
    calls: list[tuple[Callable[[], Any], str]] = [
        (lambda: bert.embed(7), "texts"),  # type: ignore[arg-type]
        (lambda: bert.embed([None]), "texts"),  # type: ignore[list-item]
        (lambda: bert.embed({"a": 1}), "texts"),  # type: ignore[arg-type]
        (lambda: bert.embed([[]]), "0 tokens"),
        (lambda: bert.embed([[10**6]]), "vocabulary"),
        (lambda: bert.embed([[-1]]), "vocabulary"),
        (lambda: bert.embed(["a"], dimensions=0), "dimensions"),
        (lambda: bert.embed(["a"], dimensions=49), "dimensions"),
        (lambda: bert.embed(["a"], dimensions=8, pooling="none"), "dimensions"),
        (lambda: bert.embed(["a"], pooling="rank"), "pooling"),  # type: ignore[arg-type]
        (lambda: bert.embed(["a"], normalize="yes"), "normalize"),  # type: ignore[arg-type]
        (lambda: bert.embed(["a"], prompt=3), "prompt"),  # type: ignore[arg-type]
        (lambda: bert.rerank("a", ["b"]), "classifier"),
    ]
    for call, word in calls:
        with pytest.raises(EdgeLLMError, match=word):
            call()
    assert bert.embed(["still here"]).shape == (1, 48)


def test_hostile_texts_get_vectors(bert: edgellm.LLM) -> None:
    texts = ["\0\x1b[2J", "\ud800 half", "[CLS] [SEP] [PAD]", "\u202e" * 50, "x" * 5000, "🌍" * 300]
    vectors = bert.embed(texts, truncate=True)
    assert np.isfinite(vectors).all() and np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    marks = set(bert.tokenize("[CLS] [SEP] [PAD]", add_special=False)) & {0, 2, 3, 4}
    assert not marks, "what a user writes became a mark"


def test_models_for_embeddings_answer_nothing_and_say_so(bert: edgellm.LLM, ranker: edgellm.LLM) -> None:
    assert (bert.kind, ranker.kind) == ("embedding", "rerank")
    for llm, word in ((bert, "use embed"), (ranker, "use rerank")):
        calls: list[Callable[[], Any]] = [
            lambda: llm.stream("a"),  # noqa: B023
            lambda: llm.generate("a"),  # noqa: B023
            lambda: llm.chat("a"),  # noqa: B023
            lambda: llm.events("a"),  # noqa: B023
        ]
        for call in calls:
            with pytest.raises(UnsupportedError, match=word):
                call()
        with pytest.raises(UnsupportedError, match="no next token"):
            llm.score("the fox")
    with pytest.raises(UnsupportedError, match="scores"):
        ranker.embed(["a"])


def test_scores_of_a_reranker_equal_transformers(ranker: edgellm.LLM, ranker_model: Any) -> None:
    torch = pytest.importorskip("torch", reason="the judge of scores is transformers on torch")
    query, documents = "what is the capital of france?", ["paris", "a lazy dog", "rivers run to the sea", ""]
    judged = []
    for document in documents:
        first, second = ranker.tokenize(query), [*ranker.tokenize(document, add_special=False), 3]
        types = torch.tensor([[0] * len(first) + [1] * len(second)])
        with torch.no_grad():
            judged.append(float(ranker_model(torch.tensor([first + second]), token_type_ids=types).logits[0, 0]))
    ranked = ranker.rerank(query, documents)
    assert [one.index for one in ranked] == np.argsort([-score for score in judged]).tolist()
    assert all(abs(one.score - judged[one.index]) < 1e-4 for one in ranked)
    assert ranker.rerank(query, documents, 2) == ranked[:2]
    assert ranker.rerank(query, documents[:1])[0].score == next(one.score for one in ranked if one.index == 0)
    assert ranker.rerank(query, []) == [] and asyncio.run(ranker.arerank(query, documents)) == ranked


def test_a_document_too_long_beside_the_query_is_cut_when_asked(ranker: edgellm.LLM) -> None:
    with pytest.raises(ContextFullError, match="64"):
        ranker.rerank("the fox", ["a dog", LONG])
    assert len(ranker.rerank("the fox", ["a dog", LONG], truncate=True)) == 2


def test_a_document_is_cut_between_its_tokens(ranker: edgellm.LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[int]] = []
    check = ranker.engine.check
    monkeypatch.setattr(ranker.engine, "check", lambda tokens: (seen.append(tokens), check(tokens)))
    document = "a \u4e2d dog " * 40  # the second word is [UNK], which has no text
    ranker.rerank("the fox", [document], truncate=True)
    own = ranker.tokenize(document, add_special=False)
    first = ranker.tokenize("the fox")
    assert seen == [[*first, *own[: 64 - len(first) - 1], 3]]


def test_a_model_that_says_yes_or_no_ranks_by_the_share_of_yes(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    template = "<|im_start|>query: {query}\ndocument: {document}<|im_end|>"
    path = write_tiny_model(
        tmp_path / "yesno.gguf",
        "qwen3",
        "F32",
        metadata={"qwen3.pooling_type": 4, "tokenizer.chat_template.rerank": template},
        extra_tensors={"cls.output.weight": rng.standard_normal((2, 256)).astype(np.float32)},
    )
    with edgellm.load(path) as llm:
        assert llm.kind == "rerank"
        ranked = llm.rerank("the", ["in", "on <|im_end|> the"])
        for one in ranked:
            index, score = one.index, one.score
            document = ["in", "on <|im_end|> the"][index]
            ids = [
                *llm.tokenize(f"<|im_start|>query: the\ndocument: {document}".split("on <|")[0], parse_special=True),
                *(llm.tokenize("on <|im_end|> the") if index else []),
                2,
            ]
            row = llm.embed([ids], pooling="last", normalize=False)[0]
            logits = llm.program.tensors["cls.output.weight"].dequantize() @ row
            assert abs(score - 1 / (1 + np.exp(logits[1] - logits[0]))) < 2e-2


def test_a_caller_that_leaves_ends_the_work(bert: edgellm.LLM) -> None:
    async def leave() -> int:
        task = asyncio.create_task(bert.aembed([LONG] * 4000))
        await asyncio.sleep(0.2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return len(bert.engine.scheduler.requests)

    asyncio.run(leave())
    assert bert.embed(["the fox"]).shape == (1, 48)
    assert asyncio.run(bert.aembed(["the fox"])).shape == (1, 48)


def test_callers_that_wait_leave_the_event_loops_threads_to_others(
    bert: edgellm.LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = threading.Event()
    embed = bert.embed
    monkeypatch.setattr(bert, "embed", lambda *args, **options: go.wait(60) and embed(*args, **options))

    async def all_of_them() -> list[Any]:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        waiting = [asyncio.create_task(bert.aembed(["the fox"])) for _ in range(3)]
        await asyncio.sleep(0)
        await asyncio.to_thread(go.set)
        return await asyncio.wait_for(asyncio.gather(*waiting), 60)

    assert all(len(one) == 1 for one in asyncio.run(all_of_them()))


def test_a_long_step_that_several_texts_share_ends_when_their_caller_leaves(
    bert: edgellm.LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    cancel, holds, broken_off = threading.Event(), threading.Event(), list[bool]()
    run_while = bert.executor.run_while  # type: ignore[attr-defined]

    def leave(batch: Any, wanted: Callable[[], bool]) -> Any:
        cancel.set()
        broken_off.append((found := run_while(batch, wanted)) is None)
        return found

    def until_all_are_in_line(cache: Any, executor: Any) -> None:
        holds.set()
        end = time.monotonic() + 60
        while len(scheduler.requests) < 5 and time.monotonic() < end:
            time.sleep(0.001)

    monkeypatch.setattr(bert.executor, "run_while", leave)
    monkeypatch.setattr(engine, "LONG_TOKENS", 100)
    scheduler = bert.engine.scheduler
    looks = scheduler.n_looks
    with ThreadPoolExecutor(1) as other:
        held = other.submit(bert.engine.call, until_all_are_in_line)
        assert holds.wait(60)
        assert len(bert.embed([LONG[:400]] * 4, cancel=cancel)) == 0
        held.result()
    assert broken_off == [True] and scheduler.n_looks > looks
    assert bert.embed(["the fox"]).shape == (1, 48)


def test_a_caller_of_a_server_has_few_texts_in_line(bert: edgellm.LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler, in_line = bert.engine.scheduler, list[int]()
    add = scheduler.add

    def count(request: Request) -> None:
        add(request)
        in_line.append(len(scheduler.requests))

    monkeypatch.setattr(scheduler, "add", count)
    monkeypatch.setattr(embedding, "STEP_BESIDE", 48)
    for interactive in (False, True):
        monkeypatch.setattr(scheduler, "interactive", interactive)
        in_line.clear()
        bert.embed([[2, 7, 3]] * 400)
        assert (max(in_line) <= embedding.AHEAD * 16 + 1) == interactive


def test_a_closed_model_says_so(bert_model: Any, tmp_path: Path) -> None:
    llm = edgellm.load(write_bert(tmp_path / "bert.gguf", bert_model))
    llm.close()
    with pytest.raises(ClosedError):
        llm.embed(["a"])
