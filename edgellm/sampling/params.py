"""SamplingParams: what a user may ask of the sampler, checked once, when it is made."""

from __future__ import annotations

import difflib
import math
import sys
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from edgellm.arguments import shown
from edgellm.formats.errors import FormatError, ParameterError
from edgellm.formats.findings import override_error

Processor = Callable[[Sequence[int], np.ndarray], np.ndarray]

# name -> the letter of llama.cpp's --sampler-seq, in the default order; adaptive_p is not part of the default
SAMPLER_NAMES = {
    "penalties": "e",
    "dry": "d",
    "top_n_sigma": "s",
    "top_k": "k",
    "typ_p": "y",
    "top_p": "p",
    "min_p": "m",
    "xtc": "x",
    "temperature": "t",
    "adaptive_p": "a",
}
DEFAULT_SAMPLERS = tuple(name for name in SAMPLER_NAMES if name != "adaptive_p")
ALIASES = {"typical_p": "typ_p", "typical": "typ_p", "temp": "temperature", "nucleus": "top_p"}
RANDOM_SEEDS = (-1, 0xFFFFFFFF)  # both mean "draw one", as in llama.cpp

INT, FLOAT, BOOL = "integer", "number", "true or false"
MAX_BIAS = sys.float_info.max
LIMITS: dict[str, tuple[str, float, float]] = {  # field -> (kind, least, greatest)
    "temperature": (FLOAT, 0, 100),
    "top_k": (INT, -1, 2**31 - 1),
    "top_p": (FLOAT, 0, 1),
    "min_p": (FLOAT, 0, 1),
    "typical_p": (FLOAT, 0, 1),
    "top_n_sigma": (FLOAT, -1, 1e6),
    "xtc_probability": (FLOAT, 0, 1),
    "xtc_threshold": (FLOAT, 0, 1),
    "penalty_last_n": (INT, -1, 2**31 - 1),
    "repeat_penalty": (FLOAT, 1e-6, 1e6),
    "presence_penalty": (FLOAT, -1e6, 1e6),
    "frequency_penalty": (FLOAT, -1e6, 1e6),
    "dry_multiplier": (FLOAT, 0, 1e6),
    "dry_base": (FLOAT, 0, 1e6),
    "dry_allowed_length": (INT, 0, 2**31 - 1),
    "dry_penalty_last_n": (INT, -1, 2**31 - 1),
    "mirostat": (INT, 0, 2),
    "mirostat_tau": (FLOAT, 0, 1e6),
    "mirostat_eta": (FLOAT, 0, 1e6),
    "dynatemp_range": (FLOAT, 0, 100),
    "dynatemp_exponent": (FLOAT, 0, 1e6),
    "adaptive_target": (FLOAT, -1, 1),
    "adaptive_decay": (FLOAT, 0, 0.99),
    "min_keep": (INT, 0, 2**31 - 1),
    "seed": (INT, -1, 2**64 - 1),
    "n_probs": (INT, 0, 2**31 - 1),
    "logprobs": (BOOL, 0, 1),
    "post_sampling_probs": (BOOL, 0, 1),
    "sampler_trace": (BOOL, 0, 1),
    "ignore_eos": (BOOL, 0, 1),
    "diffusion_steps": (INT, 0, 4096),
    "diffusion_length": (INT, 1, 1024),
    "diffusion_block_length": (INT, -1, 1024),
    "diffusion_algorithm": (INT, -1, 4),
    "diffusion_alg_temp": (FLOAT, 0, 1e6),
    "diffusion_cfg_scale": (FLOAT, 0, 1e6),
    "diffusion_eps": (FLOAT, 0, 1),
}

