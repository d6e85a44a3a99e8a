"""The end of a program for few rows: what follows the last attention, computed for the tokens that want logits alone.

A prompt wants the logits of its last token, and nothing after the last attention mixes rows. The program itself
selects its rows at the very end, so that a hook sees every token in every layer; this is for executors without a hook.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from edgellm.kernels.ops import Add, Attention, GatedUnit, Matmul, Op, RMSNorm, SelectOutputs
from edgellm.kernels.program import Buffer, Program

_READS: dict[type, tuple[str, ...]] = {RMSNorm: ("x",), Matmul: ("x",), GatedUnit: ("gate", "up"), Add: ("x", "y")}


@dataclass(frozen=True)
class OutputTail:
    """``ops`` do for the rows that want logits what the program's ops from ``start`` on do; ``buffers`` are theirs."""

    start: int
    ops: tuple[Op, ...]
    buffers: dict[str, Buffer]


def output_tail(program: Program) -> OutputTail | None:
    """The tail of a program; None where an op behind the last attention mixes rows, or a buffer is part of another."""
    attention = [i for i, op in enumerate(program.ops) if isinstance(op, Attention)]
    if not attention or any(buffer.of for buffer in program.buffers.values()):
        return None
    start, ops, buffers, names = attention[-1] + 1, list[Op](), dict[str, Buffer](), dict[str, str]()

    def chosen(name: str, *, written: bool = False) -> str:
        """The buffer with the chosen rows of ``name``, made with a selection where the tail did not write it."""
        if name not in names and program.buffers[name].rows == "tokens":
            names[name] = f"{name} of outputs"
            buffers[names[name]] = Buffer(names[name], program.buffers[name].width, "outputs")
            if not written:
                ops.append(SelectOutputs(name, names[name]))
        return names.get(name, name)

    for op in program.ops[start:]:
        if isinstance(op, SelectOutputs):
            names[op.out] = chosen(op.x)
        elif isinstance(op, RMSNorm | Matmul | GatedUnit | Add) and op.out not in names.values():
            changed: dict[str, Any] = {name: chosen(getattr(op, name)) for name in _READS[type(op)]}
            changed["out"] = chosen(op.out, written=True)
            ops.append(dataclasses.replace(op, **changed))
        else:
            return None
    return OutputTail(start, tuple(ops), buffers)
