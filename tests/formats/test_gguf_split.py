"""A split model opens from its first part, and only when the parts are one model."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

import pytest
import raw_gguf as raw

from edgellm.formats.errors import EdgeLLMError, FormatError, ModelNotFoundError
from edgellm.formats.gguf import GGUFFile
from edgellm.formats.validate import findings

N_PARTS = 3


def part(
    no: int,
    *more: bytes,
    count: int = N_PARTS,
    total: int = N_PARTS,
    names: Sequence[str] | None = None,
    kind: int = raw.U16,
) -> bytes:
    """Part ``no`` (from 0) with one tensor of its own number."""
    names = [f"blk.{no}.weight"] if names is None else names
    first = [raw.kv("general.architecture", raw.STRING, "test"), raw.kv("general.name", raw.STRING, "whole")]
    kvs = [
        *(first if no == 0 else []),
        raw.kv("split.no", kind, no),
        raw.kv("split.count", kind, count),
        raw.kv("split.tensors.count", raw.I32, total),
        *more,
    ]
    records = [raw.tensor(name, [8], 0, 32 * i) for i, name in enumerate(names)]
    return raw.gguf_bytes(kvs, records, struct.pack("<8f", *[no] * 8) * len(names))


def write(folder: Path, parts: dict[int, bytes], name: str = "model", count: int = N_PARTS) -> Path:
    for no, data in parts.items():
        (folder / f"{name}-{no + 1:05}-of-{count:05}.gguf").write_bytes(data)
    return folder / f"{name}-00001-of-{count:05}.gguf"


def whole() -> dict[int, bytes]:
    return {no: part(no) for no in range(N_PARTS)}


def refused(path: Path, code: str = "MODEL_SPLIT") -> EdgeLLMError:
    with pytest.raises(EdgeLLMError) as caught:
        GGUFFile.open(path)
    assert caught.value.code == code, str(caught.value)
    assert code in [found.code for found in findings(path)]
    return caught.value


def test_all_parts_are_one_model(tmp_path: Path) -> None:
    path = write(tmp_path, whole())
    with GGUFFile.open(path) as gguf:
        assert gguf.path == path
        assert gguf.metadata["general.name"] == "whole"
        assert list(gguf.tensors) == ["blk.0.weight", "blk.1.weight", "blk.2.weight"]
        for no in range(N_PARTS):
            assert gguf.tensors[f"blk.{no}.weight"].dequantize().tolist() == [[no] * 8]
        assert gguf.nbytes == sum(part.stat().st_size for part in tmp_path.iterdir())
    assert findings(path) == []


def test_splits_of_the_judges_writer_open(tmp_path: Path) -> None:
    judge = pytest.importorskip("gguf", reason="gguf writes the split files")
    np = pytest.importorskip("numpy")
    writer = judge.GGUFWriter(tmp_path / "judge.gguf", "test", split_max_tensors=2)
    for i in range(5):
        writer.add_tensor(f"t{i}", np.full(32, i, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with GGUFFile.open(tmp_path / "judge-00001-of-00003.gguf") as gguf:
        assert [tensor.dequantize()[0, 0] for tensor in gguf.tensors.values()] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("missing", [1, 2])
def test_missing_part_is_named(missing: int, tmp_path: Path) -> None:
    parts = whole()
    del parts[missing]
    error = refused(write(tmp_path, parts))
    assert f"model-{missing + 1:05}-of-00003.gguf" in str(error)


def test_later_part_names_the_first(tmp_path: Path) -> None:
    write(tmp_path, whole())
    error = refused(tmp_path / "model-00002-of-00003.gguf")
    assert "model-00001-of-00003.gguf" in str(error)


def test_first_part_under_another_name_says_the_right_one(tmp_path: Path) -> None:
    (tmp_path / "renamed.gguf").write_bytes(part(0))
    assert "renamed-00001-of-00003.gguf" in str(refused(tmp_path / "renamed.gguf"))


def test_name_with_another_count_is_refused(tmp_path: Path) -> None:
    refused(write(tmp_path, {no: part(no, count=3) for no in range(4)}, count=4))


def test_part_repeated_under_another_name_is_refused(tmp_path: Path) -> None:
    parts = whole()
    parts[2] = parts[1]
    refused(write(tmp_path, parts))


def test_part_of_another_count_is_refused(tmp_path: Path) -> None:
    parts = whole()
    parts[1] = part(1, count=4)
    refused(write(tmp_path, parts))


def test_part_of_another_architecture_is_refused(tmp_path: Path) -> None:
    parts = whole()
    parts[1] = part(1, raw.kv("general.architecture", raw.STRING, "other"))
    assert "two models" in str(refused(write(tmp_path, parts)))


def test_part_of_another_model_is_refused(tmp_path: Path) -> None:
    parts = whole()
    parts[1] = part(1, raw.kv("general.name", raw.STRING, "another"))
    assert "two models" in str(refused(write(tmp_path, parts)))


def test_tensor_of_two_parts_is_refused(tmp_path: Path) -> None:
    parts = whole()
    parts[2] = part(2, names=["blk.0.weight"])
    assert "model-00001-of-00003.gguf" in str(refused(write(tmp_path, parts)))


def test_wrong_number_of_tensors_is_refused(tmp_path: Path) -> None:
    refused(write(tmp_path, {no: part(no, total=4) for no in range(N_PARTS)}))


def test_damage_in_a_later_part_names_that_part(tmp_path: Path) -> None:
    parts = whole()
    parts[2] = parts[2][:-1]
    error = refused(write(tmp_path, parts), "MODEL_TRUNCATED")
    assert str(error).startswith("model-00003-of-00003.gguf: ")


def test_later_part_that_is_a_directory_is_refused(tmp_path: Path) -> None:
    parts = whole()
    del parts[1]
    path = write(tmp_path, parts)
    (tmp_path / "model-00002-of-00003.gguf").mkdir()
    with pytest.raises(FormatError) as caught:
        GGUFFile.open(path)
    assert caught.value.code == "MODEL_NOT_A_FILE"


@pytest.mark.parametrize("key", ["split.no", "split.count"])
@pytest.mark.parametrize(("kind", "value"), [(raw.STRING, "1"), (raw.F32, 3.0), (raw.BOOL, 1), (raw.I32, -3)])
def test_split_keys_of_another_kind_are_refused(key: str, kind: int, value: object, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(raw.gguf_bytes([raw.kv(key, kind, value)]))  # type: ignore[arg-type]
    refused(path)


@pytest.mark.parametrize("count", [65_535, (1 << 32) - 1])
def test_absurd_number_of_parts_ends_at_once(count: int, tmp_path: Path) -> None:
    data = part(0, count=count, kind=raw.U32)
    path = tmp_path / f"model-00001-of-{count:05}.gguf"
    path.write_bytes(data)
    assert len(str(refused(path))) < 1000


def test_all_parts_in_one_file_is_an_ordinary_file(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(part(0, count=1, total=1))
    with GGUFFile.open(path) as gguf:
        assert list(gguf.tensors) == ["blk.0.weight"]


def test_missing_first_part_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError):
        GGUFFile.open(tmp_path / "model-00001-of-00003.gguf")


@pytest.mark.parametrize(
    ("name", "which"),
    [
        ("model.Q4_K_M.gguf.part1of2", "piece 1 of 2"),
        ("model.gguf.part2of10", "piece 2 of 10"),
        ("model.gguf-split-a", "one piece"),
        ("model.gguf-split-b", "one piece"),
        ("model.gguf.part-ab", "one piece"),
    ],
)
def test_a_piece_of_bytes_says_that_it_must_be_joined(name: str, which: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(part(0)[:-8])
    error = refused(path)
    assert error.code == "MODEL_SPLIT"
    assert which in str(error) and "join" in str(error)
