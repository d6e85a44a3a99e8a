"""An answer under a mask: the same tokens whatever is drafted, forced, preempted or shared, and an end of its own."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from fake_executor import N_VOCAB, PACKED, STATE, FakeExecutor, expected_logits, fake_layers, fake_pool, fake_program
from speculation_trials import Oracle

from edgellm.engine.cache import KVCache, pool_blocks
from edgellm.engine.engine import Engine
from edgellm.engine.scheduler import Scheduler
from edgellm.engine.speculation import Drafter
from edgellm.formats.errors import EdgeLLMError, NumericError
from edgellm.sampling import AllowedTokens, Sampler, SamplingParams

EOG = 96
WINDOWS = [(0,), (0, 40), (STATE, 0), (PACKED, 0)]
HANG_S = 60.0
CHAINS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "plain": {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
    "usual": {"temperature": 0.8},
    "xtc": {"temperature": 1.5, "xtc_probability": 0.6, "xtc_threshold": 0.01},
    "mirostat": {"mirostat": 1},
    "mirostat 2": {"mirostat": 2, "mirostat_tau": 3.0},
    "adaptive": {"adaptive_target": 0.3},
    "penalties": {"temperature": 1.0, "repeat_penalty": 1.3, "dry_multiplier": 0.8},
}


class Rule:
    """A mask by arithmetic: which tokens may come follows from those that have; some positions leave no choice."""

    def __init__(self, length: int = 60, forces: bool = True) -> None:
        self.length, self.forces = length, forces
        self.tokens: list[int] = []
        self.prepared = 0

    def choices(self, tokens: Sequence[int]) -> list[int]:
        """What may come behind ``tokens``."""
        state = sum((i + 1) * token for i, token in enumerate(tokens[-4:]))
        if state % 3 == 0:
            return [state % (N_VOCAB - 1)]
        return [EOG] if state % 101 == 7 else [token for token in range(N_VOCAB - 1) if (token + state) % 5 == 1]

    @property
    def complete(self) -> bool:
        return len(self.tokens) >= self.length

    def prepare(self, draft: Sequence[int] = ()) -> int:
        self.prepared += 1
        tokens = list(self.tokens)
        for n, token in enumerate(draft):
            if token not in self.choices(tokens) or len(tokens) >= self.length:
                return n
            tokens.append(token)
        return len(draft)

    def allowed(self) -> AllowedTokens:
        assert not self.complete, "asked beyond the end"
        flags = np.zeros(N_VOCAB, bool)
        flags[self.choices(self.tokens)] = True
        return AllowedTokens(np.flatnonzero(flags), flags)

    def forced(self) -> int | None:
        choices = self.choices(self.tokens)
        return choices[0] if self.forces and len(choices) == 1 and not self.complete else None

    def accept(self, token: int) -> None:
        if token not in self.choices(self.tokens):
            raise EdgeLLMError(f"{token} may not come")
        self.tokens.append(token)


def make_engine(
    windows: tuple[int, ...] = (0,), drafter: Callable[[], Drafter] | None = None, n_blocks: Any = None, chunk: int = 64
) -> Engine:
    program = fake_program(windows)
    pool = fake_pool(program, n_blocks or pool_blocks(fake_layers(windows), 512, chunk, 3))
    return Engine(FakeExecutor(program, pool, chunk), KVCache(pool, 512), (EOG,), drafter)


def answer(
    engine: Engine, prompt: Sequence[int], mask: Any, chain: str = "greedy", n: int | None = 200, **options: Any
) -> list[Any]:
    params = SamplingParams(**{"seed": 3, **CHAINS[chain], **options})
    sampler = Sampler(params, N_VOCAB, history=prompt, token_bytes=lambda token: b"%d" % token, mask=mask)
    return list(engine.generate(prompt, sampler, max_tokens=n))


def tokens_of(items: Sequence[Any]) -> list[int]:
    return [item.token for item in items if item.token is not None]


def prompt_of(seed: int, n: int = 40) -> list[int]:
    return random.Random(seed).choices(range(N_VOCAB), k=n)


@pytest.fixture
def all_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts of any length, as if they cost nothing."""
    monkeypatch.setattr(Scheduler, "_tokens_per_s", lambda self, n: n)


def test_a_greedy_answer_takes_the_likeliest_of_the_allowed_tokens() -> None:
    prompt = prompt_of(1)
    text, rule, expected = list(prompt), Rule(), []
    while len(expected) < 60 and (not expected or expected[-1] != EOG):
        choices = rule.choices(expected)
        logits = expected_logits(text)
        expected.append(max(choices, key=lambda token: logits[token]))
        text.append(expected[-1])
    items = answer(make_engine(), prompt, Rule())
    assert tokens_of(items) == expected
    assert items[-1].finish_reason == "stop"


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("windows", WINDOWS)
def test_forced_tokens_are_those_that_would_have_been_sampled(chain: str, windows: tuple[int, ...]) -> None:
    for seed in range(4):
        engines = make_engine(windows), make_engine(windows)
        plain = answer(engines[0], prompt_of(seed), Rule(forces=False), chain)
        forced = answer(engines[1], prompt_of(seed), Rule(), chain)
        assert tokens_of(forced) == tokens_of(plain)
        assert [item.finish_reason for item in forced] == [item.finish_reason for item in plain]
        batches = [engine.executor.batches for engine in engines]  # type: ignore[attr-defined]
        assert len(batches[1]) < len(batches[0]) and sum(batches[1]) <= sum(batches[0])


