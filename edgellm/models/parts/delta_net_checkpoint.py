"""How checkpoints keep a gated delta-net: names, the order of its value heads, and its numbers as GGUF keys."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from edgellm.models.parts.checkpoint_config import CheckpointConfig
from edgellm.models.parts.checkpoint_form import (
    DECODER_LAYER,
    QK_NORMS,
    TypedMetadata,
    decoder_metadata,
    refuse_activation,
)
from edgellm.models.parts.checkpoint_rope import Rotation, rope_sections, rotated_dims, rotation

LINEAR, FULL = "linear_attention", "full_attention"
DELTA_LAYER = (
    DECODER_LAYER
    | QK_NORMS
    | {
        "post_attention_layernorm": "post_attention_norm",
        "linear_attn.in_proj_qkv": "attn_qkv",
        "linear_attn.in_proj_z": "attn_gate",
        "linear_attn.in_proj_a": "ssm_alpha",
        "linear_attn.in_proj_b": "ssm_beta",
        "linear_attn.conv1d": "ssm_conv1d",
        "linear_attn.norm": "ssm_norm",
        "linear_attn.out_proj": "ssm_out",
    }
)
DELTA_VECTORS = {"linear_attn.A_log": ("ssm_a",), "linear_attn.dt_bias": ("ssm_dt.bias",)}
DELTA_NUMBERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {"ssm_a": lambda a_log: -np.exp(a_log)}
"""What becomes of the numbers of a tensor: A is kept as its logarithm."""


def delta_metadata(config: CheckpointConfig, architecture: str, *, n_ff: int | None = None) -> TypedMetadata:
    """The keys that architectures with a delta-net share, from config.json."""
    refuse_activation(config, "silu", "swish")
    n_k, n_v = _heads(config)
    head_dim = config.integer("linear_value_head_dim")
    if config.integer("linear_key_head_dim") != head_dim:
        raise config.refuse("linear_key_head_dim", f"keys as wide as values (linear_value_head_dim, {head_dim})")
    found: TypedMetadata = {
        "ssm.conv_kernel": (config.integer("linear_conv_kernel_dim"), "UINT32"),
        "ssm.state_size": (head_dim, "UINT32"),
        "ssm.group_count": (n_k, "UINT32"),
        "ssm.time_step_rank": (n_v, "UINT32"),
        "ssm.inner_size": (n_v * head_dim, "UINT32"),
        "rope.dimension_count": (rotated_dims(config, 0.25), "UINT32"),
        "rope.dimension_sections": (rope_sections(config, (11, 11, 10)), "ARRAY[INT32]"),
    }
    recurrent = _recurrent_layers(config)
    interval = recurrent.index(False) + 1 if False in recurrent else config.n_layer + 1
    if recurrent == [(i + 1) % interval != 0 for i in range(config.n_layer)]:
        found["full_attention_interval"] = (interval, "UINT32")
    else:
        found["attention.recurrent_layers"] = (np.array(recurrent), "ARRAY[BOOL]")
    shared = decoder_metadata(config, architecture, _rotation, n_ff=n_ff)
    return shared | {f"{architecture}.{key}": value for key, value in found.items()}


def value_rows(config: CheckpointConfig) -> dict[str, np.ndarray]:
    """The rows that GGUF has in another order: value heads stand by key head there, and in turn here."""
    (n_k, n_v), dim = _heads(config), config.integer("linear_value_head_dim")
    heads = np.arange(n_v).reshape(n_k, n_v // n_k).T.reshape(-1)
    rows = (heads[:, None] * dim + np.arange(dim)).reshape(-1)
    qk = 2 * n_k * dim
    behind = np.concatenate([np.arange(qk), qk + rows])
    return {
        "attn_qkv.weight": behind,
        "ssm_conv1d.weight": behind,
        "attn_gate.weight": rows,
        **dict.fromkeys(("ssm_alpha.weight", "ssm_beta.weight", "ssm_a", "ssm_dt.bias"), heads),
    }


def value_columns(config: CheckpointConfig) -> dict[str, np.ndarray]:
    """The columns, likewise."""
    return {"ssm_out.weight": value_rows(config)["attn_gate.weight"]}


def _heads(config: CheckpointConfig) -> tuple[int, int]:
    n_k, n_v = config.integer("linear_num_key_heads"), config.integer("linear_num_value_heads")
    if n_v % n_k:
        raise config.wrong("linear_num_value_heads", n_v, f"a multiple of linear_num_key_heads ({n_k})")
    return n_k, n_v


def _recurrent_layers(config: CheckpointConfig) -> list[bool]:
    kinds = config.get("layer_types")
    if kinds is None:
        interval = config.integer("full_attention_interval", 4)
        return [(i + 1) % interval != 0 for i in range(config.n_layer)]
    if not isinstance(kinds, list) or len(kinds) != config.n_layer or any(k not in (LINEAR, FULL) for k in kinds):
        raise config.refuse("layer_types", f"{LINEAR} or {FULL} for each of {config.n_layer} layers")
    return [kind == LINEAR for kind in kinds]


_OWN = ("partial_rotary_factor", "mrope_section", "mrope_interleaved")
"""Numbers of a rotation that only these architectures have."""


def _rotation(config: CheckpointConfig) -> Rotation:
    return rotation(config, ("default", "linear", "yarn"), _OWN)
