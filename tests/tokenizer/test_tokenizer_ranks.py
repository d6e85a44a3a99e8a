"""Checkpoints whose tokenizer is a file of tiktoken's ranks, judged by tiktoken and by transformers' converter."""

from __future__ import annotations

import base64
import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Library
from tokenizers import models, pre_tokenizers, trainers

from edgellm.formats.checkpoint import Checkpoint
from edgellm.formats.checkpoint_folder import CheckpointFolder
from edgellm.formats.errors import EdgeLLMError
from edgellm.tokenizer import pre_tokenizers as table
from edgellm.tokenizer.byte_level import BYTE_OF_CHAR
from edgellm.tokenizer.checkpoint_ranks import FAMILIES
from edgellm.tokenizer.checkpoint_vocabulary import tokenizer_metadata
from edgellm.tokenizer.hugging_face import KEY
from edgellm.tokenizer.pre_detection import PROBES
from edgellm.tokenizer.tokenizer import Tokenizer

tiktoken = pytest.importorskip("tiktoken")

FILES = {"TikTokenTokenizer": "tiktoken.model", "ChatGLM4Tokenizer": "tokenizer.model", "HYTokenizer": "hy.tiktoken"}
N_RANKS, N_MARKS = 700, 14


@pytest.fixture(scope="module")
def ranks() -> dict[bytes, int]:
    """Bytes of a token -> its rank, of a vocabulary that knows the probes."""
    tokenizer = Library(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=N_RANKS, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(PROBES * 2, trainer)
    return {bytes(BYTE_OF_CHAR[c] for c in text): rank for text, rank in tokenizer.get_vocab().items()}


def lines_of(ranks: dict[bytes, int]) -> bytes:
    """The file."""
    ordered = sorted(ranks.items(), key=lambda one: one[1])
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ordered)


