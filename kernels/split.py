"""One program on several devices: cut where neighbouring ops stand on different ones, with an executor for each device.

Every device has a program of its own ops and nothing else: its weights, its layers of the cache, its buffers. What one
has written and another reads is carried over before the ops that read it, whole buffers at a time; a program that is
cut at one layer crosses once. A token's numbers come from the same ops on the same devices in every batch, so they keep
the promises of the executors.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import numpy as np

from edgellm.formats.errors import ClosedError, ParameterError
from edgellm.kernels.batch_checks import check_logits
from edgellm.kernels.draw import Draw
from edgellm.kernels.kv import CachePool, groups_of
from edgellm.kernels.narrowing import OutputTail, Result, output_tail, result_of
from edgellm.kernels.ops import AdapterDown, SelectOutputs
from edgellm.kernels.ops.embed import embedding_of
from edgellm.kernels.program import Batch, Hook, Op, Program


class PartExecutor(Protocol):
    """An executor that can run some ops of its program; the whole is put together here."""

    program: Program
    pool: CachePool

    @property
    def draw(self) -> Draw | None:
        """See ``Executor``."""
        ...

    def close(self) -> None:
        """See ``Executor``."""
        ...

    @property
    def max_outputs(self) -> int:
        """Rows of an ``outputs`` buffer."""
        ...

    def begin(self, batch: Batch, outputs: Sequence[int]) -> None:
        """Take a batch, proved first; ``outputs`` are the rows whose logits are computed next."""
        ...

    def outputs(self, rows: Sequence[int]) -> None:
        """Other rows of the same batch."""
        ...

    def run_ops(self, first: int, last: int, *, alone: bool = False) -> None:
        """Run the ops [first, last); ``alone``: each by itself, for hooks, which may have changed what it reads."""
        ...

    def read(self, name: str) -> np.ndarray:
        """The rows of a buffer in this step, writable; a copy, or the buffer itself."""
        ...

    def write(self, name: str, values: np.ndarray) -> None:
        """Put rows into a buffer."""
        ...


@runtime_checkable
class DrawingPart(PartExecutor, Protocol):
    """A part that has the logits and draws from them where they are."""

    def drawn(self, draws: Sequence[Any]) -> list[int]:
        """A token for each row of logits of this step; -1 where one of them is not finite."""
        ...


@dataclass(frozen=True)
class Crossing(Op):
    """Where the value of a buffer comes from another device, or goes to one: no kernel runs."""

    name, reads, writes, by_row, computes = "crossing", ("x",), ("x",), True, False

    x: str

    def reference(self, step: Any) -> None:
        """Nothing: the value is there."""

    @staticmethod
    def trial(s: Any, variant: str = "") -> None:
        """Nothing to try."""


class Stretch(NamedTuple):
    """Neighbouring ops [first, last) of the whole program on one device, [at, end) in the program of that device."""

    part: int
    first: int
    last: int
    at: int = 0
    end: int = 0


class Walk(NamedTuple):
    """A stretch in the order of a step, and what it takes from others first: (buffer, from which part)."""

    stretch: int
    takes: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Cut:
    """A program in parts.

    whole       the program, and behind its ops those of its output tail
    programs    of the parts, None for one without ops
    stretches   in the order of the whole program, whose ops end with its output tail
    layers      of each part: which layers of the whole cache it has
    adapted     ``Program.adapted`` in the same parts, whose programs are the ``adapted`` of these
    """

    program: Program
    whole: Program
    tail: OutputTail
    programs: tuple[Program | None, ...]
    stretches: tuple[Stretch, ...]
    layers: tuple[tuple[int, ...], ...]
    adapted: Cut | None = None

    def walk(self, *ranges: tuple[int, int]) -> list[list[Walk]]:
        """The stretches of ranges of ops that are run one after the other, a list for each range."""
        return _walks(self.whole, self.stretches, ranges)

    def n_blocks(self, part: int, n_blocks: Sequence[int]) -> list[int]:
        """What a part needs of the blocks of the whole."""
        layers = [self.whole.cache_layers[i] for i in self.layers[part]]
        return [n_blocks[self.whole.groups.index(group)] for group in groups_of(layers)]

    @property
    def n_crossings(self) -> int:
        """How often a value changes devices in a step that wants the logits of every token."""
        return sum(len(walk.takes) for walk in self.walk((0, len(self.program.ops)))[0])


def cut(program: Program, sides: Sequence[int], n_parts: int) -> Cut:
    """Cut a program; ``sides[i]`` is the part that op i goes to."""
    adapted = None
    if program.adapted is not None:
        adapted = cut(program.adapted, _adapted_sides(program, program.adapted, sides), n_parts)
    tail = output_tail(program) or OutputTail(len(program.ops), (), {})
    whole = replace(program, ops=(*program.ops, *tail.ops), buffers={**program.buffers, **tail.buffers})
    n = len(program.ops)
    stretches = _stretches(program, [*sides, *_tail_sides(program, sides, tail)], tail)
    begins: list[set[str]] = [set() for _ in stretches]
    ends: list[set[str]] = [set() for _ in stretches]
    for ranges in ([(0, n)], [(0, tail.start), (n, len(whole.ops))]):
        for walk, wrote in _sources(whole, stretches, ranges):
            begins[walk.stretch].update(name for name, _ in walk.takes)
            for name, _ in walk.takes:
                ends[wrote[name]].add(name)
    ops: list[list[Op]] = [[] for _ in range(n_parts)]
    for i, (part, first, last, _, _) in enumerate(stretches):
        at = len(ops[part])
        ops[part] += [*map(Crossing, sorted(begins[i])), *whole.ops[first:last], *map(Crossing, sorted(ends[i]))]
        stretches[i] = Stretch(part, first, last, at + len(begins[i]), at + len(begins[i]) + last - first)
    layers = [_layers_of(part_ops) for part_ops in ops]
    others = adapted.programs if adapted else [None] * n_parts
    programs = [_part(whole, *of) if of[0] else None for of in zip(ops, layers, others, strict=True)]
    return Cut(program, whole, tail, tuple(programs), tuple(stretches), tuple(layers), adapted)


def _adapted_sides(program: Program, adapted: Program, sides: Sequence[int]) -> list[int]:
    """The parts of the ops of ``Program.adapted``: what stands beside an op goes where that one is."""
    found, at = list[int](), 0
    for op in adapted.ops:
        is_own = at < len(program.ops) and op == program.ops[at]
        if is_own or isinstance(op, AdapterDown):  # what it reads is what the op behind it reads
            found.append(sides[at])
        else:
            found.append(sides[at - 1])
        at += is_own
    assert at == len(program.ops), "the same ops, and more"
    return found


def _tail_sides(program: Program, sides: Sequence[int], tail: OutputTail) -> list[int]:
    """The parts of the tail's ops: those of the ops that they stand for; rows are selected where they are."""
    wrote = {program.root(name): side for op, side in zip(program.ops[: tail.start], sides, strict=False)
             for name in op.written_buffers()}  # fmt: skip
    of = iter([side for op, side in zip(program.ops[tail.start :], sides[tail.start :], strict=True)
               if not isinstance(op, SelectOutputs)])  # fmt: skip
    return [wrote[program.root(op.x)] if isinstance(op, SelectOutputs) else next(of) for op in tail.ops]


