"""The encoders write llama.cpp's bytes: every type, with and without importance, on ordinary and on hostile rows."""

from __future__ import annotations

from collections.abc import Iterator

import ggml_library
import numpy as np
import pytest

from edgellm.formats.errors import NumericError, ParameterError, UnsupportedError
from edgellm.formats.quant_types import QUANT_TYPES
from edgellm.kernels.cpu import encode as encoding
from edgellm.kernels.cpu.compile import isa, jit, kernel_table
from edgellm.kernels.cpu.encode import RowEncoder, digest, encode
from edgellm.kernels.cpu.encoders import ENCODED, ENCODERS, WEIGHTED
from edgellm.kernels.cpu.encoders.digests import DIGESTS

QUANTIZED = [quant for quant in ENCODED if quant != "F32"]

# gguf's own quantizers, in numpy
GGUF_TYPES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4", "F16", "BF16")

# relative RMSE of normal rows: an upper bound per type, from what ggml's reference reaches
WORST_ERROR = (
    *(("F16", 3e-4), ("BF16", 3e-3), ("Q8_0", 0.006), ("Q6_K", 0.02), ("Q5_K", 0.04), ("Q5_1", 0.045), ("Q5_0", 0.05)),
    *(("Q4_K", 0.08), ("Q4_1", 0.09), ("IQ4_NL", 0.08), ("IQ4_XS", 0.08), ("Q4_0", 0.1), ("MXFP4", 0.13)),
    *(("Q3_K", 0.16), ("Q2_K", 0.3), ("TQ1_0", 0.9), ("TQ2_0", 0.9)),
)


