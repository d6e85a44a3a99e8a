"""The importance matrix: what is summed, the two forms of file, merging and statistics."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

import numpy as np
import pytest
import tiny_models

from edgellm.cli.app import main
from edgellm.formats.errors import FormatError, ParameterError
from edgellm.kernels.ops import Matmul
from edgellm.kernels.program import Batch
from edgellm.measure.perplexity import ChunkModel
from edgellm.quantize.importance import (
    Imatrix,
    InputSquares,
    collect,
    dat_bytes,
    read_imatrix,
    statistics,
    unmet_text,
    write_imatrix,
)

gguf = pytest.importorskip("gguf", reason="gguf is the judge of the files")

TEXT = "the other word and the thing, all in one. " * 30
N_CTX = 64


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.write_tiny_model(tmp_path_factory.mktemp("imatrix") / "model.gguf", quant="Q8_0", n_layer=2)


def small(seed: int = 0, names: tuple[str, ...] = ("blk.0.ffn_up.weight", "blk.1.ffn_up.weight")) -> Imatrix:
    rng = np.random.default_rng(seed)
    squares = {name: InputSquares(rng.random((1, 6), np.float32) * 512, np.array([1024], np.float32)) for name in names}
    return Imatrix(squares, [f"text-{seed}"], 512)


@pytest.mark.parametrize("executor", ["reference", "cpu"])
def test_sums_are_those_of_the_inputs_of_every_matmul(model_path: Path, executor: str) -> None:
    with ChunkModel(model_path, N_CTX, executor=executor) as model:
        chunks = model.chunks(model.ids(TEXT), 3)
        *_, result = collect(model, chunks, "text", outputs=True)
    wanted: dict[str, np.ndarray] = {}

    def see(index, op, read):
        if isinstance(op, Matmul):
            x = read(op.x).astype(np.float64)
            wanted[op.weight] = wanted.get(op.weight, 0) + np.square(x).sum(axis=0)

    with ChunkModel(model_path, N_CTX, executor="reference") as judge:
        for chunk in chunks:
            judge.executor.run(Batch.single(judge.program, chunk.ids), see)
    assert result.squares.keys() == wanted.keys()
    for name, sums in wanted.items():
        assert result.squares[name].counts == [3 * N_CTX]
        # the CPU's own keys and values are float16
        assert np.allclose(result.squares[name].sums[0], sums, rtol=1e-5 if executor == "reference" else 1e-2), name
    assert result.n_chunks == 3


def test_sums_of_experts_are_those_of_the_tokens_that_are_sent_to_them(tmp_path: Path) -> None:
    path = tiny_models.write_tiny_model(tmp_path / "moe.gguf", "qwen3moe", n_layer=1)
    weights = [f"blk.0.ffn_{kind}_exps.weight" for kind in ("gate", "up", "down")]
    wanted: dict[str, list[tuple[int, np.ndarray]]] = {name: [] for name in weights}

    def see(index, op, read):
        if getattr(op, "weight", "") in weights:
            for ids, x in zip(read(op.ids), read(op.x), strict=True):
                slots = x.reshape(-1, 256)
                wanted[op.weight] += [(expert, slots[i % len(slots)].copy()) for i, expert in enumerate(ids)]

    with ChunkModel(path, N_CTX, executor="reference") as model:
        chunks = model.chunks(model.ids(TEXT), 2)
        *_, result = collect(model, chunks, "text")
        for chunk in chunks:
            model.executor.run(Batch.single(model.program, chunk.ids), see)
    for name, rows in wanted.items():
        for expert in range(tiny_models.N_EXPERT):
            own = [x.astype(np.float64) for number, x in rows if number == expert]
            assert result.squares[name].counts[expert] == len(own)
            assert np.allclose(result.squares[name].sums[expert], sum((x * x for x in own), np.zeros(256)), rtol=1e-5)


def test_experts_that_the_text_never_met_are_told_by_layer() -> None:
    met, ones = np.array([3, 0, 1, 0], np.float32), np.ones((4, 2), np.float32)
    names = ("blk.3.ffn_up_exps.weight", "blk.3.ffn_down_exps.weight", "blk.10.ffn_up_exps.weight")
    found = Imatrix({name: InputSquares(ones, met) for name in names})
    found.squares |= {"dense.weight": InputSquares(ones[:1], met[1:2]), "all": InputSquares(ones, met + 1)}
    assert found.unmet == {name: [1, 3] for name in names}
    assert unmet_text(found.unmet) == "blk.3: 1, 3; blk.10: 1, 3"
    assert unmet_text({f"blk.{i}.x": [0] for i in range(15)}).endswith("blk.11: 0; and in 3 more layers")


def test_the_output_matrix_is_left_out_unless_asked_for(model_path: Path) -> None:
    with ChunkModel(model_path, N_CTX, executor="reference") as model:
        *_, result = collect(model, model.chunks(model.ids(TEXT), 1), "text")
    assert len(result.squares) == 14 and all(name.startswith("blk.") for name in result.squares)


def test_gguf_reads_what_is_written(tmp_path: Path) -> None:
    imatrix = small()
    write_imatrix(tmp_path / "i.gguf", imatrix)
    reader = gguf.GGUFReader(tmp_path / "i.gguf")
    assert reader.get_field("general.type").contents() == "imatrix"
    assert reader.get_field("imatrix.datasets").contents() == ["text-0"]
    assert reader.get_field("imatrix.chunk_count").contents() == 2
    assert reader.get_field("imatrix.chunk_size").contents() == 512
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    for name, squares in imatrix.squares.items():
        assert tensors[f"{name}.in_sum2"].shape.tolist() == [6, 1]
        assert (tensors[f"{name}.in_sum2"].data.reshape(1, 6) == squares.sums).all()
        assert (tensors[f"{name}.counts"].data.reshape(-1) == squares.counts).all()


def test_what_gguf_writes_is_read(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "i.gguf", "imatrix")
    writer.add_string("general.type", "imatrix")
    writer.add_array("imatrix.datasets", ["a", "b"])
    writer.add_uint32("imatrix.chunk_count", 2)
    writer.add_uint32("imatrix.chunk_size", 256)
    sums = np.arange(8, dtype=np.float32).reshape(2, 4)
    writer.add_tensor("blk.0.ffn_up_exps.weight.in_sum2", sums)
    writer.add_tensor("blk.0.ffn_up_exps.weight.counts", np.array([[2], [0]], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    imatrix = read_imatrix(tmp_path / "i.gguf")
    assert imatrix.datasets == ["a", "b"] and imatrix.chunk_size == 256
    assert imatrix.means["blk.0.ffn_up_exps.weight"].tolist() == [0, 0.5, 1, 1.5, 1, 1, 1, 1]


@pytest.mark.parametrize("form", ["gguf", "dat"])
def test_both_forms_give_back_the_means(tmp_path: Path, form: str) -> None:
    imatrix = small()
    write_imatrix(tmp_path / "i", imatrix, form)
    again = read_imatrix(tmp_path / "i")
    assert again.datasets == ["text-0"] and again.n_chunks == 2
    for name, mean in imatrix.means.items():
        assert again.means[name] == pytest.approx(mean, rel=1e-6)
    assert list(tmp_path.iterdir()) == [tmp_path / "i"]


def test_the_dat_form_is_laid_out_as_llama_imatrix_does() -> None:
    imatrix = Imatrix({"w": InputSquares(np.array([[600.0, 1200.0]], np.float32), np.array([600], np.float32))}, ["t"])
    head = struct.pack("<ii1sii", 1, 1, b"w", 2, 2)  # 600 rows are two calls of 512, the second one begun
    assert dat_bytes(imatrix) == head + struct.pack("<ff", 2.0, 4.0) + struct.pack("<ii1s", 1, 1, b"t")


def test_merging_adds_sums_and_names_the_sets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = small(0), small(1, ("blk.1.ffn_up.weight", "blk.2.ffn_up.weight"))
    write_imatrix(tmp_path / "a.gguf", a)
    write_imatrix(tmp_path / "b.dat", b, "dat")
    files = [part for name in ("a.gguf", "b.dat") for part in ("--in-file", str(tmp_path / name))]
    assert main(["imatrix", *files, "-o", str(tmp_path / "both.gguf")]) == 0
    assert "3 weights" in capsys.readouterr().out
    both = read_imatrix(tmp_path / "both.gguf")
    assert both.datasets == ["text-0", "text-1"]
    name = "blk.1.ffn_up.weight"
    assert both.squares[name].counts == [2048]
    assert both.squares[name].sums == pytest.approx(a.squares[name].sums + b.squares[name].sums, rel=1e-5)
    other = Imatrix({name: InputSquares(np.ones((1, 7), np.float32), np.ones(1, np.float32))})
    with pytest.raises(ParameterError, match="one model only"):
        a.merge(other)


def test_statistics_by_hand() -> None:
    def of(*means: float) -> InputSquares:
        return InputSquares(np.array([means], np.float32) * 4, np.array([4], np.float32))

    imatrix = Imatrix({"blk.0.x.weight": of(1, 1, 1, 1), "blk.1.x.weight": of(0, 0, 0, 8)})
    last, first = statistics(imatrix)
    assert (first.total, first.sigma, first.entropy, first.normal_entropy, first.zd) == (4, 0, 2, 1, 0)
    assert math.isnan(first.cosine) and last.cosine == pytest.approx(0.5)
    assert (last.total, last.least, last.most, last.mean, last.entropy) == (8, 0, 8, 2, 0)
    assert last.sigma == pytest.approx(math.sqrt(12)) and (last.active, last.zd) == (0.25, 0.25)


def damaged() -> list[bytes]:
    whole = dat_bytes(small())
    nan = whole[:31] + struct.pack("<f", math.nan) + whole[35:]
    return [
        b"", whole[:10], whole[:60], struct.pack("<i", -1), struct.pack("<i", 1 << 30) + whole[4:],
        struct.pack("<ii", 1, 1 << 30), struct.pack("<i", 0), nan,
    ]  # fmt: skip


@pytest.mark.parametrize("number", range(len(damaged())))
def test_a_damaged_file_is_named(tmp_path: Path, number: int) -> None:
    (tmp_path / "i.dat").write_bytes(damaged()[number])
    with pytest.raises(FormatError):
        read_imatrix(tmp_path / "i.dat")


def test_a_model_is_no_imatrix(model_path: Path) -> None:
    with pytest.raises(FormatError, match="'model'"):
        read_imatrix(model_path)


def test_the_command_collects_and_shows(model_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, out = tmp_path / "text", tmp_path / "i.gguf"
    text.write_text(TEXT)
    common = ["-c", str(N_CTX), "--executor", "reference", "-o", str(out)]
    assert main(["imatrix", str(model_path), "-f", str(text), "--chunks", "2", *common, "--show-statistics"]) == 0
    shown = capsys.readouterr().out
    assert "14 weights, 2 chunks of 64" in shown and "blk.1.ffn_down.weight" in shown
    assert main(["imatrix", "--in-file", str(out), "--show-statistics", "-o", str(tmp_path / "unwritten")]) == 0
    assert not (tmp_path / "unwritten").exists()
    assert main(["imatrix"]) == main(["imatrix", str(model_path)]) == 2
    assert main(["imatrix", str(model_path), "-f", str(text), "--chunk", "999", *common]) == 1


def test_compare_shows_what_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = tiny_models.write_tiny_model(tmp_path / "a.gguf", quant="F32")
    b = tiny_models.write_tiny_model(tmp_path / "b.gguf", quant="Q8_0", metadata={"general.name": "b", "more": 1})
    text = tmp_path / "text"
    text.write_text(TEXT)
    run = ["compare", str(a), str(b), "-f", str(text), "-c", str(N_CTX), "--chunks", "1", "--executor", "reference"]
    assert main([*run, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert {row["key"] for row in result["metadata"]} == {"general.name", "more"}
    by_name = {row["name"]: row for row in result["tensors"]}
    up = by_name["blk.0.ffn_up.weight"]
    assert (up["a"], up["b"]) == ("F32", "Q8_0") and 1e-6 < up["nmse"] < 1e-4
    assert by_name["output_norm.weight"]["nmse"] == 0
    assert 0 < result["answers"]["mean_kl"] < 0.01
    assert main(run[:3]) == 0
    assert "blk.1.ffn_down.weight" in capsys.readouterr().out