# what a model file may recommend -> our field
METADATA_KEYS = {
    "general.sampling.sequence": "samplers",
    "general.sampling.top_k": "top_k",
    "general.sampling.top_p": "top_p",
    "general.sampling.min_p": "min_p",
    "general.sampling.xtc_probability": "xtc_probability",
    "general.sampling.xtc_threshold": "xtc_threshold",
    "general.sampling.temp": "temperature",
    "general.sampling.penalty_last_n": "penalty_last_n",
    "general.sampling.penalty_repeat": "repeat_penalty",
    "general.sampling.mirostat": "mirostat",
    "general.sampling.mirostat_tau": "mirostat_tau",
    "general.sampling.mirostat_eta": "mirostat_eta",
}


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens. Names, defaults and meaning are llama.cpp's; ParameterError names the field that is wrong.

    ``temperature`` 0 is greedy. ``top_k`` 0, ``top_p`` 1, ``min_p`` 0, ``typical_p`` 1, ``top_n_sigma`` -1 are off.
    ``penalty_last_n`` and ``dry_penalty_last_n`` count tokens, -1 all of them. ``seed`` -1 draws one.
    ``logit_bias`` maps a token id (or a text, given a tokenizer) to a number to add, or to False to ban it.
    ``processors`` are called with (token ids, a copy of the logits) and give logits back.
    ``n_probs`` asks for that many alternatives, ``logprobs`` for the chosen token's alone; both are of the model's own
    distribution unless ``post_sampling_probs``. ``sampler_trace`` tells of each alternative how likely samplers left
    it, or which of them cut it. ``adaptive_target`` >= 0 makes adaptive_p choose the token.

    ``diffusion_`` fields are for models that write by denoising: ``length`` tokens at a time in so many ``steps``
    (0: one for each), block by block (-1: as its makers have it, 0: all at once); the ``algorithm`` that chooses places
    (``sampling.denoising.ALGORITHMS``, -1: the makers'), and how much chance has a part in it (``alg_temp``); how far
    from what it would write without the prompt (``cfg_scale``); where time ends (``eps``).
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    typical_p: float = 1.0
    top_n_sigma: float = -1.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    penalty_last_n: int = 64
    repeat_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_penalty_last_n: int = 64
    dry_sequence_breakers: tuple[str, ...] = ("\n", ":", '"', "*")
    mirostat: int = 0
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1
    dynatemp_range: float = 0.0
    dynatemp_exponent: float = 1.0
    adaptive_target: float = -1.0
    adaptive_decay: float = 0.9
    min_keep: int = 0
    seed: int | None = -1
    logit_bias: Mapping[int | str, float | bool] = field(default_factory=dict)
    ignore_eos: bool = False
    samplers: tuple[str, ...] = DEFAULT_SAMPLERS
    processors: tuple[Processor, ...] = ()
    n_probs: int = 0
    logprobs: bool = False
    post_sampling_probs: bool = False
    sampler_trace: bool = False
    diffusion_steps: int = 0
    diffusion_length: int = 128
    diffusion_block_length: int = -1
    diffusion_algorithm: int = -1
    diffusion_alg_temp: float = 0.0
    diffusion_cfg_scale: float = 0.0
    diffusion_eps: float = 1e-3

    def __post_init__(self) -> None:
        for name, (kind, least, greatest) in LIMITS.items():
            value = getattr(self, name)
            if not (name == "seed" and value is None):
                object.__setattr__(self, name, checked(name, value, kind, least, greatest))
        object.__setattr__(self, "samplers", parse_samplers(self.samplers))
        object.__setattr__(self, "dry_sequence_breakers", checked_breakers(self.dry_sequence_breakers))
        object.__setattr__(self, "logit_bias", checked_bias(self.logit_bias))
        if not is_list(self.processors) or not all(callable(processor) for processor in self.processors):
            raise ParameterError("processors: expected a list of functions of (token ids, logits) that return logits.")
        object.__setattr__(self, "processors", tuple(self.processors))

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any], overridden: Container[str] = ()) -> SamplingParams:
        """What the model file recommends, else the default.

        A recommendation that is out of range is a FormatError with its key; one that the caller gave, a key of
        ``overridden``, a ParameterError.
        """
        recommended = {}
        for key, name in METADATA_KEYS.items():
            if key in metadata:
                try:
                    recommended[name] = getattr(cls(**{name: metadata[key]}), name)
                except ParameterError as error:
                    if key in overridden:
                        raise override_error(key, str(error).rstrip("."), "GGUF_SAMPLING") from None
                    raise FormatError(f"{key} in the model file: {error}", code="GGUF_SAMPLING") from None
        return cls(**recommended)

    def with_fields(self, given: Mapping[str, Any]) -> SamplingParams:
        """The same with other values of some fields; ParameterError for one that there is not."""
        known = [field.name for field in fields(self)]
        for name in given:
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                hint = f"Did you mean {near[0]}?" if near else "SamplingParams has the list."
                raise ParameterError(f"{name}: no such parameter. {hint}")
        return replace(self, **given)


