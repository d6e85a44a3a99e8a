"""config.json against transformers: each key, changed or left out, gives its logits or is refused by its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import decoder_models
import numpy as np
import pytest
from checkpoint_folders import save_byte_level
from test_checkpoint_convert import TOKENS, VOCAB
from test_models import (
    DELTA,
    EXPERTS,
    GEMMA2,
    GEMMA4_E,
    GPT_OSS,
    GRANITE,
    LINEAR_ROPE,
    LLAMA3_ROPE,
    MIXTRAL,
    OLMOE,
    SHARED,
    YARN_ROPE,
    nmse,
    transformers_logits,
    transformers_model,
)

from edgellm.formats.errors import EdgeLLMError
from edgellm.kernels.program import Batch
from edgellm.kernels.reference import ReferenceExecutor
from edgellm.models import build_program
from edgellm.models.parts.checkpoint_keys import (
    ALIASES,
    DEFAULTS,
    HARMLESS,
    HARMLESS_IN,
    NOTED,
    ONLY,
    ONLY_IN,
    USED,
    check_keys,
)
from edgellm.quantize.checkpoint import FLAT, TIES, _Unwritten
from edgellm.quantize.inputs import open_input

transformers = pytest.importorskip("transformers", reason="the judge of checkpoints is transformers")

CONFIGS = {
    "llama": "LlamaConfig",
    "mistral": "MistralConfig",
    "qwen2": "Qwen2Config",
    "qwen3": "Qwen3Config",
    "qwen3_moe": "Qwen3MoeConfig",
    "mixtral": "MixtralConfig",
    "qwen2_moe": "Qwen2MoeConfig",
    "olmoe": "OlmoeConfig",
    "gemma": "GemmaConfig",
    "gemma2": "Gemma2Config",
    "gpt_oss": "GptOssConfig",
    "qwen3_5_text": "Qwen3_5TextConfig",
    "qwen3_5_moe_text": "Qwen3_5MoeTextConfig",
    "qwen3_5": "Qwen3_5Config",
    "qwen3_5_moe": "Qwen3_5MoeConfig",
    "granite": "GraniteConfig",
    "granitemoe": "GraniteMoeConfig",
    "granitemoeshared": "GraniteMoeSharedConfig",
    "gemma3_text": "Gemma3TextConfig",
    "gemma3": "Gemma3Config",
    "gemma4_text": "Gemma4TextConfig",
    "gemma4": "Gemma4Config",
    **decoder_models.CONFIGS,
    "mamba2": "Mamba2Config",
    "granitemoehybrid": "GraniteMoeHybridConfig",
    "falcon_h1": "FalconH1Config",
    "nemotron_h": "NemotronHConfig",
    "gemma4_unified_text": "Gemma4UnifiedTextConfig",
    "gemma4_unified": "Gemma4UnifiedConfig",
}
# model_type -> (transformers' class, what its configuration has besides the small sizes of all)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"rope_parameters": LLAMA3_ROPE}),
    "mistral": ("Mistral", {"sliding_window": 33, "num_key_value_heads": 2}),
    "qwen2": ("Qwen2", {"rope_parameters": YARN_ROPE}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3_moe": ("Qwen3Moe", EXPERTS | {"head_dim": 16}),
    "mixtral": ("Mixtral", MIXTRAL | {"sliding_window": 33, "head_dim": 16}),
    "qwen2_moe": ("Qwen2Moe", EXPERTS | SHARED),
    "olmoe": ("Olmoe", OLMOE),
    "gemma": ("Gemma", {"head_dim": 16}),
    "gemma2": ("Gemma2", GEMMA2),
    "gpt_oss": ("GptOss", GPT_OSS),
    "qwen3_5_text": ("Qwen3_5", DELTA),
    "qwen3_5_moe_text": ("Qwen3_5Moe", DELTA | EXPERTS | {"shared_expert_intermediate_size": 40}),
    "granite": ("Granite", GRANITE),
    "granitemoe": ("GraniteMoe", GRANITE | MIXTRAL),
    "granitemoeshared": ("GraniteMoeShared", GRANITE | MIXTRAL | {"shared_intermediate_size": 40}),
    "gemma3_text": (
        "Gemma3ForCausalLM",
        {"num_hidden_layers": 4, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 10,
         "layer_types": ["sliding_attention", "full_attention"] * 2},
    ),
    "gemma4_text": ("Gemma4", GEMMA4_E | {"num_kv_shared_layers": 2}),
}  # fmt: skip
SEEING = {"qwen2_vl": "qwen2vl", "qwen2_5_vl": "qwen2vl 2.5", "glm_ocr": "glm4 that sees"}
# model_type -> (a row of DECODERS, what its published config.json has besides what transformers writes)
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "minimax_m2": (
        "minimax-m2",
        {"attn_type_list": [1, 1, 1], "scoring_func": "sigmoid", "use_routing_bias": True, "use_qk_norm": True}
        | {"qk_norm_type": "per_layer", "shared_intermediate_size": 0, "use_mtp": True, "num_mtp_modules": 3}
        | {"mtp_transformer_layers": 1},
    ),
    "starcoder2": ("starcoder2", {"mlp_type": "default", "norm_type": "layer_norm"}),
    "phi3": ("phi3", {"full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False}),
    "hunyuan_v1_dense": (
        "hunyuan-dense",
        {"use_qk_norm": True, "use_cla": False, "cla_share_factor": 2, "attention_head_dim": 16, "norm_type": "rms"}
        | {"org_vocab_size": 280, "add_classification_head": False, "class_num": 0, "dense_list": [64, 0]}
        | {"pool_type": "last", "pad_id": 1, "im_start_id": 4, "use_rotary_pos_emb": True}
        | {"position_embedding_xdrope": False},
    ),
    "deepseek_v2": (
        "deepseek2 groups by one",
        {"scoring_func": "softmax", "moe_layer_freq": 1, "aux_loss_alpha": 0.001, "seq_aux": True, "ep_size": 1},
    ),
    "deepseek_v3": (
        "deepseek2 groups",
        {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1, "aux_loss_alpha": 0.001}
        | {"seq_aux": True, "ep_size": 1},
    ),
    "glm4_moe_lite": (
        "deepseek2 flash",
        {"topk_method": "noaux_tc", "first_k_dense_replace": 1, "partial_rotary_factor": 1.0},
    ),
}
ROWS = {model_type: row for model_type, (row, _) in PUBLISHED.items()}


@pytest.mark.parametrize("model_type", CONFIGS)
def test_every_key_that_transformers_writes_has_its_row(model_type: str) -> None:
    config = getattr(transformers, CONFIGS[model_type])()
    generation = transformers.GenerationConfig()._get_default_generation_params()
    only = ONLY.keys() | ONLY_IN.get(model_type, {}).keys()
    known = USED[model_type] | HARMLESS | HARMLESS_IN[model_type] | only | NOTED.keys()
    assert set(config.to_dict()) | set(generation) <= known
    assert not USED[model_type] & (HARMLESS | HARMLESS_IN[model_type])
    config.allow_global_per_layer_attribute_access = True
    for key, value in DEFAULTS[model_type].items():
        if key == "rope_theta":
            assert config.default_theta == value
        else:
            own = next((own for own, usual in ALIASES.get(model_type, {}).items() if usual == key), key)
            value_there = getattr(config, own if hasattr(config, own) else key)
            by_layer = isinstance(value_there, list) and set(value_there) == {value}  # gemma3n writes widths so
            assert value_there == value or by_layer or key in ("sliding_window", "num_key_value_heads"), key


def model_folder(folder: Path, model_type: str, **options: Any) -> dict[str, Any]:
    """A checkpoint with weights at random; its config.json."""
    kind, own = MODELS.get(model_type) or decoder_models.DECODERS[(SEEING | ROWS)[model_type]]
    save_byte_level(folder)
    transformers_model(kind, {"tie_word_embeddings": False} | own | VOCAB | options).save_pretrained(folder)
    return json.loads((folder / "config.json").read_text("utf-8"))


def converted_logits(folder: Path) -> np.ndarray:
    """Logits of the program that the conversion proves, from the tensors as they would be written in F32."""
    with open_input(folder) as source:
        program = build_program(_Unwritten(source)).for_context(len(TOKENS))
        return ReferenceExecutor(program).run(Batch.single(program, TOKENS))


def loaded_logits(folder: Path) -> np.ndarray:
    """What transformers computes with the folder."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    sees = "vision_config" in config and config["model_type"] in TIES
    kind = transformers.AutoModelForImageTextToText if sees else transformers.AutoModelForCausalLM
    model = kind.from_pretrained(folder, dtype="float32", attn_implementation="eager")
    return transformers_logits(model.eval(), TOKENS)


