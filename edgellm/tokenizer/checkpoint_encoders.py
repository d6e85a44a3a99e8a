"""The vocabularies of encoders: BERT's WordPiece, and the unigram pieces of XLM-RoBERTa and its kin.

Both are read from a tokenizer.json. A folder with an older file, vocab.txt or sentencepiece.bpe.model, gets the
tokenizer.json that transformers makes of it, and goes the same way.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from edgellm.formats.checkpoint import Checkpoint
from edgellm.formats.findings import short
from edgellm.formats.gguf_header import TypedMetadata
from edgellm.tokenizer.charsmap import checked_charsmap, stored_charsmaps
from edgellm.tokenizer.checkpoint_tokens import MAX_TOKENIZER_NBYTES, Tokens, below, invalid, vocab_of
from edgellm.tokenizer.vocabulary import SPACE, TokenType

CONTINUATION = "##"
WORD_PIECE_FILE, UNIGRAM_FILE = "vocab.txt", "sentencepiece.bpe.model"
_BERT_MARKS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_XLM_R_MARKS = ("<s>", "<pad>", "</s>", "<unk>")  # ids 0 to 3; the model's own file has three others there


# -- WordPiece -------------------------------------------------------------------------------------------------------


def word_pieces(description: Mapping[str, Any], n_vocab: int) -> Tokens:
    """All ids of a WordPiece vocabulary, spelled as in GGUF: U+2581 before what starts a word, and no "##"."""
    model = description["model"]
    if model.get("continuing_subword_prefix", CONTINUATION) != CONTINUATION:
        raise invalid(f"continuing_subword_prefix {short(model['continuing_subword_prefix'])}", repr(CONTINUATION))
    tokens = Tokens.empty("bert", n_vocab)
    unknown = model.get("unk_token", "[UNK]")
    vocab = vocab_of(model.get("vocab"), n_vocab)
    if not isinstance(unknown, str) or unknown not in vocab:
        raise invalid(f"no token {short(unknown)} in a WordPiece vocabulary", "one for unknown words")
    for text, token_id in vocab.items():
        tokens.put(token_id, *((text, TokenType.CONTROL) if text == unknown else (spelled(text), TokenType.NORMAL)))
    return tokens


def spelled(text: str) -> str:
    """A token of BERT's as GGUF writes it."""
    return text[len(CONTINUATION) :] if text.startswith(CONTINUATION) else SPACE + text


def word_piece_metadata(description: Mapping[str, Any]) -> TypedMetadata:
    """Whether letters are lowered and accents taken off, where tokenizer.json says it."""
    found: TypedMetadata = {}
    for part in _parts(description.get("normalizer"), "normalizers"):
        kind = part.get("type")
        settings = part if kind == "BertNormalizer" else {"lowercase": kind == "Lowercase" or None}
        settings |= {"strip_accents": True} if kind == "StripAccents" else {}
        for name in ("lowercase", "strip_accents"):
            if isinstance(settings.get(name), bool):
                found[f"tokenizer.ggml.normalizer.{name}"] = (settings[name], "BOOL")
    return found


def normalizes_as_bert(description: Mapping[str, Any]) -> bool:
    """Whether Chinese characters are words of their own, and control characters are left out."""
    parts = _parts(description.get("normalizer"), "normalizers")
    return all(part.get(key, True) for part in parts for key in ("clean_text", "handle_chinese_chars"))


