"""Hunyuan with experts (A13B): as the dense one, and every feed-forward is one that all tokens share beside experts."""

from __future__ import annotations

from edgellm.formats.model_file import ModelFile
from edgellm.kernels.program import Program
from edgellm.models.hunyuan_dense import HUNYUAN_LAYER, hunyuan_metadata, rotation_with_alpha
from edgellm.models.parts.blocks import build_decoder
from edgellm.models.parts.checkpoint_config import CheckpointConfig
from edgellm.models.parts.checkpoint_form import CheckpointForm, TypedMetadata, factors_of, typed_metadata
from edgellm.models.parts.experts import EXPERT_MATRICES, STACKED_EXPERTS, dense_then_experts, read_experts
from edgellm.models.parts.hparams import hparam_error, integer


def build(gguf: ModelFile) -> Program:
    """See ``build_decoder`` and ``dense_then_experts``."""
    n_ff = integer(gguf, "feed_forward_length", least=1)
    own = integer(gguf, "expert_feed_forward_length", 0) or n_ff
    if own != n_ff:
        raise hparam_error(gguf, "expert_feed_forward_length", own, f"feed_forward_length, which is {n_ff}")
    n_shared = integer(gguf, "expert_shared_feed_forward_length", 0) or n_ff
    ffn = dense_then_experts(read_experts(gguf, n_ff), 0, n_shared)
    return build_decoder(gguf, adjacent=False, qk_norms="turned heads", ffn=ffn)


def checkpoint_metadata(config: CheckpointConfig) -> TypedMetadata:
    """The keys of this architecture, from config.json."""
    n_ff = config.integer("intermediate_size")
    if _of_all_layers(config, "moe_intermediate_size", n_ff) != n_ff:
        raise config.refuse("moe_intermediate_size", f"experts as wide as intermediate_size, which is {n_ff}")
    if _of_all_layers(config, "num_shared_expert", 1) != 1:
        raise config.refuse("num_shared_expert", "one expert for all tokens (1)")
    sizes = {
        "expert_count": _of_all_layers(config, "num_experts"),
        "expert_used_count": _of_all_layers(config, "moe_topk"),
        "expert_feed_forward_length": n_ff,
        "expert_shared_feed_forward_length": n_ff,
        "expert_shared_count": 1,
    }
    return hunyuan_metadata(config, "hunyuan-moe") | typed_metadata("hunyuan-moe", sizes)


def _of_all_layers(config: CheckpointConfig, key: str, default: int | None = None) -> int:
    """A number that may be there for every layer, the same for all."""
    values = config.get(key)
    if not isinstance(values, list):
        return config.integer(key, default)
    if len(values) < config.n_layer or any(value != values[0] for value in values):
        raise config.refuse(key, f"one number, the same for all of {config.n_layer} layers")
    return config.integer_of(key, values[0])


CHECKPOINT = CheckpointForm(
    classes={"HunYuanMoEV1ForCausalLM": "hunyuan_v1_moe", "HunYuanMoEV1Model": "hunyuan_v1_moe"},
    metadata=checkpoint_metadata,
    layer=HUNYUAN_LAYER
    | {"mlp.gate.wg": "ffn_gate_inp"}
    | {f"mlp.shared_mlp.{name}_proj": f"ffn_{name}_shexp" for name in ("gate", "up", "down")},
    experts=EXPERT_MATRICES,
    stacked=STACKED_EXPERTS,
    extra=factors_of(rotation_with_alpha),
)
