"""Every key that a file may have under its architecture's name: whoever is in none of these rows is refused by name.

READ            used while the program is built; the keys of one architecture alone are in READ_IN
WITHOUT_EFFECT  says nothing about what the model computes
NEUTRAL         would change it, unless it has one of these values; the rows of one architecture are in NEUTRAL_IN
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from edgellm.formats.errors import UnsupportedError
from edgellm.formats.findings import override_error, short
from edgellm.formats.model_file import ModelFile
from edgellm.kernels.rope import yarn_magnitude
from edgellm.models.parts.hparams import file_name, key_of, real

READ = frozenset(
    (
        "block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size",
        "attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length",
        "attention.layer_norm_rms_epsilon", "rope.dimension_count", "rope.freq_base", "rope.scale_linear",
        "rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length",
        "rope.scaling.yarn_ext_factor", "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow", "pooling_type",
    )
)  # fmt: skip
_SLIDING = frozenset(("attention.sliding_window", "attention.sliding_window_pattern", "rope.freq_base_swa"))
_EXPERTS = frozenset(("expert_count", "expert_used_count"))
_SSM = frozenset(("ssm.conv_kernel", "ssm.state_size", "ssm.group_count", "ssm.time_step_rank", "ssm.inner_size"))
_DELTA = _SSM | frozenset(
    ("full_attention_interval", "attention.recurrent_layers", "nextn_predict_layers", "rope.scaling.attn_factor")
) | {"rope.dimension_sections"}  # fmt: skip
_GRANITE = frozenset(
    ("attention.scale", "embedding_scale", "residual_scale", "logit_scale", "rope.scaling.attn_factor")
) | {"rope.scaling.finetuned"}
_ENCODER = frozenset(("attention.layer_norm_epsilon", "attention.causal"))
_MIXTURES = _EXPERTS | {"expert_feed_forward_length", "rope.scaling.attn_factor"}
_GROUPS = frozenset(("expert_group_count", "expert_group_used_count"))
_ROUTER = frozenset(("expert_gating_func", "expert_weights_norm", "expert_weights_scale", "expert_shared_count")) | {
    "leading_dense_block_count"
}
_OF_MIXTURES: dict[str, frozenset[str]] = {
    "dots1": _ROUTER | _GROUPS,
    "ernie4_5-moe": frozenset(("leading_dense_block_count", "interleave_moe_layer_step", "expert_shared_count"))
    | {"expert_shared_feed_forward_length"},
    "hunyuan-moe": frozenset(("expert_shared_feed_forward_length",)),
    "bailingmoe": frozenset(("expert_weights_norm", "expert_weights_scale", "expert_shared_count")),
    "bailingmoe2": _ROUTER | _GROUPS | {"expert_shared_feed_forward_length", "nextn_predict_layers"},
    "cohere2moe": _ROUTER
    | _SLIDING - {"rope.freq_base_swa"}
    | {"attention.layer_norm_epsilon", "logit_scale", "expert_shared_feed_forward_length", "nextn_predict_layers"},
    "laguna": _SLIDING
    | {"rope.dimension_count_swa", "expert_shared_feed_forward_length", "expert_gating_func"}
    | {"leading_dense_block_count", "expert_weights_scale"},
}
READ_IN: dict[str, frozenset[str]] = {
    "bert": _ENCODER,
    "gemma-embedding": _SLIDING
    | {"attention.causal", "dense_2_feat_in", "dense_2_feat_out", "dense_3_feat_in", "dense_3_feat_out"},
    "jina-bert-v3": _ENCODER | {"rope.scaling.attn_factor"},
    "jina-bert-v2": _ENCODER,
    "nomic-bert-moe": _ENCODER | _EXPERTS | {"moe_every_n_layers", "rope.scaling.attn_factor"},
    "modern-bert": _ENCODER | _SLIDING | {"hidden_activation", "classifier.pooling_type", "rope.scaling.attn_factor"},
    "nomic-bert": _ENCODER | {"rope.scaling.attn_factor"},
    "llama": _EXPERTS | {"attention.sliding_window", "rope.scaling.attn_factor"},
    "gemma": frozenset(("rope.scaling.attn_factor",)),
    "gemma2": frozenset(("attention.sliding_window", "attn_logit_softcapping", "final_logit_softcapping"))
    | {"rope.scaling.attn_factor"},
    "gpt-oss": _EXPERTS | {"attention.sliding_window", "expert_feed_forward_length", "rope.scaling.attn_factor"},
    "falcon-h1": _SSM | {"rope.scaling.attn_factor"},
    # the sizes of states are said of those without, too, where the model's class may have them
    "granite": _GRANITE | _SSM | {"expert_shared_feed_forward_length"},
    "granitemoe": _GRANITE | _EXPERTS | _SSM | {"expert_shared_feed_forward_length"},
    "granitehybrid": _GRANITE | _EXPERTS | _SSM | {"expert_shared_feed_forward_length"},
    "mamba2": _SSM,
    "nemotron_h": _SSM | {"nextn_predict_layers"},
    "nemotron_h_moe": _SSM
    | _EXPERTS
    | {"nextn_predict_layers", "expert_feed_forward_length", "expert_shared_feed_forward_length", "moe_latent_size"}
    | {"expert_shared_count", "expert_weights_norm", "expert_weights_scale"},
    "olmoe": _EXPERTS | {"rope.scaling.attn_factor"},
    "qwen2moe": _EXPERTS
    | {"rope.scaling.attn_factor", "expert_feed_forward_length", "expert_shared_feed_forward_length"},
    "qwen2": frozenset(("rope.scaling.attn_factor",)),
    "qwen3": frozenset(("rope.scaling.attn_factor",)),
    "lfm2": frozenset(("shortconv.l_cache", "rope.scaling.attn_factor")),
    "qwen3next": _DELTA | _EXPERTS | {"expert_feed_forward_length", "expert_shared_feed_forward_length"},
    "qwen35": _DELTA,
    "qwen35moe": _DELTA | _EXPERTS | {"expert_feed_forward_length", "expert_shared_feed_forward_length"},
    "qwen3moe": _EXPERTS | {"rope.scaling.attn_factor", "expert_feed_forward_length"},
    "command-r": frozenset(("attention.layer_norm_epsilon", "logit_scale", "rope.scaling.attn_factor")),
    "cohere2": frozenset(("attention.sliding_window", "attention.sliding_window_pattern"))
    | {"attention.layer_norm_epsilon", "logit_scale", "rope.scaling.attn_factor"},
    "starcoder2": frozenset(("attention.layer_norm_epsilon", "attention.sliding_window", "rope.scaling.attn_factor")),
    "lfm2moe": _EXPERTS
    | {"shortconv.l_cache", "leading_dense_block_count", "expert_feed_forward_length", "expert_gating_func"}
    | {"expert_weights_scale", "rope.scaling.attn_factor"},
    "minimax-m2": _EXPERTS
    | {"expert_gating_func", "expert_feed_forward_length", "expert_weights_scale", "rope.scaling.attn_factor"},
    "glm4moe": _EXPERTS
    | {"expert_gating_func", "expert_feed_forward_length", "expert_shared_count", "leading_dense_block_count"}
    | {"expert_weights_norm", "expert_weights_scale", "nextn_predict_layers", "rope.scaling.attn_factor"}
    | {"rope.dimension_sections"},
    "deepseek2": _EXPERTS
    | {"attention.q_lora_rank", "attention.kv_lora_rank", "attention.key_length_mla", "attention.value_length_mla"}
    | {"expert_gating_func", "expert_feed_forward_length", "expert_shared_count", "leading_dense_block_count"}
    | {"expert_weights_norm", "expert_weights_scale", "expert_group_count", "expert_group_used_count"}
    | {"nextn_predict_layers", "rope.scaling.yarn_log_multiplier"},
    **{name: _MIXTURES | own for name, own in _OF_MIXTURES.items()},
    "phi3": frozenset(("attention.sliding_window", "rope.scaling.attn_factor")),
    **dict.fromkeys(("exaone", "internlm2", "chatglm", "arcee"), frozenset(("rope.scaling.attn_factor",))),
    "eurobert": frozenset(("attention.causal", "rope.scaling.attn_factor")),
    "minicpm": frozenset(("embedding_scale", "residual_scale", "logit_scale", "rope.scaling.attn_factor")),
    "stablelm": frozenset(("attention.layer_norm_epsilon", "use_parallel_residual", "rope.scaling.attn_factor")),
    "gptneox": frozenset(("attention.layer_norm_epsilon", "use_parallel_residual", "rope.scaling.attn_factor"))
    | {"hidden_activation"},
    **dict.fromkeys(
        ("phi2", "falcon", "nemotron"), frozenset(("attention.layer_norm_epsilon", "rope.scaling.attn_factor"))
    ),
    "olmo": frozenset(("attention.clamp_kqv", "attention.layer_norm_epsilon", "rope.scaling.attn_factor")),
    **dict.fromkeys(("gpt2", "starcoder"), frozenset(("attention.layer_norm_epsilon",))),
    "mistral3": frozenset(("attention.temperature_scale", "rope.scaling.yarn_log_multiplier"))
    | {"rope.scaling.attn_factor"},
    "glm4": frozenset(("rope.dimension_sections", "nextn_predict_layers", "rope.scaling.attn_factor")),
    "olmo2": _SLIDING | {"rope.scaling.attn_factor"},
    "exaone4": frozenset(("attention.sliding_window", "attention.sliding_window_pattern", "nextn_predict_layers"))
    | {"rope.scaling.attn_factor"},
    **dict.fromkeys(("smollm3", "seed_oss", "ernie4_5", "hunyuan-dense"), frozenset(("rope.scaling.attn_factor",))),
    "qwen2vl": frozenset(("rope.dimension_sections", "rope.scaling.attn_factor")),
    "qwen3vl": frozenset(("rope.dimension_sections", "n_deepstack_layers", "rope.scaling.attn_factor")),
    "qwen3vlmoe": _EXPERTS
    | {"rope.dimension_sections", "n_deepstack_layers", "rope.scaling.attn_factor", "expert_feed_forward_length"},
    "eagle3": frozenset(("target_layers", "target_hidden_size", "norm_before_residual", "norm_before_fc"))
    | {"rope.scaling.attn_factor"},
    "dflash": frozenset(("target_layers", "block_size", "rope.dimension_sections", "rope.scaling.attn_factor")),
    **dict.fromkeys(("llada", "dream"), frozenset(("attention.causal", "rope.scaling.attn_factor"))),
    "llada-moe": _EXPERTS | {"attention.causal", "expert_feed_forward_length", "rope.scaling.attn_factor"},
    "gemma3": _SLIDING,
    "gemma3n": _SLIDING
    | {"attention.shared_kv_layers", "embedding_length_per_layer_input", "final_logit_softcapping"}
    | {"altup.num_inputs", "altup.active_idx", "activation_sparsity_scale"},
    "gemma4": _SLIDING
    | _EXPERTS
    | {"attention.key_length_swa", "attention.value_length_swa", "rope.dimension_count_swa"}
    | {"attention.shared_kv_layers", "embedding_length_per_layer_input", "final_logit_softcapping"}
    | {"expert_feed_forward_length"},
}
WITHOUT_EFFECT = frozenset(
    ("attention.layer_norm_epsilon", "classifier.output_labels", "rope.scaling.finetuned", "tensor_data_layout")
) | frozenset(  # what Ollama's converter adds
    (
        *("image_token_index", "max_position_embeddings", "normalize_embeddings", "spatial_merge_size"),
        *("image_token_id", "vision_start_token_id", "vision_end_token_id"),
        *(
            "mrope_sections",
            "rope.mrope_section",
            "rope.mrope_interleaved",
        ),  # a text's positions are alike in all parts
    )
)
OTHER_PARTS = ("vision.", "mm.", "audio.")  # of a model that sees or hears
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.output_scale": (0, 1),
    "attention.scale": (0,),
    "attention.shared_kv_layers": (0,),
    "attention.sliding_window": (0,),
    "attention.temperature_length": (0,),
    "attention.temperature_scale": (0,),
    "attn_logit_softcapping": (0,),
    "embedding_scale": (0, 1),
    "expert_count": (0,),
    "expert_gating_func": (0,),
    "expert_group_count": (0, 1),
    "expert_group_used_count": (0, 1),
    "expert_feed_forward_length": (0,),
    "expert_shared_count": (0,),
    "expert_shared_feed_forward_length": (0,),
    "expert_used_count": (0,),
    "expert_weights_norm": (True,),
    "final_logit_softcapping": (0,),
    "leading_dense_block_count": (0,),
    "logit_scale": (0, 1),
    "nextn_predict_layers": (0,),
    "norm_top_k_prob": (True,),  # as Ollama's converter says it
    "residual_scale": (0, 1),
    "rope.global.freq_base": (1e6,),  # as Ollama's converter calls Gemma's two bases
    "rope.local.freq_base": (1e4,),
    "rope.scaling.attn_factor": (1,),
    "rope.scaling.yarn_attn_factor": (1,),
    "rope.scaling.yarn_log_multiplier": (0,),
    "use_parallel_residual": (False,),
}
NEUTRAL_IN: dict[str, dict[str, tuple[Any, ...]]] = {  # of one architecture, in place of the row above
    # experts whose weights do not sum to 1
    **{
        name: dict.fromkeys(("expert_weights_norm", "norm_top_k_prob"), (False,))
        for name in ("olmoe", "qwen2moe", "llada-moe")
    },
    **{name: {"ssm.v_head_reordered": (name != "qwen3next",)} for name in ("qwen35", "qwen35moe", "qwen3next")},
    "hunyuan-dense": dict.fromkeys(("expert_count", "expert_used_count"), (0, 1)),  # the only one is the feed-forward
    "hunyuan-moe": {"expert_shared_count": (0, 1)},
    "laguna": {"expert_shared_count": (0, 1)},
    "jina-bert-v2": {"attention.max_alibi_bias": (0, 8)},
    "dflash": {"attention.causal": (False,), "sample_from_anchor": (False,)},
}
_ROUTERS = {  # of architectures that have but one: by a softmax or by sigmoids
    **dict.fromkeys(
        ("llada-moe", "bailingmoe", "ernie4_5-moe", "hunyuan-moe", "llama", "olmoe", "nomic-bert-moe", "gemma4"), 1
    ),
    **dict.fromkeys(("qwen2moe", "qwen3moe", "qwen3next", "qwen35moe", "qwen3vlmoe", "granitemoe", "granitehybrid"), 1),
    "nemotron_h_moe": 2,
}
for _name, _router in _ROUTERS.items():
    NEUTRAL_IN[_name] = NEUTRAL_IN.get(_name, {}) | {"expert_gating_func": (0, _router)}
WHOLE_MAGNITUDE = ("laguna",)  # whose programs read rope.scaling.yarn_attn_factor
SAME_AS = {  # of sliding layers, and those of all
    "attention.key_length_swa": "attention.key_length",
    "attention.value_length_swa": "attention.value_length",
    "rope.dimension_count_swa": "rope.dimension_count",
    "rope.freq_base_swa": "rope.freq_base",
}


def check_keys(gguf: ModelFile) -> None:
    """UnsupportedError ``MODEL_KEY_UNKNOWN`` for a hyperparameter that the program would leave out."""
    prefix = gguf.architecture + "."
    read = READ | READ_IN.get(gguf.architecture, frozenset())
    neutral = NEUTRAL | NEUTRAL_IN.get(gguf.architecture, {})
    for whole, value in gguf.metadata.items():
        key = whole.removeprefix(prefix)
        if key == whole or key in read or key in WITHOUT_EFFECT or key.startswith(OTHER_PARTS):
            continue
        allowed = neutral.get(key, ())
        if key in SAME_AS:
            allowed = tuple(gguf.metadata[one] for one in (prefix + SAME_AS[key],) if one in gguf.metadata)
        if key == "rope.scaling.yarn_attn_factor" and _is_known_magnitude(gguf, value):
            continue
        if not isinstance(value, np.ndarray) and any(value == one for one in allowed):
            continue
        if whole in gguf.overrides:
            raise override_error(whole, f"is {short(value)}, which no program here would heed", "MODEL_KEY_UNKNOWN")
        wanted = f"{' or '.join(map(str, allowed))}, or no such key" if allowed else "models without it"
        raise UnsupportedError(
            f"{file_name(gguf)}: {short(whole)} is {short(value)}, and the answers may depend on it; edgellm runs "
            f"{wanted}. Take another conversion of the model.",
            code="MODEL_KEY_UNKNOWN",
        )


def _is_known_magnitude(gguf: ModelFile, value: Any) -> bool:
    """Whether a number is the whole magnitude of YaRN, as converters write it: read, or what YaRN gives by itself."""
    if gguf.metadata.get(key_of(gguf, "rope.scaling.type")) != "yarn" or not isinstance(value, float):
        return False
    usual = yarn_magnitude(real(gguf, "rope.scaling.factor", 1.0) or 1.0)
    return gguf.architecture in WHOLE_MAGNITUDE or math.isclose(value, usual, rel_tol=1e-5)
