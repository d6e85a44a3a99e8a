"""Answers over fewer keys, or keys in fewer bits: the same whatever was known, who is beside, and when preempted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
from answers_together import answers_together, begun_together
from speculation_trials import guess

import edgellm
from edgellm.engine.snapkv import WINDOW
from edgellm.formats.errors import ParameterError, UnsupportedError
from edgellm.kernels import chosen_blocks
from edgellm.kernels.cache_types import DEFAULT, PACKED, TOKEN_TYPES
from edgellm.sampling import Sampler, SamplingParams

LENGTHS = (150, 40, 97, 33, 120, 330)
PROMPTS = [[(7 * i * (k + 1) + k) % 240 + 3 for i in range(n)] for k, n in enumerate(LENGTHS)]
PAIRS = [*zip(TOKEN_TYPES[::2], [*TOKEN_TYPES[1::2], DEFAULT], strict=True), *((kept, kept) for kept in PACKED)]
"""Of keys and values: each type that there is, once."""
WAYS = {
    **{f"{k}-{v}": {"cache_type_k": k, "cache_type_v": v} for k, v in PAIRS},
    "quest": {"kv_keep": "quest:256"},
    "quest-kivi2": {"kv_keep": "quest:256", "cache_type_k": "kivi2", "cache_type_v": "kivi2"},
    "snapkv": {"kv_keep": "snapkv:64"},
    "snapkv-q8_0": {"kv_keep": "snapkv:64", "cache_type_k": "q8_0", "cache_type_v": "q8_0"},
}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    return tiny_models.write_tiny_model(folder / "tiny.gguf", "gemma3", context_length=512)


@pytest.fixture(autouse=True)
def every_layer_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chosen_blocks, "WHOLE_LAYERS", 0)


Told = tuple[Sequence[int], list[float]]


def told(llm: edgellm.LLM, prompt: list[int], n: int = 12, **options: Any) -> Told:
    said = llm.generate(prompt, temperature=0, max_tokens=n, logprobs=2, ignore_eos=True, **options)
    return said.tokens, [one.logprob for one in said.logprobs]


def guessing(llm: edgellm.LLM, drafts: bool, prompts: Sequence[list[int]], answers: Sequence[Told]) -> edgellm.LLM:
    """The same model, which has drafts of these answers, some of them right, where it is to have any."""
    if drafts:
        guess(llm, [[*prompt, *tokens] for prompt, (tokens, _) in zip(prompts, answers, strict=True)])
    return llm


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> dict[str, str]:
    return WAYS[request.param]


@pytest.fixture(scope="module")
def cold_answers() -> dict[str, list[Told]]:
    """Of each way, as soon as they are known."""
    return {}


@pytest.fixture
def cold(path: Path, way: dict[str, str], cold_answers: dict[str, list[Told]]) -> list[Told]:
    """The answer to each prompt of a model that has seen no other."""
    if str(way) not in cold_answers:
        cold_answers[str(way)] = found = []
        for prompt in PROMPTS:
            with edgellm.load(path, n_ctx=512, n_threads=1, **way) as llm:
                found.append(told(llm, prompt, 24))
    return cold_answers[str(way)]


def test_an_answer_is_that_of_a_cold_start(path: Path, way: dict[str, str], cold: list[Told], drafts: bool) -> None:
    """Behind a prefix that is shared, one that parts in a block, and in steps of any size."""
    n = WINDOW if "snapkv" in way.get("kv_keep", "") else 7
    for options in ({}, {"max_tokens_per_step": n}):
        with edgellm.load(path, n_ctx=512, n_threads=1, **way, **options) as llm:
            guessing(llm, drafts, PROMPTS, cold)
            told(llm, [*PROMPTS[0][:70], 5, 6, 7])
            for _ in range(2):
                assert [told(llm, prompt, 24) for prompt in PROMPTS] == cold, options
            llm.engine.call(lambda cache, executor: cache.check([]))
            said = llm.generate(PROMPTS[0], temperature=0, max_tokens=24, ignore_eos=True)
            assert said.tokens == cold[0][0]
            assert (0 < said.timings.accepted_n < said.timings.drafted_n) == drafts


def test_a_second_turn_is_that_of_a_cold_start(path: Path, way: dict[str, str], cold: list[Told], drafts: bool) -> None:
    """What an answer has computed is not taken for what its tokens are worth in a prompt, where the two differ."""
    turn = [*PROMPTS[0], *cold[0][0], *PROMPTS[1]]
    with edgellm.load(path, n_ctx=512, n_threads=1, **way) as llm:
        expected = told(llm, turn)
    with edgellm.load(path, n_ctx=512, n_threads=1, **way) as llm:
        guessing(llm, drafts, [PROMPTS[0], turn], [cold[0], expected])
        assert told(llm, PROMPTS[0], 24) == cold[0]
        assert told(llm, turn) == expected
        llm.engine.call(lambda cache, executor: cache.check([]))


def test_answers_beside_each_other_are_those_they_give_alone(
    path: Path, way: dict[str, str], cold: list[Told], drafts: bool
) -> None:
    """Also where the cache has no room for all of them, and some are preempted."""
    options = {"temperature": 0, "max_tokens": 24, "ignore_eos": True}
    with edgellm.load(path, n_ctx=512, n_parallel=1, **way) as llm:
        guessing(llm, drafts, PROMPTS, cold)
        for _ in range(2):
            assert answers_together(llm, PROMPTS, options) == [list(tokens) for tokens, _ in cold]
        llm.engine.call(lambda cache, executor: cache.check([]))


@pytest.mark.parametrize("keep", ["snapkv:64", "quest:256"])
def test_a_prompt_that_is_known_has_its_answer_beside_others(path: Path, keep: str, drafts: bool) -> None:
    """What is found of it may end where its choice begins, which is a step of its own."""
    prompts = [PROMPTS[5], PROMPTS[1], PROMPTS[0]]
    options = {"max_tokens": 12, "temperature": 0, "ignore_eos": True}
    with edgellm.load(path, n_ctx=512, n_parallel=4, kv_keep=keep) as llm:
        expected = [llm.generate(prompt, **options).tokens for prompt in prompts]
        guessing(llm, drafts, prompts, [(tokens, []) for tokens in expected])
        for _ in range(2):
            assert [one.tokens for one in begun_together(llm, prompts, options)] == expected


def test_what_is_dropped_of_the_newest_leaves_no_block_to_two_owners(tmp_path: Path) -> None:
    """Recurrent states stop at the end of a prompt, whose node is cut when its block fills."""
    path = tiny_models.write_tiny_model(tmp_path / "tiny.gguf", "lfm2", n_layer=6, context_length=1024)
    rng = np.random.default_rng(5)
    texts = [rng.integers(10, 270, 300).tolist() for _ in range(2)]
    prompts = [texts[i % 2][: int(rng.integers(33, 160))] for i in range(14)]
    ways = {"n_ctx": 512, "n_threads": 1, "cache_type_k": "kivi2", "cache_type_v": "kivi2"}

    def tokens(llm: edgellm.LLM, prompt: list[int]) -> list[int | None]:
        sampler = Sampler(SamplingParams(temperature=0.0), llm.program.n_vocab, history=prompt)
        return [one.token for one in llm.engine.generate(prompt, sampler, max_tokens=40, stop_ids=())]

    expected = []
    for prompt in prompts:
        with edgellm.load(path, **ways) as llm:
            expected.append(tokens(llm, prompt))
    with edgellm.load(path, n_parallel=1, max_tokens_per_step=32, **ways) as llm:
        for _ in range(5):
            for i in rng.permutation(len(prompts)):
                assert tokens(llm, prompts[i]) == expected[i]
            llm.engine.call(lambda cache, executor: cache.check([]))


def test_a_saved_prompt_goes_on_to_the_same_answer(
    path: Path, way: dict[str, str], cold: list[Told], drafts: bool, tmp_path: Path
) -> None:
    with edgellm.load(path, n_ctx=512, n_threads=1, **way) as llm:
        guessing(llm, drafts, PROMPTS, cold)
        assert told(llm, PROMPTS[5], 24) == cold[5]
        n_saved = llm.save_state(tmp_path / "state.kv", PROMPTS[5])
    with edgellm.load(path, n_ctx=512, n_threads=1, **way) as llm:
        guessing(llm, drafts, PROMPTS, cold)
        llm.load_state(tmp_path / "state.kv")
        llm.engine.call(lambda cache, executor: cache.check([]))
        said = llm.generate(PROMPTS[5], temperature=0, max_tokens=24, logprobs=2, ignore_eos=True)
        assert (said.tokens, [one.logprob for one in said.logprobs]) == cold[5]
        # where keys are dropped its last 32 tokens are read again, before which nothing of the window was saved
        assert n_saved >= 320
        assert said.timings.reused_n >= 320 or "snapkv" in way.get("kv_keep", "")


@pytest.mark.parametrize("way", ["quest:256", "snapkv:64"])
def test_a_context_that_is_kept_whole_has_the_bits_of_one_that_is_not_chosen_from(path: Path, way: str) -> None:
    n = {"quest:256": 240, "snapkv:64": 90}[way]
    found = []
    for keep in (None, way):
        with edgellm.load(path, n_ctx=512, kv_keep=keep) as llm:
            found.append((told(llm, PROMPTS[5][:n], 5), told(llm, PROMPTS[5], 5)))
    assert found[0][0] == found[1][0] and found[0][1] != found[1][1]


def test_a_prompt_of_a_whole_context_leaves_room_for_what_is_kept_of_it(path: Path) -> None:
    long = [(11 * i) % 240 + 3 for i in range(509)]
    with edgellm.load(path, n_ctx=512, kv_keep="snapkv:256") as llm:
        before = told(llm, long, 4)
        assert told(llm, long, 4) == before
        used = llm.engine.call(lambda cache, executor: cache.n_used())
        assert not any(used)


def test_fewer_bits_need_less_memory(path: Path) -> None:
    found = []
    for kept in ("f16", "q8_0", "q4_0"):
        with edgellm.load(path, n_ctx=512, cache_type_k=kept, cache_type_v=kept) as llm:
            assert llm.memory_estimate.kv == llm.engine.cache.pool.nbytes
            found.append(llm.memory_estimate.kv)
    assert [round(found[0] * 9 / 16 / n, 6) for n in found[2:]] == [2.0] and found[1] * 32 == found[0] * 17


def test_what_cannot_be_is_refused_by_name(path: Path, tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match="cache_type_k is 'q3_0'"):
        edgellm.load(path, cache_type_k="q3_0")
    odd = tiny_models.write_tiny_model(tmp_path / "odd.gguf", "llama", head_dim=48)
    for name in ("q4_0", "kivi2"):
        with pytest.raises(UnsupportedError, match=f"heads of 48 dimensions; {name} takes multiples of 32"):
            edgellm.load(odd, cache_type_k=name, cache_type_v=name)
    with pytest.raises(UnsupportedError, match="kivi2 is a form of keys and values together, and f16"):
        edgellm.load(path, cache_type_k="kivi2")


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ("h2o:1024", "h2o is not there"),
        ("quest", "all, or one of quest, snapkv with a number"),
        ("quest:100", "a multiple of 256"),
        ("snapkv:0", "a multiple of 64"),
        ("window:64", "one of quest, snapkv"),
        (7, "one of quest, snapkv"),
    ],
)
def test_ways_that_are_not_there_are_refused_by_name(path: Path, keep: Any, message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        edgellm.load(path, kv_keep=keep)


def test_more_than_a_context_is_asked_for_at_no_cost_and_read_whole(path: Path) -> None:
    told_by = []
    for keep in (None, "quest:512", "quest:524288"):
        with edgellm.load(path, n_ctx=512, kv_keep=keep) as llm:
            told_by.append(told(llm, PROMPTS[0]))
            chosen = [layer.n_chosen for layer in llm.program.cache_layers if getattr(layer, "n_chosen", 0)]
            assert set(chosen) <= {512 // 32}, keep
    assert told_by[0] == told_by[1] == told_by[2] and chosen


def test_ways_that_do_not_go_together_are_refused_by_name(path: Path, tmp_path: Path) -> None:
    refused = [
        ({"cache_dir": tmp_path / "cache"}, "a cache_dir"),
        ({"max_tokens_per_step": 16}, "steps of 16 tokens"),
        ({"cache_type_k": "kivi2", "cache_type_v": "kivi2"}, "packed block by block"),
    ]
    for options, message in refused:
        with pytest.raises(UnsupportedError, match=message):
            edgellm.load(path, kv_keep="snapkv:64", **options)
    with edgellm.load(path, kv_keep="snapkv:64") as llm, pytest.raises(UnsupportedError, match="num_beams"):
        llm.generate("a", num_beams=2, max_tokens=2)
    recurrent = tiny_models.write_tiny_model(tmp_path / "gpt2.gguf", "gpt2")
    with pytest.raises(UnsupportedError, match="adds a row for every position"):
        edgellm.load(recurrent, kv_keep="snapkv:64")
