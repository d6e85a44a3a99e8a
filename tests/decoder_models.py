"""The long tail of decoders for tests: tiny configurations of transformers, and what sets their GGUF files apart.

A row of DECODERS is a name that begins with the architecture, the class in transformers, and its settings besides
test_models.SMALL. ``own_keys`` and ``own_tensors`` write what llama.cpp's converter writes for them.
"""

from __future__ import annotations

from typing import Any

import long_tail_models as more
import numpy as np

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LOCAL, GLOBAL = "sliding_attention", "full_attention"
TIED = {"tie_word_embeddings": True}
ONE_KEY_HEAD = {"num_key_value_heads": 1}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 48}


def long_rope(n: int, **more: Any) -> dict[str, Any]:
    """A rotation with other frequencies behind the first 64 positions."""
    return {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0 + 0.1 * i for i in range(n)],
        "long_factor": [1.0 + 0.7 * i for i in range(n)],
        "original_max_position_embeddings": 64,
        **more,
    }


PHI3 = {"pad_token_id": 0, "original_max_position_embeddings": 64}
MINISTRAL = {
    "head_dim": 16,
    "pad_token_id": 0,
    "rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.3}
    | {"original_max_position_embeddings": 16},
}  # fmt: skip
GLM4 = {"head_dim": 16, "pad_token_id": 0, "attention_bias": False}
OLMO3 = {"sliding_window": 33, "num_hidden_layers": 4}
EXAONE = {"num_hidden_layers": 4, "sliding_window": None, "layer_types": [GLOBAL] * 4}
EXAONE_SLIDES = {"sliding_window": 33, "num_hidden_layers": 5, "sliding_window_pattern": 4}
EXAONE_SLIDES |= {"layer_types": [LOCAL, LOCAL, LOCAL, GLOBAL, LOCAL]}
SEED = {"head_dim": 24, "pad_token_id": 0}
ERNIE = {"head_dim": 24}
ALPHA = {"rope_type": "dynamic", "rope_theta": 10000.0, "alpha": 1000.0, "factor": 1.0}
SECTIONS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2]}
"""In llama.cpp a frequency that falls to none of three interleaved sections does not turn."""

