"""Nemotron-H with experts (Nemotron 3): its feed-forwards are mixtures of squared ReLUs and one that all tokens share.

Experts may work on fewer dimensions than the model has: a matrix brings h there, another brings their sum back.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from edgellm.formats.model_file import ModelFile
from edgellm.kernels.ops import Activate, ExpertMatmul, ExpertSum, Matmul, Route
from edgellm.kernels.ops.experts import Over
from edgellm.kernels.program import Program
from edgellm.models.nemotron_h import CHECKPOINT as DENSE
from edgellm.models.nemotron_h import EXPERTS, build_layers, kinds_of, squared_relu
from edgellm.models.nemotron_h import checkpoint_metadata as dense_metadata
from edgellm.models.parts.blocks import ProgramBuilder
from edgellm.models.parts.checkpoint_config import CheckpointConfig
from edgellm.models.parts.checkpoint_form import TypedMetadata
from edgellm.models.parts.hparams import flag, hparam_error, integer, real


@dataclass(frozen=True)
class _Experts:
    """``n`` experts, ``n_used`` of them for a token, ``n_ff`` wide (0: as a layer's width says), on ``n_latent``
    dimensions (0: all); ``shared`` is the width of the one for all tokens."""

    n: int
    n_used: int
    n_ff: int
    n_latent: int
    shared: int
    normed: bool
    factor: float


def build(gguf: ModelFile) -> Program:
    """As Nemotron-H, but x += experts(h) + shared(h)."""
    n, n_used = integer(gguf, "expert_count", least=1), integer(gguf, "expert_used_count", least=1)
    if n_used > n:
        raise hparam_error(gguf, "expert_used_count", n_used, f"up to expert_count, which is {n}")
    experts = _Experts(
        n,
        n_used,
        integer(gguf, "expert_feed_forward_length", 0),
        integer(gguf, "moe_latent_size", 0),
        integer(gguf, "expert_shared_feed_forward_length", least=1),
        flag(gguf, "expert_weights_norm", False),
        real(gguf, "expert_weights_scale", 0.0) or 1.0,
    )
    return build_layers(gguf, lambda m, blk: _mixture(m, blk, experts))


def _mixture(m: ProgramBuilder, blk: str, experts: _Experts) -> None:
    """proj = sum over the chosen experts of weight * relu(z Wu^T)^2 Wd^T, and the shared one of h"""
    n, n_used, n_embd = experts.n, experts.n_used, m.hp.n_embd
    n_ff, n_in = experts.n_ff or m.hp.n_ff // n_used, experts.n_latent or n_embd
    weight = m.weight(f"{blk}.ffn_gate_inp.weight", n, n_embd)
    m.ops.append(Matmul("h", weight, m.buffer("router", n)))
    bias = m.weight(f"{blk}.exp_probs_b.bias", n)
    ids, probs = m.buffer("ids", n_used, dtype="int32"), m.buffer("probs", n_used)
    over: Over = "chosen" if experts.normed else "all"
    m.ops.append(Route("router", ids, probs, over, None, "sigmoid", bias, experts.factor))
    z, summed = "h", "proj"
    if experts.n_latent:
        z, summed = "latent", "latent_sum"
        m.linear("h", f"{blk}.ffn_latent_down", z, n_in)
    weight = m.weight(f"{blk}.ffn_up_exps.weight", n, n_ff, n_in)
    m.ops.append(ExpertMatmul(z, ids, weight, m.buffer("experts_up", n_used * n_ff), n_used))
    m.ops.append(Activate("experts_up", "experts_up", "relu_squared"))
    weight = m.weight(f"{blk}.ffn_down_exps.weight", n, n_in, n_ff)
    m.ops.append(ExpertMatmul("experts_up", ids, weight, m.buffer("experts", n_used * n_in), n_used))
    m.ops.append(ExpertSum("experts", probs, m.buffer(summed, n_in)))
    if experts.n_latent:
        m.linear(summed, f"{blk}.ffn_latent_up", "proj", n_embd)
    squared_relu(m, blk, "ffn_up_shexp", "ffn_down_shexp", experts.shared, "shared")
    m.add("proj", "shared", "proj")


def checkpoint_metadata(config: CheckpointConfig) -> TypedMetadata:
    """The keys of this architecture, from config.json."""
    if config.integer("n_group", 1) != 1 or config.integer("topk_group", 1) != 1:
        raise config.refuse("n_group", "models whose experts are one group (n_group and topk_group 1)")
    kinds, n_ff = kinds_of(config), config.integer("moe_intermediate_size")
    found: TypedMetadata = {
        "feed_forward_length": ([n_ff * (kind == EXPERTS) for kind in kinds], "ARRAY[INT32]"),
        "expert_count": (config.integer("n_routed_experts"), "UINT32"),
        "expert_used_count": (config.integer("num_experts_per_tok"), "UINT32"),
        "expert_feed_forward_length": (n_ff, "UINT32"),
        "expert_shared_feed_forward_length": (config.integer("moe_shared_expert_intermediate_size"), "UINT32"),
        "expert_shared_count": (config.integer("n_shared_experts", 1), "UINT32"),
        "expert_weights_norm": (config.flag("norm_topk_prob", True), "BOOL"),
        "expert_weights_scale": (config.real("routed_scaling_factor", 1.0), "FLOAT32"),
        "expert_group_count": (1, "UINT32"),
    }
    if config.get("moe_latent_size") is not None:
        found["moe_latent_size"] = (config.integer("moe_latent_size"), "UINT32")
    return dense_metadata(config, "nemotron_h_moe") | {f"nemotron_h_moe.{key}": value for key, value in found.items()}


def _biases(config: CheckpointConfig) -> frozenset[str]:
    shared = ("ffn_up_shexp", "ffn_down_shexp", "ffn_latent_down", "ffn_latent_up")
    return DENSE.biases(config) | (frozenset(shared) if config.flag("mlp_bias", False) else frozenset())


CHECKPOINT = replace(
    DENSE,
    metadata=checkpoint_metadata,
    biases=_biases,
    layer={**DENSE.layer}
    | {
        "mixer.gate": "ffn_gate_inp",
        "mixer.shared_experts.up_proj": "ffn_up_shexp",
        "mixer.shared_experts.down_proj": "ffn_down_shexp",
        "mixer.fc1_latent_proj": "ffn_latent_down",
        "mixer.fc2_latent_proj": "ffn_latent_up",
    },
    bare={**DENSE.bare, "mixer.gate.e_score_correction_bias": ("exp_probs_b.bias",)},
    experts={"up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps"},
    stacked={"mixer.experts.up_proj": ("ffn_up_exps",), "mixer.experts.down_proj": ("ffn_down_exps",)},
)
