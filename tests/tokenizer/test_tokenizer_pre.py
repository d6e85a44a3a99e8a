"""Every pre-tokenizer of the table builds, cuts as its patterns say, loses nothing, and takes linear time."""

from __future__ import annotations

import itertools
import random
import re
import time
import unicodedata

import pytest
from tokenizer_texts import byte_pair_metadata, random_texts
from tokenizers import Regex, pre_tokenizers

from edgellm.formats.errors import UnsupportedError
from edgellm.tokenizer import Tokenizer
from edgellm.tokenizer import pre_tokenizers as table
from edgellm.tokenizer.byte_level import BYTE_OF_CHAR, BytePairs, _step
from edgellm.tokenizer.pre_tokenizers import PRE_TOKENIZERS
from edgellm.tokenizer.vocabulary import Vocabulary

NOT_PATTERNS = {table.DIGITS, table.DIGIT_RUNS, table.PUNCTUATION_RUNS, table.WHITESPACE, table.BYTES}
ONE_NAME_PER_ROW = {row: name for name, row in PRE_TOKENIZERS.items()}
WORD_BOUNDARY = r"(?<!\d)\d++\b"  # engines differ over which marks are part of a word
PATTERNS = sorted({step for row in PRE_TOKENIZERS.values() for step in row.steps} - NOT_PATTERNS - {WORD_BOUNDARY})

# (name, text, words), worked out by hand from the models' published patterns
KNOWN_CUTS = (
    ("llama-bpe", "1234567 I'LL  go", ["123", "456", "7", " I", "'LL", " ", " go"]),
    ("gpt-2", "1234567 I'll go", ["1234567", " I", "'ll", " go"]),
    ("qwen2", "a1234 b", ["a", "1", "2", "3", "4", " b"]),
    ("smollm", "in 1945, don't", ["in", " ", "1", "9", "4", "5", ",", " don", "'t"]),
    ("deepseek-v3", "x=1234;日本語 a.b", ["x", "=", "123", "4", ";", "日本語", " a", ".b"]),
    ("deepseek-coder", "if x1:\n y", ["if", " x", "1", ":", "\n", " y"]),
    ("gpt-4o", "camelCase HTTPServer 12345's", ["camel", "Case", " HTTPServer", " ", "123", "45", "'s"]),
    ("gpt-4o", "I'm src/lib//\n", ["I'm", " src", "/lib", "//\n"]),
    ("tekken", "aB12 x", ["a", "B", "1", "2", " x"]),
    ("tiny_aya", "1234567, 12 and 1000x", ["1", "234", "567", ",", " ", "12", " and", " ", "100", "0", "x"]),
    ("superbpe", "by the way 12345", ["by the way ", "12", "345"]),
    ("afmoe", "1234567", ["1", "234", "567"]),
    ("kimi-k2", "我说hello世界", ["我说", "hello", "世界"]),
    ("bloom", "Hello, big world", ["Hello", ",", " big", " world"]),
    ("viking", "year 2024", ["year", " ", "2", "0", "2", "4"]),
    ("falcon", "12345!?", ["123", "45", "!?"]),
    ("seed-coder", "a!\n\nb", ["a", "!", "\n\n", "b"]),
    ("exaone-moe", "new york 12", ["new york", " ", "1", "2"]),
    ("qwen35", "क्या", ["क्या"]),
    ("qwen2", "क्या", ["क", "्य", "ा"]),
    ("laguna", "a\n\nb", ["a", "\n\n", "b"]),
    ("chameleon", "IMGIMGABZ<sentinel:1>", ["IMGIMGABZ", "<", "sentinel", ":", "1", ">"]),
)


def backend(name: str) -> BytePairs:
    return BytePairs(Vocabulary.from_metadata(byte_pair_metadata(pre=name)))


def words(name: str, text: str) -> list[str]:
    """The words that ``text`` is cut into, spelled as in the text."""
    found = backend(name).words(text)
    if not PRE_TOKENIZERS[name].byte_level:
        return found
    return [bytes(BYTE_OF_CHAR[char] for char in word).decode("utf-8", "replace") for word in found]


@pytest.mark.parametrize(("name", "text", "expected"), KNOWN_CUTS)
def test_known_texts_are_cut_as_the_models_cut_them(name: str, text: str, expected: list[str]) -> None:
    assert words(name, text) == expected