def flat(config: dict[str, Any]) -> dict[str, Any]:
    """The settings of a model that sees as its first checkpoints have them, those of the text beside its own."""
    text = {key: value for key, value in config["text_config"].items() if key != "model_type"}
    around = {key: value for key, value in config.items() if key != "text_config"}
    return text | around | {"vision_token_id": 151654}


def check(folder: Path, *names: str) -> str:
    """ "refused" by one of these names, or "equal" to transformers; what cannot be loaded there may have any error."""
    try:
        logits = converted_logits(folder)
    except EdgeLLMError as error:
        if not any(name in str(error) for name in names):
            with pytest.raises(Exception):  # noqa: B017
                loaded_logits(folder)
        return "refused"
    # transformers takes a delta rule in chunks of 64, and rounds more
    limit = 1e-8 if "linear_num_key_heads" in (folder / "config.json").read_text("utf-8") else 1e-10
    assert nmse(logits, loaded_logits(folder)) <= limit, names
    return "equal"


OTHER: dict[str, list[Any]] = {
    "architectures": [["GPT2LMHeadModel"]],
    "model_type": ["gpt2"],
    "attn_logit_softcapping": [50.0],
    "dtype": ["float16"],
    "final_logit_softcapping": [30.0, 0.0],
    "head_dim": [8, 32],
    "hidden_act": ["gelu", "swish"],
    "hidden_activation": ["silu", "gelu"],
    "id2label": [{"0": "A"}],
    "label2id": [{"A": 0}],
    "layer_types": [["full_attention"] * 4, ["full_attention"] * 3, ["sliding_attention"] * 3,
                    ["chunked_attention"] * 3, ["sliding_attention"] * 4,
                    ["full_attention", "sliding_attention", "full_attention"]],
    "max_window_layers": [1, 2, 99],
    "original_max_position_embeddings": [32],
    "partial_rotary_factor": [0.5, 1.0],
    "per_layer_config": [{"0": {"intermediate_size": 32}}],
    "problem_type": ["regression"],
    "attention_k_eq_v": [],  # with it other tensors are there, and none for values
    "qkv_bias": [],  # without it other tensors are there: see test_models
    "router_jitter_noise": [0.5],
    "rope_parameters": [LINEAR_ROPE, {"rope_type": "dynamic", "factor": 2.0}, {"rope_theta": 500.0}],
    "rope_scaling": [{"type": "linear", "factor": 2.0}, {"rope_type": "linear", "factor": 0.5}],
    "rope_theta": [500.0],
    "rope_local_base_freq": [500.0],
    "sliding_window": [7, 1],
    "sliding_window_pattern": [2],
    "_sliding_window_pattern": [2],
    "transformers_version": ["4.40.0"],
    "rope_interleaved": [True],
    "use_sliding_window": [True],
    "attention_bias": [True],
    "mlp_bias": [True],
    "use_mrope": [True],
    "num_local_experts": [4],
    "no_rope_layers": [[1, 0, 1]],
    "attention_chunk_size": [4],
    "residual_multiplier": [0.2],
    "attention_multiplier": [0.2],
    "embedding_multiplier": [12.0],
    "logits_scaling": [8.0],
}  # fmt: skip


