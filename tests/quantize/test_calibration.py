"""Calibrated rounding of whole models: error compensation and folded scales."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_models

from edgellm.cli.app import main
from edgellm.formats.errors import ParameterError
from edgellm.formats.gguf import GGUFFile
from edgellm.formats.gguf_writer import TensorPlan, write_gguf
from edgellm.formats.quant_types import QUANT_TYPES
from edgellm.kernels.cpu.encode import encode
from edgellm.kernels.ops import Attention, GatedUnit, Matmul, StoreKV
from edgellm.kernels.program import Batch, Program
from edgellm.kernels.reference import ReferenceExecutor
from edgellm.measure.divergence import Comparison, compare_models
from edgellm.measure.perplexity import Chunk, ChunkModel
from edgellm.models import build_program
from edgellm.quantize import awq, hessian
from edgellm.quantize.calibration import Calibrated, CalibrationOptions, calibrate
from edgellm.quantize.importance import collect
from edgellm.quantize.inputs import open_input

N_CTX = 64
WORDS = "the other word and the thing all in one of them will never be here again so we went on to where it was "


def text(seed: int, n: int = 700) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS.split(), n))


def write_f32(path: Path, architecture: str, **shape: int) -> Path:
    return tiny_models.write_tiny_model(path, architecture, quant="F32", **shape)  # type: ignore[arg-type]


def types_of(path: Path, quant: str) -> dict[str, str]:
    with GGUFFile.open(path) as gguf:
        return {
            name: quant
            for name, tensor in gguf.tensors.items()
            if len(tensor.shape) > 1 and name != "token_embd.weight"
        }


def write_result(path: Path, source: Path, types: Mapping[str, str], calibrated: Calibrated) -> Path:
    """The calibrated model; what was not rounded by the calibration is by the type's own quantizer."""
    with open_input(source) as model:
        plans = []
        for name, tensor in calibrated.source(model).tensors.items():
            rows = tensor.rows()
            data = calibrated.encoded.get(name)
            if data is None:
                data = encode(types.get(name, "F32"), rows, calibrated.importance.get(name))
            plans.append(
                TensorPlan(
                    name, tensor.shape, QUANT_TYPES[types.get(name, "F32")], lambda data=data: [data.reshape(-1)]
                )
            )
        write_gguf(path, model.metadata, plans)
    return path


def divergence(path: Path, base: Path, seed: int) -> float:
    with (
        ChunkModel(path, N_CTX, executor="reference") as own,
        ChunkModel(base, N_CTX, executor="reference") as other,
    ):
        chunks = own.chunks(own.ids(text(seed)), 8)
        return float(Comparison.joined(list(compare_models(own, other, chunks))).divergence.mean())


