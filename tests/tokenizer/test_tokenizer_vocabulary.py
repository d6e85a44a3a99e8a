"""Vocabularies are read by their kind, checked, and never let plain text become a control token."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from tokenizer_texts import byte_pair_metadata, random_texts, sentence_piece_metadata

from edgellm.formats.errors import FormatError, UnsupportedError
from edgellm.tokenizer import Tokenizer, TokenType
from edgellm.tokenizer.hugging_face import KEY

BYTES = {char: 3 + value for value, char in enumerate(map(chr, range(128)))}  # ids of ASCII in SentencePiece toys


def broken(metadata: dict[str, Any], **changes: Any) -> FormatError:
    """The error of ``metadata`` with these ``tokenizer.ggml.`` keys changed."""
    with pytest.raises(FormatError) as error:
        Tokenizer.from_gguf(metadata | {f"tokenizer.ggml.{name}": value for name, value in changes.items()})
    return error.value


WRONG_ARRAYS = {
    "tokens": [[], 7],
    "token_type": [np.ones(3, np.int32), np.full(259, 9, np.int32), np.full(259, -1, np.int32), ["x"]],
    "scores": [np.ones(3, np.float32), np.full(259, np.nan, np.float32), np.full(259, -np.inf, np.float32)],
    "model": [5],
    "merges": ["a b"],
    "eos_token_ids": [["x"], [1.5], [[1], [2]], {"a": 1}],
    "suppress_tokens": [["x"], [1.5], [[1], [2]], {"a": 1}],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in WRONG_ARRAYS.items() for value in values])
def test_arrays_that_do_not_fit_are_vocab_invalid(key: str, value: Any) -> None:
    assert broken(sentence_piece_metadata({}), **{key: value}).code == "VOCAB_INVALID"


@pytest.mark.parametrize("text", ["<0x-1>", "<0xGG>", "<0x041>", "<0x4>", "0x41", "", "<0x42>"])
def test_byte_tokens_are_two_hex_digits_and_one_for_each_byte(text: str) -> None:
    metadata = sentence_piece_metadata({})
    tokens = list(metadata["tokenizer.ggml.tokens"])
    tokens[3 + 0x41] = text
    assert broken(metadata, tokens=tokens).code == "VOCAB_INVALID"


def test_a_token_of_megabytes_is_refused() -> None:
    metadata = sentence_piece_metadata({"x" * 70000: 0.0})
    assert broken(metadata).code == "VOCAB_INVALID"


ID_NAMES = ("bos", "eos", "eot", "eom", "unknown", "padding", "seperator", "mask", "fim_pad", "fim_pre")
WRONG_IDS = (300, -1, 2**32 - 1)


@pytest.mark.parametrize("value", WRONG_IDS)
def test_an_id_that_is_none_counts_as_missing_where_nothing_depends_on_it(value: int) -> None:
    metadata = sentence_piece_metadata({"a": 0.0}, add_bos_token=False)
    silent = {key: v for key, v in metadata.items() if not key.endswith("_token_id")}
    for name in ID_NAMES:
        tokenizer = Tokenizer.from_gguf(silent | {f"tokenizer.ggml.{name}_token_id": value})
        assert tokenizer.special == Tokenizer.from_gguf(silent).special, name
        assert tokenizer.encode("a") == Tokenizer.from_gguf(silent).encode("a"), name


@pytest.mark.parametrize("value", WRONG_IDS)
def test_a_wrong_id_of_a_token_that_texts_get_is_named(value: int) -> None:
    cases: dict[str, tuple[str, dict[str, Any]]] = {
        "llama's rule": ("bos_token_id", sentence_piece_metadata({})),
        "llama 3's rule": ("bos_token_id", byte_pair_metadata("a", pre="llama-bpe")),
        "bos wanted": ("bos_token_id", byte_pair_metadata("a", add_bos_token=True)),
        "eos wanted": ("eos_token_id", byte_pair_metadata("a", add_eos_token=True)),
    }
    for what, (name, metadata) in cases.items():
        error = broken(metadata, **{name: value})
        assert error.code == "VOCAB_SPECIAL_ID", what
        assert f"--override-kv tokenizer.ggml.{name}=int:ID" in str(error), what
        assert f"--override-kv tokenizer.ggml.add_{name.removesuffix('_id')}=bool:false" in str(error), what
        assert Tokenizer.from_gguf(metadata | {f"tokenizer.ggml.{name}": 0}).encode("a"), what


@pytest.mark.parametrize("value", WRONG_IDS)
def test_a_wrong_eos_is_named_where_nothing_else_ends_an_answer(value: int) -> None:
    metadata = byte_pair_metadata("a")
    tokens = metadata["tokenizer.ggml.tokens"]
    metadata["tokenizer.ggml.tokens"] = ["<|mark|>" if text == "<|end|>" else text for text in tokens]
    assert Tokenizer.from_gguf(metadata | {"tokenizer.ggml.eot_token_id": 0, "tokenizer.ggml.eos_token_id": value})
    assert "ends an answer" in str(broken(metadata, eos_token_id=value))


@pytest.mark.parametrize("name", [f"{name}_token_id" for name in ("bos", "eos", "eot", "eom", "unknown")])
def test_an_id_that_is_no_number_is_named(name: str) -> None:
    error = broken(sentence_piece_metadata({}), **{name: "two"})
    assert error.code == "VOCAB_SPECIAL_ID"
    assert name in str(error)


def test_a_wanted_bos_that_does_not_exist_is_named() -> None:
    assert broken(byte_pair_metadata(), add_bos_token=True).code == "VOCAB_SPECIAL_ID"


@pytest.mark.parametrize(
    "merge", ["zz y", "h zz", "h y", "hy", "", " ", "hello" * 2 + " hello", "hello hello", "\udcff a"]
)
def test_merges_of_unknown_tokens_are_vocab_merges(merge: str) -> None:
    assert broken(byte_pair_metadata("hello"), merges=[merge]).code == "VOCAB_MERGES"


def test_byte_pairs_without_merges_are_vocab_merges() -> None:
    metadata = byte_pair_metadata("hello")
    del metadata["tokenizer.ggml.merges"]
    assert broken(metadata).code == "VOCAB_MERGES"


@pytest.mark.parametrize("kind", ["rwkv", "plamo2", "hybriddna", "no_vocab", "other"])
def test_other_kinds_are_named(kind: str) -> None:
    with pytest.raises(UnsupportedError, match=f"'{kind}'.*Supported: gpt2") as error:
        Tokenizer.from_gguf(byte_pair_metadata(model=kind))
    assert error.value.code == "TOKENIZER_MODEL"


@pytest.mark.parametrize("kind", ["none", "no_vocab"])
def test_a_file_without_a_vocabulary_is_not_called_damaged(kind: str) -> None:
    with pytest.raises(UnsupportedError, match="no vocabulary"):
        Tokenizer.from_gguf({"tokenizer.ggml.model": kind})


def test_pieces_merge_by_score_and_unknown_characters_become_bytes() -> None:
    pieces = {"a": -10.0, "b": -11.0, "c": -12.0, "ab": -2.0, "bc": -1.0, "abc": -3.0, "\u2581": -9.0}
    tokenizer = Tokenizer.from_gguf(sentence_piece_metadata(pieces, add_space_prefix=False, add_bos_token=False))
    names = [*pieces]
    spelled = {text: [names.index(piece) + 259 for piece in cut.split()] for text, cut in (("abc", "abc"),)}
    assert tokenizer.encode("abc") == spelled["abc"]
    # "bc" has the better score than "ab", so a is left alone
    assert tokenizer.encode("abab") == [259 + names.index("ab")] * 2
    assert tokenizer.encode("abbc") == [259 + names.index("ab"), 259 + names.index("bc")]
    assert tokenizer.encode("é\x00") == [3 + 0xC3, 3 + 0xA9, 3]
    assert tokenizer.decode(tokenizer.encode("é b 🤗\x00")) == "é b 🤗\x00"


def test_space_prefix_bos_and_eos_follow_the_file_and_else_the_kind() -> None:
    pieces = {"\u2581": -1.0, "a": -2.0}
    space, a = 259, 260
    assert Tokenizer.from_gguf(sentence_piece_metadata(pieces)).encode("a") == [1, space, a]
    assert Tokenizer.from_gguf(sentence_piece_metadata(pieces)).encode("") == [1]
    metadata = sentence_piece_metadata(pieces, add_space_prefix=False, add_bos_token=False, add_eos_token=True)
    assert Tokenizer.from_gguf(metadata).encode("a") == [a, 2]
    assert Tokenizer.from_gguf(metadata).encode("a", add_special=False) == [a]
    for pre, wants_bos in (("llama-bpe", True), ("tekken", True), ("gpt-2", False), ("qwen2", False)):
        tokenizer = Tokenizer.from_gguf(byte_pair_metadata(pre=pre, bos_token_id=256))
        assert tokenizer.encode("a") == ([256] if wants_bos else []) + [tokenizer.token_id("a")]
    doubled = Tokenizer.from_gguf(sentence_piece_metadata(pieces, add_space_prefix=False))
    assert doubled.encode("<s>a", parse_special=True) == [1, a]


def test_a_word_that_is_a_token_is_taken_whole_where_merges_are_ignored() -> None:
    tokens = byte_pair_metadata("ab")["tokenizer.ggml.tokens"]
    for pre, ids in (("llama-bpe", 1), ("gpt-2", 3)):
        metadata = byte_pair_metadata("ab", pre=pre, tokens=[*tokens, "xyz"], token_type=None)
        assert len(Tokenizer.from_gguf(metadata).encode("xyz", add_special=False)) == ids


@pytest.mark.parametrize("pre", ["llama-bpe", "gpt-2", "superbpe"])
def test_no_text_becomes_a_control_token_even_if_words_or_merges_spell_one(pre: str) -> None:
    metadata = byte_pair_metadata("stop,end", pre=pre)
    types = metadata["tokenizer.ggml.token_type"]
    tokens = metadata["tokenizer.ggml.tokens"]
    for text in ("stop", "en"):
        types[tokens.index(text)] = TokenType.CONTROL
    tokenizer = Tokenizer.from_gguf(metadata)
    for text in ("stop", "end", "stop end", "<|end|>", "x<|end|>y"):
        ids = tokenizer.encode(text)
        assert not any(map(tokenizer.is_control, ids))
        assert tokenizer.decode(ids) == text
    assert tokenizer.encode("stop", parse_special=True, add_special=False) == [tokens.index("stop")]


def test_user_defined_tokens_are_taken_whole_longest_first() -> None:
    tokens = byte_pair_metadata()["tokenizer.ggml.tokens"]
    types = np.array([*byte_pair_metadata()["tokenizer.ggml.token_type"], 4, 4], np.int32)
    tokenizer = Tokenizer.from_gguf(byte_pair_metadata(tokens=[*tokens, "<tool>>", "ool"], token_type=types))
    assert tokenizer.encode("<tool>>") == [258]
    assert tokenizer.encode("<tool>ool") == [257, 259]


def test_duplicate_and_empty_tokens_decode_but_the_first_of_a_text_is_used() -> None:
    metadata = sentence_piece_metadata({"a": -1.0, "\u2581": -2.0}, add_space_prefix=False, add_bos_token=False)
    tokens = [*metadata["tokenizer.ggml.tokens"], "a", "", ""]
    size = len(tokens)
    metadata |= {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.append(metadata["tokenizer.ggml.token_type"], [1, 1, 1]),
        "tokenizer.ggml.scores": np.append(metadata["tokenizer.ggml.scores"], [5.0, 0.0, 0.0]),
    }
    tokenizer = Tokenizer.from_gguf(metadata)
    assert tokenizer.encode("a") == [259]
    assert tokenizer.decode([size - 3, size - 2, size - 1]) == "a"


def test_an_old_file_without_token_types_still_has_control_and_byte_tokens() -> None:
    metadata = sentence_piece_metadata({"a": -1.0}, token_type=None, add_space_prefix=False)
    tokenizer = Tokenizer.from_gguf(metadata)
    assert tokenizer.encode("aé<s>", add_special=False)[:3] == [259, 3 + 0xC3, 3 + 0xA9]
    assert tokenizer.is_control(1)


def test_end_of_generation_ids_come_from_keys_and_known_texts_of_mark_type() -> None:
    tokens = byte_pair_metadata()["tokenizer.ggml.tokens"]
    types = byte_pair_metadata()["tokenizer.ggml.token_type"]

    def ends(texts: list[str], kind: int, **changes: Any) -> set[str]:
        metadata = byte_pair_metadata(
            tokens=[*tokens, *texts], token_type=np.append(types, [kind] * len(texts)).astype(np.int32), **changes
        )
        tokenizer = Tokenizer.from_gguf(metadata)
        return {tokenizer.vocabulary.tokens[i] for i in tokenizer.eog_ids}

    assert ends(["<|im_end|>", "<|im_start|>"], TokenType.CONTROL) == {"<|end|>", "<|im_end|>"}
    # no words make this one, whatever its type: llama.cpp too counts it
    assert ends(["<|im_end|>"], TokenType.NORMAL) == {"<|end|>", "<|im_end|>"}
    assert ends(["[EOT]", "</s>"], TokenType.NORMAL) == {"<|end|>"}
    assert ends(["[EOT]", "A"], TokenType.NORMAL, eot_token_id=259) == {"<|end|>", "A"}
    assert ends(["<|return|>", "<|call|>"], 3, eos_token_id=258) == {"<|return|>", "<|call|>"}  # gpt-oss
    assert ends(["</s>"], TokenType.USER_DEFINED) == {"<|end|>"}  # Gemma's tag of struck-out text
    assert ends(["</s>"], TokenType.CONTROL) == {"<|end|>", "</s>"}


def test_tokens_that_no_answer_holds_are_those_of_the_list_that_exist() -> None:
    assert Tokenizer.from_gguf(byte_pair_metadata()).suppressed_ids == frozenset()
    metadata = byte_pair_metadata(suppress_tokens=np.array([5, 257, -1, 9999], np.int32))
    assert Tokenizer.from_gguf(metadata).suppressed_ids == {5, 257}


def bert_metadata(words: str, **changes: Any) -> dict[str, Any]:
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokens += [word[2:] if word.startswith("##") else "\u2581" + word for word in words.split()]
    types = np.array([3, 3, 3, 3] + [1] * (len(tokens) - 4), np.int32)
    values = {"model": "bert", "tokens": tokens, "token_type": types, "unknown_token_id": 1, "bos_token_id": 2}
    values |= {"seperator_token_id": 3} | changes
    return {f"tokenizer.ggml.{name}": value for name, value in values.items()}


def test_bert_vocabularies_equal_the_tokenizers_library() -> None:
    from tokenizers import BertWordPieceTokenizer

    words = "un ##aff ##able hello , ! ' ##s 中 cafe 1 ##2 the ##e a b c d e ##a ##b ##c ##d"
    order = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words.split()]
    judge = BertWordPieceTokenizer(vocab={word: i for i, word in enumerate(order)})
    tokenizer = Tokenizer.from_gguf(bert_metadata(words))
    for text in ("Unaffable, hello!", "café 中12 thee's", "zzz", "", *random_texts(200, seed=6)):
        plain = "".join(char for char in text if char not in "[]")
        assert tokenizer.encode(plain) == judge.encode(plain).ids
    assert tokenizer.decode(tokenizer.encode("unaffable hello")) == "unaffable hello"


def test_unigram_vocabularies_take_the_likeliest_pieces() -> None:
    pieces = {"\u2581": -3.0, "\u2581the": -2.0, "re": -2.5, "\u2581there": -4.0, "t": -5.0, "h": -5.0, "e": -5.0}
    tokenizer = Tokenizer.from_gguf(sentence_piece_metadata(pieces, model="t5", add_bos_token=False))
    assert tokenizer.encode("there", add_special=False) == [262]  # -4.0 beats -2.0 - 2.5
    assert tokenizer.encode("the") == [260, 2]
    assert tokenizer.decode(tokenizer.encode("there é")) == "there é"


@pytest.mark.parametrize("damage", ["size", "offset", "value", "tail"])
def test_a_normalization_table_that_points_outside_itself_is_refused(damage: str) -> None:
    units = np.zeros(256, "<u4")
    units[0] = 1 << 10
    sound = np.frombuffer((1024).to_bytes(4, "little") + units.tobytes() + b"x\0", np.uint8)
    metadata = sentence_piece_metadata({"\u2581": -1.0}, model="t5", add_bos_token=False)
    key = "tokenizer.ggml.precompiled_charsmap"
    assert Tokenizer.from_gguf(metadata | {key: sound}).encode("a", add_special=False)
    if damage == "offset":
        units[7] = 0x3FFFFF << 10
    if damage == "value":
        units[0], units[1] = 1 << 10 | 0x100, 0x80000000 | 77
    size = 2048 if damage == "size" else 1024
    tail = b"x" if damage == "tail" else b"x\0"
    blob = np.frombuffer(size.to_bytes(4, "little") + units.tobytes() + tail, np.uint8)
    assert broken(metadata, precompiled_charsmap=blob).code == "VOCAB_INVALID"


def test_the_files_own_tokenizer_json_is_used_and_makes_no_control_token() -> None:
    from tokenizers import AddedToken, models, pre_tokenizers
    from tokenizers import Tokenizer as Library

    library = Library(models.WordLevel({"?": 0, "red": 1, "blue": 2}, unk_token="?"))
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    library.add_special_tokens([AddedToken("<|end|>", special=True)])
    library.add_tokens(["<tool>"])
    metadata = byte_pair_metadata()
    tokens = metadata["tokenizer.ggml.tokens"]
    tokens[:5] = ["?", "red", "blue", "<|end|>", "<tool>"]
    metadata["tokenizer.ggml.token_type"][:5] = [1, 1, 1, 3, 4]
    metadata["tokenizer.ggml.tokens"] = [*tokens[:256], "x", "y"]
    tokenizer = Tokenizer.from_gguf(metadata | {KEY: library.to_str()})
    assert tokenizer.encode("red blue <|end|> red<tool>") == [1, 2, 0, 1, 4]
    assert tokenizer.encode("red <|end|> blue", parse_special=True) == [1, 3, 2]
    for text in ("{", json.dumps({"model": {"type": "Nothing"}}), "[]"):
        assert broken(metadata | {KEY: text}).code == "VOCAB_INVALID"
    library.add_tokens([f"w{i}" for i in range(300)])
    assert broken(metadata | {KEY: library.to_str()}).code == "VOCAB_INVALID"


def test_surrogate_halves_become_characters_or_the_replacement_character() -> None:
    tokenizer = Tokenizer.from_gguf(byte_pair_metadata())
    assert tokenizer.decode(tokenizer.encode("\ud83e\udd17 \ud83e!")) == "🤗 \ufffd!"


@pytest.mark.parametrize("kind", [kind for kind in TokenType if kind != TokenType.BYTE])
@pytest.mark.parametrize("backend", ["gpt2", "gemma4", "llama", "t5", "bert"])
def test_a_token_that_is_not_unicode_is_decoded_and_never_made(backend: str, kind: TokenType) -> None:
    if backend == "bert":
        metadata = bert_metadata("a b ##c")
    elif backend in ("gpt2", "gemma4"):
        metadata = byte_pair_metadata("ab", model=backend, pre="gpt-2" if backend == "gpt2" else None)
    else:
        metadata = sentence_piece_metadata({"\u2581": -1.0, "a": -2.0}, model=backend)
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    odd = b"a\xff".decode("utf-8", "surrogateescape")  # as the reader gives what is not UTF-8 in a file
    scores = np.zeros(len(tokens) + 1, np.float32)
    metadata |= {"tokenizer.ggml.tokens": [*tokens, odd], "tokenizer.ggml.scores": scores}
    metadata |= {
        "tokenizer.ggml.token_type": np.append(types, kind).astype(np.int32),
        "tokenizer.chat_template": f"x<|{odd}|>y",
    }
    tokenizer = Tokenizer.from_gguf(metadata)
    for text in ("a \ufffd", odd):
        assert len(tokens) not in tokenizer.encode(text, parse_special=True)
    assert tokenizer.decode([len(tokens)], special=True) == "a\ufffd"