# (transformers' class, what its configuration has besides SMALL)
DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "phi3": ("Phi3", PHI3 | {"sliding_window": 33}),
    "phi3 long": (
        "Phi3",
        PHI3 | ONE_KEY_HEAD | {"rope_parameters": long_rope(8), "original_max_position_embeddings": 128},
    ),
    "phi3 longer than first": (
        "Phi3",
        PHI3 | TIED | {"rope_parameters": long_rope(6, partial_rotary_factor=0.75), "num_key_value_heads": 4},
    ),
    "phi3 odd sizes": ("Phi3", PHI3 | {"hidden_size": 60, "intermediate_size": 77, "num_attention_heads": 6}),
    "mistral3": ("Ministral3", MINISTRAL),
    "mistral3 tied": ("Ministral3", MINISTRAL | TIED | {"head_dim": 32, "num_key_value_heads": 4}),
    "mistral3 one key head": (
        "Ministral3",
        MINISTRAL | ONE_KEY_HEAD | {"rope_parameters": YARN | {"llama_4_scaling_beta": 0.1}},
    ),
    "glm4": ("Glm4", GLM4),
    "glm4 biases, tied": ("Glm4", GLM4 | TIED | ONE_KEY_HEAD | {"attention_bias": True, "head_dim": 24}),
    "glm4 yarn, all turn": ("Glm4", GLM4 | {"rope_parameters": YARN | {"partial_rotary_factor": 1.0}}),
    "glm4 that sees": ("GlmOcr", {"head_dim": 16, "pad_token_id": 0, "rope_parameters": SECTIONS}),
    "smollm3": ("SmolLM3", {"num_hidden_layers": 5, "pad_token_id": 0}),
    "smollm3 tied": (
        "SmolLM3",
        TIED | ONE_KEY_HEAD | {"num_hidden_layers": 4, "pad_token_id": 0, "rope_parameters": YARN},
    ),
    "smollm3 biases": (
        "SmolLM3",
        {"num_hidden_layers": 4, "pad_token_id": 0, "attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4},
    ),
    "olmo2": ("Olmo2", {}),
    "olmo2 tied": ("Olmo2", TIED | ONE_KEY_HEAD | {"rope_parameters": LINEAR}),
    "olmo2 biases": ("Olmo2", {"attention_bias": True, "num_key_value_heads": 4}),
    "olmo2 slides": ("Olmo3", OLMO3),
    "olmo2 slides, yarn": (
        "Olmo3",
        OLMO3
        | ONE_KEY_HEAD
        | {"sliding_window": 7, "layer_types": [GLOBAL, LOCAL, LOCAL, GLOBAL]}
        | {"rope_parameters": {GLOBAL: YARN, LOCAL: {"rope_type": "default", "rope_theta": 10000.0}}},
    ),
    "exaone4": ("Exaone4", EXAONE),
    "exaone4 tied, llama3": ("Exaone4", EXAONE | TIED | ONE_KEY_HEAD | {"rope_parameters": LLAMA3}),
    "exaone4 slides": ("Exaone4", EXAONE_SLIDES),
    "seed_oss": ("SeedOss", SEED),
    "seed_oss tied": ("SeedOss", SEED | TIED | ONE_KEY_HEAD | {"attention_bias": False}),
    "seed_oss biases": ("SeedOss", SEED | {"attention_out_bias": True, "mlp_bias": True, "num_key_value_heads": 4}),
    "ernie4_5": ("Ernie4_5", ERNIE),
    "ernie4_5 tied": ("Ernie4_5", ERNIE | TIED | ONE_KEY_HEAD | {"rope_parameters": LINEAR}),
    "ernie4_5 biases": ("Ernie4_5", ERNIE | {"use_bias": True, "num_key_value_heads": 4}),
    "hunyuan-dense": ("HunYuanDenseV1", {"head_dim": 16, "rope_parameters": ALPHA}),
    "hunyuan-dense tied": ("HunYuanDenseV1", TIED | ONE_KEY_HEAD | {"head_dim": 24}),
    "hunyuan-dense biases": ("HunYuanDenseV1", {"head_dim": 16, "attention_bias": True, "num_key_value_heads": 4}),
    "qwen2vl": ("Qwen2VL", {"rope_parameters": SECTIONS}),
    "qwen2vl tied": ("Qwen2VL", TIED | ONE_KEY_HEAD | {"rope_parameters": SECTIONS}),
    "qwen2vl 2.5": ("Qwen2_5_VL", {"rope_parameters": SECTIONS, "num_key_value_heads": 4}),
    "qwen3vl": ("Qwen3VL", {"head_dim": 16, "rope_parameters": SECTIONS}),
    "qwen3vl tied": ("Qwen3VL", TIED | ONE_KEY_HEAD | {"head_dim": 16, "rope_parameters": SECTIONS}),
    "qwen3vl biases": (
        "Qwen3VL",
        {"head_dim": 16, "rope_parameters": SECTIONS, "attention_bias": True, "num_key_value_heads": 4},
    ),
    "qwen3vlmoe": ("Qwen3VLMoe", EXPERTS | {"head_dim": 16, "rope_parameters": SECTIONS}),
    "qwen3vlmoe tied": ("Qwen3VLMoe", EXPERTS | TIED | ONE_KEY_HEAD | {"head_dim": 16, "rope_parameters": SECTIONS}),
    "qwen3vlmoe one of many": (
        "Qwen3VLMoe",
        EXPERTS | {"head_dim": 16, "rope_parameters": SECTIONS, "num_experts": 32, "num_experts_per_tok": 1},
    ),
}  # fmt: skip
COHERE = {"layer_norm_eps": 1e-5, "logit_scale": 0.25, **TIED}
COHERE2 = COHERE | {"sliding_window": 33, "num_hidden_layers": 5}
SIGMOIDS = {"n_routed_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 48, "head_dim": 16}
MINIMAX = {"num_local_experts": 6, "num_experts_per_tok": 3, "head_dim": 16}
LFM2 = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 48, "norm_eps": 1e-5, "pad_token_id": 0}
LFM2 |= {"num_dense_layers": 1, "layer_types": ["conv", GLOBAL, "conv"], "intermediate_size": 90}
DECODERS |= {
    "command-r": ("Cohere", COHERE),
    "command-r untied": ("Cohere", COHERE | ONE_KEY_HEAD | {"tie_word_embeddings": False, "rope_parameters": LINEAR}),
    "command-r biases": ("Cohere", COHERE | {"attention_bias": True, "num_key_value_heads": 4}),
    "cohere2": ("Cohere2", COHERE2),
    "cohere2 untied": ("Cohere2", COHERE2 | ONE_KEY_HEAD | {"tie_word_embeddings": False}),
    "cohere2 pattern": ("Cohere2", COHERE2 | {"num_hidden_layers": 3, "layer_types": [GLOBAL, LOCAL, GLOBAL]}),
    "starcoder2": ("Starcoder2", {"norm_epsilon": 1e-5}),
    "starcoder2 tied": ("Starcoder2", TIED | ONE_KEY_HEAD | {"norm_epsilon": 1e-3, "rope_parameters": YARN}),
    "starcoder2 window": ("Starcoder2", {"sliding_window": 33, "num_key_value_heads": 4}),
    "lfm2moe": ("Lfm2Moe", LFM2),
    "lfm2moe tied": ("Lfm2Moe", LFM2 | TIED | ONE_KEY_HEAD | {"num_dense_layers": 0, "conv_L_cache": 4}),
    "lfm2moe one of many": ("Lfm2Moe", LFM2 | {"num_experts": 32, "num_experts_per_tok": 1, "num_dense_layers": 2}),
    "minimax-m2": ("MiniMaxM2", MINIMAX),
    "minimax-m2 part of heads": ("MiniMaxM2", MINIMAX | ONE_KEY_HEAD | {"rotary_dim": 8}),
    "minimax-m2 one of many": (
        "MiniMaxM2",
        MINIMAX | TIED | {"num_local_experts": 32, "num_experts_per_tok": 1, "num_key_value_heads": 4},
    ),
    "glm4moe": ("Glm4Moe", SIGMOIDS | {"use_qk_norm": True, "attention_bias": True, "routed_scaling_factor": 2.5}),
    "glm4moe tied": ("Glm4Moe", SIGMOIDS | TIED | ONE_KEY_HEAD | {"n_shared_experts": 2, "first_k_dense_replace": 2}),
    "glm4moe one of many": (
        "Glm4Moe",
        SIGMOIDS
        | {"n_routed_experts": 32, "num_experts_per_tok": 1, "norm_topk_prob": False, "num_key_value_heads": 4},
    ),
}

