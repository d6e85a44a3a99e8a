"""Turn the logits of one step into one token: llama.cpp's samplers, in its order, with its names and defaults.

One sampler is a row of ``chain.py``, or a class of ``repetition.py`` or ``choice.py``. The chain works
on the whole vocabulary only until the first sampler that shortens it; the rest is on a few dozen candidates.

Importing this brings nothing: the table of options is wanted where NumPy (80 ms) is not.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgellm.sampling.mask import AllowedTokens, TokenMask
    from edgellm.sampling.params import SAMPLER_NAMES, SamplingParams, parse_samplers
    from edgellm.sampling.sampler import Sampled, Sampler

_HOMES = {"SAMPLER_NAMES": "params", "SamplingParams": "params", "parse_samplers": "params"}
_HOMES |= {"Sampled": "sampler", "Sampler": "sampler", "AllowedTokens": "mask", "TokenMask": "mask"}

__all__ = ["SAMPLER_NAMES", "AllowedTokens", "Sampled", "Sampler", "SamplingParams", "TokenMask", "parse_samplers"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'edgellm.sampling' has no attribute {name!r}")
    return getattr(importlib.import_module(f"edgellm.sampling.{_HOMES[name]}"), name)