def others(key: str, value: Any) -> list[Any]:
    """Values that the key could have instead of its own."""
    if key in OTHER:
        return [other for other in OTHER[key] if other != value]
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int | float):
        return [value * 2 if value else 1]
    return [3] if key.endswith("_token_id") else ["other"]


@pytest.mark.parametrize("model_type", MODELS)
def test_a_key_with_another_value_gives_transformers_logits_or_is_refused_by_name(
    model_type: str, tmp_path: Path
) -> None:
    config = model_folder(tmp_path, model_type)
    path = tmp_path / "config.json"
    assert check(tmp_path, "as saved") == "equal"
    for key in sorted({*config, *OTHER}):
        for value in others(key, config.get(key)):
            path.write_text(json.dumps(config | {key: value}), "utf-8")
            check(tmp_path, key, "GPT2LMHeadModel", "the tensor blk.")


@pytest.mark.parametrize("model_type", MODELS)
def test_a_key_left_out_is_what_transformers_takes_it_for(model_type: str, tmp_path: Path) -> None:
    config = model_folder(tmp_path, model_type)
    for key in config.keys() - {"model_type", "vocab_size"}:  # which the class, and the embedding, tell as well
        (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != key}), "utf-8")
        check(tmp_path, key)


@pytest.mark.parametrize("model_type", PUBLISHED)
def test_what_published_settings_say_besides_is_the_usual_or_refused_by_name(model_type: str, tmp_path: Path) -> None:
    config, more = model_folder(tmp_path, model_type), PUBLISHED[model_type][1]
    (tmp_path / "config.json").write_text(json.dumps(config | more), "utf-8")
    assert check(tmp_path, "as published") == "equal"
    for key in more.keys() - HARMLESS_IN[model_type]:
        value = [0, 1, 1] if key == "attn_type_list" else others(key, more[key])[0]
        (tmp_path / "config.json").write_text(json.dumps(config | more | {key: value}), "utf-8")
        with pytest.raises(EdgeLLMError, match=f"json: {key} is"):
            converted_logits(tmp_path)
    with pytest.raises(EdgeLLMError, match=r"is .*, and the answers may depend on it"):  # elsewhere they are unknown
        check_keys(tmp_path, {key: value for key, value in more.items() if key not in ONLY}, "llama")


