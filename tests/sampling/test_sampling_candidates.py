"""Finding the largest logits fast is finding them exactly: against a full sort, on odd sizes, with ties."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cpu_programs import cpu_draw
from hypothesis import given, settings
from hypothesis import strategies as st

from edgellm.formats.errors import NumericError
from edgellm.kernels.draw import DrawSpec, Link
from edgellm.sampling import Sampler, SamplingParams
from edgellm.sampling.candidates import Candidates


def sorted_ids(logits: np.ndarray, k: int) -> list[int]:
    """The k largest by falling logit, ties by rising id."""
    return np.lexsort((np.arange(len(logits)), -logits))[:k].tolist()


def logits_of(kind: str, n: int, seed: int) -> np.ndarray:
    """n logits that are easy or hard to sort."""
    rng = np.random.default_rng(seed)
    return {
        "spread": rng.normal(0, 3, n),
        "ties": rng.integers(-3, 4, n).astype(float),
        "equal": np.zeros(n),
        "rising": np.arange(n, dtype=float),
        "falling": -np.arange(n, dtype=float),
        "banned": np.where(rng.random(n) < 0.999, -np.inf, rng.normal(0, 1, n)),
    }[kind].astype(np.float32)


@pytest.mark.parametrize("n", [1, 7, 17, 33, 1000, 8191, 32000, 49152, 128256, 151936, 262144])
@pytest.mark.parametrize("k", [1, 2, 40, 255, 257, 3000, 10**6])
@pytest.mark.parametrize("kind", ["spread", "ties", "equal", "rising", "banned"])
def test_largest_is_the_head_of_a_full_sort(n: int, k: int, kind: str) -> None:
    logits = logits_of(kind, n, n + k)
    assert Candidates(logits).largest(k).tolist() == sorted_ids(logits, k)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 60),
    st.fixed_dictionaries(
        {
            "temperature": st.floats(0, 3),
            "top_k": st.integers(0, 70),
            "top_p": st.floats(0, 1),
            "min_p": st.floats(0, 1),
            "typical_p": st.floats(0, 1),
            "top_n_sigma": st.floats(-1, 5),
            "xtc_probability": st.floats(0, 1),
            "xtc_threshold": st.floats(0, 1),
            "repeat_penalty": st.floats(0.5, 2),
            "dry_multiplier": st.floats(0, 2),
            "dynatemp_range": st.floats(0, 1),
            "min_keep": st.integers(0, 5),
            "mirostat": st.integers(0, 2),
            "adaptive_target": st.floats(-1, 1),
        }
    ),
)
def test_any_setting_chooses_a_token_of_the_vocabulary(seed: int, n: int, changed: dict[str, float]) -> None:
    rng = np.random.default_rng(seed)
    params = SamplingParams(seed=seed, dry_sequence_breakers=(), **changed)  # type: ignore[arg-type]
    sampler = Sampler(params, n)
    for _ in range(8):
        logits = rng.normal(0, 5, n).astype(np.float32)
        before = logits.copy()
        token = sampler.sample(logits).token
        assert 0 <= token < n and np.array_equal(logits, before)
        sampler.accept(token)


def test_read_only_logits_are_fine() -> None:
    logits = np.random.default_rng(0).normal(0, 3, 50000).astype(np.float32)
    logits.flags.writeable = False
    params = SamplingParams(seed=1, repeat_penalty=1.3, logit_bias={3: 1.0}, n_probs=3, top_n_sigma=2.0)
    sampler = Sampler(params, 50000, history=[1, 2, 3])
    assert len(sampler.sample(logits).top) == 3


def test_the_chain_equals_a_full_sort_of_everything() -> None:
    """Default settings on a large vocabulary, against the textbook form in float64."""
    rng = np.random.default_rng(3)
    for n in (49152, 262144):
        logits = rng.normal(0, 3, n).astype(np.float32)
        order = np.array(sorted_ids(logits, 40))
        values = logits[order].astype(np.float64)
        probs = np.exp(values - values[0]) / np.exp(values - values[0]).sum()
        kept = int(np.searchsorted(np.cumsum(probs), 0.95)) + 1
        kept = int(np.sum(probs[:kept] >= 0.05 * probs[0]))
        candidates = Sampler(SamplingParams(seed=1), n).candidates(logits)
        assert candidates.ids is not None and candidates.ids.tolist() == order[:kept].tolist()
        expected = np.exp((values[:kept] - values[0]) / 0.8)
        assert candidates.probs() == pytest.approx(expected / expected.sum(), rel=1e-6)


def test_top_p_over_the_whole_vocabulary_equals_a_full_sort() -> None:
    rng = np.random.default_rng(4)
    for spread in (0.5, 2.0, 6.0):
        logits = rng.normal(0, spread, 50000).astype(np.float32)
        order = np.array(sorted_ids(logits, 50000))
        values = logits[order].astype(np.float64)
        reached = np.cumsum(np.exp(values - values[0]))
        kept = int(np.searchsorted(reached / reached[-1], 0.9)) + 1
        params = SamplingParams(seed=1, top_k=0, top_p=0.9, min_p=0.0, temperature=1.0)
        assert len(Sampler(params, 50000).candidates(logits)) == pytest.approx(kept, abs=1 + kept * 1e-4)


@pytest.mark.parametrize("kind", ["spread", "flat", "ties", "banned"])
def test_typical_p_over_the_whole_vocabulary_equals_a_full_sort(kind: str) -> None:
    rng = np.random.default_rng(6)
    logits = {
        "spread": rng.normal(0, 4, 50000),
        "flat": rng.normal(0, 0.01, 50000),
        "ties": rng.integers(-2, 3, 50000).astype(float),
        "banned": np.where(rng.random(50000) < 0.5, -np.inf, rng.normal(0, 1, 50000)),
    }[kind].astype(np.float32)
    probs = np.exp(logits - logits.max(), dtype=np.float64)
    probs /= probs.sum()
    with np.errstate(divide="ignore", invalid="ignore"):
        surprise = -np.log(probs)
        entropy = np.nansum(probs * np.where(probs > 0, surprise, 0))
    order = np.argsort(np.abs(surprise - entropy), kind="stable")
    kept = int(np.searchsorted(np.cumsum(probs[order]), 0.5)) + 1
    params = SamplingParams(seed=1, top_k=0, top_p=1.0, min_p=0.0, temperature=1.0, typical_p=0.5)
    candidates = Sampler(params, 50000).candidates(logits)
    assert len(candidates) == pytest.approx(kept, abs=2 + kept * 1e-3)
    assert candidates.ids is not None and len(np.intersect1d(candidates.ids, order[:kept])) >= kept * 0.999 - 2


@pytest.mark.parametrize("n", [1, 7, 17, 63, 64, 65, 1000, 49152, 262144])
@pytest.mark.parametrize("k", [1, 2, 40, 128, 255])
@pytest.mark.parametrize("kind", ["spread", "ties", "equal", "rising", "falling", "banned"])
def test_the_kernel_finds_the_head_of_a_full_sort(n: int, k: int, kind: str) -> None:
    logits = logits_of(kind, n, n + k)
    assert Candidates(logits, draw=cpu_draw()).largest(k).tolist() == sorted_ids(logits, k)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 0},
    {"top_k": 0, "min_p": 0},
    {"repeat_penalty": 1.3},
    {"top_k": 1},
    {"top_k": 100, "top_p": 0.5, "min_p": 0.2, "temperature": 1.7},
    {"top_k": 200},
    {"top_p": 0.01, "min_keep": 3},
    {"min_p": 0.9, "min_keep": 5},
    {"temperature": 0.7, "dynatemp_range": 0.3},
    {"samplers": ("temperature", "top_k", "min_p", "top_p")},
    {"samplers": ("top_k", "temperature", "min_p")},
    {"typical_p": 0.7},
    {"mirostat": 2},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_the_kernel_changes_nothing_of_what_a_sampler_says(options: dict[str, Any], biased: bool) -> None:
    rng = np.random.default_rng(3)
    bias = {"logit_bias": {5: -np.inf, 9: 3.0}} if biased else {}
    params = SamplingParams(n_probs=8, logprobs=True, sampler_trace=True, **options, **bias)
    history, draw = [1, 2, 3], cpu_draw()
    for seed in range(20):
        logits = rng.normal(0, 3, 49152).astype(np.float32)
        params = replace(params, seed=seed)
        plain = Sampler(params, len(logits), history=history).sample(logits)
        fast = Sampler(params, len(logits), history=history, draw=draw).sample(logits)
        assert fast.token == plain.token
        bare = Sampler(replace(params, n_probs=0, logprobs=False), len(logits), history=history, draw=draw)
        assert bare.sample(logits).token == plain.token
        assert [token for token, _ in fast.top] == [token for token, _ in plain.top]
        np.testing.assert_allclose([p for _, p in fast.top], [p for _, p in plain.top], rtol=0, atol=2e-6)
        assert_same_trace(fast.after, plain.after)


@pytest.mark.parametrize("options", OPTIONS[:-2], ids=str)
@pytest.mark.parametrize("n_banned", [0, 1, 30])
def test_the_kernel_draws_the_same_tokens_one_after_the_other(options: dict[str, Any], n_banned: int) -> None:
    rng = np.random.default_rng(5)
    banned = rng.permutation(3000)[:n_banned]
    params = SamplingParams(seed=9, logit_bias=dict.fromkeys(banned.tolist(), False), **options)
    plain, fast = Sampler(params, 3000), Sampler(params, 3000, draw=cpu_draw())
    if not options:
        assert fast.short is not None, "bans need no numpy"
    for _ in range(200):  # more than random numbers are drawn together
        logits = rng.normal(0, 3, 3000).astype(np.float32)
        logits[banned] += 6  # they would be taken
        tokens = []
        for sampler in (plain, fast):
            tokens.append(sampler.sample(logits).token)
            sampler.accept(tokens[-1])
        assert tokens[0] == tokens[1]
        assert tokens[0] not in banned


def test_what_is_reported_beside_bans_is_the_raw_distribution() -> None:
    logits = np.array([5, 9, 8, 1, 7, 9], np.float32)
    params = SamplingParams(temperature=0, n_probs=3, logprobs=True, logit_bias={1: False, 5: False, 2: False})
    plain, fast = (Sampler(params, 6, draw=draw).sample(logits) for draw in (None, cpu_draw()))
    assert fast.token == plain.token == 4
    assert fast.logprob == pytest.approx(plain.logprob, abs=2e-6)
    assert [token for token, _ in fast.top] == [token for token, _ in plain.top] == [1, 5, 2]
    everything = SamplingParams(temperature=0, logit_bias=dict.fromkeys(range(6), False))
    with pytest.raises(NumericError, match="banned"):
        Sampler(everything, 6, draw=cpu_draw()).sample(logits)


def test_the_kernels_exponential_is_exact_to_the_last_places() -> None:
    for scale in (1e-6, 0.1, 1.0, 30.0, 400.0):
        logits = -np.sort(np.random.default_rng(1).exponential(scale, 128)).astype(np.float32)
        draw = cpu_draw().open(DrawSpec((Link("temperature", 0.77),), 128, 128), np.random.default_rng(1))
        assert draw.draw(logits)
        drawn = draw.drawn(1)[0]
        shaped = logits.astype(np.float64) / 0.77
        assert drawn.shaped == shaped.tolist()
        expected = math.fsum(math.exp(value - shaped[0]) for value in shaped)
        assert drawn.shaped_sum == pytest.approx(expected, rel=1e-14)


def test_temperatures_beyond_all_numbers_leave_the_largest_logit() -> None:
    params = SamplingParams(
        samplers=("top_k", *["temperature"] * 12), temperature=1e-30, n_probs=2, logprobs=True, sampler_trace=True
    )
    logits = np.arange(50, dtype=np.float32)
    sampled = Sampler(params, 50, draw=cpu_draw()).sample(logits)
    assert (sampled.token, sampled.after) == (49, {49: 0.0, 48: "temperature"})


def test_a_sampler_for_kernels_cannot_be_copied() -> None:
    with pytest.raises(TypeError, match="its parameters"):
        copy.deepcopy(Sampler(SamplingParams(), 50, draw=cpu_draw()))


def assert_same_trace(fast: dict[int, float | str] | None, plain: dict[int, float | str] | None) -> None:
    """Both cut the same tokens for the same reason, and left the others with the same probability."""
    if plain is None:
        assert fast is None
        return
    assert fast is not None and fast.keys() == plain.keys()
    for token, left in plain.items():
        assert fast[token] == (left if isinstance(left, str) else pytest.approx(left, abs=2e-6))


def test_nan_in_the_logits_is_an_error_with_the_kernel_too() -> None:
    logits = np.zeros(5000, np.float32)
    logits[4321] = np.nan
    with pytest.raises(NumericError):
        Sampler(SamplingParams(n_probs=3, logprobs=True), 5000, draw=cpu_draw()).sample(logits)