def word_piece_description(checkpoint: Checkpoint) -> dict[str, Any]:
    """The tokenizer.json of a vocab.txt: BERT's tokenizer with the settings of tokenizer_config.json."""
    lines = (checkpoint.text(WORD_PIECE_FILE, MAX_TOKENIZER_NBYTES) or "").split("\n")
    lines = lines[:-1] if lines[-1] == "" else lines
    vocab = {line.rstrip("\r"): i for i, line in enumerate(lines)}
    config = checkpoint.json("tokenizer_config.json") or {}
    lowercase, accents = config.get("do_lower_case", True), config.get("strip_accents")
    spaced = config.get("tokenize_chinese_chars", True)
    if not all(isinstance(value, bool) for value in (lowercase, spaced)) or not isinstance(accents, bool | None):
        raise invalid("settings of BERT's normalizer that are no truth values", "true or false")
    return {
        "added_tokens": [_mark(vocab[text], text) for text in _BERT_MARKS if text in vocab],
        "normalizer": {
            "type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": spaced, "strip_accents": accents,
            "lowercase": lowercase,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": _template(["[CLS]", "A", "[SEP]"], ["[CLS]", "A", "[SEP]", "B", "[SEP]"], vocab),
        "decoder": {"type": "WordPiece", "prefix": CONTINUATION, "cleanup": True},
        "model": {
            "type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": CONTINUATION,
            "max_input_chars_per_word": 100, "vocab": vocab,
        },
    }  # fmt: skip


# -- unigram ---------------------------------------------------------------------------------------------------------


def unigram_pieces(description: Mapping[str, Any], n_vocab: int) -> Tokens:
    """All ids of a unigram vocabulary with their log-probabilities. The unknown one is UNKNOWN."""
    model = description["model"]
    pieces = model["vocab"]
    if len(pieces) > n_vocab:
        raise invalid(f"{len(pieces):,} pieces", below(n_vocab))
    unknown = model.get("unk_id")
    if type(unknown) is not int or not 0 <= unknown < len(pieces):
        raise invalid(f"unk_id {short(unknown)}", "the id of the piece for unknown text")
    tokens = Tokens.empty("t5", n_vocab)
    for token_id, (text, score) in enumerate(pieces):
        if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
            raise invalid(f"the score {short(score)} of the piece {short(text)}", "a number")
        tokens.put(token_id, text, TokenType.UNKNOWN if token_id == unknown else TokenType.NORMAL, float(score))
    return tokens


def unigram_metadata(description: Mapping[str, Any]) -> TypedMetadata:
    """What happens to a text before it is cut: the table of replacements, and what becomes of runs of spaces."""
    normalizers = list(_parts(description.get("normalizer"), "normalizers"))
    cuts = list(_parts(description.get("pre_tokenizer"), "pretokenizers"))
    joined = any(part.get("type") == "WhitespaceSplit" for part in cuts) or any(
        part.get("type") == "Replace" and "{2,}" in json.dumps(part.get("pattern")) for part in normalizers
    )
    found: TypedMetadata = {"tokenizer.ggml.remove_extra_whitespaces": (joined, "BOOL")}
    tables = [part["precompiled_charsmap"] for part in normalizers if part.get("type") == "Precompiled"]
    if tables and (table := base64.b64decode(tables[0])):  # proved with the other parts of the description
        found["tokenizer.ggml.precompiled_charsmap"] = (np.frombuffer(table, np.uint8), "ARRAY[UINT8]")
    return found


def unigram_description(checkpoint: Checkpoint) -> dict[str, Any]:
    """The tokenizer.json of a sentencepiece.bpe.model: that of XLM-RoBERTa, whose first ids are others."""
    import sentencepiece

    raw = checkpoint.files.read(UNIGRAM_FILE, MAX_TOKENIZER_NBYTES) or b""
    processor = sentencepiece.SentencePieceProcessor()
    try:
        tables = [checked_charsmap(table, lambda: RuntimeError("a table that is not sound")) for table in
                  stored_charsmaps(raw)]  # fmt: skip
        processor.LoadFromSerializedProto(raw)
    except RuntimeError as error:
        raise invalid(f"{UNIGRAM_FILE} that sentencepiece refuses ({short(str(error))})", "its model file") from error
    pieces: list[tuple[str, float]] = [(text, 0.0) for text in _XLM_R_MARKS]
    pieces += [(processor.IdToPiece(i), processor.GetScore(i)) for i in range(3, processor.GetPieceSize())]
    pieces.append(("<mask>", 0.0))
    ids = {text: i for i, (text, _) in enumerate(pieces)}
    marks = [_mark(ids[text], text) for text in _XLM_R_MARKS] + [_mark(ids["<mask>"], "<mask>", lstrip=True)]
    table = base64.b64encode(tables[0] if tables else b"").decode()
    metaspace = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "always", "split": True}
    return {
        "added_tokens": marks,
        "normalizer": {"type": "Precompiled", "precompiled_charsmap": table} if table else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, metaspace]},
        "post_processor": _template(["<s>", "A", "</s>"], ["<s>", "A", "</s>", "</s>", "B", "</s>"], ids),
        "decoder": metaspace,
        "model": {"type": "Unigram", "unk_id": 3, "vocab": [list(piece) for piece in pieces], "byte_fallback": False},
    }


# -- both ------------------------------------------------------------------------------------------------------------


def _parts(found: Any, list_key: str) -> list[dict[str, Any]]:
    """The parts of a component whose description is believed, those of sequences one by one."""
    if not isinstance(found, dict):
        return []
    if found.get("type") == "Sequence":
        return [part for one in found[list_key] for part in _parts(one, list_key)]
    return [found]


def _mark(token_id: int, text: str, *, lstrip: bool = False) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": lstrip, "rstrip": False, "normalized": False}
    return {"id": token_id, "content": text, "special": True} | flags


def _template(single: list[str], pair: list[str], ids: Mapping[str, int]) -> dict[str, Any] | None:
    """What stands around one text, and around two; None where a mark is missing."""

    def pieces(names: list[str]) -> list[dict[str, Any]]:
        return [{"Sequence" if name in ("A", "B") else "SpecialToken": {"id": name, "type_id": 0}} for name in names]

    marks = [name for name in dict.fromkeys(pair) if name not in ("A", "B")]
    if any(name not in ids for name in marks):
        return None
    return {
        "type": "TemplateProcessing",
        "single": pieces(single),
        "pair": pieces(pair),
        "special_tokens": {name: {"id": name, "ids": [ids[name]], "tokens": [name]} for name in marks},
    }