LATENT_YARN = YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}
LATENT = {"q_lora_rank": None, "kv_lora_rank": 32, "qk_nope_head_dim": 24, "qk_rope_head_dim": 16, "v_head_dim": 20}
LATENT |= {"num_key_value_heads": 4, "rms_norm_eps": 1e-6, "first_k_dense_replace": 1, "moe_intermediate_size": 48}
LATENT |= {"n_routed_experts": 6, "n_shared_experts": 2, "num_experts_per_tok": 3, "routed_scaling_factor": 1.5}
GROUPS = {"n_routed_experts": 12, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2, "pad_token_id": 0}
DECODERS |= {
    # llama.cpp knows models without a rank of queries by their number of layers
    "deepseek2 lite": (
        "DeepseekV2",
        LATENT | {"rope_parameters": LATENT_YARN, "num_hidden_layers": 27, "hidden_size": 32, "intermediate_size": 48},
    ),
    "deepseek2 groups by one": ("DeepseekV2", LATENT | GROUPS | {"topk_method": "group_limited_greedy"}),
    "deepseek2 groups": (
        "DeepseekV3",
        LATENT | GROUPS | {"q_lora_rank": 40, "rope_parameters": LATENT_YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}},
    ),
    "deepseek2 flash": (
        "Glm4MoeLite",
        LATENT
        | {"q_lora_rank": 40, "n_shared_experts": 1, "pad_token_id": 0, "first_k_dense_replace": None}
        | {"mlp_layer_types": ["dense", "sparse", "sparse"]},
    ),
}

_TWO_LAYERS = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 64}
SEES: dict[str, dict[str, Any]] = {
    "GlmOcr": _TWO_LAYERS,
    "Qwen2VL": {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2},
    "Qwen2_5_VL": _TWO_LAYERS | {"fullatt_block_indexes": [0]},
    "Qwen3VL": _TWO_LAYERS | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
    "Qwen3VLMoe": _TWO_LAYERS | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
}
"""The settings of the part that sees."""

