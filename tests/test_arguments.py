"""The library's face: whatever is passed in the place of anything else is an EdgeLLMError that names it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models

import edgellm
from edgellm import EdgeLLMError, ParameterError

MESSAGES = [{"role": "user", "content": "hi"}]

ODD: dict[str, Any] = {
    "a number": 5,
    "minus one": -1,
    "a huge number": 10**30,
    "a number beyond floats": 10**400,
    "a number of thousands of digits": 10**5000,
    "a fraction": 1.5,
    "NaN": math.nan,
    "infinity": math.inf,
    "numpy's number": np.float32(1),
    "an array": np.array([1, 2]),
    "an array of fractions": np.array([1.5]),
    "a table": np.zeros((2, 2), np.int64),
    "an array of no dimension": np.array(1),
    "True": True,
    "None": None,
    "text": "x",
    "no text": "",
    "half a character": "caf\udce9",
    "a zero byte": "a\0b",
    "a long name": "n" * 300,
    "bytes": b"x",
    "nothing": [],
    "a list of None": [None],
    "a mixed list": ["a", 5],
    "a list of fractions": [1.5],
    "an id below 0": [-1],
    "an id beyond": [10**9],
    "a list of True": [True],
    "a list of lists": [[1]],
    "a list of mappings": [{}],
    "a message without content": [{"role": "user"}],
    "a message of numbers": [{"role": 5, "content": 5}],
    "a mapping": {"a": 1},
    "a mapping of numbers": {1: 1},
    "an object": object(),
    "a path": Path("no/such/folder"),
}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.write_tiny_model(tmp_path_factory.mktemp("model") / "tiny.gguf", "llama", "F16", n_layer=1)


@pytest.fixture(scope="module")
def llm(path: Path) -> Iterator[edgellm.LLM]:
    with edgellm.load(path, n_threads=1, n_ctx=64, executor="reference") as one:
        yield one


def generate(llm: edgellm.LLM, prompt: Any = "hi", **options: Any) -> None:
    llm.generate(prompt, **{"max_tokens": 1, **options})


STREAM = ("params", "max_tokens", "stop", "logprobs", "cancel", "progress", "tools", "template_kwargs", "parse_special",
          "special", "hook", "lora", "control_vectors")  # fmt: skip

CALLS: dict[str, Callable[[edgellm.LLM, Any], Any]] = {
    "prompt": generate,
    **{f"stream {name}": lambda llm, odd, name=name: generate(llm, **{name: odd}) for name in STREAM},
    **{f"stream {name} of a chat": lambda llm, odd, name=name: generate(llm, MESSAGES, **{name: odd})
       for name in STREAM},
    **{f"sampling {field.name}": lambda llm, odd, name=field.name: generate(llm, **{name: odd})
       for field in fields(edgellm.SamplingParams)},
    "beams length_penalty": lambda llm, odd: generate(llm, num_beams=2, length_penalty=odd),
    "chat": lambda llm, odd: llm.chat(odd, max_tokens=1),
    "conversation": lambda llm, odd: llm.conversation(odd, max_tokens=1).send("hi"),
    "send": lambda llm, odd: llm.conversation(max_tokens=1).send(odd),
    "score": lambda llm, odd: llm.score(odd),
    "logprobs": lambda llm, odd: llm.logprobs(odd),
    "logprobs top": lambda llm, odd: llm.logprobs("the river", top=odd),
    "loglikelihood context": lambda llm, odd: llm.loglikelihood(odd, "x"),
    "loglikelihood continuation": lambda llm, odd: llm.loglikelihood("x", odd),
    "perplexity": lambda llm, odd: llm.perplexity(odd, 8),
    "perplexity n_ctx": lambda llm, odd: llm.perplexity("the river and the water", odd),
    "save_state tokens": lambda llm, odd: llm.save_state("state.kv", odd),
    "save_state path": lambda llm, odd: llm.save_state(odd, [5, 6]),
    "load_state": lambda llm, odd: llm.load_state(odd),
    "tokenize": lambda llm, odd: llm.tokenize(odd),
    "tokenize add_special": lambda llm, odd: llm.tokenize("x", add_special=odd),
    "tokenize parse_special": lambda llm, odd: llm.tokenize("x", parse_special=odd),
    "detokenize": lambda llm, odd: llm.detokenize(odd),
    "detokenize special": lambda llm, odd: llm.detokenize([5], special=odd),
    "prompt_ids": lambda llm, odd: llm.prompt_ids(odd),
    "apply_template": lambda llm, odd: llm.apply_template(odd),
}  # fmt: skip


@pytest.mark.parametrize("call", CALLS)
def test_a_wrong_argument_is_taken_or_told(
    llm: edgellm.LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    monkeypatch.chdir(tmp_path)  # some of these are names of files
    for kind, odd in ODD.items():
        try:
            CALLS[call](llm, odd)
        except EdgeLLMError as error:
            assert 10 < len(str(error)) < 600, (kind, error)
        except Exception as error:
            pytest.fail(f"{call}, {kind}: {error!r}")
    assert llm.generate("hi", max_tokens=1).finish_reason


LOAD = ("n_ctx", "n_threads", "executor", "chat_template", "kv_overrides", "max_tokens_per_step", "n_parallel", "force",
        "speculate", "draft", "cache_dir", "cache_nbytes", "progress",
        "lora", "control_vectors", "control_vector_layers")  # fmt: skip


@pytest.mark.parametrize("name", ["name_or_path", *LOAD])
def test_a_wrong_argument_of_load_is_taken_or_told(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("EDGELLM_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)  # a folder for prefixes is made
    usual = {"name_or_path": path, "executor": "reference", "n_ctx": 64}
    for kind, odd in ODD.items():
        try:
            edgellm.load(**{**usual, name: odd}).close()
        except EdgeLLMError as error:
            assert 10 < len(str(error)) < 600, (kind, error)
        except Exception as error:
            pytest.fail(f"{name}, {kind}: {error!r}")


@pytest.mark.parametrize(
    "key",
    [
        "llama.rope.freq_base", "llama.rope.scaling.type", "llama.rope.scaling.factor", "llama.block_count",
        "llama.context_length", "tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "tokenizer.ggml.merges",
        "tokenizer.ggml.padding_token_id", "tokenizer.ggml.eos_token_id", "tokenizer.ggml.add_bos_token",
        "tokenizer.huggingface.json", "tokenizer.chat_template", "general.architecture", "general.sampling.temp",
    ],
)  # fmt: skip
def test_a_wrong_metadata_value_is_taken_or_told(path: Path, key: str) -> None:
    for kind, odd in {**ODD, "numbers": np.zeros(3, np.float32)}.items():
        try:
            with edgellm.load(path, executor="reference", n_ctx=64, kv_overrides={key: odd}) as llm:
                llm.generate(MESSAGES, max_tokens=1)
        except EdgeLLMError as error:
            assert 10 < len(str(error)) < 600, (kind, error)
        except Exception as error:
            pytest.fail(f"{key}, {kind}: {error!r}")


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda llm: generate(llm, stop=5), "stop is 5. It must be text, or a list of texts"),
        (lambda llm: generate(llm, b"x"), "prompt is b'x'. It must be text, a list of messages, or token ids"),
        (lambda llm: generate(llm, None), "prompt is None"),
        (lambda llm: llm.score([1.5]), "text is a list of 1. It must be a sequence of token ids"),
        (lambda llm: llm.logprobs("x", top="many"), "top is 'many'. It must be a whole number"),
        (lambda llm: generate(llm, params={"top_k": 1}), "params is {'top_k': 1}. It must be SamplingParams"),
        (lambda llm: generate(llm, MESSAGES, template_kwargs={"messages": []}), "template_kwargs has 'messages'"),
        (lambda llm: llm.save_state("n" * 300, [5]), "one name has 300 bytes, 255 for a name"),
        (lambda llm: generate(llm, logit_bias={1: 10**400}), "expected a finite number"),
        (lambda llm: edgellm.load("n" * 300), "one name has 300 bytes, 255 for a name"),
        (lambda llm: edgellm.load(llm.path, force="yes"), "force is 'yes'. It must be True or False"),
    ],
)
def test_the_error_says_what_was_found_and_expected(llm: edgellm.LLM, call: Any, said: str) -> None:
    with pytest.raises(ParameterError) as caught:
        call(llm)
    assert said in str(caught.value)


def test_a_folder_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(edgellm.ModelNotFoundError, match="is a folder") as caught:
        edgellm.load(tmp_path)
    assert caught.value.code == "MODEL_NOT_A_FILE" and ".gguf" in str(caught.value)


def test_a_checkpoint_is_to_be_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint/config.json").write_text("{}")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    with pytest.raises(edgellm.ModelNotFoundError, match="`edgellm convert ~/checkpoint`"):
        edgellm.load("~/checkpoint")


def test_ids_may_come_in_any_order_of_things(llm: edgellm.LLM) -> None:
    ids = [5, 6, 7]
    for given in (tuple(ids), np.array(ids), iter(ids), (token for token in ids), range(5, 8)):
        assert llm.prompt_ids(given) == ids  # type: ignore[arg-type]
    assert llm.detokenize(np.array(ids)) == llm.detokenize(ids)  # type: ignore[arg-type]
