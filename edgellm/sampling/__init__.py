"""Turn the logits of one step into one token: llama.cpp's samplers, in its order, with its names and defaults.

One sampler is one class of ``chain.py``, ``repetition.py`` or ``choice.py`` and one row of a table. The chain works
on the whole vocabulary only until the first sampler that shortens it; the rest is on a few dozen candidates.
"""

from edgellm.sampling.params import SAMPLER_NAMES, SamplingParams, parse_samplers
from edgellm.sampling.sampler import Sampled, Sampler

__all__ = ["SAMPLER_NAMES", "Sampled", "Sampler", "SamplingParams", "parse_samplers"]
