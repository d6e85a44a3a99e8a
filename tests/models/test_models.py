"""Every architecture against transformers: the same weights, the same tokens, the reference executor's logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf as gguf_package
import numpy as np
import pytest
from decoder_models import DECODERS, SEES, seeing_config
from long_tail_models import CONVERTED
from test_gguf_writer import llama_cpp_text
from tiny_encoders import DENOISERS, ENCODERS
from tiny_models import SCALE_FIELDS, write_tiny_model, write_transformers_model

import edgellm
from edgellm.formats.errors import FormatError
from edgellm.formats.gguf import GGUFFile
from edgellm.kernels.program import Batch
from edgellm.kernels.reference import ReferenceExecutor
from edgellm.models import architectures, build_program

N_TOKENS = 100

SMALL = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}

EXPERTS = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 48, "norm_topk_prob": True}

SHARED = {"norm_topk_prob": False, "shared_expert_intermediate_size": 80}
OLMOE = {"num_experts": 6, "num_experts_per_tok": 3}
MIXTRAL = {"num_local_experts": 6, "num_experts_per_tok": 3}
DELTA = {
    "num_hidden_layers": 4,
    "head_dim": 32,
    "rms_norm_eps": 1e-6,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
GPT_OSS = MIXTRAL | {
    "head_dim": 32,
    "sliding_window": 33,
    "num_hidden_layers": 4,
    "rope_parameters": YARN_ROPE | {"truncate": False, "factor": 8.0},
}
GEMMA2 = {
    "head_dim": 32,
    "query_pre_attn_scalar": 32,
    "sliding_window": 33,
    "num_hidden_layers": 4,
    "attn_logit_softcapping": 5.0,
    "final_logit_softcapping": 3.0,
    "tie_word_embeddings": True,
}
GRANITE = {
    "attention_multiplier": 0.1,
    "embedding_multiplier": 6.0,
    "residual_multiplier": 0.3,
    "logits_scaling": 2.5,
}

LOCAL, GLOBAL = "sliding_attention", "full_attention"
GEMMA4 = {
    "head_dim": 16,
    "global_head_dim": 32,
    "sliding_window": 33,
    "final_logit_softcapping": 3.0,
    "tie_word_embeddings": True,
    "hidden_size_per_layer_input": 0,
}
GEMMA4_E = GEMMA4 | {
    "num_hidden_layers": 7,
    "num_kv_shared_layers": 4,
    "hidden_size_per_layer_input": 16,
    "use_double_wide_mlp": True,
    "layer_types": [LOCAL, LOCAL, GLOBAL, LOCAL, GLOBAL, LOCAL, GLOBAL],
}
GEMMA4_WIDE = {"attention_k_eq_v": True, "num_global_key_value_heads": 1, "layer_types": [LOCAL, LOCAL, GLOBAL] * 2}
GEMMA4_EXPERTS = {"enable_moe_block": True, "num_experts": 6, "top_k_experts": 2, "moe_intermediate_size": 48}

# (transformers' class, what its configuration has besides SMALL)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama tied": ("Llama", {"tie_word_embeddings": True}),
    "llama all heads": ("Llama", {"num_key_value_heads": 4}),
    "llama one key head": ("Llama", {"num_key_value_heads": 1}),
    "llama odd sizes": (
        "Llama",
        {"hidden_size": 60, "intermediate_size": 77, "num_attention_heads": 6, "head_dim": 22},
    ),
    "llama biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama 3 factors": ("Llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama linear": ("Llama", {"rope_parameters": LINEAR_ROPE}),
    "llama yarn": ("Llama", {"rope_parameters": YARN_ROPE}),
    "llama yarn betas": ("Llama", {"rope_parameters": YARN_ROPE | {"beta_fast": 8.0, "beta_slow": 2.0}}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral window": ("Mistral", {"sliding_window": 33}),
    "mistral head size": ("Mistral", {"head_dim": 32, "sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "qwen2 tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2 yarn": ("Qwen2", {"rope_parameters": YARN_ROPE}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "qwen3 tied": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3 yarn": ("Qwen3", {"head_dim": 32, "rope_parameters": YARN_ROPE}),
    "lfm2": (
        "Lfm2",
        {
            "norm_eps": 1e-5,
            "num_hidden_layers": 5,
            "block_auto_adjust_ff_dim": False,
            "layer_types": ["conv", "full_attention", "conv", "conv", "full_attention"],
        },
    ),
    "lfm2 tied, four taps": (
        "Lfm2",
        {
            "norm_eps": 1e-5,
            "conv_L_cache": 4,
            "num_attention_heads": 6,
            "hidden_size": 60,
            "block_multiple_of": 8,
            "tie_word_embeddings": True,
            "layer_types": ["conv", "conv", "full_attention"],
        },
    ),
    "qwen3moe": ("Qwen3Moe", EXPERTS | {"head_dim": 32}),
    "qwen3moe one of many": ("Qwen3Moe", EXPERTS | {"head_dim": 16, "num_experts": 32, "num_experts_per_tok": 1}),
    "qwen3moe all": ("Qwen3Moe", EXPERTS | {"head_dim": 16, "num_experts_per_tok": 6, "tie_word_embeddings": True}),
    "qwen3moe some of few": ("Qwen3Moe", EXPERTS | {"head_dim": 16}),
    "llama mixtral": ("Mixtral", MIXTRAL),
    "llama mixtral tied": ("Mixtral", MIXTRAL | {"num_local_experts": 7, "tie_word_embeddings": True}),
    "llama mixtral window": ("Mixtral", MIXTRAL | {"sliding_window": 33, "num_key_value_heads": 1, "head_dim": 32}),
    "qwen2moe": ("Qwen2Moe", EXPERTS | SHARED),
    "qwen2moe one of many": (
        "Qwen2Moe",
        EXPERTS | SHARED | {"num_experts": 32, "num_experts_per_tok": 1, "shared_expert_intermediate_size": 40},
    ),
    "qwen2moe tied, no biases": (
        "Qwen2Moe",
        EXPERTS | SHARED | {"qkv_bias": False, "tie_word_embeddings": True, "num_key_value_heads": 4},
    ),
    "qwen2moe all": ("Qwen2Moe", EXPERTS | SHARED | {"num_experts_per_tok": 6, "rope_parameters": YARN_ROPE}),
    "olmoe": ("Olmoe", OLMOE),
    "olmoe all heads": ("Olmoe", OLMOE | {"num_key_value_heads": 4}),
    "olmoe tied": ("Olmoe", OLMOE | {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "olmoe one of many": ("Olmoe", OLMOE | {"num_experts": 32, "num_experts_per_tok": 1}),
    "granite": ("Granite", GRANITE),
    "granite tied": ("Granite", GRANITE | {"tie_word_embeddings": True, "rope_parameters": YARN_ROPE}),
    "granite biases": ("Granite", GRANITE | {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1}),
    "granite plain": ("Granite", {"hidden_size": 60, "intermediate_size": 77, "num_attention_heads": 6}),
    "granitemoe": ("GraniteMoe", GRANITE | MIXTRAL),
    "granitemoe tied": ("GraniteMoe", GRANITE | MIXTRAL | {"num_local_experts": 9, "tie_word_embeddings": True}),
    "granitemoe shared": ("GraniteMoeShared", GRANITE | MIXTRAL | {"shared_intermediate_size": 40}),
    "granitemoe biases": (
        "GraniteMoeShared",
        GRANITE | {"shared_intermediate_size": 40, "attention_bias": True, "num_experts_per_tok": 8},
    ),
    "gpt-oss": ("GptOss", GPT_OSS),
    "gpt-oss unscaled": ("GptOss", GPT_OSS | {"num_local_experts": 5, "rope_parameters": {"rope_type": "default"}}),
    "gpt-oss tied": ("GptOss", GPT_OSS | {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "gpt-oss one of many": (
        "GptOss",
        GPT_OSS
        | {"num_local_experts": 32, "num_experts_per_tok": 1, "sliding_window": 1, "rope_parameters": LINEAR_ROPE},
    ),
    "qwen35": ("Qwen3_5", DELTA),
    "qwen35 tied, heads alike": ("Qwen3_5", DELTA | {"linear_num_value_heads": 2, "tie_word_embeddings": True}),
    "qwen35 one key head, odd": (
        "Qwen3_5",
        DELTA
        | {
            "linear_num_key_heads": 1,
            "linear_num_value_heads": 3,
            "linear_conv_kernel_dim": 3,
            "num_key_value_heads": 1,
            "num_hidden_layers": 3,
            "rms_norm_eps": 1e-5,
            "layer_types": ["full_attention", "linear_attention", "linear_attention"],
        },
    ),
    "qwen35moe": ("Qwen3_5Moe", DELTA | EXPERTS | {"shared_expert_intermediate_size": 40}),
    "qwen35moe tied": (
        "Qwen3_5Moe",
        DELTA | EXPERTS | {"shared_expert_intermediate_size": 80, "tie_word_embeddings": True},
    ),
    "qwen35moe one of many": (
        "Qwen3_5Moe",
        DELTA | EXPERTS | {"shared_expert_intermediate_size": 40, "num_experts": 32, "num_experts_per_tok": 1},
    ),
    "qwen3next": (
        "Qwen3Next",
        DELTA
        | EXPERTS
        | {"shared_expert_intermediate_size": 40, "num_hidden_layers": 3}
        | {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    ),
    "qwen3next tied, heads alike": (
        "Qwen3Next",
        DELTA
        | EXPERTS
        | {"linear_num_value_heads": 2, "shared_expert_intermediate_size": 80, "tie_word_embeddings": True},
    ),
    "qwen3next one key head, one of many": (
        "Qwen3Next",
        DELTA
        | EXPERTS
        | {"linear_num_key_heads": 1, "linear_num_value_heads": 3, "linear_conv_kernel_dim": 3, "num_experts": 32}
        | {"num_experts_per_tok": 1, "shared_expert_intermediate_size": 40, "num_key_value_heads": 1}
        | {"num_hidden_layers": 3, "layer_types": ["full_attention", "linear_attention", "linear_attention"]},
    ),
    "gemma": ("Gemma", {"head_dim": 32, "num_key_value_heads": 1, "tie_word_embeddings": True}),
    "gemma all heads": ("Gemma", {"head_dim": 16, "num_key_value_heads": 4, "tie_word_embeddings": True}),
    "gemma untied": ("Gemma", {"head_dim": 22, "intermediate_size": 77}),
    "gemma2": ("Gemma2", GEMMA2),
    "gemma2 untied": ("Gemma2", GEMMA2 | {"tie_word_embeddings": False, "num_key_value_heads": 1}),
    "gemma2 linear": ("Gemma2", GEMMA2 | {"rope_parameters": LINEAR_ROPE, "sliding_window": 1}),
    "gemma2 27b's scale": (
        "Gemma2",
        GEMMA2 | {"num_hidden_layers": 46, "hidden_size": 48, "query_pre_attn_scalar": 12, "num_attention_heads": 4},
    ),
    "gemma3": (
        "Gemma3ForCausalLM",
        {
            "num_hidden_layers": 7,
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "sliding_window": 33,
            "tie_word_embeddings": True,
        },
    ),
    "gemma3 linear": (
        "Gemma3ForCausalLM",
        {
            "num_hidden_layers": 7,
            "num_key_value_heads": 1,
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "sliding_window": 16,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "gemma3 pattern": (
        "Gemma3ForCausalLM",
        {
            "num_hidden_layers": 4,
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": 10,
            "tie_word_embeddings": False,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
        },
    ),
    "gemma3 27b's scale": (
        "Gemma3ForCausalLM",
        {
            "num_hidden_layers": 62,
            "hidden_size": 48,
            "head_dim": 32,
            "query_pre_attn_scalar": 12,
            "sliding_window": 33,
            "tie_word_embeddings": True,
        },
    ),
}


MODELS |= {
    "gemma4": ("Gemma4", GEMMA4_E),
    "gemma4 shared without inputs": (
        "Gemma4",  # which transformers runs only where it may not skip rows
        GEMMA4_E
        | {"hidden_size_per_layer_input": 0, "sliding_window": 5, "output_hidden_states": True}
        | {"layer_types": [GLOBAL, LOCAL, LOCAL, LOCAL, GLOBAL, LOCAL, GLOBAL]},
    ),
    "gemma4 inputs without shared": (
        "Gemma4",
        GEMMA4 | {"hidden_size_per_layer_input": 32, "num_key_value_heads": 1, "layer_types": [LOCAL, LOCAL, GLOBAL]},
    ),
    "gemma4 untied, odd sizes": (
        "Gemma4",
        GEMMA4_E
        | {"hidden_size": 60, "intermediate_size": 77, "num_attention_heads": 6, "head_dim": 22}
        | {"tie_word_embeddings": False, "final_logit_softcapping": None, "use_double_wide_mlp": False},
    ),
    "gemma4 dense": ("Gemma4", GEMMA4 | GEMMA4_WIDE | {"num_hidden_layers": 6}),
    "gemma4 dense, all turn": (
        "Gemma4",
        GEMMA4
        | {"num_hidden_layers": 4, "layer_types": [GLOBAL, LOCAL, LOCAL, GLOBAL]}
        | {"rope_parameters": {name: {"rope_type": "default", "rope_theta": 1e4} for name in (LOCAL, GLOBAL)}},
    ),
    "gemma4 experts": ("Gemma4", GEMMA4 | GEMMA4_WIDE | GEMMA4_EXPERTS | {"num_hidden_layers": 6}),
    "gemma4 experts, one of many": (
        "Gemma4",
        GEMMA4 | GEMMA4_EXPERTS | {"num_experts": 32, "top_k_experts": 1, "layer_types": [LOCAL, LOCAL, GLOBAL]},
    ),
}

MAMBA2 = {
    **dict.fromkeys(("intermediate_size", "num_attention_heads", "num_key_value_heads", "rms_norm_eps")),
    "max_position_embeddings": None,
    "num_heads": 8,
    "head_dim": 16,
    "state_size": 24,
    "n_groups": 2,
    "chunk_size": 16,
}
MODELS |= {
    "mamba2": ("Mamba2", MAMBA2),
    "mamba2 tied, one group": (
        "Mamba2",
        MAMBA2 | {"n_groups": 1, "tie_word_embeddings": True, "conv_kernel": 3},
    ),
    "mamba2 a group for each head, biases": (
        "Mamba2",
        MAMBA2
        | {"n_groups": 4, "num_heads": 4, "head_dim": 48, "expand": 3, "state_size": 5, "use_bias": True}
        | {"use_conv_bias": False},
    ),
}
STATE, ATTENDS = "linear_attention", "full_attention"
HYBRID = (
    GRANITE
    | MIXTRAL
    | {"mamba_n_heads": 8, "mamba_d_state": 24, "mamba_n_groups": 2, "mamba_chunk_size": 16}
    | {"shared_intermediate_size": 40, "layer_types": [STATE, ATTENDS, STATE]}
)
MODELS |= {
    "granitehybrid": ("GraniteMoeHybrid", HYBRID),
    "granitehybrid dense, rotated, tied": (
        "GraniteMoeHybrid",
        HYBRID
        | {"num_local_experts": 0, "position_embedding_type": "rope", "tie_word_embeddings": True}
        | {"mamba_n_groups": 1, "rope_parameters": YARN_ROPE},
    ),
    "granitehybrid biases, one of many": (
        "GraniteMoeHybrid",
        HYBRID
        | {"attention_bias": True, "mamba_proj_bias": True, "num_local_experts": 32, "num_experts_per_tok": 1}
        | {"num_key_value_heads": 1, "mamba_d_conv": 3, "layer_types": [STATE, STATE, ATTENDS]}
        | {"mamba_conv_bias": False},
    ),
}
FALCON_H1 = {
    "mamba_d_ssm": 96,
    "mamba_n_heads": 6,
    "mamba_d_state": 24,
    "mamba_n_groups": 2,
    "mamba_chunk_size": 16,
    "embedding_multiplier": 3.5,
    "lm_head_multiplier": 0.4,
    "attention_in_multiplier": 1.3,
    "attention_out_multiplier": 0.8,
    "key_multiplier": 0.6,
    "ssm_in_multiplier": 1.2,
    "ssm_out_multiplier": 0.7,
    "mlp_multipliers": [0.9, 0.6],
    "ssm_multipliers": [0.8, 1.1, 0.7, 0.9, 1.4],
}
MODELS |= {
    "falcon-h1": ("FalconH1", FALCON_H1),
    "falcon-h1 normed, biases": (
        "FalconH1",
        FALCON_H1
        | {"mamba_rms_norm": True, "mamba_norm_before_gate": False, "attention_bias": True, "mlp_bias": True}
        | {"mamba_proj_bias": True, "projectors_bias": True, "num_key_value_heads": 1},
    ),
    "falcon-h1 tied, one group": (
        "FalconH1",
        FALCON_H1
        | {"tie_word_embeddings": True, "lm_head_multiplier": 3.5, "mamba_n_groups": 1, "mamba_conv_bias": False}
        | {"mamba_d_ssm": None, "mamba_n_heads": 8, "mamba_d_conv": 3, "rope_parameters": LINEAR_ROPE},
    ),
}
NEMOTRON = {
    **dict.fromkeys(("num_hidden_layers", "rms_norm_eps")),
    "head_dim": 16,
    "layers_block_type": [STATE, "mlp", ATTENDS, "mlp", STATE],
    "mamba_num_heads": 6,
    "mamba_head_dim": 16,
    "ssm_state_size": 24,
    "n_groups": 2,
    "chunk_size": 16,
    "time_step_min": 1e-30,  # which transformers cuts off in prompts alone
}
NEMOTRON_MOE = NEMOTRON | {
    "layers_block_type": [STATE, "moe", ATTENDS, "moe", STATE],
    "n_routed_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 48,
    "moe_shared_expert_intermediate_size": 80,
    "routed_scaling_factor": 2.5,
}
MODELS |= {
    "nemotron_h": ("NemotronH", NEMOTRON),
    "nemotron_h one group": (
        "NemotronH",
        NEMOTRON | {"n_groups": 1, "use_conv_bias": False, "num_key_value_heads": 1},
    ),
    "nemotron_h biases, a group for each head": (
        "NemotronH",
        NEMOTRON
        | {"n_groups": 6, "use_bias": True, "mlp_bias": True, "conv_kernel": 3}
        | {"layers_block_type": [ATTENDS, STATE, "mlp"]},
    ),
    "nemotron_h_moe": ("NemotronH", NEMOTRON_MOE),
    "nemotron_h_moe latent": (
        "NemotronH",
        NEMOTRON_MOE | {"moe_latent_size": 32, "norm_topk_prob": False},
    ),
    "nemotron_h_moe one of many": (
        "NemotronH",
        NEMOTRON_MOE | {"n_routed_experts": 32, "num_experts_per_tok": 1, "n_groups": 1, "num_key_value_heads": 4},
    ),
}
WITHOUT_STATES = {
    "granite of a hybrid's class": (
        "GraniteMoeHybrid",
        HYBRID | {"num_local_experts": 0, "layer_types": [ATTENDS] * 3},
    ),
    "granitemoe of a hybrid's class": (
        "GraniteMoeHybrid",
        HYBRID | {"layer_types": [ATTENDS] * 3, "position_embedding_type": "rope"},
    ),
}


MODELS |= DECODERS


def transformers_model(kind: str, options: dict[str, Any]) -> Any:
    """A random model whose logits depend on everything: weights of size 1/sqrt(n_in), norms about 1, biases not 0."""
    torch = pytest.importorskip("torch", reason="the judge of logits is transformers on torch")
    transformers = pytest.importorskip("transformers", reason="the judge of logits is transformers")
    has_frame = kind.startswith(("Gemma3", "Gemma4", "Qwen3_5"))
    config_name = f"{kind.removesuffix('ForCausalLM')}{'Text' * has_frame}Config"
    class_name = {"GPT2": "GPT2LMHeadModel"}.get(kind, kind if kind.startswith("Gemma3") else f"{kind}ForCausalLM")
    options = {key: value for key, value in (SMALL | options).items() if value is not None or key not in SMALL}
    if kind == "Gemma4":
        options |= {"vocab_size_per_layer_input": options["vocab_size"]}
    if kind in SEES:
        config, class_name = seeing_config(transformers, kind, options), f"{kind}ForConditionalGeneration"
    else:
        config = getattr(transformers, config_name)(**options)
    config._attn_implementation = "eager"
    torch.manual_seed(1)
    model = getattr(transformers, class_name)(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("A_log"):  # from memories that last to those of a token or none
                weight.uniform_(-4, 4)
            elif name.endswith("dt_bias"):
                weight.normal_(0, 2)
            elif weight.dim() > 1:
                weight.normal_(0, weight.shape[-1] ** -0.5)
            else:
                shifted = kind.startswith(("Gemma", "Qwen3_5")) and not kind.startswith(("Gemma3n", "Gemma4"))
                shifted = shifted and not name.endswith("linear_attn.norm.weight")
                weight.normal_(0.0 if name.endswith("bias") or shifted else 1.0, 0.2)
        for name, number in model.named_buffers():
            if name.endswith("layer_scalar"):
                number.normal_(0.9, 0.1)
            elif name.endswith(("e_score_correction_bias", "expert_bias")):
                number.normal_(0.0, 0.2)
    return model


def transformers_logits(model: Any, tokens: list[int]) -> np.ndarray:
    """Logits (n, n_vocab) of transformers for one sequence."""
    torch = pytest.importorskip("torch", reason="the judge of logits is transformers on torch")
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].float().numpy()


ROUNDING = 1e-9
"""NMSE between two ways to compute a tiny model in float32: each is about 5e-11 from float64 where it has delta rules,
and the order of torch's sums makes 2e-10 on a Zen 5."""


