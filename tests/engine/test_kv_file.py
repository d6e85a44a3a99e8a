"""Keys and values in a file: another program goes on as this one would have; a wrong file costs nothing but time."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
from speculation_trials import guess
from test_llm import TALK

import edgellm
from edgellm.arguments import CACHE_TYPES
from edgellm.engine.cache_file import MAGIC, model_key
from edgellm.engine.engine import Engine
from edgellm.formats.errors import FormatError, ParameterError
from edgellm.kernels.cache_types import PACKED
from edgellm.kernels.cpu.compile.kernel_cache import default_folder

PROMPT = list(range(3, 153))  # 150 tokens: four full blocks and 22 of the fifth; the tiny window is 32


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: tiny_models.write_tiny_model(folder / f"{name}.gguf", name) for name in ("llama", "gemma3")}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGELLM_KERNEL_CACHE", str(default_folder()))  # which are the same in any home
    monkeypatch.setenv("EDGELLM_HOME", str(tmp_path / "home"))


@pytest.fixture
def load() -> Iterator[Any]:
    opened: list[edgellm.LLM] = []

    def start(path: Path, **options: Any) -> edgellm.LLM:
        opened.append(edgellm.load(path, **{"executor": "reference", "n_ctx": 256, **options}))
        return opened[-1]

    yield start
    for llm in opened:
        llm.close()


def answer(llm: edgellm.LLM, prompt: Any, n: int = 12) -> edgellm.Generation:
    return llm.generate(prompt, temperature=0, max_tokens=n, logprobs=3, ignore_eos=True)


def check(llm: edgellm.LLM) -> None:
    llm.engine.call(lambda cache, executor: cache.check([]))


@pytest.mark.parametrize(("name", "kept"), [("llama", "f16"), ("gemma3", "f16"), ("llama", "kivi2")])
@pytest.mark.parametrize("n", [1, 31, 32, 33, 53, 64, 100, 150])
def test_another_program_goes_on_as_this_one_would_have(
    paths: dict[str, Path], load: Any, tmp_path: Path, name: str, kept: str, n: int
) -> None:
    """Of 53 tokens and the answer 64 are saved, whole blocks."""
    types = {"cache_type_k": kept, "cache_type_v": kept}
    first, file = load(paths[name], **types), tmp_path / "state.kv"
    said = answer(first, PROMPT[:n])
    tokens = [*PROMPT[:n], *said.tokens]
    n_saved = first.save_state(file, tokens)
    assert n_saved == len(tokens) - 1  # the last token was sampled and never computed
    went_on = answer(first, tokens)
    second = load(paths[name], **types)
    assert second.load_state(file) == tokens[:n_saved]
    check(second)
    again = answer(second, tokens)
    assert again == went_on and again.tokens == went_on.tokens
    assert [t.logprob for t in again.logprobs] == [t.logprob for t in went_on.logprobs]  # to the last bit
    assert again.timings.reused_n == n_saved and again.timings.computed_n == 1
    check(second)


def test_packed_keys_of_an_older_layout_are_refused(
    paths: dict[str, Path], load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    types, file = {"cache_type_k": "kivi2", "cache_type_v": "kivi2"}, tmp_path / "state.kv"
    with monkeypatch.context() as earlier:
        earlier.setitem(PACKED, "kivi2", dataclasses.replace(PACKED["kivi2"], layout=1))
        first = load(paths["llama"], **types)
        answer(first, PROMPT)
        first.save_state(file, PROMPT)
    with pytest.raises(FormatError, match="its keys and values are of other types") as found:
        load(paths["llama"], **types).load_state(file)
    assert found.value.code == "KV_FILE"


@pytest.mark.parametrize("kept", CACHE_TYPES)
def test_the_cpu_executor_restores_to_the_last_bit(
    paths: dict[str, Path], load: Any, tmp_path: Path, kept: str, drafts: bool
) -> None:
    types = {"cache_type_k": kept, "cache_type_v": kept}
    first, file = load(paths["llama"], executor="cpu", **types), tmp_path / "state.kv"
    tokens = [*PROMPT, *answer(first, PROMPT).tokens]
    first.save_state(file, tokens)
    second = load(paths["llama"], executor="cpu", n_threads=1, **types)
    second.load_state(file)
    one = answer(first, tokens)
    if drafts:
        guess(second, [[*tokens, *one.tokens]])
    two = answer(second, tokens)
    assert (two.timings.drafted_n > 0) == drafts
    assert [t.logprob for t in one.logprobs] == [t.logprob for t in two.logprobs] and two.timings.computed_n == 1


def test_what_is_known_already_stays_and_a_restored_prefix_is_shared(
    paths: dict[str, Path], load: Any, tmp_path: Path
) -> None:
    first, file = load(paths["gemma3"]), tmp_path / "state.kv"
    answer(first, PROMPT)
    first.save_state(file, PROMPT)
    second = load(paths["gemma3"])
    answer(second, PROMPT[:70])
    expected = answer(first, [*PROMPT[:100], 5, 6, 7])
    for _ in range(2):
        second.load_state(file)
        check(second)
    other = answer(second, [*PROMPT[:100], 5, 6, 7])
    one, two = ([t.logprob for t in said.logprobs] for said in (other, expected))
    assert other == expected and one == pytest.approx(two, abs=1e-4)  # numpy sums other chunks in another order
    check(second)


def test_states_push_each_other_out_of_a_small_cache_and_nothing_breaks(
    paths: dict[str, Path], load: Any, tmp_path: Path
) -> None:
    for name in paths:
        first, second = load(paths[name]), load(paths[name])
        generator = random.Random(1)
        prompts = [[generator.randrange(3, 250) for _ in range(generator.randrange(60, 200))] for _ in range(6)]
        for number, prompt in enumerate(prompts):
            answer(first, prompt, 2)
            first.save_state(tmp_path / f"{number}.kv", prompt)
        for number in [*range(6), 2, 0, 5]:
            second.load_state(tmp_path / f"{number}.kv")
            check(second)
            assert answer(second, prompts[number], 4) == answer(first, prompts[number], 4)
            check(second)


def test_nothing_known_writes_nothing_and_is_told(paths: dict[str, Path], load: Any, tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match="generate") as caught:
        load(paths["llama"]).save_state(tmp_path / "state.kv", PROMPT)
    assert caught.value.code == "KV_EMPTY"
    assert list(tmp_path.glob("*.kv*")) == []


@pytest.fixture
def saved(paths: dict[str, Path], load: Any, tmp_path: Path) -> tuple[edgellm.LLM, Path]:
    llm = load(paths["llama"])
    answer(llm, PROMPT)
    llm.save_state(tmp_path / "state.kv", PROMPT)
    return load(paths["llama"]), tmp_path / "state.kv"


def test_a_damaged_file_is_refused_and_the_answer_is_computed(saved: tuple[edgellm.LLM, Path]) -> None:
    llm, file = saved
    whole = file.read_bytes()
    generator = random.Random(2)
    damaged = [b"", b"x" * 10, whole[:-1], whole[:100], whole + b"\0", b"\0" * len(whole), MAGIC + b"\xff" * 100]
    for _ in range(30):
        bytes_ = bytearray(whole)
        bytes_[generator.randrange(len(whole))] ^= 1 << generator.randrange(8)
        damaged.append(bytes(bytes_))
    for content in damaged:
        file.write_bytes(content)
        with pytest.raises(FormatError) as found:
            llm.load_state(file)
        assert found.value.code == "KV_FILE"
    assert answer(llm, PROMPT).timings.reused_n == 0
    check(llm)


FORGED_GROUPS: tuple[Any, ...] = (
    [["all", 0, [["float16", 1, 1, 1]]]],
    [["all", 0, [["float16", 10**9, 10**9, 10**9]] * 2]],
    [["all", 0, [["object", 1, 16, 32]]]],
    [["all", 0, [["float16", -1, -16, 32]]]],
    [["state", 0, [["float32", 16]]]],
    [["all", 0, [["float16"]]]],
    [["all", 0, []]],
    "x",
)


@pytest.mark.parametrize(
    "change",
    [
        {"n_tokens": 10**9},
        {"n_tokens": -1},
        {"n_tokens": 1.5},
        {"first": [3]},
        {"first": []},
        {"first": [-1]},
        {"first": [0, 0]},
        {"first": "x"},
        {"layout": {}},
        {"layout": "x"},
        *({"layout": {"block_tokens": 32, "groups": groups}} for groups in FORGED_GROUPS),
        {"layout": {"block_tokens": 64, "groups": [["all", 0, [["float16", 1, 16, 32], ["float16", 1, 32, 16]]]]}},
        {"model": "another"},
    ],
    ids=str,
)
def test_a_forged_header_with_a_right_checksum_is_refused(saved: tuple[edgellm.LLM, Path], change: Any) -> None:
    import hashlib

    llm, file = saved
    whole = file.read_bytes()
    length = int.from_bytes(whole[8:16], "little")
    header = json.dumps({**json.loads(whole[16 : 16 + length]), **change}).encode()
    forged = whole[:8] + len(header).to_bytes(8, "little") + header + whole[16 + length : -32]
    file.write_bytes(forged + hashlib.sha256(forged).digest())
    with pytest.raises(FormatError) as found:
        llm.load_state(file)
    assert found.value.code == "KV_FILE"
    check(llm)


def test_another_models_state_is_refused(
    saved: tuple[edgellm.LLM, Path], paths: dict[str, Path], load: Any, tmp_path: Path
) -> None:
    _, file = saved
    others = [
        load(tiny_models.write_tiny_model(tmp_path / "other.gguf", "llama", seed=1)),
        load(paths["gemma3"]),
        load(paths["llama"], kv_overrides={"llama.rope.freq_base": 500.0}),
        load(paths["llama"], cache_type_k="q8_0"),
        load(paths["llama"], cache_type_v="iq4_nl"),
    ]
    for other in others:
        with pytest.raises(FormatError, match="another model"):
            other.load_state(file)
    with pytest.raises(FormatError, match="context"):
        load(paths["llama"], n_ctx=64).load_state(file)


def test_the_weights_are_hashed_once(paths: dict[str, Path], load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = load(paths["llama"])
    key = model_key(llm.gguf, llm.executor)
    monkeypatch.setattr(np, "ascontiguousarray", None)  # what reading the weights would need
    assert model_key(llm.gguf, llm.executor) == key


def test_a_state_is_saved_and_loaded_while_others_are_answered(
    paths: dict[str, Path], load: Any, tmp_path: Path
) -> None:
    llm = load(paths["llama"])
    assert isinstance(llm.engine, Engine)
    expected = answer(llm, TALK, 40)
    stream = llm.stream(TALK, temperature=0, max_tokens=40, ignore_eos=True)
    text = next(stream).text
    answer(llm, PROMPT, 2)
    llm.save_state(tmp_path / "state.kv", PROMPT)
    llm.load_state(tmp_path / "state.kv")
    assert text + "".join(chunk.text for chunk in stream) == expected
    check(llm)