ARCHITECTURE_OF = {
    "cohere": "command-r",
    "lfm2_moe": "lfm2moe",
    "minimax_m2": "minimax-m2",
    "glm4_moe": "glm4moe",
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "glm4_moe_lite"), "deepseek2"),
    "ministral3": "mistral3",
    "olmo3": "olmo2",
    "glm_ocr_text": "glm4",
    "hunyuan_v1_dense": "hunyuan-dense",
    "qwen2_vl_text": "qwen2vl",
    "qwen2_5_vl_text": "qwen2vl",
    "qwen3_vl_text": "qwen3vl",
    "qwen3_vl_moe_text": "qwen3vlmoe",
}
"""Kinds of transformers' settings that GGUF calls otherwise."""
CONFIGS = more.CONFIGS | {
    "cohere": "CohereConfig",
    "cohere2": "Cohere2Config",
    "starcoder2": "Starcoder2Config",
    "lfm2_moe": "Lfm2MoeConfig",
    "minimax_m2": "MiniMaxM2Config",
    "glm4_moe": "Glm4MoeConfig",
    "deepseek_v2": "DeepseekV2Config",
    "deepseek_v3": "DeepseekV3Config",
    "glm4_moe_lite": "Glm4MoeLiteConfig",
    "phi3": "Phi3Config",
    "ministral3": "Ministral3Config",
    "mistral3": "Mistral3Config",
    "glm4": "Glm4Config",
    "glm_ocr": "GlmOcrConfig",
    "glm_ocr_text": "GlmOcrTextConfig",
    "smollm3": "SmolLM3Config",
    "olmo2": "Olmo2Config",
    "olmo3": "Olmo3Config",
    "exaone4": "Exaone4Config",
    "seed_oss": "SeedOssConfig",
    "ernie4_5": "Ernie4_5Config",
    "hunyuan_v1_dense": "HunYuanDenseV1Config",
    "qwen2_vl": "Qwen2VLConfig",
    "qwen2_vl_text": "Qwen2VLTextConfig",
    "qwen2_5_vl": "Qwen2_5_VLConfig",
    "qwen2_5_vl_text": "Qwen2_5_VLTextConfig",
    "qwen3_vl": "Qwen3VLConfig",
    "qwen3_vl_text": "Qwen3VLTextConfig",
    "qwen3_vl_moe": "Qwen3VLMoeConfig",
    "qwen3_vl_moe_text": "Qwen3VLMoeTextConfig",
}
"""Kinds of settings -> their class in transformers."""
PAIRED = ("mistral3", "smollm3")
"""Architectures whose rows of q and k are reordered, so that rotated pairs are neighbours."""


def seeing_config(transformers: Any, kind: str, options: dict[str, Any]) -> Any:
    """The settings of a model that also sees."""
    tied = options.get("tie_word_embeddings", False)
    vision = {"vision_config": SEES[kind], "tie_word_embeddings": tied}
    return getattr(transformers, f"{kind}Config")(text_config=options, **vision)