def _stretches(program: Program, sides: Sequence[int], tail: OutputTail) -> list[Stretch]:
    """Cut where the side changes, and where a step may end or begin."""
    n, embedding = len(program.ops), embedding_of(program)
    selects = [i for i, op in enumerate(program.ops) if isinstance(op, SelectOutputs)]
    marks = {0, n, tail.start, len(sides), *selects[:1], *(() if embedding is None else (embedding, embedding + 1))}
    if program.hidden:
        result = result_of(program, tail, hidden=True)
        marks |= {result.end, n + result.tail_end} if tail.ops else {result.end}
    marks |= {i for i in range(1, len(sides)) if sides[i] != sides[i - 1]}
    return [Stretch(sides[first], first, last) for first, last in itertools.pairwise(sorted(marks))]


def _walks(whole: Program, stretches: Sequence[Stretch], ranges: Sequence[tuple[int, int]]) -> list[list[Walk]]:
    found: list[list[Walk]] = [[] for _ in ranges]
    for walk, _ in _sources(whole, stretches, ranges):
        first = stretches[walk.stretch].first
        found[next(i for i, (a, b) in enumerate(ranges) if a <= first < b)].append(walk)
    return found


def _sources(
    whole: Program, stretches: Sequence[Stretch], ranges: Sequence[tuple[int, int]]
) -> Iterator[tuple[Walk, dict[str, int]]]:
    """Each stretch of a step with what it takes, and the stretch that wrote each buffer last."""
    wrote: dict[str, int] = {}
    current: dict[str, set[int]] = {}  # of each buffer: the parts that have its value
    for first, last in ranges:
        for i, stretch in enumerate(stretches):
            if not first <= stretch.first < last:
                continue
            ops = whole.ops[stretch.first : stretch.last]
            missing = [name for name in _read_first(whole, ops) if name in current]
            takes = [name for name in missing if stretch.part not in current[name]]
            yield Walk(i, tuple((name, stretches[wrote[name]].part) for name in takes)), dict(wrote)
            for name in takes:
                current[name].add(stretch.part)
            for name in {whole.root(name) for op in ops for name in op.written_buffers()}:
                wrote[name], current[name] = i, {stretch.part}


