"""Perplexity, divergence from a base, the file of a base, and the scores of a text."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

import numpy as np
import pytest
import tiny_models

import edgellm
from edgellm.cli.app import main
from edgellm.formats.errors import FormatError, ParameterError
from edgellm.measure.divergence import Base, Comparison, base_writer, compare_models, compare_with_base
from edgellm.measure.perplexity import ChunkModel, Perplexity, cut, log_softmax

TEXT = "the other word and the thing, all in one. " * 30
N_CTX = 64


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model in F32 and one close to it: the same weights in Q8_0."""
    folder = tmp_path_factory.mktemp("perplexity")
    return (
        tiny_models.write_tiny_model(folder / "base.gguf", quant="F32"),
        tiny_models.write_tiny_model(folder / "close.gguf", quant="Q8_0"),
    )


def open_model(path: Path) -> ChunkModel:
    return ChunkModel(path, N_CTX, executor="reference")


def test_metadata_can_be_overridden(paths: tuple[Path, Path]) -> None:
    key = "tokenizer.ggml.add_bos_token"
    for wanted in (True, False):
        with ChunkModel(paths[0], N_CTX, executor="reference", kv_overrides={key: wanted}) as model:
            assert bool(model.tokenizer.special.prefix) is wanted


def test_a_text_is_cut_into_whole_chunks_that_begin_with_bos() -> None:
    chunks = cut(list(range(10, 31)), [1], 8)
    assert [chunk.ids.tolist() for chunk in chunks] == [[1, *range(11, 18)], [1, *range(19, 26)]]
    assert chunks[0].first == 4 and chunks[0].targets.tolist() == [15, 16, 17]
    assert len(cut(list(range(21)), [], 8, 1)) == 1
    for n_ctx, n_chunks in ((22, None), (3, None), (8, 0)):
        with pytest.raises(ParameterError, match="21 tokens"):
            cut(list(range(21)), [], n_ctx, n_chunks)


def test_perplexity_is_exp_of_the_mean_loss_of_the_second_halves(paths: tuple[Path, Path]) -> None:
    with open_model(paths[0]) as model, edgellm.load(paths[0], executor="reference") as llm:
        ids = model.ids(TEXT)[: 2 * N_CTX + 5]
        losses = np.concatenate(list(model.losses(model.chunks(ids))))
        wanted = [-llm.score(ids[i : i + N_CTX]).logprobs[N_CTX // 2 + 1 :] for i in (0, N_CTX)]
        assert losses == pytest.approx(np.concatenate(wanted), abs=2e-3)
        assert llm.perplexity(ids, N_CTX) == pytest.approx(Perplexity.of(losses).value, rel=1e-3)


def test_the_error_is_the_standard_error_of_the_mean() -> None:
    losses = np.log([2.0, 4.0, 8.0])
    result = Perplexity.of(losses)
    assert result.value == pytest.approx(4.0)
    assert result.error == pytest.approx(4.0 * losses.std(ddof=1) / math.sqrt(3))


def test_a_comparison_by_hand() -> None:
    base, own = np.array([[0.5, 0.25, 0.25], [0.8, 0.1, 0.1]]), np.array([[0.25, 0.5, 0.25], [0.8, 0.1, 0.1]])
    result = Comparison.of_rows(
        np.log(base).astype(np.float32), np.log(own).astype(np.float32), np.array([0, 2], np.int32)
    )
    assert result.divergence == pytest.approx([0.5 * math.log(2) - 0.25 * math.log(2), 0.0], abs=1e-6)
    assert result.change == pytest.approx([-0.25, 0.0], abs=1e-6)
    assert result.same_top.tolist() == [False, True]
    figures = result.figures()
    assert figures["mean_kl"] == pytest.approx(0.125 * math.log(2), abs=1e-6)
    assert figures["rms_change"] == pytest.approx(0.25 / math.sqrt(2), abs=1e-6)
    assert figures["ln_perplexity_ratio"] == pytest.approx(0.5 * math.log(2), abs=1e-6)
    assert figures["same_top"] == 0.5


def test_a_model_does_not_diverge_from_itself_and_little_from_its_q8_0(paths: tuple[Path, Path]) -> None:
    with open_model(paths[0]) as base, open_model(paths[0]) as same, open_model(paths[1]) as close:
        chunks = base.chunks(base.ids(TEXT), 2)
        itself = Comparison.joined(list(compare_models(same, base, chunks))).figures()
        near = Comparison.joined(list(compare_models(close, base, chunks))).figures()
    assert itself["mean_kl"] == pytest.approx(0, abs=1e-9) and itself["same_top"] == 1
    assert 0 < near["mean_kl"] < 0.01
    assert near["perplexity"] == pytest.approx(near["base_perplexity"], rel=0.02)


def test_a_base_of_a_file_gives_what_the_model_itself_gives(paths: tuple[Path, Path], tmp_path: Path) -> None:
    with open_model(paths[0]) as base, open_model(paths[1]) as close:
        ids = base.ids(TEXT)
        chunks = base.chunks(ids, 2)
        with base_writer(tmp_path / "base", ids, N_CTX, 2, base.program.n_vocab) as write:
            for chunk in chunks:
                write(base.logits(chunk))
        saved = Base(tmp_path / "base")
        assert saved.tokens.tolist() == list(ids[: 2 * N_CTX])
        log_p = log_softmax(base.logits(chunks[1]))
        assert np.abs(saved.log_probabilities(1, slice(0, 99)) - log_p).max() < 1.3e-4
        direct = Comparison.joined(list(compare_models(close, base, chunks))).figures()
        read = Comparison.joined(list(compare_with_base(close, saved))).figures()
    assert read["mean_kl"] == pytest.approx(direct["mean_kl"], abs=1e-5)
    assert read["base_perplexity"] == pytest.approx(direct["base_perplexity"], rel=1e-4)
    assert list(tmp_path.iterdir()) == [tmp_path / "base"]


def base_bytes(n_ctx: int = 8, n_vocab: int = 3, n_chunks: int = 1, token: int = 1) -> bytes:
    row = struct.pack("<ff4H", 1e-4, -3.0, 1, 2, 3, 0)
    tokens = struct.pack(f"<{n_chunks * n_ctx}i", *[token] * (n_chunks * n_ctx))
    return struct.pack("<8sIii", b"_logits_", n_ctx, n_vocab, n_chunks) + tokens + row * (3 * n_chunks)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "begins with"),
        (b"GGUF" + base_bytes()[4:], "begins with"),
        (base_bytes()[:-1], "bytes; expected"),
        (base_bytes() + b"\0", "bytes; expected"),
        (base_bytes(token=3), "outside its vocabulary"),
        (base_bytes(token=-1), "outside its vocabulary"),
        (struct.pack("<8sIii", b"_logits_", 8, -3, 1), "vocabulary of -3"),
        (struct.pack("<8sIii", b"_logits_", 8, 3, 1 << 30), "chunks"),
    ],
)
def test_a_damaged_base_is_named(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "base").write_bytes(data)
    with pytest.raises(FormatError, match=message):
        Base(tmp_path / "base")