def own_keys(config: Any, architecture: str) -> dict[str, Any]:
    """The keys of these architectures besides those that all have."""
    keys: dict[str, Any] = {}
    rope = getattr(config, "rope_parameters", None) or {}  # of a model that knows no positions
    rope = rope.get("full_attention", rope)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if architecture in ("phi3", "glm4", "glm4moe", "minimax-m2"):
        keys["rope.dimension_count"] = int(head_dim * rope.get("partial_rotary_factor", 1.0))
    if architecture == "phi3":
        keys["attention.sliding_window"] = config.sliding_window or 0
        first = rope.get("original_max_position_embeddings", config.original_max_position_embeddings)
        keys["rope.scaling.original_context_length"] = first
        if rope["rope_type"] == "longrope":
            factor = config.max_position_embeddings / first
            keys["rope.scaling.attn_factor"] = float(np.sqrt(1 + np.log(factor) / np.log(first)))
    if architecture == "mistral3":
        keys["attention.temperature_scale"] = rope["llama_4_scaling_beta"]
        if "mscale" in rope:
            keys["rope.scaling.yarn_log_multiplier"] = rope["mscale_all_dim"]
    if config.model_type in ("olmo3", "exaone4") and config.sliding_window:
        keys["attention.sliding_window"] = config.sliding_window
        keys["attention.sliding_window_pattern"] = [kind == LOCAL for kind in config.layer_types]
    if architecture in ("command-r", "cohere2", "starcoder2"):
        eps = config.norm_epsilon if architecture == "starcoder2" else config.layer_norm_eps
        keys["attention.layer_norm_epsilon"] = eps
    if architecture in ("command-r", "cohere2"):
        keys["logit_scale"] = config.logit_scale
    if architecture == "cohere2":
        keys["attention.sliding_window_pattern"] = [kind == LOCAL for kind in config.layer_types]
    if architecture in ("cohere2", "starcoder2") and config.sliding_window:
        keys["attention.sliding_window"] = config.sliding_window
    if architecture in SIGMOID:
        keys["expert_gating_func"] = 2
    if architecture == "lfm2moe":
        n_kv = config.num_key_value_heads
        keys["attention.head_count_kv"] = [n_kv * (kind != "conv") for kind in config.layer_types]
        keys |= {"shortconv.l_cache": config.conv_L_cache, "leading_dense_block_count": config.num_dense_layers}
    if architecture == "deepseek2":
        keys |= latent_keys(config, rope)
    if architecture == "glm4moe":
        keys |= {"expert_count": config.n_routed_experts, "expert_used_count": config.num_experts_per_tok}
        keys |= {"expert_shared_count": config.n_shared_experts, "expert_weights_norm": config.norm_topk_prob}
        keys["expert_weights_scale"] = float(config.routed_scaling_factor)
        keys["leading_dense_block_count"] = config.first_k_dense_replace
    if "mrope_section" in rope:
        keys["rope.dimension_sections"] = [*rope["mrope_section"], 0]
    if architecture.startswith("qwen3vl"):
        keys["n_deepstack_layers"] = 1
    if rope.get("alpha"):
        keys["rope.freq_base"] = float(rope["rope_theta"] * rope["alpha"] ** (head_dim / (head_dim - 2)))
    return keys


def latent_keys(config: Any, rope: dict[str, Any]) -> dict[str, Any]:
    """The keys of latent attention, and of its kind of experts."""
    rank, n_rot, by_softmax = config.kv_lora_rank, config.qk_rope_head_dim, config.model_type == "deepseek_v2"
    kinds = getattr(config, "mlp_layer_types", None)
    keys = {
        "attention.head_count_kv": 1,
        "attention.kv_lora_rank": rank,
        "attention.key_length": rank + n_rot,
        "attention.value_length": rank,
        "attention.key_length_mla": config.qk_nope_head_dim + n_rot,
        "attention.value_length_mla": config.v_head_dim,
        "rope.dimension_count": n_rot,
        "expert_count": config.n_routed_experts,
        "expert_used_count": config.num_experts_per_tok,
        "expert_shared_count": config.n_shared_experts,
        "expert_weights_scale": float(config.routed_scaling_factor),
        "expert_gating_func": 1 if by_softmax else 2,
        "leading_dense_block_count": kinds.index("sparse") if kinds else config.first_k_dense_replace,
    }
    if config.q_lora_rank is not None:
        keys["attention.q_lora_rank"] = config.q_lora_rank
    if config.n_group is not None:
        keys |= {"expert_group_count": config.n_group, "expert_group_used_count": config.topk_group}
    if not by_softmax:
        keys["expert_weights_norm"] = config.norm_topk_prob
    if rope.get("mscale_all_dim"):
        keys["rope.scaling.yarn_log_multiplier"] = 0.1 * rope["mscale_all_dim"]
    return keys


def own_parts(name: str, weight: np.ndarray, config: Any) -> dict[str, np.ndarray]:
    """Of what makes keys and values of a latent the two tensors that files have; nothing of any other."""
    if not name.endswith("attn_kv_b.weight"):
        return {}
    heads = weight.reshape(config.num_attention_heads, -1, config.kv_lora_rank)
    keys, values = np.split(heads, [config.qk_nope_head_dim], axis=1)
    blk = name.removesuffix("attn_kv_b.weight")
    return {f"{blk}attn_k_b.weight": keys.swapaxes(1, 2), f"{blk}attn_v_b.weight": values}