@pytest.mark.usefixtures("all_drafts")
@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("windows", WINDOWS)
@pytest.mark.parametrize("right", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("forces", [False, True])
def test_drafts_change_no_token(chain: str, windows: tuple[int, ...], right: float, forces: bool) -> None:
    prompt = prompt_of(5)
    plain = tokens_of(answer(make_engine(windows), prompt, Rule(forces=False), chain))
    engine = make_engine(windows, lambda: Oracle(N_VOCAB, [prompt + plain], right))
    items = answer(engine, prompt, Rule(forces=forces), chain)
    assert tokens_of(items) == plain
    drafted, accepted = items[-1].timings.drafted_n, items[-1].timings.accepted_n
    assert drafted - 1 <= accepted <= drafted if right == 1.0 else accepted <= drafted  # the last one ends the answer
    assert right < 1.0 or forces or drafted


def test_answers_in_a_batch_are_as_alone_and_preemption_changes_nothing() -> None:
    prompts = [prompt_of(seed, 30 + 7 * seed) for seed in range(6)]
    alone = [tokens_of(answer(make_engine(), prompt, Rule(), "usual")) for prompt in prompts]
    engine = make_engine(n_blocks=(24,), chunk=16)  # room for two or three of them
    together: dict[int, list[int]] = {}

    def one(i: int) -> None:
        together[i] = tokens_of(answer(engine, prompts[i], Rule(), "usual"))

    threads = [threading.Thread(target=one, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG_S)
        assert not thread.is_alive()
    assert [together[i] for i in range(6)] == alone


def test_a_complete_answer_ends_by_itself_and_its_last_token_is_part_of_it() -> None:
    items = answer(make_engine(), prompt_of(2), Rule(length=5))
    assert len(tokens_of(items)) == 5
    assert [item.finish_reason for item in items] == [None] * 5 + ["stop"]
    assert items[-1].token is None


def test_max_tokens_cuts_with_length_also_amid_forced_tokens() -> None:
    whole = tokens_of(answer(make_engine(), prompt_of(2), Rule()))
    for n in range(1, 20):
        items = answer(make_engine(), prompt_of(2), Rule(), n=n)
        assert (tokens_of(items), items[-1].finish_reason) == (whole[:n], "length")
    assert answer(make_engine(), prompt_of(2), Rule(length=7), n=7)[-1].finish_reason == "stop"


def test_reports_are_of_the_models_own_distribution_and_every_token_has_one() -> None:
    prompt = prompt_of(3)
    plain = answer(make_engine(), prompt, Rule(), "usual")
    items = [i for i in answer(make_engine(), prompt, Rule(), "usual", n_probs=3, sampler_trace=True) if i.choice]
    assert [item.token for item in items] == tokens_of(plain)
    text = list(prompt)
    for item in items:
        logits = expected_logits(text).astype(np.float64)
        log_sum = np.log(np.exp(logits).sum())
        assert item.choice.logprob == pytest.approx(logits[item.token] - log_sum, abs=1e-5)
        assert [token for token, _ in item.choice.top] == np.argsort(-logits, kind="stable")[:3].tolist()
        banned = {token for token, _ in item.choice.top} - set(Rule().choices(text[len(prompt) :]))
        assert all(item.choice.after[token] == "grammar" for token in banned)
        text.append(item.token)


def test_a_mask_that_raises_ends_its_own_answer_alone() -> None:
    class Broken(Rule):
        def allowed(self) -> AllowedTokens:
            if len(self.tokens) > 8:
                raise EdgeLLMError("the grammar is too hard", code="GRAMMAR_LIMIT")
            return super().allowed()

    engine = make_engine()
    with pytest.raises(EdgeLLMError, match="too hard"):
        answer(engine, prompt_of(1), Broken(forces=False))
    assert tokens_of(answer(engine, prompt_of(1), Rule())) == tokens_of(answer(make_engine(), prompt_of(1), Rule()))


def test_nan_is_refused_under_a_mask_and_a_banned_forced_token_too() -> None:
    engine = make_engine()
    engine.executor.poison = True  # type: ignore[attr-defined]
    with pytest.raises(NumericError):
        answer(engine, prompt_of(1), Rule())
    whole = tokens_of(answer(make_engine(), prompt_of(1), Rule()))
    token = next(token for i, token in enumerate(whole) if len(Rule().choices(whole[:i])) == 1)
    with pytest.raises(NumericError, match="banned"):
        answer(make_engine(), prompt_of(1), Rule(), logit_bias={token: False})
