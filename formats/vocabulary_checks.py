"""Check the vocabulary in a file's metadata: array types and lengths, special ids, byte tokens, merges.

What the tokenizer relies on is checked at every load, once, on whole arrays. What costs a look at every token is
checked by ``edgellm verify`` only; a tokenizer refuses those files when it is built.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from edgellm.formats.findings import REBUILD, Report, short
from edgellm.formats.gguf_header import Header

MAX_TOKEN_NBYTES = 1 << 16
BYTE_TOKEN = 6  # tokenizer.ggml.token_type of "<0x00>" to "<0xFF>"
MAX_TOKEN_TYPE = 6
BYTE_TEXT = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_TOKENS, _SCORES, _TYPES = (f"tokenizer.ggml.{name}" for name in ("tokens", "scores", "token_type"))
_MERGES = "tokenizer.ggml.merges"
_ADD_BOS = "tokenizer.ggml.add_bos_token"
# more tokens that end an answer, of Ollama's converter; those that no answer holds, of llama.cpp's
_ID_LISTS = ("tokenizer.ggml.eos_token_ids", "tokenizer.ggml.suppress_tokens")
_WHOLE_NUMBERS = ("UINT32", "INT32", "UINT64", "INT64", "UINT16", "INT16", "UINT8", "INT8")
_KNOWN_BY_RULE = ("llama", "bert")  # tokenizer models whose special ids have values by convention

KEY_TYPES: dict[str, tuple[str, ...]] = {
    "tokenizer.ggml.model": ("STRING",),
    "tokenizer.ggml.pre": ("STRING",),
    _TOKENS: ("ARRAY[STRING]",),
    _SCORES: ("ARRAY[FLOAT32]",),
    _TYPES: ("ARRAY[INT32]", "ARRAY[UINT32]"),
    _MERGES: ("ARRAY[STRING]",),
    "tokenizer.ggml.precompiled_charsmap": ("ARRAY[UINT8]", "ARRAY[INT8]"),
    **dict.fromkeys(_ID_LISTS, (*_WHOLE_NUMBERS, *(f"ARRAY[{kind}]" for kind in _WHOLE_NUMBERS))),
    _ADD_BOS: ("BOOL",),
    "tokenizer.ggml.add_eos_token": ("BOOL",),
    "tokenizer.ggml.add_space_prefix": ("BOOL",),
    "tokenizer.ggml.remove_extra_whitespaces": ("BOOL",),
    "tokenizer.huggingface.json": ("STRING",),
    "tokenizer.chat_template": ("STRING",),
}


def check_vocabulary(header: Header, n_embedding_rows: int | None, report: Report) -> None:
    """The checks of every load. ``n_embedding_rows``: rows of ``token_embd.weight``, where the model has one."""
    metadata = header.metadata
    checker = _Checker(header, report)
    if not checker.key_types():
        return  # the checks below rely on the types
    tokens = metadata.get(_TOKENS)
    if tokens is None:
        return
    for key, message in array_faults(tokens, metadata.get(_SCORES), metadata.get(_TYPES)):
        checker.found("VOCAB_INVALID", message, key)
    checker.special_ids(len(tokens))
    if n_embedding_rows is not None and n_embedding_rows != len(tokens):
        message = f"has {len(tokens):,} tokens, and token_embd.weight has {n_embedding_rows:,} rows; expected as many"
        checker.found("VOCAB_SPECIAL_ID", message, _TOKENS)


def array_faults(tokens: list[str], scores: np.ndarray | None, types: np.ndarray | None) -> Iterator[tuple[str, str]]:
    """(key, what is wrong): as many values as tokens, scores are numbers, types exist, byte tokens name a byte, no
    token is absurdly long."""
    for key, values in ((_SCORES, scores), (_TYPES, types)):
        if values is not None and len(values) != len(tokens):
            yield key, f"has {len(values):,} values for {len(tokens):,} tokens"
    if types is not None and len(types):
        if types.min() < 0 or types.max() > MAX_TOKEN_TYPE:
            yield _TYPES, f"has types outside 0 to {MAX_TOKEN_TYPE}"
        for i in np.flatnonzero(types[: len(tokens)] == BYTE_TOKEN):
            if not BYTE_TEXT.fullmatch(tokens[i]):
                yield _TOKENS, f"token {i:,} is of the type byte and reads {short(tokens[i])!r}, expected '<0x0A>'"
    if scores is not None and not np.isfinite(scores).all():
        yield _SCORES, f"the score of token {int(np.flatnonzero(~np.isfinite(scores))[0]):,} is not a number"
    if max(map(len, tokens), default=0) > MAX_TOKEN_NBYTES // 4:  # UTF-8 has up to 4 bytes a character
        nbytes = max(len(token.encode("utf-8", "surrogateescape")) for token in tokens)
        if nbytes > MAX_TOKEN_NBYTES:
            yield _TOKENS, f"has a token of {nbytes:,} bytes, expected up to {MAX_TOKEN_NBYTES:,}"


def check_every_token(header: Header, report: Report) -> None:
    """The checks that look at every token and merge: merges name tokens, and no token is there twice."""
    metadata, types = header.metadata, header.types
    if types.get(_TOKENS) != "ARRAY[STRING]":
        return
    checker = _Checker(header, report)
    tokens = metadata[_TOKENS]
    known = set(tokens)
    if len(known) < len(tokens):
        message = f"has {len(tokens) - len(known):,} tokens twice; the one with the lowest id is used"
        checker.found("VOCAB_INVALID", message, _TOKENS, severity="warning")
    if types.get(_MERGES) == "ARRAY[STRING]":
        bad = bad_merges(known, metadata[_MERGES])
        if bad:
            message = f"{len(bad):,} merges name tokens that do not exist, the first is {short(bad[0])!r}"
            checker.found("VOCAB_MERGES", message, _MERGES)


def bad_merges(tokens: set[str], merges: list[str]) -> list[str]:
    """The merges ("left right") whose left, right or joined part is no token."""
    bad = []
    for merge in merges:
        space = merge.find(" ", 1)
        left, right = merge[:space], merge[space + 1 :]
        if space < 0 or left not in tokens or right not in tokens or left + right not in tokens:
            bad.append(merge)
    return bad


class _Checker:
    """The vocabulary of one header, and where to report what is wrong with it."""

    def __init__(self, header: Header, report: Report) -> None:
        self.header = header
        self.metadata: dict[str, Any] = header.metadata
        self.report = report

    def found(self, code: str, message: str, key: str, severity: str = "error", advice: str = REBUILD) -> None:
        self.report(self.header.finding(code, message, key, advice, severity))

    def key_types(self) -> bool:
        """Whether every known key has a type that its readers expect."""
        wrong = []
        for key, kind in self.header.types.items():
            expected = _WHOLE_NUMBERS if _is_id(key) else KEY_TYPES.get(key)
            if expected and kind not in expected:
                advice = f"Give the id with --override-kv {key}=int:ID." if _is_id(key) else REBUILD
                self.found("GGUF_KEY_TYPE", f"is {kind}, expected {expected[0]}", key, advice=advice)
                wrong.append(key)
        return not wrong

    def special_ids(self, n_vocab: int) -> None:
        """Ids are tokens, and a token that is to be added exists. Like llama.cpp, an id that is none counts as missing
        where nothing depends on it.
        """
        for key in filter(_is_id, self.metadata):
            value = self.metadata[key]
            if 0 <= value < n_vocab:
                continue
            added = key.replace("tokenizer.ggml.", "tokenizer.ggml.add_").removesuffix("_id")
            give = f"Give the id with --override-kv {key}=int:ID"
            if self._adds(added):
                advice = f"{give}, or leave the token out of texts with --override-kv {added}=bool:false."
                self.found("VOCAB_SPECIAL_ID", _no_id(value, n_vocab), key, advice=advice)
            else:
                message = f"{_no_id(value, n_vocab)}: it counts as missing"
                self.found("VOCAB_SPECIAL_ID", message, key, "warning", f"{give} if answers do not end as they should.")
        for key in _ID_LISTS:
            ids = np.atleast_1d(self.metadata.get(key, [])).tolist()
            if wrong := [value for value in ids if not 0 <= value < n_vocab]:
                self.found("VOCAB_SPECIAL_ID", f"{_no_id(wrong[0], n_vocab)}: it is left out", key, "warning")
        for name in ("bos", "eos"):
            key = f"tokenizer.ggml.add_{name}_token"
            implied = self.metadata.get("tokenizer.ggml.model") in _KNOWN_BY_RULE
            if self.metadata.get(key) and f"tokenizer.ggml.{name}_token_id" not in self.metadata and not implied:
                self.found("VOCAB_SPECIAL_ID", f"is true, and there is no tokenizer.ggml.{name}_token_id", key)

    def _adds(self, key: str) -> bool:
        """Whether ``tokenizer.ggml.add_bos_token`` or its like holds, said or by convention."""
        by_rule = key == _ADD_BOS and self.metadata.get("tokenizer.ggml.model") in _KNOWN_BY_RULE
        return bool(self.metadata.get(key, by_rule))


def _is_id(key: str) -> bool:
    return key.startswith("tokenizer.ggml.") and key.endswith("_token_id")


def _no_id(value: int, n_vocab: int) -> str:
    return f"is {short(f'{value:,}' if abs(value) < 1 << 64 else value)}, expected 0 to {n_vocab - 1:,}"
