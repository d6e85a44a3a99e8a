"""More of the long tail for tests: what transformers calls them, and the keys and tensors of their tiny files.

A row of CONVERTED is a name that begins with the architecture, the class in transformers, and its settings besides
test_models.SMALL. Its file is what edgellm's converter makes of a checkpoint. A class with a row in ALIKE stands for
one that transformers does not have: the checkpoint is renamed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

LOCAL, GLOBAL = "sliding_attention", "full_attention"
TIED = {"tie_word_embeddings": True}
ONE_KEY_HEAD = {"num_key_value_heads": 1}
TWO_LAYERS = {"num_hidden_layers": 2}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}

_SIGMOIDS = {"n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 48, "head_dim": 16}
_DOTS = _SIGMOIDS | {"n_shared_experts": 2, "first_k_dense_replace": 1, "norm_topk_prob": True, "sliding_window": None}
_DOTS |= {"num_key_value_heads": 4}  # llama.cpp knows no other
_ERNIE = {"moe_num_experts": 6, "moe_k": 3, "moe_intermediate_size": 48}
_HUNYUAN = {"num_experts": 6, "moe_topk": 2, "head_dim": 16}
_COHERE = {"num_experts": 6, "num_experts_per_tok": 3, "head_dim": 16, "sliding_window": 33, "logit_scale": 0.25}
_COHERE |= {"layer_types": [GLOBAL, LOCAL, GLOBAL], "mlp_layer_types": ["dense", "sparse", "sparse"]}
_LAGUNA = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 48, "head_dim": 16}
_LAGUNA |= {"shared_expert_intermediate_size": 40, "sliding_window": 33, "layer_types": [GLOBAL, LOCAL, LOCAL]}
_LAGUNA |= {"num_attention_heads_per_layer": [4, 2, 6], "moe_routed_scaling_factor": 2.5}
LAGUNA_ROPE = {
    "full_attention": YARN | {"partial_rotary_factor": 0.5},
    "sliding_attention": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 1.0},
}
_GRANITE = {
    "attention_multiplier": 0.25,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "logits_scaling": 1.0,
}

CONVERTED: dict[str, tuple[str, dict[str, Any]]] = {
    "dots1": ("Dots1", _DOTS | {"routed_scaling_factor": 2.5}),
    "dots1 groups, weights as they are": (
        "Dots1",
        _DOTS | {"n_group": 4, "topk_group": 2, "norm_topk_prob": False},
    ),
    "ernie4_5-moe": ("Ernie4_5_Moe", _ERNIE),
    "ernie4_5-moe every other layer, biases": (
        "Ernie4_5_Moe",
        _ERNIE | TIED | {"moe_layer_interval": 2, "moe_layer_start_index": 0, "moe_num_shared_experts": 1}
        | {"num_hidden_layers": 2},
    ),
    "ernie4_5-moe in every layer, none shared": (
        "Ernie4_5_Moe",
        _ERNIE | TWO_LAYERS | ONE_KEY_HEAD | {"moe_layer_start_index": 0, "moe_num_shared_experts": 0},
    ),
    "hunyuan-moe": ("HunYuanMoEV1", _HUNYUAN),
    "hunyuan-moe alpha, tied": (
        "HunYuanMoEV1",
        _HUNYUAN
        | TIED
        | {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "alpha": 1000.0, "factor": 1.0}},
    ),
    "bailingmoe": (
        "GraniteMoeShared",
        _GRANITE | {"num_local_experts": 6, "num_experts_per_tok": 3, "shared_intermediate_size": 192},
    ),
    "bailingmoe2": (
        "Glm4Moe",
        _SIGMOIDS
        | {"use_qk_norm": True, "routed_scaling_factor": 2.5, "n_group": 4, "topk_group": 2, "n_shared_experts": 2}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
    ),
    "cohere2moe": ("Cohere2Moe", _COHERE | TIED | {"num_shared_experts": 2, "expert_selection_fn": "sigmoid"}),
    "cohere2moe softmax, RMS": (
        "Cohere2Moe",
        _COHERE | {"rms_norm_eps": 1e-5, "prefix_dense_intermediate_size": 80, "num_key_value_heads": 1},
    ),
    "cohere2moe experts in every layer": (
        "Cohere2Moe",
        _COHERE | TWO_LAYERS | {"layer_types": [LOCAL, GLOBAL], "mlp_layer_types": ["sparse"] * 2},
    ),
    "cohere2moe all layers global": ("Cohere2Moe", _COHERE | {"layer_types": [GLOBAL] * 3}),
    "laguna": ("Laguna", _LAGUNA | {"rope_parameters": LAGUNA_ROPE}),
    "laguna all slide": (
        "Laguna",
        _LAGUNA | TWO_LAYERS | ONE_KEY_HEAD
        | {"layer_types": [LOCAL] * 2, "num_attention_heads_per_layer": [2, 3], "mlp_layer_types": ["dense", "sparse"]}
        | {"rope_parameters": LAGUNA_ROPE},
    ),
    "laguna a gate for each element": (
        "Laguna",
        _LAGUNA | TIED | {"gating": "per-element", "layer_types": [GLOBAL] * 3, "num_attention_heads_per_layer": None}
        | {"mlp_layer_types": ["sparse"] * 3},
    ),
}  # fmt: skip
_GEMMA3N = {
    "head_dim": 16,
    "sliding_window": 33,
    "laurel_rank": 24,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": 275,
    "final_logit_softcapping": 3.0,
    "tie_word_embeddings": True,
}
CONVERTED |= {
    "gemma3n": (
        "Gemma3nForCausalLM",
        _GEMMA3N
        | {"num_hidden_layers": 6, "num_kv_shared_layers": 3, "intermediate_size": [96, 80, 96, 64, 96, 80]}
        | {"layer_types": [LOCAL, GLOBAL, LOCAL, LOCAL, GLOBAL, LOCAL]}
        | {"activation_sparsity_pattern": [0.95, 0.5, 0.0, 0.8, 0.0, 0.0]},
    ),
    "gemma3n nothing shared, two streams": (
        "Gemma3nForCausalLM",
        _GEMMA3N
        | {"num_hidden_layers": 2, "num_kv_shared_layers": 0, "altup_num_inputs": 2, "altup_active_idx": 1}
        | {"layer_types": [GLOBAL, LOCAL], "num_key_value_heads": 1, "final_logit_softcapping": 30.0},
    ),
    "gemma3n sparse, five streams, scaled": (
        "Gemma3nForCausalLM",
        _GEMMA3N
        | {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "altup_num_inputs": 5, "altup_active_idx": 2}
        | {"layer_types": [LOCAL, GLOBAL] * 2, "activation_sparsity_pattern": [0.95] * 3 + [0.0]}
        | {"hidden_size": 40, "head_dim": 10, "intermediate_size": 77, "laurel_rank": 5}
        | {"rope_parameters": {GLOBAL: YARN, LOCAL: {"rope_type": "default", "rope_theta": 500.0}}},
    ),
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [1.0 + 0.7 * i for i in range(8)],
    "original_max_position_embeddings": 64,
}
_OWN = dict.fromkeys(("rms_norm_eps", "num_key_value_heads"))  # which they have none of
_GPT = _OWN | {"intermediate_size": None, "n_inner": 96, "tie_word_embeddings": True}
_PART = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
_FALCON = _OWN | TWO_LAYERS | {"bias": False, "alibi": False, "intermediate_size": None, "ffn_hidden_size": 96}
_MINICPM = {"attention_multiplier": 0.25, "embedding_multiplier": 12.0, "logits_scaling": 4.0}
_MINICPM |= {"residual_multiplier": 1.4 / 3**0.5}
CONVERTED |= {
    "exaone": ("Llama", {"rope_parameters": LLAMA3}),
    "internlm2": ("Llama", TWO_LAYERS),
    "minicpm": ("Granite", _MINICPM | TIED),
    "minicpm long": ("Granite", _MINICPM | {"rope_parameters": LONG, "max_position_embeddings": 128}),
    "stablelm": (
        "StableLm",
        {"rms_norm_eps": None, "use_qkv_bias": True, "rope_parameters": _PART | {"rope_theta": 500.0}},
    ),
    "stablelm side by side": (
        "StableLm",
        TWO_LAYERS | {"rms_norm_eps": None, "use_parallel_residual": True, "rope_parameters": _PART},
    ),
    "stablelm heads": (
        "StableLm",
        TWO_LAYERS
        | {"rms_norm_eps": None, "qk_layernorm": True, "use_parallel_residual": True}
        | {"num_key_value_heads": 2, "rope_parameters": _PART},
    ),
    "phi2": ("Phi", _OWN | {"rope_parameters": _PART | {"partial_rotary_factor": 0.5}}),
    "gptneox": ("GPTNeoX", _OWN | {"rope_parameters": _PART}),
    "gptneox by tanh": ("GPTNeoX", _OWN | TWO_LAYERS | {"rope_parameters": _PART, "hidden_act": "gelu_fast"}),
    "gptneox one behind the other": (
        "GPTNeoX",
        _OWN | TWO_LAYERS | {"rope_parameters": _PART, "use_parallel_residual": False},
    ),
    "gpt2": ("GPT2", _GPT),
    "starcoder": ("GPTBigCode", _GPT | {"multi_query": True}),
    "falcon": ("Falcon", _FALCON | TIED | {"new_decoder_architecture": False, "multi_query": True}),
    "falcon two norms": (
        "Falcon",
        _FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2, "tie_word_embeddings": False},
    ),
    "olmo": ("Olmo", {"rms_norm_eps": None}),
    "olmo clamped": ("Olmo", TWO_LAYERS | TIED | {"rms_norm_eps": None, "clip_qkv": 0.5}),
    "chatglm": (
        "Glm",
        TWO_LAYERS | {"head_dim": 16, "pad_token_id": 0, "rope_parameters": _PART | {"partial_rotary_factor": 0.5}},
    ),
    "arcee": ("Arcee", TWO_LAYERS | {"rope_parameters": YARN}),
    "nemotron": ("Nemotron", TWO_LAYERS | {"rms_norm_eps": None, "rope_parameters": _PART}),
}

# ---- checkpoints of classes that transformers does not have ---------------------------------------------------------

_BAILING_KEYS = {"architectures": ["BailingMoeForCausalLM"], "model_type": "bailing_moe", "norm_topk_prob": True}
_MINICPM_KEYS = {"architectures": ["MiniCPMForCausalLM"], "model_type": "minicpm", "scale_emb": 12, "scale_depth": 1.4}
_MINICPM_KEYS |= {"dim_model_base": 16}
ALIKE: dict[str, tuple[dict[str, Any], tuple[tuple[str, str], ...], dict[str, str]]] = {
    "exaone": (
        {"architectures": ["ExaoneForCausalLM"], "model_type": "exaone", "embed_dropout": 0.0},
        (
            ("model.embed_tokens.", "transformer.wte."),
            ("model.norm.", "transformer.ln_f."),
            ("model.layers.", "transformer.h."),
            ("input_layernorm.", "ln_1."),
            ("post_attention_layernorm.", "ln_2."),
            ("self_attn.o_proj.", "attn.attention.out_proj."),
            ("self_attn.", "attn.attention."),
            ("mlp.gate_proj.", "mlp.c_fc_0."),
            ("mlp.up_proj.", "mlp.c_fc_1."),
            ("mlp.down_proj.", "mlp.c_proj."),
        ),
        {"num_hidden_layers": "num_layers", "hidden_act": "activation_function", "rms_norm_eps": "layer_norm_epsilon"},
    ),
    "minicpm": (_MINICPM_KEYS, (), {}),
    "minicpm long": (_MINICPM_KEYS, (), {}),
    "internlm2": (
        {"architectures": ["InternLM2ForCausalLM"], "model_type": "internlm2", "bias": False}
        | {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        (
            ("model.embed_tokens.", "model.tok_embeddings."),
            ("self_attn.o_proj.", "attention.wo."),
            ("input_layernorm.", "attention_norm."),
            ("post_attention_layernorm.", "ffn_norm."),
            ("mlp.gate_proj.", "feed_forward.w1."),
            ("mlp.up_proj.", "feed_forward.w3."),
            ("mlp.down_proj.", "feed_forward.w2."),
            ("lm_head.", "output."),
        ),
        {},
    ),
    "bailingmoe": (
        _BAILING_KEYS
        | {"num_shared_experts": 2, "use_qkv_bias": False, "use_bias": False, "norm_head": False}
        | {"intermediate_size": 300},
        (
            ("model.embed_tokens.", "model.word_embeddings."),
            ("self_attn.o_proj.", "attention.dense."),
            ("block_sparse_moe.router.layer.", "mlp.gate."),
        ),
        {"intermediate_size": "moe_intermediate_size", "num_local_experts": "num_experts"},
    ),
    "bailingmoe2": (
        _BAILING_KEYS
        | {"architectures": ["BailingMoeV2ForCausalLM"], "use_qk_norm": True, "score_function": "sigmoid"}
        | {"partial_rotary_factor": 0.5, "rotary_dim": 8, "use_rmsnorm": True, "num_nextn_predict_layers": 0},
        (
            ("model.embed_tokens.", "model.word_embeddings."),
            ("self_attn.o_proj.", "attention.dense."),
            ("self_attn.q_norm.", "attention.query_layernorm."),
            ("self_attn.k_norm.", "attention.key_layernorm."),
            ("mlp.gate.e_score_correction_bias", "mlp.gate.expert_bias"),
        ),
        {"n_routed_experts": "num_experts", "n_shared_experts": "num_shared_experts"},
    ),
}
"""Name -> keys of its config.json, (part of a tensor's name, what it is there), (key, what it is there)."""
JOINED = {"bailingmoe": "attention.query_key_value", "bailingmoe2": "attention.query_key_value"}
JOINED |= {"internlm2": "attention.wqkv"}


def rename_checkpoint(folder: Path, name: str) -> None:
    """Make of a checkpoint of transformers one of the class that its row of ALIKE stands for."""
    safetensors = pytest.importorskip("safetensors.numpy")

    keys, parts, named = ALIKE[name]
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config = {named.get(key, key): value for key, value in config.items() if key not in LEFT_OUT} | keys
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    found = {}
    for stored, tensor in safetensors.load_file(folder / "model.safetensors").items():
        for part, there in parts:
            stored = stored.replace(part, there)
        found[stored] = tensor
    for stored in [stored for stored in found if name in JOINED and stored.endswith("self_attn.q_proj.weight")]:
        q, k, v = (found.pop(stored.replace("q_proj", f"{one}_proj")) for one in "qkv")
        n_groups = 2 if name == "internlm2" else 1  # of heads that share keys, each with its own
        groups = zip(*(np.split(one, n_groups) for one in (q, k, v)), strict=True)
        found[stored.replace("self_attn.q_proj", JOINED[name])] = np.concatenate([one for g in groups for one in g])
    for stored in [stored for stored in found if "block_sparse_moe.input_linear" in stored]:
        blk = stored.partition(".block_sparse_moe")[0]
        for kind, experts in (("input", found.pop(stored)), ("output", found.pop(stored.replace("input", "output")))):
            for i, one in enumerate(experts):
                if kind == "output":
                    found[f"{blk}.mlp.experts.{i}.down_proj.weight"] = one
                else:
                    gate, up = np.split(one, 2)
                    found |= {f"{blk}.mlp.experts.{i}.gate_proj.weight": gate}
                    found |= {f"{blk}.mlp.experts.{i}.up_proj.weight": up}
    for stored in [stored for stored in found if "shared_mlp.input_linear" in stored]:
        blk, matrix = stored.partition(".shared_mlp")[0], found.pop(stored)
        for kind, one in zip(("gate", "up"), np.split(matrix, 2), strict=True):
            found[f"{blk}.mlp.shared_experts.{kind}_proj.weight"] = one
        down = found.pop(stored.replace("input", "output"))
        found[f"{blk}.mlp.shared_experts.down_proj.weight"] = down
    whole = {stored: np.ascontiguousarray(tensor) for stored, tensor in found.items()}
    safetensors.save_file(whole, folder / "model.safetensors")


LEFT_OUT = ("attention_multiplier", "embedding_multiplier", "residual_multiplier", "logits_scaling")
LEFT_OUT += ("shared_intermediate_size",)

CONFIGS = {
    "gemma3n_text": "Gemma3nTextConfig",
    "gemma3n": "Gemma3nConfig",
    "exaone": "ExaoneConfig",
    "stablelm": "StableLmConfig",
    "phi": "PhiConfig",
    "gpt_neox": "GPTNeoXConfig",
    "gpt2": "GPT2Config",
    "gpt_bigcode": "GPTBigCodeConfig",
    "falcon": "FalconConfig",
    "olmo": "OlmoConfig",
    "glm": "GlmConfig",
    "arcee": "ArceeConfig",
    "nemotron": "NemotronConfig",
    "eurobert": "EuroBertConfig",
    "dots1": "Dots1Config",
    "ernie4_5_moe": "Ernie4_5_MoeConfig",
    "hunyuan_v1_moe": "HunYuanMoEV1Config",
    "cohere2_moe": "Cohere2MoeConfig",
    "laguna": "LagunaConfig",
}
"""Kinds of settings -> their class in transformers."""

# ---- complete random files -------------------------------------------------------------------------------------------

Shapes = dict[str, tuple[int, ...]]
SIGMOID = ("dots1", "bailingmoe2", "laguna")
SHARED = ("dots1", "ernie4_5-moe", "hunyuan-moe", "bailingmoe", "bailingmoe2", "cohere2moe", "laguna")
WITH_EXPERTS = SHARED
LAYER_NORMS = ("stablelm", "phi2", "gptneox", "gpt2", "starcoder", "falcon", "olmo", "nemotron")
GPT = ("gptneox", "gpt2", "starcoder")
ONE_QKV = (*GPT, "falcon")
TINY = (*SHARED, "exaone", "internlm2", "minicpm", "chatglm", "arcee", *LAYER_NORMS, "gemma3n")
N_STREAMS, LOW_RANK, OWN_INPUT = 3, 16, 32
"""Of a Gemma 3n: streams, the rank beside attention, columns of a token's row in the second table for each layer."""


def tiny_keys(architecture: str, n_layer: int, head_dim: int, n_ff: int, sliding_window: int) -> dict[str, Any]:
    """What ``write_tiny_model`` says of one of these architectures besides what it says of all."""
    keys: dict[str, Any] = {}
    if architecture in WITH_EXPERTS:
        keys["expert_feed_forward_length"] = n_ff
    if architecture in SIGMOID or architecture == "cohere2moe":
        keys |= {"expert_gating_func": 2, "expert_weights_scale": 1.5}
    if architecture in ("dots1", "bailingmoe", "bailingmoe2", "cohere2moe"):
        keys |= {"expert_shared_count": 1, "expert_weights_norm": True}
    if architecture in ("ernie4_5-moe", "hunyuan-moe", "laguna"):
        keys["expert_shared_feed_forward_length"] = n_ff
    if architecture == "laguna":
        keys |= {"attention.sliding_window": sliding_window, "attention.sliding_window_pattern": 2}
        keys |= {"leading_dense_block_count": 0, "rope.dimension_count_swa": head_dim}
    if architecture == "cohere2moe":
        keys |= {"attention.sliding_window": sliding_window, "attention.sliding_window_pattern": 2, "logit_scale": 0.25}
        keys |= {"attention.layer_norm_epsilon": 1e-5, "attention.layer_norm_rms_epsilon": None}
    if architecture in ("bailingmoe2", "stablelm", "phi2", "gptneox", "chatglm", "nemotron"):
        keys["rope.dimension_count"] = head_dim // 2
    if architecture in LAYER_NORMS:
        keys |= {"attention.layer_norm_epsilon": 1e-5, "attention.layer_norm_rms_epsilon": None}
    if architecture == "gptneox":
        keys["use_parallel_residual"] = True
    if architecture == "minicpm":
        keys |= {"embedding_scale": 6.0, "residual_scale": 0.5, "logit_scale": 4.0}
    if architecture == "gemma3n":  # every other layer slides, those after the second read what the first two keep
        keys |= {"attention.sliding_window": sliding_window, "embedding_length_per_layer_input": OWN_INPUT}
        keys |= {"attention.sliding_window_pattern": [i % 2 == 0 for i in range(n_layer)]}
        keys |= {"attention.shared_kv_layers": max(n_layer - 2, 0), "altup.num_inputs": N_STREAMS}
        keys |= {"activation_sparsity_scale": [1.0 if i % 2 == 0 else float("-inf") for i in range(n_layer)]}
        keys |= {"final_logit_softcapping": 3.0, "altup.active_idx": 0}
    return {f"{architecture}.{key}": value for key, value in keys.items()}


def tiny_layer(architecture: str, layer: Shapes, n_embd: int, n_ff: int, head_dim: int) -> Shapes:
    """The tensors of a layer, of what a llama has there."""
    if architecture not in TINY:
        return layer
    n_q, n_kv = layer["attn_q.weight"][0], layer["attn_k.weight"][0]
    if architecture in ("dots1", "hunyuan-moe", "bailingmoe2", "laguna"):
        layer |= {"attn_q_norm.weight": (head_dim,), "attn_k_norm.weight": (head_dim,)}
    if architecture in SHARED:
        layer |= {f"ffn_{name}_shexp.weight": (n_ff, n_embd) for name in ("gate", "up")}
        layer |= {"ffn_down_shexp.weight": (n_embd, n_ff)}
    if architecture in (*SIGMOID, "ernie4_5-moe"):
        layer["exp_probs_b.bias"] = layer["ffn_gate_inp.weight"][:1]
    if architecture in ("bailingmoe2", *ONE_QKV):
        del layer["attn_q.weight"], layer["attn_k.weight"], layer["attn_v.weight"]
        layer["attn_qkv.weight"] = (n_q + 2 * n_kv, n_embd)
    if architecture == "laguna":
        layer["attn_gate.weight"] = (n_q // head_dim, n_embd)
    if architecture in ("cohere2moe", "phi2", "falcon", "olmo"):
        del layer["ffn_norm.weight"]
    if architecture in (*ONE_QKV, "phi2", "chatglm", "arcee", "nemotron"):
        del layer["ffn_gate.weight"]
    if architecture == "chatglm":
        layer["ffn_up.weight"] = (2 * n_ff, n_embd)
    if architecture == "olmo":
        del layer["attn_norm.weight"]
    if architecture == "falcon":
        layer["attn_norm_2.weight"] = (n_embd,)
    if architecture == "gemma3n":
        norms = ("post_attention_norm", "post_ffw_norm", "post_norm", "laurel_post_norm", "altup_router_norm")
        layer |= {f"{name}.weight": (n_embd,) for name in (*norms, "altup_correct_scale")}
        layer |= {"attn_q_norm.weight": (head_dim,), "attn_k_norm.weight": (head_dim,)}
        layer |= {"laurel_l.weight": (LOW_RANK, n_embd), "laurel_r.weight": (n_embd, LOW_RANK)}
        layer |= {"inp_gate.weight": (OWN_INPUT, n_embd), "proj.weight": (n_embd, OWN_INPUT)}
        layer |= {"altup_router.weight": (N_STREAMS, n_embd), "altup_correct_coef.weight": (N_STREAMS, N_STREAMS)}
        layer |= {"altup_predict_coef.weight": (N_STREAMS**2, N_STREAMS)}
    if architecture in ("falcon", "stablelm", "nemotron"):
        layer |= {name.replace("weight", "bias"): (n_embd,) for name in list(layer) if "norm" in name}
    if architecture in (*GPT, "phi2"):
        layer |= {name.replace("weight", "bias"): shape[:1] for name, shape in list(layer.items())}
    return layer


def tiny_around(architecture: str, shapes: Shapes, n_vocab: int, n_embd: int, n_positions: int) -> Shapes:
    """All tensors, of those that a llama would have."""
    if architecture == "olmo":
        del shapes["output_norm.weight"]
    elif architecture in LAYER_NORMS:
        shapes["output_norm.bias"] = (n_embd,)
    if architecture == "phi2":
        shapes["output.bias"] = (n_vocab,)
    if architecture == "gemma3n":
        whole = OWN_INPUT * sum(name.endswith(".laurel_l.weight") for name in shapes)
        shapes |= {"per_layer_token_embd.weight": (n_vocab, whole), "per_layer_model_proj.weight": (whole, n_embd)}
        shapes |= {f"altup_{name}.weight": (N_STREAMS - 1, n_embd, n_embd) for name in ("proj", "unembd_proj")}
        shapes["per_layer_proj_norm.weight"] = (OWN_INPUT,)
    if architecture in ("gpt2", "starcoder"):
        shapes["position_embd.weight"] = (n_positions, n_embd)
    return shapes
