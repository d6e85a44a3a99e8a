"""Every hostile file is refused by its named error, at once, and without taking more memory than the file has."""

from __future__ import annotations

import os
import socket
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import raw_gguf as raw

from edgellm.formats.errors import EdgeLLMError, FormatError, ModelNotFoundError, UnsupportedError
from edgellm.formats.gguf import GGUFFile
from edgellm.formats.quant_types import QUANT_TYPES
from edgellm.formats.validate import findings

HANG_GUARD_S = 10
ARCHITECTURE = raw.kv("general.architecture", raw.STRING, "test")
A = raw.tensor("a", [32], 0, 0)  # 32 float32
BIG = 1 << 63


def model(*kvs: bytes) -> bytes:
    return raw.gguf_bytes([ARCHITECTURE, *kvs])


def tensors(*records: bytes, data: int = 256) -> bytes:
    return raw.gguf_bytes([ARCHITECTURE], records, bytes(data))


def unknown_type(kind: int) -> bytes:
    return raw.string("test.key") + struct.pack("<IQ", kind, 0)


def nested(depth: int) -> bytes:
    return raw.string("test.key") + struct.pack("<I", raw.ARRAY) + struct.pack("<IQ", raw.ARRAY, 1) * depth


# row of the table of hostile inputs, what it is, the file, the error it must give
CASES: list[tuple[int, str, bytes, str]] = [
    (1, "empty", b"", "GGUF_NOT_A_GGUF"),
    (1, "four bytes", b"GGUF", "GGUF_NOT_A_GGUF"),
    (1, "23 bytes", model()[:23], "GGUF_NOT_A_GGUF"),
    (1, "bad magic", raw.gguf_bytes(magic=b"GGML"), "GGUF_NOT_A_GGUF"),
    (1, "html", b"<!DOCTYPE html><html><head><title>Sign in</title></head></html>", "GGUF_NOT_A_GGUF"),
    (1, "version 0", raw.gguf_bytes(version=0), "GGUF_VERSION"),
    (1, "version 1", raw.gguf_bytes(version=1), "GGUF_VERSION"),
    (1, "version 4", raw.gguf_bytes(version=4), "GGUF_VERSION"),
    (1, "version of the other byte order", raw.gguf_bytes(version=3 << 24), "GGUF_VERSION"),
    (2, "2^63 keys", raw.gguf_bytes(n_kv=BIG), "GGUF_COUNT"),
    (2, "-1 keys", raw.gguf_bytes(n_kv=2 * BIG - 1), "GGUF_COUNT"),
    (2, "2^60 keys, whose size wraps", raw.gguf_bytes(n_kv=1 << 60), "GGUF_COUNT"),
    (2, "2^63 tensors", raw.gguf_bytes(n_tensors=BIG), "GGUF_COUNT"),
    (2, "-1 tensors", raw.gguf_bytes(n_tensors=2 * BIG - 1), "GGUF_COUNT"),
    (2, "more keys than bytes", raw.gguf_bytes([ARCHITECTURE], n_kv=10), "GGUF_COUNT"),
    (2, "more tensors than any model", raw.gguf_bytes([], [bytes(33)] * 33_000), "GGUF_COUNT"),
    (2, "more keys than any model", raw.gguf_bytes([bytes(14)] * 70_000), "GGUF_COUNT"),
    (3, "key of 2^63 bytes", raw.gguf_bytes([raw.string("key", BIG) + bytes(8)]), "GGUF_STRING_LENGTH"),
    (3, "key of -1 bytes", raw.gguf_bytes([raw.string("key", 2 * BIG - 1) + bytes(8)]), "GGUF_STRING_LENGTH"),
    (
        3,
        "value longer than the file",
        model(raw.string("test.s") + struct.pack("<I", raw.STRING) + raw.string("x", 4096)),
        "GGUF_STRING_LENGTH",
    ),
    (
        3,
        "string of an array too long",
        model(raw.kv_array("t", raw.STRING, [], 1) + struct.pack("<Q", BIG)),
        "GGUF_STRING_LENGTH",
    ),
    (4, "array of 2^63 bytes", model(raw.kv_array("test.a", raw.U8, [], BIG)), "GGUF_ARRAY_LENGTH"),
    (
        4,
        "array of 2^61 u64, whose size wraps",
        model(raw.kv_array("test.a", raw.U64, [], 1 << 61)),
        "GGUF_ARRAY_LENGTH",
    ),
    (4, "array of 2^63 strings", model(raw.kv_array("test.a", raw.STRING, [], BIG)), "GGUF_ARRAY_LENGTH"),
    (4, "array longer than the file", model(raw.kv_array("test.a", raw.F32, [1.0], 1000)), "GGUF_ARRAY_LENGTH"),
    (5, "nested array", model(nested(2)), "GGUF_NESTED_ARRAY"),
    (5, "array nested 10,000 deep", model(nested(10_000)), "GGUF_NESTED_ARRAY"),
    (6, "empty key", model(raw.kv("", raw.U32, 1)), "GGUF_KEY"),
    (6, "key twice", model(raw.kv("test.k", raw.U32, 1), raw.kv("test.k", raw.U32, 1)), "GGUF_KEY"),
    (6, "key that is no UTF-8", model(raw.kv(b"test.\xff", raw.U32, 1)), "GGUF_KEY"),
    (6, "key of 70,000 bytes", model(raw.kv("k" * 70_000, raw.U32, 1)), "GGUF_KEY"),
    (6, "value type 13", model(unknown_type(13)), "GGUF_KEY"),
    (6, "value type 2^32 - 1", model(unknown_type((1 << 32) - 1)), "GGUF_KEY"),
    (
        6,
        "array of value type 99",
        model(raw.string("test.a") + struct.pack("<IIQ", raw.ARRAY, 99, 1) + bytes(8)),
        "GGUF_KEY",
    ),
    (7, "architecture that is a number", raw.gguf_bytes([raw.kv("general.architecture", raw.U32, 1)]), "GGUF_KEY_TYPE"),
    (7, "chat template that is an array", model(raw.kv_array("tokenizer.chat_template", raw.U8, [1])), "GGUF_KEY_TYPE"),
    (7, "block_count that is a string", model(raw.kv("test.block_count", raw.STRING, "4")), "GGUF_KEY_TYPE"),
    (7, "block_count that is a bool", model(raw.kv("test.block_count", raw.BOOL, 1)), "GGUF_KEY_TYPE"),
    (8, "alignment 0", model(raw.kv("general.alignment", raw.U32, 0)), "GGUF_ALIGNMENT"),
    (8, "alignment 13", model(raw.kv("general.alignment", raw.U32, 13)), "GGUF_ALIGNMENT"),
    (8, "alignment of type INT32", model(raw.kv("general.alignment", raw.I32, 32)), "GGUF_ALIGNMENT"),
    (8, "alignment of type BOOL", model(raw.kv("general.alignment", raw.BOOL, 1)), "GGUF_ALIGNMENT"),
    (8, "alignment 2^31", model(raw.kv("general.alignment", raw.U32, 1 << 31)), "GGUF_ALIGNMENT"),
    (8, "alignment that is an array", model(raw.kv_array("general.alignment", raw.STRING, ["32"])), "GGUF_ALIGNMENT"),
    (9, "2^32 - 1 dimensions", tensors(raw.tensor("a", [32], n_dims=(1 << 32) - 1)), "GGUF_DIMS"),
    (9, "no dimension", tensors(raw.tensor("a", [])), "GGUF_DIMS"),
    (9, "five dimensions", tensors(raw.tensor("a", [1] * 5)), "GGUF_DIMS"),
    (9, "dimension 0", tensors(raw.tensor("a", [32, 0])), "GGUF_DIMS"),
    (9, "dimension -1", tensors(raw.tensor("a", [-1])), "GGUF_DIMS"),
    (10, "2^32 x 2^32 weights", tensors(raw.tensor("a", [1 << 32, 1 << 32])), "GGUF_TENSOR_SIZE"),
    (10, "2^62 weights of 4 bytes", tensors(raw.tensor("a", [1 << 62])), "GGUF_TENSOR_SIZE"),
    (10, "2^62 x 4 weights of Q8_0", tensors(raw.tensor("a", [1 << 62, 4], 8)), "GGUF_TENSOR_SIZE"),
    (10, "product that wraps to 32", tensors(raw.tensor("a", [(1 << 62) + 8, 4])), "GGUF_TENSOR_SIZE"),
    (
        11,
        "sizes that add up to 2^62",
        raw.gguf_bytes([], [raw.tensor(f"t{i:05}", [1 << 45], 0, i << 47) for i in range(1 << 15)]),
        "GGUF_TENSOR_SIZE",
    ),
    (
        11,
        "two sizes no process can hold",
        tensors(*(raw.tensor(n, [(1 << 44) + 32]) for n in "ab")),
        "GGUF_TENSOR_SIZE",
    ),
    (12, "offset beyond the file", tensors(A, raw.tensor("b", [32], 0, 4096)), "GGUF_TENSOR_BOUNDS"),
    (12, "offset 2^64 - 32, before the data", tensors(A, raw.tensor("b", [8], 0, 2 * BIG - 32)), "GGUF_TENSOR_BOUNDS"),
    (12, "offset 2^63", tensors(A, raw.tensor("b", [8], 0, BIG)), "GGUF_TENSOR_BOUNDS"),
    (12, "offset off the alignment", tensors(A, raw.tensor("b", [8], 0, 132)), "GGUF_TENSOR_BOUNDS"),
    (12, "only tensor beyond the file", tensors(raw.tensor("a", [8], 0, 4096)), "GGUF_TENSOR_BOUNDS"),
    (13, "two tensors at one place", tensors(A, raw.tensor("b", [32], 0, 0)), "GGUF_TENSOR_OVERLAP"),
    (13, "tail in the neighbour", tensors(A, raw.tensor("b", [8], 0, 96)), "GGUF_TENSOR_OVERLAP"),
    (
        13,
        "small one inside a big one",
        tensors(raw.tensor("a", [64]), raw.tensor("b", [8], 0, 32)),
        "GGUF_TENSOR_OVERLAP",
    ),
    (13, "overlap listed backwards", tensors(raw.tensor("b", [8], 0, 96), A), "GGUF_TENSOR_OVERLAP"),
    (14, "row of half a block", tensors(raw.tensor("a", [16], 8)), "GGUF_TENSOR_TYPE"),
    (14, "row of a block and a half", tensors(raw.tensor("a", [384, 2], 12)), "GGUF_TENSOR_TYPE"),
    (14, "type 10,000", tensors(raw.tensor("a", [32], 10_000)), "GGUF_TENSOR_TYPE"),
    (14, "removed type Q4_2", tensors(raw.tensor("a", [32], 4)), "GGUF_TENSOR_TYPE"),
    (14, "removed type Q4_0_4_4", tensors(raw.tensor("a", [32], 31)), "GGUF_TENSOR_TYPE"),
    (14, "type of ik_llama.cpp", tensors(raw.tensor("a", [256], 139)), "GGUF_TENSOR_TYPE"),
    (15, "last byte missing", tensors(A, data=127), "MODEL_TRUNCATED"),
    (15, "no data at all", tensors(A, data=0), "MODEL_TRUNCATED"),
    (
        15,
        "second of three tensors cut",
        tensors(*(raw.tensor(n, [32], 0, 128 * i) for i, n in enumerate("abc")), data=200),
        "MODEL_TRUNCATED",
    ),
    (15, "cut inside a metadata value", model(raw.kv("test.k", raw.U64, 1))[:-3], "MODEL_TRUNCATED"),
    (15, "cut inside a string", model(raw.kv("test.k", raw.STRING, "x" * 90))[:-1], "MODEL_TRUNCATED"),
    (16, "no layers", model(raw.kv("test.block_count", raw.U32, 0)), "MODEL_HPARAMS"),
    (16, "513 layers", model(raw.kv("test.block_count", raw.U32, 513)), "MODEL_HPARAMS"),
    (16, "2^32 layers", model(raw.kv("test.block_count", raw.U64, 1 << 32)), "MODEL_HPARAMS"),
    (16, "context of 2^40", model(raw.kv("test.context_length", raw.U64, 1 << 40)), "MODEL_HPARAMS"),
    (16, "odd rope dimensions", model(raw.kv("test.rope.dimension_count", raw.U32, 63)), "MODEL_HPARAMS"),
    (
        16,
        "odd rope dimensions of one layer",
        model(raw.kv_array("test.rope.dimension_count", raw.U32, [2, 63, 128])),
        "MODEL_HPARAMS",
    ),
    (16, "negative heads", model(raw.kv("test.attention.head_count", raw.I32, -8)), "MODEL_HPARAMS"),
    (16, "rope base that is no number", model(raw.kv("test.rope.freq_base", raw.F32, float("nan"))), "MODEL_HPARAMS"),
    (
        16,
        "epsilon that is infinite",
        model(raw.kv("test.attention.layer_norm_rms_epsilon", raw.F32, float("inf"))),
        "MODEL_HPARAMS",
    ),
    (6, "tensor name twice", tensors(A, A), "GGUF_TENSOR_NAME"),
    (6, "empty tensor name", tensors(raw.tensor("", [32])), "GGUF_TENSOR_NAME"),
]