@pytest.mark.parametrize("name", ONE_NAME_PER_ROW.values())
def test_words_join_to_the_text(name: str) -> None:
    rule = PRE_TOKENIZERS[name]
    if not rule.byte_level:
        pytest.skip("spaces are dropped or respelled before words are cut")
    split = backend(name)
    for text in random_texts(60, seed=2):
        joined = "".join(split.words(text))
        assert bytes(BYTE_OF_CHAR[char] for char in joined).decode() == text


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_every_name_makes_a_tokenizer_whose_text_comes_back(name: str) -> None:
    if not PRE_TOKENIZERS[name].byte_level:
        pytest.skip("its vocabularies are not spelled in bytes")
    tokenizer = Tokenizer.from_gguf(byte_pair_metadata("hello, wor,12", pre=name))
    text = "Hello,  wor1234 I'm\n\tdoné 中文 🤗 "
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_match_as_another_regex_engine_matches_them(pattern: str) -> None:
    regex = pytest.importorskip("regex", reason="the second regex engine")
    # V1: sets within sets (&&) as in Oniguruma; there \z is the end of the text
    judge = regex.compile(pattern.replace(r"\z", r"\Z"), regex.V1)
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    for text in random_texts(60, seed=3):
        # the two engines follow different versions of Unicode
        text = "".join(char for char in text if unicodedata.category(char) != "Cn")
        cuts = {0, len(text)} | {cut for match in judge.finditer(text) for cut in match.span()}
        expected = [text[a:b] for a, b in itertools.pairwise(sorted(cuts))]
        assert [word for word, _ in split.pre_tokenize_str(text)] == expected


# (name, a pattern of the table, the original that it stands for)
REWRITTEN = (
    ("deepseek-llm", r"(?<!\s)\s++$", r"\s+$"),
    ("jais-2", r"(?<![^\S\r\n])\s*[\r\n]+", r"\s*[\r\n]+"),
    ("tiny_aya", WORD_BOUNDARY, r"\d{1,3}(?=(?:\d{3})*\b)"),
    ("superbpe", r"(?<!\d)\d{1,2}(?=(?:\d{3})+(?!\d))", r"(?=(\d{3})+(?!\d))"),
)


@pytest.mark.parametrize(("name", "ours", "original"), REWRITTEN)
def test_rewritten_rules_cut_as_their_originals(name: str, ours: str, original: str) -> None:
    rule = PRE_TOKENIZERS[name]
    assert any(ours in step for step in rule.steps)
    written = [step.replace(ours, original) for step in rule.steps]
    texts = [*random_texts(400, seed=4), *DIGITS_AND_BLANKS]
    # the step after the rewritten one is part of the rewriting
    if name == "tiny_aya":
        written.remove(r"\A\d{1,2}(?=(?:\d{3})+\z)")
    elif name == "superbpe":
        written.remove(r"\d{3}")
        # not the same where digits touch other numerals, as in "12²": a cut more, for linear time
        texts = [re.sub(r"[^\W\d_]|\W", lambda char: "" if char[0].isnumeric() else char[0], text) for text in texts]
    judge = pre_tokenizers.Sequence([_step(step) for step in (*written, table.BYTES)])
    split = backend(name)
    for text in texts:
        assert split.words(text) == [word for word, _ in judge.pre_tokenize_str(text)]


_source = random.Random(5)
DIGITS_AND_BLANKS = ["".join(_source.choices(" \n\t\r1234567a.,_", k=_source.randint(1, 40))) for _ in range(4000)]

LONG = 1 << 17
RUNS = ("A", " ", "\n", "7", "!", "aA", "中", "\u0301", " \n")
GUARD_CPU_S = 60.0  # a rule that reads to the end of the run at each cut needs hundreds


@pytest.mark.slow
@pytest.mark.parametrize("name", ONE_NAME_PER_ROW.values())
def test_long_runs_are_cut_in_linear_time(name: str) -> None:
    split = backend(name)
    start = time.process_time()
    for run in RUNS:
        for end in ("", "a", "."):
            split.words(run * (LONG // len(run)) + end)
            assert time.process_time() - start < GUARD_CPU_S, f"{name}: {run!r} takes too long"


def test_an_unknown_name_says_how_to_give_another() -> None:
    with pytest.raises(UnsupportedError, match=r"'no-such-rule'.*--override-kv tokenizer.ggml.pre=str:NAME") as error:
        Tokenizer.from_gguf(byte_pair_metadata(pre="no-such-rule"))
    assert error.value.code == "TOKENIZER_PRE"
    metadata = byte_pair_metadata(pre="no-such-rule")
    assert Tokenizer.from_gguf(metadata, pre="qwen2").pre == "qwen2"


def test_decomposed_text_is_composed_where_the_model_learned_it_so() -> None:
    for name, same in (("qwen2", True), ("command-r", True), ("llama-bpe", False), ("smollm", False)):
        tokenizer = Tokenizer.from_gguf(byte_pair_metadata(pre=name))
        assert (tokenizer.encode("e\u0301") == tokenizer.encode("é")) is same
