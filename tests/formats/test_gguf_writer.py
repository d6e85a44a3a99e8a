"""The GGUF writer: what it writes, other readers read; whatever breaks on the way, the old file stays."""

from __future__ import annotations

import errno
import importlib.util
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
from tiny_models import write_tiny_model

from edgellm.formats import gguf_writer
from edgellm.formats.errors import EdgeLLMError, ParameterError
from edgellm.formats.gguf import GGUFFile
from edgellm.formats.gguf_writer import TensorPlan, file_nbytes, write_gguf
from edgellm.formats.quant_types import QUANT_TYPES
from edgellm.machine.atomic import whole_file
from edgellm.quantize.inputs import InputModel, open_input

METADATA = {
    "general.architecture": ("llama", "STRING"),
    "test.u8": (255, "UINT8"),
    "test.i8": (-128, "INT8"),
    "test.u16": (65535, "UINT16"),
    "test.i16": (-32768, "INT16"),
    "test.u32": (2**32 - 1, "UINT32"),
    "test.i32": (-(2**31), "INT32"),
    "test.f32": (0.1, "FLOAT32"),
    "test.bool": (True, "BOOL"),
    "test.string": ("größer \N{SNOWMAN}", "STRING"),
    "test.u64": (2**64 - 1, "UINT64"),
    "test.i64": (-(2**63), "INT64"),
    "test.f64": (0.1, "FLOAT64"),
    "test.strings": (["", "a", "\N{SNOWMAN}"], "ARRAY[STRING]"),
    "test.floats": ([0.5, -1.0], "ARRAY[FLOAT32]"),
    "test.ints": (np.arange(-2, 3), "ARRAY[INT32]"),
    "test.flags": ([True, False], "ARRAY[BOOL]"),
    "test.nothing": ([], "ARRAY[UINT32]"),
}


def plan(name: str, array: np.ndarray, quant: str = "F32") -> TensorPlan:
    """A tensor of an array in memory, given out in pieces of seven bytes."""
    raw = array.tobytes()
    pieces = [raw[i : i + 7] for i in range(0, len(raw), 7)] if len(raw) < 4096 else [raw[:5000], raw[5000:]]
    return TensorPlan(name, array.shape, QUANT_TYPES[quant], lambda: iter(pieces))


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "norm.weight": rng.standard_normal(5).astype(np.float32),
        "odd.weight": rng.standard_normal((3, 7)).astype(np.float32),
        "three.weight": rng.standard_normal((2, 3, 4)).astype(np.float32),
        "large.weight": rng.standard_normal((33, 257)).astype(np.float32),
    }


def copy(source: InputModel) -> list[TensorPlan]:
    return [TensorPlan(t.name, t.shape, t.quant, t.stored_chunks) for t in source.tensors.values()]


@pytest.fixture
def model(tmp_path: Path) -> Iterator[InputModel]:
    """A tiny model written by another writer, as a source."""
    with open_input(write_tiny_model(tmp_path / "tiny.gguf", quant="Q4_K", quants={"attn_v.weight": "F16"})) as source:
        yield source


def test_every_kind_of_metadata_comes_back_with_its_type(tmp_path: Path) -> None:
    (path,) = write_gguf(tmp_path / "a.gguf", METADATA, [plan(*item) for item in arrays().items()])
    with GGUFFile.open(path) as file:
        assert list(file.metadata) == list(METADATA)
        for key, (value, kind) in METADATA.items():
            assert file.value_types[key] == kind
            expected = np.float32(value) if kind == "FLOAT32" else value
            assert np.array_equal(file.metadata[key], expected), key
        for name, array in arrays().items():
            assert file.tensors[name].shape == array.shape
            assert np.array_equal(file.tensors[name].dequantize().reshape(array.shape), array)


@pytest.mark.parametrize("alignment", [1, 8, 32, 4096])
def test_the_gguf_package_reads_the_same(tmp_path: Path, alignment: int) -> None:
    metadata = METADATA | {"general.alignment": (alignment, "UINT32")}
    (path,) = write_gguf(tmp_path / "a.gguf", metadata, [plan(*item) for item in arrays().items()])
    reader = gguf.GGUFReader(path)
    for key, (value, kind) in metadata.items():
        expected = np.float32(value) if kind == "FLOAT32" else value
        assert np.array_equal(reader.fields[key].contents(), expected), key
    for tensor in reader.tensors:
        assert tensor.data_offset % alignment == 0
        assert np.array_equal(tensor.data, arrays()[tensor.name])
    assert path.stat().st_size == file_nbytes(metadata, [plan(*item) for item in arrays().items()])


def test_a_copied_model_is_the_same_to_the_byte_order_and_all(model: InputModel, tmp_path: Path) -> None:
    (path,) = write_gguf(tmp_path / "copy.gguf", model.metadata, copy(model))
    with open_input(path) as again:
        assert list(again.tensors) == list(model.tensors)
        assert [kind for _, kind in again.metadata.values()] == [kind for _, kind in model.metadata.values()]
        for key, (value, _) in model.metadata.items():
            assert np.array_equal(again.metadata[key][0], value), key
        for name, tensor in model.tensors.items():
            assert again.tensors[name].quant is tensor.quant
            assert np.array_equal(again.tensors[name].data(), tensor.data())
            assert np.array_equal(again.tensors[name].rows(1, 3), tensor.rows()[1:3])
    assert path.read_bytes() == (model.path).read_bytes()


