"""Which ``tokenizer.ggml.pre`` name a Hugging Face tokenizer has: found by what it does, not by what it is called.

A set of probe texts is cut by the tokenizer's own normalizer and pre-tokenizer and by every rule of the table; the rule
that cuts them all alike is the one. So a tokenizer with another vocabulary, or with the same pattern written
another way, is recognised too.
"""

from __future__ import annotations

import itertools
from typing import Any

from tokenizers import Tokenizer, normalizers

from edgellm.tokenizer import pre_tokenizers as table
from edgellm.tokenizer.byte_level import pre_tokenizer_of

# of rules that cut alike, the name that most files have
USUAL_NAMES = ("llama-bpe", "qwen2", "gpt-2", "smollm", "tekken", "gpt-4o", "deepseek-v3", "dbrx", "hunyuan", "mpt")

# fmt: off
_WORDS = (
    "don't I'LL we've 'tis", "O'Reilly's 'RE", "camelCaseWORDS HTMLParser iPhone", "naïve Ünder ǅungla ﬁn",
    "snake_case",
)
_DIGITS = ("1", "12", "123", "1234", "12345", "1234567", "3.14 1,000,000", "a1b22c333", "²³ ½ ٣٤٥ १२३४", "x12y 7z")
_SPACES = (
    " ", "  ", "   a", "a   b", "\n", "\n\n", " \n \n a", "a \n", "\t\tx", "\r\n\r\nx", "a\u00a0b\u3000c", "x \t y   ",
)
_MARKS = (
    "!!!", "a.b", "a...b", "(x) [y] {z}", "<|x|> </s>", "a/b//c", "./\n/\n", "+=-*/ $5 €9 ^~`|", "¿qué? «oui» „ja“",
    "!\n\n?", "#1 @me", "------======", "'''```\"\"\"", "a_b__c", ".,!?…。，、।۔،", "~$x", "_x -y +z =w <v", "'a \"b",
)
_SCRIPTS = (
    "我想在apple工作1314151天", "日本語のテキスト、カタカナ", "한국어 텍스트 ㄱㄴ", "Привет, мир", "Ελληνικά",
    "नमस्ते दुनिया",
    "ไทยไม่มีเว้นวรรค", "العربية ١٢٣", "កាន់តែពិសេស", "e\u0301 cafe\u0301 o\u0308 Å\u212b", "שלום",
    "🚀 😶\u200d🌫️ ✅🦙🦙", "１２３ ＡＢＣ", "ﷺ ㍿",
)
# fmt: on


def _probes() -> list[str]:
    parts = [*_WORDS, *_DIGITS, *_SPACES, *_MARKS, *_SCRIPTS]
    pairs = [a + b for a, b in itertools.product(("a", "1", " ", "\n", ".", "'s", "我"), parts)]
    return [*parts, *pairs, " ".join(parts), "".join(parts), "\n".join(parts)]


PROBES = _probes()


def find_pre(tokenizer: Tokenizer, description: dict[str, Any]) -> tuple[str | None, bool]:
    """The name of the rule that cuts as ``tokenizer`` does, None when no rule of the table does; whether it also takes
    whole words that are tokens as ``description``, its tokenizer.json, says (``ignore_merges``).
    """
    wanted = [_cuts(tokenizer.normalizer, tokenizer.pre_tokenizer, text) for text in PROBES]
    model = description.get("model")
    ignore_merges = bool(model.get("ignore_merges", False)) if isinstance(model, dict) else False
    names = sorted(table.PRE_TOKENIZERS, key=lambda name: name not in USUAL_NAMES)
    tried: dict[table.PreTokenizer, bool] = {}
    near = None
    for name in names:
        rule = table.PRE_TOKENIZERS[name]
        if rule.byte_level and rule not in tried:
            tried[rule] = _cuts_like(rule, wanted)
        if tried.get(rule) and rule.ignore_merges == ignore_merges:
            return name, True
        near = near or (name if tried.get(rule) else None)
    return near, False


def _cuts_like(rule: table.PreTokenizer, wanted: list[list[str]]) -> bool:
    steps = pre_tokenizer_of(rule)
    normalizer = normalizers.NFC() if rule.normalizer == "NFC" else None
    return all(_cuts(normalizer, steps, text) == cuts for text, cuts in zip(PROBES, wanted, strict=True))


def _cuts(normalizer: Any, pre_tokenizer: Any, text: str) -> list[str]:
    """The words of a text, spelled in the byte alphabet."""
    if normalizer is not None:
        text = normalizer.normalize_str(text)
    return [word for word, _ in pre_tokenizer.pre_tokenize_str(text)]
