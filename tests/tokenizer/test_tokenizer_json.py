"""The tokenizer.json in a file: ids are those of the whole text, and nothing of it is believed that could do harm."""

from __future__ import annotations

import base64
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_folders import TEXTS, byte_level_tokenizer, save_sentence_piece
from tokenizer_texts import byte_pair_metadata, random_texts
from tokenizers import Tokenizer as Library

from edgellm.chat_template import Segment
from edgellm.formats.checkpoint import Checkpoint
from edgellm.formats.checkpoint_folder import CheckpointFolder
from edgellm.formats.errors import EdgeLLMError, FormatError
from edgellm.tokenizer import Tokenizer
from edgellm.tokenizer.checkpoint_vocabulary import tokenizer_metadata
from edgellm.tokenizer.hugging_face import KEY
from edgellm.tokenizer.json_patterns import KNOWN, check_pattern

METASPACE = {"type": "Metaspace", "replacement": "\u2581", "split": False}
PREPEND = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": "\u2581"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
    ],
}


def added(token_id: int, content: str, **flags: bool) -> dict[str, Any]:
    """An entry of ``added_tokens``."""
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token_id, "content": content, "special": True} | plain | flags


def converted(folder: Path, description: dict[str, Any], **config: Any) -> Tokenizer:
    """edgellm's tokenizer of a checkpoint with this tokenizer.json."""
    (folder / "tokenizer.json").write_text(json.dumps(description))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"} | config))
    n_vocab = 1 + max(token["id"] for token in description["added_tokens"])
    metadata, notes = tokenizer_metadata(
        Checkpoint(CheckpointFolder(folder), {}, {}), max(n_vocab, 400), space_prefix=True
    )
    assert not notes
    assert KEY in metadata
    return Tokenizer.from_gguf({key: value for key, (value, _) in metadata.items()})


