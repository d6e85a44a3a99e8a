"""Qwen3-Next: the delta-nets, gated attention and experts of Qwen 3.5, its value heads by key head.

Files have q, k, v and z of the delta-nets either as rows of two matrices, or by key head in one, [q | k | v | z]; beta
and alpha are always in one, by key head [beta | alpha].
"""

from __future__ import annotations

from edgellm.formats.model_file import ModelFile
from edgellm.kernels.ops import SplitHeads
from edgellm.kernels.program import Program
from edgellm.models.parts.blocks import ProgramBuilder
from edgellm.models.parts.checkpoint_config import CheckpointConfig
from edgellm.models.parts.checkpoint_form import CheckpointForm, TypedMetadata
from edgellm.models.parts.delta_net import DeltaNet, Inputs, build_hybrid, qkv_and_z, read_delta_net
from edgellm.models.parts.delta_net_checkpoint import DELTA_LAYER, DELTA_NUMBERS, DELTA_VECTORS, delta_metadata
from edgellm.models.parts.experts import (
    EXPERT_MATRICES,
    SHARED_EXPERT,
    STACKED_EXPERTS,
    expert_metadata,
    experts_and_shared,
    read_experts,
    refuse_dense_layers,
    shared_expert_metadata,
)
from edgellm.models.parts.hparams import integer


def build(gguf: ModelFile, *, nextn: bool = False) -> Program:
    """See ``build_hybrid``; x += experts(h) + sigmoid(h w) shared(h)."""
    net = read_delta_net(gguf, tiled=False)
    experts = read_experts(gguf, shared=integer(gguf, "expert_shared_feed_forward_length", least=1))

    return build_hybrid(gguf, net, inputs=_inputs(net), ffn=experts_and_shared(experts), n_ff=experts.n_ff, nextn=nextn)


def _inputs(net: DeltaNet) -> Inputs:
    """q, k, v and z as the file has them, alpha and beta by key head."""
    dim, values = net.head_dim, net.n_v * net.head_dim
    n_qk = net.n_k * dim

    def by_key_head(m: ProgramBuilder, blk: str) -> None:
        m.linear("h", f"{blk}.ssm_in", "qkvz", net.n_qkv + values)
        m.buffer("qkv", net.n_qkv)
        q, k = m.part("qkv", 0, n_qk), m.part("qkv", n_qk, n_qk)
        v = m.part("qkv", 2 * n_qk, values)
        m.ops.append(SplitHeads("qkvz", q, m.buffer("kvz", n_qk + 2 * values), dim))
        m.ops.append(SplitHeads("kvz", k, m.buffer("vz", 2 * values), dim))
        m.ops.append(SplitHeads("vz", v, m.buffer("z", values), values // net.n_k))

    def inputs(m: ProgramBuilder, blk: str) -> None:
        if f"{blk}.ssm_in.weight" in m.gguf.tensors:
            by_key_head(m, blk)
        else:
            qkv_and_z(m, blk, net)
        m.linear("h", f"{blk}.ssm_ba", "beta_alpha", 2 * net.n_v)
        beta, alpha = m.buffer("beta", net.n_v), m.buffer("alpha", net.n_v)
        m.ops.append(SplitHeads("beta_alpha", beta, alpha, net.n_v // net.n_k))

    return inputs


def checkpoint_metadata(config: CheckpointConfig) -> TypedMetadata:
    """The keys of this architecture, from config.json."""
    if not config.flag("norm_topk_prob", True):
        raise config.refuse("norm_topk_prob", "models whose chosen experts' weights sum to 1 (true)", value=False)
    refuse_dense_layers(config)
    n_ff = config.integer("moe_intermediate_size")
    found = delta_metadata(config, "qwen3next", n_ff=n_ff) | expert_metadata(config, "qwen3next")
    del found["qwen3next.rope.dimension_sections"]  # its positions have one part
    return found | shared_expert_metadata(config, "qwen3next")


CHECKPOINT = CheckpointForm(
    classes={"Qwen3NextForCausalLM": "qwen3_next", "Qwen3NextModel": "qwen3_next"},
    metadata=checkpoint_metadata,
    layer={name: place for name, place in DELTA_LAYER.items() if "in_proj" not in name}
    | {"linear_attn.in_proj_qkvz": "ssm_in", "linear_attn.in_proj_ba": "ssm_ba"}
    | SHARED_EXPERT
    | {"mlp.gate": "ffn_gate_inp"},
    bare=DELTA_VECTORS,
    numbers=DELTA_NUMBERS,
    experts=EXPERT_MATRICES,
    stacked=STACKED_EXPERTS,
    extra=lambda _: {},
    norm_shift=1.0,
)
