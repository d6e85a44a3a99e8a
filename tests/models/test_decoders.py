"""What sets decoders of the long tail apart: rotations by the length of a context, queries by position, bad numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_models import transformers_model
from tiny_models import write_tiny_model, write_transformers_model

from edgellm.formats.errors import EdgeLLMError
from edgellm.formats.gguf import GGUFFile
from edgellm.kernels.kv import KVLayer
from edgellm.kernels.ops import Route
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


YARN: dict[str, Any] = {"rope.scaling.type": "yarn", "rope.scaling.factor": 8.0}
YARN |= {"rope.scaling.original_context_length": 64}
ONE_EXPERT = {"expert_count": 1, "expert_used_count": 1}
ONLY_ROUTERS = dict.fromkeys(("bailingmoe", "ernie4_5-moe", "hunyuan-moe", "qwen3moe", "olmoe", "granitemoe"), 1)
ONLY_ROUTERS |= {"nemotron_h_moe": 2}
SAYS_THE_USUAL: dict[str, tuple[str, dict[str, Any]]] = {
    "the magnitude of YaRN": ("olmo2", YARN | {"rope.scaling.yarn_attn_factor": 1.2079441541679836}),
    "no magnitude besides it": ("olmo2", YARN | {"rope.scaling.yarn_attn_factor": 1.0}),
    "one expert": ("hunyuan-dense", ONE_EXPERT),
    "experts that sum to 1": ("minimax-m2", {"expert_weights_norm": True, "expert_weights_scale": 1.0}),
    "experts of LFM2 that do": ("lfm2moe", {"expert_weights_norm": True, "expert_weights_scale": 1.0}),
    "no kind of router": ("glm4moe", {"expert_gating_func": 0}),
    **{f"the only router of {name}": (name, {"expert_gating_func": router}) for name, router in ONLY_ROUTERS.items()},
    "a token of images": ("mistral3", {"image_token_index": 10, "spatial_merge_size": 2}),
    "a length again": ("command-r", {"max_position_embeddings": 8192}),
    "one base": ("cohere2", {"rope.freq_base_swa": 10000.0}),
}
SAYS_ANOTHER: dict[str, tuple[str, dict[str, Any]]] = {
    **{
        f"another router than {name}'s": (name, {"expert_gating_func": 3 - router})
        for name, router in ONLY_ROUTERS.items()
    },
    "another magnitude": ("olmo2", YARN | {"rope.scaling.yarn_attn_factor": 1.3}),
    "a magnitude of Laguna's without scaling": ("laguna", {"rope.scaling.yarn_attn_factor": 1.2}),
    "a magnitude of no scaling": ("olmo2", {"rope.scaling.yarn_attn_factor": 1.2079441541679836}),
    "two experts": ("hunyuan-dense", dict.fromkeys(ONE_EXPERT, 2)),
    "one expert elsewhere": ("qwen3", ONE_EXPERT),
    "experts that do not sum to 1": ("minimax-m2", {"expert_weights_norm": False}),
    "experts that would": ("olmoe", {"expert_weights_norm": True}),
    "another base": ("cohere2", {"rope.freq_base_swa": 500.0}),
    "a base and none": ("exaone4", {"rope.freq_base_swa": 500.0}),
}


@pytest.mark.parametrize("what", SAYS_THE_USUAL)
def test_a_key_that_says_what_is_computed_anyway_changes_nothing(what: str, tmp_path: Path) -> None:
    architecture, keys = SAYS_THE_USUAL[what]
    usual = {key: value for key, value in keys.items() if key in YARN}
    program, plain = (program_of(with_keys(tmp_path / "keys.gguf", architecture, of)) for of in (keys, usual))
    assert program.ops == plain.ops
    assert [rope.magnitude for rope in program.ropes.values()] == [rope.magnitude for rope in plain.ropes.values()]


@pytest.mark.parametrize("what", SAYS_ANOTHER)
def test_a_key_that_says_another_thing_is_refused_by_name(what: str, tmp_path: Path) -> None:
    architecture, keys = SAYS_ANOTHER[what]
    with pytest.raises(EdgeLLMError, match=rf"{architecture}\.({'|'.join(keys)}) is"):
        program_of(with_keys(tmp_path / "keys.gguf", architecture, keys))


def test_a_file_of_laguna_has_the_whole_magnitude_of_yarn(tmp_path: Path) -> None:
    for whole, expected in (({}, 1.2079441541679836), ({"rope.scaling.yarn_attn_factor": 1.0}, 1.0)):
        ropes = program_of(with_keys(tmp_path / "keys.gguf", "laguna", YARN | whole)).ropes
        assert {name: rope.magnitude for name, rope in ropes.items()} == {"wide": pytest.approx(expected), "near": 1.0}


OLLAMAS = {
    "attention.sink_enabled": False, "attention.gating_type": 1, "attention.qk_norm": True, "decoder_sparse_step": 1,
    "attention.sliding_window": 32, "attention.sliding_window_pattern": [False, True],
    "attention.layer_types": [0, 1], "rope.partial_rotary_factor": 1.0, "rope.swa.partial_rotary_factor": 0.5,
    "rope.swa.freq_base": 500.0, "rope.swa.dimension_count": 8, "rope.swa.scaling.type": "default",
    "rope.swa.scaling.factor": 1.0, "leading_dense_block_count": 0, "expert_shared_count": 1,
}  # fmt: skip
"""What Ollama's converter says of a Laguna, besides what llama.cpp's says by the same keys."""
OLLAMAS_YARN = {
    "rope.scaling.type": "yarn", "rope.scaling.factor": 8.0, "rope.scaling.original_context_length": 64,
    "rope.scaling.attn_factor": 1.1, "rope.scaling.beta_fast": 64.0, "rope.scaling.beta_slow": 2.0,
}  # fmt: skip
UNSCALED = {"rope.scaling.type": "default", "rope.scaling.factor": 1.0, "rope.scaling.original_context_length": 64}
UNSCALED |= {"rope.scaling.beta_fast": 0.0, "rope.scaling.beta_slow": 0.0, "rope.scaling.attn_factor": 1.0}


@pytest.mark.parametrize("scaling", [UNSCALED, OLLAMAS_YARN])
def test_a_file_of_laguna_by_ollama_is_that_of_llama_cpp_under_other_names(
    scaling: dict[str, Any], tmp_path: Path
) -> None:
    usual = {name: OLLAMAS[name] for name in ("attention.sliding_window", "attention.sliding_window_pattern")}
    usual |= {"rope.freq_base_swa": 500.0, "rope.dimension_count_swa": 8, "leading_dense_block_count": 0}
    if scaling is OLLAMAS_YARN:
        named = {key: key.replace("scaling.", "scaling.yarn_") for key in scaling if "_f" in key or "beta" in key}
        usual |= {named.get(key, key): value for key, value in scaling.items()}
    plain = with_keys(tmp_path / "plain.gguf", "laguna", usual)
    tensors = {name: tensor.dequantize().reshape(tensor.shape) for name, tensor in GGUFFile.open(plain).tensors.items()}
    named_by_ollama = {name.replace("attn_gate", "attn_g"): values for name, values in tensors.items()}
    path = tmp_path / "ollama.gguf"
    ollamas = with_keys(path, "laguna", OLLAMAS | scaling, extra_tensors=named_by_ollama, leave_out=tuple(tensors))
    expected, program = program_of(plain), program_of(ollamas)
    assert program.ops == expected.ops and program.cache_layers == expected.cache_layers
    for name, rope in expected.ropes.items():
        assert np.array_equal(program.ropes[name].inv_freq, rope.inv_freq)
        assert program.ropes[name].magnitude == rope.magnitude
    for name, tensor in expected.tensors.items():
        assert np.array_equal(program.tensors[name].dequantize(), tensor.dequantize()), name


@pytest.mark.parametrize(
    "key", ["attention.sink_enabled", "attention.gating_type", "attention.qk_norm", "rope.swa.scaling.factor"]
)
def test_a_variant_of_laguna_by_ollama_that_no_program_computes_is_refused_by_name(key: str, tmp_path: Path) -> None:
    value = not OLLAMAS[key] if isinstance(OLLAMAS[key], bool) else type(OLLAMAS[key])(3)
    with pytest.raises(EdgeLLMError, match=rf"keys\.gguf: laguna\.{key} is"):
        program_of(with_keys(tmp_path / "keys.gguf", "laguna", OLLAMAS | {key: value}))
    with pytest.raises(EdgeLLMError, match=r"laguna\.dense_layers is .*leading_dense_block_count"):
        program_of(with_keys(tmp_path / "keys.gguf", "laguna", OLLAMAS | {"dense_layers": [1]}))


def test_experts_are_scaled_where_a_file_says_it(tmp_path: Path) -> None:
    for architecture in ROUTED:
        program = program_of(with_keys(tmp_path / "keys.gguf", architecture, {"expert_weights_scale": 2.5}))
        assert {op.factor for op in program.ops if isinstance(op, Route)} == {2.5}


def test_a_pattern_of_layers_may_leave_out_blocks_that_draft(tmp_path: Path) -> None:
    for pattern in ([True, False], [True, False, False]):
        keys = {"nextn_predict_layers": 1, "attention.sliding_window_pattern": pattern}
        program = program_of(with_keys(tmp_path / "drafts.gguf", "exaone4", keys, n_layer=3))
        assert [layer.window for layer in program.cache_layers if isinstance(layer, KVLayer)] == [32, 0]
    keys["attention.sliding_window_pattern"] = [True]
    with pytest.raises(EdgeLLMError, match="one value for each of 2 layers"):
        program_of(with_keys(tmp_path / "drafts.gguf", "exaone4", keys, n_layer=3))


def test_the_last_norm_of_lfm2_may_be_named_by_its_place(tmp_path: Path) -> None:
    plain = program_of(with_keys(tmp_path / "plain.gguf", "lfm2", {}))
    norm = {"output_norm.weight": plain.tensors["token_embd_norm.weight"].dequantize().reshape(-1)}
    keys = {"feed_forward_length": 96}  # of such files: three halves of what it is
    named = program_of(
        with_keys(tmp_path / "named.gguf", "lfm2", keys, extra_tensors=norm, leave_out=("token_embd_norm.weight",))
    )
    renamed = [replace(op, weight="output_norm.weight") if "token_embd_norm" in str(op) else op for op in plain.ops]
    assert list(named.ops) == renamed and named.buffers == plain.buffers


def test_blocks_that_draft_are_left_out(tmp_path: Path) -> None:
    model = transformers_model("Glm4", {"head_dim": 16, "pad_token_id": 0, "attention_bias": False})
    path = write_transformers_model(tmp_path / "drafts.gguf", model, {"nextn_predict_layers": 1})
    names = program_of(path).tensors
    assert any(name.startswith("blk.1.") for name in names) and not any(name.startswith("blk.2.") for name in names)
