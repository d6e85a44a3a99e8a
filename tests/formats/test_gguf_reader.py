"""The reader gives what was written, and what the judge reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf_files import write_gguf

from edgellm.formats.errors import FormatError
from edgellm.formats.gguf import GGUFFile
from edgellm.formats.validate import findings

METADATA = {
    "general.architecture": "test",
    "test.u32": 7,
    "test.u8": np.uint8(255),
    "test.i8": np.int8(-128),
    "test.u16": np.uint16(65535),
    "test.i16": np.int16(-32768),
    "test.i32": np.int32(-(1 << 31)),
    "test.u64": np.uint64((1 << 64) - 1),
    "test.i64": np.int64(-(1 << 63)),
    "test.f32": np.float32(1.5),
    "test.f64": np.float64(0.1),
    "test.yes": True,
    "test.no": False,
    "test.text": "naïve 你好 🙂",
    "test.empty": "",
    "test.words": ["", "a", "é", "word" * 1000],
    "test.floats": np.array([0.5, -2.0, np.inf], np.float32),
    "test.ints": np.array([-1, 0, 1], np.int32),
    "test.bools": np.array([True, False, True]),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    tensors = {
        "a.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b.weight": np.arange(24, dtype=np.float16).reshape(2, 3, 4),
        "c.weight": (np.full((4, 2 * 34), 1, np.uint8), "Q8_0"),
        "d.bias": np.array([1, 2, 3], np.float32),
    }
    return write_gguf(tmp_path / "test.gguf", METADATA, tensors)


def test_metadata_keeps_every_value_and_type(file: Path) -> None:
    with GGUFFile.open(file) as gguf:
        assert gguf.version == 3
        assert gguf.architecture == "test"
        for key, value in METADATA.items():
            got = gguf.metadata[key]
            if isinstance(value, np.ndarray):
                np.testing.assert_array_equal(got, value)
                assert got.dtype == value.dtype
            else:
                assert got == value
                assert type(got) in (int, float, bool, str, list)
        assert gguf.value_types["test.u8"] == "UINT8"
        assert gguf.value_types["test.words"] == "ARRAY[STRING]"
        assert gguf.value_types["test.floats"] == "ARRAY[FLOAT32]"


def test_tensors_have_numpy_shapes_and_their_bytes(file: Path) -> None:
    with GGUFFile.open(file) as gguf:
        assert gguf.tensors["a.weight"].shape == (2, 3)
        np.testing.assert_array_equal(
            gguf.tensors["a.weight"].dequantize(), np.arange(6, dtype=np.float32).reshape(2, 3)
        )
        assert gguf.tensors["b.weight"].shape == (2, 3, 4)
        assert gguf.tensors["b.weight"].data.shape == (6, 8)
        assert gguf.tensors["c.weight"].shape == (4, 64)
        assert gguf.tensors["c.weight"].data.shape == (4, 68)
        np.testing.assert_array_equal(gguf.tensors["d.bias"].dequantize(), [[1, 2, 3]])
        np.testing.assert_array_equal(gguf.tensors["b.weight"].dequantize(slice(5, 6)), [[20, 21, 22, 23]])


def test_tensor_data_is_read_only(file: Path) -> None:
    with GGUFFile.open(file) as gguf:
        assert not gguf.tensors["a.weight"].data.flags.writeable


def test_a_held_tensor_outlives_the_file(file: Path) -> None:
    gguf = GGUFFile.open(file)
    tensor = gguf.tensors["a.weight"]
    gguf.close()
    gguf.close()
    assert tensor.dequantize()[1, 2] == 5


def test_values_of_another_kind_are_refused_by_name(file: Path) -> None:
    with GGUFFile.open(file) as gguf:
        assert gguf.require("test.u32", int) == 7
        assert gguf.get("test.none", int, 3) == 3
        assert gguf.get("test.none", int) is None
        with pytest.raises(FormatError, match=r"test\.text") as caught:
            gguf.require("test.text", int)
        assert caught.value.code == "GGUF_KEY_TYPE"
        with pytest.raises(FormatError) as caught:
            gguf.get("test.yes", int)
        assert caught.value.code == "GGUF_KEY_TYPE"
        with pytest.raises(FormatError, match=r"test\.none") as caught:
            gguf.require("test.none", float)
        assert caught.value.code == "MODEL_HPARAMS"


@pytest.mark.slow  # the judge takes 20 s for the larger vocabulary
@pytest.mark.parametrize("model", ["smollm2_path", "gemma_path"])
def test_real_models_equal_the_judge(model: str, request: pytest.FixtureRequest) -> None:
    judge = pytest.importorskip("gguf", reason="gguf is the judge of the reader")
    path = request.getfixturevalue(model)
    theirs = judge.GGUFReader(path)
    with GGUFFile.open(path) as ours:
        assert list(ours.tensors) == [t.name for t in theirs.tensors]
        for t in theirs.tensors:
            tensor = ours.tensors[t.name]
            assert tensor.shape == tuple(int(n) for n in reversed(t.shape))
            assert tensor.quant.name == t.tensor_type.name
            assert tensor.data.tobytes() == t.data.tobytes()
        keys = [key for key in theirs.fields if not key.startswith("GGUF.")]
        assert list(ours.metadata) == keys
        for key in keys:
            value = theirs.fields[key].contents()
            if isinstance(value, list):
                assert list(ours.metadata[key]) == value
            else:
                assert ours.metadata[key] == value


@pytest.mark.parametrize("model", ["smollm2_path", "gemma_path"])
def test_real_models_have_no_findings(model: str, request: pytest.FixtureRequest) -> None:
    assert findings(request.getfixturevalue(model), check_tensors=True) == []


CUT_SHORT = ("GGUF_NOT_A_GGUF", "GGUF_COUNT", "GGUF_STRING_LENGTH", "GGUF_ARRAY_LENGTH", "MODEL_TRUNCATED")


def test_a_real_header_cut_anywhere_says_to_pull_again(smollm2_path: Path, tmp_path: Path) -> None:
    with GGUFFile.open(smollm2_path) as gguf:
        n_header = gguf.nbytes - sum(tensor.nbytes for tensor in gguf.tensors.values())
    with smollm2_path.open("rb") as file:
        header = file.read(n_header)
    path = tmp_path / "cut.gguf"
    for n in [*range(0, 400, 7), *range(400, n_header, n_header // 50)]:
        path.unlink(missing_ok=True)
        path.write_bytes(header[:n])
        with pytest.raises(FormatError, match="pull or download it again") as caught:
            GGUFFile.open(path)
        assert caught.value.code in CUT_SHORT