def test_kimi_k2_is_a_deepseek_of_another_name(tmp_path: Path) -> None:
    config = model_folder(tmp_path, "deepseek_v3")
    expected = converted_logits(tmp_path)
    for names in ({"architectures": ["DeepseekV3ForCausalLM"]}, {"architectures": None}):
        (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "kimi_k2"} | names), "utf-8")
        assert np.array_equal(converted_logits(tmp_path), expected)
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "kimi_k9"}), "utf-8")
    with pytest.raises(EdgeLLMError, match="model_type is kimi_k9"):
        converted_logits(tmp_path)


@pytest.mark.parametrize("model_type", SEEING)
@pytest.mark.parametrize("tied", [False, True])
def test_a_model_that_sees_may_say_in_its_text_that_its_matrices_are_one(
    model_type: str, tied: bool, tmp_path: Path
) -> None:
    config = model_folder(tmp_path, model_type, tie_word_embeddings=tied)
    for around in ({}, {"tie_word_embeddings": False}):
        frame = {key: value for key, value in config.items() if key != "tie_word_embeddings"} | around
        frame["text_config"] = config["text_config"] | {"tie_word_embeddings": tied}
        (tmp_path / "config.json").write_text(json.dumps(frame), "utf-8")
        assert check(tmp_path, "tied by the text") == "equal"


