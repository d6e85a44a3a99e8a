"""The order in which ops become dispatches: one that others can be taken together with.

An expert that all tokens share begins before the others: its first products stand beside the router's, whose input they
have, and its last one behind those of the experts, whose sum it goes into. A norm of what a product is going to be
added to comes before that. Products come beside others of their input, or wait for those that they can go with, and
what is done by row waits for other rows. An op goes no further than what it reads and what reads or writes there allow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from edgellm.kernels.gpu.cuts import Cut
from edgellm.kernels.ops import (
    Activate,
    Add,
    Attention,
    CausalConv,
    GatedUnit,
    LayerNorm,
    Matmul,
    Op,
    RMSNorm,
    Route,
    Scale,
    SigmoidGate,
    SoftplusGate,
    SplitHeads,
    SSMGates,
    SSMScan,
)
from edgellm.kernels.program import Program

REACH = 16  # ops behind a router that are looked at


class _Names(NamedTuple):
    """Which buffers are parts of which, as a program has it, and by the cuts that are none."""

    program: Program
    halves: Mapping[str, str]

    def root(self, name: str) -> str:
        """The buffer that a name is a part of, or itself."""
        whole = self.program.root(name)
        return self.root(self.halves[whole]) if whole in self.halves else whole


def in_order(ops: Sequence[Op], cuts: Mapping[str, Cut], program: Program) -> list[Op]:
    """The ops but for cuts that are none (cuts.py), those that can go before a router in front of it."""
    names = _Names(program, {half: name for name, cut in cuts.items() for half in (cut.first, cut.second)})
    left, found = [op for op in ops if not (isinstance(op, SplitHeads) and op.x in cuts)], list[Op]()
    while left:
        op, before = left[0], found[-1] if found else None
        if isinstance(op, Route) and isinstance(before, Matmul) and before.out == op.logits:
            ahead = _ahead(left[:REACH], before, names)
            used = {name for one in ahead for name in one.read_buffers() if not isinstance(one, Matmul)}
            beside = [one for one in ahead if isinstance(one, Matmul) and one.out not in used]
            found += [*beside, *(one for one in ahead if one not in beside)]
            left = [one for one in left if not any(one is other for other in ahead)]
        found.append(left.pop(0))
    _bring_gates(found, names)
    _bring_products(found, names)
    _bring_convolutions(found, names)
    _bring_scans(found, names)
    _bring_rows(found, names)
    _bring_routers(found, names)
    _put_off_rows(found, names)
    _put_off_products(found, names)
    for i, (product, norm, add) in enumerate(zip(found, found[1:], found[2:], strict=False)):
        if not (isinstance(product, Matmul) and isinstance(norm, RMSNorm | LayerNorm) and isinstance(add, Add)):
            continue
        if product.out in (add.x, add.y) and _are_apart(product, norm, names):
            found[i : i + 2] = norm, product
    return found


def _bring_gates(ops: list[Op], names: _Names) -> None:
    """Put the product of a gate that stands behind attention before those that queries and keys come of."""
    for i in range(1, len(ops) - 1):
        product, gate = ops[i], ops[i + 1]
        if not (isinstance(gate, SigmoidGate | SoftplusGate) and isinstance(ops[i - 1], Attention)):
            continue
        if not isinstance(product, Matmul) or gate.gate != product.out:
            continue
        at = i
        while at and _are_apart(ops[at - 1], product, names):
            at -= 1
        alike = [k for k in range(at, i) if isinstance(one := ops[k], Matmul) and one.x == product.x]
        if alike:
            ops.insert(alike[0], ops.pop(i))


def _bring_products(ops: list[Op], names: _Names) -> None:
    """Put products of one input beside each other, where norms and rotations of what one makes stand between."""
    for i, op in enumerate(ops):
        at = i + 1
        while isinstance(op, Matmul) and at < len(ops) and isinstance(one := ops[at], Matmul) and one.x == op.x:
            at += 1
        for k in range(at, min(at + REACH, len(ops)) if isinstance(op, Matmul) else 0):
            one = ops[k]
            if not isinstance(one, Matmul) or not isinstance(op, Matmul) or one.x != op.x:
                continue
            if all(_are_apart(other, one, names) for other in ops[at:k]):
                ops.insert(at, ops.pop(k))
                at += 1


def _bring_convolutions(ops: list[Op], names: _Names) -> None:
    """Put a convolution behind the products of which one makes its input."""
    for k in range(len(ops)):
        at = k
        while at and isinstance(op := ops[k], CausalConv) and _are_apart(ops[at - 1], op, names):
            at -= 1
        while at < k and isinstance(ops[at], Matmul):
            at += 1
        ops.insert(at, ops.pop(k))


def _bring_scans(ops: list[Op], names: _Names) -> None:
    """Put a state space in front of what is done to queries and keys of an attention beside it."""
    for k in range(len(ops) - 1):
        if not isinstance(ops[k], SSMGates) or not isinstance(ops[k + 1], SSMScan):
            continue
        end = k + 2 + isinstance(ops[min(k + 2, len(ops) - 1)], GatedUnit)
        at, block = k, ops[k:end]
        while at and all(_are_apart(ops[at - 1], one, names) for one in block):
            at -= 1
        while at < k and isinstance(ops[at], Matmul):
            at += 1
        ops[at:end] = [*block, *ops[at:k]]


def _bring_rows(ops: list[Op], names: _Names) -> None:
    """Put norms of rows that stay as they are behind the first of what is done by row that they can stand with."""
    for i in range(1, len(ops)):
        if isinstance(norm := ops[i], RMSNorm | LayerNorm) and norm.out != norm.x and _is_by_row(norm, names):
            at = _last_touching(ops, i, names) + 1
            behind = next((k for k in range(max(at, 1), i) if _is_by_row(ops[k - 1], names)), i)
            ops.insert(behind, ops.pop(i))


def _bring_routers(ops: list[Op], names: _Names) -> None:
    """Put the product that experts are chosen by behind the first products that do not wait for it, nor it for them."""
    for i in range(1, len(ops) - 1):
        router, route = ops[i], ops[i + 1]
        if not (isinstance(router, Matmul) and isinstance(route, Route) and route.logits == router.out):
            continue
        at = _last_touching(ops, i, names) + 1
        while at < i and not isinstance(ops[at], Matmul):
            at += 1
        first = ops[at]
        while at < i and isinstance(one := ops[at], Matmul) and isinstance(first, Matmul) and one.x == first.x:
            at += 1
        at += at < i and isinstance(ops[at], GatedUnit | Activate)
        ops.insert(at, ops.pop(i))


def _put_off_rows(ops: list[Op], names: _Names) -> None:
    """Put what is done by row in front of the first of those that have to do with it, where that is done by row."""
    for i in reversed(range(len(ops) - 1)):
        if not _is_by_row(ops[i], names) or _is_by_row(ops[i + 1], names):
            continue
        k = _first_touching(ops, i, names)
        if k < len(ops) and _is_by_row(ops[k], names):
            ops.insert(k - 1, ops.pop(i))


def _is_by_row(op: Op, names: _Names) -> bool:
    if isinstance(op, RMSNorm):
        return names.program.tensors[op.weight].shape[-1] == names.program.buffers[op.x].width
    return isinstance(op, LayerNorm | Add | Scale)


def _put_off_products(ops: list[Op], names: _Names) -> None:
    """Put a product that nobody waits for beside the last one before who does, where both can be one dispatch."""
    for i in reversed(range(len(ops) - 1)):
        product, before = ops[i], ops[i - 1] if i else None
        if not isinstance(product, Matmul) or isinstance(ops[i + 1], Matmul):
            continue
        if isinstance(before, Matmul) and before.x == product.x:
            continue
        behind = range(i + 2, min(_first_touching(ops, i, names), len(ops) - 1))
        beside = [
            j for j in behind
            if isinstance(ops[j], Matmul) and not isinstance(ops[j - 1], Matmul)
            and isinstance(ops[j + 1], RMSNorm | LayerNorm | Add)
        ]  # fmt: skip
        if beside:
            ops.insert(beside[-1] - 1, ops.pop(i))


def _first_touching(ops: Sequence[Op], i: int, names: _Names) -> int:
    """The first op behind this one that is to stay behind it; the number of ops where there is none."""
    return next((k for k in range(i + 1, len(ops)) if not _are_apart(ops[k], ops[i], names)), len(ops))


def _last_touching(ops: Sequence[Op], i: int, names: _Names) -> int:
    """The last op before this one that is to stay before it; -1 where there is none."""
    return next((k for k in reversed(range(i)) if not _are_apart(ops[k], ops[i], names)), -1)


def _are_apart(one: Op, other: Op, names: _Names) -> bool:
    """Whether two ops can be in any order."""
    (read, written), (reads, writes) = (_touched(op, names) for op in (one, other))
    return not (reads & written or writes & (written | read))


def _touched(op: Op, names: _Names) -> tuple[set[str], set[str]]:
    """The buffers, and layers of the cache, that an op reads, and that it writes."""
    read, written = ({names.root(one) for one in some} for some in (op.read_buffers(), op.written_buffers()))
    read |= {f"layer {layer}" for layer in op.read_layers()}
    written |= {f"layer {layer}" for layer in op.written_layers()}
    return read, written


def _ahead(ops: Sequence[Op], router: Matmul, names: _Names) -> list[Op]:
    """What reads the router's input, or what such ops make, and nothing that the first of ``ops`` have to do with."""
    read, written, made, found = set[str](), set[str](), set[str](), list[Op]()
    for op in ops:
        reads, writes = _touched(op, names)
        is_apart = not (reads & written or writes & (written | read))
        is_first = isinstance(op, Matmul) and op.x == router.x
        if is_apart and (is_first or (isinstance(op, GatedUnit | Activate) and reads <= made)):
            found.append(op)
            made |= writes
        else:
            read |= reads
            written |= writes
    return found