def nmse(x: np.ndarray, judge: np.ndarray) -> float:
    """Squared error over the judge's squared values."""
    difference = x.astype(np.float64) - judge
    return float((difference**2).sum() / (judge.astype(np.float64) ** 2).sum())


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_transformers(name: str, tmp_path: Path) -> None:
    kind, options = MODELS[name]
    model = transformers_model(kind, options)
    n_vocab = model.get_input_embeddings().num_embeddings
    tokens = np.random.default_rng(0).integers(0, n_vocab, N_TOKENS).tolist()
    # the period of six is what files say by saying nothing
    metadata = {"attention.sliding_window_pattern": 6} if name == "gemma3" else {}
    with GGUFFile.open(write_transformers_model(tmp_path / "model.gguf", model, metadata)) as gguf:
        program = build_program(gguf).for_context(N_TOKENS)
        logits = ReferenceExecutor(program).run(Batch.single(program, tokens))
        assert logits.shape == (N_TOKENS, n_vocab)
        assert nmse(logits, transformers_logits(model, tokens)) <= ROUNDING


EXTREME = (
    *("llama mixtral", "qwen2moe", "qwen3moe", "olmoe", "granite", "granitemoe shared", "gemma", "gemma2"),
    *("gpt-oss", "qwen35", "qwen35moe", "qwen3next", "gemma4", "gemma4 experts"),
    *("mamba2", "granitehybrid", "falcon-h1", "nemotron_h", "nemotron_h_moe latent"),
)


