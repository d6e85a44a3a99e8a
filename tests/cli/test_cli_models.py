"""The commands that handle model files: pull, list, show, rm, verify."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_encoders import random_bert, write_bert

from edgellm.cli import main
from edgellm.formats.errors import DownloadError, ModelNotFoundError
from edgellm.store.catalogue import InstalledModel, catalogue

tiny_models = pytest.importorskip("tiny_models", reason="writing model files needs the package gguf")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGELLM_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def model_path(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.gguf"
    tiny_models.write_tiny_model(
        path, metadata={"general.sampling.temp": 0.25, "general.name": "Tiny\x1b[2J", "general.license": "mit"}
    )
    return path


def test_pull_brings_every_name_and_says_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"x" * 2048)
    asked = []

    def pull(name: str, progress: Callable[[int, int | None], None]) -> Path:
        asked.append(name)
        progress(1024, 2048)
        progress(2048, 2048)
        return file

    monkeypatch.setattr("edgellm.store.catalogue.pull", pull)
    assert main(["pull", "one", "two"]) == 0
    captured = capsys.readouterr()
    assert asked == ["one", "two"] and captured.out == ""
    assert captured.err.splitlines() == [
        "pulling one (2.0 KiB) ...",
        f"one: {file} (2.0 KiB)",
        "pulling two (2.0 KiB) ...",
        f"two: {file} (2.0 KiB)",
    ]


def test_a_pull_that_fails_is_one_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def pull(name: str, progress: object) -> Path:
        raise DownloadError("the server closed the connection. Try again: it goes on where it stopped.")

    monkeypatch.setattr("edgellm.store.catalogue.pull", pull)
    assert main(["pull", "one"]) == 1
    assert "[PULL_FAILED]" in capsys.readouterr().err


def test_list_shows_what_is_here_and_what_can_be_had(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here = [InstalledModel("hf:a/b:Q8_0", Path("/models/b.gguf"), 1 << 20), InstalledModel("smollm2", Path("/s"), 5)]
    monkeypatch.setattr("edgellm.store.catalogue.installed_models", lambda: here)
    assert main(["list", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert set(rows) == {"hf:a/b:Q8_0", *catalogue()}
    assert rows["smollm2"]["installed"] and rows["smollm2"]["default"] and rows["smollm2"]["size"] == 5
    assert rows["hf:a/b:Q8_0"]["path"] == str(Path("/models/b.gguf"))
    assert not rows["gemma3-270m"]["installed"] and rows["gemma3-270m"]["path"] is None
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["NAME", "HERE", "SIZE", "LICENCE", "DESCRIPTION"]
    assert any(line.startswith("smollm2 (default)") and " yes " in line for line in lines)


def test_rm_frees_or_says_that_there_is_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("edgellm.store.catalogue.remove", lambda name: 1 << 20)
    assert main(["rm", "one", "two"]) == 0
    assert capsys.readouterr().err.splitlines() == [f"{n}: removed, 1.0 MiB free again" for n in ("one", "two")]
    monkeypatch.undo()
    assert main(["rm", "never-pulled"]) == 1


def test_show_tells_what_a_model_is(model_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(model_path)]) == 0
    text = capsys.readouterr().out
    for word in ("llama", "Q8_0", "256 tokens", "gpt2 (smollm)", "temp 0.25", "mit", "memory", "chat template"):
        assert word in text
    assert "\x1b" not in text and "Tiny\\x1b[2J" in text


def test_show_json_is_whole(model_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(model_path), "--json", "-c", "128"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["runnable"] and facts["reason"] is None
    assert facts["architecture"] == "llama" and facts["n_layers"] == 2 and facts["context_length"] == 256
    assert facts["tokenizer"]["model"] == "gpt2" and facts["tokenizer"]["n_vocab"] > 256
    assert facts["size"] == sum(of["bytes"] for of in facts["tensor_types"].values())
    memory = facts["memory"]
    assert memory["n_ctx"] == 128
    assert memory["total"] == sum(memory[part] for part in ("weights", "kv", "work", "process"))
    assert "{%" in facts["chat_template"] and facts["sampling"] == {"temp": 0.25}


def test_show_of_an_encoder_says_what_it_pools_and_which_types_it_knows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_bert(tmp_path / "bert.gguf", random_bert(), 2)
    assert main(["show", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "both ways" in shown and "2 types of text" in shown and "the first token" in shown
    assert "edgellm embed" in shown and "run --raw" not in shown
    assert main(["show", str(path), "--json"]) == 0
    vectors = json.loads(capsys.readouterr().out)["vectors"]
    assert vectors == {"is_encoder": True, "causal": False, "pooling": "cls", "labels": [], "token_types": 2}


def test_show_template_and_metadata_alone(model_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(model_path), "--template"]) == 0
    assert "{%" in capsys.readouterr().out
    assert main(["show", str(model_path), "--metadata"]) == 0
    assert "llama.block_count" in capsys.readouterr().out
    assert main(["show", str(model_path), "--metadata", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["llama.block_count"] == 2


def test_show_of_an_architecture_that_cannot_run_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "other.gguf"
    tiny_models.write_tiny_model(path, metadata={"general.architecture": "mamba"})
    status = main(["show", str(path)])
    captured = capsys.readouterr()
    assert (status, "cannot run" in captured.out) == (0, True) or "mamba" in captured.err


def test_verify_finds_nothing_wrong_with_a_sound_file(model_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flags in ([], ["--header-only"]):
        assert main(["verify", str(model_path), *flags]) == 0
        assert "sound" in capsys.readouterr().out
    assert main(["verify", str(model_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []


def test_verify_prints_the_findings_and_ends_with_1(
    model_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = tmp_path / "short.gguf"
    short.write_bytes(model_path.read_bytes()[:-5000])
    assert main(["verify", str(short)]) == 1
    assert "MODEL_TRUNCATED" in capsys.readouterr().out
    assert main(["verify", str(short), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)[0]["severity"] == "error"


def test_verify_does_not_call_a_tokenizer_sound_that_a_load_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bomb = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 100}
    description = {
        "normalizer": {"type": "Sequence", "normalizers": [bomb] * 12},
        "model": {"type": "WordLevel", "vocab": {"<|endoftext|>": 0}, "unk_token": "<|endoftext|>"},
    }
    path = tmp_path / "bomb.gguf"
    tiny_models.write_tiny_model(path, n_layer=1, metadata={"tokenizer.huggingface.json": json.dumps(description)})
    assert main(["verify", str(path)]) == 1
    printed = capsys.readouterr().out
    assert "error: VOCAB_INVALID" in printed and "sound" not in printed
    assert printed.endswith("itself.\n")  # the words of the error, and nothing behind them


VISION = "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}|{% endfor %}"
# template of a file -> (exit status, what is printed)
TEMPLATES = {
    "{{ '%2000000000d' is odd }}": (1, "error: TEMPLATE_BUDGET"),
    "{% for m in messages %}{{ ('a' * 600000).rindex('a' * 150000 + 'b' + 'a' * 150000) }}{% endfor %}": (
        1,
        "error: TEMPLATE_BUDGET",
    ),
    "{% if tools %}{{ ''.__class__.mro() }}{% endif %}{{ messages[0].content }}": (1, "error: TEMPLATE_UNSAFE"),
    "{% import 'a' as b %}": (1, "error: TEMPLATE_UNSAFE"),
    "{% for m in messages %}": (1, "error: TEMPLATE_ERROR"),
    "{{ raise_exception('no') }}": (1, "error: TEMPLATE_ERROR"),
    VISION: (0, "warning: TEMPLATE_DROPS_TEXT"),
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}{{ messages }}": (0, "sound"),
}


@pytest.mark.parametrize("source", TEMPLATES)
def test_verify_tries_the_chat_template(source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tiny_models.write_tiny_model(tmp_path / "m.gguf", metadata={"tokenizer.chat_template": source})
    status, says = TEMPLATES[source]
    assert main(["verify", str(path), "--header-only"]) == status
    assert says in capsys.readouterr().out
    named = {"tokenizer.chat_template.tool_use": source}
    path = tiny_models.write_tiny_model(tmp_path / "named.gguf", metadata=named)
    assert main(["verify", str(path), "--header-only"]) == status
    assert says in capsys.readouterr().out


def test_verify_of_no_model_at_all_is_told_in_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.gguf"
    page.write_text("<!DOCTYPE html><html></html>" * 10)
    assert main(["verify", str(page)]) == 1
    assert "GGUF_NOT_A_GGUF" in capsys.readouterr().out
    assert main(["verify", str(tmp_path)]) == 1
    assert main(["verify", "no-such-model"]) == 1


@pytest.mark.parametrize("command", ["show", "verify"])
def test_a_known_model_that_is_not_here_is_not_fetched(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def pull(name: str, progress: object = None) -> Path:
        raise AssertionError("no network")

    monkeypatch.setattr("edgellm.store.catalogue.pull", pull)
    assert main([command, "smollm2"]) == 1
    assert "`edgellm pull smollm2`" in capsys.readouterr().err


def test_near_names_are_suggested() -> None:
    from edgellm.store.catalogue import fetched

    with pytest.raises(ModelNotFoundError, match="smollm2"):
        fetched("smolm2")
