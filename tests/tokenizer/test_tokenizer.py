"""The tokenizers of two real models, id for id, against transformers and llama.cpp, which read the same files.

Where the judges differ, the models' original Hugging Face tokenizers decide:
* SmolLM2 cuts single digits first; transformers leaves that out when it reads GGUF, llama.cpp does it.
* A character with a byte that SmolLM2's vocabulary lacks loses that byte before merging; llama.cpp drops it after.
* Gemma takes runs of spaces, and of U+2581, longest first, 31 at most; readers of GGUF that rebuild its merges from
  the order of its tokens join runs of five and more in another way.
* "</s>" is a tag of Gemma's vocabulary (struck-out text); llama.cpp takes it for a control token.
"""

from __future__ import annotations

import json
import random
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tokenizer_texts import every_code_point, random_texts

from edgellm.chat_template import NAMED_TEMPLATES, ChatTemplate, Message, Segment
from edgellm.formats.gguf import GGUFFile
from edgellm.tokenizer import Tokenizer, TokenType

MODELS = ("smollm2", "gemma")


def metadata_of(path: Path) -> dict[str, Any]:
    with GGUFFile.open(path) as gguf:
        return dict(gguf.metadata)


@pytest.fixture(scope="session")
def smollm2_metadata(smollm2_path: Path) -> dict[str, Any]:
    return metadata_of(smollm2_path)


@pytest.fixture(scope="session")
def gemma_metadata(gemma_path: Path) -> dict[str, Any]:
    return metadata_of(gemma_path)


class Real(NamedTuple):
    name: str
    path: Path
    metadata: dict[str, Any]
    tokenizer: Tokenizer


@pytest.fixture(scope="session", params=MODELS)
def real(request: pytest.FixtureRequest) -> Real:
    """One real model."""
    metadata = request.getfixturevalue(f"{request.param}_metadata")
    path = request.getfixturevalue(f"{request.param}_path")
    return Real(request.param, path, metadata, Tokenizer.from_gguf(metadata))


@pytest.fixture(scope="session")
def transformers_tokenizer(real: Real) -> Any:
    """The ``tokenizers`` object that transformers builds from the same file; for SmolLM2 with its cut at digits."""
    transformers = pytest.importorskip("transformers", reason="the judge of token ids")
    from tokenizers import pre_tokenizers

    judge = transformers.AutoTokenizer.from_pretrained(str(real.path.parent), gguf_file=real.path.name)
    backend = judge.backend_tokenizer
    if real.name == "smollm2":
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), backend.pre_tokenizer])
    return backend


def judged(real: Real, texts: list[str]) -> list[str]:
    """The texts on which both readers of GGUF agree with the original."""
    if real.name == "smollm2":
        return texts
    return [text for text in texts if text == "\u2581" or not ("\u2581" in text or " " * 5 in text)]


def assert_same_ids(real: Real, judge: Any, texts: list[str]) -> None:
    different = []
    for start in range(0, len(texts), 20000):
        chunk = texts[start : start + 20000]
        for text, encoding in zip(chunk, judge.encode_batch(chunk, add_special_tokens=False), strict=True):
            if real.tokenizer.encode(text, add_special=False) != encoding.ids:
                different.append(text)
    assert not different, f"{len(different)} of {len(texts)} differ, such as {different[:3]!a}"


def test_ids_of_random_texts_equal_transformers(real: Real, transformers_tokenizer: Any) -> None:
    texts = judged(real, random_texts(12_500))[:10_000]
    assert len(texts) == 10_000
    assert_same_ids(real, transformers_tokenizer, texts)


@pytest.mark.slow
def test_ids_of_every_code_point_equal_transformers(real: Real, transformers_tokenizer: Any) -> None:
    assert_same_ids(real, transformers_tokenizer, every_code_point())


