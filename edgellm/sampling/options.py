"""The options of sampling as a person gives them: one table for flags, the chat's ``/set`` and its settings screen.

Names are llama.cpp's. An option that the user leaves out stays out, so that the model's own recommendation
(``general.sampling.*``) and then the library's default decide.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from edgellm.formats.errors import ParameterError


@dataclass(frozen=True)
class SamplingOption:
    """A field of ``SamplingParams`` and the flags that set it."""

    field: str
    flags: tuple[str, ...]
    parse: Callable[[str], Any]
    metavar: str
    help: str

    @property
    def expected(self) -> str:
        """What ``parse`` reads, for who wrote something else."""
        return EXPECTED[self.metavar]


def _integer(text: str) -> int:
    return int(text, 10)


def _real(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(text)
    return value


def _strings(text: str) -> tuple[str, ...]:
    """``\\n;:`` -> a newline and a colon; ``none`` is no text at all."""
    escapes = {"\\n": "\n", "\\t": "\t", "\\r": "\r"}
    return () if text == "none" else tuple(escapes.get(part, part) for part in text.split(";") if part)


def _token_biases(text: str) -> dict[int, float]:
    """``15043+1,13-inf`` -> {15043: 1.0, 13: -inf}, as llama.cpp writes it."""
    biases = {}
    for part in text.split(","):
        found = re.fullmatch(r"(\d+)([+-](?:\d+\.?\d*|\.\d+|inf))", part.strip())
        if found is None:
            raise ValueError(text)
        biases[int(found[1])] = float(found[2])
    return biases


N, X = "N", "X"
EXPECTED = {N: "a whole number", X: "a number", "LIST": "a list", "ID+X": "TOKEN+X or TOKEN-X, such as 15043+1,13-inf"}
SAMPLING_OPTIONS = (
    SamplingOption("temperature", ("--temp", "--temperature"), _real, X, "Temperature; 0 always takes the likeliest."),
    SamplingOption("top_k", ("--top-k",), _integer, N, "Keep the N likeliest tokens; 0 keeps all."),
    SamplingOption("top_p", ("--top-p",), _real, X, "Keep the likeliest tokens that together reach X; 1 is off."),
    SamplingOption("min_p", ("--min-p",), _real, X, "Drop tokens below X times the likeliest; 0 is off."),
    SamplingOption("top_n_sigma", ("--top-nsigma", "--top-n-sigma"), _real, X, "Keep X sigma of logits; -1 is off."),
    SamplingOption("typical_p", ("--typical", "--typical-p"), _real, X, "Locally typical sampling; 1 is off."),
    SamplingOption("xtc_probability", ("--xtc-probability",), _real, X, "Chance of cutting the top choices; 0 is off."),
    SamplingOption("xtc_threshold", ("--xtc-threshold",), _real, X, "Least probability of a choice that is cut."),
    SamplingOption("penalty_last_n", ("--repeat-last-n",), _integer, N, "Tokens the penalties look back; -1 is all."),
    SamplingOption("repeat_penalty", ("--repeat-penalty",), _real, X, "Penalty of tokens seen before; 1 is off."),
    SamplingOption("presence_penalty", ("--presence-penalty",), _real, X, "Penalty of having been seen; 0 is off."),
    SamplingOption("frequency_penalty", ("--frequency-penalty",), _real, X, "Penalty for each time seen; 0 is off."),
    SamplingOption("dry_multiplier", ("--dry-multiplier",), _real, X, "Strength of the DRY penalty; 0 is off."),
    SamplingOption("dry_base", ("--dry-base",), _real, X, "Base of the DRY penalty."),
    SamplingOption("dry_allowed_length", ("--dry-allowed-length",), _integer, N, "Repeats that DRY lets pass."),
    SamplingOption("dry_penalty_last_n", ("--dry-penalty-last-n",), _integer, N, "Tokens DRY looks back; -1 is all."),
    SamplingOption("dry_sequence_breakers", ("--dry-sequence-breakers",), _strings, "LIST", "Texts DRY stops at."),
    SamplingOption("dynatemp_range", ("--dynatemp-range",), _real, X, "Range of the dynamic temperature; 0 is off."),
    SamplingOption("dynatemp_exponent", ("--dynatemp-exp",), _real, X, "Exponent of the dynamic temperature."),
    SamplingOption("mirostat", ("--mirostat",), _integer, N, "Mirostat version 1 or 2; 0 is off."),
    SamplingOption("mirostat_tau", ("--mirostat-ent",), _real, X, "Mirostat's target entropy."),
    SamplingOption("mirostat_eta", ("--mirostat-lr",), _real, X, "Mirostat's learning rate."),
    SamplingOption("min_keep", ("--min-keep",), _integer, N, "Tokens that every sampler leaves at least."),
    SamplingOption("adaptive_target", ("--adaptive-target",), _real, X, "Adaptive-p's target probability; -1 is off."),
    SamplingOption("adaptive_decay", ("--adaptive-decay",), _real, X, "How slowly adaptive-p forgets."),
    SamplingOption("samplers", ("--samplers", "--sampler-seq"), str, "LIST", "Their order: names with ; or letters."),
    SamplingOption("logit_bias", ("-l", "--logit-bias"), _token_biases, "ID+X", "Add X to a logit: 15043+1,13-inf."),
    SamplingOption("seed", ("-s", "--seed"), _integer, N, "Seed of the random numbers; -1 takes a new one."),
)
DENOISING_OPTIONS = (
    SamplingOption("diffusion_steps", ("--diffusion-steps",), _integer, N, "Steps of denoising; 0 is one a token."),
    SamplingOption("diffusion_length", ("--diffusion-length",), _integer, N, "Tokens that are denoised together."),
    SamplingOption("diffusion_block_length", ("--diffusion-block-length",), _integer, N, "Of a block; 0 is all."),
    SamplingOption("diffusion_algorithm", ("--diffusion-algorithm",), _integer, N,
                   "0 origin, 1 entropy, 2 margin, 3 random, 4 confidence; -1 is the model's."),
    SamplingOption("diffusion_alg_temp", ("--diffusion-alg-temp",), _real, X, "How much chance chooses places."),
    SamplingOption("diffusion_cfg_scale", ("--diffusion-cfg-scale",), _real, X, "Guidance by the prompt; 0 is off."),
    SamplingOption("diffusion_eps", ("--diffusion-eps",), _real, X, "Where the time of steps ends, without blocks."),
)  # fmt: skip
"""Of models that write by denoising; the others take no notice of them."""
BY_FIELD = {option.field: option for option in (*SAMPLING_OPTIONS, *DENOISING_OPTIONS)}


def parse_setting(name: str, text: str) -> tuple[str, Any]:
    """The field and value of ``/set name value``; the name may be a field or one of its flags without dashes."""
    plain = name.lower().lstrip("-").replace("_", "-")
    for option in BY_FIELD.values():
        if plain in {option.field.replace("_", "-"), *(flag.lstrip("-") for flag in option.flags)}:
            try:
                return option.field, option.parse(text)
            except (ValueError, OverflowError):
                raise ParameterError(f"{name} is {text!r}, not {option.expected}. {option.help}") from None
    raise ParameterError(f"there is no parameter {name!r}. Known: {', '.join(BY_FIELD)}.")