@pytest.mark.parametrize(("architecture", "quant"), [("llama", "Q3_K"), ("gemma3", "Q4_0")])
def test_compensation_brings_a_model_closer_to_its_source(architecture: str, quant: str, tmp_path: Path) -> None:
    source = write_f32(tmp_path / "source.gguf", architecture)
    types = types_of(source, quant)
    options = CalibrationOptions(n_ctx=N_CTX, n_chunks=24)
    steps: list[tuple[str, int, int]] = []
    with ChunkModel(source, N_CTX, executor="reference") as model:
        *_, imatrix = collect(model, model.chunks(model.ids(text(0, 4000)), 24), "")
    opened = GGUFFile.open(source)
    with calibrate(opened, types, text(0, 4000), options, progress=lambda *step: steps.append(step)) as calibrated:
        assert len(calibrated.encoded) == 14
        for name, data in calibrated.encoded.items():
            assert data.dtype == np.uint8 and types[name] == quant, name
        compensated = write_result(tmp_path / "gptq.gguf", source, types, calibrated)
        weighted = write_result(tmp_path / "weighted.gguf", source, types, Calibrated(importance=imatrix.means))
        assert steps[-1][1] == steps[-1][2] == 8, "groups of q, k, v; output; gate, up; down in two layers"
        calibrated.close()
        assert not calibrated.encoded
    assert divergence(compensated, source, 1) < 0.9 * divergence(weighted, source, 1), "on text it has not seen"


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "qwen2"])
def test_folded_scales_leave_the_model_as_it_was(architecture: str, tmp_path: Path) -> None:
    source = write_f32(tmp_path / "source.gguf", architecture)
    types = types_of(source, "Q4_0")
    with GGUFFile.open(source) as gguf:
        rng = np.random.default_rng(1)
        program = build_program(gguf)
        importance = {
            name: (rng.random(gguf.tensors[name].shape[-1]) ** 4 + 1e-3).astype(np.float32)
            for group in hessian.groups(program)
            for name in group.weights
        }
    options = CalibrationOptions("awq", n_ctx=N_CTX, n_chunks=2)
    with calibrate(GGUFFile.open(source), types, text(0), options, importance) as calibrated:
        assert not calibrated.encoded and calibrated.scaled.keys() >= {"blk.0.attn_norm.weight", "blk.1.ffn_up.weight"}
        assert ("blk.0.attn_v.weight" in calibrated.scaled) and calibrated.scaled[
            "blk.0.ffn_up.weight"
        ].rows is not None
        scaled = write_result(tmp_path / "scaled.gguf", source, {}, calibrated)
    with GGUFFile.open(scaled) as a, GGUFFile.open(source) as b:
        changed = [n for n in b.tensors if not np.array_equal(a.tensors[n].data, b.tensors[n].data)]
    assert len(changed) >= 8
    assert divergence(scaled, source, 1) < 1e-8


def test_awq_and_compensation_go_together(tmp_path: Path) -> None:
    source = write_f32(tmp_path / "source.gguf", "llama", n_layer=1)
    types = types_of(source, "Q4_0")
    options = CalibrationOptions("awq+gptq", n_ctx=N_CTX, n_chunks=20)
    with calibrate(GGUFFile.open(source), types, text(0, 3000), options) as calibrated:
        both = write_result(tmp_path / "both.gguf", source, types, calibrated)
        plain = write_result(tmp_path / "plain.gguf", source, types, Calibrated())
    assert divergence(both, source, 1) < 0.9 * divergence(plain, source, 1)


def test_a_walk_shows_the_inputs_that_the_whole_model_has(tmp_path: Path) -> None:
    source = write_f32(tmp_path / "source.gguf", "gemma3")
    with ChunkModel(source, N_CTX, executor="reference") as model:
        chunks = model.chunks(model.ids(text(0)), 2)
        seen: dict[int, list[np.ndarray]] = {}
        for chunk in chunks:
            model.watch(chunk, lambda index, op, read: seen.setdefault(index, []).append(read(op.x).copy())
                        if isinstance(op, Matmul) and op.out != Program.output else None)  # fmt: skip
        tensors = model.program.tensors
        walk = hessian.Walk(
            model.program,
            chunks,
            lambda name: tensors[name].dequantize().reshape(tensors[name].shape),
            lambda name, rows: tensors[name].dequantize(rows),
        )
        found = hessian.groups(model.program)
        assert sum(len(group.weights) for group in found) == len(seen) == 14
        for group in found:
            walk.advance(group.start)
            assert all(len(kept) <= 2 for kept in walk.kept), "the residual stream and the input"
            for mine, theirs in zip(walk.inputs(group.x), seen[group.start], strict=True):
                assert np.allclose(mine, theirs, atol=1e-5), group


def test_only_what_one_group_reads_is_folded(tmp_path: Path) -> None:
    with GGUFFile.open(write_f32(tmp_path / "a.gguf", "qwen2", n_layer=1)) as gguf:
        found = {fold.target for fold in awq.folds(build_program(gguf))}
    # attn_v of qwen2 has a bias, which would have to be scaled too
    assert found == {"blk.0.attn_norm.weight", "blk.0.ffn_norm.weight", "blk.0.ffn_up.weight"}