@pytest.fixture(scope="session")
def llama_cpp(real: Real) -> Callable[..., list[int]]:
    """llama.cpp's own tokenizer on the same file: (text, parse_special=False) -> ids."""
    xllamacpp = pytest.importorskip("xllamacpp", reason="the judge of token ids")
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(real.path)
    parameters.n_ctx, parameters.n_parallel, parameters.warmup = 64, 1, False
    parameters.verbosity = -1
    parameters.port = random.SystemRandom().randint(20000, 60000)
    server = xllamacpp.Server(parameters)

    def encode(text: str, parse_special: bool = False) -> list[int]:
        question = {"content": text, "add_special": False, "parse_special": parse_special}
        request = urllib.request.Request(
            f"{server.listening_address}/tokenize", json.dumps(question).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return list(json.load(answer)["tokens"])

    return encode


def test_ids_equal_llama_cpp(real: Real, llama_cpp: Callable[..., list[int]]) -> None:
    characters = every_code_point()
    texts = random_texts(3000, seed=7)
    texts += [" ".join(characters[start : start + 100]) for start in range(0, 0x11000, 100)]
    texts = [text for text in judged(real, texts) if "\u2581" not in text]
    if real.name == "smollm2":  # every byte of the text has to be in the vocabulary
        texts = [text for text in texts if real.tokenizer.decode(real.tokenizer.encode(text)) == text]
    assert len(texts) > 1500
    different = [text for text in texts if real.tokenizer.encode(text, add_special=False) != llama_cpp(text)]
    assert not different, f"{len(different)} differ, such as {different[:3]!a}"


def test_control_tokens_are_read_as_llama_cpp_reads_them(real: Real, llama_cpp: Callable[..., list[int]]) -> None:
    control = real.tokenizer.vocabulary.ids_of(TokenType.CONTROL)
    marks = [real.tokenizer.vocabulary.tokens[i] for i in control[:40]]
    text = "".join(f"{mark} a\n{mark}" for mark in marks)
    assert real.tokenizer.encode(text, add_special=False, parse_special=True) == llama_cpp(text, True)


MEBIBYTE = 1 << 20
RUNS = ("A", " ", "\n", "7", "é", "中", "ab ", "<", "\t", "a\n")


@pytest.mark.parametrize("run", RUNS)
def test_a_mebibyte_of_one_character_is_tokenized_in_linear_time(real: Real, run: str) -> None:
    text = run * (MEBIBYTE // len(run.encode()))
    start = time.process_time()
    ids = real.tokenizer.encode(text)
    assert time.process_time() - start < 60  # a quadratic rule takes hours
    assert real.tokenizer.decode(ids) == text


def test_long_runs_equal_transformers(real: Real, transformers_tokenizer: Any) -> None:
    texts = [run * (1 << 15) for run in RUNS] + ["a" + run * n + "b" for run in RUNS for n in range(70)]
    assert_same_ids(real, transformers_tokenizer, judged(real, texts))


def test_gemma_takes_spaces_newlines_and_tabs_in_the_longest_runs_it_has(gemma_metadata: dict[str, Any]) -> None:
    tokenizer = Tokenizer.from_gguf(gemma_metadata)
    for char in " \n\t":
        for n in range(100):
            ids = tokenizer.encode("a" + char * n + "<", add_special=False)[1:-1]
            if (char, n % 31) != (" ", 1):  # one space may join the sign after it
                assert [len(tokenizer.token_bytes(i)) for i in ids] == [31] * (n // 31) + [n % 31] * (n % 31 > 0)


def test_text_comes_back(real: Real) -> None:
    def lost(text: str) -> bool:
        return real.tokenizer.decode(real.tokenizer.encode(text)) != text

    # bytes that SmolLM2's vocabulary lacks; Gemma's U+2581 is its space
    missing = {char for char in every_code_point()[:0x3000] if lost(char)}
    assert len(missing) < 20 if real.name == "smollm2" else missing == {"\u2581"}
    kept = [text for text in random_texts(4000, seed=8) if missing.isdisjoint(text)]
    if real.name == "smollm2":
        kept = [text for text in kept if max(text) < "\u3000"]
    assert len(kept) > 100
    assert not [text for text in kept if lost(text)]


def test_a_users_text_never_becomes_a_control_token(real: Real) -> None:
    tokens = real.tokenizer.vocabulary.tokens
    for control in real.tokenizer.vocabulary.ids_of(TokenType.CONTROL, TokenType.UNKNOWN):
        mark = tokens[control]
        for text in (mark, f"a{mark}b", f" {mark}\n", mark + mark):
            ids = real.tokenizer.encode(text, add_special=False)
            assert not any(map(real.tokenizer.is_control, ids))
            assert real.tokenizer.decode(ids) == text
            segments = [Segment("x\n", True), Segment(text, False), Segment("\ny", True)]
            assert not any(map(real.tokenizer.is_control, real.tokenizer.encode_segments(segments, add_special=False)))
        assert real.tokenizer.encode(mark, add_special=False, parse_special=True) == [control]


def test_a_control_token_half_written_by_the_user_is_text(real: Real) -> None:
    mark = real.tokenizer.vocabulary.tokens[real.tokenizer.eos_id or 0]
    for cut in range(1, len(mark)):
        for first_is_special in (True, False):
            segments = [Segment(mark[:cut], first_is_special), Segment(mark[cut:], not first_is_special)]
            ids = real.tokenizer.encode_segments(segments, add_special=False)
            assert not any(map(real.tokenizer.is_control, ids))
            assert real.tokenizer.decode(ids) == mark
        segments = [Segment(mark[:cut], True), Segment(mark[cut:], True)]
        assert real.tokenizer.encode_segments(segments, add_special=False) == [real.tokenizer.eos_id]


def test_where_segments_are_cut_changes_no_id(real: Real) -> None:
    source = random.Random(9)
    for text in random_texts(300, seed=9):
        cuts = sorted(source.choices(range(len(text) + 1), k=source.randint(0, 6)))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        segments = [Segment(piece, source.random() < 0.5) for piece in pieces]
        assert real.tokenizer.encode_segments(segments) == real.tokenizer.encode(text)


CONVERSATIONS = (
    [Message("user", "Hello!")],
    [Message("user", "  What is 2+2? \n\n"), Message("assistant", "4."), Message("user", "And\t17 * 3?")],
    [Message("user", "def f(x):\n    return x\n\n\n"), Message("assistant", " ok "), Message("user", "naïve 中文 🤗")],
    [Message("user", ""), Message("assistant", "\n"), Message("user", "'LL <table> 1234")],
)


@pytest.mark.parametrize("messages", CONVERSATIONS, ids=range(len(CONVERSATIONS)))
def test_chats_have_the_ids_of_the_whole_rendered_text(
    real: Real, transformers_tokenizer: Any, messages: list[Message]
) -> None:
    tokens = real.tokenizer.vocabulary.tokens
    source = real.metadata.get("tokenizer.chat_template") or NAMED_TEMPLATES["gemma"]
    bos, eos = (tokens[i] for i in (real.tokenizer.bos_id or 0, real.tokenizer.eos_id or 0))
    template = ChatTemplate(source, bos, eos)
    whole = template.render_text(messages)
    expected = transformers_tokenizer.encode(whole, add_special_tokens=False).ids
    # with add_special too: a BOS that the template writes is not doubled
    assert real.tokenizer.encode_segments(template.render(messages)) == expected


def test_special_ids_are_those_of_the_models(real: Real) -> None:
    tokenizer = real.tokenizer
    ends = {tokenizer.vocabulary.tokens[i] for i in tokenizer.eog_ids}
    if real.name == "smollm2":
        assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.n_vocab) == (1, 2, 49152)
        assert {"<|im_end|>", "<|endoftext|>"} <= ends
        assert tokenizer.encode("") == []
    else:
        assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.n_vocab) == (2, 1, 262144)
        assert ends == {"<eos>", "<end_of_turn>"}
        assert tokenizer.encode("") == [2]
