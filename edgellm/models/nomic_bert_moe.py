"""Nomic BERT with experts (nomic-embed-text-v2-moe): as Nomic BERT, with biases, and curves in place of gated units.

Of each ``moe_every_n_layers`` layers the second has experts; their weights are their part of the softmax over all, so
they do not sum to 1. What they give has one bias for all, which llama.cpp's converter leaves out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from edgellm.formats.model_file import ModelFile
from edgellm.kernels.program import Program
from edgellm.models.nomic_bert import CHECKPOINT as DENSE
from edgellm.models.nomic_bert import nomic_metadata
from edgellm.models.parts.blocks import ProgramBuilder
from edgellm.models.parts.checkpoint_config import CheckpointConfig
from edgellm.models.parts.checkpoint_form import TypedMetadata, refuse_activation, typed_metadata
from edgellm.models.parts.experts import Experts, expert_feed_forward, read_experts
from edgellm.models.parts.hparams import integer
from edgellm.models.parts.post_norm import build_post_norm, curved

TRAINED = 512
"""Tokens that the published model was trained with; its config.json says 2048."""


def build(gguf: ModelFile) -> Program:
    """x = norm(x + Wo attention(rope(q), rope(k), v));  x = norm(x + ffn(x))"""
    every = integer(gguf, "moe_every_n_layers", 0)
    experts = read_experts(gguf, integer(gguf, "feed_forward_length", least=1), over="all") if every else None
    return build_post_norm(gguf, _feed_forward(every, experts), "rotated")


def _feed_forward(every: int, experts: Experts | None) -> Callable[[ProgramBuilder, str], None]:
    """proj = Wdown gelu(Wup x), or the sum of that of a token's experts."""
    dense = curved("gelu_erf")

    def ffn(m: ProgramBuilder, blk: str) -> None:
        if experts is None or int(blk.removeprefix("blk.")) % every != 1:
            dense(m, blk)
            return
        expert_feed_forward(m, blk, experts, "gelu_erf", x="x", curve="gelu_erf")
        if f"{blk}.ffn_down.bias" in m.gguf.tensors:
            m.add_row("proj", f"{blk}.ffn_down.bias", "proj")

    return ffn


def checkpoint_metadata(config: CheckpointConfig) -> TypedMetadata:
    """The keys of this architecture, from config.json."""
    refuse_activation(config, "gelu")
    found = nomic_metadata(config, "nomic-bert-moe")
    if config.integer("max_position_embeddings") == config.get("max_trained_positions") == 2048:
        found["nomic-bert-moe.context_length"] = (TRAINED, "UINT32")
    return found | typed_metadata(
        "nomic-bert-moe",
        {
            "moe_every_n_layers": config.integer("moe_every_n_layers"),
            "expert_count": config.integer("num_experts"),
            "expert_used_count": config.integer("moe_top_k"),
        },
    )


def _biases(config: CheckpointConfig) -> frozenset[str]:
    modules = {"qkv_proj_bias": {"attn_qkv", "attn_output"}, "mlp_fc1_bias": {"ffn_up"}, "mlp_fc2_bias": {"ffn_down"}}
    return DENSE.biases(config).union(*(there for key, there in modules.items() if config.flag(key, True)))


CHECKPOINT = replace(
    DENSE,
    metadata=checkpoint_metadata,
    biases=_biases,
    layer=dict(DENSE.layer) | {"mlp.fc1": "ffn_up", "mlp.router.layer": "ffn_gate_inp"},
    bare={
        "mlp.experts.mlp.w1": ("ffn_up_exps.weight",),
        "mlp.experts.mlp.w2": ("ffn_down_exps.weight",),
        "mlp.experts.bias": ("ffn_down.bias",),
    },
    joined_experts=True,
    leaves_out_zeros=r".*\.mlp\.experts\.bias",
    variant=None,
)