def own_name(name: str) -> str:
    """The name of a tensor with its kind behind a point, as the table of names has it."""
    name = name.replace("e_score_correction_bias", "e_score_correction.bias").replace("expert_bias", "expert_bias.bias")
    return name.replace("mlp.e_score", "block_sparse_moe.e_score")


def own_rows(weight: np.ndarray, name: str, config: Any) -> np.ndarray:
    """A tensor's rows as files have them: pairs that are neighbours in GLM-OCR are half a head apart there."""
    if config.model_type == "glm_ocr_text" and name.rpartition(".")[0].endswith(("attn_q", "attn_k")):
        heads = weight.reshape(-1, config.head_dim // 2, 2, *weight.shape[1:])
        return heads.swapaxes(1, 2).reshape(weight.shape)
    return weight


def own_tensors(config: Any) -> dict[str, np.ndarray]:
    """The tensors that a model has only as numbers of its settings."""
    rope = getattr(config, "rope_parameters", None) or {}
    return {
        f"rope_factors_{kind}.weight": np.array(rope[f"{kind}_factor"], np.float32)
        for kind in ("long", "short")
        if rope.get("rope_type") == "longrope"
    }


# ---- complete random files -------------------------------------------------------------------------------------------

TINY = (*dict.fromkeys(name.split()[0] for name in DECODERS), *more.TINY)
SIGMOID = ("lfm2moe", "minimax-m2", "glm4moe", "deepseek2")
WITH_EXPERTS = ("qwen3vlmoe", *SIGMOID, *more.WITH_EXPERTS)
"""Of these architectures, those whose layers have experts."""
Shapes = dict[str, tuple[int, ...]]


def tiny_keys(architecture: str, n_layer: int, head_dim: int, n_ff: int, sliding_window: int) -> dict[str, Any]:
    """What ``write_tiny_model`` says of one of these architectures besides what it says of all."""
    keys: dict[str, Any] = {}
    if architecture in ("phi3", "olmo2", "exaone4"):
        keys["attention.sliding_window"] = sliding_window
    if architecture in ("olmo2", "exaone4"):
        keys["attention.sliding_window_pattern"] = [i % 2 == 0 for i in range(n_layer)]
    if architecture == "mistral3":
        keys |= {"rope.scaling.original_context_length": 16, "attention.temperature_scale": 0.1}
    if architecture == "glm4":
        keys["rope.dimension_count"] = head_dim // 2
    if architecture in ("qwen2vl", "qwen3vl", "qwen3vlmoe"):
        keys["rope.dimension_sections"] = [head_dim // 8, head_dim // 8, head_dim // 4, 0]
    if architecture in ("qwen3vl", "qwen3vlmoe"):
        keys["n_deepstack_layers"] = 1
    if architecture in ("command-r", "cohere2", "starcoder2"):
        keys["attention.layer_norm_epsilon"] = 1e-5
    if architecture in ("command-r", "cohere2"):
        keys["logit_scale"] = 0.25
    if architecture == "cohere2":
        keys |= {"attention.sliding_window": sliding_window, "attention.sliding_window_pattern": 2}
    if architecture in SIGMOID:
        keys["expert_gating_func"] = 2
    if architecture == "glm4moe":
        keys |= {"expert_shared_count": 1, "expert_weights_norm": True, "expert_weights_scale": 1.5}
        keys["rope.dimension_count"] = head_dim // 2
    if architecture == "deepseek2":
        keys |= {"attention.head_count_kv": 1, "attention.kv_lora_rank": 4 * head_dim, "rope.dimension_count": head_dim}
        keys |= {"attention.key_length": 5 * head_dim, "attention.value_length": 4 * head_dim}
        keys |= {"attention.key_length_mla": 3 * head_dim, "attention.value_length_mla": head_dim}
        keys |= {"attention.q_lora_rank": 2 * head_dim, "expert_shared_count": 1, "expert_weights_scale": 1.5}
    if architecture == "lfm2moe":
        keys["shortconv.l_cache"] = 3
    if architecture in WITH_EXPERTS:
        keys["expert_feed_forward_length"] = n_ff
    own = {f"{architecture}.{key}": value for key, value in keys.items()}
    return own | more.tiny_keys(architecture, n_layer, head_dim, n_ff, sliding_window)


def latent_layer(n_head: int, n_embd: int, head_dim: int) -> Shapes:
    """The tensors of latent attention: two parts of a head are not rotated, one is, and the latent is four wide."""
    q_rank, rank = 2 * head_dim, 4 * head_dim
    return {
        "attn_q_a.weight": (q_rank, n_embd),
        "attn_q_a_norm.weight": (q_rank,),
        "attn_q_b.weight": (n_head * 3 * head_dim, q_rank),
        "attn_kv_a_mqa.weight": (rank + head_dim, n_embd),
        "attn_kv_a_norm.weight": (rank,),
        "attn_k_b.weight": (n_head, rank, 2 * head_dim),
        "attn_v_b.weight": (n_head, head_dim, rank),
    }


BIASED = ("attn_norm", "ffn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_up", "ffn_down")


def tiny_layer(architecture: str, layer: Shapes, n_embd: int, n_ff: int, head_dim: int) -> Shapes:
    """The tensors of a layer, of what a llama has there."""
    n_q, n_kv = layer["attn_q.weight"][0], layer["attn_k.weight"][0]
    norms = {f"{name}.weight": (n_embd,) for name in ("post_attention_norm", "post_ffw_norm")}
    if architecture in ("phi3", "glm4"):
        del layer["ffn_gate.weight"]
        layer["ffn_up.weight"] = (2 * n_ff, n_embd)
    if architecture == "phi3":
        del layer["attn_q.weight"], layer["attn_k.weight"], layer["attn_v.weight"]
        layer["attn_qkv.weight"] = (n_q + 2 * n_kv, n_embd)
    if architecture in ("olmo2", "exaone4"):
        del layer["attn_norm.weight"], layer["ffn_norm.weight"]
    if architecture in ("olmo2", "exaone4", "glm4"):
        layer |= norms
    if architecture == "olmo2":
        layer |= {"attn_q_norm.weight": (n_q,), "attn_k_norm.weight": (n_kv,)}
    if architecture in ("exaone4", "hunyuan-dense", "qwen3vl", "qwen3vlmoe"):
        layer |= {"attn_q_norm.weight": (head_dim,), "attn_k_norm.weight": (head_dim,)}
    if architecture in ("command-r", "cohere2"):
        del layer["ffn_norm.weight"]
    if architecture == "starcoder2":
        del layer["ffn_gate.weight"]
        layer |= {f"{name}.bias": layer[f"{name}.weight"][:1] for name in BIASED}
    if architecture in ("lfm2moe", "glm4moe"):
        layer |= {"attn_q_norm.weight": (head_dim,), "attn_k_norm.weight": (head_dim,)}
    if architecture == "minimax-m2":
        layer |= {"attn_q_norm.weight": (n_q,), "attn_k_norm.weight": (n_kv,)}
    if architecture in SIGMOID:
        layer["exp_probs_b.bias"] = layer["ffn_gate_inp.weight"][:1]
    if architecture == "glm4moe":
        layer |= {f"ffn_{name}_shexp.weight": (n_ff, n_embd) for name in ("gate", "up")}
        layer |= {"ffn_down_shexp.weight": (n_embd, n_ff)}
    if architecture == "deepseek2":
        layer = {name: shape for name, shape in layer.items() if not name.startswith(("attn_q", "attn_k", "attn_v"))}
        layer |= {f"ffn_{name}_shexp.weight": (n_ff, n_embd) for name in ("gate", "up")}
        layer |= {"ffn_down_shexp.weight": (n_embd, n_ff)} | latent_layer(n_q // head_dim, n_embd, head_dim)
    if architecture in ("seed_oss", "glm4moe"):
        layer["post_attention_norm.weight"] = layer.pop("ffn_norm.weight")
    if architecture == "qwen2vl":
        layer |= {"attn_q.bias": (n_q,), "attn_k.bias": (n_kv,), "attn_v.bias": (n_kv,)}
    return more.tiny_layer(architecture, layer, n_embd, n_ff, head_dim)