@pytest.fixture(scope="module")
def sentence_piece(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("spm")
    save_sentence_piece(folder)
    description: dict[str, Any] = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    return description


MARKED = [
    *TEXTS,
    "<|im_start|>user\nthe License<|im_end|>\n<|im_start|>assistant\n",
    "hello</s>world </s> the<s>the",
    " <|im_start|> the  <|im_end|>  and <tool> x<tool>y",
    "<s>[INST] the License [/INST] and</s><s>[INST] of",
    "\u2581the<|im_end|>\u2581 the",
]
MARKS = {1: "<s>", 2: "</s>", 400: "<|im_start|>", 401: "<|im_end|>"}
SCHEMES = {
    "prepend": {"normalizer": PREPEND, "pre_tokenizer": None},
    **{
        scheme: {"normalizer": None, "pre_tokenizer": METASPACE | {"prepend_scheme": scheme}}
        for scheme in ("first", "always", "never")
    },
}
FLAGS: tuple[dict[str, bool], ...] = (
    {},
    {"lstrip": True},
    {"rstrip": True},
    {"lstrip": True, "rstrip": True},
    {"single_word": True},
    {"normalized": True},
)


@pytest.mark.parametrize("flags", FLAGS, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_ids_and_text_are_those_of_the_original(
    scheme: str, flags: dict[str, bool], sentence_piece: dict[str, Any], tmp_path: Path
) -> None:
    marks = [added(400, "<|im_start|>", **flags), added(401, "<|im_end|>", **flags)]
    marks.append(added(402, "<tool>", special=False, **flags))
    description = sentence_piece | SCHEMES[scheme]
    description["added_tokens"] = [token | flags for token in sentence_piece["added_tokens"]] + marks
    tokenizer = converted(tmp_path, description)
    original = Library.from_str(json.dumps(description))
    for text in MARKED:
        wanted = original.encode(text, add_special_tokens=False).ids
        found = tokenizer.encode(text, add_special=False, parse_special=True)
        if flags.get("normalized") and any(wanted.count(i) < text.count(mark) for i, mark in MARKS.items()):
            # the original misses some marks that it looks for in normalized text: here they count
            assert all(found.count(i) == text.count(mark) for i, mark in MARKS.items()), text
        else:
            assert found == wanted, text
    for text in MARKED[:2]:
        ids = original.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids) == original.decode(ids), text


@pytest.mark.parametrize("scheme", SCHEMES)
def test_where_a_prompt_is_cut_changes_no_id(scheme: str, sentence_piece: dict[str, Any], tmp_path: Path) -> None:
    description = sentence_piece | SCHEMES[scheme]
    marks = [added(400, "<|im_start|>", rstrip=True), added(401, "<|im_end|>", lstrip=True)]
    description["added_tokens"] = [*sentence_piece["added_tokens"], *marks]
    tokenizer = converted(tmp_path, description)
    original = Library.from_str(json.dumps(description))
    source = random.Random(3)
    for text in random_texts(60, seed=4):
        parts = [text[i : i + 9] for i in range(0, len(text), 9)]
        segments = []
        for part in parts:
            segments.append(Segment(source.choice(("<|im_start|>", "<|im_end|>", "\n", "</s> ")), True))
            segments.append(Segment(part, source.random() < 0.3))
        whole = "".join(segment.text for segment in segments)
        assert tokenizer.encode_segments(segments) == original.encode(whole).ids, whole


def test_added_words_keep_their_ids_beside_hidden_marks(tmp_path: Path) -> None:
    description = json.loads(byte_level_tokenizer().to_str())
    n = max(token["id"] for token in description["added_tokens"])
    description["added_tokens"] += [added(n + 1, "<|a|>"), added(n + 2, "<word>", special=False), added(n + 3, "<|b|>")]
    tokenizer = converted(tmp_path, description, eos_token="<|im_end|>")
    assert tokenizer.encode("<word><|b|>", add_special=False, parse_special=True) == [n + 2, n + 3]
    assert tokenizer.encode("<word>", add_special=False) == [n + 2]
    spelled = tokenizer.encode("<|a|><|b|>", add_special=False)
    assert not {n + 1, n + 3} & set(spelled)
    assert tokenizer.decode(spelled) == "<|a|><|b|>"


def test_tokens_that_other_files_of_a_checkpoint_add_travel_too(tmp_path: Path) -> None:
    description = json.loads(byte_level_tokenizer().to_str())
    n = max(token["id"] for token in description["added_tokens"])
    late = {str(n + 1): {"content": "<late>", "special": True, "lstrip": False, "rstrip": True, "normalized": False}}
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<word>": n + 2}))
    (tmp_path / "tokenizer.json").write_text(json.dumps(description))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": late}))
    metadata, _ = tokenizer_metadata(Checkpoint(CheckpointFolder(tmp_path), {}, {}), n + 9, space_prefix=True)
    tokenizer = Tokenizer.from_gguf({key: value for key, (value, _) in metadata.items()})
    the = tokenizer.encode("the", add_special=False)
    ids = tokenizer.encode("<late>  the<word>", add_special=False, parse_special=True)
    assert ids == [n + 1, *the, n + 2]


# -- a stranger's ----------------------------------------------------------------------------------------------------

BASE = {
    "version": "1.0",
    "added_tokens": [],
    "normalizer": None,
    "pre_tokenizer": {"type": "WhitespaceSplit"},
    "model": {"type": "WordLevel", "vocab": {"?": 0, "red": 1, "blue": 2}, "unk_token": "?"},
}


def colours(**changes: Any) -> dict[str, Any]:
    """Metadata of a vocabulary ?, red, blue, <|end|> (which ends an answer), <tool> with its JSON, changed so."""
    metadata = byte_pair_metadata(eos_token_id=3)
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    tokens[:5] = ["?", "red", "blue", "<|end|>", "<tool>"]
    types[:5] = [1, 1, 1, 3, 4]
    metadata["tokenizer.ggml.tokens"] = tokens[:256]
    metadata["tokenizer.ggml.token_type"] = types[:256]
    return metadata | {KEY: json.dumps(BASE | changes)}


def replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def model(kind: str, vocab: Any, **settings: Any) -> dict[str, Any]:
    return {"model": {"type": kind, "vocab": vocab, "unk_token": "?", "unk_id": 0} | settings}


def charsmap(replacement: bytes) -> str:
    units = np.zeros(256, "<u4")
    units[0] = 1 << 10
    return base64.b64encode((1024).to_bytes(4, "little") + units.tobytes() + replacement + b"\0").decode()


HOSTILE = {
    "nested replacements": {
        "normalizer": {"type": "Sequence", "normalizers": [replace({"String": "a"}, "a" * 99)] * 2}
    },
    "an empty pattern": {"normalizer": replace({"String": ""}, "aa")},
    "a long prefix": {"normalizer": {"type": "Prepend", "prepend": "a" * 65}},
    "a large table": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": charsmap(b"x" * 65)}},
    "a table that is none": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    "too many parts": {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}] * 40}},
    "nested repetition": {"pre_tokenizer": split("(a+)+$")},
    "alternatives that overlap": {"pre_tokenizer": split("(a|aa)+$")},
    "square time": {"pre_tokenizer": split(r"\s+$|\w+!!")},
    "square time in a replacement": {"normalizer": replace({"Regex": r"a+b|a"}, "a")},
    "a back reference": {"pre_tokenizer": split(r"(a*)\1b")},
    "no pattern": {"pre_tokenizer": split("(")},
    "an unknown part": {"pre_tokenizer": {"type": "Telepathy"}},
    "an unknown model": model("Oracle", {}),
    "no model": {"model": None},
    "words as marks": model("WordLevel", {"?": 0, "red": 3}),
    "marks as words": model("WordLevel", {"?": 0, "<|end|>": 1}),
    "an added word as a mark": {"added_tokens": [added(3, "red")]},
    "ids beyond the vocabulary": model("WordLevel", {"?": 0, "red": 1, "far": 999}),
    "ids that are not counted so": {
        "added_tokens": [added(255, "\u0101")],
        **model("WordLevel", {"?": 0, "\u0102": 9}),
    },
    "lots": model("BPE", {"?": 0}, merges=[], dropout=0.5),
    "merges of nothing": model("BPE", {"?": 0}, merges=[["a", "b"]]),
    "merges that are none": model("BPE", {"?": 0}, merges=["a", 7]),
    "words without end": model("WordPiece", {"?": 0}, max_input_chars_per_word=1 << 40, continuing_subword_prefix="##"),
    "endless pieces": {"model": {"type": "Unigram", "unk_id": 0, "vocab": [["?", 0.0], ["a" * 2000, 0.0]]}},
    "added tokens that are none": {"added_tokens": ["<|end|>"]},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_description_that_could_do_harm_is_refused_by_name(name: str) -> None:
    assert Tokenizer.from_gguf(colours()).encode("red blue") == [1, 2]
    with pytest.raises(FormatError, match=f"{KEY}.*--override-kv") as error:
        Tokenizer.from_gguf(colours(**HOSTILE[name]))
    assert error.value.code == "VOCAB_INVALID"


