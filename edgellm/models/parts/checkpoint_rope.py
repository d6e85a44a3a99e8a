"""The rotation that config.json asks for, from any of its spellings, as GGUF keys and frequency divisors.

What transformers reads of it, in its order: ``rope_scaling`` before ``rope_parameters``, the numbers of the object
before those beside it. A kind of scaling that GGUF cannot say, and a number that nobody knows, is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgellm.formats.findings import short
from edgellm.formats.gguf_header import TypedMetadata
from edgellm.models.parts.checkpoint_config import CheckpointConfig

KINDS = ("default", "linear", "yarn", "llama3")
# numbers of a rotation; transformers reads those of its kind and leaves the others alone
NUMBERS = frozenset(
    (
        "rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings", "attention_factor",
        "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate", "low_freq_factor", "high_freq_factor",
        "short_factor", "long_factor",
    )
)  # fmt: skip


@dataclass(frozen=True)
class Rotation:
    """The rotation of some layers. ``key`` is where config.json has it; ``numbers`` are those found there."""

    config: CheckpointConfig
    key: str
    kind: str
    base: float
    numbers: dict[str, Any]

    def real(self, name: str, default: float | None = None) -> float:
        """One of its numbers."""
        return self.config.real_of(f"{self.key}.{name}", self.numbers.get(name), default)

    def positive(self, name: str, default: float | None = None) -> float:
        """One of its numbers, above 0."""
        value = self.real(name, default)
        if value <= 0:
            raise self.config.wrong(f"{self.key}.{name}", value, "a number above 0")
        return value

    @property
    def original_length(self) -> int:
        """Positions that the model was first trained with."""
        value = self.numbers.get("original_max_position_embeddings")
        if value is None:
            return self.config.integer("max_position_embeddings")
        return self.config.integer_of(f"{self.key}.original_max_position_embeddings", value)


def rotation(config: CheckpointConfig, kinds: Sequence[str] = KINDS, own: Sequence[str] = ()) -> Rotation:
    """The rotation of all layers, of one of these kinds; ``own`` are numbers that only the architecture has."""
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    found = dict(config.object_of(key, config.get(key)))
    if config.get("original_max_position_embeddings") is not None:
        found["original_max_position_embeddings"] = config.get("original_max_position_embeddings")
    return _rotation(config, key, found, config.get("rope_theta"), 1e4, kinds, own)


def rotation_of_a_part(config: CheckpointConfig) -> Rotation:
    """That of architectures whose settings may say which part of a head is rotated (``rotated_dims``)."""
    return rotation(config, ("default", "linear", "yarn"), ("partial_rotary_factor",))


def rotated_dims(config: CheckpointConfig, default: float = 1.0) -> int:
    """How many dimensions of a head are rotated."""
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    own = config.object_of(key, config.get(key)).get("partial_rotary_factor")
    factor = config.real_of(f"{key}.partial_rotary_factor", own, config.real("partial_rotary_factor", default))
    n = int(config.head_dim * factor)
    if not 2 <= n <= config.head_dim or n % 2:
        raise config.wrong(f"{key}.partial_rotary_factor", factor, "one that rotates an even part of a head")
    return n


def rotated_part(rope: Rotation, default: float) -> int:
    """How many dimensions of a head one of the rotations turns."""
    factor = rope.real("partial_rotary_factor", default)
    n = int(rope.config.head_dim * factor)
    if not 2 <= n <= rope.config.head_dim or n % 2:
        raise rope.config.wrong(f"{rope.key}.partial_rotary_factor", factor, "one that rotates an even part of a head")
    return n


def rope_sections(config: CheckpointConfig, default: Sequence[int]) -> list[int]:
    """Which pairs turn by which of three positions; those of a text are equal, so it only has to be there."""
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    sections = config.object_of(key, config.get(key)).get("mrope_section") or list(default)
    if not isinstance(sections, list) or len(sections) > 4 or any(type(n) is not int for n in sections):
        raise config.wrong(f"{key}.mrope_section", sections, "up to four whole numbers")
    return [*sections, *[0] * (4 - len(sections))]


def rotations_by_layer(
    config: CheckpointConfig,
    kinds: Sequence[str] = KINDS,
    bases: tuple[float, float] = (1e6, 1e4),
    own: Sequence[str] = (),
) -> tuple[Rotation, Rotation]:
    """The rotations of layers that see everything, which are of these kinds, and of those that slide.

    bases   of both, where the settings have none
    own     numbers that only the architecture has
    """
    both = config.object_of("rope_parameters", config.get("rope_parameters"))
    for name in both.keys() - {"full_attention", "sliding_attention"}:
        raise config.refuse(f"rope_parameters.{name}", "a rotation for each kind of layers", both[name])
    scaling = config.object_of("rope_scaling", config.get("rope_scaling"))
    if scaling.get("type") is not None and scaling.get("rope_type") is None:  # transformers leaves it unscaled
        raise config.refuse("rope_scaling.type", "this architecture's rotations by rope_type", scaling["type"])
    key = "rope_scaling" if scaling else "rope_parameters.full_attention"
    wide = config.object_of("rope_parameters.full_attention", both.get("full_attention")) | scaling
    key_near = "rope_parameters.sliding_attention"
    near = config.object_of(key_near, both.get("sliding_attention"))
    return (
        _rotation(config, key, wide, config.get("rope_theta"), bases[0], kinds, own),
        _rotation(config, key_near, near, config.get("rope_local_base_freq"), bases[1], own=own),
    )


def _rotation(
    config: CheckpointConfig, key: str, found: dict[str, Any], base: Any, default: float, kinds: Sequence[str] = KINDS,
    own: Sequence[str] = (),
) -> Rotation:  # fmt: skip
    kind = found.get("rope_type") or found.get("type") or "default"
    for name, value in found.items():
        known = name in NUMBERS or name in own
        known = known or (name == "partial_rotary_factor" and (value == 1 or kind == "proportional"))
        if value is not None and not known:
            raise config.refuse(f"{key}.{name}", "rotations without it", value)
    if kind not in kinds:
        raise config.refuse(f"{key}.rope_type", f"rotations of the kinds {', '.join(kinds)}", short(kind))
    given = found.get("rope_theta")
    theta = config.real_of("rope_theta", base if given is None else given, default)
    return Rotation(config, key, kind, theta, found)


def rope_metadata(rope: Rotation) -> TypedMetadata:
    """The keys, without the architecture; llama3 has none, see ``frequency_factors``."""
    found: TypedMetadata = {}
    if rope.kind == "linear":
        found |= _scaling("linear", rope.positive("factor"))
    if rope.kind == "yarn":
        factor = rope.positive("factor", rope.config.integer("max_position_embeddings") / rope.original_length)
        found |= _scaling("yarn", factor)
        found["rope.scaling.original_context_length"] = (rope.original_length, "UINT32")
        found |= _yarn_metadata(rope, factor)
    found["rope.freq_base"] = (rope.base, "FLOAT32")
    return found


def _scaling(kind: str, factor: float) -> TypedMetadata:
    return {"rope.scaling.type": (kind, "STRING"), "rope.scaling.factor": (factor, "FLOAT32")}


def _yarn_metadata(rope: Rotation, factor: float) -> TypedMetadata:
    """transformers gives the whole magnitude; a GGUF reader multiplies its own, 1 + 0.1 ln(factor), by attn_factor."""
    found: TypedMetadata = {}
    fast, slow = (rope.real(name, default) or default for name, default in (("beta_fast", 32.0), ("beta_slow", 1.0)))
    if not 0 < slow <= fast:
        raise rope.config.wrong(f"{rope.key}.beta_slow", slow, f"a number above 0 and up to beta_fast ({fast:g})")
    if (fast, slow) != (32.0, 1.0):
        found["rope.scaling.yarn_beta_fast"] = (fast, "FLOAT32")
        found["rope.scaling.yarn_beta_slow"] = (slow, "FLOAT32")
    if rope.numbers.get("truncate") not in (None, True):
        raise rope.config.refuse(f"{rope.key}.truncate", "yarn with whole dimensions", rope.numbers["truncate"])

    def magnitude(scale: float) -> float:
        return 1 + 0.1 * scale * math.log(max(1.0, factor))

    whole = magnitude(1)
    scale, scale_all = rope.real("mscale", 0.0), rope.real("mscale_all_dim", 0.0)
    if rope.numbers.get("attention_factor") is not None:
        whole = rope.real("attention_factor")
    elif scale and scale_all:
        whole = magnitude(scale) / magnitude(scale_all)
    if whole != magnitude(1):
        found["rope.scaling.attn_factor"] = (whole / magnitude(1), "FLOAT32")
    return found


def frequency_factors(rope: Rotation) -> dict[str, np.ndarray]:
    """``rope_freqs.weight`` of Llama 3.1's scaling: long waves are slowed by ``factor``, short ones left alone."""
    if rope.kind != "llama3":
        return {}
    factor, low, high = (rope.positive(name) for name in ("factor", "low_freq_factor", "high_freq_factor"))
    if not (low < high and rope.base > 1):
        raise rope.config.wrong(f"{rope.key}.low_freq_factor", low, f"a number below high_freq_factor ({high:g})")
    dim = rope.config.head_dim
    wavelengths = 2 * math.pi * rope.base ** (np.arange(0, dim, 2) / dim)
    smooth = np.clip((rope.original_length / wavelengths - low) / (high - low), 0, 1)
    return {"rope_freqs.weight": (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)}
