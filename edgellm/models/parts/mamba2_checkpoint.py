"""How checkpoints keep a Mamba-2 layer: names, numbers, shapes, and its sizes as GGUF keys."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from edgellm.models.parts.checkpoint_config import CheckpointConfig
from edgellm.models.parts.checkpoint_form import TypedMetadata

MAMBA2_NUMBERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {"ssm_a": lambda a_log: -np.exp(a_log)}
"""What becomes of the numbers of a tensor: A is kept as its logarithm."""
CONTEXT_LENGTH = 1 << 20
"""What files say of models whose positions have no end."""
SIZES_OF_MAMBA = {
    "heads": "mamba_n_heads",
    "head_dim": "mamba_d_head",
    "groups": "mamba_n_groups",
    "state": "mamba_d_state",
    "taps": "mamba_d_conv",
}
"""Where settings that have attention as well keep the sizes of ``mamba2_metadata``."""


def mamba2_layer(module: str) -> dict[str, str]:
    """Modules of a layer -> in GGUF; ``module`` is what the checkpoint calls the mixer."""
    names = {"in_proj": "ssm_in", "conv1d": "ssm_conv1d", "norm": "ssm_norm", "out_proj": "ssm_out"}
    return {f"{module}.{name}": place for name, place in names.items()}


def mamba2_vectors(module: str) -> dict[str, tuple[str]]:
    """Parameters of a layer that have no module's name, likewise."""
    names = {"A_log": "ssm_a", "D": "ssm_d", "dt_bias": "ssm_dt.bias"}
    return {f"{module}.{name}": (place,) for name, place in names.items()}


def mamba2_shapes(config: CheckpointConfig, sizes: Mapping[str, str]) -> dict[str, tuple[int, int]]:
    """Of the vectors that are columns, or groups, in GGUF. ``sizes`` as in ``mamba2_metadata``."""
    n_heads, n_groups = config.integer(sizes["heads"]), config.integer(sizes["groups"])
    n_inner = n_heads * config.integer(sizes["head_dim"])
    return {"ssm_a": (n_heads, 1), "ssm_d": (n_heads, 1), "ssm_norm.weight": (n_groups, n_inner // n_groups)}


def mamba2_biases(config: CheckpointConfig, conv: str, *projections: str) -> frozenset[str]:
    """The modules with a bias: the convolution by the flag ``conv``, what goes in and out by ``projections``."""
    found = {"ssm_conv1d"} if config.flag(conv, True) else set()
    for module, key in zip(("ssm_in", "ssm_out"), projections, strict=True):
        found |= {module} if config.flag(key, False) else set()
    return frozenset(found)


def mamba2_metadata(config: CheckpointConfig, architecture: str, sizes: Mapping[str, str]) -> TypedMetadata:
    """The keys of the layer, from config.json.

    sizes   heads, head_dim, groups, state, taps -> the key that config.json has it under
    """
    n_heads, head_dim, n_groups = (config.integer(sizes[name]) for name in ("heads", "head_dim", "groups"))
    if n_heads % n_groups:
        raise config.wrong(sizes["heads"], n_heads, f"a multiple of {sizes['groups']} ({n_groups})")
    refuse_limits(config)
    found = {
        "conv_kernel": config.integer(sizes["taps"]),
        "inner_size": n_heads * head_dim,
        "state_size": config.integer(sizes["state"]),
        "time_step_rank": n_heads,
        "group_count": n_groups,
    }
    return {f"{architecture}.ssm.{key}": (value, "UINT32") for key, value in found.items()}


def refuse_limits(config: CheckpointConfig) -> None:
    """UnsupportedError where time steps are cut off, which files cannot say."""
    limits = config.get("time_step_limit")
    if limits is None:
        return
    if not isinstance(limits, list) or len(limits) != 2:
        raise config.wrong("time_step_limit", limits, "two numbers")
    low, high = (_limit(one) for one in limits)
    if low != 0 or high != math.inf:
        raise config.refuse("time_step_limit", "models whose time steps are as they come ([0, Infinity])")


def _limit(value: Any) -> float:
    """A number, or one that JSON has no word for as transformers writes it."""
    if isinstance(value, dict):
        value = math.inf if value.get("__float__") == "Infinity" else None
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def kinds_by_name(
    config: CheckpointConfig, names: Mapping[str, Sequence[str]], default: Sequence[str], key: str = "layer_types"
) -> list[str]:
    """The kind of each layer, as ``layer_types`` says.

    names    kind -> what checkpoints call it
    default  the kinds where they do not say it
    """
    found = config.get(key)
    kind_of = {name: kind for kind, known in names.items() for name in known}
    kinds = [kind_of.get(one) for one in (found if isinstance(found, list) else [])] if found is not None else default
    if found is not None and (not isinstance(found, list) or len(kinds) != config.n_layer or None in kinds):
        expected = f"one of {', '.join(known[0] for known in names.values())} for each of {config.n_layer} layers"
        raise config.refuse(key, expected)
    return [str(kind) for kind in kinds]
