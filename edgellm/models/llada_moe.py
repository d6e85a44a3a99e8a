"""LLaDA-MoE: experts in every layer, heads of q and k normed, and tokens that see all of their text.

The weights of a token's experts are their part of the softmax over all, so they do not sum to 1.
"""

from __future__ import annotations

from edgellm.formats.model_file import ModelFile
from edgellm.kernels.program import Program
from edgellm.models.parts.checkpoint_config import CheckpointConfig
from edgellm.models.parts.checkpoint_form import (
    DECODER_LAYER,
    QK_NORMS,
    CheckpointForm,
    TypedMetadata,
    decoder_metadata,
    refuse_activation,
)
from edgellm.models.parts.denoising import build_denoiser, denoising_metadata
from edgellm.models.parts.experts import EXPERT_MATRICES, expert_feed_forward, expert_metadata, read_experts
from edgellm.models.parts.hparams import integer

MASK = 156895  # of a checkpoint that does not name it
BLOCK = 32


def build(gguf: ModelFile) -> Program:
    """See ``build_denoiser`` and ``expert_feed_forward``."""
    n_ff = integer(gguf, "expert_feed_forward_length", 0) or None
    if n_ff is None:  # as llama.cpp has it
        n_ff = integer(gguf, "feed_forward_length", least=1) // integer(gguf, "expert_used_count", least=1)
    experts = read_experts(gguf, n_ff, over="all")
    return build_denoiser(
        gguf, shifted=False, algorithm="confidence", block=BLOCK, adjacent=False, qk_norms="heads",
        ffn=lambda m, blk: expert_feed_forward(m, blk, experts, "silu"),
    )  # fmt: skip


def checkpoint_metadata(config: CheckpointConfig) -> TypedMetadata:
    """The keys of this architecture, from config.json."""
    refuse_activation(config, "silu", "swish")
    if config.flag("norm_topk_prob", False):
        raise config.refuse("norm_topk_prob", "models whose chosen experts' weights do not sum to 1 (false)")
    if not config.flag("qk_layernorm", True):
        raise config.refuse("qk_layernorm", "models whose heads of q and k are normed (true)", value=False)
    freq = config.get("moe_layer_freq")
    if freq is not None and freq != 1 and freq != [1] * config.n_layer:
        raise config.refuse("moe_layer_freq", "models with experts in every layer")
    n_ff = config.integer("dense_intermediate_size", config.integer("expert_intermediate_size"))
    found = decoder_metadata(config, "llada-moe", n_ff=n_ff) | expert_metadata(config, "llada-moe")
    found["llada-moe.expert_feed_forward_length"] = (config.integer("expert_intermediate_size"), "UINT32")
    return found | denoising_metadata(config, "llada-moe", shifted=False, mask=MASK)


CHECKPOINT = CheckpointForm(
    classes=dict.fromkeys(("LLaDAMoEModelLM", "LLaDAMoEModel"), "llada"),
    settings="llada_moe",
    metadata=checkpoint_metadata,
    layer=DECODER_LAYER | QK_NORMS | {"mlp.gate": "ffn_gate_inp"},
    experts=EXPERT_MATRICES,
    needs_class=True,
    renamed_kinds={"llada_moe": "llada", "lladamoe": "llada"},
)