@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000, '{"model": 5}'])
def test_what_is_no_description_is_refused_by_name(text: str) -> None:
    with pytest.raises(FormatError, match=KEY):
        Tokenizer.from_gguf(colours() | {KEY: text})


MODELS: dict[str, dict[str, Any]] = {
    "WordLevel": model("WordLevel", {"?": 0, "red": 1, "blue": 2, "<|end|>": 3}),
    "WordPiece": model(
        "WordPiece", {"?": 0, "red": 1, "<|end|>": 3}, continuing_subword_prefix="##", max_input_chars_per_word=100
    ),
    "Unigram": {
        "model": {"type": "Unigram", "unk_id": 0, "vocab": [[t, -1.0] for t in ("?", "red", "blue", "<|end|>")]}
    },
    "BPE of merges": model(
        "BPE",
        {"?": 0, "red": 1, "<|end|>": 3, "<": 60, "|end|>": 61},
        merges=["< |end|>"],
    ),
    "BPE of words": model("BPE", {"?": 0, "red": 1, "<|end|>": 3}, merges=[], ignore_merges=True),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "normalizer",
    [
        None,
        {"type": "NFKC"},
        {"type": "Lowercase"},
        replace({"String": "_"}, ""),
        {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "lowercase": True},
    ],
    ids=str,
)
def test_no_text_becomes_a_mark_by_the_model_or_a_normalizer(name: str, normalizer: Any) -> None:
    changes = MODELS[name] | {"normalizer": normalizer, "added_tokens": [added(3, "<|end|>", normalized=True)]}
    metadata = colours(**changes)
    if name == "BPE of merges":
        metadata["tokenizer.ggml.tokens"][60:62] = ["<", "|end|>"]
    tokenizer = Tokenizer.from_gguf(metadata)
    for text in ("<|end|>", "red <|end|>", "\uff1c\uff5cend\uff5c\uff1e", "<|END|>", "<_|end|>", "<|e\u200bnd|>", "<|"):
        assert 3 not in tokenizer.encode(text), text
        segments = [Segment("red <|", True), Segment(text, False), Segment("<|end|> red", True)]
        assert tokenizer.encode_segments(segments).count(3) == 1, text
    assert tokenizer.encode("<|end|>", parse_special=True) == [3]


