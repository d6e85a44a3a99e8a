"""Texts and small vocabularies that the tokenizer tests share."""

from __future__ import annotations

import random
from typing import Any

import numpy as np

from edgellm.tokenizer.byte_level import BYTE_OF_CHAR
from edgellm.tokenizer.vocabulary import TokenType

SCRIPTS = (  # first and last code point; ASCII three times as likely
    *((0x20, 0x7E),) * 3,
    *((0xA0, 0x24F), (0x300, 0x36F), (0x370, 0x3FF), (0x400, 0x52F), (0x590, 0x6FF), (0x900, 0xDFF), (0xE00, 0xEFF)),
    *((0x1100, 0x11FF), (0x2000, 0x27FF), (0x3000, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0xFE00, 0xFE0F)),
    *((0x1F300, 0x1FAFF), (0x10000, 0x10FFFF)),
)
FRAGMENTS = (
    *(" ", "  ", "   ", "\t", "\n", "\n\n", "\r\n", "\x00", "\x7f", "\ufeff", "\u00a0", "\u3000", "\u200d"),
    *("123", "4567890", "3.14", "1,000", "²½", "'s", "'LL", "don't", "...", "—", "e\u0301", "👩‍👩‍👧", "🤗"),
    *("the", "The ", " and", " of", "ing", "def ", "return", " =", "==", "{}", "<0x41>", "[INST]", "<table>", "\u2581"),
)


def random_texts(n: int, seed: int = 0) -> list[str]:
    """n texts of mixed scripts, spaces, newlines, digits, emoji, punctuation and combining marks."""
    source = random.Random(seed)
    texts = []
    for _ in range(n):
        parts = []
        for _ in range(source.randint(1, 30)):
            if source.random() < 0.45:
                parts.append(source.choice(FRAGMENTS))
            else:
                first, last = source.choice(SCRIPTS)
                parts.append("".join(chr(source.randint(first, last)) for _ in range(source.randint(1, 8))))
        texts.append("".join(parts).encode("utf-8", "ignore").decode())
    return texts


def every_code_point() -> list[str]:
    """All 1,112,064 characters that Unicode text can hold."""
    return [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]


def byte_pair_metadata(words: str = "", pre: str = "gpt-2", **changes: Any) -> dict[str, Any]:
    """A byte-level vocabulary: 256 bytes, the merges that spell ``words``, "<|end|>" and "<tool>" as marks.

    changes   keys below ``tokenizer.ggml.`` to set, or to remove with None
    """
    alphabet = {value: char for char, value in BYTE_OF_CHAR.items()}
    tokens = [alphabet[value] for value in range(256)]
    merges = []
    for word in words.split(","):
        text = "".join(alphabet[value] for value in word.encode())
        for end in range(2, len(text) + 1):
            if text[:end] not in tokens:
                tokens.append(text[:end])
                merges.append(f"{text[: end - 1]} {text[end - 1]}")
    types = [TokenType.NORMAL] * len(tokens) + [TokenType.CONTROL, TokenType.USER_DEFINED]
    metadata = {
        "model": "gpt2",
        "pre": pre,
        "tokens": [*tokens, "<|end|>", "<tool>"],
        "token_type": np.array(types, dtype=np.int32),
        "merges": merges,
        "eos_token_id": len(tokens),
    }
    return _keys(metadata | changes)


def sentence_piece_metadata(pieces: dict[str, float], model: str = "llama", **changes: Any) -> dict[str, Any]:
    """A SentencePiece vocabulary: <unk> <s> </s>, 256 bytes, then ``pieces`` with their scores."""
    texts = ["<unk>", "<s>", "</s>", *(f"<0x{value:02X}>" for value in range(256)), *pieces]
    types = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL] + [TokenType.BYTE] * 256
    types += [TokenType.NORMAL] * len(pieces)
    metadata = {
        "model": model,
        "tokens": texts,
        "token_type": np.array(types, dtype=np.int32),
        "scores": np.array([0.0] * 259 + list(pieces.values()), dtype=np.float32),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }
    return _keys(metadata | changes)


def _keys(values: dict[str, Any]) -> dict[str, Any]:
    return {f"tokenizer.ggml.{name}": value for name, value in values.items() if value is not None}
