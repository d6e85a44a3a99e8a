"""Adapters on the command line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from adapter_files import ATTENTION, lora_pairs, write_control_vector, write_lora
from tiny_models import write_tiny_model

import edgellm
from edgellm.cli import main
from edgellm.cli.adapter_options import parse_adapter
from edgellm.cli.serving_options import _adapters


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    model = write_tiny_model(folder / "tiny.gguf", "llama", "Q8_0", n_embd=64, n_ff=64, head_dim=32)
    write_lora(folder / "one.gguf", lora_pairs(model, ATTENTION, size=0.4))
    write_control_vector(folder / "v.gguf", {"direction.1": np.linspace(-3, 3, 64, dtype=np.float32)})
    return folder


Captured = pytest.CaptureFixture[str]


def run(folder: Path, capsys: Captured, *arguments: str) -> tuple[int, str, str]:
    asked = ["run", str(folder / "tiny.gguf"), "-p", "Rivers", "--raw", "-n", "8", "--temp", "0", "-c", "64"]
    status = main([*asked, "--no-stdin", *arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_a_name_and_a_scale_stand_around_the_file(tmp_path: Path) -> None:
    (tmp_path / "a=b:2").touch()
    for text, expected in {
        "x.gguf": ("x.gguf", "", 1.0),
        "x.gguf:0.5": ("x.gguf", "", 0.5),
        "happy=x.gguf:-2": ("x.gguf", "happy", -2.0),
        "C:\\x.gguf": ("C:\\x.gguf", "", 1.0),
        str(tmp_path / "a=b:2"): (str(tmp_path / "a=b:2"), "", 1.0),
        f"{tmp_path / 'a=b:2'}:0.25": (str(tmp_path / "a=b:2"), "", 0.25),
    }.items():
        assert parse_adapter(text) == expected


def test_adapters_of_a_server_that_are_not_applied_keep_their_scales_for_who_names_them(folder: Path) -> None:
    values = {"lora": ((str(folder / "one.gguf"), "", 0.5),), "control_vectors": (), "idle": True}
    (choice,) = _adapters(values, 1)["lora"]
    assert choice.idle
    assert choice.scale == choice.named_scale == 0.5


def test_run_answers_with_adapters_and_control_vectors(folder: Path, capsys: Captured) -> None:
    file, direction = folder / "one.gguf", folder / "v.gguf"
    plain = run(folder, capsys)
    lora, rest = run(folder, capsys, "--lora", str(file)), run(folder, capsys, "--lora", f"{file}:0")
    vector = run(folder, capsys, "--control-vector", f"x={direction}:4")
    elsewhere = ("--control-vector-layer-range", "2", "2")
    outside = run(folder, capsys, "--control-vector", f"{direction}:4", *elsewhere)
    assert [one[0] for one in (plain, lora, rest, vector, outside)] == [0] * 5, (lora[2], vector[2], outside[2])
    assert plain[1] == rest[1] == outside[1]
    assert len({plain[1], lora[1], vector[1]}) == 3


def test_a_wrong_adapter_is_an_error_with_its_name(folder: Path, capsys: Captured) -> None:
    for arguments, message in (
        (["--lora", str(folder / "tiny.gguf")], "tiny.gguf: general.type is missing"),
        (["--lora", str(folder / "none.gguf")], "none.gguf"),
        (["--lora", str(folder / "v.gguf")], "v.gguf"),
        (["--control-vector", str(folder / "one.gguf")], "controlvector"),
        (["--control-vector-layer-range", "3", "1"], "control_vector_layers"),
    ):
        status, _, said = run(folder, capsys, *arguments)
        assert status == 1, said
        assert message in said


def test_bench_measures_with_an_adapter(folder: Path, capsys: Captured) -> None:
    asked = ["bench", "-m", str(folder / "tiny.gguf"), "-p", "8", "-n", "4", "-r", "1", "--no-bandwidth"]
    assert main([*asked, "--lora", str(folder / "one.gguf")]) == 0
    assert "pp8" in capsys.readouterr().out


def test_show_and_verify_know_adapters(folder: Path, capsys: Captured, tmp_path: Path) -> None:
    for file, told in (("one.gguf", "LoRA for a model of the architecture llama"), ("v.gguf", "1 from 1 to 1")):
        assert main(["show", str(folder / file)]) == 0
        assert told in capsys.readouterr().out
        assert main(["show", str(folder / file), "--json"]) == 0
        assert '"kind"' in capsys.readouterr().out
        assert main(["verify", str(folder / file)]) == 0
        assert "sound" in capsys.readouterr().out
    half = write_lora(tmp_path / "half.gguf", {}, tensors={"blk.0.attn_q.weight.lora_a": np.ones((4, 64), "f4")})
    assert main(["verify", str(half)]) == 1
    told = capsys.readouterr().out
    assert "ADAPTER_FILE" in told and told.endswith(".\n") and ".." not in told
    assert main(["run", str(folder / "one.gguf"), "-p", "x", "--no-stdin"]) == 1
    assert "--lora" in capsys.readouterr().err


def test_bench_measures_drafted_answers_of_the_same_model(
    folder: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its adapters, control vectors and types of keys and values are those of the other rows."""
    given: dict[str, object] = {}
    load = edgellm.load

    def watched(*args: object, **options: object) -> edgellm.LLM:
        given.update(options)
        return load(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(edgellm, "load", watched)
    tiny = str(folder / "tiny.gguf")
    asked = ["bench", "-m", tiny, "-p", "0", "-n", "4", "-r", "1", "-t", "1", "--no-bandwidth", "--draft", tiny]
    asked += ["-ctk", "q8_0", "-ctv", "q4_0", "--lora", str(folder / "one.gguf")]
    assert main([*asked, "--control-vector", str(folder / "v.gguf")]) == 0
    capsys.readouterr()
    assert (given["cache_type_k"], given["cache_type_v"]) == ("q8_0", "q4_0")
    assert len(given["lora"]) == len(given["control_vectors"]) == 1  # type: ignore[arg-type]