def refused(path: Path, nbytes: int) -> EdgeLLMError:
    """The error of opening ``path``; it comes at once, and takes memory in proportion to the file."""
    started = time.thread_time()  # a machine that is busy, or asleep, is no hang
    tracemalloc.start()
    try:
        with pytest.raises(EdgeLLMError) as caught:
            GGUFFile.open(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert time.thread_time() - started < HANG_GUARD_S
    # a tensor record of 41 bytes becomes an object of some 400
    assert peak < (1 << 20) + 16 * nbytes, f"{peak:,} bytes for a file of {nbytes:,}"
    return caught.value


@pytest.mark.parametrize(("row", "what", "data", "code"), CASES, ids=[f"row {c[0]}: {c[1]}" for c in CASES])
def test_hostile_file_is_refused_by_name(row: int, what: str, data: bytes, code: str, tmp_path: Path) -> None:
    path = tmp_path / "hostile.gguf"
    path.write_bytes(data)
    error = refused(path, len(data))
    assert error.code == code, str(error)
    assert isinstance(error, FormatError | UnsupportedError)
    message = str(error)
    assert message.startswith("hostile.gguf: ")  # which file
    assert "(byte " in message or not data  # where
    assert message.count(". ") >= 1 and len(message) < 1500  # what to do; no flood
    assert error.finding in findings(path)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("start", "kind"),
    [
        (b"<!DOCTYPE html>", "HTML"),
        (b"\xef\xbb\xbf\n <html lang='en'>", "HTML"),
        (b"version https://git-lfs.github.com/spec/v1", "Git LFS pointer"),
        (b"PK\x03\x04", "zip"),
        (b'{"error": "Repository not found"}', "JSON"),
        (b"lmgg\x01", "before GGUF"),
        (b"\x40\x00\x00\x00\x00\x00\x00\x00" + b'{"__metadata__"', "safetensors"),
    ],
)
def test_what_people_save_by_mistake_is_recognised(start: bytes, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(start.ljust(200))
    with pytest.raises(FormatError, match=kind) as caught:
        GGUFFile.open(path)
    assert caught.value.code == "GGUF_NOT_A_GGUF"


def test_a_safetensors_file_leads_to_the_conversion(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes((64).to_bytes(8, "little") + b'{"a":' + bytes(100))
    with pytest.raises(FormatError, match=r"safetensors file.*edgellm convert"):
        GGUFFile.open(path)


def test_big_endian_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + bytes(40))
    with pytest.raises(FormatError, match="big-endian") as caught:
        GGUFFile.open(path)
    assert caught.value.code == "GGUF_VERSION"


def test_missing_tail_says_how_much_and_what_to_do(tmp_path: Path) -> None:
    data = tensors(A, raw.tensor("b", [1024], 0, 128), data=128 + 4096)
    path = tmp_path / "model.gguf"
    path.write_bytes(data[:-1234])
    with pytest.raises(FormatError, match=r"1,234 bytes are missing.*pull") as caught:
        GGUFFile.open(path)
    assert caught.value.code == "MODEL_TRUNCATED"


def test_errors_name_the_key_or_the_tensor_and_the_byte(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(model(raw.kv("general.alignment", raw.U32, 13)))
    (found,) = findings(path)
    assert found.name == "general.alignment"
    assert found.offset == 24 + len(ARCHITECTURE)
    path.write_bytes(tensors(A, raw.tensor("blk.0.attn_q.weight", [16], 8, 128)))
    (found,) = findings(path)
    assert found.name == "blk.0.attn_q.weight"
    assert found.offset == 24 + len(ARCHITECTURE) + len(A)


@pytest.mark.parametrize(
    ("type_id", "words"),
    [(31, "Q4_0_4_4, which ggml removed"), (139, "IQ4_K, a type of ik_llama.cpp"), (43, "type 43, which is unknown")],
)
def test_a_type_that_cannot_be_read_is_named_with_the_way_out(type_id: int, words: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(tensors(raw.tensor("a", [256], type_id)))
    with pytest.raises(UnsupportedError, match=f"{words}.*Take the model in another type, such as Q4_K_M"):
        GGUFFile.open(path)


def test_control_characters_of_a_name_do_not_reach_the_terminal(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(tensors(raw.tensor("\x1b]0;owned\x07\n" + "x" * 1000, [16], 8)))
    with pytest.raises(FormatError) as caught:
        GGUFFile.open(path)
    assert "\x1b" not in str(caught.value) and "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_verify_reports_everything_it_can(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    data = raw.gguf_bytes(
        [ARCHITECTURE, raw.kv("test.block_count", raw.U32, 0), raw.kv("test.block_count", raw.U32, 1)],
        [
            A,
            raw.tensor("b", [16], 8),
            raw.tensor("c", [8], 0, 64),
            raw.tensor("d", [8], 99),
            raw.tensor("e", [8], 0, 1 << 20),
        ],
        bytes(256),
    )
    path.write_bytes(data)
    codes = [found.code for found in findings(path)]
    assert sorted(codes) == [
        *["GGUF_KEY", "GGUF_TENSOR_BOUNDS", "GGUF_TENSOR_OVERLAP", "GGUF_TENSOR_TYPE", "GGUF_TENSOR_TYPE"],
        "MODEL_HPARAMS",
    ]


def test_verify_ends_a_long_list(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(raw.gguf_bytes([raw.kv("", raw.U16, 1)] * 5000))
    assert len(findings(path)) == 200


def test_sound_file_has_no_findings(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(tensors(A, raw.tensor("b", [32], 0, 128)))
    assert findings(path) == []
    GGUFFile.open(path).close()


def test_gaps_between_tensors_and_version_2_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(raw.gguf_bytes([ARCHITECTURE], [raw.tensor("b", [8], 0, 192), A], bytes(224), version=2))
    with GGUFFile.open(path) as gguf:
        assert gguf.version == 2
        assert list(gguf.tensors) == ["b", "a"]


def test_alignment_of_the_file_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    alignment = raw.kv("general.alignment", raw.U32, 128)
    data = raw.gguf_bytes([ARCHITECTURE, alignment], [A], struct.pack("<32f", *range(32)), alignment=128)
    path.write_bytes(data)
    with GGUFFile.open(path) as gguf:
        assert gguf.tensors["a"].dequantize()[0, 31] == 31


# -- row 21: weights -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Q4_0", "Q8_0", "Q4_K", "Q6_K", "IQ1_M", "F16", "BF16", "F32"])
def test_nan_and_infinite_scales_are_found_by_tensor_and_block(name: str, tmp_path: Path) -> None:
    quant = QUANT_TYPES[name]
    block, sound = 5, bytes([1]) * quant.block_nbytes
    broken = bytes([0xFF]) * quant.block_nbytes
    record = raw.tensor("blk.0.ffn_up.weight", [quant.block_size * 4, 2], quant.id)
    data = raw.gguf_bytes([ARCHITECTURE], [record], sound * block + broken + sound * (7 - block))
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    assert findings(path) == []
    (found,) = findings(path, check_tensors=True)
    assert (found.code, found.name) == ("TENSOR_NAN", "blk.0.ffn_up.weight")
    assert f"block {block} " in found.message
    assert found.offset == len(data) - (8 - block) * quant.block_nbytes


def test_matrix_of_zeros_is_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(tensors(raw.tensor("a", [32, 2])))
    (found,) = findings(path, check_tensors=True)
    assert (found.code, found.severity) == ("TENSOR_ZERO", "warning")


# -- row 23: not a file ----------------------------------------------------------------------------------------------


def test_directory_is_not_a_model(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="directory") as caught:
        GGUFFile.open(tmp_path)
    assert caught.value.code == "MODEL_NOT_A_FILE"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.gguf")
    with pytest.raises(FormatError, match="pipe") as caught:
        GGUFFile.open(tmp_path / "model.gguf")
    assert caught.value.code == "MODEL_NOT_A_FILE"


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="this system has no /dev/zero")
def test_device_is_refused() -> None:
    with pytest.raises(FormatError, match="device") as caught:
        GGUFFile.open("/dev/zero")
    assert caught.value.code == "MODEL_NOT_A_FILE"


@pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="this system has no Unix sockets")
def test_socket_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the path of a socket is short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("model.gguf")
        with pytest.raises(EdgeLLMError) as caught:
            GGUFFile.open("model.gguf")
    assert caught.value.code in ("MODEL_NOT_A_FILE", "MODEL_UNREADABLE")


def test_link_to_a_file_is_followed(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(model())
    link = tmp_path / "model.gguf"
    try:
        link.symlink_to("blob")
    except OSError:
        pytest.skip("this system lets nobody make links")
    with GGUFFile.open(link) as gguf:
        assert gguf.architecture == "test"


def test_missing_file_and_impossible_path_have_names(tmp_path: Path) -> None:
    for path in (tmp_path / "none.gguf", tmp_path / "none" / "none.gguf", tmp_path / "x" / ("y" * 5000)):
        with pytest.raises(EdgeLLMError) as caught:
            GGUFFile.open(path)
        assert caught.value.code in ("MODEL_NOT_FOUND", "MODEL_UNREADABLE")
    with pytest.raises(ModelNotFoundError):
        GGUFFile.open(tmp_path / "none.gguf")
    with pytest.raises(EdgeLLMError) as caught:
        GGUFFile.open("a\0b")
    assert caught.value.code == "MODEL_UNREADABLE"


# -- many strings ----------------------------------------------------------------------------------------------------


def many_strings(n: int) -> bytes:
    return model(raw.string("test.a") + struct.pack("<IIQ", raw.ARRAY, raw.STRING, n) + bytes(8 * n))


@pytest.mark.parametrize(("make", "code"), [(lambda: many_strings((1 << 21) + 1), "GGUF_ARRAY_LENGTH")])
def test_more_strings_than_any_vocabulary_are_refused(make: Callable[[], bytes], code: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    data = make()
    path.write_bytes(data)
    assert refused(path, len(data)).code == code
