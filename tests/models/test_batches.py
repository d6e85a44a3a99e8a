"""What a batch may say beside its tokens, against transformers: how far one sees, embeddings, positions in parts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cpu_programs import FORMS, cpu_executor, single_sequence
from gpu_device import device
from test_models import MODELS, SMALL, nmse, transformers_model
from tiny_models import write_transformers_model

from edgellm.formats.errors import ParameterError
from edgellm.formats.gguf import GGUFFile
from edgellm.kernels.executors import EXECUTORS, open_executor
from edgellm.kernels.program import Batch, Executor, Program
from edgellm.kernels.reference import ReferenceExecutor
from edgellm.models import build_program

N_TOKENS = 300
PICTURE = slice(30, 281)  # its tokens see each other, and cross the places where attention is cut
SECTIONS = (3, 2, 3)  # frequencies that turn by time, height and width


@pytest.fixture
def judged(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """A random model of transformers, and its program."""
    kind, options = MODELS[request.param]
    model = transformers_model(kind, {**options, "max_position_embeddings": 1024})
    with GGUFFile.open(write_transformers_model(tmp_path / "model.gguf", model)) as gguf:
        yield model, build_program(gguf)


def batch_of(program: Program, **more: Any) -> Batch:
    return replace(single_sequence(program, N_TOKENS, seed=1), **more)


def sight(start: int, stop: int) -> np.ndarray:
    """Causal, but that the tokens from ``start`` to ``stop`` see each other."""
    sees = np.arange(N_TOKENS, dtype=np.int32)
    sees[start:stop] = stop - 1
    return sees


def transformers_logits(model: Any, tokens: np.ndarray, **inputs: Any) -> np.ndarray:
    torch = pytest.importorskip("torch")

    with torch.no_grad():
        given = inputs if "inputs_embeds" in inputs else {"input_ids": torch.tensor(tokens[None]), **inputs}
        return model(**given).logits[0].float().numpy()


def visible(sees: np.ndarray, window: int = 0) -> Any:
    """transformers' mask (1, 1, n, n): 0 where a position is seen."""
    torch = pytest.importorskip("torch")

    own = np.arange(len(sees))
    seen = own[None, :] <= sees[:, None]
    if window:
        seen &= own[None, :] > own[:, None] - window
    return torch.tensor(np.where(seen, 0, np.finfo(np.float32).min).astype(np.float32))[None, None]


@pytest.mark.parametrize(
    ("judged", "block"), [("llama", PICTURE), ("llama", slice(0, N_TOKENS)), ("gemma3", PICTURE)], indirect=["judged"]
)
def test_tokens_that_see_further_have_transformers_logits(judged: Any, block: slice) -> None:
    model, program = judged
    batch = batch_of(program, sees=sight(block.start, block.stop))
    mask: Any = visible(batch.sees)
    if window := getattr(model.config, "sliding_window", None):
        mask = {"full_attention": mask, "sliding_attention": visible(batch.sees, window)}
    expected = transformers_logits(model, batch.tokens, attention_mask=mask)
    assert nmse(ReferenceExecutor(program).run(batch), expected) <= 1e-10


@pytest.mark.parametrize("judged", ["llama", "gemma3"], indirect=True)
def test_embeddings_in_place_of_tokens_have_transformers_logits(judged: Any) -> None:
    torch = pytest.importorskip("torch")

    model, program = judged
    rows = np.arange(*PICTURE.indices(N_TOKENS))
    values = np.random.default_rng(2).standard_normal((len(rows), program.n_embd)).astype(np.float32)
    batch = batch_of(program, embeddings=(rows, values))
    with torch.no_grad():
        inputs = model.get_input_embeddings()(torch.tensor(batch.tokens[None]))
    inputs[0, rows] = torch.tensor(values)
    expected = transformers_logits(model, batch.tokens, inputs_embeds=inputs)
    assert nmse(ReferenceExecutor(program).run(batch), expected) <= 1e-10


def test_positions_in_parts_have_transformers_logits(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="the judge of logits is transformers on torch")
    transformers = pytest.importorskip("transformers", reason="the judge of logits is transformers")
    plain = transformers_model("Qwen2", {"max_position_embeddings": 1024})
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(SECTIONS)}
    config = transformers.Qwen2VLTextConfig(**SMALL, rope_parameters=rope, attn_implementation="eager")
    judge = transformers.Qwen2VLTextModel(config).eval()
    judge.load_state_dict(plain.model.state_dict())
    parts = np.random.default_rng(3).integers(0, 200, (3, N_TOKENS)).astype(np.int32)
    with GGUFFile.open(write_transformers_model(tmp_path / "model.gguf", plain)) as gguf:
        program = in_parts(build_program(gguf))
        batch = batch_of(program, rope_positions=parts)
        with torch.no_grad():
            mask = visible(sight(0, 0))
            hidden = judge(
                input_ids=torch.tensor(batch.tokens[None]),
                position_ids=torch.tensor(parts[:, None].astype(np.int64)),
                attention_mask={"full_attention": mask},
            )[0]
            expected = plain.lm_head(hidden)[0].numpy()
        assert nmse(ReferenceExecutor(program).run(batch), expected) <= 1e-10


