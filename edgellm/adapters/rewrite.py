"""A program with the branches of adapters: the same ops, and beside products the low-rank ones of ``kernels.ops``.

All branches that read one buffer share an op for A; those for B stand behind the last of these products, where the
threads of an executor meet in any case. What an adapter has for no product of the program is an error by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from edgellm.adapters.adapter_file import refused, wrong
from edgellm.adapters.control_vector import ControlVector
from edgellm.adapters.lora import LoraAdapter, LoraPair
from edgellm.formats.errors import UnsupportedError
from edgellm.formats.findings import short
from edgellm.formats.gguf import QuantizedTensor
from edgellm.kernels.ops import AdapterDown, AdapterUp, AddDirection, AddToStreams, Embed, ExpertMatmul, Matmul
from edgellm.kernels.ops.adapters import AdapterWeight
from edgellm.kernels.program import Buffer, Op, Program

ALIGN = 16  # columns: where what the next A makes may begin

Adapter = LoraAdapter | ControlVector
Product = Matmul | ExpertMatmul


def adapted(program: Program, adapters: Sequence[Adapter]) -> Program:
    """The program with branches for all of these; ``Batch.adapters`` has their scales in this order.

    FormatError ADAPTER_MODEL for an adapter of another model, UnsupportedError for what it changes and edgellm cannot.
    """
    if program.is_encoder:
        raise UnsupportedError(
            f"{adapters[0].path.name}: adapters are for models that write text, and this {program.architecture} model "
            "makes vectors of it. Merge the adapter into the model.",
            code="ADAPTER_UNSUPPORTED",
        )
    made = _Rewriting(program, len(adapters))
    for i, adapter in enumerate(adapters):
        if isinstance(adapter, LoraAdapter):
            made.add_lora(i, adapter)
        else:
            made.add_vector(i, adapter)
    return made.program()


@dataclass
class _Rewriting:
    """Branches by the index of the op that they stand beside, and what is made of them."""

    of: Program
    n_adapters: int
    branches: dict[int, list[tuple[int, LoraPair]]] = field(default_factory=dict)
    directions: dict[int, list[AdapterWeight]] = field(default_factory=dict)
    tensors: dict[str, QuantizedTensor] = field(default_factory=dict)
    buffers: dict[str, Buffer] = field(default_factory=dict)
    ops: list[Op] = field(default_factory=list)
    pending: list[AdapterUp] = field(default_factory=list)  # behind products that are not all there yet
    columns: dict[int, tuple[str, int]] = field(default_factory=dict)  # of a product in h, by its index

    # -- what goes where ---------------------------------------------------------------------------------------------

    def add_lora(self, number: int, adapter: LoraAdapter) -> None:
        """Find the products of its pairs."""
        if adapter.architecture != self.of.architecture:
            found, expected = f"it is of a {short(adapter.architecture)} model", f"one of a {self.of.architecture}"
            raise _other_model(adapter, found, expected)
        for name, pair in adapter.pairs.items():
            places = [i for i, op in enumerate(self.of.ops) if self._is_place(op, name)]
            if not places:
                there = name in self.of.tensors
                what = f"changes {short(name)}, which " + (
                    "is not multiplied as a whole here" if there else "this model has not"
                )
                raise refused(adapter.path, what, "Take the adapter of this model, or merge it into the model.")
            for i in places:
                self._check_shapes(adapter, pair, self.of.ops[i])
                self.branches.setdefault(i, []).append((number, pair))
            self._take(number, pair)

    def _is_place(self, op: Op, name: str) -> bool:
        if isinstance(op, Embed):
            return op.embeds and op.weight == name
        if not isinstance(op, Product):
            return False
        if name == "output.weight" and name not in self.of.tensors:  # the embedding's numbers, with a branch of its own
            return op.out == self.of.output and isinstance(op, Matmul)
        return op.weight == name and name != "token_embd.weight"

    def _check_shapes(self, adapter: LoraAdapter, pair: LoraPair, op: Op) -> None:
        assert isinstance(op, Embed | Product)
        shape = self.of.tensors[op.weight].shape
        expected = (*shape[:-2], pair.rank, shape[-1]), (*shape[:-1], pair.rank)
        if isinstance(op, Embed):  # a row of A for each token
            expected = (shape[0], pair.rank), (shape[1], pair.rank)
        if (pair.a.shape, pair.b.shape) != expected:
            found = f"{pair.weight} has A {pair.a.shape} and B {pair.b.shape}"
            raise _other_model(adapter, found, f"{expected[0]} and {expected[1]} for the model's {shape}")

    def _take(self, number: int, pair: LoraPair) -> None:
        for half, tensor in (("a", pair.a), ("b", pair.b)):
            self.tensors[_name(number, pair, half)] = replace(tensor, name=_name(number, pair, half))

    def add_vector(self, number: int, vector: ControlVector) -> None:
        """Find the ends of its layers."""
        ends = layer_ends(self.of)
        for layer, tensor in vector.directions.items():
            if tensor.shape != (self.of.n_embd,):
                found = f"direction.{layer} has {tensor.shape[0]} numbers"
                raise _other_model(vector, found, f"{self.of.n_embd} as the model's rows have")
            if layer not in ends:
                raise _other_model(vector, f"has the layer {layer}", f"layers up to {max(ends)}")
            if layer in vector.counted:
                name = f"adapter {number} {tensor.name}"
                self.tensors[name] = replace(tensor, name=name)
                self.directions.setdefault(ends[layer], []).append(AdapterWeight(number, name))

    # -- the ops -----------------------------------------------------------------------------------------------------

    def program(self) -> Program:
        """All of it."""
        for i, op in enumerate(self.of.ops):
            if self.pending and (not isinstance(op, Product) or self._touches_pending(op)):
                self._flush()
            if i in self.branches and isinstance(op, Product) and i not in self.columns:
                self._open_group(i, op)
            self.ops.append(op)
            if i in self.branches:
                self._branch(i, op)
            if i in self.directions:
                parts = tuple(self.directions[i])
                self.ops += [AddDirection(x, parts) for x in self._streams(op.written_buffers()[0])]
        self._flush()
        return replace(
            self.of,
            ops=tuple(self.ops),
            buffers=self.of.buffers | self.buffers,
            tensors=self.of.tensors | self.tensors,
            n_adapters=self.n_adapters,
        )

    def _streams(self, x: str) -> list[str]:
        """What leaves a layer as rows of the model's width: x itself, or each of several that lie in it."""
        whole, n_embd = self.of.buffers[x], self.of.n_embd
        if whole.width == n_embd:
            return [x]
        parts = [
            replace(whole, name=f"{x}[{first}:{first + n_embd}]", width=n_embd, of=x, first=first)
            for first in range(0, whole.width, n_embd)
        ]
        self.buffers |= {part.name: part for part in parts}
        return [part.name for part in parts]

    def _touches_pending(self, op: Op) -> bool:
        root = self.of.root
        touched = {root(name) for name in (*op.read_buffers(), *op.written_buffers())}
        return any(root(up.out) in touched for up in self.pending)

    def _flush(self) -> None:
        self.ops += self.pending
        self.pending = []

    def _open_group(self, first: int, op: Product) -> None:
        """A x for this product and all that follow and read the same x, as long as it is the same."""
        root, parts, members = self.of.root, list[AdapterWeight](), dict[int, int]()
        width = 0
        for i in range(first, len(self.of.ops)):
            other = self.of.ops[i]
            if i in self.branches and isinstance(other, Product) and _reads(other) == _reads(op):
                members[i] = width
                for number, pair in self.branches[i]:
                    parts.append(AdapterWeight(number, _name(number, pair, "a"), width))
                    width += -(-pair.rank // ALIGN) * ALIGN
            if {root(name) for name in other.written_buffers()} & {root(name) for name in op.read_buffers()}:
                break
        ids, n_used = _slots(op)
        h = f"adapters of {op.x} {width}" + (f" by {ids}" if ids else "")
        self.buffers[h] = Buffer(h, width * n_used, self.of.buffers[op.x].rows)
        self.ops.append(AdapterDown(op.x, h, tuple(parts), ids, n_used))
        self.columns |= {i: (h, column) for i, column in members.items()}

    def _branch(self, i: int, op: Op) -> None:
        """B h for one product, or for rows of the embedding."""
        if isinstance(op, Embed):
            for number, pair in self.branches[i]:
                h = f"adapter {number} of {op.out}"
                self.buffers[h] = Buffer(h, pair.rank)
                part = AdapterWeight(number, _name(number, pair, "b"), 0, pair.factor * op.scale)
                self.ops += [Embed(_name(number, pair, "a"), h, 1.0, False), AdapterUp(h, op.out, (part,))]
            return
        assert isinstance(op, Product)
        h, column = self.columns[i]
        parts = []
        for number, pair in self.branches[i]:
            parts.append(AdapterWeight(number, _name(number, pair, "b"), column, pair.factor))
            column += -(-pair.rank // ALIGN) * ALIGN
        self.pending.append(AdapterUp(h, op.out, tuple(parts), *_slots(op)))


def _name(number: int, pair: LoraPair, half: str) -> str:
    return f"adapter {number} {pair.weight}.lora_{half}"


def _reads(op: Product) -> tuple[str, str | None]:
    return op.x, op.ids if isinstance(op, ExpertMatmul) else None


def _slots(op: Product) -> tuple[str | None, int]:
    return (op.ids, op.n_used) if isinstance(op, ExpertMatmul) else (None, 1)


def layer_ends(program: Program) -> Mapping[int, int]:
    """For each layer the index of the op that makes what leaves it; UnsupportedError where there is no such op."""
    stream = next((op.out for op in program.ops if isinstance(op, Embed) and op.embeds), "")
    stream = next((op.out for op in program.ops if isinstance(op, AddToStreams)), stream)
    ends: dict[int, int] = {}
    layer = -1
    for i, op in enumerate(program.ops):
        found = [re.match(r"blk\.(\d+)\.", name, re.ASCII) for name in op.weight_names()]
        layer = max([layer, *(int(one[1]) for one in found if one is not None)])
        if layer >= 0 and stream in op.written_buffers():
            ends[layer] = i
    if not ends or sorted(ends) != list(range(len(ends))) or len(ends) != layer + 1:
        raise UnsupportedError(
            f"Where the layers of a {program.architecture} model end edgellm cannot tell, and so it cannot be steered "
            "with a control vector. Take another model.",
            code="ADAPTER_UNSUPPORTED",
        )
    return ends


def _other_model(adapter: Adapter, found: str, expected: str) -> Exception:
    error = wrong(adapter.path, found, expected, "It is an adapter of another model: give the one for this.")
    error.code = "ADAPTER_MODEL"
    return error
