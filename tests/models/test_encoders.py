"""Encoders against transformers: the same weights, the same tokens, hidden states of both executors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_models import SMALL, transformers_model
from tiny_encoders import random_bert, write_bert
from tiny_models import write_tiny_model, write_transformers_model

from edgellm.formats.errors import EdgeLLMError, FormatError, ParameterError, UnsupportedError
from edgellm.formats.gguf import GGUFFile
from edgellm.kernels.cpu.run.executor import CPUExecutor
from edgellm.kernels.pooling import head_tensors
from edgellm.kernels.program import Batch, Program
from edgellm.kernels.reference import ReferenceExecutor
from edgellm.models import build_program

LENGTHS = (1, 3, 17, 530, 40)
"""Of texts: shorter than a register, and longer than what attention packs at once."""


def nmse(x: np.ndarray, judge: np.ndarray) -> float:
    return float(np.sum(np.square(x - judge, dtype=np.float64)) / np.sum(np.square(judge, dtype=np.float64)))


def texts(n_vocab: int) -> list[np.ndarray]:
    rng = np.random.default_rng(5)
    return [rng.integers(0, n_vocab, n).astype(np.int32) for n in LENGTHS]


def batch_of(several: list[np.ndarray], types: list[np.ndarray] | None = None) -> Batch:
    """Texts side by side, every hidden state wanted."""
    counts = [len(text) for text in several]
    return Batch(
        np.concatenate(several),
        np.concatenate([np.arange(n, dtype=np.int32) for n in counts]),
        np.repeat(np.arange(len(counts), dtype=np.int32), counts),
        np.ones(sum(counts), bool),
        types=None if types is None else np.concatenate(types).astype(np.int32),
        hidden=True,
    )


def transformers_states(model: Any, tokens: np.ndarray, types: np.ndarray | None = None) -> np.ndarray:
    torch = pytest.importorskip("torch", reason="the judge of encoders is transformers on torch")
    encoder = getattr(model, "bert", model)
    with torch.no_grad():
        more = {} if types is None else {"token_type_ids": torch.tensor(types[None], dtype=torch.long)}
        return encoder(torch.tensor(tokens[None], dtype=torch.long), **more).last_hidden_state[0].numpy()


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Program]:
    model = random_bert()
    path = write_bert(tmp_path_factory.mktemp("bert") / "bert.gguf", model)
    return model, build_program(GGUFFile.open(path))


@pytest.mark.parametrize("executor", [ReferenceExecutor, CPUExecutor])
def test_hidden_states_equal_transformers(bert: tuple[Any, Program], executor: Any) -> None:
    model, program = bert
    several = texts(program.n_vocab)
    types = [np.arange(len(text)) > len(text) // 2 for text in several]
    one = executor(program, 0, max_tokens=sum(LENGTHS))
    try:
        for of in (None, types):
            states = one.run(batch_of(several, of)).copy()
            end = 0
            for i, text in enumerate(several):
                start, end = end, end + len(text)
                judge = transformers_states(model, text, None if of is None else of[i])
                assert nmse(states[start:end], judge) <= 1e-10, len(text)
    finally:
        one.close()


def test_a_text_has_the_same_bits_alone_and_in_any_batch_and_for_some_of_its_rows(bert: tuple[Any, Program]) -> None:
    _, program = bert
    several = texts(program.n_vocab)
    for n_threads in (1, 2):
        executor = CPUExecutor(program, 0, n_threads, max_tokens=sum(LENGTHS))
        together = executor.run(batch_of(several)).copy()
        end = 0
        for text in several:
            start, end = end, end + len(text)
            batch = batch_of([text])
            assert np.array_equal(executor.run(batch), together[start:end])
            for wanted in (0, len(text) - 1):
                batch.outputs[:] = np.arange(len(text)) == wanted
                assert np.array_equal(executor.run(batch)[0], together[start + wanted])
        executor.close()


def test_a_batch_that_no_table_has_rows_for_is_refused(bert: tuple[Any, Program]) -> None:
    _, program = bert
    too_long = batch_of([np.zeros(program.context_length + 1, np.int32)])
    bad_type = batch_of([np.zeros(3, np.int32)], [np.array([0, 1, 2])])
    for executor in (ReferenceExecutor(program, 0, 800), CPUExecutor(program, 0, max_tokens=800)):
        for batch in (too_long, bad_type):
            with pytest.raises(ParameterError, match="rows"):
                executor.run(batch)
        executor.close()


@pytest.mark.parametrize(("key", "value", "kind"), [(1, 1, "mean"), (2, 2, "cls"), (3, 3, "last"), (0, 0, "none")])
def test_the_pooling_of_the_file_is_that_of_the_program(key: int, value: int, kind: str, tmp_path: Path) -> None:
    with GGUFFile.open(write_bert(tmp_path / "bert.gguf", random_bert(), value)) as gguf:
        program = build_program(gguf)
    assert program.is_encoder and program.pooling is not None and program.pooling.kind == kind


def test_scores_of_a_classifier_equal_transformers(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="the judge of encoders is transformers on torch")
    model = random_bert("BertForSequenceClassification", num_labels=3)
    metadata = {"bert.classifier.output_labels": ["no", "maybe", "yes"]}
    with GGUFFile.open(write_bert(tmp_path / "bert.gguf", model, 4, metadata)) as gguf:
        program = build_program(gguf)
        pooling = program.pooling
        assert pooling is not None and pooling.labels == ("no", "maybe", "yes") and pooling.rows == "cls"
        executor = ReferenceExecutor(program, 0)
        text = texts(program.n_vocab)[2]
        states = executor.run(batch_of([text]))
        scores = pooling.through_head(states[0], head_tensors(pooling, program.tensors))
    with torch.no_grad():
        judge = model(torch.tensor(text[None], dtype=torch.long)).logits[0].numpy()
    assert nmse(scores, judge) <= 1e-10


def test_whether_vectors_are_to_be_normalized_is_no_matter_of_the_program(tmp_path: Path) -> None:
    with GGUFFile.open(write_bert(tmp_path / "b.gguf", random_bert(), 1, {"bert.normalize_embeddings": True})) as gguf:
        assert build_program(gguf).is_encoder


def test_scores_of_a_decoder_are_shares_for_the_rerankers_of_qwen_alone(tmp_path: Path) -> None:
    for architecture, n_scores, shares in (
        ("qwen3", 2, True),
        ("qwen3vl", 2, True),
        ("qwen3", 1, False),
        ("llama", 2, False),
        ("qwen3moe", 3, False),
    ):
        classifier = {"cls.output.weight": np.ones((n_scores, 256), np.float32)}
        path = write_tiny_model(tmp_path / "ranks.gguf", architecture, extra_tensors=classifier)
        with GGUFFile.open(path) as gguf:
            pooling = build_program(gguf).pooling
        assert pooling is not None and pooling.kind == "rank" and pooling.softmax is shares, (architecture, n_scores)


def test_an_encoder_that_contradicts_itself_is_refused_by_name(tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], int | None, type[EdgeLLMError], str]] = [
        ({"bert.attention.causal": True}, 1, FormatError, "causal"),
        ({}, 4, UnsupportedError, "classifier"),
        ({"bert.context_length": 512}, 1, FormatError, "position_embd"),
        ({"bert.pooling_type": 9}, None, FormatError, "pooling_type"),
    ]
    for i, (metadata, pooling, kind, word) in enumerate(cases):
        with (
            pytest.raises(kind, match=word),
            GGUFFile.open(write_bert(tmp_path / f"{i}.gguf", random_bert(), pooling, metadata)) as gguf,
        ):
            build_program(gguf)


def test_a_decoder_gives_the_rows_behind_its_output_norm_whole_and_in_chunks(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="the judge of hidden states is transformers on torch")
    model = transformers_model("Qwen3", SMALL | {"head_dim": 16})
    tokens = np.random.default_rng(1).integers(0, 131, 100)
    with torch.no_grad():
        judge = model.model(torch.tensor(tokens[None])).last_hidden_state[0].numpy()
    with GGUFFile.open(write_transformers_model(tmp_path / "qwen3.gguf", model, {"pooling_type": 3})) as gguf:
        program = build_program(gguf)
        assert program.pooling is not None and program.pooling.kind == "last" and not program.is_encoder
        for executor, limit in ((ReferenceExecutor(program, 8), 1e-10), (CPUExecutor(program, 8), 1e-5)):
            whole = executor.run(replace(Batch.single(program, tokens), hidden=True)).copy()
            assert nmse(whole, judge) <= limit
            executor.run(Batch.single(program, tokens[:60]))  # its logits, between two others
            last = executor.run(replace(Batch.single(program, tokens[60:], 60, "last"), hidden=True))
            assert last.shape == (1, 64) and nmse(last[0], whole[-1]) <= limit
            if isinstance(executor, CPUExecutor):  # the order of numpy's sums goes by the number of rows
                assert np.array_equal(last[0], whole[-1])
            assert executor.run(Batch.single(program, tokens)).shape == (100, 131)
            executor.close()