def in_parts(program: Program) -> Program:
    """Its rotations by positions of three parts."""
    part_of = np.repeat(np.arange(3), SECTIONS)
    return replace(program, ropes={name: replace(rope, part_of=part_of) for name, rope in program.ropes.items()})


def everything(program: Program) -> dict[str, Any]:
    """All that a batch can say, at once."""
    rng = np.random.default_rng(4)
    rows = np.arange(*PICTURE.indices(N_TOKENS))
    return {
        "sees": sight(PICTURE.start, PICTURE.stop),
        "embeddings": (rows, rng.standard_normal((len(rows), program.n_embd)).astype(np.float32)),
        "rope_positions": rng.integers(0, 200, (3, N_TOKENS)).astype(np.int32),
    }


def part(batch: Batch, rows: slice) -> Batch:
    """Some tokens of a batch, with what it says of them."""
    assert batch.embeddings is not None and batch.sees is not None and batch.rope_positions is not None
    inside = (rows.start <= batch.embeddings[0]) & (batch.embeddings[0] < rows.stop)
    return Batch(
        *(a[rows] for a in (batch.tokens, batch.positions, batch.sequences, batch.outputs)),
        tables=batch.tables,
        sees=batch.sees[rows],
        embeddings=(batch.embeddings[0][inside] - rows.start, batch.embeddings[1][inside]),
        rope_positions=batch.rope_positions[:, rows],
    )


def fast_executor(form: str, program: Program) -> Executor:
    """The CPU's in a form, or the GPU's."""
    if form == "gpu":
        return open_executor(device(form), program, 16, max_tokens=N_TOKENS)
    return cpu_executor(program, 16, 2, N_TOKENS, form)


@pytest.mark.parametrize("form", [*FORMS, "gpu"])
@pytest.mark.parametrize("judged", ["llama", "gemma3"], indirect=True)
def test_a_fast_executor_agrees_with_the_reference_and_with_itself_in_pieces(judged: Any, form: str) -> None:
    program = in_parts(judged[1]) if judged[0].config.head_dim == 2 * sum(SECTIONS) else judged[1]
    batch = batch_of(program, **everything(program))
    executor = fast_executor(form, program)
    whole = executor.run(batch).copy()
    hooked = executor.run(batch, lambda index, op, read: None).copy()
    cuts = (slice(0, 7), slice(7, PICTURE.start), PICTURE, slice(PICTURE.stop, N_TOKENS))
    pieces = [executor.run(part(batch, rows)).copy() for rows in cuts]
    # rows by rows as others want them: the last only, none
    last = executor.run(replace(batch, outputs=np.arange(N_TOKENS) == N_TOKENS - 1)).copy()
    executor.close()
    assert nmse(whole, ReferenceExecutor(program, 16, N_TOKENS, "float16").run(batch)) <= 1e-5
    assert np.array_equal(whole, hooked)
    assert np.array_equal(whole, np.concatenate(pieces))
    assert np.array_equal(whole[-1:], last)


BAD = {
    "sees the past alone": {"sees": sight(0, 0) - 1},
    "sees less than the one before": {"sees": np.maximum(sight(0, 0), np.where(sight(0, 0) == 5, 9, 0))},
    "sees what is not there": {"sees": sight(0, N_TOKENS) + 1},
    "embeddings of another width": {"embeddings": (np.arange(2), np.zeros((2, 3), np.float32))},
    "embeddings of a row that is not there": {"embeddings": (np.array([N_TOKENS]), np.zeros((1, 64), np.float32))},
    "positions of too few parts": {"rope_positions": np.zeros((1, N_TOKENS), np.int32)},
    "positions of too few tokens": {"rope_positions": np.zeros((3, 1), np.int32)},
}


@pytest.mark.parametrize("judged", ["llama"], indirect=True)
@pytest.mark.parametrize("name", EXECUTORS)
def test_a_batch_that_says_what_cannot_be_is_refused_by_every_executor(name: str, judged: Any) -> None:
    program = in_parts(judged[1])
    executor = open_executor(device(name), program, 16, n_threads=2, max_tokens=N_TOKENS)
    for bad in BAD.values():
        with pytest.raises(ParameterError):
            executor.run(batch_of(program, **bad))
    executor.close()
