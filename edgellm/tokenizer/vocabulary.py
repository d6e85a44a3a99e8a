"""The vocabulary a GGUF file carries: texts, kinds and scores of its tokens, and which ids mean what, all checked.

Nothing here splits text. The kinds are llama.cpp's token types; the rules for defaults are those of its
``llama-vocab.cpp``, so that a file means here what it means there.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import cached_property
from typing import Any

import numpy as np

from edgellm.formats.errors import FormatError, UnsupportedError
from edgellm.formats.vocabulary_checks import BYTE_TEXT, array_faults

SPACE = "\u2581"  # how SentencePiece writes a space
_MARK_SHAPE = re.compile("<\\|[^|\\s]+\\|>|<\uff5c[^\uff5c\\s]+\uff5c>")


class TokenType(IntEnum):
    """The values of ``tokenizer.ggml.token_type``."""

    UNDEFINED = 0
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of one file, in the order of their ids.

    kind       ``tokenizer.ggml.model``: "gpt2", "llama", "t5", "bert", ...
    pre        ``tokenizer.ggml.pre``, or "default"
    tokens     texts as the file spells them
    types      (n_vocab,) int32, TokenType
    scores     (n_vocab,) float32; zeros where the file has none
    merges     "left right" in order of rank; empty where the kind needs none
    metadata   the file's other keys, for the settings of one kind only
    """

    kind: str
    pre: str
    tokens: list[str]
    types: np.ndarray
    scores: np.ndarray
    merges: list[str]
    metadata: Mapping[str, Any]

    @classmethod
    def from_metadata(
        cls, metadata: Mapping[str, Any], pre: str | None = None, *, proved: bool = False
    ) -> "Vocabulary":
        """Read the vocabulary, and check it where no validator has. FormatError VOCAB_INVALID where the arrays do not
        fit together, UnsupportedError for a file that says it has none.
        """
        kind = _typed(metadata, "tokenizer.ggml.model", str, None)
        if kind is None:
            raise FormatError(
                "The file has no tokenizer.ggml.model, so its text cannot be tokenized. Expected one of "
                "gpt2, llama, t5, bert. Use a GGUF file that was converted together with its vocabulary.",
                code="VOCAB_INVALID",
            )
        tokens = _typed(metadata, "tokenizer.ggml.tokens", list, [])
        n_vocab = len(tokens)
        if n_vocab == 0 and kind in ("none", "no_vocab"):
            raise UnsupportedError(
                f"The file says that it has no vocabulary (tokenizer.ggml.model is {kind!r}), so its text cannot be "
                "tokenized. Use a GGUF file that was converted together with its vocabulary.",
                code="TOKENIZER_MODEL",
            )
        if n_vocab == 0:
            raise invalid("tokenizer.ggml.tokens is empty", "one text for each token id")
        types = _array(metadata, "tokenizer.ggml.token_type", np.int32)
        scores = _array(metadata, "tokenizer.ggml.scores", np.float32)
        for key, message in () if proved else array_faults(tokens, scores, types):
            raise invalid(f"that {key} {message}", "sound values, one for each token")
        if types is None:
            types = _guess_types(metadata, tokens)
        if scores is None:
            scores = np.zeros(n_vocab, dtype=np.float32)
        merges = _typed(metadata, "tokenizer.ggml.merges", list, [])
        own_pre = "gemma4" if kind == "gemma4" else _typed(metadata, "tokenizer.ggml.pre", str, None)
        pre = pre or own_pre or ("whitespace" if kind == "whitespace" else "default")
        return cls(kind, pre, tokens, types, scores, merges, metadata)

    @property
    def n_vocab(self) -> int:
        """How many ids there are."""
        return len(self.tokens)

    def ids_of(self, *types: TokenType) -> list[int]:
        """The ids whose type is one of these, ascending."""
        return np.flatnonzero(np.isin(self.types, types)).tolist()

    def without_text_for(self, hidden: Iterable[int]) -> "Vocabulary":
        """This vocabulary with the tokens ``hidden`` typed CONTROL, so that no text becomes one of them."""
        types = self.types.copy()
        ids = np.fromiter(hidden, dtype=np.int64)
        types[ids[types[ids] != TokenType.UNKNOWN]] = TokenType.CONTROL
        return replace(self, types=types)

    @cached_property
    def not_text(self) -> frozenset[int]:
        """The ids of tokens that are not Unicode: they can be decoded, and no text becomes one."""
        if is_sound("".join(self.tokens)):
            return frozenset()
        return frozenset(i for i, token in enumerate(self.tokens) if not is_sound(token))

    @cached_property
    def byte_ids(self) -> dict[int, int]:
        """Byte value -> id of its "<0xNN>" token; FormatError where a byte token is written otherwise or twice."""
        ids: dict[int, int] = {}
        for token_id in self.ids_of(TokenType.BYTE):
            match = BYTE_TEXT.fullmatch(self.tokens[token_id])
            if match is None:
                raise invalid(f"the byte token {self.tokens[token_id]!r} (id {token_id})", "<0x00> to <0xFF>")
            value = int(match[1], 16)
            if value in ids:
                raise invalid(f"two tokens for byte <0x{value:02X}> (ids {ids[value]} and {token_id})", "one")
            ids[value] = token_id
        return ids

    def special_id(self, name: str, default: int | None = None) -> int | None:
        """``tokenizer.ggml.<name>`` as an id of this vocabulary. The default where the file is silent or, as in
        llama.cpp, where its number is no id; see ``wrong_id``.
        """
        value = self.metadata.get(f"tokenizer.ggml.{name}")
        if value is not None and not self.wrong_id(name):
            return int(value)
        return default if default is not None and default < self.n_vocab else None

    def wrong_id(self, name: str) -> bool:
        """Whether the file has ``tokenizer.ggml.<name>`` and it is no id of this vocabulary. FormatError
        VOCAB_SPECIAL_ID for what is no whole number.
        """
        value = self.metadata.get(f"tokenizer.ggml.{name}")
        if value is None:
            return False
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
            raise self.id_error(name, "a whole number")
        return not 0 <= value < self.n_vocab

    def id_error(self, name: str, use: str, other: str = "") -> FormatError:
        """The error of an id that is missing or wrong: what for it is needed, and what else there is to do."""
        key = f"tokenizer.ggml.{name}"
        found = f"is {self.metadata[key]!r}" if key in self.metadata else "is not there"
        return FormatError(
            f"{key} {found}; expected an id from 0 to {self.n_vocab - 1}, {use}. The file is damaged or was converted "
            f"wrongly: convert it again, or give the id with --override-kv {key}=int:ID{other}.",
            code="VOCAB_SPECIAL_ID",
        )

    def flag(self, name: str, default: bool) -> bool:
        """``tokenizer.ggml.<name>`` as a truth value, or the default."""
        return bool(_typed(self.metadata, f"tokenizer.ggml.{name}", (bool, np.bool_), default))


