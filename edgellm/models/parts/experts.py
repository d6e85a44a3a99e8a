"""A feed-forward of experts: its sizes, its ops, and how checkpoints keep them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from edgellm.formats.errors import UnsupportedError
from edgellm.formats.model_file import ModelFile
from edgellm.kernels.ops import ExpertMatmul, ExpertSum, Matmul, Route, SigmoidGate, SplitHeads
from edgellm.kernels.ops.elementwise import Activation, Curve
from edgellm.kernels.ops.experts import Over, Scores
from edgellm.models.parts.blocks import ProgramBuilder, feed_forward
from edgellm.models.parts.checkpoint_config import CheckpointConfig
from edgellm.models.parts.checkpoint_form import TypedMetadata
from edgellm.models.parts.hparams import file_name, flag, hparam_error, integer, key_of, real

EXPERT_MATRICES = {"gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps"}
"""Modules of one expert, where a checkpoint has them one by one -> the tensor that holds those of a layer."""
STACKED_EXPERTS = {
    "mlp.experts.gate_up_proj": ("ffn_gate_exps", "ffn_up_exps"),
    "mlp.experts.down_proj": ("ffn_down_exps",),
}
"""Parameters of all experts of a layer, where a checkpoint has them as one -> the tensors its rows are cut into."""


SOFTMAX, SIGMOID = 1, 2
"""The numbers in GGUF of routers by a softmax and by sigmoids."""
ROUTERS = {SOFTMAX: "softmax", SIGMOID: "sigmoids"}
SHARED_EXPERT = {
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
}


SHARED_EXPERTS = {f"mlp.shared_experts.{name}_proj": f"ffn_{name}_shexp" for name in ("gate", "up", "down")}


@dataclass(frozen=True)
class Experts:
    """``n`` experts in each layer, ``n_used`` of them for a token, ``n_ff`` wide.

    over     what the weights of those that are used are the softmax over
    shared   width of the one that every token has besides, 0 where there is none
    needs_bias   whether the router and every expert's products have one
    scores   what a token's experts are chosen by, and with ``biased`` that plus a bias
    factor   of all weights
    groups   (n, n_used): they stand in n groups, of which a token has n_used; see ``Route``
    best     whether a group counts by its best two experts or by one
    """

    n: int
    n_used: int
    n_ff: int
    over: Over = "chosen"
    shared: int = 0
    needs_bias: bool = False
    scores: Scores = "softmax"
    biased: bool = False
    factor: float = 1.0
    groups: tuple[int, int] = (1, 1)
    best: int = 2


def read_experts(gguf: ModelFile, n_ff: int | None = None, **more: Any) -> Experts:
    """The sizes from the metadata. FormatError ``MODEL_HPARAMS`` for one that is off.

    n_ff   the width, for architectures that have no key of its own for it
    more   fields of ``Experts``
    """
    n = integer(gguf, "expert_count", least=1)
    n_used = integer(gguf, "expert_used_count", least=1)
    if n_used > n:
        raise hparam_error(gguf, "expert_used_count", n_used, f"up to expert_count, which is {n}")
    if n_ff is None:
        n_ff = integer(gguf, "expert_feed_forward_length", least=1)
    return Experts(n, n_used, n_ff, **more)


def read_gating(gguf: ModelFile, default: int = SIGMOID, known: tuple[int, ...] = (SOFTMAX, SIGMOID)) -> Scores:
    """What experts are chosen by, ``default`` where the file says nothing. UnsupportedError for what is not known."""
    gating = integer(gguf, "expert_gating_func", 0) or default  # 0: none is said
    if gating not in known:
        names = " or ".join(f"{ROUTERS[one]} ({one})" for one in known)
        raise UnsupportedError(
            f"{file_name(gguf)}: {key_of(gguf, 'expert_gating_func')} is {gating}; edgellm runs models of it "
            f"whose experts are chosen by {names}. Take another model of the architecture.",
            code="MODEL_KEY_UNKNOWN",
        )
    return "sigmoid" if gating == SIGMOID else "softmax"


def read_sigmoid_experts(gguf: ModelFile, n_ff: int | None = None, *, normed: bool | None = None) -> Experts:
    """Those that sigmoids and a bias choose, as in DeepSeek 3. UnsupportedError for another router.

    normed   whether weights sum to 1, for architectures that have no key for it
    """
    scores = read_gating(gguf, known=(SIGMOID,))
    if normed is None:
        normed = flag(gguf, "expert_weights_norm", False)
    factor = real(gguf, "expert_weights_scale", 1.0) or 1.0
    return read_experts(gguf, n_ff, over="chosen" if normed else "all", scores=scores, biased=True, factor=factor)


def with_groups(gguf: ModelFile, experts: Experts) -> Experts:
    """The same in the groups that the file says. FormatError for groups that they do not fit into."""
    n, n_used = (integer(gguf, key, 0) for key in ("expert_group_count", "expert_group_used_count"))
    if max(n, n_used) <= 1:
        return experts
    if experts.n % max(n, 1):
        raise hparam_error(gguf, "expert_group_count", n, f"a divisor of expert_count, which is {experts.n}")
    if not 0 < n_used <= n or n_used * (experts.n // n) < experts.n_used:
        expected = f"1 to {max(n, 1)}, and enough for expert_used_count, which is {experts.n_used}"
        raise hparam_error(gguf, "expert_group_used_count", n_used, expected)
    return replace(experts, groups=(n, n_used))


def expert_feed_forward(
    m: ProgramBuilder,
    blk: str,
    experts: Experts,
    activation: Activation,
    *,
    x: str = "h",
    router_in: str | None = None,
    curve: Curve | None = None,
) -> None:
    """proj = sum over the experts that x Wrouter^T is largest for: its softmax times (act(x Wg^T) * x Wu^T) Wd^T

    Plus the biases of any of these products where the file has them, and times the number beside each expert's matrix.

    router_in   what the router reads in place of x
    curve       curve(x Wu^T) stands in place of the gated unit
    """
    n_used, n_ff, n_embd = experts.n_used, experts.n_ff, m.hp.n_embd
    weight = m.weight(f"{blk}.ffn_gate_inp.weight", experts.n, n_embd)
    has_bias = experts.needs_bias or f"{blk}.ffn_gate_inp.bias" in m.gguf.tensors
    bias = m.weight(f"{blk}.ffn_gate_inp.bias", experts.n) if has_bias else None
    m.ops.append(Matmul(router_in or x, weight, m.buffer("router", experts.n), bias))
    biased = {
        name: experts.needs_bias or f"{blk}.{name}.bias" in m.gguf.tensors
        for name in ("ffn_gate_up_exps", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
    }
    scales = None  # the last product's numbers multiply as well what its result is multiplied with
    if f"{blk}.ffn_down_exps.scale" in m.gguf.tensors and not biased["ffn_down_exps"]:
        scales = m.weight(f"{blk}.ffn_down_exps.scale", experts.n)
    ids, probs = m.buffer("ids", n_used, dtype="int32"), m.buffer("probs", n_used)
    choice = m.weight(f"{blk}.exp_probs_b.bias", experts.n) if experts.biased else None
    groups = experts.groups, experts.best
    m.ops.append(Route("router", ids, probs, experts.over, scales, experts.scores, choice, experts.factor, *groups))

    def matmul(x: str, name: str, out: str, n_out: int, n_in: int) -> None:
        weight = m.weight(f"{blk}.{name}.weight", experts.n, n_out, n_in)
        if f"{blk}.{name}.scale" in m.gguf.tensors and scales != f"{blk}.{name}.scale":
            m.tensors[weight] = m.tensors[weight].times_each(m.numbers(f"{blk}.{name}.scale", experts.n))
        bias = m.weight(f"{blk}.{name}.bias", experts.n, n_out) if biased[name] else None
        m.ops.append(ExpertMatmul(x, "ids", weight, m.buffer(out, n_used * n_out), n_used, bias))

    if curve is not None:
        matmul(x, "ffn_up_exps", "experts_up", n_ff, n_embd)
        m.activate("experts_up", "experts_ffn", curve)
    elif f"{blk}.ffn_gate_up_exps.weight" in m.gguf.tensors:  # both in one
        matmul(x, "ffn_gate_up_exps", "gate_up", 2 * n_ff, n_embd)
        gate, up = (m.buffer(name, n_used * n_ff) for name in ("gate", "up"))
        m.ops.append(SplitHeads("gate_up", gate, up, n_ff))
    else:
        matmul(x, "ffn_gate_exps", "gate", n_ff, n_embd)
        matmul(x, "ffn_up_exps", "up", n_ff, n_embd)
    if curve is None:
        m.gated_unit("gate", "up", "ffn", activation)
    matmul("ffn" if curve is None else "experts_ffn", "ffn_down_exps", "experts", n_embd, n_ff)
    m.ops.append(ExpertSum("experts", "probs", m.buffer("proj", n_embd)))


def shared_expert(m: ProgramBuilder, blk: str, n_ff: int, activation: Activation, *, gated: bool = False) -> None:
    """proj += (act(h Wg^T) * h Wu^T) Wd^T, times sigmoid(h w) where it is ``gated``"""
    m.linear("h", f"{blk}.ffn_gate_shexp", "shared_gate", n_ff)
    m.linear("h", f"{blk}.ffn_up_shexp", "shared_up", n_ff)
    m.gated_unit("shared_gate", "shared_up", "shared_ffn", activation)
    m.linear("shared_ffn", f"{blk}.ffn_down_shexp", "shared", m.hp.n_embd)
    if gated:
        weight = m.row_weight(f"{blk}.ffn_gate_inp_shexp.weight", m.hp.n_embd)
        m.ops.append(Matmul("h", weight, m.buffer("shared_share", 1)))
        m.ops.append(SigmoidGate("shared", "shared_share", "shared"))
    m.add("proj", "shared", "proj")


def dense_then_experts(
    experts: Experts, n_dense: int, n_shared: int = 0, *, step: int = 1
) -> Callable[[ProgramBuilder, str], None]:
    """A feed-forward in the first ``n_dense`` layers, in the others SiLU experts and one for all tokens.

    n_shared   the width of that one, 0 where there is none
    step       of so many layers the last one alone has experts
    """

    def ffn(m: ProgramBuilder, blk: str) -> None:
        i = int(blk.removeprefix("blk."))
        if i < n_dense or (i + 1) % step:
            feed_forward(m, blk, "silu", of="_dense")
            return
        expert_feed_forward(m, blk, experts, "silu")
        if n_shared:
            shared_expert(m, blk, n_shared, "silu")

    return ffn


def experts_and_shared(experts: Experts) -> Callable[[ProgramBuilder, str], None]:
    """A feed-forward of SiLU experts and one that all tokens share: proj = experts(h) + sigmoid(h w) shared(h)"""

    def ffn(m: ProgramBuilder, blk: str) -> None:
        expert_feed_forward(m, blk, experts, "silu")
        shared_expert(m, blk, experts.shared, "silu", gated=True)

    return ffn


def expert_metadata(config: CheckpointConfig, architecture: str) -> TypedMetadata:
    """How many experts there are and how many a token is sent to, from config.json."""
    key = "num_experts" if config.get("num_local_experts") is None else "num_local_experts"
    return {
        f"{architecture}.expert_count": (config.integer(key), "UINT32"),
        f"{architecture}.expert_used_count": (config.integer("num_experts_per_tok"), "UINT32"),
    }


def shared_expert_metadata(config: CheckpointConfig, architecture: str) -> TypedMetadata:
    """The widths of an expert and of the shared one, from config.json."""
    return {
        f"{architecture}.expert_feed_forward_length": (config.integer("moe_intermediate_size"), "UINT32"),
        f"{architecture}.expert_shared_feed_forward_length": (
            config.integer("shared_expert_intermediate_size"),
            "UINT32",
        ),
    }


def refuse_dense_layers(config: CheckpointConfig) -> None:
    """UnsupportedError where some layers have no experts."""
    if config.integer("decoder_sparse_step", 1) != 1 or config.get("mlp_only_layers"):
        key = "mlp_only_layers" if config.get("mlp_only_layers") else "decoder_sparse_step"
        raise config.refuse(key, "models with experts in every layer")
