"""``edgellm quantize`` as a user meets it."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_models

from edgellm.cli import main
from edgellm.formats.gguf import GGUFFile


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_models.write_tiny_model(tmp_path / "tiny-F16.gguf", "llama", "F16", n_layer=2)


def test_a_model_gets_a_file_with_the_types_name(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantize", str(model), "q8_0", "2"]) == 0
    target = model.with_name("tiny-Q8_0.gguf")
    assert str(target) in capsys.readouterr().out
    assert GGUFFile.open(target).tensors["blk.0.attn_q.weight"].quant.name == "Q8_0"
    assert main(["quantize", str(model), "q8_0"]) == 1
    assert "is there already" in capsys.readouterr().err
    assert main(["quantize", str(model), "q8_0", "-y"]) == 0


def test_a_dry_run_shows_the_plan_and_writes_nothing(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantize", str(model), "Q4_K_M", "--dry-run", "--tensor-type", "attn_q=q6_k"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split()[0] == "blk.1.attn_q.weight" and "Q6_K" in line for line in lines)
    assert "bits per weight" in lines[-1] and len(list(model.parent.iterdir())) == 1


def test_a_report_has_a_row_for_each_encoded_tensor(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantize", str(model), str(model.with_name("o.gguf")), "Q8_0", "--report"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith(("blk.", "token"))]
    assert len(rows) == 15 and all(row[1] == "Q8_0" and float(row[3]) < 1 for row in rows)


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["{}"], 2, "SRC [DST] TYPE is expected"),
        (["{}", "IQ2_M"], 1, "'IQ2_M' is no type that edgellm writes"),
        (["{}", "{}", "Q8_0"], 1, "is the source itself"),
        (["{}", "Q8_0", "--tensor-type", "x"], 1, "is no REGEX=TYPE"),
        (["/no/such.gguf", "Q8_0"], 1, "no such"),
    ],
)
def test_wrong_words_are_named(
    model: Path, capsys: pytest.CaptureFixture[str], words: list[str], status: int, message: str
) -> None:
    assert main(["quantize", *(word.format(model) for word in words)]) == status
    assert message in capsys.readouterr().err