@pytest.mark.parametrize("name", EXTREME)
def test_outliers_and_skewed_routers_change_nothing(name: str, tmp_path: Path) -> None:
    """A few channels are fifty times the others, one expert is nearly always first, states fade at once or never."""
    torch = pytest.importorskip("torch", reason="the judge of logits is transformers on torch")
    model = transformers_model(*MODELS[name])
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if key.endswith("embed_tokens.weight"):
                weight[:, ::17] *= 50
            elif key.endswith(("mlp.gate.weight", "router.weight", "router.proj.weight")):
                weight *= 4
                weight[0] += 2 * weight.abs().mean()
            elif key.endswith("A_log"):
                weight[::2], weight[1::2] = -8, 6
    tokens = np.random.default_rng(5).integers(0, model.config.vocab_size, N_TOKENS).tolist()
    with GGUFFile.open(write_transformers_model(tmp_path / "model.gguf", model)) as gguf:
        program = build_program(gguf)
        logits = ReferenceExecutor(program).run(Batch.single(program, tokens))
    assert nmse(logits, transformers_logits(model, tokens)) <= 1e-6


def test_every_architecture_has_a_judge() -> None:
    judged = {name.split()[0] for name in (*MODELS, *CONVERTED)}  # those are in test_long_tail.py
    assert set(architectures()) <= judged | {*ENCODERS, *DENOISERS}  # theirs are in files of their own


