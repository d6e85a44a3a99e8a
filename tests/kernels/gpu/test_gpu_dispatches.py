"""What a step of every architecture is made of: few dispatches a layer, none of which binds twice what it writes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gpu_device import device

from edgellm.formats.gguf import GGUFFile
from edgellm.kernels.cpu.compile.trials import nmse
from edgellm.kernels.gpu import adapters
from edgellm.kernels.gpu.beside import MAIN, Emitted, both, workgroup_nbytes
from edgellm.kernels.gpu.device import Device
from edgellm.kernels.gpu.emitter import Counts, Lowering, clash
from edgellm.kernels.gpu.executor import GPUExecutor
from edgellm.kernels.gpu.lowering import record
from edgellm.kernels.gpu.order import in_order
from edgellm.kernels.gpu.walk import Dispatch
from edgellm.kernels.ops import Add, Matmul, RMSNorm
from edgellm.kernels.ops.sketch import Sketch
from edgellm.kernels.program import Batch
from edgellm.kernels.reference import ReferenceExecutor
from edgellm.kernels.typed_cache import with_cache_types
from edgellm.models import build_program

tiny_models = pytest.importorskip("tiny_models", reason="the gguf package writes the test models")
decoder_models = pytest.importorskip("decoder_models", reason="the gguf package writes the test models")
spaces = pytest.importorskip("state_space_models", reason="the gguf package writes the test models")

ARCHITECTURES = (
    *("llama", "qwen2", "qwen3", "granite", "gemma", "gemma2", "gemma3", "lfm2"), *tiny_models.EXPERTS,
    *tiny_models.HYBRIDS, *spaces.STATE_SPACES, *decoder_models.TINY,
)  # fmt: skip
MOST = 8  # dispatches of a layer in a decode step; of the first one more, whose norm stands alone
OTHERS = {"deepseek2": 10, "gemma4": 12, "gemma3n": 13} | dict.fromkeys(("command-r", "cohere2", "phi2"), 6)
"""Queries by way of a low rank, heads in a latent space; norms of norms, a third sublayer; streams, too. And, with
fewer, sublayers that stand side by side."""
KIVI2 = ("llama", "gemma3", "olmo2", "olmoe", "minimax-m2", "gpt-oss", "qwen3next", "falcon-h1", "gemma4")
AS_PUBLISHED = {"ffn_gate_inp.weight": "F32", "attn_v.weight": "Q6_K", "ffn_down.weight": "Q6_K"}
STEPS = (
    *(Counts(1, 1, 1, is_lone=True), Counts(1, 1, 4), Counts(5, 5, 1, is_lone=True)),
    *(Counts(5, 2, 2, writes_over=True), Counts(40, 1, 1, is_prompt=True)),
)


@pytest.mark.parametrize(
    ("architecture", "kept"),
    [*((name, "f16") for name in dict.fromkeys(ARCHITECTURES)), *((name, "kivi2") for name in KIVI2)],
)
def test_a_layer_decodes_in_few_dispatches_that_bind_what_they_write_once(
    architecture: str, kept: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index, seen, layer = int(device("gpu").partition(":")[2]), Counter[int](), [-1]
    path = tiny_models.write_tiny_model(tmp_path / "m.gguf", architecture, "Q4_K", quants=AS_PUBLISHED, n_layer=4)

    def noted(self: Device, text: str, buffers: Sequence[Any], kinds: str, grid: Any, *more: Any, **named: Any) -> Any:
        assert not clash(buffers, kinds)
        return Dispatch(0, 0, *grid, b"", 0, 0)

    def emit(self: Lowering, *given: Any, **named: Any) -> None:
        if self.ops[self.at].name == "select_outputs":
            layer[0] = -1
        for name in self.ops[self.at].weight_names():
            layer[0] = int(found[1]) if (found := re.match(r"blk\.(\d+)", name)) else -1
        before = len(self.rows)
        real(self, *given, **named)
        seen[layer[0]] += len(self.rows) - before

    with GGUFFile.open(path) as gguf:
        program = with_cache_types(build_program(gguf), kept, kept)
        executor = GPUExecutor(program, 8, max_tokens=64, index=index)
    real = Lowering.emit
    monkeypatch.setattr(Device, "dispatch", noted)
    monkeypatch.setattr(Lowering, "emit", emit)
    for fuse in (True, False):
        for counts in STEPS:
            record(executor._there, executor.program.ops, (), counts, fuse=fuse)
    seen.clear()
    record(executor._there, executor.program.ops, (), STEPS[0], fuse=True)
    most = OTHERS.get(architecture, MOST)
    assert {at: n for at, n in seen.items() if at >= 0 and n > most + (at == 0)} == {}
    executor.close()


def test_two_dispatches_are_one_where_a_workgroup_has_memory_for_both() -> None:
    index = int(device("gpu").partition(":")[2])
    gpu = Device(adapters.choose(index))
    half = gpu.workgroup_nbytes // 8
    rows = [
        Emitted(
            f"""struct P {{ at: u32 }}
