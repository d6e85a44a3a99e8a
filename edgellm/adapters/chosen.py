"""The adapters that a model was loaded with, and what a request says of them."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from edgellm import arguments
from edgellm.adapters.control_vector import ControlVector
from edgellm.adapters.limits import MAX_SCALE
from edgellm.adapters.lora import LoraAdapter
from edgellm.adapters.rewrite import Adapter
from edgellm.adapters.scales import NO_ADAPTERS, AdapterScales
from edgellm.formats.errors import ParameterError
from edgellm.formats.findings import short

Choice = str | Mapping[str, float] | None
"""What a request wants of one kind: names with scales, one name, nothing ({}), or None for what the model has."""


@dataclass
class LoadedAdapters:
    """Low-rank adapters, then control vectors, in the order of ``Batch.adapters``.

    named    the scale of each where a request names it and says no scale
    scales   of a request that says nothing; ``set`` gives others, whole, so that nobody sees a half of them
    """

    adapters: Sequence[Adapter] = ()
    named: Sequence[float] = ()
    scales: Sequence[float] = ()
    lock: threading.Lock = field(default_factory=threading.Lock)  # of who sets them

    @property
    def loras(self) -> list[LoraAdapter]:
        """The low-rank ones; they come first."""
        return [one for one in self.adapters if isinstance(one, LoraAdapter)]

    @property
    def vectors(self) -> list[ControlVector]:
        """The control vectors."""
        return [one for one in self.adapters if isinstance(one, ControlVector)]

    def chosen(self, lora: Choice = None, control_vectors: Choice = None) -> AdapterScales:
        """What these choices come to. ParameterError for a name that was not loaded, or no scale."""
        n, scales = len(self.loras), self.scales
        named = [(one.name, scale) for one, scale in zip(self.adapters, self.named, strict=True)]
        values = [
            *_values("lora", lora, dict(named[:n]), scales[:n]),
            *_values("control_vectors", control_vectors, dict(named[n:]), scales[n:]),
        ]
        return self.of(values)

    def set(self, lora: Choice = None, control_vectors: Choice = None) -> None:
        """What a request has from now on that says nothing."""
        with self.lock:
            self.scales = self.chosen(lora, control_vectors).values or [0.0] * len(self.adapters)

    def of(self, values: Sequence[float]) -> AdapterScales:
        """These scales, each as float32 has it."""
        rounded = tuple(float(np.float32(value)) for value in values)
        if not any(rounded):
            return NO_ADAPTERS
        named = [f"{one.digest}*{value!r}" for one, value in zip(self.adapters, rounded, strict=True) if value]
        return AdapterScales(rounded, " ".join(named))

    def close(self) -> None:
        """Let go of the files."""
        for adapter in self.adapters:
            adapter.close()


def _values(what: str, choice: Choice, named: Mapping[str, float], default: Sequence[float]) -> Sequence[float]:
    if choice is None:
        return default
    wanted = {choice: named.get(choice, 1.0)} if isinstance(choice, str) else arguments.mapping(what, choice)
    for name in wanted:
        if name not in named:
            there = f"There is: {', '.join(named)}." if named else "The model was loaded without one."
            raise ParameterError(f"{what}: no {short(name)} was loaded with the model. {there}")
    return [checked_scale(f"{what}[{name!r}]", wanted.get(name, 0.0)) for name in named]


def checked_scale(name: str, value: float) -> float:
    """A scale in range; ParameterError otherwise."""
    return arguments.number(name, value, -MAX_SCALE, MAX_SCALE)
