"""``edgellm embed``: vectors of arguments, of lines and of files, in every form."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_encoders import random_bert, write_bert

import edgellm
from edgellm.cli import embed
from edgellm.cli.app import main

TEXTS = ["the quick brown fox", "a lazy dog"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bert(tmp_path_factory.mktemp("bert") / "bert.gguf", random_bert(max_position_embeddings=64))


@pytest.fixture(scope="module")
def vectors(model: Path) -> np.ndarray:
    with edgellm.load(model) as llm:
        found: np.ndarray = llm.embed(TEXTS)
        return found


def test_every_form_has_the_librarys_vectors(
    model: Path, vectors: np.ndarray, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*options: str) -> str:
        assert main(["embed", "-m", str(model), *options, *TEXTS]) == 0
        return capsys.readouterr().out

    plain = np.array([line.split() for line in said().splitlines()], np.float32)
    assert np.array_equal(plain, vectors)
    assert np.array_equal(np.float32(json.loads(said("--array"))), vectors)
    whole = json.loads(said("--json"))
    assert whole["model"] == "bert.gguf" and np.array_equal(np.float32(whole["embeddings"]), vectors)
    lines = [json.loads(line) for line in said("--jsonl").splitlines()]
    assert [(line["index"], line["text"]) for line in lines] == list(enumerate(TEXTS))
    assert np.array_equal(np.float32([line["embedding"] for line in lines]), vectors)


def test_lines_of_standard_input_and_of_a_file(
    model: Path,
    vectors: np.ndarray,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert standard_lines("a\u2028b\x0cc\r\n \nd", monkeypatch) == ["a\u2028b\x0cc", "d"]
    lines = f"{TEXTS[0]}\n\n{TEXTS[1]}\r\n"
    file = tmp_path / "lines.txt"
    file.write_text(lines)
    for options in ((), ("-f", "-"), ("-f", str(file))):
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        assert main(["embed", "-m", str(model), "--array", *options]) == 0
        assert np.array_equal(np.float32(json.loads(capsys.readouterr().out)), vectors), options


def standard_lines(text: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    return embed._lines("-")


def test_a_file_that_pools_nothing_needs_a_pooling(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = str(write_bert(tmp_path / "rows.gguf", random_bert(max_position_embeddings=64), 0))
    assert main(["embed", "-m", rows, "a"]) == 1 and "--pooling" in capsys.readouterr().err
    assert main(["embed", "-m", rows, "--pooling", "mean", "a"]) == 0


def test_what_is_wrong_is_said_without_a_traceback(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    long = "the quick brown fox " * 40
    cases: list[tuple[list[str], int, str]] = [
        (["embed", "-m", str(model)], 2, "there is no text"),
        (["embed", "a"], 2, "there is no model"),
        (["embed", "-m", str(model), "-f", "x.txt", "a"], 2, "Give one of them"),
        (["embed", "-m", str(model), long], 1, "truncate"),
        (["embed", "-m", str(model), "--dimensions", "9999", "a"], 1, "dimensions"),
        (["run", "-m", str(model), "--raw", "a"], 1, "use embed"),
        (["run", "-m", str(model), "a"], 1, "use embed"),
    ]
    for command, status, word in cases:
        assert main(command) == status, command
        said = capsys.readouterr()
        assert word in said.err and "Traceback" not in said.err and not said.out, command
    assert main(["embed", "-m", str(model), "--truncate", long]) == 0


def test_it_takes_no_more_than_it_gives(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told: Any = capsys
    assert main(["embed", "-m", str(model), "--no-normalize", "--pooling", "cls", "--dimensions", "8", "a"]) == 0
    assert len(told.readouterr().out.split()) == 8