def write(folder: Path, name: str, content: bytes, **config: Any) -> Checkpoint:
    """A checkpoint of nothing else than a tokenizer."""
    (folder / name).write_bytes(content)
    (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    return Checkpoint(CheckpointFolder(folder), {}, {})


def converted(checkpoint: Checkpoint, pre: str | None = None) -> dict[str, Any]:
    """The tokenizer's keys of the GGUF file."""
    found, _ = tokenizer_metadata(checkpoint, N_RANKS + N_MARKS, space_prefix=True, pre=pre)
    return {key: value for key, (value, _) in found.items()}


@pytest.mark.parametrize("kind", FAMILIES)
def test_ids_are_those_of_tiktoken(kind: str, ranks: dict[bytes, int], tmp_path: Path) -> None:
    family = FAMILIES[kind]
    checkpoint = write(tmp_path, FILES.get(kind, "qwen.tiktoken"), lines_of(ranks), tokenizer_class=kind)
    metadata = converted(checkpoint)
    tokenizer = Tokenizer.from_gguf(metadata)
    assert metadata["tokenizer.ggml.pre"] == family.pre
    assert KEY in metadata
    marks = {str(family.marks(i, N_RANKS + i)): N_RANKS + i for i in range(N_MARKS)}
    (pattern,) = table.PRE_TOKENIZERS[family.pre].steps
    judge = tiktoken.Encoding(kind, pat_str=pattern, mergeable_ranks=ranks, special_tokens=marks)
    for text in PROBES:
        own = unicodedata.normalize("NFC", text) if family.normalizer else text
        assert tokenizer.encode(text) == judge.encode(own, disallowed_special=()), text
    with_marks = "x".join(marks)
    assert tokenizer.encode(with_marks, True, True) == judge.encode(with_marks, allowed_special="all")
    assert not set(marks.values()) & set(tokenizer.encode(with_marks)), "a mark of a user's text is text"


def test_the_vocabulary_alone_gives_the_same_ids(ranks: dict[bytes, int], tmp_path: Path) -> None:
    metadata = converted(write(tmp_path, "tiktoken.model", lines_of(ranks), tokenizer_class="TikTokenTokenizer"))
    whole = Tokenizer.from_gguf(metadata)
    del metadata[KEY]
    alone = Tokenizer.from_gguf(metadata)
    assert [alone.encode(text) for text in PROBES] == [whole.encode(text) for text in PROBES]


def test_merges_are_those_of_transformers(ranks: dict[bytes, int], tmp_path: Path) -> None:
    converter = pytest.importorskip("transformers.convert_slow_tokenizer").TikTokenConverter
    checkpoint = write(tmp_path, "tiktoken.model", lines_of(ranks), tokenizer_class="TikTokenTokenizer")
    vocab, merges = converter().extract_vocab_merges_from_model(str(tmp_path / "tiktoken.model"))
    metadata = converted(checkpoint)
    assert metadata["tokenizer.ggml.merges"] == [" ".join(pair) for pair in merges]
    assert {text: i for i, text in enumerate(metadata["tokenizer.ggml.tokens"][:N_RANKS])} == vocab


def test_the_marks_that_the_folder_lists_go_first(ranks: dict[bytes, int], tmp_path: Path) -> None:
    listed = {str(N_RANKS + 1): {"content": "[BOS]", "special": True}, str(N_RANKS + 3): {"content": "<|im|>"}}
    config = {"tokenizer_class": "TikTokenTokenizer", "added_tokens_decoder": listed, "bos_token": "[BOS]"}
    metadata = converted(write(tmp_path, "tiktoken.model", lines_of(ranks), **config))
    reserved = [f"<|reserved_token_{N_RANKS + i}|>" for i in (0, 2)]
    assert metadata["tokenizer.ggml.tokens"][N_RANKS : N_RANKS + 4] == [reserved[0], "[BOS]", reserved[1], "<|im|>"]
    assert metadata["tokenizer.ggml.bos_token_id"] == N_RANKS + 1


def test_another_family_needs_the_name_of_its_pre_tokenizer(ranks: dict[bytes, int], tmp_path: Path) -> None:
    checkpoint = write(tmp_path, "x.tiktoken", lines_of(ranks), tokenizer_class="OurTokenizer")
    with pytest.raises(EdgeLLMError, match=r"TikTokenTokenizer.*not OurTokenizer.*--pre") as caught:
        converted(checkpoint)
    assert caught.value.code == "TOKENIZER_MODEL"
    tokenizer = Tokenizer.from_gguf(converted(checkpoint, "gpt-4o"))
    (pattern,) = table.PRE_TOKENIZERS["gpt-4o"].steps
    judge = tiktoken.Encoding("x", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    assert [tokenizer.encode(text) for text in PROBES] == [judge.encode(text) for text in PROBES]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: [*lines, b"!!! 700"], "base64"),
        (lambda lines: [*lines, base64.b64encode(b"new one")], "a rank"),
        (lambda lines: [*lines, base64.b64encode(b"new one") + b" -1"], "a rank"),
        (lambda lines: [*lines, base64.b64encode(b"new one") + b" " + b"9" * 5000], "a rank"),
        (lambda lines: [*lines, base64.b64encode(b"a" * 1025) + b" 700"], "up to 1,024 bytes"),
        (lambda lines: [*lines, lines[0]], "each once"),
        (lambda lines: [*lines, base64.b64encode(b"new one") + b" 800"], "0, 1, 2"),
        (lambda lines: [lines[0]], "no rank for the byte"),
        (lambda lines: [*lines, *(base64.b64encode(b"more%d" % i) + b" %d" % i for i in range(700, 720))], "below 714"),
    ],
)
def test_ranks_that_are_not_sound_are_named_errors(
    change: Any, message: str, ranks: dict[bytes, int], tmp_path: Path
) -> None:
    lines = change(lines_of(ranks).splitlines())
    checkpoint = write(tmp_path, "tiktoken.model", b"\n".join(lines), tokenizer_class="TikTokenTokenizer")
    with pytest.raises(EdgeLLMError, match=message) as caught:
        converted(checkpoint)
    assert caught.value.code == "VOCAB_INVALID"
