"""A model whose layers have a state: whatever was reused, kept, lost or guessed, an answer is that of a cold run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from answers_together import answers_together
from speculation_trials import free_drafts, guess
from tiny_models import write_tiny_model

import edgellm
from edgellm.kernels.cache_types import DEFAULT, PACKED, QUANTIZED

PROMPT = [11, 12, 13, 14, 15] * 14 + [20, 21]
GREEDY = {"max_tokens": 24, "temperature": 0, "ignore_eos": True}
SEEDED = {"max_tokens": 24, "temperature": 0.9, "seed": 5, "ignore_eos": True}
Load = Callable[..., edgellm.LLM]
KEPT = [("cpu", DEFAULT), ("reference", DEFAULT), ("cpu", next(iter(QUANTIZED))), *(("cpu", kept) for kept in PACKED)]
"""Executors, and what the layers that have keys keep: one type of each kind that there is."""


@pytest.fixture(scope="module", params=["lfm2", "qwen35", "mamba2", "nemotron_h_moe"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "model.gguf", request.param, n_layer=4)


@pytest.fixture(params=KEPT, ids="-".join)
def load(path: Path, request: pytest.FixtureRequest) -> Iterator[Load]:
    opened: list[edgellm.LLM] = []
    executor, kept = request.param
    types = {"cache_type_k": kept, "cache_type_v": kept}

    def opening(**options: Any) -> edgellm.LLM:
        opened.append(edgellm.load(path, executor=executor, n_threads=2, **({"n_ctx": 256} | types | options)))
        return opened[-1]

    yield opening
    for llm in opened:
        llm.close()


def cold(load: Load, prompt: list[int], options: dict[str, Any]) -> list[int]:
    return list(load().generate(prompt, **options).tokens)


@pytest.mark.parametrize("n", [1, 7, 33])
def test_steps_of_any_size_give_the_same_answer(load: Load, n: int) -> None:
    assert list(load(max_tokens_per_step=n).generate(PROMPT, **GREEDY).tokens) == cold(load, PROMPT, GREEDY)


@pytest.mark.parametrize("options", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_a_prompt_and_an_answer_that_are_known_are_not_read_again(load: Load, options: dict[str, Any]) -> None:
    llm = load()
    first = llm.generate(PROMPT, **options)
    again = llm.generate(PROMPT, **options)
    assert again.tokens == first.tokens and again.timings.reused_n == len(PROMPT) - 1
    turn = [*PROMPT, *first.tokens, 30, 31, 32]
    second = llm.generate(turn, **options)
    assert second.timings.reused_n == len(PROMPT) + len(first.tokens) - 1
    assert list(second.tokens) == cold(load, turn, options)


def test_branches_share_what_is_before_them(load: Load) -> None:
    llm = load()
    prompts = [[*PROMPT[:47], end, end + 1, end] for end in (1, 2, 3, 4)]
    answers = [llm.generate(prompt, **GREEDY) for prompt in prompts]
    assert [answer.timings.reused_n for answer in answers] == [0, 0, 47, 47]
    assert [list(answer.tokens) for answer in answers] == [cold(load, prompt, GREEDY) for prompt in prompts]


def test_a_talk_reads_what_is_new_and_no_more(load: Load, tmp_path: Path) -> None:
    """Tokens that are computed, of prompts: turns that are added, one that is edited, branches, and after a restart."""
    llm, talk, end = load(n_ctx=512), list[int](PROMPT), 0
    for turn in ([], [30, 31, 32], [40], [50, 51]):
        talk += turn
        answer = llm.generate(talk, **GREEDY)
        new = len(talk) - answer.timings.reused_n
        assert new == (len(talk) if not end else len(turn) + 1)  # and the answer's last token, which nothing read yet
        before, talk, end = talk, [*talk, *answer.tokens], len(talk)
    edited = [*before[:-2], 60, 61, 62]  # the last turn, asked in other words
    assert len(edited) - llm.generate(edited, **GREEDY).timings.reused_n == 4  # from the end of the answer before it
    assert len(edited) - llm.generate(edited, **GREEDY).timings.reused_n == 1
    other = [*edited[:-3], 70, 71]  # now it is known where talks part
    assert len(other) - llm.generate(other, **GREEDY).timings.reused_n == 2
    llm.save_state(tmp_path / "state", other)
    again = load(n_ctx=512)
    again.load_state(tmp_path / "state")
    assert len(other) - again.generate(other, **GREEDY).timings.reused_n <= 2


def test_a_saved_state_goes_on_in_another_program(load: Load, tmp_path: Path) -> None:
    llm = load()
    first = llm.generate(PROMPT, **GREEDY)
    held = llm.save_state(tmp_path / "state", [*PROMPT, *first.tokens])
    assert held == len(PROMPT) + len(first.tokens) - 1
    other = load()
    assert other.load_state(tmp_path / "state") == [*PROMPT, *first.tokens][:held]
    turn = [*PROMPT, *first.tokens, 40]
    second = other.generate(turn, **GREEDY)
    assert second.timings.reused_n == held and list(second.tokens) == cold(load, turn, GREEDY)


def test_a_preempted_answer_is_the_answer_of_one_that_was_not(load: Load) -> None:
    prompts = [[50 + i, *PROMPT] for i in range(4)]
    expected = [cold(load, prompt, SEEDED) for prompt in prompts]
    llm = load(n_ctx=128, n_parallel=1)  # room for one of them
    assert answers_together(llm, prompts, SEEDED) == expected


@pytest.fixture(scope="module")
def drafts(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    path = write_tiny_model(tmp_path_factory.mktemp("drafts") / "llama.gguf", n_embd=64, head_dim=16, n_ff=64)
    return [{"speculate": "ngram"}, {"draft": path}]


@pytest.mark.parametrize("options", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_drafts_change_no_token(
    load: Load, options: dict[str, Any], drafts: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    free_drafts(monkeypatch)
    more = options | {"max_tokens": 32}
    plain = cold(load, PROMPT, more)
    turn = [*PROMPT, *plain, 60]
    behind = cold(load, turn, options)
    for speculation in drafts[: 1 + (options is SEEDED)]:
        llm = load(**speculation)
        drafted = llm.generate(PROMPT, **more)
        assert list(drafted.tokens) == plain
        assert drafted.timings.drafted_n > 0 or "draft" not in speculation
        assert list(llm.generate(turn, **options).tokens) == behind
    llm = load()  # and drafts that are right for a while
    guess(llm, [[*PROMPT, *plain], [*turn, *behind]])
    drafted = llm.generate(PROMPT, **more)
    assert list(drafted.tokens) == plain and 0 < drafted.timings.accepted_n < drafted.timings.drafted_n
    assert list(llm.generate(turn, **options).tokens) == behind
