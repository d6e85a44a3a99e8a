"""What callers of the library may write as the content of messages."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_models

import edgellm
from edgellm.formats.errors import ParameterError

PARTS = [{"type": "text", "text": "Say"}, {"type": "text", "text": "a word."}]
CALL = {"type": "function", "function": {"name": "f", "arguments": {}}}
CHAT = [{"role": "user", "content": PARTS}, {"role": "assistant", "content": None, "tool_calls": [CALL]}]
PLAIN = [{"role": "user", "content": "Say\na word."}, {"role": "assistant", "content": "", "tool_calls": [CALL]}]
GREEDY = {"temperature": 0, "max_tokens": 4}


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> edgellm.LLM:
    path: Path = tiny_models.write_tiny_model(tmp_path_factory.mktemp("models") / "llama.gguf")
    with edgellm.load(path, executor="reference") as loaded:
        yield loaded


def test_parts_and_no_content_are_what_their_text_is(llm: edgellm.LLM) -> None:
    assert llm.prompt_ids(CHAT) == llm.prompt_ids(PLAIN)
    assert llm.chat(CHAT, **GREEDY) == llm.chat(PLAIN, **GREEDY)
    assert "".join(chunk.text for chunk in llm.stream(CHAT, **GREEDY)) == llm.generate(PLAIN, **GREEDY)
    conversation = llm.conversation(**GREEDY)
    conversation.messages = [edgellm.Message(**message) for message in CHAT]
    assert conversation.send("And?") == llm.generate([*PLAIN, {"role": "user", "content": "And?"}], **GREEDY)


@pytest.mark.parametrize(
    "prompt",
    [
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        [{"role": "user", "content": 5}],
        {"role": "user", "content": "x"},
        None,
        5,
    ],
)
def test_a_prompt_that_is_none_is_a_named_error(llm: edgellm.LLM, prompt: object) -> None:
    for ask in (llm.stream, llm.generate, llm.chat):
        with pytest.raises(ParameterError, match=r"content|prompt|messages"):
            ask(prompt)  # type: ignore[operator]


def test_no_answer_holds_a_token_that_the_file_suppresses(llm: edgellm.LLM, tmp_path: Path) -> None:
    ids = [5, 6, 7]
    likeliest = llm.generate(ids, **GREEDY).tokens[0]
    listed = {"tokenizer.ggml.suppress_tokens": [likeliest]}
    path = tiny_models.write_tiny_model(tmp_path / "llama.gguf", metadata=listed)
    with edgellm.load(path, executor="reference") as suppressing:
        for bias in ({}, {likeliest: 50.0}):
            answer = suppressing.generate(ids, logit_bias=bias, **GREEDY)
            assert answer.tokens and likeliest not in answer.tokens
        banned = llm.generate(ids, logit_bias={likeliest: False}, **GREEDY)
        assert suppressing.generate(ids, **GREEDY).tokens == banned.tokens
