"""What sets decoders of the long tail apart: rotations by the length of a context, queries by position, bad numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_models import transformers_model
from tiny_models import write_tiny_model, write_transformers_model

from edgellm.formats.errors import EdgeLLMError
from edgellm.formats.gguf import GGUFFile
from edgellm.kernels.program import Program
from edgellm.models import build_program

SIZES: dict[str, Any] = {"n_embd": 64, "n_ff": 64, "n_head": 4, "n_head_kv": 2, "head_dim": 16}
SHORT = {"rope_factors_short.weight": np.arange(1, 9).astype(np.float32)}
LONG = {"rope_factors_long.weight": np.arange(3, 11).astype(np.float32)}
KEYS: dict[str, Any] = {"rope.scaling.original_context_length": 64, "rope.scaling.attn_factor": 1.25}
ROUTED = ("lfm2moe", "minimax-m2", "glm4moe")


def program_of(path: Path) -> Program:
    """The program of a file."""
    with GGUFFile.open(path) as gguf:
        return build_program(gguf)


def with_keys(path: Path, architecture: str, keys: dict[str, Any], **more: Any) -> Path:
    """A tiny model with keys of its architecture."""
    return write_tiny_model(
        path, architecture, metadata={f"{architecture}.{key}": value for key, value in keys.items()}, **SIZES, **more
    )


def test_the_context_of_a_run_chooses_the_frequencies(tmp_path: Path) -> None:
    plain = program_of(with_keys(tmp_path / "plain.gguf", "phi3", {})).ropes["rope"]
    for kind in ({}, {"rope.scaling.type": "longrope"}):
        program = program_of(with_keys(tmp_path / "long.gguf", "phi3", KEYS | kind, extra_tensors=SHORT | LONG))
        for n_ctx, factors in ((64, SHORT), (65, LONG), (4096, LONG)):
            rope = program.for_context(n_ctx).ropes["rope"]
            assert np.array_equal(rope.inv_freq, plain.inv_freq / next(iter(factors.values()))), n_ctx
            assert rope.magnitude == 1.25
        assert not any(name.startswith("rope_factors") for name in program.tensors)


BAD: dict[str, tuple[str, dict[str, Any], dict[str, np.ndarray], str]] = {
    "factors of long contexts alone": ("phi3", KEYS, LONG, r"rope_factors_short\.weight is missing"),
    "too few factors": ("phi3", KEYS, LONG | {"rope_factors_short.weight": np.ones(7, np.float32)}, "has the shape"),
    "a factor of zero": ("phi3", KEYS, SHORT | {"rope_factors_long.weight": np.zeros(8, np.float32)}, "not positive"),
    "a scaling of others": ("llama", {"rope.scaling.type": "longrope"}, {}, "longrope"),
    "queries that grow by half a head": ("mistral3", {"rope.dimension_count": 8}, {}, r"rope\.dimension_count is 8"),
    "queries that grow without end": ("mistral3", {"attention.temperature_scale": float("inf")}, {}, "temperature_sc"),
    "no window": ("cohere2", {"attention.sliding_window": 0}, {}, "sliding_window is 0"),
    "a window of one layer": (
        "exaone4",
        {"attention.sliding_window_pattern": [True]},
        {},
        "one value for each",
    ),
    "only drafts": ("glm4", {"nextn_predict_layers": 2}, {}, "fewer than block_count"),
    "logits by less than nothing": ("command-r", {"logit_scale": -1.0}, {}, "logit_scale"),
    "groups of experts": ("glm4moe", {"expert_group_count": 8}, {}, "expert_group_count is 8"),
    "more shared experts than fit": ("glm4moe", {"expert_shared_count": 9}, {}, r"_shexp\.weight has the shape"),
    "dense layers that are not there": ("glm4moe", {"leading_dense_block_count": 1}, {}, r"blk\.0\.ffn_up\.weight"),
    **{f"{name} by softmax": (name, {"expert_gating_func": 1}, {}, "expert_gating_func is 1") for name in ROUTED},
    **{f"{name} without one": (name, {"expert_count": 4}, {}, r"ffn_gate_inp\.weight has") for name in ROUTED},
}


@pytest.mark.parametrize("what", BAD)
def test_what_contradicts_itself_is_named(what: str, tmp_path: Path) -> None:
    architecture, keys, tensors, named = BAD[what]
    with pytest.raises(EdgeLLMError, match=named) as caught:
        program_of(with_keys(tmp_path / "bad.gguf", architecture, keys, extra_tensors=tensors))
    assert "bad.gguf" in str(caught.value)


def test_blocks_that_draft_are_left_out(tmp_path: Path) -> None:
    model = transformers_model("Glm4", {"head_dim": 16, "pad_token_id": 0, "attention_bias": False})
    path = write_transformers_model(tmp_path / "drafts.gguf", model, {"nextn_predict_layers": 1})
    names = program_of(path).tensors
    assert any(name.startswith("blk.1.") for name in names) and not any(name.startswith("blk.2.") for name in names)