def rows_of_every_kind(n_in: int, seed: int) -> Iterator[tuple[str, np.ndarray]]:
    rng = np.random.default_rng(seed)

    def normal(n: int, scale: float = 1.0) -> np.ndarray:
        return (rng.standard_normal((n, n_in)) * scale).astype(np.float32)

    outliers, small_outliers, sparse = normal(8, 0.01), normal(8, 1e-6), np.zeros((4, n_in), np.float32)
    outliers[np.arange(8), rng.integers(0, n_in, 8)] = 100
    small_outliers[np.arange(8), rng.integers(0, n_in, 8)] = -3e4
    sparse[:, ::37] = 1
    sparse[1:] *= np.array([[-1], [1e-3], [1e-20]], np.float32)
    half = normal(4)
    half[:, : n_in // 2] = 0
    yield "normal", normal(21, 0.02)
    yield "heavy tails", (rng.standard_t(2, (16, n_in)) * 0.05).astype(np.float32)
    yield "constant", np.repeat(normal(6)[:, :1], n_in, axis=1)
    yield "zero", np.zeros((3, n_in), np.float32)
    yield "subnormal", normal(5, 1e-40)
    yield "tiny", np.concatenate([normal(3, 1e-16), normal(3, 1e-12)])
    yield "large", rng.uniform(-65504, 65504, (5, n_in)).astype(np.float32)
    yield "largest", np.where(rng.random((5, n_in)) < 0.5, -65504, 65504).astype(np.float32)
    yield "one outlier", outliers
    yield "one outlier among tiny", small_outliers
    yield "sparse", sparse
    yield "half zero", half
    yield "of one sign", np.concatenate([np.abs(normal(4)), -np.abs(normal(4)) - 3])
    yield "ties", (rng.integers(-8, 8, (8, n_in)) / 16).astype(np.float32)
    yield "of all sizes", (rng.standard_normal((8, n_in)) * 10.0 ** rng.integers(-20, 10, (8, n_in))).astype(np.float32)
    yield "one row", normal(1)


def importances(n_in: int, seed: int) -> dict[str, np.ndarray | None]:
    rng = np.random.default_rng(seed)
    holes = rng.gamma(0.3, 1, n_in).astype(np.float32)
    holes[rng.random(n_in) < 0.3] = 0
    return {
        "none": None,
        "gamma": rng.gamma(0.5, 1, n_in).astype(np.float32),
        "holes": holes,
        "zero": np.zeros(n_in, np.float32),
    }


def differing_blocks(quant: str, ours: np.ndarray, theirs: np.ndarray) -> int:
    nbytes = QUANT_TYPES[quant].block_nbytes
    return int((ours.reshape(-1, nbytes) != theirs.reshape(-1, nbytes)).any(axis=1).sum())


@pytest.mark.parametrize("quant", QUANTIZED)
def test_every_block_is_llama_cpps_block(quant: str) -> None:
    # 288 and 1056: 9 and 33 blocks of 32, which leave the last eight lanes partly filled
    for n_in in (288, 1056) if QUANT_TYPES[quant].block_size <= 32 else (256, 768, 2048):
        for name, importance in importances(n_in, n_in).items():
            if importance is not None and quant not in WEIGHTED:
                continue
            for kind, rows in rows_of_every_kind(n_in, n_in + 1):
                wrong = differing_blocks(
                    quant, encode(quant, rows, importance), ggml_library.quantize(quant, rows, importance)
                )
                assert wrong == 0, f"{quant}, {kind} rows of {n_in}, importance {name}: {wrong} blocks differ"


@pytest.mark.parametrize("quant", GGUF_TYPES)
def test_blocks_are_those_of_the_gguf_package(quant: str) -> None:
    gguf = pytest.importorskip("gguf", reason="gguf's numpy quantizers are a second judge")
    for kind, rows in rows_of_every_kind(1024, 5):
        if kind in ("subnormal", "of all sizes", "sparse"):  # gguf: other subnormal scales, -0 for blocks of -0
            continue
        theirs = gguf.quants.quantize(rows, gguf.GGMLQuantizationType[quant]).view(np.uint8)
        assert differing_blocks(quant, encode(quant, rows), theirs.reshape(len(rows), -1)) == 0, kind


def test_mxfp4_takes_the_exponent_of_ggmls_rounded_logarithm() -> None:
    # just below a power of two log2 rounds up in float32; how far below depends on the exponent
    powers = np.ldexp(np.float64(1), np.arange(-147, 128)).astype(np.float32)
    below = (powers[:, None].view(np.int32) - np.arange(-2, 95)[None, :]).astype(np.int32).view(np.float32)
    rows = np.zeros((below.size, 32), np.float32)
    rows[:, 3] = np.maximum(below.reshape(-1), 0)
    assert differing_blocks("MXFP4", encode("MXFP4", rows), ggml_library.quantize("MXFP4", rows)) == 0


@pytest.mark.parametrize(("quant", "limit"), WORST_ERROR)
def test_a_round_trip_stays_near(quant: str, limit: float) -> None:
    rows = np.random.default_rng(0).standard_normal((32, 1024)).astype(np.float32)
    back = QUANT_TYPES[quant].dequantize(encode(quant, rows))
    assert float(np.sqrt(np.mean((back - rows) ** 2))) < limit


@pytest.mark.parametrize("quant", ["F32", "F16", "Q8_0", "Q4_K"])
def test_threads_write_the_same_bytes(quant: str) -> None:
    rows = np.random.default_rng(1).standard_normal((1500, 512)).astype(np.float32)
    assert np.array_equal(encode(quant, rows), encode(quant, rows, n_threads=3))


def test_rows_of_any_memory_layout_are_taken() -> None:
    rows = np.random.default_rng(2).standard_normal((6, 512)).astype(np.float32)
    assert np.array_equal(encode("Q4_K", np.asfortranarray(rows)[::2]), encode("Q4_K", rows[::2].copy()))
    assert encode("Q6_K", np.empty((0, 256), np.float32)).shape == (0, 210)


def test_an_encoder_fills_the_array_it_is_given() -> None:
    rows, out = np.full((4, 64), 127, np.float32), np.empty((4, 68), np.uint8)
    assert RowEncoder("Q8_0", 64)(rows, out) is out
    assert np.array_equal(QUANT_TYPES["Q8_0"].dequantize(out), rows)


def test_what_cannot_be_encoded_is_named() -> None:
    with pytest.raises(UnsupportedError, match="cannot write IQ2_XXS"):
        encode("IQ2_XXS", np.zeros((1, 256), np.float32))
    with pytest.raises(ParameterError, match="100 weights is no whole number of Q4_K blocks"):
        encode("Q4_K", np.zeros((1, 100), np.float32))
    with pytest.raises(ParameterError, match=r"shape \(32,\) where 64 columns"):
        encode("Q4_0", np.zeros((1, 64), np.float32), np.ones(32, np.float32))
    with pytest.raises(NumericError, match="negative or not finite"):
        encode("Q4_0", np.zeros((1, 64), np.float32), np.full(64, np.nan, np.float32))


def test_every_encoder_has_a_digest_made_by_llama_cpp() -> None:
    assert set(DIGESTS) == set(ENCODERS)
    rows, importance = encoding.trial_rows()
    for name in ("encode_q4_k_weighted", "encode_q8_0"):
        quant = name.removeprefix("encode_").removesuffix("_weighted").upper()
        theirs = ggml_library.quantize(quant, rows, importance if name.endswith("_weighted") else None)
        assert encoding.zlib.crc32(theirs) == DIGESTS[name]


@pytest.mark.parametrize("name", ["encode_q4_k_weighted", "encode_q3_k", "encode_mxfp4", "encode_f16"])
def test_the_portable_form_writes_the_same_bytes(name: str) -> None:
    portable = isa.detect("portable")
    memory = jit.CodeMemory()
    code = jit.compile_object(name, kernel_table.function(name), portable)
    assert digest(name, encoding._KERNEL(memory.load(name, code))) == DIGESTS[name]


def test_a_form_that_writes_wrong_bytes_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setenv("EDGELLM_KERNEL_CACHE", str(tmp_path))
    monkeypatch.setitem(DIGESTS, "encode_tq2_0", 1)
    with pytest.warns(RuntimeWarning, match="writes wrong bytes on this CPU"), pytest.raises(UnsupportedError):
        encoding._Kernels().function("encode_tq2_0")