def _read_first(whole: Program, ops: Iterable[Op]) -> list[str]:
    """The buffers whose earlier value some ops need; one of which they write some columns keeps its others."""
    found, written = dict[str, None](), set[str]()
    for op in ops:
        parts = [name for name in op.written_buffers() if whole.buffers[name].of]
        found |= {whole.root(name): None for name in (*op.read_buffers(), *parts) if whole.root(name) not in written}
        written.update(name for name in op.written_buffers() if not whole.buffers[name].of)
    return list(found)


def _layers_of(ops: Iterable[Op]) -> tuple[int, ...]:
    return tuple(sorted({layer for op in ops for layer in (*op.read_layers(), *op.written_layers())}))


def _with_layers(op: Op, layers: Sequence[int]) -> Op:
    """An op of the cache, over the numbers that its layers have in a part."""
    numbers = {name: getattr(op, name, None) for name in ("layer", "newest")}
    return replace(op, **{name: layers.index(i) for name, i in numbers.items() if i is not None})


def _part(whole: Program, ops: Sequence[Op], layers: Sequence[int], adapted: Program | None) -> Program:
    """A program of some ops; they keep the names of their buffers and weights, and count their own layers."""
    own = [_with_layers(op, layers) if op.cache else op for op in ops]
    used = {name for op in own for name in (*op.read_buffers(), *op.written_buffers())}
    used |= {whole.root(name) for name in used}
    ropes = {op.rope for op in own if hasattr(op, "rope")}
    return replace(
        whole,
        ops=tuple(own),
        buffers={name: buffer for name, buffer in whole.buffers.items() if name in used},
        tensors={name: whole.tensors[name] for op in own for name in op.weight_names()},
        cache_layers=tuple(whole.cache_layers[i] for i in layers),
        ropes={name: rope for name, rope in whole.ropes.items() if name in ropes},
        adapted=adapted,
        log_rows=0,
    )


