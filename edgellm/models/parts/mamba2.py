"""The Mamba-2 layer that mamba2 and its hybrids share: its sizes and its ops."""

from __future__ import annotations

from dataclasses import dataclass

from edgellm.formats.model_file import ModelFile
from edgellm.kernels.kv import StateLayer
from edgellm.kernels.ops import CausalConv, GatedNorm, SplitHeads, SSMGates, SSMScan
from edgellm.models.parts.blocks import ProgramBuilder
from edgellm.models.parts.hparams import hparam_error, integer


@dataclass(frozen=True)
class Mamba2:
    """``n_heads`` heads of ``head_dim``, whose states of ``n_state`` rows are written and read by ``n_groups`` of B and
    C, behind a convolution of ``n_taps``."""

    n_heads: int
    head_dim: int
    n_groups: int
    n_state: int
    n_taps: int

    @property
    def n_inner(self) -> int:
        """Columns of x, z and y."""
        return self.n_heads * self.head_dim

    @property
    def n_conv(self) -> int:
        """Columns of x, B and C together."""
        return self.n_inner + 2 * self.n_groups * self.n_state


def read_mamba2(gguf: ModelFile) -> Mamba2:
    """The sizes from the metadata. FormatError ``MODEL_HPARAMS`` for one that is off."""
    n_heads, n_groups = integer(gguf, "ssm.time_step_rank", least=1), integer(gguf, "ssm.group_count", least=1)
    n_inner = integer(gguf, "ssm.inner_size", least=1)
    if n_heads % n_groups:
        raise hparam_error(gguf, "ssm.time_step_rank", n_heads, f"a multiple of ssm.group_count, which is {n_groups}")
    if n_inner % n_heads:
        raise hparam_error(gguf, "ssm.inner_size", n_inner, f"a multiple of ssm.time_step_rank, which is {n_heads}")
    n_state, n_taps = integer(gguf, "ssm.state_size", least=1), integer(gguf, "ssm.conv_kernel", least=2)
    return Mamba2(n_heads, n_inner // n_heads, n_groups, n_state, n_taps)


def mamba2(m: ProgramBuilder, blk: str, net: Mamba2, out: str = "proj", *, needs_norm: bool = True) -> None:
    """[z | xBC | dt] = h Win^T, xBC = silu(conv(xBC)), y = scan(xBC, dt), out = norm(y * silu(z)) Wout^T

    needs_norm   else there is none where the file has none
    """
    z, xbc, dt = _inputs(m, blk, net)
    conv = m.weight(f"{blk}.ssm_conv1d.weight", net.n_conv, net.n_taps)
    bias = f"{blk}.ssm_conv1d.bias" if f"{blk}.ssm_conv1d.bias" in m.gguf.tensors else None
    bias = m.weight(bias, net.n_conv) if bias else None
    layer = m.cache_layer(StateLayer((net.n_taps - 1) * net.n_conv))
    m.ops.append(CausalConv(xbc, conv, m.buffer("xbc_conv", net.n_conv), layer, bias))
    a, dt_bias = m.weight(f"{blk}.ssm_a", net.n_heads, 1), m.weight(f"{blk}.ssm_dt.bias", net.n_heads)
    decay, rate = m.buffer("decay", net.n_heads), m.buffer("rate", net.n_heads)
    m.ops.append(SSMGates(dt, a, dt_bias, decay, rate))
    layer = m.cache_layer(StateLayer(net.n_inner * net.n_state))
    d, y = m.weight(f"{blk}.ssm_d", net.n_heads, 1), m.buffer("y", net.n_inner)
    m.ops.append(SSMScan("xbc_conv", decay, rate, d, y, layer, net.n_heads, net.n_groups))
    if needs_norm or f"{blk}.ssm_norm.weight" in m.gguf.tensors:
        norm = m.weight(f"{blk}.ssm_norm.weight", net.n_groups, net.n_inner // net.n_groups)
        m.ops.append(GatedNorm(y, z, norm, y, m.hp.eps))
    else:
        m.gated_unit(z, y, y, "silu")
    m.linear(y, f"{blk}.ssm_out", out, m.hp.n_embd)


def _inputs(m: ProgramBuilder, blk: str, net: Mamba2) -> tuple[str, str, str]:
    """z, xBC and dt: columns of one product, or copies of them where they do not begin at a multiple of 16."""
    n_inner, n_conv, n_heads = net.n_inner, net.n_conv, net.n_heads
    m.linear("h", f"{blk}.ssm_in", "zxbcdt", n_inner + n_conv + n_heads)
    if n_inner % 16 == 0 and n_conv % 16 == 0:
        ends = ((0, n_inner), (n_inner, n_conv), (n_inner + n_conv, n_heads))
        z, xbc, dt = (m.part("zxbcdt", first, width) for first, width in ends)
        return z, xbc, dt
    z, xbc, dt = m.buffer("z", n_inner), m.buffer("xbc", n_conv), m.buffer("dt", n_heads)
    m.ops.append(SplitHeads("zxbcdt", z, m.buffer("xbcdt", n_conv + n_heads), n_inner))
    m.ops.append(SplitHeads("xbcdt", xbc, dt, n_conv))
    return z, xbc, dt