@pytest.mark.parametrize("limits", [{"max_part_tensors": 5}, {"max_part_nbytes": 200_000}, {"max_part_nbytes": 1}])
def test_a_split_model_is_the_whole_model(model: InputModel, tmp_path: Path, limits: dict[str, int]) -> None:
    paths = write_gguf(tmp_path / "parts.gguf", model.metadata, copy(model), **limits)
    assert [path.name for path in paths] == [
        f"parts-{no:05}-of-{len(paths):05}.gguf" for no in range(1, len(paths) + 1)
    ]
    assert len(paths) > 2
    readers = [gguf.GGUFReader(path) for path in paths]
    for no, reader in enumerate(readers):
        split = {key: field.contents() for key, field in reader.fields.items() if key.startswith("split.")}
        assert split == {
            "split.no": no,
            "split.count": len(paths),
            "split.tensors.count": len(model.tensors),
        }
        assert ("general.architecture" in reader.fields) == (no == 0)
    with open_input(paths[0]) as again:
        assert again.n_parts == len(paths)
        assert list(again.tensors) == list(model.tensors)
        for name, tensor in model.tensors.items():
            assert np.array_equal(again.tensors[name].data(), tensor.data())
        (joined,) = write_gguf(tmp_path / "joined.gguf", again.metadata, copy(again))
    assert joined.read_bytes() == model.path.read_bytes()


def test_llama_cpp_loads_what_is_written_whole_and_split(model: InputModel, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp", reason="llama.cpp is the judge")
    paths = write_gguf(tmp_path / "whole.gguf", model.metadata, copy(model))
    parts = write_gguf(tmp_path / "parts.gguf", model.metadata, copy(model), max_part_tensors=7)
    texts = {llama_cpp_text(path) for path in (model.path, paths[0], parts[0])}
    assert len(texts) == 1
    assert texts.pop()


def llama_cpp_text(path: Path) -> str:
    """What llama.cpp says with greedy sampling, in a process of its own: it aborts on what it does not like."""
    if importlib.util.find_spec("xllamacpp") is None:
        pytest.skip("llama.cpp is the judge: pip install xllamacpp")
    program = """
import sys, xllamacpp
params = xllamacpp.CommonParams()
params.model.path = sys.argv[1]
params.n_ctx, params.n_parallel, params.warmup = 128, 1, False
params.cpuparams.n_threads = 1
server = xllamacpp.Server(params)
answer = server.handle_completions({"prompt": "the and", "n_predict": 12, "temperature": 0, "seed": 1})
print("TEXT", ascii(answer["choices"][0]["text"] if "choices" in answer else answer["content"]))
"""
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, timeout=120)
    lines = [line for line in done.stdout.splitlines() if line.startswith("TEXT ")]
    assert lines, done.stderr[-2000:]
    return lines[0]


@pytest.mark.parametrize(
    ("metadata", "tensors"),
    [
        ({"a": (256, "UINT8")}, []),
        ({"a": (-1, "UINT32")}, []),
        ({"a": (1.5, "INT32")}, []),
        ({"a": ("1", "INT32")}, []),
        ({"a": (1, "STRING")}, []),
        ({"a": (1, "WORD")}, []),
        ({"a": ([[1]], "ARRAY[INT32]")}, []),
        ({"a": ([[1]], "ARRAY[ARRAY]")}, []),
        ({"": (1, "UINT8")}, []),
        ({"general.alignment": (3, "UINT32")}, []),
        ({}, [plan("a", np.zeros(3, np.float32))] * 2),
        ({}, [TensorPlan("a", (0,), QUANT_TYPES["F32"], lambda: iter([]))]),
        ({}, [TensorPlan("a", (1, 1, 1, 1, 1), QUANT_TYPES["F32"], lambda: iter([b"0000"]))]),
    ],
)
def test_what_gguf_cannot_hold_is_refused_before_anything_is_written(
    tmp_path: Path, metadata: dict, tensors: list[TensorPlan]
) -> None:
    with pytest.raises(ParameterError):
        write_gguf(tmp_path / "a.gguf", metadata, tensors)
    assert list(tmp_path.iterdir()) == []


# -- trouble on the way ----------------------------------------------------------------------------------------------


def broken(chunks: Callable[[], Iterator[bytes]]) -> list[TensorPlan]:
    return [plan("a", np.ones((4, 8), np.float32)), TensorPlan("b", (4, 8), QUANT_TYPES["F32"], chunks)]


def too_few() -> Iterator[bytes]:
    yield bytes(127)


def too_many() -> Iterator[bytes]:
    yield bytes(128)
    yield bytes(1)


