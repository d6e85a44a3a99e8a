"""Latent attention: what is kept of a token, older files, and answers that do not depend on how they were computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from answers_together import answers_together
from cpu_programs import cpu_executor, single_sequence
from speculation_trials import free_drafts, guess
from test_gguf_writer import llama_cpp_text
from test_models import nmse
from tiny_models import write_tiny_model

import edgellm
from edgellm.formats.errors import EdgeLLMError, UnsupportedError
from edgellm.formats.gguf import GGUFFile
from edgellm.kernels.kv import CachePool, KVLayer
from edgellm.kernels.ops import Attention, HeadMatmul, Route
from edgellm.kernels.program import Program
from edgellm.kernels.reference import ReferenceExecutor
from edgellm.memory import kv_nbytes
from edgellm.models import build_program, deepseek2

SIZES: dict[str, Any] = {"n_embd": 64, "n_ff": 64, "n_head": 4, "head_dim": 16}
PROMPT = [11, 12, 13, 14, 15] * 60 + [20, 21]  # more than a cut
GREEDY = {"max_tokens": 24, "temperature": 0, "ignore_eos": True}
SEEDED = {"max_tokens": 24, "temperature": 0.9, "seed": 5, "ignore_eos": True}
Load = Callable[..., edgellm.LLM]


def tiny(path: Path, keys: dict[str, Any] | None = None, **more: Any) -> Path:
    """A tiny model with keys of its architecture."""
    metadata = {f"deepseek2.{key}": value for key, value in (keys or {}).items()}
    return write_tiny_model(path, "deepseek2", more.pop("quant", "F32"), metadata=metadata, **SIZES, **more)


def program_of(path: Path) -> Program:
    with GGUFFile.open(path) as gguf:
        return build_program(gguf)


# ---- the same answer -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("models") / "model.gguf", quant="Q8_0", context_length=1024)


@pytest.fixture
def load(path: Path) -> Iterator[Load]:
    opened: list[edgellm.LLM] = []

    def opening(**options: Any) -> edgellm.LLM:
        opened.append(edgellm.load(path, executor="cpu", n_threads=2, **({"n_ctx": 512} | options)))
        return opened[-1]

    yield opening
    for llm in opened:
        llm.close()


def test_an_answer_does_not_depend_on_steps_on_what_is_known_or_on_drafts(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free_drafts(monkeypatch)
    for options in (GREEDY, SEEDED):
        llm = load()
        cold = list(llm.generate(PROMPT, **options).tokens)
        for n in (1, 7, 64):
            assert list(load(max_tokens_per_step=n).generate(PROMPT, **options).tokens) == cold
        again = llm.generate(PROMPT, **options)
        assert list(again.tokens) == cold and again.timings.reused_n == len(PROMPT) - 1
        drafting = load()
        guess(drafting, [[*PROMPT, *cold]])
        drafted = drafting.generate(PROMPT, **options)
        assert list(drafted.tokens) == cold and 0 < drafted.timings.accepted_n < drafted.timings.drafted_n
        llm.save_state(tmp_path / "state", PROMPT)
        other = load()
        other.load_state(tmp_path / "state")
        restored = other.generate(PROMPT, **options)
        assert list(restored.tokens) == cold and restored.timings.reused_n == len(PROMPT) - 1


def test_a_preempted_answer_is_the_answer_of_one_that_was_not(load: Load) -> None:
    prompts = [[50 + i, *PROMPT[:70]] for i in range(4)]
    llm = load()
    expected = [list(llm.generate(prompt, **SEEDED).tokens) for prompt in prompts]
    llm = load(n_ctx=128, n_parallel=1)  # room for one of them
    assert answers_together(llm, prompts, SEEDED) == expected


# ---- what is kept ----------------------------------------------------------------------------------------------------


def test_the_cache_keeps_the_latent_and_one_key_of_each_token(path: Path) -> None:
    program = program_of(path)
    assert program.cache_layers == (KVLayer(1, 5 * 16, 4 * 16, latent=True),) * 2
    assert all(layer.seen_nbytes(100) == 100 * 80 * 2 for layer in program.cache_layers)
    pool = CachePool(program.cache_layers, 3)
    assert pool.nbytes == 2 * 3 * 32 * 80 * 2
    per_block = 2 * 32 * 80 * 2
    assert kv_nbytes(program, 512, 512, 1, "cpu") % per_block == 0
    assert 16 * per_block <= kv_nbytes(program, 512, 512, 1, "cpu") <= 18 * per_block


def test_a_key_that_is_no_number_in_a_block_that_was_used_before_is_not_read(path: Path) -> None:
    program = program_of(path)
    batch = single_sequence(program, 40, n_blocks=3, seed=1)
    executor = cpu_executor(program, 3)
    expected = executor.run(batch).copy()
    for array in (array for arrays in executor.pool.arrays for array in arrays):
        array[:] = np.nan
    assert np.array_equal(executor.run(batch), expected)
    executor.close()


# ---- files -----------------------------------------------------------------------------------------------------------


def in_one_matrix(path: Path) -> tuple[Path, Path]:
    """A file, and the same model as files were before 2025: keys and values of a head stand in one matrix."""
    new = tiny(path / "new.gguf")
    with GGUFFile.open(new) as gguf:
        tensors = {name: tensor.dequantize().reshape(tensor.shape) for name, tensor in gguf.tensors.items()}
    names = tuple(tensors)
    for i in range(2):
        keys, values = (tensors.pop(f"blk.{i}.attn_{kind}_b.weight") for kind in "kv")
        both = np.concatenate([keys.swapaxes(1, 2), values], axis=1)
        tensors[f"blk.{i}.attn_kv_b.weight"] = np.ascontiguousarray(both.reshape(-1, both.shape[2]))
    sizes = {"attention.key_length": 48, "attention.value_length": 16, "attention.head_count_kv": 4}
    names += tuple(f"deepseek2.attention.{kind}_length_mla" for kind in ("key", "value"))
    return new, tiny(path / "old.gguf", sizes, leave_out=names, extra_tensors=tensors)


def test_llama_cpp_says_the_same_of_both_kinds_of_files(tmp_path: Path) -> None:
    new, old = in_one_matrix(tmp_path)
    assert llama_cpp_text(new) == llama_cpp_text(old)


def test_an_older_file_with_keys_and_values_in_one_matrix_is_the_same_model(tmp_path: Path) -> None:
    new, old = (program_of(path) for path in in_one_matrix(tmp_path))
    assert {op.turned for op in old.ops if isinstance(op, HeadMatmul)} == {True, False}
    batch = single_sequence(new, 40, seed=2)
    expected, found = (ReferenceExecutor(program).run(batch) for program in (new, old))
    assert nmse(found, expected) <= 1e-12
    executor = cpu_executor(old, 4)
    assert nmse(executor.run(batch), ReferenceExecutor(old, 4, kv_dtype="float16").run(batch)) <= 1e-8
    executor.close()


BAD: dict[str, list[Any]] = {
    "attention.kv_lora_rank": [0, 32, 65, 1 << 13, 1 << 31, -1, 64.0],
    "attention.q_lora_rank": [0, 16, 33, 1 << 17, -1, "32"],
    "attention.key_length_mla": [0, 16, 8, 47, 64, 1 << 20],
    "attention.value_length_mla": [0, 15, 32, 1 << 20],
    "attention.key_length": [48, 64, 81],
    "attention.value_length": [16, 80],
    "attention.head_count_kv": [0, 2, 4],
    "rope.dimension_count": [0, 3, 14, 32],
    "expert_group_count": [2, 7, 1 << 20],
    "expert_group_used_count": [2, 1 << 20],
    "expert_gating_func": [3, 4, 9],
    "expert_shared_count": [0, 2, 1 << 17],
    "expert_weights_scale": [-1.0, float("nan")],
    "expert_weights_norm": [1],
    "leading_dense_block_count": [1, 513],
    "nextn_predict_layers": [2, 65],
    "rope.scaling.yarn_log_multiplier": [-1.0, float("nan"), float("inf")],
    "attention.temperature_scale": [0.1],
}


@pytest.mark.parametrize("key", BAD)
def test_sizes_that_contradict_each_other_are_named(key: str, tmp_path: Path) -> None:
    for value in BAD[key]:
        with pytest.raises(EdgeLLMError, match=r"bad\.gguf"):
            program_of(tiny(tmp_path / "bad.gguf", {key: value}))
            pytest.fail(f"{key} {value}: accepted")


def test_sizes_that_no_register_holds_are_refused_by_name_where_they_would_run(tmp_path: Path) -> None:
    sizes = {"n_embd": 64, "n_ff": 64, "n_head": 4, "head_dim": 12}
    program = program_of(write_tiny_model(tmp_path / "odd.gguf", "deepseek2", "F32", **sizes))
    assert np.isfinite(ReferenceExecutor(program).run(single_sequence(program, 5))).all()
    with pytest.raises(UnsupportedError, match=r"columns|multiples of 16"):
        cpu_executor(program, 2)


def test_the_first_files_of_glm_are_known_by_their_vocabulary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = {"n_layer": 3, "leave_out": ("deepseek2.expert_gating_func",)}
    by_softmax = program_of(tiny(tmp_path / "m.gguf", **whole))
    assert {(op.scores, op.best) for op in by_softmax.ops if isinstance(op, Route)} == {("softmax", 1)}
    monkeypatch.setattr(deepseek2, "GLM_VOCABULARY", by_softmax.n_vocab)
    monkeypatch.setattr(deepseek2, "GLM_LAYERS", (3,))
    by_sigmoid = program_of(tiny(tmp_path / "m.gguf", **whole))
    assert {(op.scores, op.best) for op in by_sigmoid.ops if isinstance(op, Route)} == {("sigmoid", 2)}


def test_blocks_that_draft_are_left_out_and_dense_models_need_no_experts(tmp_path: Path) -> None:
    names = program_of(tiny(tmp_path / "m.gguf", {"nextn_predict_layers": 1})).tensors
    assert any(name.startswith("blk.0.") for name in names) and not any(name.startswith("blk.1.") for name in names)
    experts = ("ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
    experts += ("ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp")
    left_out = [f"blk.{i}.{name}.weight" for i in range(2) for name in experts]
    left_out += [f"blk.{i}.exp_probs_b.bias" for i in range(2)]
    shapes = {"ffn_gate": (64, 64), "ffn_up": (64, 64), "ffn_down": (64, 64)}
    dense = {f"blk.{i}.{name}.weight": np.ones(shape, np.float32) for i in range(2) for name, shape in shapes.items()}
    program = program_of(
        tiny(tmp_path / "m.gguf", {"leading_dense_block_count": 2}, leave_out=tuple(left_out), extra_tensors=dense)
    )
    assert not any(isinstance(op, Route) for op in program.ops)


def test_yarn_scales_all_scores_by_the_square_of_its_magnitude(tmp_path: Path) -> None:
    yarn = {"rope.scaling.type": "yarn", "rope.scaling.factor": 40.0, "rope.scaling.original_context_length": 64}
    plain = next(op.scale for op in program_of(tiny(tmp_path / "m.gguf")).ops if isinstance(op, Attention))
    program = program_of(tiny(tmp_path / "m.gguf", yarn | {"rope.scaling.yarn_log_multiplier": 0.0707}))
    magnitude = 1 + 0.0707 * np.log(40)
    assert next(op.scale for op in program.ops if isinstance(op, Attention)) == pytest.approx(plain * magnitude**2)
    assert program.ropes["rope"].magnitude == 1.0
    program = program_of(tiny(tmp_path / "m.gguf", yarn))  # as transformers computes what does not say it
    assert next(op.scale for op in program.ops if isinstance(op, Attention)) == plain
    assert program.ropes["rope"].magnitude == pytest.approx(1 + 0.1 * np.log(40))
