"""Every op says what it is: its fields, what judges it, and the rule that brings it to the CPU."""

from __future__ import annotations

import dataclasses

import pytest

from edgellm.kernels.cpu.run import lowering
from edgellm.kernels.ops import OPS, Op


def test_the_table_holds_every_op_once_and_every_name_is_its_own() -> None:
    assert set(OPS) == set(Op.__subclasses__())
    assert len({op.name for op in OPS}) == len(OPS)


@pytest.mark.parametrize("op", OPS)
def test_an_op_names_its_own_fields_and_has_a_rule(op: type[Op]) -> None:
    fields = {field.name for field in dataclasses.fields(op)}  # type: ignore[arg-type]
    assert {*op.reads, *op.writes, *op.weights} <= fields
    assert (op.cache is not None) == ("layer" in fields)
    assert op.writes or op.cache in ("write", "update"), "an op that changes nothing"
    assert not op.by_row or op.cache is None, "a cache is read across rows"
    assert op in lowering._RULES
