"""The stream decoder gives the text of a whole decode, a whole character at a time."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_texts import byte_pair_metadata, random_texts, sentence_piece_metadata

from edgellm.formats.errors import ParameterError
from edgellm.tokenizer import Tokenizer

TOKENIZERS = {
    "byte pairs": Tokenizer.from_gguf(byte_pair_metadata("hello, world,é,🤗")),
    "pieces with a space before": Tokenizer.from_gguf(sentence_piece_metadata({"\u2581": -1.0, "\u2581a": -0.5})),
    "pieces without": Tokenizer.from_gguf(sentence_piece_metadata({"\u2581": -1.0}, add_space_prefix=False)),
}


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_streamed_text_equals_the_whole_decode_for_any_ids(name: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[name]
    ids = data.draw(st.lists(st.integers(0, tokenizer.n_vocab - 1), max_size=40))
    for special in (False, True):
        decoder = tokenizer.stream_decoder(special=special)
        pieces = [decoder.add(token_id) for token_id in ids]
        assert "".join(pieces) + decoder.flush() == tokenizer.decode(ids, special=special)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_no_piece_holds_half_a_character(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    for text in random_texts(200, seed=1):
        decoder = tokenizer.stream_decoder()
        pieces = [decoder.add(token_id) for token_id in tokenizer.encode(text)]
        assert "\ufffd" not in "".join(pieces)
        assert decoder.flush() == ""


def test_invalid_bytes_come_out_once_and_at_the_latest_with_the_flush() -> None:
    tokenizer = TOKENIZERS["byte pairs"]
    first, second, third, _ = "🤗".encode()
    decoder = tokenizer.stream_decoder()
    assert [decoder.add(token_id) for token_id in (first, second, third)] == ["", "", ""]
    assert decoder.flush() == "\ufffd"
    assert decoder.flush() == ""
    assert decoder.add(ord("a")) == "a"
    assert decoder.add(0xFF) == "\ufffd"
    assert decoder.add(first) + decoder.add(ord("b")) == "\ufffdb"


def test_only_the_space_that_the_encoder_put_first_is_dropped() -> None:
    tokenizer = TOKENIZERS["pieces with a space before"]
    for text in ("a", " a", "  a", "", " ", "a b  c "):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        decoder = tokenizer.stream_decoder()
        assert "".join(map(decoder.add, ids)) + decoder.flush() == text


def test_control_tokens_are_silent_unless_they_are_asked_for() -> None:
    tokenizer = TOKENIZERS["byte pairs"]
    ids = tokenizer.encode("hello<|end|>", parse_special=True)
    assert tokenizer.decode(ids) == "hello"
    assert tokenizer.decode(ids, special=True) == "hello<|end|>"


def test_an_id_outside_the_vocabulary_is_a_named_error() -> None:
    tokenizer = TOKENIZERS["byte pairs"]
    for token_id in (-1, tokenizer.n_vocab):
        with pytest.raises(ParameterError, match="not in the vocabulary"):
            tokenizer.decode([token_id])