def test_a_base_of_another_vocabulary_is_refused(paths: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "base").write_bytes(base_bytes())
    with open_model(paths[0]) as model, pytest.raises(ParameterError, match="one of 3"):
        list(compare_with_base(model, Base(tmp_path / "base")))


def test_scores_of_a_text_and_of_a_continuation(paths: tuple[Path, Path]) -> None:
    with edgellm.load(paths[0], executor="reference") as llm:
        rows = llm.logprobs("the word and", top=1)
        score = llm.score("the word and")
        assert score.tokens.tolist() == [row.token for row in rows]
        assert math.isnan(score.logprobs[0]) and score.best[0] == -1
        assert score.logprobs[1:] == pytest.approx([row.logprob for row in rows[1:]], abs=1e-5)
        assert score.best[1:].tolist() == [row.top[0].token for row in rows[1:]]
        assert score.logprob == pytest.approx(sum(row.logprob or 0 for row in rows), abs=1e-4)
        assert score.perplexity == pytest.approx(math.exp(-score.logprobs[1:].mean()), rel=1e-5)
        end = llm.loglikelihood("the word", " and")
        assert end.logprobs == pytest.approx(score.logprobs[-len(end.logprobs) :], abs=1e-4)
        assert llm.loglikelihood("the word ", "and").logprob == end.logprob, "blanks count to the continuation"
        assert len(llm.loglikelihood("", "and").logprobs) == len(llm.tokenize("and"))
        best = llm.generate("the word", max_tokens=3, temperature=0, ignore_eos=True)
        ids = llm.prompt_ids("the word")
        assert llm.score([*ids, *best.tokens]).best[len(ids) :].tolist() == list(best.tokens)
        assert not llm.score("").tokens.size


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, object]:
    assert main(["perplexity", *map(str, arguments), "--executor", "reference", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_command_saves_a_base_and_compares_with_it(
    paths: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text"
    text.write_text(TEXT)
    common = ("-f", text, "-c", N_CTX, "--chunks", 2)
    base = run(capsys, paths[0], *common, "--save-logits", tmp_path / "base")
    beside = run(capsys, paths[1], *common, "--against", paths[0])
    read = run(capsys, paths[1], "--kl-divergence", "--kl-divergence-base", tmp_path / "base")
    assert base["perplexity"] == pytest.approx(beside["base_perplexity"], rel=1e-5)
    assert read["mean_kl"] == pytest.approx(beside["mean_kl"], abs=1e-5)
    assert main(["perplexity", str(paths[1])]) == 2
    assert main(["perplexity", str(paths[1]), "--kl-divergence"]) == 2
    assert main(["perplexity", str(paths[1]), "-f", str(text), "-c", "4096", "--executor", "reference"]) == 1
