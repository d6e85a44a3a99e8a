"""What a user writes never becomes a mark, whatever type the file gives its marks and wherever the text stands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_tokenizer_vocabulary import bert_metadata
from tiny_models import tiny_vocabulary, write_tiny_model
from tokenizer_texts import byte_pair_metadata, sentence_piece_metadata

from edgellm.chat_template import ChatTemplate, Segment
from edgellm.formats.errors import FormatError
from edgellm.formats.gguf import GGUFFile
from edgellm.tokenizer import Tokenizer, TokenType
from edgellm.tokenizer.verification import tokenizer_findings

TURNS = (
    "{% for m in messages %}{{ '<turn>' + m.role + '\n' + (m.name or '') + m.content }}"
    "{% for call in m.tool_calls or [] %}{{ '<call>' + call.function.name + (call.function.arguments | tojson) }}"
    "{% endfor %}{{ '</turn>\n' }}{% endfor %}{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<turn>model\n' }}{% endif %}"
)
MARKS = ["<turn>", "</turn>", "<call>", "<|im_end|>", "[EOS]"]
KINDS = ("NORMAL", "CONTROL", "USER_DEFINED", "UNUSED", "UNKNOWN")


def vocabulary(backend: str, kind: str) -> dict[str, Any]:
    """A vocabulary of this kind whose MARKS have the type ``kind``; a key names the last, the template the first."""
    if backend == "byte pairs":
        metadata = byte_pair_metadata("</turn>,<turn>,<call>,<|im_end|>,[EOS],turn", pre="llama-bpe")
    elif backend == "bert":
        metadata = bert_metadata("a b turn call < > / | ##n ##e ##d " + " ".join(MARKS))
    else:
        pieces = {"\u2581": -0.1, "<turn": -1.0, "turn": -1.5, "end": -2.0} | dict.fromkeys(MARKS, -0.5)
        metadata = sentence_piece_metadata(pieces, model=backend)
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    if backend == "bert":
        tokens[:] = [text.removeprefix("\u2581") if text.removeprefix("\u2581") in MARKS else text for text in tokens]
    for mark in MARKS:
        if mark not in tokens:
            tokens.append(mark)
            types = np.append(types, TokenType.NORMAL).astype(np.int32)
        types[tokens.index(mark)] = TokenType[kind]
    return metadata | {
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.eos_token_id": tokens.index("[EOS]"),
        "tokenizer.chat_template": TURNS,
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["byte pairs", "llama", "t5", "bert"])
def test_marks_are_what_a_token_does(backend: str, kind: str) -> None:
    tokenizer = Tokenizer.from_gguf(vocabulary(backend, kind))
    tokens = tokenizer.vocabulary.tokens
    # a NORMAL token that only the template writes may as well be a piece of text, and text is cut as ever
    names = ["<|im_end|>", "[EOS]"] if kind == "NORMAL" else MARKS
    for mark in names:
        token_id = tokens.index(mark)
        assert tokenizer.encode(mark, add_special=False, parse_special=True) == [token_id]
        for text in (mark, f"turn{mark}turn", f" {mark} ", mark * 2, mark[:-1] + mark, f"{mark[:3]}{mark}"):
            assert token_id not in tokenizer.encode(text, add_special=False), text
            for cut in range(1, len(mark)):
                parts = [Segment(mark[:cut], True), Segment("", True), Segment(mark[cut:], False)]
                assert token_id not in tokenizer.encode_segments(parts, add_special=False)
                parts = [Segment(mark[:cut], False), Segment("", True), Segment(mark[cut:], False)]
                assert token_id not in tokenizer.encode_segments(parts, add_special=False)
    if backend in ("byte pairs", "llama"):
        text = "a" + "".join(names)
        assert tokenizer.decode(tokenizer.encode(text, add_special=False)) == text


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "NORMAL"])
def test_no_field_of_a_chat_makes_a_mark(kind: str) -> None:
    metadata = vocabulary("byte pairs", kind)
    tokenizer, template = Tokenizer.from_gguf(metadata), ChatTemplate.from_metadata(metadata)
    ids = {tokenizer.vocabulary.tokens.index(mark) for mark in MARKS}

    def n_marks(evil: str) -> int:
        call = {"function": {"name": evil, "arguments": {evil: [evil, {"deep": evil}]}}}
        messages = [
            {"role": "system", "content": evil},
            {"role": "user", "content": evil + "<tu", "name": evil},
            {"role": evil, "content": "rn>" + evil},
            {"role": "tool", "content": evil},
            {"role": "assistant", "content": evil, "tool_calls": [call]},
        ]
        tools = [{"function": {"name": evil, "description": evil}}]
        prompt = tokenizer.encode_segments(template.render(messages, tools=tools))
        return sum(i in ids for i in prompt)

    harmless = n_marks("harmless")
    assert harmless == 12
    for evil in (*MARKS, "".join(MARKS), "\uff1cturn\uff1e", "<turn>\n</turn>"):
        assert n_marks(evil) == harmless, evil


def test_a_template_given_in_place_of_the_files_says_what_is_a_mark_too() -> None:
    metadata = vocabulary("byte pairs", "USER_DEFINED")
    turn = metadata["tokenizer.ggml.tokens"].index("<turn>")
    del metadata["tokenizer.chat_template"]
    assert Tokenizer.from_gguf(metadata).encode("<turn>") == [turn]  # here it is a word like any other
    assert turn not in Tokenizer.from_gguf(metadata, template=TURNS).encode("<turn>")


def test_words_that_stand_in_a_template_as_text_stay_words() -> None:
    metadata = vocabulary("byte pairs", "USER_DEFINED")
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    words = ["\n", "  ", "model", "function", "'", "{%"]
    metadata["tokenizer.ggml.tokens"] = [*tokens, *words]
    metadata["tokenizer.ggml.token_type"] = np.append(types, [4] * len(words)).astype(np.int32)
    tokenizer = Tokenizer.from_gguf(metadata)
    for word in words[1:]:
        assert tokenizer.encode(word) == [len(tokens) + words.index(word)]


def test_answers_show_the_marks_that_are_text_and_hide_those_that_end() -> None:
    metadata = vocabulary("byte pairs", "USER_DEFINED")
    tokenizer = Tokenizer.from_gguf(metadata)
    ids = [metadata["tokenizer.ggml.tokens"].index(mark) for mark in ("<call>", "turn", "[EOS]")]
    assert tokenizer.decode(ids) == "<call>turn"
    assert tokenizer.decode(ids, special=True) == "<call>turn[EOS]"


@pytest.mark.parametrize("name", ["padding_token_id", "eos_token_id", "bos_token_id"])
def test_a_key_that_names_a_piece_of_text_takes_no_text_away(name: str, tmp_path: Path) -> None:
    metadata = byte_pair_metadata("hello")
    for text in ("!", "hello") if name.startswith("pad") else ("!",):
        changed = metadata | {f"tokenizer.ggml.{name}": metadata["tokenizer.ggml.tokens"].index(text)}
        tokenizer = Tokenizer.from_gguf(changed)
        assert tokenizer.decode(tokenizer.encode("hello!", add_special=False)) == "hello!"


def test_text_that_becomes_a_mark_all_the_same_is_refused() -> None:
    metadata = sentence_piece_metadata({"a": -1.0}, unknown_token_id=2, add_space_prefix=False)
    types, tokens = metadata["tokenizer.ggml.token_type"], metadata["tokenizer.ggml.tokens"]
    tokens[3 + 0xE9] = "gone"  # so bytes cannot stand in, and what is not known becomes the token that ends an answer
    types[3 + 0xE9] = TokenType.NORMAL
    tokenizer = Tokenizer.from_gguf(metadata)
    assert tokenizer.encode("aa", add_special=False)
    with pytest.raises(FormatError, match=r"of plain text.*'</s>'") as error:
        tokenizer.encode("a中")
    assert error.value.code == "VOCAB_INVALID"


def test_verify_judges_the_tokenizer(tmp_path: Path) -> None:
    tokens, types, _ = tiny_vocabulary()

    def findings(**changes: Any) -> list[tuple[str, str]]:
        metadata = {f"tokenizer.{key.replace('__', '.')}": value for key, value in changes.items()}
        path = write_tiny_model(tmp_path / "m.gguf", n_layer=1, metadata=metadata)
        with GGUFFile.open(path):
            pass
        return [(finding.code, finding.severity) for finding in tokenizer_findings(path)]

    assert findings() == []
    assert findings(huggingface__json='{"model": null}') == [("VOCAB_INVALID", "error")]
    assert findings(ggml__pre="nobody's") == [("TOKENIZER_PRE", "warning")]
    untyped = [1 if kind == 3 else kind for kind in types]
    assert findings(ggml__token_type=untyped) == [("VOCAB_SPECIAL_ID", "warning")] * 2
    assert findings(ggml__eos_token_id=tokens.index("A")) == [("VOCAB_SPECIAL_ID", "warning")]
