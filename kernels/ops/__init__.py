"""The kinds of op that a program is made of: one module a family, each op with what judges it.

To add an op, write a module here with a frozen dataclass derived from ``Op``:

    fields      what one op of the kind is: names of buffers and weights, a layer of the cache, numbers
    ClassVars   which of these fields it reads, writes and weighs with, what it does to the cache of its ``layer``, and
                whether it goes row by row (see ``Op``)
    reference   the op in plain numpy, on a ``Step``
    trial       a few of them in odd shapes, for the self-test of kernels and the tests of ops

and name it in OPS. Whatever goes over a program (narrowing, calibration, bandwidth, the order of the CPU's rows) asks
the op and need not change. Then every executor that is to run it has a kernel: the CPU's is a function below
``kernels/cpu/kernels/`` with a row in ``kernel_table.py``, and a rule in ``lowering.py``.
"""

from edgellm.kernels.ops.adapters import AdapterDown, AdapterUp, AddDirection
from edgellm.kernels.ops.altup import AddToStreams, MatchMagnitude, MixStreams, ScaleColumns
from edgellm.kernels.ops.attention import Attention, StoreKV
from edgellm.kernels.ops.delta_net import DeltaGates, DeltaRule
from edgellm.kernels.ops.elementwise import (
    Activate,
    Add,
    Clamp,
    GatedUnit,
    JoinHeads,
    Scale,
    SigmoidGate,
    Softcap,
    SoftplusGate,
    SplitHeads,
)
from edgellm.kernels.ops.embed import Embed
from edgellm.kernels.ops.encoder import AddRows, SelfAttention
from edgellm.kernels.ops.experts import ExpertMatmul, ExpertSum, Route
from edgellm.kernels.ops.full_blocks import BoundKeys, ChooseBlocks, PackKV
from edgellm.kernels.ops.hadamard import Hadamard
from edgellm.kernels.ops.matmul import HeadMatmul, Matmul
from edgellm.kernels.ops.norms import LayerNorm, RMSNorm
from edgellm.kernels.ops.outputs import SelectOutputs
from edgellm.kernels.ops.rope import ApplyRope
from edgellm.kernels.ops.short_conv import CausalConv, ShortConv
from edgellm.kernels.ops.sparsity import GaussianTopK
from edgellm.kernels.ops.state_space import GatedNorm, SSMGates, SSMScan
from edgellm.kernels.program import Op

__all__ = [
    "OPS",
    "Activate",
    "AdapterDown",
    "AdapterUp",
    "Add",
    "AddDirection",
    "AddRows",
    "AddToStreams",
    "ApplyRope",
    "Attention",
    "BoundKeys",
    "CausalConv",
    "ChooseBlocks",
    "Clamp",
    "DeltaGates",
    "DeltaRule",
    "Embed",
    "ExpertMatmul",
    "ExpertSum",
    "GatedNorm",
    "GatedUnit",
    "GaussianTopK",
    "Hadamard",
    "HeadMatmul",
    "JoinHeads",
    "LayerNorm",
    "MatchMagnitude",
    "Matmul",
    "MixStreams",
    "Op",
    "PackKV",
    "RMSNorm",
    "Route",
    "SSMGates",
    "SSMScan",
    "Scale",
    "ScaleColumns",
    "SelectOutputs",
    "SelfAttention",
    "ShortConv",
    "SigmoidGate",
    "Softcap",
    "SoftplusGate",
    "SplitHeads",
    "StoreKV",
]

OPS: tuple[type[Op], ...] = (
    Embed, RMSNorm, Matmul, ApplyRope, StoreKV, Attention, ShortConv, GatedUnit, Add, SelectOutputs,
    Route, ExpertMatmul, ExpertSum, Scale, SigmoidGate, Softcap, SplitHeads, CausalConv, DeltaGates, DeltaRule,
    LayerNorm, Activate, AddRows, SelfAttention, SSMGates, SSMScan, GatedNorm, SoftplusGate,
    HeadMatmul, JoinHeads, AdapterDown, AdapterUp, AddDirection,
    Hadamard, Clamp, PackKV, BoundKeys, ChooseBlocks,
    MixStreams, AddToStreams, MatchMagnitude, ScaleColumns, GaussianTopK,
)  # fmt: skip
