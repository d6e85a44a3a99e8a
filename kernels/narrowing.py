"""The end of a program for few rows: what follows the last op that mixes rows, for the tokens that want logits alone.

Where the last layers keep nothing of their own and read what earlier ones keep, the end for few rows is longer: it
begins behind the last op that writes a cache (``last_write``).

A prompt wants the logits of its last token, and nothing after the last attention mixes rows. The program itself
selects its rows at the very end, so that a hook sees every token in every layer; this is for executors without a hook.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from edgellm.formats.errors import UnsupportedError
from edgellm.kernels.ops import Op, SelectOutputs
from edgellm.kernels.program import Buffer, Program


@dataclass(frozen=True)
class OutputTail:
    """``ops`` do for the rows that want logits what the program's ops from ``start`` on do; ``buffers`` are theirs.

    names   of the program's buffers whose chosen rows are in one of these
    """

    start: int
    ops: tuple[Op, ...]
    buffers: dict[str, Buffer]
    names: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class LastWrite:
    """``start`` is the op behind the last one that writes a cache; ``buffers`` have rows that are read from there."""

    start: int
    buffers: tuple[str, ...]


def hidden_end(program: Program) -> int:
    """One past the op that makes the rows which logits are made of. UnsupportedError where there are none."""
    made = [i + 1 for i, op in enumerate(program.ops) if program.hidden in op.written_buffers()]
    if not made:
        raise UnsupportedError(
            f"{program.architecture}: this program has no hidden states to give. Take another model for embeddings.",
            code="EMBEDDINGS",
        )
    return made[0]


@dataclass(frozen=True)
class Result:
    """What a step is to give, logits or hidden states.

    end, tail_end      one past the ops that make it, in the program and in its tail
    name, tail_name    the buffer that it is in behind these
    selected           the buffer whose chosen rows it has as they are; "" where something is computed of them
    """

    end: int
    tail_end: int
    name: str
    tail_name: str
    selected: str


def result_of(program: Program, tail: OutputTail, *, hidden: bool) -> Result:
    """Logits, or hidden states. UnsupportedError where a program has none of these."""
    end, name = (hidden_end(program), program.hidden) if hidden else (len(program.ops), program.output)
    last = program.ops[end - 1]
    selected = last.x if isinstance(last, SelectOutputs) else ""
    return Result(end, len(tail.ops) - (len(program.ops) - end), name, tail.names.get(name, name), selected)


def _taps(program: Program, op: Op) -> bool:
    """Whether it makes what is wanted of all tokens."""
    return bool(program.tapped) and program.tapped in op.written_buffers()


def last_write(program: Program) -> LastWrite | None:
    """Where the rows of tokens that want no logits can be dropped; None where ``output_tail`` drops them as well."""
    start = max((i + 1 for i, op in enumerate(program.ops) if op.written_layers() or _taps(program, op)), default=0)
    chooses = any(isinstance(op, SelectOutputs) for op in program.ops[:start])
    if chooses or sum(bool(op.read_layers()) for op in program.ops[start:]) < 2:
        return None
    read, written = dict[str, None](), set[str]()
    for op in program.ops[start:]:
        read |= dict.fromkeys(root for name in op.read_buffers() if (root := program.root(name)) not in written)
        written |= {name for name in op.written_buffers() if not program.buffers[name].of}
    return LastWrite(start, tuple(name for name in read if program.buffers[name].rows == "tokens"))


def output_tail(program: Program) -> OutputTail | None:
    """The tail of a program; None where rows are mixed after they were chosen, or a value has two names."""
    by_row = [(op.by_row or isinstance(op, SelectOutputs)) and not _taps(program, op) for op in program.ops]
    mixing = [i for i, alone in enumerate(by_row) if not alone]
    start = mixing[-1] + 1 if mixing else 0
    parts = {name for buffer in program.buffers.values() if buffer.of for name in (buffer.name, buffer.of)}
    in_parts = any(parts.intersection(op.written_buffers()) for op in program.ops[start:])
    if in_parts or any(isinstance(op, SelectOutputs) for op in program.ops[:start]):
        return None
    ops, buffers, names = list[Op](), dict[str, Buffer](), dict[str, str]()

    def chosen(name: str, *, written: bool = False) -> str:
        """The buffer with the chosen rows of ``name``, made with a selection where the tail did not write it."""
        if name not in names and program.buffers[name].rows == "tokens":
            names[name] = f"{name} of outputs"
            buffers[names[name]] = replace(program.buffers[name], name=names[name], rows="outputs", of="", first=0)
            if not written:
                ops.append(SelectOutputs(name, names[name]))
        return names.get(name, name)

    for op in program.ops[start:]:
        if isinstance(op, SelectOutputs):
            names[op.out] = chosen(op.x)
            continue
        changed = {field: chosen(getattr(op, field)) for field in op.reads if getattr(op, field) is not None}
        changed |= {field: chosen(getattr(op, field), written=True) for field in op.writes}
        if any(list(names.values()).count(changed[field]) > 1 for field in op.writes):
            return None
        ops.append(replace(op, **changed))
    return OutputTail(start, tuple(ops), buffers, names)