def is_sound(text: str) -> bool:
    """Whether a text is Unicode: a file's bytes that are not UTF-8 come as halves of surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def has_mark_shape(text: str) -> bool:
    """Whether a token is written ``<|...|>``: people add such tokens, no training on text makes them."""
    return text.startswith("<") and _MARK_SHAPE.fullmatch(text) is not None


def invalid(found: str, expected: str) -> FormatError:
    """The error of a vocabulary whose parts do not fit."""
    return FormatError(
        f"The vocabulary is not sound: found {found}; expected {expected}. "
        "The file is damaged or was converted wrongly: download or convert it again.",
        code="VOCAB_INVALID",
    )


def _typed(metadata: Mapping[str, Any], key: str, expected: type | tuple[type, ...], default: Any) -> Any:
    value = metadata.get(key)
    if value is None:
        return default
    if not isinstance(value, expected):
        raise invalid(f"{key} of type {type(value).__name__}", str(expected))
    return value


def _array(metadata: Mapping[str, Any], key: str, dtype: type) -> np.ndarray | None:
    value = metadata.get(key)
    if value is None:
        return None
    array = np.asarray(value)
    if array.ndim != 1 or array.dtype.kind not in "iuf":
        raise invalid(f"{key} that is not a list of numbers", "one for each token")
    return array.astype(dtype)


def _guess_types(metadata: Mapping[str, Any], tokens: list[str]) -> np.ndarray:
    """Types for an old file without them: its special ids are CONTROL, "<0xNN>" of SentencePiece kinds BYTE."""
    types = np.full(len(tokens), TokenType.NORMAL, dtype=np.int32)
    if metadata.get("tokenizer.ggml.model") in ("llama", "t5"):
        types[[i for i, token in enumerate(tokens) if BYTE_TEXT.fullmatch(token)]] = TokenType.BYTE
    for name in ("bos_token_id", "eos_token_id", "eot_token_id", "eom_token_id", "unknown_token_id"):
        value = metadata.get(f"tokenizer.ggml.{name}")
        if isinstance(value, (int, np.integer)) and 0 <= value < len(tokens):
            types[value] = TokenType.CONTROL
    return types
