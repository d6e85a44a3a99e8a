"""A vocabulary that would break a tokenizer is refused when the file is opened, or found by a verification."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import raw_gguf as raw

from edgellm.formats.errors import FormatError, ParameterError
from edgellm.formats.findings import Finding
from edgellm.formats.gguf import GGUFFile
from edgellm.formats.validate import findings

T = "tokenizer.ggml."
WORDS: list[str | bytes] = ["<unk>", "<s>", "</s>", "<0x0A>", "<0xfF>", "a", "b", "ab", "caf\u00e9"]
TYPES = [2, 3, 3, 6, 6, 1, 1, 1, 1]


def vocabulary(
    *more: bytes,
    words: Sequence[str | bytes] = WORDS,
    types: Sequence[int] = TYPES,
    leave_out: Sequence[str] = (),
    rows: int | None = None,
) -> bytes:
    """A file with a sound SentencePiece vocabulary of nine tokens, but for what the arguments change."""
    keys = {
        "general.architecture": raw.kv("general.architecture", raw.STRING, "test"),
        T + "model": raw.kv(T + "model", raw.STRING, "llama"),
        T + "tokens": raw.kv_array(T + "tokens", raw.STRING, words),
        T + "scores": raw.kv_array(T + "scores", raw.F32, [0.0] * len(words)),
        T + "token_type": raw.kv_array(T + "token_type", raw.I32, types),
        T + "bos_token_id": raw.kv(T + "bos_token_id", raw.U32, 1),
    }
    kvs = [record for key, record in keys.items() if key not in leave_out]
    n_rows = len(words) if rows is None else rows
    return raw.gguf_bytes([*kvs, *more], [raw.tensor("token_embd.weight", [8, n_rows])], bytes(32 * n_rows))


def without(key: str, *more: bytes) -> bytes:
    return vocabulary(*more, leave_out=[T + key])


# row of the table of hostile inputs, what it is, the file, the error it must give
CASES: list[tuple[int, str, bytes, str]] = [
    (7, "scores of bytes", without("scores", raw.kv_array(T + "scores", raw.U8, [0] * 9)), "GGUF_KEY_TYPE"),
    (7, "types of bytes", without("token_type", raw.kv_array(T + "token_type", raw.I8, TYPES)), "GGUF_KEY_TYPE"),
    (7, "tokens that are numbers", without("tokens", raw.kv_array(T + "tokens", raw.I32, [1])), "GGUF_KEY_TYPE"),
    (7, "tokens that are a string", without("tokens", raw.kv(T + "tokens", raw.STRING, "a")), "GGUF_KEY_TYPE"),
    (7, "merges that are numbers", vocabulary(raw.kv_array(T + "merges", raw.U32, [1])), "GGUF_KEY_TYPE"),
    (7, "model that is a number", without("model", raw.kv(T + "model", raw.U32, 1)), "GGUF_KEY_TYPE"),
    (7, "add_bos that is a number", vocabulary(raw.kv(T + "add_bos_token", raw.U32, 1)), "GGUF_KEY_TYPE"),
    (7, "id that is a string", vocabulary(raw.kv(T + "eos_token_id", raw.STRING, "2")), "GGUF_KEY_TYPE"),
    (7, "id that is a float", vocabulary(raw.kv(T + "eos_token_id", raw.F32, 2.0)), "GGUF_KEY_TYPE"),
    (17, "scores shorter", without("scores", raw.kv_array(T + "scores", raw.F32, [0.0] * 8)), "VOCAB_INVALID"),
    (17, "types shorter", vocabulary(types=TYPES[:-1]), "VOCAB_INVALID"),
    (17, "types longer", vocabulary(types=[*TYPES, 1]), "VOCAB_INVALID"),
    (17, "no scores at all", without("scores", raw.kv_array(T + "scores", raw.F32, [])), "VOCAB_INVALID"),
    (17, "byte token <0x-1>", vocabulary(words=[*WORDS[:3], "<0x-1>", *WORDS[4:]]), "VOCAB_INVALID"),
    (17, "byte token <0x100>", vocabulary(words=[*WORDS[:3], "<0x100>", *WORDS[4:]]), "VOCAB_INVALID"),
    (17, "byte token that is empty", vocabulary(words=[*WORDS[:3], "", *WORDS[4:]]), "VOCAB_INVALID"),
    (17, "token type 7", vocabulary(types=[*TYPES[:-1], 7]), "VOCAB_INVALID"),
    (17, "token type -1", vocabulary(types=[*TYPES[:-1], -1]), "VOCAB_INVALID"),
    (
        17,
        "score that is no number",
        without("scores", raw.kv_array(T + "scores", raw.F32, [float("nan")] * 9)),
        "VOCAB_INVALID",
    ),
    (18, "bos beyond", without("bos_token_id", raw.kv(T + "bos_token_id", raw.U32, 9)), "VOCAB_SPECIAL_ID"),
    (
        18,
        "eos beyond that texts get",
        vocabulary(raw.kv(T + "add_eos_token", raw.BOOL, 1), raw.kv(T + "eos_token_id", raw.U32, (1 << 32) - 1)),
        "VOCAB_SPECIAL_ID",
    ),
    (7, "end ids that are a string", vocabulary(raw.kv(T + "eos_token_ids", raw.STRING, "2")), "GGUF_KEY_TYPE"),
    (7, "end ids that are floats", vocabulary(raw.kv_array(T + "eos_token_ids", raw.F32, [2.0])), "GGUF_KEY_TYPE"),
    (7, "suppressed texts", vocabulary(raw.kv(T + "suppress_tokens", raw.STRING, "2")), "GGUF_KEY_TYPE"),
    (18, "embedding with fewer rows", vocabulary(rows=8), "VOCAB_SPECIAL_ID"),
    (18, "embedding with more rows", vocabulary(rows=10), "VOCAB_SPECIAL_ID"),
    (
        18,
        "add_bos without a bos",
        vocabulary(
            raw.kv(T + "add_bos_token", raw.BOOL, 1),
            raw.kv(T + "model", raw.STRING, "gpt2"),
            leave_out=[T + "bos_token_id", T + "model"],
        ),
        "VOCAB_SPECIAL_ID",
    ),
    (19, "token of 64 KiB and one", vocabulary(words=[*WORDS[:8], "x" * 65_537]), "VOCAB_INVALID"),
    (19, "token of wide characters", vocabulary(words=[*WORDS[:8], "\U0001f600" * 16_385]), "VOCAB_INVALID"),
]


def found_by(tmp_path: Path, data: bytes) -> list[Finding]:
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    return findings(path)


@pytest.mark.parametrize(("row", "what", "data", "code"), CASES, ids=[f"row {c[0]}: {c[1]}" for c in CASES])
def test_broken_vocabulary_is_refused_by_name(row: int, what: str, data: bytes, code: str, tmp_path: Path) -> None:
    assert code in [found.code for found in found_by(tmp_path, data)]
    with pytest.raises(FormatError, match=r"tokenizer\.ggml\.") as caught:
        GGUFFile.open(tmp_path / "model.gguf")
    assert caught.value.code == code


def test_sound_vocabulary_has_no_findings(tmp_path: Path) -> None:
    merges = raw.kv_array(T + "merges", raw.STRING, ["a b"])
    assert found_by(tmp_path, vocabulary(merges)) == []
    assert (
        found_by(tmp_path, vocabulary(raw.kv(T + "add_bos_token", raw.BOOL, 1), leave_out=[T + "bos_token_id"])) == []
    )
    assert found_by(tmp_path, vocabulary(words=[*WORDS[:8], "x" * 65_536])) == []


@pytest.mark.parametrize("merge", ["a z", "z b", "b a", "ab", "", " ", "a  b", "a b c"])
def test_merges_of_tokens_that_do_not_exist_are_found(merge: str, tmp_path: Path) -> None:
    (found,) = found_by(tmp_path, vocabulary(raw.kv_array(T + "merges", raw.STRING, ["a b", merge])))
    assert (found.code, found.name, found.severity) == ("VOCAB_MERGES", T + "merges", "error")
    assert "1 merges" in found.message


def test_token_that_is_there_twice_is_a_warning(tmp_path: Path) -> None:
    data = vocabulary(words=[*WORDS[:8], "a"])
    (found,) = found_by(tmp_path, data)
    assert (found.code, found.severity) == ("VOCAB_INVALID", "warning")
    GGUFFile.open(tmp_path / "model.gguf").close()


@pytest.mark.parametrize("name", ["padding", "unknown", "eot", "eom", "eos", "mask", "fim_pre", "bos"])
@pytest.mark.parametrize("value", [9, (1 << 32) - 1])
def test_an_id_beyond_that_nothing_depends_on_is_a_warning(name: str, value: int, tmp_path: Path) -> None:
    key = f"{T}{name}_token_id"
    off = raw.kv(T + "add_bos_token", raw.BOOL, 0)
    data = vocabulary(raw.kv(key, raw.U32, value), off, leave_out=[T + "bos_token_id"])
    (found,) = found_by(tmp_path, data)
    assert (found.code, found.name, found.severity) == ("VOCAB_SPECIAL_ID", key, "warning")
    with pytest.warns(RuntimeWarning, match=key):
        GGUFFile.open(tmp_path / "model.gguf").close()


@pytest.mark.parametrize("name", ["eos_token_ids", "suppress_tokens"])
def test_an_id_beyond_in_a_list_is_a_warning(name: str, tmp_path: Path) -> None:
    (found,) = found_by(tmp_path, vocabulary(raw.kv_array(T + name, raw.I32, [2, 9, -1])))
    assert (found.code, found.name, found.severity) == ("VOCAB_SPECIAL_ID", T + name, "warning")


OVERRIDDEN: list[tuple[str, bytes, dict[str, object]]] = [
    ("bos beyond", without("bos_token_id", raw.kv(T + "bos_token_id", raw.U32, 9)), {T + "bos_token_id": 1}),
    ("bos not wanted", without("bos_token_id", raw.kv(T + "bos_token_id", raw.U32, 9)), {T + "add_bos_token": False}),
    ("id that is a string", vocabulary(raw.kv(T + "eos_token_id", raw.STRING, "none")), {T + "eos_token_id": 2}),
    ("add_bos that is a number", vocabulary(raw.kv(T + "add_bos_token", raw.U32, 1)), {T + "add_bos_token": True}),
    ("context of 0", vocabulary(raw.kv("test.context_length", raw.U32, 0)), {"test.context_length": 512}),
    ("base of NaN", vocabulary(raw.kv("test.rope.freq_base", raw.F32, float("nan"))), {"test.rope.freq_base": 10000}),
]


@pytest.mark.filterwarnings("ignore:.*counts as missing")
@pytest.mark.parametrize(("what", "data", "overrides"), OVERRIDDEN, ids=[case[0] for case in OVERRIDDEN])
def test_an_override_mends_what_the_checks_refuse(
    what: str, data: bytes, overrides: dict[str, object], tmp_path: Path
) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    with pytest.raises(FormatError):
        GGUFFile.open(path)
    with GGUFFile.open(path, overrides) as gguf:
        assert {key: gguf.metadata[key] for key in overrides} == overrides


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (T + "bos_token_id", 9),
        (T + "padding_token_id", 9),  # in a file it counts as missing
        (T + "eos_token_id", "none"),
        (T + "add_bos_token", 1),
        (T + "tokens", "a"),
        ("test.context_length", 0),
        ("test.rope.freq_base", float("nan")),
        ("general.architecture", 3),
        ("general.alignment", 64),
        ("split.count", 2),
        ("test.key", [1]),
    ],
)
def test_an_override_is_held_to_the_ranges_of_a_file(key: str, value: object, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(vocabulary())
    with pytest.raises(ParameterError, match=key):
        GGUFFile.open(path, {key: value})


def test_tokens_that_are_no_utf8_keep_their_bytes(tmp_path: Path) -> None:
    words: list[str | bytes] = [*WORDS[:7], b"\xff\xfe", b"caf\xc3"]
    assert found_by(tmp_path, vocabulary(words=words)) == []
    with GGUFFile.open(tmp_path / "model.gguf") as gguf:
        tokens = gguf.metadata[T + "tokens"]
    assert [token.encode("utf-8", "surrogateescape") for token in tokens] == [
        word.encode() if isinstance(word, str) else word for word in words
    ]


def test_vocabulary_without_types_scores_or_model_is_fine(tmp_path: Path) -> None:
    data = vocabulary(leave_out=[T + key for key in ("scores", "token_type", "model", "bos_token_id")])
    assert found_by(tmp_path, data) == []


def test_model_without_a_vocabulary_is_fine(tmp_path: Path) -> None:
    keys = [T + key for key in ("scores", "token_type", "model", "bos_token_id", "tokens")]
    assert found_by(tmp_path, vocabulary(leave_out=keys, rows=7)) == []