TINY_TYPES = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", *SCALE_FIELDS]


@pytest.mark.parametrize("quant", TINY_TYPES)
def test_weights_of_any_type_run(quant: str, tmp_path: Path) -> None:
    """The program does not care for the type: logits are those of the same weights stored as float32."""
    path = write_tiny_model(tmp_path / "tiny.gguf", quant=quant, n_layer=1)
    with GGUFFile.open(path) as gguf:
        program = build_program(gguf)
        assert program.tensors["blk.0.ffn_down.weight"].quant.name == quant
        tokens = list(range(40))
        logits = ReferenceExecutor(program).run(Batch.single(program, tokens))
        judged = {
            t.name: gguf_package.quants.dequantize(t.data, t.tensor_type).reshape(t.shape[::-1])
            for t in gguf_package.GGUFReader(path).tensors
        }
        plain = ReferenceExecutor(program)
        plain._weights.update(judged)
        assert np.array_equal(plain.run(Batch.single(program, tokens)), logits)
        assert 0.1 < logits.std() < 10


SCALED = [f"blk.{i}.{name}" for i in range(2) for name in ("attn_q", "attn_output", "ffn_gate", "ffn_down")]
SCALES = {
    **{f"{name}.scale": np.array([2.5], np.float32) for name in SCALED},
    **{f"{name}.input_scale": np.array([7.0], np.float32) for name in SCALED},  # for those who round the inputs
}


