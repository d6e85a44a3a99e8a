"""Range checks of hyperparameters that hold for every architecture. Exact shapes are for the architecture to check."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from edgellm.formats.findings import Finding, Report, short
from edgellm.formats.gguf_header import Header

# key after "<architecture>.": lowest and highest whole number. An array has a number for each layer.
WHOLE_NUMBERS: dict[str, tuple[int, int]] = {
    "block_count": (1, 512),
    "context_length": (1, 1 << 31),
    "embedding_length": (1, 1 << 20),
    "feed_forward_length": (0, 1 << 24),
    "expert_feed_forward_length": (0, 1 << 24),
    "expert_count": (0, 1 << 16),
    "expert_used_count": (0, 1 << 16),
    "attention.head_count": (0, 1 << 16),
    "attention.head_count_kv": (0, 1 << 16),
    "attention.key_length": (1, 1 << 16),
    "attention.value_length": (1, 1 << 16),
    "attention.sliding_window": (0, 1 << 31),
    "rope.dimension_count": (0, 1 << 16),
    "vocab_size": (1, 1 << 24),
}
# key after "<architecture>.": lowest and highest number
NUMBERS: dict[str, tuple[float, float]] = {
    "attention.layer_norm_epsilon": (0.0, 1.0),
    "attention.layer_norm_rms_epsilon": (0.0, 1.0),
    "rope.freq_base": (1.0, 1e15),
    "rope.scaling.factor": (0.0, 1e6),
}


def check_hparams(header: Header, report: Report) -> None:
    """Whole numbers are whole numbers, all are finite and in a range that some model could have."""
    metadata = header.metadata

    def found(code: str, message: str, key: str) -> None:
        report(Finding(code, message, file=header.file, offset=header.positions.get(key), name=key))

    architecture = metadata.get("general.architecture")
    if architecture is None:
        return
    if not isinstance(architecture, str):
        found("GGUF_KEY_TYPE", f"is {header.types['general.architecture']}, expected STRING", "general.architecture")
        return
    for suffix, (lowest, highest) in WHOLE_NUMBERS.items():
        key = f"{architecture}.{suffix}"
        if key in metadata:
            values = _whole_numbers(metadata[key])
            if values is None:
                found("GGUF_KEY_TYPE", f"is {header.types[key]}, expected whole numbers", key)
            elif not all(lowest <= value <= highest for value in values):
                message = f"is {short(metadata[key])}, expected {lowest:,} to {highest:,}"
                found("MODEL_HPARAMS", message, key)
            elif suffix == "rope.dimension_count" and any(value % 2 for value in values):
                found("MODEL_HPARAMS", f"is {short(metadata[key])}, expected an even number", key)
    for suffix, (least, most) in NUMBERS.items():
        key = f"{architecture}.{suffix}"
        if key in metadata:
            value = metadata[key]
            if not isinstance(value, float):
                found("GGUF_KEY_TYPE", f"is {header.types[key]}, expected FLOAT32", key)
            elif not (math.isfinite(value) and least <= value <= most):
                found("MODEL_HPARAMS", f"is {value}, expected {least:g} to {most:g}", key)


def _whole_numbers(value: Any) -> list[int] | None:
    """The numbers of a scalar or of an array, None when they are not whole."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "iu":
        return value.tolist()
    return [value] if type(value) is int else None
