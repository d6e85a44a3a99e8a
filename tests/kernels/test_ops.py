"""Every op says what it is: complete, and what it declares is what its reference is seen to do."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import numpy as np
import pytest

from edgellm.kernels.cpu.compile import trials
from edgellm.kernels.cpu.compile.kernel_table import KERNELS
from edgellm.kernels.cpu.run import lowering
from edgellm.kernels.kv import CachePool
from edgellm.kernels.ops import OPS, Op
from edgellm.kernels.ops.sketch import Sketch
from edgellm.kernels.ops.step import Step
from edgellm.kernels.program import Batch

N_TOKENS = 12
Part = tuple[str, str | int]  # buffer, weight or layer, and its name or number


def test_the_table_holds_every_op_once_and_every_name_is_its_own() -> None:
    assert set(OPS) == {op for op in Op.__subclasses__() if op.computes}
    assert len({op.name for op in OPS}) == len(OPS)


@pytest.mark.parametrize("op", OPS)
def test_an_op_is_complete(op: type[Op]) -> None:
    fields = {field.name for field in dataclasses.fields(op)}
    assert {*op.reads, *op.writes, *op.weights} <= fields
    assert (op.cache is not None) == ("layer" in fields)
    assert op.writes or op.cache in ("write", "update"), "an op that changes nothing"
    assert not op.by_row or op.cache is None, "a cache is read across rows"
    assert op in lowering._RULES
    assert any(f"{kernel}_".startswith(f"{op.kernel or op.name}_") for kernel in KERNELS)
    assert {type(one) for one, _ in tried(op)} == {op}


def tried(op: type[Op]) -> Iterator[tuple[Op, Sketch]]:
    """The ops of a trial with the sketch of all of them."""
    sketch = Sketch(np.random.default_rng(3), N_TOKENS)
    op.trial(sketch)
    return zip(sketch.ops, itertools.repeat(sketch))


class World:
    """All that an op could touch, full of random numbers: the program's buffers, weights and cache."""

    def __init__(self, sketch: Sketch) -> None:
        rng, program = np.random.default_rng(4), sketch.program()
        self.batch: Batch = trials.random_batch(rng, program, N_TOKENS, 250)
        self.program, self.pool = program, CachePool(program.cache_layers, trials.N_BLOCKS)
        weights = {name: tensor.dequantize().reshape(tensor.shape) for name, tensor in program.tensors.items()}
        self.step = Step(program, self.pool, weights.__getitem__, lambda name, rows: weights[name][rows], self.batch)
        self.arrays: dict[Part, list[np.ndarray]] = {
            **{("buffer", name): [array] for name, array in self.step.buffers.items()},
            **{("weight", name): [array] for name, array in weights.items()},
            **{("layer", index): arrays for index, arrays in enumerate(self.pool.arrays)},
        }
        for array in itertools.chain(*self.arrays.values()):
            if array.dtype.kind == "f":
                array[...] = rng.standard_normal(array.shape)
        for name, values in sketch.inputs.items():
            if values.dtype.kind == "i":  # ids, which cannot be any number
                self.step[name] = values

    def bits(self) -> dict[Part, bytes]:
        return {part: b"".join(array.tobytes() for array in arrays) for part, arrays in self.arrays.items()}

    def changed_by(self, op: Op) -> dict[Part, list[np.ndarray]]:
        """What the reference of an op leaves different from before."""
        before = self.bits()
        op.reference(self.step)
        after = self.bits()
        return {part: self.arrays[part] for part in after if after[part] != before[part]}


def parts(**names: tuple[str, ...] | tuple[int, ...]) -> set[Part]:
    return {(kind, name) for kind, found in names.items() for name in found}


@pytest.mark.parametrize("op", OPS)
def test_the_reference_touches_what_the_op_declares_and_nothing_else(op: type[Op]) -> None:
    for one, sketch in tried(op):
        reads = parts(buffer=one.read_buffers(), weight=one.weight_names(), layer=one.read_layers())
        writes = parts(buffer=one.written_buffers(), layer=one.written_layers())
        plain, poisoned = World(sketch), World(sketch)
        expected = plain.changed_by(one)
        assert set(expected) == writes
        for part in poisoned.arrays.keys() - reads:
            for array in poisoned.arrays[part]:
                array[...] = np.nan if array.dtype.kind == "f" else 0
        assert set(poisoned.changed_by(one)) <= writes
        for part, judges in expected.items():
            for array, judge in zip(poisoned.arrays[part], judges, strict=True):
                seen = np.isfinite(array)
                assert seen.any() and (part[0] == "layer" or seen.all()), f"{one} reads what it does not declare"
                assert np.array_equal(array[seen], judge[seen])
        for part in reads:
            other = World(sketch)
            for array in other.arrays[part]:
                array[...] = array[::-1] * np.array(1.5 if array.dtype.kind == "f" else 1, array.dtype)
            other.changed_by(one)
            assert any(other.bits()[name] != plain.bits()[name] for name in writes), f"{one} does not read {part}"


@pytest.mark.parametrize("op", [op for op in OPS if op.by_row])
def test_a_row_of_an_op_that_goes_by_row_depends_on_that_row_alone(op: type[Op]) -> None:
    for one, sketch in tried(op):
        plain, other = World(sketch), World(sketch)
        for name in one.read_buffers():
            row = other.step[name][5]
            row[...] = row * -2 if row.dtype.kind == "f" else np.roll(row, 1)
        plain.changed_by(one)
        other.changed_by(one)
        same = [(plain.step[name] == other.step[name]).all(axis=1) for name in one.written_buffers()]
        assert np.array_equal(np.all(same, axis=0), np.arange(N_TOKENS) != 5), one
