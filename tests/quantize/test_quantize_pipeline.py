"""``quantize`` writes what it planned, whole or not at all, and names whatever is wrong with a source."""

from __future__ import annotations

import dataclasses
import errno
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny_models
from click.testing import CliRunner

from edgellm.cli.app import edgellm as app
from edgellm.formats import gguf_writer
from edgellm.formats.errors import EdgeLLMError, NumericError, ParameterError, UnsupportedError
from edgellm.formats.gguf import GGUFFile
from edgellm.formats.large_pages import LargePageWriter
from edgellm.kernels.cpu.encode import encode
from edgellm.quantize.importance import Imatrix, InputSquares, write_imatrix
from edgellm.quantize.inputs import open_input
from edgellm.quantize.mixes import Recipe
from edgellm.quantize.pipeline import (
    ImportanceMatrix,
    default_target,
    plan_quantization,
    quantize,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("quantize") / "tiny-f16.gguf"
    return tiny_models.write_tiny_model(path, "llama", "F16", n_layer=9, n_head=8, n_head_kv=2, head_dim=32, tied=False)


def run(source: Path, target: Path, file_type: str = "Q4_K_M", **options: object) -> object:
    planning = {key: options.pop(key) for key in ("importance", "allow_requantize", "keep_split") if key in options}
    with open_input(source) as opened:
        return quantize(plan_quantization(opened, Recipe(file_type), **planning), target, n_threads=2, **options)


@pytest.mark.parametrize("file_type", ["Q4_K_M", "Q2_K", "Q8_0", "BF16", "F32", "COPY"])
def test_a_file_holds_the_planned_types_and_the_encoders_bytes(model: Path, tmp_path: Path, file_type: str) -> None:
    done = run(model, tmp_path / "out.gguf", file_type)
    before, after = GGUFFile.open(model), GGUFFile.open(tmp_path / "out.gguf")
    assert [t.name for t in done.tensors] == list(after.tensors)
    for planned in done.tensors:
        old, new = before.tensors[planned.name], after.tensors[planned.name]
        assert (new.shape, new.quant) == (old.shape, planned.target)
        rows = old.dequantize().reshape(-1, old.shape[-1])
        expected = encode(new.quant.name, rows) if planned.changes else old.data
        assert np.array_equal(new.data.reshape(expected.shape), expected), planned.name


def test_metadata_stays_and_says_what_was_done(model: Path, tmp_path: Path) -> None:
    importance = ImportanceMatrix({"blk.0.ffn_down.weight": np.ones(256, np.float32)}, "m.gguf", "text", 7)
    done = run(model, tmp_path / "out.gguf", importance=importance)
    before, after = GGUFFile.open(model), GGUFFile.open(tmp_path / "out.gguf")
    new = {key: value for key, value in after.metadata.items() if key not in before.metadata}
    assert new == {
        "general.quantization_version": 2,
        "general.file_type": 15,
        "quantize.imatrix.file": "m.gguf",
        "quantize.imatrix.dataset": "text",
        "quantize.imatrix.entries_count": 1,
        "quantize.imatrix.chunks_count": 7,
    }
    assert list(after.metadata)[-6:] == list(new)
    kept = [key for key in before.metadata if key in after.metadata]
    assert kept == [key for key in before.metadata if key not in new]
    assert "blk.0.ffn_down.weight" not in done.without_importance
    assert "blk.1.ffn_down.weight" in done.without_importance


def test_importance_goes_to_its_tensor_and_to_each_expert(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    experts = rng.standard_normal((3, 16, 256)).astype(np.float32)
    source = tiny_models.write_tiny_model(
        tmp_path / "moe.gguf",
        quant="F32",
        extra_tensors={"blk.0.ffn_up_exps.weight": experts},
        metadata={"llama.expert_count": 3, "llama.expert_used_count": 1},
    )
    columns = rng.gamma(1, 1, 3 * 256).astype(np.float32)
    run(source, tmp_path / "out.gguf", "Q4_K_S", importance=ImportanceMatrix({"blk.0.ffn_up_exps.weight": columns}))
    written = GGUFFile.open(tmp_path / "out.gguf").tensors["blk.0.ffn_up_exps.weight"].data.reshape(3, 16, -1)
    for expert in range(3):
        expected = encode("Q4_K", experts[expert], columns[expert * 256 : (expert + 1) * 256])
        assert np.array_equal(written[expert], expected)


def test_experts_that_the_text_never_met_are_named_and_get_a_type_that_can_do_without(
    tmp_path: Path,
) -> None:
    rng = np.random.default_rng(0)
    kinds = ("gate", "up", "down")
    names = [f"blk.{i}.ffn_{kind}_exps.weight" for i in range(2) for kind in kinds]
    source = tiny_models.write_tiny_model(
        tmp_path / "moe.gguf",
        quant="F32",
        extra_tensors={name: rng.standard_normal((3, 16, 256)).astype(np.float32) for name in names},
        metadata={"llama.expert_count": 3, "llama.expert_used_count": 1},
    )
    met = {name: np.array([5, 0, 7] if name.startswith("blk.1") else [5, 6, 7], np.float32) for name in names}
    squares = {name: InputSquares(rng.gamma(1, 1, (3, 256)).astype(np.float32), counts) for name, counts in met.items()}
    with open_input(source) as opened:
        dense = [name for name, tensor in opened.tensors.items() if len(tensor.shape) == 2]
        for name in dense:
            sums = rng.gamma(1, 1, (1, opened.tensors[name].n_in)).astype(np.float32)
            squares[name] = InputSquares(sums, np.ones(1, np.float32))
    write_imatrix(tmp_path / "i.gguf", Imatrix(squares, ["text"]))
    out = tmp_path / "out.gguf"
    for file_type, unmet_type in (("Q2_K_S", "Q3_K"), ("Q4_K_S", "Q4_K")):
        words = ["quantize", str(source), str(out), file_type, "--imatrix", str(tmp_path / "i.gguf"), "-y"]
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0 and "never met, rounded evenly: blk.1: 1\n" in done.stderr, done.output
        written = GGUFFile.open(out).tensors
        for name in names[3:5]:
            assert written[name].quant.name == unmet_type
        assert written[names[0]].quant.name == file_type.removesuffix("_S")


def test_an_encoder_of_its_own_is_asked_first(model: Path, tmp_path: Path) -> None:
    def zeros(tensor, quant):
        return np.zeros((tensor.n_rows, quant.row_nbytes(tensor.n_in)), np.uint8) if "attn_q" in tensor.name else None

    run(model, tmp_path / "out.gguf", encoder=zeros)
    tensors = GGUFFile.open(tmp_path / "out.gguf").tensors
    assert not tensors["blk.3.attn_q.weight"].data.any() and tensors["blk.3.attn_k.weight"].data.any()


def test_the_report_is_the_error_of_what_was_written(model: Path, tmp_path: Path) -> None:
    done = run(model, tmp_path / "out.gguf", report=True)
    before, after = GGUFFile.open(model), GGUFFile.open(tmp_path / "out.gguf")
    assert set(done.errors) == {t.name for t in done.tensors if t.changes}
    for name, error in done.errors.items():
        old = before.tensors[name].dequantize().astype(np.float64)
        difference = old - after.tensors[name].dequantize()
        assert error.rmse == pytest.approx(np.sqrt(np.mean(difference**2)), rel=1e-6)
        assert error.relative == pytest.approx(np.linalg.norm(difference) / np.linalg.norm(old), rel=1e-6)
        assert error.largest == pytest.approx(np.abs(difference).max(), rel=1e-6)


def test_progress_ends_at_all_bytes(model: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    run(model, tmp_path / "out.gguf", progress=lambda *told: seen.append(told))
    assert seen[-1][0] == seen[-1][1] and [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)


def test_the_plan_knows_the_size_of_the_file(model: Path, tmp_path: Path) -> None:
    with open_input(model) as source:
        planned = plan_quantization(source, Recipe("Q3_K_M"))
    run(model, tmp_path / "out.gguf", "Q3_K_M")
    assert planned.nbytes == (tmp_path / "out.gguf").stat().st_size


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("Model-7B-F16.gguf", "Model-7B-Q4_K_M.gguf"),
        ("model.f32.gguf", "model-Q4_K_M.gguf"),
        ("big-00001-of-00003.gguf", "big-Q4_K_M.gguf"),
        ("big-BF16-00001-of-00003.gguf", "big-Q4_K_M.gguf"),
        ("plain", "plain-Q4_K_M.gguf"),
    ],
)
def test_the_default_name_is_the_sources_with_the_type(model: Path, source: str, target: str) -> None:
    with open_input(model) as opened:
        assert default_target(dataclasses.replace(opened, path=Path(source)), "Q4_K_M") == target


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_is_named_and_nothing_is_written(tmp_path: Path, value: float) -> None:
    damaged = np.ones((300, 256), np.float32)
    damaged[171, 33] = value
    source = tiny_models.write_tiny_model(tmp_path / "m.gguf", quant="F32", extra_tensors={"blk.0.x.weight": damaged})
    (tmp_path / "out.gguf").write_bytes(b"old")
    found = rf"blk\.0\.x\.weight: weight 33 of row 171 is {re.escape(str(np.float32(value)))}"
    with pytest.raises(NumericError, match=found) as raised:
        run(source, tmp_path / "out.gguf")
    assert raised.value.code == "TENSOR_NAN"
    assert (tmp_path / "out.gguf").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 2


def test_a_weight_too_large_for_the_type_is_named(tmp_path: Path) -> None:
    large = np.full((4, 256), 1e9, np.float32)
    source = tiny_models.write_tiny_model(tmp_path / "m.gguf", quant="F32", extra_tensors={"blk.0.x.weight": large})
    with pytest.raises(NumericError, match="1e\\+09 is too large for F16"):
        run(source, tmp_path / "out.gguf", "F16")
    assert not (tmp_path / "out.gguf").exists()


def test_weights_quantized_before_need_a_word(tmp_path: Path) -> None:
    source = tiny_models.write_tiny_model(tmp_path / "m.gguf", quant="Q8_0")
    with pytest.raises(UnsupportedError, match="is Q8_0: it was quantized before"):
        run(source, tmp_path / "out.gguf")
    run(source, tmp_path / "out.gguf", allow_requantize=True)
    run(source, tmp_path / "same.gguf", "Q8_0")  # nothing changes type but what a mix keeps


def test_the_source_is_never_the_target(model: Path, tmp_path: Path) -> None:
    (tmp_path / "link.gguf").symlink_to(model)
    for target in (model, tmp_path / "link.gguf"):
        with pytest.raises(ParameterError, match="is the source itself"):
            run(model, target)


def test_an_importance_matrix_of_another_model_is_refused(model: Path, tmp_path: Path) -> None:
    wrong = ImportanceMatrix({"blk.0.attn_q.weight": np.ones(64, np.float32)})
    with pytest.raises(ParameterError, match="64 columns where 256 were expected"):
        run(model, tmp_path / "out.gguf", importance=wrong)
    with pytest.raises(ParameterError, match="of no use without an importance matrix"):
        run(model, tmp_path / "out.gguf", "Q2_K_S")


def test_a_full_disk_leaves_the_old_target(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out.gguf").write_bytes(b"old")

    class Full:
        def __init__(self, file):
            self.file, self.left = file, 1_000_000

        def write(self, piece):
            self.left -= len(piece)
            if self.left < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return self.file.write(piece)

        def __getattr__(self, name):
            return getattr(self.file, name)

    monkeypatch.setattr(gguf_writer, "LargePageWriter", lambda raw: Full(LargePageWriter(raw)))
    with pytest.raises(EdgeLLMError) as raised:
        run(model, tmp_path / "out.gguf")
    assert raised.value.code == "WRITE_DISK"
    assert [p.name for p in tmp_path.iterdir()] == ["out.gguf"] and (tmp_path / "out.gguf").read_bytes() == b"old"


# ---- interruptions ---------------------------------------------------------------------------------------------------

CHILD = """
import sys, time
from edgellm.cli import main
print("started", flush=True)
sys.exit(main(["quantize", sys.argv[1], sys.argv[2], "Q4_0", "-y"]))
"""


def child(source: Path, target: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(source), str(target)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("larger") / "larger.gguf"
    weights = np.zeros((16000, 1024), np.float16)
    return tiny_models.write_tiny_model(path, quant="F16", extra_tensors={"blk.0.x.weight": weights})


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_kill_at_any_moment_leaves_the_old_target_or_the_new(larger: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.gguf"
    run(larger, tmp_path / "whole.gguf", "Q4_0")
    whole = (tmp_path / "whole.gguf").read_bytes()
    rng = np.random.default_rng(int(time.time()))
    for _ in range(4):
        target.write_bytes(b"old")
        process = child(larger, target)
        assert process.stdout is not None and process.stdout.readline()
        time.sleep(rng.uniform(0, 0.8))
        process.kill()
        process.communicate()
        assert target.read_bytes() in (b"old", whole)
    run(larger, target, "Q4_0")  # removes what the dead ones left
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.gguf", "whole.gguf"]


@pytest.mark.usefixtures("interruptible")
@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_ctrl_c_leaves_nothing_behind(larger: Path, tmp_path: Path) -> None:
    process = child(larger, tmp_path / "out.gguf")
    assert process.stdout is not None and process.stdout.readline()
    for _ in range(2000):
        if any(tmp_path.iterdir()) or process.poll() is not None:
            break
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    process.communicate()
    if process.returncode == 0:  # it was faster
        pytest.skip("done before the signal came")
    assert process.returncode == 130 and not list(tmp_path.iterdir())


def test_a_split_source_keeps_its_parts(model: Path, tmp_path: Path) -> None:
    with open_input(model) as opened:
        plans = [gguf_writer.TensorPlan(t.name, t.shape, t.quant, t.stored_chunks) for t in opened.tensors.values()]
        parts = gguf_writer.write_gguf(tmp_path / "split.gguf", opened.metadata, plans, max_part_tensors=30)
    done = run(parts[0], tmp_path / "out.gguf", keep_split=True)
    assert [p.name for p in done.paths] == [f"out-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    assert GGUFFile.open(done.paths[0]).part_sizes == GGUFFile.open(parts[0]).part_sizes
    run(parts[0], tmp_path / "one.gguf")
    run(model, tmp_path / "same.gguf")
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "same.gguf").read_bytes()


def test_tensors_that_fall_back_alike_are_told_in_one_line(tmp_path: Path) -> None:
    source = tiny_models.write_tiny_model(tmp_path / "narrow.gguf", "llama", "F16", n_embd=288, n_ff=288)
    with open_input(source) as opened:
        n_rows_of_288 = sum(t.shape[-1] == 288 and len(t.shape) == 2 for t in opened.tensors.values())
    done = CliRunner().invoke(app, ["quantize", str(source), "Q4_K_S", "--dry-run"])
    notes = [line for line in done.output.splitlines() if line.startswith("Note:")]
    assert done.exit_code == 0 and len(notes) < 4 < n_rows_of_288, done.output
    assert any("more: Q4_K needs rows of a multiple of 256, these have 288: Q5_0 instead" in note for note in notes)