@pytest.mark.parametrize("quant", ["F32", "Q8_0"])
def test_the_number_beside_a_matrix_multiplies_it(quant: str, tmp_path: Path) -> None:
    """As NVFP4 files have it: the answers of llama.cpp and ours are those of the same file with scaled weights."""
    path = write_tiny_model(tmp_path / "scaled.gguf", "qwen3", quant, extra_tensors=SCALES, n_head_kv=4)
    with GGUFFile.open(path) as gguf:
        program = build_program(gguf)
        weights = {name: tensor.dequantize().reshape(tensor.shape) for name, tensor in gguf.tensors.items()}
        folded = {f"{name}.weight": np.float32(2.5) * weights[f"{name}.weight"] for name in SCALED}
        logits = ReferenceExecutor(program).run(Batch.single(program, list(range(40))))
        plain = ReferenceExecutor(program)
        plain._weights.update(folded)
        assert np.array_equal(plain.run(Batch.single(program, list(range(40)))), logits)
    with (
        edgellm.load(path, executor="cpu", n_threads=2) as fast,
        edgellm.load(path, executor="reference") as slow,
    ):
        tokens = list(range(40))
        rows = zip(fast.logprobs(tokens), slow.logprobs(tokens), strict=True)
        assert max(abs((a.logprob or 0) - (b.logprob or 0)) for a, b in rows) < 0.05
    names = [name for name in weights if name not in SCALES]
    tensors = {name: folded.get(name, weights[name]) for name in names}
    other = write_tiny_model(
        tmp_path / "folded.gguf", "qwen3", leave_out=tuple(names), extra_tensors=tensors, n_head_kv=4
    )
    assert llama_cpp_text(path) == llama_cpp_text(other)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_scale_that_is_no_number_is_named(value: float, tmp_path: Path) -> None:
    scale = {"blk.0.attn_q.scale": np.array([value], np.float32)}
    path = write_tiny_model(tmp_path / "scaled.gguf", extra_tensors=scale)
    with GGUFFile.open(path) as gguf, pytest.raises(FormatError, match=r"blk\.0\.attn_q\.scale") as caught:
        build_program(gguf)
    assert caught.value.code == "TENSOR_NAN"
