"""Samplers against hand-written distributions with exact results, and the promises of parameters and seeds."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from edgellm.formats.errors import FormatError, NumericError, ParameterError
from edgellm.kernels.draw import TopLogits
from edgellm.sampling import SAMPLER_NAMES, AllowedTokens, Sampled, Sampler, SamplingParams, parse_samplers

OFF = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "dry_sequence_breakers": ()}
P = [0.4, 0.3, 0.2, 0.1]  # the distribution of most cases


def logits_of(probs: list[float]) -> np.ndarray:
    """Logits whose softmax is ``probs``."""
    with np.errstate(divide="ignore"):
        return np.log(np.asarray(probs, np.float64)).astype(np.float32)


def sampler_of(n_vocab: int, history: tuple[int, ...] = (), **changed: Any) -> Sampler:
    """A sampler with everything off but ``changed``."""
    return Sampler(SamplingParams(**{**OFF, "seed": 1, **changed}), n_vocab, history=history)


def left(probs: list[float], history: tuple[int, ...] = (), **changed: Any) -> dict[int, float]:
    """Token -> probability after the chain."""
    candidates = sampler_of(len(probs), history, **changed).candidates(logits_of(probs))
    ids = range(len(candidates)) if candidates.ids is None else candidates.ids
    return {int(i): round(float(p), 5) for i, p in zip(ids, candidates.probs(), strict=True)}


def normal(**weights: float) -> dict[int, float]:
    """Expected distribution from weights t0=..., t1=..."""
    total = sum(weights.values())
    return {int(name[1:]): round(weight / total, 5) for name, weight in weights.items()}


# sampler -> [(probabilities, history, changed parameters, expected distribution)]
CASES: dict[str, list[tuple[list[float], tuple[int, ...], dict[str, Any], dict[int, float]]]] = {
    "penalties": [
        # repeat: positive logits are divided, others multiplied: all logits here are negative
        (P, (1, 1), {"repeat_penalty": 2.0}, normal(t0=0.4, t1=0.09, t2=0.2, t3=0.1)),
        # presence once, frequency per occurrence: 0.3 / 2 / 4
        (
            P,
            (1, 1),
            {"presence_penalty": math.log(2), "frequency_penalty": math.log(2)},
            normal(t0=0.4, t1=0.0375, t2=0.2, t3=0.1),
        ),
        # only the last n count
        (P, (1, 2), {"repeat_penalty": 2.0, "penalty_last_n": 1}, normal(t0=0.4, t1=0.3, t2=0.04, t3=0.1)),
        (P, (1,), {"repeat_penalty": 2.0, "penalty_last_n": 0}, normal(t0=0.4, t1=0.3, t2=0.2, t3=0.1)),
        (P, (1, *[2] * 99), {"presence_penalty": 50.0, "penalty_last_n": -1}, normal(t0=0.4, t1=0, t2=0, t3=0.1)),
    ],
    "dry": [
        # ...0 1 2 | 0 1: token 2 would go on with a repeat of 2: penalty 1 * 2 ** (2 - 2)
        (P, (0, 1, 2, 0, 1), {"dry_multiplier": 1.0, "dry_base": 2.0}, normal(t0=0.4, t1=0.3, t2=0.2 / math.e, t3=0.1)),
        # a repeat of 3 costs 2
        (
            P,
            (3, 0, 1, 2, 3, 0, 1),
            {"dry_multiplier": 1.0, "dry_base": 2.0},
            normal(t0=0.4, t1=0.3, t2=0.2 / math.e**2, t3=0.1),
        ),
        # shorter than allowed costs nothing
        (P, (1, 2, 0, 1), {"dry_multiplier": 1.0}, normal(t0=0.4, t1=0.3, t2=0.2, t3=0.1)),
        # 1 1 1: the repeats overlap; token 1 goes on with one of 2
        (P, (1, 1, 1), {"dry_multiplier": 1.0, "dry_base": 3.0}, normal(t0=0.4, t1=0.3 / math.e, t2=0.2, t3=0.1)),
        # outside the window
        (
            P,
            (0, 1, 2, 3, 3, 3, 0, 1),
            {"dry_multiplier": 1.0, "dry_penalty_last_n": 5},
            normal(t0=0.4, t1=0.3, t2=0.2, t3=0.1),
        ),
    ],
    "top_n_sigma": [
        # logits 0, 0, -4, -4: deviation 2, threshold -2
        ([1.0, 1.0, math.exp(-4), math.exp(-4)], (), {"top_n_sigma": 1.0}, {0: 0.5, 1: 0.5}),
        # a banned token does not count: logits 0, 0, -4: mean -4/3, deviation 1.8856, threshold -1.8856
        ([1.0, 1.0, math.exp(-4), 0.0], (), {"top_n_sigma": 1.0}, {0: 0.5, 1: 0.5}),
        (P, (), {"top_n_sigma": -1.0}, normal(t0=0.4, t1=0.3, t2=0.2, t3=0.1)),
    ],
    "top_k": [
        (P, (), {"top_k": 1}, {0: 1.0}),
        (P, (), {"top_k": 3}, normal(t0=0.4, t1=0.3, t2=0.2)),
        (P, (), {"top_k": 99}, normal(t0=0.4, t1=0.3, t2=0.2, t3=0.1)),
        ([0.1, 0.4, 0.1, 0.4], (), {"top_k": 3}, normal(t1=0.4, t3=0.4, t0=0.1)),  # ties: the lowest id
    ],
    "typ_p": [
        # entropy of P is 1.28 nats; distances of -log p: 0.36, 0.08, 0.33, 1.02
        (P, (), {"typical_p": 0.25}, {1: 1.0}),
        (P, (), {"typical_p": 0.49}, normal(t1=0.3, t2=0.2)),
        (P, (), {"typical_p": 0.51}, normal(t1=0.3, t2=0.2, t0=0.4)),
        (P, (), {"typical_p": 0.25, "min_keep": 3}, normal(t1=0.3, t2=0.2, t0=0.4)),
    ],
    "top_p": [
        (P, (), {"top_p": 0.0}, {0: 1.0}),
        (P, (), {"top_p": 0.39}, {0: 1.0}),
        (P, (), {"top_p": 0.69}, normal(t0=0.4, t1=0.3)),
        (P, (), {"top_p": 0.71}, normal(t0=0.4, t1=0.3, t2=0.2)),
        (P, (), {"top_p": 0.1, "min_keep": 2}, normal(t0=0.4, t1=0.3)),
    ],
    "min_p": [
        (P, (), {"min_p": 0.26}, normal(t0=0.4, t1=0.3, t2=0.2)),
        (P, (), {"min_p": 0.74}, normal(t0=0.4, t1=0.3)),
        (P, (), {"min_p": 1.0}, {0: 1.0}),
        (P, (), {"min_p": 1.0, "min_keep": 3}, normal(t0=0.4, t1=0.3, t2=0.2)),
    ],
    "xtc": [
        (P, (), {"xtc_probability": 1.0, "xtc_threshold": 0.15}, normal(t2=0.2, t3=0.1)),
        (P, (), {"xtc_probability": 1.0, "xtc_threshold": 0.35}, normal(t0=0.4, t1=0.3, t2=0.2, t3=0.1)),
        (P, (), {"xtc_probability": 1.0, "xtc_threshold": 0.51}, normal(t0=0.4, t1=0.3, t2=0.2, t3=0.1)),
        (P, (), {"xtc_probability": 0.0, "xtc_threshold": 0.15}, normal(t0=0.4, t1=0.3, t2=0.2, t3=0.1)),
        (P, (), {"xtc_probability": 1.0, "xtc_threshold": 0.15, "min_keep": 3}, normal(t0=0.4, t1=0.3, t2=0.2, t3=0.1)),
    ],
    "temperature": [
        (P, (), {"temperature": 0.5}, normal(t0=0.16, t1=0.09, t2=0.04, t3=0.01)),
        (P, (), {"temperature": 0.0}, {0: 1.0}),
        # two equal tokens: the greatest entropy, so temperature + range = 2; nothing changes between them
        ([0.5, 0.5], (), {"temperature": 1.0, "dynatemp_range": 1.0}, {0: 0.5, 1: 0.5}),
        # one certain token: entropy 0, temperature - range = 0
        ([1.0, 0.0], (), {"temperature": 1.0, "dynatemp_range": 1.0}, {0: 1.0}),
    ],
}


def test_every_sampler_has_cases() -> None:
    assert set(CASES) | {"adaptive_p"} == set(SAMPLER_NAMES)


@pytest.mark.parametrize(
    ("name", "case"), [(name, case) for name, cases in CASES.items() for case in cases], ids=lambda x: str(x)[:60]
)
def test_sampler_gives_the_exact_distribution(name: str, case: Any) -> None:
    probs, history, changed, expected = case
    got = {t: p for t, p in left(probs, history, samplers=(name,), **changed).items() if p}
    assert got == pytest.approx({t: p for t, p in expected.items() if p}, abs=2e-5)


def test_dynamic_temperature_follows_the_entropy() -> None:
    entropy = -sum(p * math.log(p) for p in P)
    temperature = 0.5 + 1.0 * (entropy / math.log(4)) ** 2
    weights = {f"t{i}": p ** (1 / temperature) for i, p in enumerate(P)}
    got = left(P, temperature=1.0, dynatemp_range=0.5, dynatemp_exponent=2.0)
    assert got == pytest.approx(normal(**weights), abs=2e-5)


def test_the_order_of_the_chain_is_the_users() -> None:
    # temperature 10 first makes the distribution flat enough for min_p to keep everything
    first = left(P, temperature=10.0, min_p=0.5, samplers=("temperature", "min_p"))
    last = left(P, temperature=10.0, min_p=0.5, samplers=("min_p", "temperature"))
    assert set(first) == {0, 1, 2, 3} and set(last) == {0, 1, 2}
    # the probabilities after top_k are over the kept set: 0.4 / 0.7 reaches 0.55
    assert set(left(P, top_k=2, top_p=0.55)) == {0}
    # penalties later in the chain touch only what is left
    assert left(P, (0, 3), top_k=2, presence_penalty=50.0, samplers=("top_k", "penalties")) == {0: 0.0, 1: 1.0}


def test_dry_stops_at_a_breaker() -> None:
    texts = [b"a", b"b", b"c", b"end.\n", b"x:", b"nl"]
    params = SamplingParams(**{**OFF, "dry_sequence_breakers": ("\n", ":")}, dry_multiplier=10.0, seed=1)
    logits = np.zeros(6, np.float32)

    def penalties(history: list[int]) -> list[int]:
        sampler = Sampler(params, 6, token_bytes=texts.__getitem__, history=history)
        return np.flatnonzero(sampler.candidates(logits).logits < 0).tolist()

    assert penalties([0, 1, 2, 0, 1]) == [2]
    assert penalties([0, 1, 2, 0, 3, 1]) == []  # only one token since the breaker
    assert penalties([0, 1, 3, 0, 1]) == []  # what would follow is a breaker itself
    spanning = SamplingParams(**{**OFF, "dry_sequence_breakers": ("nl:",)}, dry_multiplier=10.0, seed=1)
    sampler = Sampler(spanning, 6, token_bytes=texts.__getitem__, tokenize=lambda text: [4], history=[0, 1, 2, 5, 4, 1])
    assert sampler.looking_back[0].reach(np.array([0, 1, 5, 4, 1])) == 1  # type: ignore[union-attr]
    assert sampler.looking_back[0].reach(np.array([0, 1, 5, 1])) == 4  # type: ignore[union-attr]


def test_dry_agrees_with_a_plain_search() -> None:
    rng = np.random.default_rng(5)
    for _ in range(200):
        history = rng.integers(0, 3, rng.integers(1, 40)).tolist()
        sampler = sampler_of(3, tuple(history), dry_multiplier=1.0, dry_penalty_last_n=-1)
        got = sampler.looking_back[0].longest_repeats(np.array(history))  # type: ignore[union-attr]
        expected: dict[int, int] = {}
        for end in range(len(history) - 1):
            length = 0
            while length <= end and history[end - length] == history[len(history) - 1 - length]:
                length += 1
            if length >= 2:
                expected[history[end + 1]] = max(expected.get(history[end + 1], 0), length)
        assert got == expected


def test_mirostat_2_keeps_what_is_not_too_surprising() -> None:
    sampler = sampler_of(4, mirostat=2, mirostat_tau=0.75, mirostat_eta=0.5)
    token = sampler.sample(logits_of(P)).token  # mu = 1.5 bits: 0.4 (1.32 bits) stays, 0.3 (1.74) does not
    assert token == 0
    assert sampler.choice.mu == pytest.approx(1.5 - 0.5 * (0.0 - 0.75))  # a certain token has no surprise


def test_mirostat_1_estimates_k_from_the_head() -> None:
    zipf = [1 / rank for rank in range(1, 101)]  # exponent 1
    total = sum(zipf)
    sampler = sampler_of(100, mirostat=1, mirostat_tau=1.0)
    candidates = sampler.candidates(logits_of([p / total for p in zipf]))
    sampler.choice.cut(candidates)
    # the limit of ((s - 1) 2^mu / (1 - n^(1 - s)))^(1/s) for s -> 1 is 2^mu / ln n = 4 / 4.605, so one token
    assert len(candidates) == 1
    assert sampler.choice.k_of(2.0) == int((1 * 2**2 / (1 - 100**-1.0)) ** 0.5)


def test_mirostat_holds_the_surprise_near_tau() -> None:
    rng = np.random.default_rng(1)
    logits = np.sort(rng.normal(0, 3, 5000).astype(np.float32))[::-1].copy()
    probs = np.exp(logits - logits.max(), dtype=np.float64)
    surprise = -np.log2(probs / probs.sum())
    for version in (1, 2):
        sampler = sampler_of(5000, mirostat=version, mirostat_tau=3.0)
        seen = [surprise[sampler.sample(logits).token] for _ in range(600)]
        assert np.mean(seen[100:]) == pytest.approx(3.0, abs=1.0)


def test_adaptive_p_prefers_probabilities_near_its_target() -> None:
    sampler = sampler_of(4, adaptive_target=0.3, samplers=("adaptive_p",))
    candidates = sampler.candidates(logits_of(P))
    sampler.choice.choose(candidates)
    distance = np.abs(np.array(P) - 0.3) / 0.3
    assert candidates.logits == pytest.approx(5 - 10 * distance**2 / (1 + distance), abs=1e-5)
    token, probability = sampler.choice.pending
    before = sampler.choice.weighted_sum
    sampler.accept(token)
    assert sampler.choice.weighted_sum == pytest.approx(probability + 0.9 * before)
    assert sampler.choice.pending is None


def test_temperature_0_is_greedy_and_ties_go_to_the_lowest_id() -> None:
    assert sampler_of(4, temperature=0.0).sample(np.array([1, 3, 3, 2], np.float32)).token == 1
    default = Sampler(SamplingParams(temperature=0.0), 4)
    assert default.greedy and default.sample(np.array([1, 3, 3, 2], np.float32)).token == 1
    punished = sampler_of(4, (1, 1), temperature=0.0, presence_penalty=5.0)
    assert punished.sample(np.array([1, 3, 3, 2], np.float32)).token == 2
    slow = sampler_of(4, temperature=0.0, xtc_probability=1.0, xtc_threshold=0.1)  # XTC may drop the best one
    assert not slow.greedy and slow.sample(logits_of(P)).token == 3


def test_bias_bans_and_end_of_generation() -> None:
    logits = logits_of(P)
    assert left(P, logit_bias={0: False, 3: math.log(2)}) == pytest.approx(
        {0: 0.0, **normal(t1=0.3, t2=0.2, t3=0.2)}, abs=2e-5
    )
    sampler = Sampler(SamplingParams(temperature=0.0, ignore_eos=True), 4, eog_ids=(0, 1))
    assert sampler.sample(logits).token == 2
    suppressing = Sampler(SamplingParams(temperature=0.0, logit_bias={0: 99.0}), 4, eog_ids=(1,), suppressed_ids=(0,))
    assert suppressing.sample(logits).token == 1
    text = Sampler(SamplingParams(temperature=0.0, logit_bias={"ab": False}), 4, tokenize=lambda text: [0, 1])
    assert text.sample(logits).token == 2


def test_processors_see_the_tokens_and_change_a_copy() -> None:
    seen = []

    def ban_last(token_ids: Any, logits: np.ndarray) -> np.ndarray:
        seen.append(list(token_ids))
        logits[token_ids[-1]] = -np.inf
        return logits

    logits = logits_of(P)
    sampler = sampler_of(4, (2, 0), temperature=0.0, processors=(ban_last,))
    assert sampler.sample(logits).token == 1 and seen == [[2, 0]]
    assert logits.tolist() == logits_of(P).tolist()
    with pytest.raises(ParameterError, match="processors"):
        sampler_of(4, processors=(lambda ids, logits: logits[:2],)).sample(logits)


def test_log_probabilities_are_the_models_own() -> None:
    sampler = sampler_of(4, temperature=0.0, n_probs=2, presence_penalty=1.0)
    sampled = sampler.sample(logits_of(P))
    assert sampled.token == 0 and sampled.logprob == pytest.approx(math.log(0.4), abs=1e-6)
    assert [token for token, _ in sampled.top] == [0, 1]
    assert [p for _, p in sampled.top] == pytest.approx([math.log(0.4), math.log(0.3)], abs=1e-6)
    after = sampler_of(4, top_k=2, n_probs=4, post_sampling_probs=True).sample(logits_of(P))
    assert dict(after.top) == pytest.approx({0: math.log(4 / 7), 1: math.log(3 / 7)}, abs=1e-6)
    assert sampler_of(4).sample(logits_of(P)) == Sampled(sampler_of(4).sample(logits_of(P)).token)
    assert sampler_of(4, logprobs=True, temperature=0.0).sample(logits_of(P)).logprob == pytest.approx(math.log(0.4))


def test_draws_have_the_right_frequencies() -> None:
    sampler = sampler_of(4)
    counts = np.bincount([sampler.sample(logits_of(P)).token for _ in range(20000)], minlength=4)
    assert counts / 20000 == pytest.approx(P, abs=0.015)


def test_draws_over_a_large_vocabulary_have_the_right_frequencies() -> None:
    probs = np.full(40000, 0.5 / 39998)
    probs[[7, 39999]] = 0.25
    sampler = sampler_of(40000)
    tokens = np.array([sampler.sample(logits_of(probs.tolist())).token for _ in range(4000)])
    assert np.mean(tokens == 7) == pytest.approx(0.25, abs=0.03)
    assert np.mean(tokens == 39999) == pytest.approx(0.25, abs=0.03)
    assert np.mean(tokens < 20000) == pytest.approx(0.5, abs=0.03)


def test_xtc_happens_with_its_probability() -> None:
    sampler = sampler_of(4, xtc_probability=0.3, xtc_threshold=0.15)
    dropped = np.mean([len(sampler.candidates(logits_of(P))) == 2 for _ in range(5000)])
    assert dropped == pytest.approx(0.3, abs=0.03)


def test_one_seed_gives_one_text_and_a_drawn_seed_is_reported() -> None:
    rng = np.random.default_rng(0)
    steps = [rng.normal(0, 2, 1000).astype(np.float32) for _ in range(50)]

    def run(seed: int | None) -> tuple[int, list[int]]:
        sampler = Sampler(SamplingParams(seed=seed, top_k=0, top_p=1.0, min_p=0.0), 1000)
        return sampler.seed, [sampler.sample(logits).token for logits in steps]

    assert run(42) == run(42) and run(42)[1] != run(43)[1]
    seed, tokens = run(-1)
    assert run(seed) == (seed, tokens) and run(None)[0] != seed
    # PCG64 is a promise of numpy: the same numbers on every machine
    assert Sampler(SamplingParams(seed=42), 4).rng.random() == 0.7739560485559633


@pytest.mark.parametrize("bad", [[np.nan, 1, 2, 3], [1, 2, 3, np.nan], [np.inf, 0, 0, 0], [-np.inf] * 4])
@pytest.mark.parametrize("changed", [{}, {"temperature": 0.0}, {"top_k": 2}, {"mirostat": 2}])
def test_no_token_is_made_of_nan(bad: list[float], changed: dict[str, Any]) -> None:
    with pytest.raises(NumericError) as caught:
        sampler_of(4, **changed).sample(np.array(bad, np.float32))
    assert caught.value.code == "NUMERIC_NAN"


def test_logits_of_another_shape_and_unknown_tokens_are_named_errors() -> None:
    with pytest.raises(ParameterError, match="logits"):
        sampler_of(4).sample(np.zeros(5, np.float32))
    for token in (-1, 4):
        with pytest.raises(ParameterError, match="token"):
            sampler_of(4).accept(token)


@pytest.mark.parametrize("name", [f.name for f in fields(SamplingParams)])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, "1", 10**30, -(10**30), [1], object()])
def test_a_wrong_value_names_its_field(name: str, value: Any) -> None:
    try:
        params = SamplingParams(**{name: value})
    except ParameterError as error:
        assert name in str(error)
    else:  # an integer where the field takes a large one
        assert isinstance(value, int) and math.isfinite(getattr(params, name))


@pytest.mark.parametrize("bias", [{5: 1.0}, {"x": 1.0}, {-1: False}])
def test_bias_that_fits_no_token_is_refused(bias: dict[Any, Any]) -> None:
    with pytest.raises(ParameterError, match="logit_bias"):
        Sampler(SamplingParams(logit_bias=bias), 4)


@pytest.mark.parametrize("bias", [{1: math.nan}, {1: True}, {1: "x"}, {1.5: 1.0}, {True: 1.0}, [1], {1: math.inf}])
def test_bias_of_another_form_is_refused(bias: Any) -> None:
    with pytest.raises(ParameterError, match="logit_bias"):
        SamplingParams(logit_bias=bias)


def test_order_is_read_as_names_or_letters() -> None:
    assert parse_samplers("top_k;top-p;temp;typical") == ("top_k", "top_p", "temperature", "typ_p")
    assert parse_samplers("edskypmxt") == SamplingParams().samplers
    assert parse_samplers("top_k") == ("top_k",) and parse_samplers("k") == ("top_k",) and parse_samplers("") == ()
    with pytest.raises(ParameterError, match="samplers"):
        parse_samplers("top_k;nonesuch")


def test_user_then_file_then_default() -> None:
    metadata = {
        "general.sampling.temp": np.float32(0.5),
        "general.sampling.top_k": 20,
        "general.sampling.sequence": "top_k;temperature",
        "general.sampling.penalty_repeat": 1.1,
    }
    params = replace(SamplingParams.from_metadata(metadata), top_k=5)
    assert (params.temperature, params.top_k, params.top_p, params.repeat_penalty) == (0.5, 5, 0.95, 1.1)
    assert params.samplers == ("top_k", "temperature")
    with pytest.raises(FormatError, match=r"general\.sampling\.temp"):
        SamplingParams.from_metadata({"general.sampling.temp": math.nan})
    with pytest.raises(ParameterError, match="The override of general"):
        SamplingParams.from_metadata({"general.sampling.temp": math.nan}, {"general.sampling.temp"})


LLAMA_NAMES = {
    "temperature": "temp", "typical_p": "typ_p", "repeat_penalty": "penalty_repeat",
    "presence_penalty": "penalty_present", "frequency_penalty": "penalty_freq",
}  # fmt: skip


def test_defaults_are_those_of_llama_cpp() -> None:
    xllamacpp = pytest.importorskip("xllamacpp", reason="llama.cpp as users get it judges the defaults")
    judge = xllamacpp.CommonParams().sampling
    ours = SamplingParams()
    for f in fields(SamplingParams):
        expected = getattr(judge, LLAMA_NAMES.get(f.name, f.name), None)
        if isinstance(expected, int | float) and f.name != "seed":
            assert getattr(ours, f.name) == pytest.approx(expected), f.name
    assert ";".join(ours.samplers) == judge.samplers


# --- the trace of the samplers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "cut"),
    [
        ({"top_k": 2}, {2: "top_k", 3: "top_k"}),
        ({"top_p": 0.7}, {2: "top_p", 3: "top_p"}),
        ({"min_p": 0.3}, {2: "min_p", 3: "min_p"}),
        ({"top_k": 3, "min_p": 0.3}, {2: "min_p", 3: "top_k"}),
        ({"temperature": 0}, {1: "temperature", 2: "temperature", 3: "temperature"}),
        ({"logit_bias": {1: False}}, {1: "logit_bias"}),
        ({}, {}),
    ],
    ids=str,
)
def test_a_trace_names_the_sampler_that_cut_a_token_and_what_is_left_adds_up(
    settings: dict[str, Any], cut: dict[int, str]
) -> None:
    off = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 1}
    probabilities = np.array([0.5, 0.3, 0.1, 0.1 - 1e-3, 1e-3 / 2, 1e-3 / 2], np.float32)
    params = SamplingParams(**{**off, "n_probs": 4, "sampler_trace": True, **settings})
    sampled = Sampler(params, 6).sample(np.log(probabilities))
    assert sampled.after is not None
    names = {token: name for token, name in sampled.after.items() if isinstance(name, str)}
    assert names == cut
    kept = {token: float(np.exp(value)) for token, value in sampled.after.items() if not isinstance(value, str)}
    assert sum(kept.values()) == pytest.approx(1, abs=2e-3)
    assert sampled.token in kept
    assert [token for token, _ in sampled.top] == [0, 1, 2, 3]


def test_a_trace_changes_no_choice() -> None:
    logits = np.random.default_rng(5).normal(size=500).astype(np.float32) * 3
    plain, traced = (Sampler(SamplingParams(seed=3, n_probs=5, sampler_trace=t), 500) for t in (False, True))
    for _ in range(50):
        assert plain.sample(logits).token == traced.sample(logits).token


class Allows:
    """A mask that stands still."""

    complete = False

    def __init__(self, flags: np.ndarray, few: bool) -> None:
        self.flags, self.few = flags, few

    def allowed(self) -> Any:
        return AllowedTokens(np.flatnonzero(self.flags) if self.few else None, self.flags)

    def prepare(self, draft: Any = ()) -> int:
        return 0

    def forced(self) -> None:
        return None

    def accept(self, token: int) -> None:
        pass


@pytest.mark.parametrize("share", [0.0005, 0.01, 0.5, 0.999])
@pytest.mark.parametrize(
    "changed",
    [
        {"temperature": 0},
        {"temperature": 0, "repeat_penalty": 1.5},
        {"temperature": 1.0},
        {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
        {"temperature": 1.0, "top_k": 300},
        {"temperature": 1.0, "typical_p": 0.9, "top_n_sigma": 2.0},
        {"temperature": 1.0, "samplers": ("min_p", "temperature")},
        {"mirostat": 2},
    ],
    ids=str,
)
def test_a_mask_draws_as_if_the_other_tokens_were_banned(changed: dict[str, Any], share: float) -> None:
    n_vocab, rng = 20_000, np.random.default_rng(3)
    draw = SimpleNamespace(max_k=128, top_k=top_k_in_numpy)
    for seed in range(6):
        logits = (4 * rng.standard_normal(n_vocab)).astype(np.float32)
        logits[rng.integers(0, n_vocab, 4000)] = 1.25  # equals
        flags = rng.random(n_vocab) < share
        flags[int(rng.integers(n_vocab))] = True
        params = SamplingParams(**{"seed": seed, **changed})
        bias = dict.fromkeys(np.flatnonzero(~flags).tolist(), False)
        banned = SamplingParams(**{"seed": seed, **changed, "logit_bias": bias})
        history = rng.integers(0, n_vocab, 30).tolist()
        expected = Sampler(banned, n_vocab, history=history).sample(logits).token
        for few in (False, True):
            for given in (None, draw):
                sampler = Sampler(params, n_vocab, history=history, draw=given, mask=Allows(flags, few))
                sampler.short = None
                assert sampler.sample(logits).token == expected and flags[expected]


def top_k_in_numpy(logits: np.ndarray, k: int, with_sum: bool = False) -> TopLogits:
    positions = np.lexsort((np.arange(len(logits)), -logits))[:k]
    return TopLogits(positions, logits[positions], None)


def test_a_number_out_of_range_is_told_the_ends_of_it_to_the_last_digit() -> None:
    with pytest.raises(ParameterError, match="seed: got -5, expected integer from -1 to 18446744073709551615"):
        SamplingParams(seed=-5)
    with pytest.raises(ParameterError, match=r"frequency_penalty: .*, expected number from -1e\+06 to 1e\+06"):
        SamplingParams(frequency_penalty=1e9)
