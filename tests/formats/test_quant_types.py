"""Every tensor type unpacks to the very bits of the judge, and has its sizes."""

from __future__ import annotations

import ggml_library
import numpy as np
import pytest

from edgellm.formats.errors import UnsupportedError
from edgellm.formats.file_types import LABELS
from edgellm.formats.gguf import QuantizedTensor
from edgellm.formats.quant_types import QUANT_TYPES, QUANT_TYPES_BY_ID, QuantType

gguf = pytest.importorskip("gguf", reason="gguf is the judge of the tensor types")

ALL = list(QUANT_TYPES.values())
# types whose meaning the judge knows no code for: they are judged by hand below
BY_HAND = {"Q8_1", "Q8_K", "Q1_0", "Q2_0", "I8", "I16", "I32", "I64", "F64"}


def assert_same_bits(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Equal bit by bit; NaNs are equal whatever their payload."""
    assert ours.dtype == theirs.dtype == np.float32
    assert ours.shape == theirs.shape
    both_nan = np.isnan(ours) & np.isnan(theirs)
    different = (ours.view(np.uint32) != theirs.view(np.uint32)) & ~both_nan
    assert not different.any(), f"{different.sum():,} of {different.size:,} weights differ"


def judged(quant: QuantType, data: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        return gguf.quants.dequantize(data, gguf.GGMLQuantizationType[quant.name])


def test_every_type_of_the_judge_is_a_row() -> None:
    theirs = {t.name: (t.value, *gguf.GGML_QUANT_SIZES[t]) for t in gguf.GGMLQuantizationType}
    ours = {row.name: (row.id, row.block_size, row.block_nbytes) for row in ALL}
    assert {name: ours[name] for name in theirs if name in ours} == theirs
    assert all(QUANT_TYPES_BY_ID[row.id] is row for row in ALL)


@pytest.mark.parametrize("quant", [q for q in ALL if q.name not in BY_HAND], ids=lambda q: q.name)
def test_random_bytes_equal_the_judge(quant: QuantType) -> None:
    rng = np.random.default_rng(quant.id)
    data = rng.integers(0, 256, (33, 7 * quant.block_nbytes), np.uint8)  # NaN and infinite scales among them
    assert_same_bits(quant.dequantize(data), judged(quant, data))


@pytest.mark.parametrize("quant", [q for q in ALL if q.name not in BY_HAND], ids=lambda q: q.name)
def test_handmade_blocks_equal_the_judge(quant: QuantType) -> None:
    nbytes = quant.block_nbytes
    rows = [np.full(nbytes, byte, np.uint8) for byte in range(256)]  # all codes and scales alike: 0x00 to 0xFF
    for i in range(nbytes):
        for byte in (0x01, 0x80, 0x7F):  # one byte alone
            row = np.zeros(nbytes, np.uint8)
            row[i] = byte
            rows.append(row)
    rows += [np.roll(np.arange(nbytes, dtype=np.uint8), shift) for shift in range(8)]
    data = np.stack(rows)
    assert_same_bits(quant.dequantize(data), judged(quant, data))


@pytest.mark.parametrize("quant", [q for q in ALL if q.name not in BY_HAND], ids=lambda q: q.name)
def test_scales_of_every_size_equal_the_judge(quant: QuantType) -> None:
    """Blocks with every float16 as their scale, subnormal and huge ones too."""
    fields = quant.layout.fields or {}
    halves = [name for name, field in fields.items() if field[0] == np.dtype("<f2")]
    blocks = np.random.default_rng(1).integers(0, 256, (1 << 12, quant.block_nbytes), np.uint8)
    for name in halves:
        view = blocks.view(quant.layout)[:, 0]
        view[name] = np.arange(0, 1 << 16, 16, dtype=np.uint16).view(np.float16)
    assert_same_bits(quant.dequantize(blocks), judged(quant, blocks))


@pytest.mark.parametrize("name", ["I8", "I16", "I32", "I64", "F64"])
def test_plain_numbers_become_float32(name: str) -> None:
    quant = QUANT_TYPES[name]
    values = np.array([[-3, 0, 7], [100, -128, 127]], quant.layout)
    np.testing.assert_array_equal(quant.dequantize(values.view(np.uint8)), values.astype(np.float32))


def test_q1_0_is_plus_or_minus_its_scale() -> None:
    block = np.zeros(18, np.uint8)
    block[:2] = np.array([1.5], np.float16).view(np.uint8)
    block[2] = 0b0000_0101
    block[17] = 0b1000_0000
    expected = np.full(128, -1.5, np.float32)
    expected[[0, 2, 127]] = 1.5
    np.testing.assert_array_equal(QUANT_TYPES["Q1_0"].dequantize(block), expected)


def test_q2_0_is_one_of_four_multiples_of_its_scale() -> None:
    block = np.zeros(18, np.uint8)
    block[:2] = np.array([1.5], np.float16).view(np.uint8)
    block[2] = 0b11_10_01_00
    expected = np.full(64, -1.5, np.float32)
    expected[:4] = -1.5, 0, 1.5, 3
    np.testing.assert_array_equal(QUANT_TYPES["Q2_0"].dequantize(block), expected)


def test_every_type_has_the_name_and_the_sizes_of_ggml() -> None:
    for row in ALL:
        known = ggml_library.traits(row.id)
        assert known.name.decode().upper() == row.name
        if row.unpack:
            assert (known.block_size, known.block_nbytes) == (row.block_size, row.block_nbytes), row.name


@pytest.mark.parametrize("name", ["Q1_0", "Q2_0", "NVFP4", "MXFP4", "TQ1_0", "TQ2_0"])
def test_random_bytes_equal_ggml(name: str) -> None:
    quant = QUANT_TYPES[name]
    data = np.random.default_rng(quant.id).integers(0, 256, (33, 7 * quant.block_nbytes), np.uint8)
    assert_same_bits(quant.dequantize(data), ggml_library.dequantize(name, data))


def test_file_types_have_the_names_of_llama_cpp() -> None:
    names = {number: ggml_library.file_type_name(number) for number in range(64)}
    assert {number: name for number, name in names.items() if "unknown" not in name} == LABELS


def test_q8_k_is_its_float32_scale_times_int8() -> None:
    block = np.zeros(292, np.uint8)
    block[:4] = np.array([0.25], np.float32).view(np.uint8)
    q = np.arange(256, dtype=np.uint8)
    block[4:260] = q
    np.testing.assert_array_equal(QUANT_TYPES["Q8_K"].dequantize(block), q.view(np.int8) * np.float32(0.25))


def test_a_type_without_a_meaning_says_so() -> None:
    with pytest.raises(UnsupportedError, match="Q8_1") as caught:
        QUANT_TYPES["Q8_1"].dequantize(np.zeros(40, np.uint8))
    assert caught.value.code == "GGUF_TENSOR_TYPE"


@pytest.mark.parametrize("quant", [q for q in ALL if q.unpack], ids=lambda q: q.name)
def test_any_leading_shape_and_any_rows_of_a_tensor(quant: QuantType) -> None:
    rng = np.random.default_rng(0)
    data = rng.integers(0, 60, (6, 3 * quant.block_nbytes), np.uint8)
    whole = quant.dequantize(data)
    assert whole.shape == (6, 3 * quant.block_size)
    np.testing.assert_array_equal(quant.dequantize(data.reshape(2, 3, -1)), whole.reshape(2, 3, -1))
    np.testing.assert_array_equal(quant.dequantize(data[0]), whole[0])
    assert quant.dequantize(data[:0]).shape == (0, 3 * quant.block_size)
    tensor = QuantizedTensor("t", whole.shape, quant, data)
    np.testing.assert_array_equal(tensor.dequantize(), whole)
    np.testing.assert_array_equal(tensor.dequantize(slice(1, 6, 2)), whole[1:6:2])
    np.testing.assert_array_equal(tensor.dequantize(np.array([5, 0])), whole[[5, 0]])


@pytest.mark.parametrize("quant", [q for q in ALL if q.unpack], ids=lambda q: q.name)
def test_a_type_times_a_number_gives_weights_times_it(quant: QuantType) -> None:
    data = np.random.default_rng(0).integers(0, 60, (6, 3 * quant.block_nbytes), np.uint8)
    scaled = QuantizedTensor("t", (6, 3 * quant.block_size), quant.times(-0.3), data)
    np.testing.assert_array_equal(scaled.dequantize(), quant.dequantize(data) * np.float32(-0.3))
    assert scaled.quant.name != quant.name  # or a kernel of the type would take it


@pytest.mark.parametrize("quant", [q for q in ALL if q.unpack], ids=lambda q: q.name)
def test_finite_marks_the_blocks_whose_weights_are_not(quant: QuantType) -> None:
    rng = np.random.default_rng(2)
    data = rng.integers(0, 256, (4096, quant.block_nbytes), np.uint8)
    with np.errstate(all="ignore"):
        broken = ~np.isfinite(quant.dequantize(data)).all(axis=1)
    marked = ~quant.finite(data.reshape(-1))
    if quant.name not in ("F64", "Q8_K"):  # there a finite scale may still give a weight too large for float32
        assert not (broken & ~marked).any(), "a broken block went unseen"
    assert not (marked & ~broken).any(), "a sound block was marked"