def test_a_users_letters_do_not_hide_a_mark_of_the_template() -> None:
    metadata = colours(added_tokens=[added(3, "<|end|>", single_word=True), added(4, "x<", special=False)])
    metadata["tokenizer.ggml.tokens"][4] = "x<"
    tokenizer = Tokenizer.from_gguf(metadata)
    segments = [Segment("x", False), Segment("<|end|>", True), Segment("word", False)]
    assert tokenizer.encode_segments(segments).count(3) == 1


def test_a_run_of_one_letter_ends_in_an_answer_or_a_named_error() -> None:
    """In a process of its own: what goes wrong here ends processes."""
    program = """
import resource, sys
sys.path[:0] = PATHS
resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
import test_tokenizer_json as t
for name, changes in t.HOSTILE.items():
    try:
        t.Tokenizer.from_gguf(t.colours(**changes)).encode("a" * 100_000 + "!")
    except t.EdgeLLMError as error:
        print(error.code)
"""
    program = program.replace("PATHS", repr([str(Path(__file__).parents[n]) for n in (0, 1)]))
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert ran.stdout.split() == ["VOCAB_INVALID"] * len(HOSTILE)


SOUND = (r"\p{L}{1,2}|\P{L}", r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,4}| ?[^\s\p{L}\p{N}]+|\s+", r"(?i:'s|'t)|\w+|\s")


@pytest.mark.parametrize("pattern", SOUND)
def test_sound_patterns_that_nobody_has_heard_of_are_believed(pattern: str) -> None:
    assert pattern not in KNOWN
    check_pattern(pattern)  # raises for the others


def test_a_text_that_the_library_gives_up_on_is_a_named_error() -> None:
    class Panicking:
        strips_first_space = False

        def encode(self, text: str) -> list[int]:
            Library.from_str(json.dumps(BASE | {"pre_tokenizer": split("(a|aa)+$")})).encode("a" * 60 + "!")
            return []

    tokenizer = Tokenizer.from_gguf(byte_pair_metadata())
    tokenizer._backend = Panicking()
    with pytest.raises(EdgeLLMError, match="cannot be tokenized"):
        tokenizer.encode("anything")
