"""The vocabularies of encoders from checkpoint folders: ids as transformers, tokenizers and sentencepiece give them."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from checkpoint_folders import edit_json
from encoder_tokenizers import BERT_VOCAB, XLM_R_MARKS, save_unigram, save_word_piece, tokenizer_of
from tokenizer_texts import random_texts
from tokenizers import Tokenizer as Tokenizers

from edgellm.formats.errors import FormatError
from edgellm.tokenizer import TokenType

TEXTS = (
    "",
    " ",
    "Unaffable, HELLO!  naïve\tcafé",
    "日本語 テキスト 中文",
    "a" * 101 + " b",
    "²½ ﷺ ①",
    *random_texts(400, 3),
)

BERT_SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"do_lower_case": False},
    {"strip_accents": False},
    {"do_lower_case": False, "strip_accents": True},
)


@pytest.mark.parametrize("settings", BERT_SETTINGS, ids=str)
@pytest.mark.parametrize("with_json", [True, False])
def test_ids_of_a_vocab_txt_equal_transformers(settings: dict[str, Any], with_json: bool, tmp_path: Path) -> None:
    judge = save_word_piece(tmp_path, **settings)
    tokenizer = tokenizer_of(tmp_path, len(BERT_VOCAB) + 3, with_json=with_json)
    for text in TEXTS:
        assert tokenizer.encode(text) == judge.encode(text, split_special_tokens=True), text
    assert tokenizer.decode(tokenizer.encode("hello, the end")) == "hello , the end"


@pytest.mark.parametrize("file", ["sentencepiece.bpe.model", "tokenizer.json"])
def test_ids_of_unigram_pieces_equal_tokenizers(file: str, tmp_path: Path) -> None:
    n_vocab = save_unigram(tmp_path)
    judge = Tokenizers.from_file(str(tmp_path / "tokenizer.json"))
    for name in {"sentencepiece.bpe.model", "tokenizer.json"} - {file}:
        (tmp_path / name).unlink()
    tokenizer = tokenizer_of(tmp_path, n_vocab)
    for text in TEXTS:
        if not any(mark in text for mark in XLM_R_MARKS):
            assert tokenizer.encode(text) == judge.encode(text).ids, text


def test_unigram_pieces_alone_are_cut_as_sentencepiece_cuts_them(tmp_path: Path) -> None:
    import sentencepiece

    n_vocab = save_unigram(tmp_path)
    judge = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "sentencepiece.bpe.model"))
    tokenizer = tokenizer_of(tmp_path, n_vocab, with_json=False)
    assert tokenizer.kind == "t5"
    for text in TEXTS:
        wanted = [3 if i == judge.unk_id() else i + 1 for i in judge.encode(text)]
        assert tokenizer.encode(text, add_special=False) == wanted, text
    assert tokenizer.encode("the")[0] == 0
    assert tokenizer.encode("the")[-1] == 2
    assert tokenizer.decode(tokenizer.encode("the work")) == "the work"


def test_both_files_of_unigram_pieces_give_one_vocabulary(tmp_path: Path) -> None:
    n_vocab = save_unigram(tmp_path)
    found = []
    for name in ("sentencepiece.bpe.model", "tokenizer.json"):
        tokenizer = tokenizer_of(tmp_path, n_vocab, with_json=False)
        vocabulary = tokenizer.vocabulary
        found.append((vocabulary.tokens, vocabulary.types.tolist(), vocabulary.scores.tolist()))
        if name == "sentencepiece.bpe.model":
            (tmp_path / name).unlink()
    assert found[0] == found[1]
    tokens, types, _ = found[0]
    assert types[tokens.index("<mask>")] == TokenType.CONTROL
    assert types[tokens.index("<unk>")] == TokenType.UNKNOWN


@pytest.mark.parametrize("processor", ["RobertaProcessing", "BertProcessing", "TemplateProcessing"])
def test_marks_around_a_text_are_those_of_tokenizer_json(processor: str, tmp_path: Path) -> None:
    n_vocab = save_unigram(tmp_path)
    (tmp_path / "sentencepiece.bpe.model").unlink()
    edit_json(tmp_path / "tokenizer_config.json", bos_token=None, eos_token=None)  # [CLS] and [SEP] stand for them
    description = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
    if processor != "TemplateProcessing":
        description["post_processor"] = {"type": processor, "sep": ["</s>", 2], "cls": ["<s>", 0]}
        if processor == "RobertaProcessing":
            description["post_processor"] |= {"trim_offsets": True, "add_prefix_space": True}
        (tmp_path / "tokenizer.json").write_text(json.dumps(description), "utf-8")
    judge = Tokenizers.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer = tokenizer_of(tmp_path, n_vocab)
    assert tokenizer.encode("the work") == judge.encode("the work").ids
    doubled = judge.encode("the", "work").ids.count(2) == 3
    assert tokenizer.vocabulary.flag("add_sep_token", False) == doubled


def test_a_long_text_takes_linear_time(tmp_path: Path) -> None:
    save_word_piece(tmp_path / "bert")
    n_vocab = save_unigram(tmp_path)
    kinds = [
        tokenizer_of(tmp_path, n_vocab, with_json=False),
        tokenizer_of(tmp_path, n_vocab),
        tokenizer_of(tmp_path / "bert", len(BERT_VOCAB), with_json=False),
    ]
    for tokenizer in kinds:
        for run in ("a", "the ", "é", "中", " ", "."):
            start = time.process_time()
            tokenizer.encode(run * (1 << 15))
            assert time.process_time() - start < 20, run  # a quadratic rule takes hours


HOSTILE: dict[str, Any] = {
    "a score that is no number": lambda whole: whole["model"]["vocab"][9].__setitem__(1, float("nan")),
    "an endless score": lambda whole: whole["model"]["vocab"][9].__setitem__(1, float("-inf")),
    "a score that is a text": lambda whole: whole["model"]["vocab"][9].__setitem__(1, "-1"),
    "no unknown piece": lambda whole: whole["model"].pop("unk_id"),
    "an unknown piece beyond": lambda whole: whole["model"].update(unk_id=1 << 40),
    "more pieces than rows": lambda whole: whole["model"]["vocab"].extend([f"piece {i}", -1.0] for i in range(4)),
    "a piece without a score": lambda whole: whole["model"]["vocab"].append(["x"]),
    "no table of replacements": lambda whole: whole["normalizer"].pop("precompiled_charsmap"),
    "a table of replacements that is null": lambda whole: whole["normalizer"].update(precompiled_charsmap=None),
    "an added token that is a list": lambda whole: whole["added_tokens"][0].update(content=[]),
    "a table of replacements that is a list": lambda whole: whole["normalizer"].update(precompiled_charsmap=[]),
}


@pytest.mark.parametrize("damage", HOSTILE)
def test_unsound_pieces_end_in_a_named_error(damage: str, tmp_path: Path) -> None:
    n_vocab = save_unigram(tmp_path)
    description = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
    HOSTILE[damage](description)
    (tmp_path / "tokenizer.json").write_text(json.dumps(description), "utf-8")
    with pytest.raises(FormatError) as error:
        tokenizer_of(tmp_path, n_vocab)
    assert error.value.code in ("VOCAB_INVALID", "CHECKPOINT_CONFIG")


def test_unsound_word_pieces_end_in_a_named_error(tmp_path: Path) -> None:
    save_word_piece(tmp_path)
    with pytest.raises(FormatError, match="rows of the embedding"):
        tokenizer_of(tmp_path, len(BERT_VOCAB) - 1)
    edit_json(tmp_path / "tokenizer_config.json", do_lower_case="yes")
    with pytest.raises(FormatError, match="truth values"):
        tokenizer_of(tmp_path, len(BERT_VOCAB))
    (tmp_path / "vocab.txt").write_text("a\nb\n")
    edit_json(tmp_path / "tokenizer_config.json", do_lower_case=True)
    with pytest.raises(FormatError, match="unknown words"):
        tokenizer_of(tmp_path, 2)


@pytest.mark.parametrize("unknown", [[], {}, None, 0, "[NONE]"], ids=repr)
def test_an_unknown_word_that_is_no_token_is_a_named_error(unknown: Any, tmp_path: Path) -> None:
    save_word_piece(tmp_path).backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    description = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
    description["model"]["unk_token"] = unknown
    (tmp_path / "tokenizer.json").write_text(json.dumps(description), "utf-8")
    with pytest.raises(FormatError, match="unknown words") as error:
        tokenizer_of(tmp_path, len(BERT_VOCAB))
    assert error.value.code == "VOCAB_INVALID"
