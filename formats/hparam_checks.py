"""The range of every hyperparameter, for all architectures. Exact shapes are for the architecture to check."""

from __future__ import annotations

from typing import Any

import numpy as np

from edgellm.formats.findings import Report, short
from edgellm.formats.gguf_header import Header

# key after "<architecture>.": lowest and highest value; a key between whole numbers has whole numbers. An array has a
# number for each layer. The largest models known stay far below.
RANGES: dict[str, tuple[float, float]] = {
    "block_count": (1, 512),
    "context_length": (1, 1 << 24),
    "embedding_length": (1, 1 << 18),
    "feed_forward_length": (0, 1 << 20),
    "expert_feed_forward_length": (0, 1 << 20),
    "expert_shared_feed_forward_length": (0, 1 << 20),
    "expert_count": (0, 1 << 16),
    "expert_used_count": (0, 1 << 16),
    "expert_shared_count": (0, 1 << 16),
    "expert_group_count": (0, 1 << 16),
    "expert_group_used_count": (0, 1 << 16),
    "expert_weights_scale": (0.0, 1e3),
    "moe_latent_size": (0, 1 << 18),
    "attention.head_count": (0, 4096),
    "attention.head_count_kv": (0, 4096),
    "attention.key_length": (2, 4096),
    "attention.value_length": (1, 4096),
    "attention.q_lora_rank": (0, 1 << 16),
    "attention.kv_lora_rank": (0, 1 << 12),
    "attention.key_length_mla": (0, 4096),
    "attention.value_length_mla": (0, 4096),
    "attention.key_length_swa": (2, 4096),
    "attention.value_length_swa": (1, 4096),
    "attention.shared_kv_layers": (0, 512),
    "embedding_length_per_layer_input": (0, 1 << 16),
    "altup.num_inputs": (2, 64),
    "altup.active_idx": (0, 63),
    "attention.layer_norm_epsilon": (0.0, 1.0),
    "attention.layer_norm_rms_epsilon": (1e-12, 0.1),
    "attention.scale": (0.0, 1e3),
    "attention.sliding_window": (0, 1 << 24),
    "attention.sliding_window_pattern": (0, 512),
    "rope.dimension_count": (0, 4096),
    "rope.dimension_count_swa": (0, 4096),
    "rope.freq_base": (1.0001, 1e15),
    "rope.freq_base_swa": (1.0001, 1e15),
    "rope.scale_linear": (0.0, 1e6),
    "attention.clamp_kqv": (0.0, 1e6),
    "rope.scaling.factor": (0.0, 1e6),
    "rope.scaling.attn_factor": (1e-3, 1e3),
    "rope.scaling.original_context_length": (1, 1 << 24),
    "rope.scaling.yarn_attn_factor": (1e-3, 1e3),
    "rope.scaling.yarn_ext_factor": (-1.0, 1.0),
    "rope.scaling.yarn_beta_fast": (1e-3, 1e6),
    "rope.scaling.yarn_beta_slow": (1e-3, 1e6),
    "rope.scaling.yarn_log_multiplier": (0.0, 100.0),
    "rope.dimension_sections": (0, 4096),
    "target_hidden_size": (1, 1 << 18),
    "block_size": (2, 256),
    "attention.temperature_scale": (0.0, 100.0),
    "leading_dense_block_count": (0, 512),
    "expert_gating_func": (0, 4),
    "interleave_moe_layer_step": (1, 512),
    "moe_every_n_layers": (0, 512),
    "n_deepstack_layers": (0, 512),
    "shortconv.l_cache": (2, 64),
    "ssm.conv_kernel": (2, 64),
    "ssm.state_size": (1, 4096),
    "ssm.group_count": (1, 4096),
    "ssm.time_step_rank": (1, 4096),
    "ssm.inner_size": (1, 1 << 20),
    "full_attention_interval": (1, 512),
    "attention.recurrent_layers": (0, 1),
    "nextn_predict_layers": (0, 64),
    "attn_logit_softcapping": (0.0, 1e6),
    "final_logit_softcapping": (0.0, 1e6),
    "embedding_scale": (0.0, 1e6),
    "residual_scale": (0.0, 1e3),
    "logit_scale": (0.0, 1e6),
    "vocab_size": (1, 1 << 24),
    "pooling_type": (0, 4),
    "classifier.pooling_type": (1, 3),
    "dense_2_feat_in": (1, 1 << 20),
    "dense_2_feat_out": (1, 1 << 20),
    "dense_3_feat_in": (1, 1 << 20),
    "dense_3_feat_out": (1, 1 << 20),
}


def check_hparams(header: Header, report: Report) -> None:
    """Whole numbers are whole numbers, all are finite and in a range that some model could have."""
    metadata = header.metadata

    def found(code: str, message: str, key: str) -> None:
        report(header.finding(code, message, key))

    architecture = metadata.get("general.architecture")
    if architecture is None:
        return
    if not isinstance(architecture, str):
        found("GGUF_KEY_TYPE", f"is {header.types['general.architecture']}, expected STRING", "general.architecture")
        return
    for suffix, (lowest, highest) in RANGES.items():
        key, is_whole = f"{architecture}.{suffix}", type(lowest) is int
        if key not in metadata:
            continue
        values = _numbers(metadata[key], is_whole)
        if values is None:
            expected = "whole numbers" if is_whole else "a number"
            found("GGUF_KEY_TYPE", f"is {header.types[key]}, expected {expected}", key)
        elif not all(lowest <= value <= highest for value in values):
            shown = f"{lowest:,} to {highest:,}" if is_whole else f"{lowest:g} to {highest:g}"
            found("MODEL_HPARAMS", f"is {short(metadata[key])}, expected {shown}", key)
        elif suffix == "rope.dimension_count" and any(value % 2 for value in values):
            found("MODEL_HPARAMS", f"is {short(metadata[key])}, expected an even number", key)


def _numbers(value: Any, is_whole: bool) -> list[Any] | None:
    """The numbers of a scalar or of an array, where flags count as 0 and 1; None when they are of another kind."""
    if isinstance(value, np.ndarray) and is_whole and value.dtype.kind in "iub":
        return value.tolist()
    return [value] if type(value) is int or (type(value) is float and not is_whole) else None
