"""Cohere 2 with experts (North): as Command R7B, behind the first layers with experts and one that all tokens share.

What the shared one and the others give is averaged. Norms take the mean away, or not, as the file says.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from edgellm.formats.model_file import ModelFile
from edgellm.kernels.ops import Scale
from edgellm.kernels.program import Program
from edgellm.models.command_r import COHERE_LAYER, SIDE_BY_SIDE, cohere_metadata, logit_scale
from edgellm.models.parts.blocks import LayerKind, ProgramBuilder, build_decoder, feed_forward
from edgellm.models.parts.checkpoint_config import CheckpointConfig
from edgellm.models.parts.checkpoint_form import (
    CheckpointForm,
    TypedMetadata,
    count_of,
    layer_kinds,
    leading_dense_layers,
    typed_metadata,
)
from edgellm.models.parts.experts import (
    EXPERT_MATRICES,
    SHARED_EXPERTS,
    SIGMOID,
    STACKED_EXPERTS,
    Experts,
    expert_feed_forward,
    expert_metadata,
    read_experts,
    read_gating,
    shared_expert,
)
from edgellm.models.parts.hparams import flag, integer, key_of, real
from edgellm.models.parts.local_layers import local_layers

PERIOD = 4


def build(gguf: ModelFile) -> Program:
    """x += attention(h) + ffn(h), h = norm(x): see ``build_decoder``. The first layers are rotated in any case."""
    n_drafts = integer(gguf, "nextn_predict_layers", 0)
    window, n_dense = integer(gguf, "attention.sliding_window", least=1), integer(gguf, "leading_dense_block_count", 0)
    n_layer = integer(gguf, "block_count") - n_drafts
    slides = local_layers(gguf, n_layer, PERIOD, global_first=True, n_drafts=n_drafts)
    experts = read_experts(
        gguf,
        over="chosen" if flag(gguf, "expert_weights_norm", False) else "all",
        scores=read_gating(gguf),
        factor=real(gguf, "expert_weights_scale", 1.0) or 1.0,
    )
    count = integer(gguf, "expert_shared_count", 0)
    n_shared = (integer(gguf, "expert_shared_feed_forward_length", 0) or experts.n_ff * count) if count else 0

    def kinds(i: int) -> LayerKind:
        if slides[i]:
            return LayerKind(window=window)
        return LayerKind() if i < n_dense else LayerKind(None)

    return build_decoder(
        gguf,
        adjacent=True,
        norms=SIDE_BY_SIDE,
        scales=logit_scale(gguf),
        layer_norms=not gguf.metadata.get(key_of(gguf, "attention.layer_norm_rms_epsilon")),
        kinds=kinds,
        ffn=_averaged(experts, n_dense, n_shared),
    )


def _averaged(experts: Experts, n_dense: int, n_shared: int) -> Callable[[ProgramBuilder, str], None]:
    """proj = (experts(h) + shared(h)) / 2, or experts(h) alone."""

    def ffn(m: ProgramBuilder, blk: str) -> None:
        if int(blk.removeprefix("blk.")) < n_dense:
            feed_forward(m, blk, "silu", of="_dense")
            return
        expert_feed_forward(m, blk, experts, "silu")
        if n_shared:
            shared_expert(m, blk, n_shared, "silu")
            m.ops.append(Scale("proj", "proj", 0.5))

    return ffn


def checkpoint_metadata(config: CheckpointConfig) -> TypedMetadata:
    """The keys of this architecture, from config.json."""
    n_dense = leading_dense_layers(config, count_of(config, "first_k_dense_replace", 0))
    slides = layer_kinds(config, _slides(config, n_dense))
    first = config.integer("prefix_dense_sliding_window_pattern", 1)
    if first != 1 and not all(slides[:n_dense]):
        raise config.refuse("prefix_dense_sliding_window_pattern", "models whose first layers are all rotated (1)")
    function = config.get("expert_selection_fn") or "softmax"
    if function not in ("softmax", "sigmoid"):
        raise config.refuse("expert_selection_fn", "softmax or sigmoid")
    normed = function == "softmax" or config.flag("norm_topk_prob", True)
    n_ff, n_shared = config.integer("intermediate_size"), count_of(config, "num_shared_experts", 0)
    found = cohere_metadata(config, "cohere2moe") | expert_metadata(config, "cohere2moe")
    if config.get("rms_norm_eps") is not None:
        del found["cohere2moe.attention.layer_norm_epsilon"]
        found["cohere2moe.attention.layer_norm_rms_epsilon"] = (config.real("rms_norm_eps"), "FLOAT32")
    found["cohere2moe.attention.sliding_window_pattern"] = (np.array(slides), "ARRAY[BOOL]")
    sizes: dict[str, float] = {
        "feed_forward_length": config.integer("prefix_dense_intermediate_size", n_ff),
        "attention.sliding_window": config.integer("sliding_window"),
        "vocab_size": config.integer("vocab_size"),
        "rope.dimension_count": config.head_dim,
        "expert_feed_forward_length": n_ff,
        "expert_gating_func": SIGMOID if function == "sigmoid" else 1,
        "expert_weights_norm": normed,
        "leading_dense_block_count": n_dense,
    }
    if n_shared:
        sizes |= {"expert_shared_count": n_shared, "expert_shared_feed_forward_length": n_ff * n_shared}
    return found | typed_metadata("cohere2moe", sizes)


def _slides(config: CheckpointConfig, n_dense: int) -> Callable[[int], bool]:
    first, period = (
        config.integer(key, default)
        for key, default in (("prefix_dense_sliding_window_pattern", 1), ("sliding_window_pattern", PERIOD))
    )
    return lambda i: (i + 1) % first != 0 if i < n_dense else (i - n_dense + 1) % period != 0


CHECKPOINT = CheckpointForm(
    classes={"Cohere2MoeForCausalLM": "cohere2_moe", "Cohere2MoeModel": "cohere2_moe"},
    metadata=checkpoint_metadata,
    layer=COHERE_LAYER | SHARED_EXPERTS | {"mlp.gate": "ffn_gate_inp"},
    experts=EXPERT_MATRICES,
    stacked=STACKED_EXPERTS,
)
