"""A feed-forward of experts: its sizes, and its ops."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from edgellm.formats.model_file import ModelFile
from edgellm.kernels.ops import ExpertMatmul, ExpertSum, Route
from edgellm.models.parts.blocks import ProgramBuilder
from edgellm.models.parts.hparams import hparam_error, integer


@dataclass(frozen=True)
class Experts:
    """``n`` experts in each layer, ``n_used`` of them for a token, ``n_ff`` wide."""

    n: int
    n_used: int
    n_ff: int


def read_experts(gguf: ModelFile) -> Experts:
    """The sizes from the metadata. FormatError ``MODEL_HPARAMS`` for one that is off."""
    n, n_ff = integer(gguf, "expert_count", least=1), integer(gguf, "expert_feed_forward_length", least=1)
    n_used = integer(gguf, "expert_used_count", least=1)
    if n_used > n:
        raise hparam_error(gguf, "expert_used_count", n_used, f"up to expert_count, which is {n}")
    return Experts(n, n_used, n_ff)


def expert_feed_forward(m: ProgramBuilder, blk: str, experts: Experts, activation: Literal["silu", "gelu"]) -> None:
    """proj = sum over the experts that h Wrouter^T is largest for: its softmax times (act(h Wg^T) * h Wu^T) Wd^T"""
    n_used, n_ff, n_embd = experts.n_used, experts.n_ff, m.hp.n_embd
    m.linear("h", f"{blk}.ffn_gate_inp", "router", experts.n)
    m.ops.append(Route("router", m.buffer("ids", n_used, dtype="int32"), m.buffer("probs", n_used)))

    def matmul(x: str, name: str, out: str, n_out: int, n_in: int) -> None:
        weight = m.weight(f"{blk}.{name}.weight", experts.n, n_out, n_in)
        m.ops.append(ExpertMatmul(x, "ids", weight, m.buffer(out, n_used * n_out), n_used))

    matmul("h", "ffn_gate_exps", "gate", n_ff, n_embd)
    matmul("h", "ffn_up_exps", "up", n_ff, n_embd)
    m.gated_unit("gate", "up", "ffn", activation)
    matmul("ffn", "ffn_down_exps", "experts", n_embd, n_ff)
    m.ops.append(ExpertSum("experts", "probs", m.buffer("proj", n_embd)))