@pytest.mark.parametrize("model_type", FLAT)
def test_the_settings_of_a_model_that_sees_may_be_flat(model_type: str, tmp_path: Path) -> None:
    config = flat(model_folder(tmp_path, model_type))
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
    assert check(tmp_path, "flat") == "equal"
    rope = {"rope_theta": 1e6, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
    first = {key: value for key, value in config.items() if key != "rope_parameters"} | rope
    (tmp_path / "config.json").write_text(json.dumps(first), "utf-8")
    assert check(tmp_path, "rotations as they were") == "equal"
    for key, value in (("rms_norm_eps", 0.05), ("attention_bias", True), ("vision_tokens", 1)):
        (tmp_path / "config.json").write_text(json.dumps(config | {key: value}), "utf-8")
        assert check(tmp_path, key) == ("equal" if key == "rms_norm_eps" else "refused")


def without(rope: dict[str, Any], *names: str) -> dict[str, Any]:
    """The rotation without some of its numbers."""
    return {key: value for key, value in rope.items() if key not in names}


ROPES: dict[str, dict[str, Any]] = {
    "llama3": {"rope_parameters": LLAMA3_ROPE},
    "llama3 as it was spelled": {"rope_scaling": LLAMA3_ROPE, "rope_theta": 5000.0},
    "llama3 without its length": {"rope_scaling": without(LLAMA3_ROPE, "original_max_position_embeddings")},
    "llama3, its length outside": {"rope_scaling": LLAMA3_ROPE, "original_max_position_embeddings": 32},
    "llama3 without a factor": {"rope_scaling": without(LLAMA3_ROPE, "factor")},
    "linear": {"rope_parameters": LINEAR_ROPE},
    "linear as it was spelled": {"rope_scaling": {"type": "linear", "factor": 3.0}, "rope_theta": 2000.0},
    "linear by zero": {"rope_scaling": {"type": "linear", "factor": 0.0}},
    "both spellings": {"rope_scaling": LINEAR_ROPE, "rope_parameters": YARN_ROPE},
    "yarn": {"rope_parameters": YARN_ROPE},
    "yarn as it was spelled": {"rope_scaling": without(YARN_ROPE, "rope_type", "rope_theta") | {"type": "yarn"}},
    "yarn without its length": {"rope_parameters": without(YARN_ROPE, "original_max_position_embeddings")},
    "yarn without a factor": {"rope_parameters": {**YARN_ROPE, "factor": None}},
    "yarn with betas": {"rope_parameters": YARN_ROPE | {"beta_fast": 8, "beta_slow": 2}},
    "yarn with one beta": {"rope_parameters": YARN_ROPE | {"beta_fast": 1, "beta_slow": 1}},
    "yarn with wrong betas": {"rope_parameters": YARN_ROPE | {"beta_fast": 1, "beta_slow": 2}},
    "yarn with a magnitude": {"rope_parameters": YARN_ROPE | {"attention_factor": 1.7}},
    "yarn with half an mscale": {"rope_parameters": YARN_ROPE | {"mscale": 0.7}},
    "yarn with mscale": {"rope_parameters": YARN_ROPE | {"mscale": 0.7, "mscale_all_dim": 1.3}},
    "yarn without truncation": {"rope_parameters": YARN_ROPE | {"truncate": False}},
    "part of a head": {"rope_parameters": LINEAR_ROPE | {"partial_rotary_factor": 0.5}},
    "sections": {"rope_parameters": LINEAR_ROPE | {"mrope_section": [2, 3, 3]}},
    "by layer": {"rope_parameters": {"full_attention": LINEAR_ROPE, "sliding_attention": {"rope_type": "default"}}},
    "sliding layers scaled": {"rope_parameters": {"full_attention": LINEAR_ROPE, "sliding_attention": LINEAR_ROPE}},
    "longrope": {"rope_parameters": {"rope_type": "longrope", "factor": 2.0, "short_factor": [1.0] * 8,
                                     "long_factor": [2.0] * 8, "original_max_position_embeddings": 64}},
}  # fmt: skip


@pytest.mark.parametrize("model_type", MODELS)
def test_every_rotation_gives_transformers_logits_or_is_refused_by_name(model_type: str, tmp_path: Path) -> None:
    config = model_folder(tmp_path, model_type)
    plain = {key: value for key, value in config.items() if not key.startswith("rope")}
    found = {}
    for name, keys in ROPES.items():
        as_layers = model_type in ("gemma3_text", "gemma4_text") and "full_attention" not in keys.get(
            "rope_parameters", {}
        )
        if as_layers and "rope_parameters" in keys:
            keys = keys | {"rope_parameters": {"full_attention": keys["rope_parameters"]}}
        (tmp_path / "config.json").write_text(json.dumps(plain | keys), "utf-8")
        found[name] = check(tmp_path, "rope_scaling", "rope_parameters")
    yarn = "yarn without truncation" if model_type == "gpt_oss" else "yarn"
    kinds = (
        ("linear", yarn)
        if model_type.startswith("qwen3_5")
        else ("llama3", "llama3 without its length", "linear", yarn)
    )
    if model_type != "gpt_oss":
        kinds += ("yarn with one beta",)
    if model_type == "gemma4_text":  # whose layers that see everything turn a part of their heads, at most
        kinds = ()
    assert all(found[name] == "equal" for name in kinds)
    assert found["sliding layers scaled"] == found["longrope"] == "refused"