def checked(name: str, value: Any, kind: str, least: float, greatest: float) -> Any:
    """``value`` as a plain Python number of its kind; NaN and everything else outside [least, greatest] is refused."""
    plain = value.item() if isinstance(value, np.generic) else value
    if kind == BOOL:
        fits = isinstance(plain, bool)
    elif kind == INT:
        fits = isinstance(plain, int) and not isinstance(plain, bool)
    else:
        fits = isinstance(plain, int | float) and not isinstance(plain, bool)
    if not fits or not (least <= plain <= greatest):
        ends = (f"{end:g}" if kind == FLOAT else f"{end}" for end in (least, greatest))
        span = kind if kind == BOOL else f"{kind} from {' to '.join(ends)}"
        raise ParameterError(f"{name}: got {shown(value)}, expected {span}.")
    return float(plain) if kind == FLOAT else plain


def is_list(value: Any) -> bool:
    """Whether ``value`` is a sequence of things, not a text."""
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def checked_breakers(breakers: Any) -> tuple[str, ...]:
    """The texts at which DRY stops looking back."""
    if not is_list(breakers) or not all(isinstance(text, str) and text for text in breakers):
        raise ParameterError(f"dry_sequence_breakers: got {shown(breakers)}, expected a list of non-empty texts.")
    return tuple(breakers)


def checked_bias(bias: Any) -> dict[int | str, float]:
    """Token id or text -> what to add to its logit; False becomes -inf."""
    if not isinstance(bias, Mapping):
        raise ParameterError(f"logit_bias: got {type(bias).__name__}, expected a mapping of token ids to numbers.")
    checked_values: dict[int | str, float] = {}
    for token, value in bias.items():
        if isinstance(token, bool) or not isinstance(token, int | str | np.integer):
            raise ParameterError(f"logit_bias: {shown(token)} is neither a token id nor a text.")
        if value is False:
            value = -math.inf
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not (value == -math.inf or abs(value) <= MAX_BIAS):
            got, expected = f"logit_bias[{shown(token)}]: got {shown(value)}", "a finite number, -inf or False"
            raise ParameterError(f"{got}, expected {expected}.")
        checked_values[token if isinstance(token, str) else int(token)] = float(value)
    return checked_values


def parse_samplers(order: str | Sequence[str]) -> tuple[str, ...]:
    """Sampler names from a sequence, from ``top_k;top_p;temperature`` or from the letters of ``--sampler-seq``."""
    if isinstance(order, str):
        letters = {letter: name for name, letter in SAMPLER_NAMES.items()}
        plain_name = order in SAMPLER_NAMES or order in ALIASES
        if order and not plain_name and all(letter in letters for letter in order):
            return tuple(letters[letter] for letter in order)
        order = [name for name in order.split(";") if name]
    if not is_list(order):
        raise ParameterError(f"samplers: got {shown(order)}, expected names of samplers.")
    names = []
    for given in order:
        name = str(given).strip().replace("-", "_")
        name = ALIASES.get(name, name)
        if name not in SAMPLER_NAMES:
            raise ParameterError(f"samplers: {shown(given)} is no sampler. Known: {', '.join(SAMPLER_NAMES)}.")
        names.append(name)
    return tuple(names)