def with_shared_cache(program: Program) -> Program:
    """The second layer's attention reads the first layer's keys and values, as some models have it."""
    ops = [
        replace(op, layer=0) if isinstance(op, Attention) else op
        for op in program.ops
        if not (isinstance(op, StoreKV) and op.layer == 1)
    ]
    return replace(program, ops=tuple(ops))


def test_values_that_two_attentions_read_are_left_as_they_are(tmp_path: Path) -> None:
    with GGUFFile.open(write_f32(tmp_path / "a.gguf", "llama")) as gguf:
        program = build_program(gguf)
        plain = {fold.target for fold in awq.folds(program)}
        shared = {fold.target for fold in awq.folds(with_shared_cache(program))}
        as_key, as_gate = [], []
        for op in program.ops:
            as_key.append(replace(op, k=op.v) if isinstance(op, StoreKV) else op)
            as_gate.append(replace(op, gate=op.up) if isinstance(op, GatedUnit) else op)
        assert plain - shared == {"blk.0.attn_v.weight", "blk.1.attn_v.weight"}
        for ops, part in ((as_key, "attn_v"), (as_gate, "ffn_up")):
            found = {fold.target for fold in awq.folds(replace(program, ops=tuple(ops)))}
            assert plain - found == {f"blk.{i}.{part}.weight" for i in (0, 1)}, "read twice by one op"


def test_a_walk_keeps_the_cache_that_later_layers_read(tmp_path: Path) -> None:
    with GGUFFile.open(write_f32(tmp_path / "a.gguf", "llama")) as gguf:
        program, rng = with_shared_cache(build_program(gguf)), np.random.default_rng(1)
        chunks = [Chunk(rng.integers(0, program.n_vocab, N_CTX), 0) for _ in range(3)]
        executor = ReferenceExecutor(program)
        walk = hessian.Walk(program, chunks, executor.weight, executor.rows)
        last = hessian.groups(program)[-1]
        walk.advance(last.start)
        for chunk, mine in zip(chunks, walk.inputs(last.x), strict=True):
            seen: dict[int, np.ndarray] = {}
            executor.run(
                Batch.single(program, chunk.ids),
                lambda index, op, read, seen=seen: seen.update({index: read(last.x).copy()}),
            )
            assert np.allclose(mine, seen[last.start - 1], atol=1e-5)


def test_options_out_of_range_are_named() -> None:
    with pytest.raises(ParameterError, match="one of gptq, awq"):
        CalibrationOptions("gtpq")  # type: ignore[arg-type]
    with pytest.raises(ParameterError, match="damping"):
        CalibrationOptions(damping=0)


def test_the_command_calibrates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_f32(tmp_path / "source.gguf", "llama", n_layer=1)
    words = tmp_path / "text"
    words.write_text(text(0, 2000))
    run = ["quantize", str(source)]
    method = ["--method", "gptq", "-f", str(words), "--chunks", "2"]
    assert main([*run, str(tmp_path / "plain.gguf"), "Q4_0"]) == 0
    assert main([*run, str(tmp_path / "gptq.gguf"), "Q4_0", *method, "--report"]) == 0
    assert "blk.0.ffn_down.weight" in capsys.readouterr().out
    with GGUFFile.open(tmp_path / "plain.gguf") as a, GGUFFile.open(tmp_path / "gptq.gguf") as b:
        assert [(t.name, t.quant, t.shape) for t in a.tensors.values()] == [
            (t.name, t.quant, t.shape) for t in b.tensors.values()
        ]
        changed = {name for name in a.tensors if not np.array_equal(a.tensors[name].data, b.tensors[name].data)}
    assert len(changed) == 7 and all(name.startswith("blk.0.") for name in changed)
    assert main([*run, str(tmp_path / "x.gguf"), "Q4_0", "--method", "gptq"]) == 2
    assert not (tmp_path / "x.gguf").exists()
