"""The name of a pre-tokenizer is found from what it does: published patterns, and patterns written another way."""

from __future__ import annotations

import json

import pytest
from checkpoint_folders import LLAMA3_PATTERN, QWEN2_PATTERN, byte_level_tokenizer
from tokenizers import Regex, normalizers, pre_tokenizers

from edgellm.tokenizer.pre_detection import find_pre

START = r"[^\r\n\p{L}\p{N}]?"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
REST = r"\s*[\r\n]+|\s+(?!\S)|\s+"
SYMBOLS = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"
DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    rf"{SYMBOLS}|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+| ?[\p{{P}}\p{{S}}]+[\r\n]*|{REST}",
)


def cased(contractions: str, digits: str) -> str:
    words = rf"{START}{UPPER}*{LOWER}+{contractions}|{START}{UPPER}+{LOWER}*{contractions}"
    return rf"{words}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{REST}"


GPT4O = cased("(?i:'s|'t|'re|'ve|'m|'ll|'d)?", r"\p{N}{1,3}")
TEKKEN = cased("", r"\p{N}")
# the same cuts as Llama 3's, written another way
LLAMA3_TWIN = LLAMA3_PATTERN.replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)", "'(?i:[stmd]|re|ve|ll)")


@pytest.mark.parametrize(
    ("patterns", "normalizer", "ignore_merges", "name"),
    [
        ((GPT4O,), None, False, "gpt-4o"),
        ((TEKKEN,), None, True, "tekken"),
        (DEEPSEEK_V3, None, False, "deepseek-v3"),
        ((LLAMA3_PATTERN,), None, True, "llama-bpe"),
        ((LLAMA3_PATTERN,), None, False, "dbrx"),
        ((LLAMA3_TWIN,), None, True, "llama-bpe"),
        ((QWEN2_PATTERN,), normalizers.NFC(), False, "qwen2"),
        ((QWEN2_PATTERN,), normalizers.Sequence([normalizers.NFC()]), False, "qwen2"),
        ((QWEN2_PATTERN,), None, False, "hunyuan"),
    ],
)
def test_a_published_pattern_is_recognised(
    patterns: tuple[str, ...], normalizer: normalizers.Normalizer | None, ignore_merges: bool, name: str
) -> None:
    tokenizer = byte_level_tokenizer("gpt-2")
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    description = json.loads(tokenizer.to_str())
    description["model"]["ignore_merges"] = ignore_merges
    assert find_pre(tokenizer, description) == (name, True)


def test_a_rule_that_differs_in_whole_words_alone_is_said_to_differ() -> None:
    tokenizer = byte_level_tokenizer("smollm")
    description = json.loads(tokenizer.to_str())
    description["model"]["ignore_merges"] = True
    assert find_pre(tokenizer, description) == ("smollm", False)
    assert find_pre(byte_level_tokenizer("new"), description) == (None, False)
