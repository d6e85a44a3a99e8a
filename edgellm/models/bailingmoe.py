"""Ling 1 (BailingMoE): llama whose every feed-forward is a mixture of experts and one that all tokens share."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from edgellm.formats.model_file import ModelFile
from edgellm.kernels.program import Program
from edgellm.models.parts.blocks import build_decoder
from edgellm.models.parts.checkpoint_config import CheckpointConfig
from edgellm.models.parts.checkpoint_form import (
    DECODER_LAYER,
    QKV,
    CheckpointForm,
    TypedMetadata,
    count_of,
    decoder_metadata,
    refuse_activation,
    typed_metadata,
)
from edgellm.models.parts.checkpoint_rope import Rotation, rotation
from edgellm.models.parts.experts import (
    EXPERT_MATRICES,
    SHARED_EXPERTS,
    dense_then_experts,
    expert_metadata,
    read_experts,
)
from edgellm.models.parts.hparams import flag, integer, real
from edgellm.models.parts.joined_heads import paired, rows_of_qkv

BAILING_AROUND = {"model.word_embeddings": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
BAILING_LAYER = (
    {name: there for name, there in DECODER_LAYER.items() if "self_attn" not in name}
    | SHARED_EXPERTS
    | {"attention.dense": "attn_output", "mlp.gate": "ffn_gate_inp"}
)


def build(gguf: ModelFile) -> Program:
    """See ``build_decoder`` and ``dense_then_experts``."""
    over = "chosen" if flag(gguf, "expert_weights_norm", False) else "all"
    experts = read_experts(gguf, over=over, factor=real(gguf, "expert_weights_scale", 1.0) or 1.0)
    n_shared = integer(gguf, "expert_shared_count", least=1) * experts.n_ff
    return build_decoder(gguf, adjacent=True, ffn=dense_then_experts(experts, 0, n_shared))


def bailing_metadata(
    config: CheckpointConfig, architecture: str, rotate: Callable[[CheckpointConfig], Rotation] = rotation
) -> TypedMetadata:
    """The keys of the family, from config.json."""
    refuse_activation(config, "silu", "swish")
    n_ff, shared = config.integer("moe_intermediate_size"), "moe_shared_expert_intermediate_size"
    if config.get(shared) not in (None, n_ff):
        raise config.refuse(shared, f"shared experts as wide as moe_intermediate_size, which is {n_ff}")
    found = decoder_metadata(config, architecture, rotate) | expert_metadata(config, architecture)
    return found | typed_metadata(
        architecture,
        {
            "vocab_size": config.integer("vocab_size"),
            "expert_feed_forward_length": n_ff,
            "expert_shared_count": config.integer("num_shared_experts"),
            "expert_weights_norm": config.flag("norm_topk_prob", False),
            "leading_dense_block_count": count_of(config, "first_k_dense_replace", 0),
        },
    )


def checkpoint_metadata(config: CheckpointConfig) -> TypedMetadata:
    """The keys of this architecture, from config.json."""
    if count_of(config, "first_k_dense_replace", 0):
        raise config.refuse("first_k_dense_replace", "models of this architecture with experts in every layer (0)")
    sizes = {"expert_weights_scale": 1.0, "rope.dimension_count": config.head_dim}
    return bailing_metadata(config, "bailingmoe") | typed_metadata("bailingmoe", sizes)


def _pieces(config: CheckpointConfig) -> dict[str, dict[str, np.ndarray]]:
    q, k, v = rows_of_qkv(config)
    return {"attention.query_key_value": {"attn_q": paired(config, q), "attn_k": paired(config, k), "attn_v": v}}


def bailing_biases(config: CheckpointConfig) -> frozenset[str]:
    """The modules with a bias."""
    of_heads = QKV | {"attn_qkv"} if config.flag("use_qkv_bias", False) else frozenset()
    return of_heads | ({"attn_output"} if config.flag("use_bias", False) else frozenset())


CHECKPOINT = CheckpointForm(
    classes={"BailingMoeForCausalLM": "bailing_moe"},
    metadata=checkpoint_metadata,
    biases=bailing_biases,
    layer=BAILING_LAYER,
    around=BAILING_AROUND,
    experts=EXPERT_MATRICES,
    pieces=_pieces,
    needs_class=True,
)