def fails() -> Iterator[bytes]:
    yield bytes(5)
    raise KeyboardInterrupt


def disk_full() -> Iterator[bytes]:
    yield bytes(5)
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("chunks", "error", "code"),
    [
        (too_few, EdgeLLMError, "WRITE_TENSOR"),
        (too_many, EdgeLLMError, "WRITE_TENSOR"),
        (fails, KeyboardInterrupt, None),
        (disk_full, EdgeLLMError, "WRITE_DISK"),
    ],
)
@pytest.mark.parametrize("limits", [{}, {"max_part_tensors": 1}])
def test_a_break_on_the_way_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, chunks: Callable, error: type[BaseException], code: str | None, limits: dict[str, int]
) -> None:
    old = write_gguf(tmp_path / "a.gguf", METADATA, broken(lambda: iter([bytes(128)])), **limits)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(before) == set(old)
    with pytest.raises(error) as raised:
        write_gguf(tmp_path / "a.gguf", METADATA, broken(chunks), **limits)
    assert code is None or getattr(raised.value, "code", None) == code
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_disk_without_room_is_refused_before_a_byte_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_writer, "SPARE_NBYTES", 1 << 60)
    with pytest.raises(EdgeLLMError, match="MB are free") as raised:
        write_gguf(tmp_path / "a.gguf", METADATA, [plan(*item) for item in arrays().items()])
    assert raised.value.code == "WRITE_DISK"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_disk_that_fills_up_is_an_error_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_writer, "LargePageWriter", lambda _: open("/dev/full", "wb"))  # noqa: SIM115
    with pytest.raises(EdgeLLMError, match="Make room") as raised:
        write_gguf(tmp_path / "a.gguf", METADATA, [plan(*item) for item in arrays().items()])
    assert raised.value.code == "WRITE_DISK"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["folder", "no/such/folder/a.gguf"])
def test_a_place_where_no_file_can_be_is_named(tmp_path: Path, place: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(EdgeLLMError) as raised:
        write_gguf(tmp_path / place, METADATA, [])
    assert raised.value.code == "WRITE_FAILED"
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_link_stays_a_link_to_the_new_file(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "a.gguf").symlink_to(tmp_path / "elsewhere" / "real.gguf")
    write_gguf(tmp_path / "a.gguf", METADATA, [])
    assert (tmp_path / "a.gguf").is_symlink()
    assert GGUFFile.open(tmp_path / "elsewhere" / "real.gguf").metadata["test.u8"] == 255


def test_a_model_may_replace_the_file_it_is_read_from(model: InputModel) -> None:
    before = model.path.read_bytes()
    write_gguf(model.path, model.metadata, copy(model))
    assert model.path.read_bytes() == before


WRITER = """
import sys, time, numpy as np
from edgellm.formats.gguf_writer import TensorPlan, write_gguf
from edgellm.formats.quant_types import QUANT_TYPES
path, limit = sys.argv[1], int(sys.argv[2])
print("ready", flush=True)
fill = 1
while True:
    fill = 3 - fill
    def chunks():
        for _ in range(64):
            yield np.full(1 << 12, fill, np.float32).tobytes()
    plans = [TensorPlan(f"t{i}", (64, 1 << 12), QUANT_TYPES["F32"], chunks) for i in range(4)]
    meta = {"general.architecture": ("llama", "STRING"), "test.fill": (fill, "UINT32")}
    write_gguf(path, meta, plans, max_part_tensors=limit or None)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGKILL")
def test_a_writer_killed_at_any_moment_leaves_a_whole_file(tmp_path: Path) -> None:
    moments = random.Random(0)
    path = tmp_path / "a.gguf"
    for _ in range(12):
        with subprocess.Popen([sys.executable, "-c", WRITER, path, "0"], stdout=subprocess.PIPE) as writer:
            assert writer.stdout is not None
            writer.stdout.readline()
            while not path.exists():
                time.sleep(0.001)
            time.sleep(moments.uniform(0, 0.05))
            writer.send_signal(signal.SIGKILL)
        with GGUFFile.open(path) as file:
            fill = file.metadata["test.fill"]
            assert all((tensor.dequantize() == fill).all() for tensor in file.tensors.values())
    write_gguf(path, METADATA, [])
    assert [left.name for left in tmp_path.iterdir()] == ["a.gguf"]


@pytest.mark.skipif(sys.platform == "win32", reason="holds a POSIX lock")
def test_a_file_that_another_run_still_writes_is_left_alone(tmp_path: Path) -> None:
    stale = tmp_path / ".a.gguf.dead.part"
    stale.write_bytes(b"half")
    with pytest.raises(KeyboardInterrupt), whole_file(tmp_path / "a.gguf") as other:
        assert not stale.exists()
        stale.write_bytes(b"half")
        write_gguf(tmp_path / "a.gguf", METADATA, [])
        assert Path(other.name).exists()
        assert not stale.exists()
        raise KeyboardInterrupt
    assert [left.name for left in tmp_path.iterdir()] == ["a.gguf"]