class SplitPool(CachePool):
    """The cache of a program in parts: every layer where its ops are, behind the block tables of the whole."""

    def __init__(
        self, whole: Program, pools: Sequence[CachePool], layers: Sequence[Sequence[int]], n_blocks: Sequence[int]
    ) -> None:
        self.layers, self.groups, self.n_blocks = whole.cache_layers, whole.groups, tuple(n_blocks)
        self.dtype = pools[0].dtype
        where = {layer: (pool, i) for pool, own in zip(pools, layers, strict=True) for i, layer in enumerate(own)}
        self.arrays = [where[i][0].arrays[where[i][1]] for i in range(len(self.layers))]
        self._pools, self._pool_of = tuple(pools), [where[i][0] for i in range(len(self.layers))]

    def block_nbytes(self, group: int) -> int:
        """Of one block, in all layers."""
        return sum(nbytes for _, nbytes in self._sizes(group))

    def _having(self, group: int) -> Iterator[tuple[CachePool, int]]:
        """The pools with layers of a group, and what they call it."""
        for pool in self._pools:
            if self.groups[group] in pool.groups:
                yield pool, pool.groups.index(self.groups[group])

    def _sizes(self, group: int) -> Iterator[tuple[CachePool, int]]:
        """For every layer of a group: its pool, and the bytes of a block."""
        for layer, arrays, pool in zip(self.layers, self.arrays, self._pool_of, strict=True):
            if layer.group == self.groups[group]:
                yield pool, sum(array.nbytes // max(1, array.shape[0]) for array in arrays)

    def copy_block(self, group: int, source: int, target: int) -> None:
        """Copy one block of every layer of a group (copy on write)."""
        for pool, own in self._having(group):
            pool.copy_block(own, source, target)

    def read_block(self, group: int, block: int) -> bytes:
        """One block of every layer of a group, layer after layer."""
        data = {id(pool): pool.read_block(own, block) for pool, own in self._having(group)}
        at, pieces = dict.fromkeys(data, 0), list[bytes]()
        for pool, nbytes in self._sizes(group):
            pieces.append(data[id(pool)][at[id(pool)] : at[id(pool)] + nbytes])
            at[id(pool)] += nbytes
        return b"".join(pieces)

    def write_block(self, group: int, block: int, data: bytes | memoryview) -> None:
        """What ``read_block`` gave, into another block."""
        pieces: dict[int, list[bytes]] = {}
        start = 0
        for pool, nbytes in self._sizes(group):
            pieces.setdefault(id(pool), []).append(bytes(data[start : start + nbytes]))
            start += nbytes
        for pool, own in self._having(group):
            pool.write_block(own, block, b"".join(pieces[id(pool)]))


class _Wanted(NamedTuple):
    """How a result is made, of all rows, of few of them, and of more in turns; and the parts that have it then."""

    result: Result
    part: int
    tail_part: int
    all: list[Walk]
    before_tail: list[Walk]
    tail: list[Walk]
    before_outputs: list[Walk]
    outputs: list[Walk]


def _wanted(parts: Cut, *, hidden: bool) -> _Wanted:
    program, n = parts.program, len(parts.program.ops)
    result = result_of(program, parts.tail, hidden=hidden)
    select = next((i for i, op in enumerate(program.ops) if isinstance(op, SelectOutputs)), n)
    (all_rows,) = parts.walk((0, result.end))
    before_tail, tail = parts.walk((0, parts.tail.start), (n, n + result.tail_end))
    before_outputs, outputs = parts.walk((0, select), (select, result.end))
    part, tail_part = (parts.stretches[walks[-1].stretch].part for walks in (all_rows, tail or all_rows))
    return _Wanted(result, part, tail_part, all_rows, before_tail, tail, before_outputs, outputs)


MAX_STEPS = 16  # between two looks of the engine
MakePart = Callable[[Program, Sequence[int]], PartExecutor]


class _Form:
    """A cut program as it runs: without adapters, or with them."""

    def __init__(self, parts: Cut) -> None:
        embedding = embedding_of(parts.program)
        self.cut, self.embedding = parts, -1 if embedding is None else embedding
        self._wants = {False: _wanted(parts, hidden=False)}

    def wanted(self, *, hidden: bool) -> _Wanted:
        """How its result is made. UnsupportedError for hidden states that the program does not have."""
        if hidden not in self._wants:
            self._wants[hidden] = _wanted(self.cut, hidden=hidden)
        return self._wants[hidden]


class SplitExecutor:
    """The ``Executor`` of a program in parts.

    makes   opens the executor of each part, given its program and the blocks of its groups
    """

    backend: ClassVar[str] = "wgpu"
    kv_dtype: ClassVar[str] = "float16"

    def __init__(self, parts: Cut, n_blocks: Sequence[int] | int, makes: Sequence[MakePart], max_tokens: int) -> None:
        self.program = program = parts.program
        self.cut, self.max_tokens, self._closed = parts, max_tokens, False
        blocks = [n_blocks] * len(program.groups) if isinstance(n_blocks, int) else list(n_blocks)
        self.parts: dict[int, PartExecutor] = {}
        try:
            for i, (own, make) in enumerate(zip(parts.programs, makes, strict=True)):
                if own is not None:
                    self.parts[i] = make(own, parts.n_blocks(i, blocks))
        except BaseException:
            self.close()
            raise
        layers = [parts.layers[i] for i in self.parts]
        self.pool: CachePool = SplitPool(program, [part.pool for part in self.parts.values()], layers, blocks)
        self.max_outputs = min(part.max_outputs for part in self.parts.values())
        self._tables = {i: [program.groups.index(g) for g in part.program.groups] for i, part in self.parts.items()}
        self._plain = self._form = _Form(parts)
        self._adapted = _Form(parts.adapted) if parts.adapted else self._plain
        self._output_part = self._plain.wanted(hidden=False).part
        self._has_state = any(group.kind == "state" for group in program.groups)
        self._is_waited_for = False
        self._owner: dict[str, int] = {}  # under a hook: the part that wrote a buffer last

    @property
    def draw(self) -> Draw | None:
        """That of the part that has the logits."""
        return self.parts[self._output_part].draw

    def run(self, batch: Batch, hook: Hook | None = None) -> np.ndarray:
        """Logits (n_outputs, n_vocab) float32, or hidden states; see ``Executor``."""
        if self._closed:
            raise ClosedError("this executor was closed; load the model again")
        rows, most = np.flatnonzero(batch.outputs).tolist(), self.max_outputs
        self._begin(batch, rows[:most])
        form = self._form
        wanted = form.wanted(hidden=batch.hidden)
        before, after, name, part = wanted.before_outputs, wanted.outputs, wanted.result.name, wanted.part
        if hook is None and len(rows) <= most:
            before, after = wanted.all, []
            if len(rows) < len(batch) and form.cut.tail.ops:
                before, after, name, part = wanted.before_tail, wanted.tail, wanted.result.tail_name, wanted.tail_part
        self._owner.clear()
        self._walk(before, batch, hook)
        result = np.empty((len(rows), form.cut.whole.buffers[name].width), np.float32)
        for first in range(0, max(len(rows), int(hook is not None)), most):
            chunk = rows[first : first + most]
            if first:
                for each in self.parts.values():
                    each.outputs(chunk)
            self._walk(after, batch, hook)
            result[first : first + len(chunk)] = self.parts[part].read(name)
        check_logits(result)
        return result

    def _begin(self, batch: Batch, outputs: Sequence[int]) -> None:
        """Give every part what it needs of a batch; one without adapters has the program without them."""
        self._form = self._plain if batch.adapters is None else self._adapted
        for i, part in self.parts.items():
            own = replace(batch, tables=tuple(batch.tables[table] for table in self._tables[i]))
            if embedding_of(part.program) is None:
                own = replace(own, embeddings=None)
            part.begin(own, outputs)

    def decode(self, batch: Batch, n_steps: int, draw: Any, stop_ids: Collection[int] = ()) -> int:
        """Several steps of one sequence; see ``DecodingExecutor``."""
        return self.decode_together(batch, n_steps, [draw], [stop_ids])[0]

    def decode_together(
        self, batch: Batch, n_steps: int, draws: Sequence[Any], stop_ids: Sequence[Collection[int]]
    ) -> list[int]:
        """The same for several sequences; see ``TogetherDecodingExecutor``. Logits stay where they are made."""
        if self._closed:
            raise ClosedError("this executor was closed; load the model again")
        n, part = len(batch), self.parts[self._output_part]
        if not n == len(draws) == len(stop_ids) == len(np.unique(batch.sequences)) or not batch.outputs.all():
            raise ParameterError("decode_together() takes one token of each sequence, a draw and stop ids for each")
        is_plain = batch.rope_positions is None and batch.embeddings is None
        if not isinstance(part, DrawingPart) or not is_plain or n > self.max_outputs:
            return [0] * n
        n_run, counts, first, made = 0, [0] * n, batch, [batch.tokens.tolist()]
        is_kept = self._has_state and not batch.overwrites(self.program.groups)  # the state before all steps
        for draw in draws:
            draw.begin()
        for step in range(min(n_steps, MAX_STEPS, self.max_tokens // n if self._has_state else MAX_STEPS)):
            if step and self._is_waited_for:
                break
            self._begin(batch, range(n))
            self._walk(self._form.wanted(hidden=False).all, batch, None)
            n_run += 1
            tokens = part.drawn(draws)
            counts = [count + (token >= 0) for count, token in zip(counts, tokens, strict=True)]
            if any(token < 0 or token in stops for token, stops in zip(tokens, stop_ids, strict=True)):
                break
            made.append(tokens)
            batch = batch.onward(tokens, self.program.groups)
        if is_kept and max(counts) > 0 and min(counts) < n_run:  # the state of a step that gave NaN is one too far
            self.run(first.again(made, counts))
        return counts

    def hurry(self, wanted: bool) -> None:
        """See ``TogetherDecodingExecutor``."""
        self._is_waited_for = wanted

    def _walk(self, walks: Iterable[Walk], batch: Batch, hook: Hook | None) -> None:
        """Run some stretches; one that needs nothing from elsewhere goes on where the last one of its part ended."""
        pending: tuple[int, int, int] | None = None  # part, at, end
        for walk in walks:
            stretch = self._form.cut.stretches[walk.stretch]
            embeds = batch.embeddings is not None and stretch.first <= self._form.embedding < stretch.last
            joins = pending is not None and pending[0] == stretch.part and not walk.takes and hook is None
            if pending is not None and not joins:
                self.parts[pending[0]].run_ops(*pending[1:])
                pending = None
            for name, source in walk.takes:
                self.parts[stretch.part].write(name, self.parts[source].read(name))
            if hook is not None:
                self._hooked(stretch, batch, hook)
                continue
            pending = stretch.part, pending[1] if pending else stretch.at, stretch.end
            if embeds:
                self.parts[pending[0]].run_ops(*pending[1:])
                self._embed(batch)
                pending = None
        if pending is not None:
            self.parts[pending[0]].run_ops(*pending[1:])

    def _embed(self, batch: Batch) -> None:
        """Put the batch's own rows in place of what was looked up."""
        assert batch.embeddings is not None, "asked for"
        form = self._form
        op = form.cut.program.ops[form.embedding]
        part = self.parts[next(s.part for s in form.cut.stretches if s.first <= form.embedding < s.last)]
        values = part.read(op.written_buffers()[0]).copy()
        values[batch.embeddings[0]] = batch.embeddings[1]
        part.write(op.written_buffers()[0], values)

    def _hooked(self, stretch: Stretch, batch: Batch, hook: Hook) -> None:
        """Op by op; what the hook was given goes to every part that has the buffer."""
        whole = self._form.cut.whole
        for at, i in zip(range(stretch.at, stretch.end), range(stretch.first, stretch.last), strict=True):
            self.parts[stretch.part].run_ops(at, at + 1, alone=True)
            if i == self._form.embedding and batch.embeddings is not None:
                self._embed(batch)
            op, taken = whole.ops[i], dict[str, np.ndarray]()
            self._owner.update(dict.fromkeys(map(whole.root, op.written_buffers()), stretch.part))

            def read(name: str, taken: dict[str, np.ndarray] = taken, part: int = stretch.part) -> np.ndarray:
                root, buffer = whole.root(name), whole.buffers[name]
                if root not in taken:
                    taken[root] = self.parts[self._owner.get(root, self._having(root)[0])].read(root)
                return taken[root][:, buffer.first : buffer.first + buffer.width]

            hook(i, op, read)
            for root, values in taken.items():
                for part in self._having(root):
                    self.parts[part].write(root, values)

    def _having(self, root: str) -> list[int]:
        return [i for i, own in enumerate(self._form.cut.programs) if own is not None and root in own.buffers]

    def close(self) -> None:
        """Close all parts. May be called twice."""
        self._closed = True
        for part in self.parts.values():
            part.close()
