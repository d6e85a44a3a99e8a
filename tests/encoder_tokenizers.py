"""Tokenizers of encoders for tests, in the files that their checkpoints have: WordPiece, unigram pieces."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from checkpoint_folders import edit_json

from edgellm.formats.checkpoint import Checkpoint
from edgellm.formats.checkpoint_folder import CheckpointFolder
from edgellm.tokenizer import Tokenizer
from edgellm.tokenizer.checkpoint_vocabulary import tokenizer_metadata

_CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,!?'\"()<>{}=-中日本語éабвг한"
_WORDS = "the hello work license of and to any shall naïve cafe HELLO The end"
_PIECES = [*_CHARACTERS, *(f"##{character}" for character in _CHARACTERS), *_WORDS.split(), "##ing", "##s", "##able"]
BERT_VOCAB = tuple(dict.fromkeys(["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *_PIECES]))
BERT_MARKS = {"cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]", "pad_token": "[PAD]"}
XLM_R_MARKS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
LICENSE = Path(__file__).parent.parent / "LICENSE"


def save_word_piece(folder: Path, **settings: Any) -> Any:
    """Write BERT's vocab.txt and its settings; the transformers tokenizer of the folder."""
    transformers = pytest.importorskip("transformers", reason="transformers writes the vocabularies of word pieces")
    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(BERT_VOCAB) + "\n", "utf-8")
    edit_json(folder / "config.json", model_type="bert")
    named = {"tokenizer_class": "BertTokenizer", "mask_token": "[MASK]"}
    edit_json(folder / "tokenizer_config.json", **BERT_MARKS, **named, **settings)
    return transformers.BertTokenizer.from_pretrained(folder)


def save_unigram(folder: Path) -> int:
    """Unigram pieces trained on this repository's licence, as XLM-RoBERTa has them: sentencepiece.bpe.model, and the
    tokenizer.json that transformers makes of such a file. How many there are.
    """
    import sentencepiece
    from tokenizers import AddedToken, models, normalizers, pre_tokenizers, processors
    from tokenizers import Tokenizer as Tokenizers

    folder.mkdir(exist_ok=True)
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(LICENSE.read_text("utf-8").split("\n")),
        model_prefix=str(folder / "sentencepiece.bpe"),
        model_type="unigram",
        vocab_size=300,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "sentencepiece.bpe.vocab").unlink()
    raw = (folder / "sentencepiece.bpe.model").read_bytes()
    processor = sentencepiece.SentencePieceProcessor(model_proto=raw)
    pieces = [(mark, 0.0) for mark in XLM_R_MARKS[:4]]
    pieces += [(processor.IdToPiece(i), processor.GetScore(i)) for i in range(3, processor.GetPieceSize())]
    pieces.append(("<mask>", 0.0))
    tokenizer = Tokenizers(models.Unigram(pieces, unk_id=3))
    tokenizer.normalizer = normalizers.Precompiled(_charsmap(raw))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    tokenizer.add_special_tokens([*XLM_R_MARKS[:4], AddedToken("<mask>", lstrip=True)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    edit_json(folder / "config.json", model_type="xlm-roberta")
    named = {"bos_token": "<s>", "eos_token": "</s>", "cls_token": "<s>", "sep_token": "</s>", "unk_token": "<unk>"}
    edit_json(folder / "tokenizer_config.json", **named, pad_token="<pad>", mask_token="<mask>")
    return len(pieces)


def tokenizer_of(folder: Path, n_vocab: int, **options: Any) -> Tokenizer:
    """edgellm's tokenizer of a folder, by way of the metadata that its GGUF file would have."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    metadata, _ = tokenizer_metadata(
        Checkpoint(CheckpointFolder(folder), config, {}), n_vocab, space_prefix=True, **options
    )
    return Tokenizer.from_gguf({key: value for key, (value, _) in metadata.items()})


def _charsmap(model: bytes) -> bytes:
    from edgellm.tokenizer.charsmap import stored_charsmaps

    return stored_charsmaps(model)[0]