@group(0) @binding(0) var<storage, read_write> y: array<u32>;
var<immediate> p: P;
const N = 4u * {n // 4}u;
var<workgroup> a: array<f32, N>;
var<workgroup> b: array<atomic<u32>, {2 + i}u>;
var<workgroup> c: array<u32, 1>;
@compute @workgroup_size(64)
{MAIN} a[t] = f32(t); c[0] = t; workgroupBarrier(); if (t == 0u) {{ y[p.at] = u32(a[63]); }} }}
""",
            [gpu.buffer(256)], "w", (1, 1, 1), (i,), 0,
        )
        for i, n in enumerate((half, half - 8, half))
    ]  # fmt: skip
    assert [workgroup_nbytes(one.text) for one in rows] == [4 * half + 12, 4 * half - 16, 4 * half + 20]
    assert both(rows[0], rows[2], gpu) is None
    whole = both(rows[0], rows[1], gpu)
    assert whole is not None and workgroup_nbytes(whole.text) == 8 * half - 8, "what both declare alike has one place"
    gpu.run([gpu.dispatch(whole.text, whole.buffers, whole.kinds, whole.grid, *whole.immediates)])
    assert [gpu.read(one.buffers[0], 8).view(np.uint32)[i] for i, one in enumerate(rows[:2])] == [63, 63]
    gpu.close()


def test_a_product_at_the_start_waits_for_one_that_it_can_go_with_whatever_stands_at_the_end() -> None:
    s = Sketch(np.random.default_rng(1), 1)
    x, y, a, b, c, d = (s.buffer(64) for _ in range(6))
    w, v = s.tensor("F32", (64, 64)), s.tensor("F32", (64,))
    first = Matmul(x, w, a)
    norm, other, add, last = RMSNorm(y, v, b, 1e-5), Matmul(b, w, c), Add(c, a, d), Matmul(x, w, c)
    ops = [first, RMSNorm(y, v, y, 1e-5), norm, other, add, last]
    assert in_order(ops, {}, s.program())[:4] == [ops[1], norm, first, other]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", dict.fromkeys(ARCHITECTURES))
def test_a_step_has_the_bits_of_its_ops_and_the_references_logits(architecture: str, tmp_path: Path) -> None:
    index = int(device("gpu").partition(":")[2])
    path = tiny_models.write_tiny_model(tmp_path / "m.gguf", architecture, "Q4_K", quants=AS_PUBLISHED, n_layer=4)
    with GGUFFile.open(path) as gguf:
        program = build_program(gguf)
        fused, single = (GPUExecutor(program, 8, max_tokens=64, index=index) for _ in range(2))
        judge = ReferenceExecutor(program, 8, 64, "float16")
        for n, start in ((13, 0), (1, 13), (5, 14)):
            batch = Batch.single(program, np.random.default_rng(n).integers(3, program.n_vocab, n), start, "all")
            found = fused.run(batch).copy()
            assert np.array_equal(found, single.run(batch, lambda *_: None))
            assert nmse(found, judge.run(batch)) < 1e-6
        fused.close()
        single.close()
