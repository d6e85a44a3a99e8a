"""Files that have a tensor for each expert, as they were written until 2024: Mixtral's first conversions."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import hostile_models
import numpy as np
import pytest
import raw_gguf as raw
import tiny_models

from edgellm.formats.errors import FormatError
from edgellm.formats.gguf import GGUFFile
from edgellm.kernels.cpu.run.executor import CPUExecutor
from edgellm.kernels.program import Batch, Program
from edgellm.kernels.reference import ReferenceExecutor
from edgellm.models import build_program
from edgellm.quantize.inputs import open_gguf
from edgellm.quantize.mixes import Recipe
from edgellm.quantize.pipeline import plan_quantization, quantize

SCALES = ("attention.scale", "embedding_scale", "residual_scale", "logit_scale", "expert_shared_feed_forward_length")


def mixtral(path: Path, quant: str) -> hostile_models.Model:
    """A tiny Mixtral, its experts stacked, as a file that was taken apart."""
    tiny_models.write_tiny_model(path, "granitemoe", quant)
    model = hostile_models.take_apart(path.read_bytes())
    model.kvs = [
        [key.replace("granitemoe.", "llama."), kind, value]
        for key, kind, value in model.kvs
        if not key.endswith(SCALES)
    ]
    model.put("general.architecture", raw.STRING, b"llama")
    model.tensors = [tensor for tensor in model.tensors if "shexp" not in tensor[0]]
    return model


def take_experts_apart(model: hostile_models.Model) -> None:
    """A tensor for each expert, in an order of its own."""
    tensors = []
    for name, dims, kind, data, shift in model.tensors:
        if not name.endswith("_exps.weight"):
            tensors.append([name, dims, kind, data, shift])
            continue
        n, each = dims[2], len(data) // dims[2]
        base = name.removesuffix("_exps.weight")
        tensors += [[f"{base}.{i}.weight", dims[:2], kind, data[i * each : (i + 1) * each], shift] for i in range(n)]
    random.Random(3).shuffle(tensors)
    model.tensors = tensors


@pytest.fixture(scope="module", params=["F16", "Q4_K", "IQ2_XXS"])
def files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same model in the form that files have now, and in the old one; IQ2_XXS has no kernels of its own."""
    folder = tmp_path_factory.mktemp("mixtral")
    model = mixtral(folder / "stacked.gguf", request.param)
    (folder / "stacked.gguf").write_bytes(model.bytes())
    take_experts_apart(model)
    (folder / "apart.gguf").write_bytes(model.bytes())
    return folder / "stacked.gguf", folder / "apart.gguf"


def logits(path: Path, make: Callable[[Program], CPUExecutor | ReferenceExecutor]) -> np.ndarray:
    with GGUFFile.open(path) as gguf:
        program = build_program(gguf)
        executor = make(program)
        found = executor.run(Batch.single(program, [(7 * i) % program.n_vocab for i in range(24)])).copy()
        executor.close()
    return found


def test_old_files_give_the_logits_of_stacked_ones(files: tuple[Path, Path]) -> None:
    for make in (ReferenceExecutor, lambda program: CPUExecutor(program, 2, 2, 32)):
        stacked, apart = (logits(path, make) for path in files)
        assert np.array_equal(stacked, apart)


def test_experts_are_multiplied_where_they_lie_in_the_file(files: tuple[Path, Path]) -> None:
    with GGUFFile.open(files[0]) as stacked, GGUFFile.open(files[1]) as apart:
        need = [CPUExecutor.work_nbytes(build_program(gguf), 32, 2) for gguf in (stacked, apart)]
        assert need[0] == need[1]


def test_quantize_writes_the_stacked_form(files: tuple[Path, Path], tmp_path: Path) -> None:
    written = []
    for path in files:
        with open_gguf(path) as source:
            target = tmp_path / f"{path.stem}.gguf"
            quantize(plan_quantization(source, Recipe("Q8_0"), allow_requantize=True), target)
            with GGUFFile.open(target) as gguf:
                written.append({name: (tensor.shape, tensor.data.tobytes()) for name, tensor in gguf.tensors.items()})
    assert written[0] == written[1]
    assert written[1]["blk.1.ffn_down_exps.weight"][0] == (tiny_models.N_EXPERT, 256, 256)


def test_a_copy_of_a_split_model_keeps_its_parts(tmp_path: Path) -> None:
    from edgellm.formats.gguf_writer import TensorPlan, write_gguf

    model = mixtral(tmp_path / "m.gguf", "Q8_0")
    take_experts_apart(model)
    (tmp_path / "m.gguf").write_bytes(model.bytes())
    with open_gguf(tmp_path / "m.gguf") as source, GGUFFile.open(tmp_path / "m.gguf") as gguf:
        plans = [
            TensorPlan(name, tensor.shape, tensor.quant, lambda data=tensor.data: [data.reshape(-1)])
            for name, tensor in gguf.tensors.items()
        ]
        halves = (len(plans) // 2, len(plans) - len(plans) // 2)
        paths = write_gguf(tmp_path / "split.gguf", source.metadata, plans, part_sizes=halves)
        plans.clear()
    with open_gguf(paths[0]) as split:
        assert len(split.part_sizes) == 2
        assert sum(split.part_sizes) == len(split.tensors)
        copy = plan_quantization(split, Recipe("Q8_0"), allow_requantize=True, keep_split=True)
        with GGUFFile.open(quantize(copy, tmp_path / "copy.gguf").paths[0]) as gguf:
            assert set(gguf.tensors) == set(split.tensors)


@pytest.mark.parametrize("fault", ["one is missing", "one is of another type"])
def test_experts_that_do_not_go_together_are_named(tmp_path: Path, fault: str) -> None:
    model = mixtral(tmp_path / "m.gguf", "Q8_0")
    take_experts_apart(model)
    tensor = next(tensor for tensor in model.tensors if tensor[0] == "blk.1.ffn_up.3.weight")
    if fault == "one is missing":
        model.tensors.remove(tensor)
    else:
        tensor[2], tensor[3] = 0, bytes(4 * 256 * 256)
    (tmp_path / "m.gguf").write_bytes(model.bytes())
    expected = r"like blk\.1\.ffn_up\.0\.weight"
    with GGUFFile.open(tmp_path / "m.gguf") as gguf, pytest.raises(FormatError, match=expected):
        build_program(gguf)
