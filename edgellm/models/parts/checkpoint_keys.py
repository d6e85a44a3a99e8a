"""Every key that config.json may have: whoever is in none of these rows is refused by name.

USED       read: by the architecture's form, or for the tokenizer, the packing of the weights, the sampling
HARMLESS   changes nothing that a trained model computes, whatever it says
ONLY       would change it, unless it is null or one of these values; ONLY_IN has those of one kind of model
DEFAULTS   what transformers computes with where the key is left out
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgellm.formats.errors import UnsupportedError
from edgellm.formats.findings import short
from edgellm.models.parts import long_tail_keys
from edgellm.models.parts.checkpoint_key_sets import BERT_DEFAULTS, ROBERTA_DEFAULTS
from edgellm.models.parts.checkpoint_key_sets import DECODER as _DECODER
from edgellm.models.parts.checkpoint_key_sets import DROPOUT as _DROPOUT
from edgellm.models.parts.checkpoint_key_sets import ENCODER as _ENCODER
from edgellm.models.parts.checkpoint_key_sets import EXPERTS as _EXPERTS
from edgellm.models.parts.checkpoint_key_sets import ROUTING as _ROUTING

_GRANITE = frozenset(("attention_multiplier", "embedding_multiplier", "residual_multiplier", "logits_scaling"))
_FRAME = frozenset(
    ("architectures", "model_type", "text_config", "tie_word_embeddings", "quantization_config", "quantization")
) | frozenset(("compression_config", "bos_token_id", "eos_token_id", "pad_token_id"))
_DELTA = frozenset(
    ("linear_conv_kernel_dim", "linear_key_head_dim", "linear_value_head_dim", "linear_num_key_heads")
) | frozenset(("linear_num_value_heads", "full_attention_interval", "partial_rotary_factor"))
_SLIDING = frozenset(("use_sliding_window", "sliding_window", "max_window_layers"))
# what some call their sizes -> what most do
ALIASES: dict[str, dict[str, str]] = {
    "distilbert": {
        "dim": "hidden_size",
        "hidden_dim": "intermediate_size",
        "n_heads": "num_attention_heads",
        "n_layers": "num_hidden_layers",
        "activation": "hidden_act",
    },
    "nomic_bert": {
        "n_embd": "hidden_size",
        "n_inner": "intermediate_size",
        "n_head": "num_attention_heads",
        "n_layer": "num_hidden_layers",
        "n_positions": "max_position_embeddings",
        "activation_function": "hidden_act",
        "layer_norm_epsilon": "layer_norm_eps",
        "rotary_emb_base": "rope_theta",
    },
}
_STATES = frozenset(
    (
        "architectures", "model_type", "vocab_size", "hidden_size", "num_hidden_layers", "hidden_act",
        "time_step_limit", "tie_word_embeddings", "quantization_config", "compression_config", "quantization",
        "bos_token_id", "eos_token_id", "unk_token_id", "sep_token_id", "pad_token_id",
    )
)  # fmt: skip
USED: dict[str, frozenset[str]] = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta"), _ENCODER | {"layer_norm_eps", "type_vocab_size"}),
    "distilbert": _ENCODER | frozenset(ALIASES["distilbert"]),
    "jina_embeddings_v3": _ENCODER | {"layer_norm_eps", "type_vocab_size"},
    "modernbert": _ENCODER
    | {"norm_eps", "local_attention", "global_attn_every_n_layers", "global_rope_theta", "local_rope_theta"}
    | {"classifier_pooling", "classifier_activation"},
    "nomic_bert": _ENCODER
    | frozenset(ALIASES["nomic_bert"])
    | {"layer_norm_eps", "type_vocab_size", "max_trained_positions", "moe_every_n_layers", "moe_top_k", "num_experts"}
    | {"qkv_proj_bias", "mlp_fc1_bias", "mlp_fc2_bias"},
    "llama": _DECODER | {"attention_bias", "mlp_bias"},
    "mistral": _DECODER | {"sliding_window"},
    "qwen2": _DECODER | _SLIDING,
    "qwen3": _DECODER | _SLIDING | {"attention_bias"},
    "mixtral": _DECODER | _EXPERTS | {"sliding_window"},
    "qwen3_moe": _DECODER
    | _SLIDING
    | _EXPERTS
    | {"attention_bias", "moe_intermediate_size", "norm_topk_prob", "decoder_sparse_step", "mlp_only_layers"},
    "qwen2_moe": _DECODER
    | {"num_experts", "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size"}
    | {"norm_topk_prob", "decoder_sparse_step", "mlp_only_layers", "qkv_bias"},
    "olmoe": _DECODER | _EXPERTS | {"norm_topk_prob"},
    "gpt_oss": _DECODER | _EXPERTS | {"attention_bias", "sliding_window", "swiglu_alpha", "swiglu_limit"},
    "granite": _DECODER | _GRANITE | {"attention_bias", "mlp_bias"},
    "granitemoe": _DECODER | _GRANITE | _EXPERTS | {"attention_bias"},
    "granitemoeshared": _DECODER | _GRANITE | _EXPERTS | {"attention_bias", "shared_intermediate_size"},
    "granitemoehybrid": _DECODER
    | _GRANITE
    | _EXPERTS
    | {"attention_bias", "shared_intermediate_size", "position_embedding_type", "time_step_limit", "mamba_n_heads"}
    | {"mamba_d_head", "mamba_n_groups", "mamba_d_state", "mamba_d_conv", "mamba_expand", "mamba_conv_bias"}
    | {"mamba_proj_bias"},
    "falcon_h1": _DECODER
    | {"attention_bias", "mlp_bias", "time_step_limit", "mamba_n_heads", "mamba_d_head", "mamba_d_ssm"}
    | {"mamba_n_groups", "mamba_d_state", "mamba_d_conv", "mamba_expand", "mamba_conv_bias", "mamba_proj_bias"}
    | {"projectors_bias", "mamba_rms_norm", "mamba_norm_before_gate", "attention_in_multiplier", "key_multiplier"}
    | {"attention_out_multiplier", "ssm_in_multiplier", "ssm_out_multiplier", "ssm_multipliers", "mlp_multipliers"}
    | {"embedding_multiplier", "lm_head_multiplier"},
    "nemotron_h": _DECODER
    | {"layers_block_type", "hybrid_override_pattern", "mlp_hidden_act", "mamba_hidden_act", "attention_head_dim"}
    | {"mamba_num_heads", "mamba_head_dim", "n_groups", "ssm_state_size", "conv_kernel", "time_step_limit"}
    | {"use_bias", "use_conv_bias", "mlp_bias", "layer_norm_epsilon", "n_routed_experts", "num_experts_per_tok"}
    | {"moe_intermediate_size", "moe_shared_expert_intermediate_size", "n_shared_experts", "moe_latent_size"}
    | {"norm_topk_prob", "routed_scaling_factor", "n_group", "topk_group"},
    "gemma": _DECODER,
    "gemma2": _DECODER
    | {"attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar", "sliding_window"},
    "gemma3_text": _DECODER
    | {
        "use_bidirectional_attention",
        "attention_bias",
        "query_pre_attn_scalar",
        "rope_local_base_freq",
        "sliding_window",
        "sliding_window_pattern",
    },
    "gemma3n_text": _DECODER
    | {"attention_bias", "sliding_window", "rope_local_base_freq", "final_logit_softcapping", "num_kv_shared_layers"}
    | {"hidden_size_per_layer_input", "vocab_size_per_layer_input", "altup_active_idx", "altup_num_inputs"}
    | {"laurel_rank", "activation_sparsity_pattern"},
    **dict.fromkeys(
        ("gemma4_text", "gemma4_unified_text"),
        _DECODER
        | {"attention_bias", "sliding_window", "final_logit_softcapping", "num_kv_shared_layers", "per_layer_config"}
        | {"hidden_size_per_layer_input", "vocab_size_per_layer_input", "attention_k_eq_v", "use_double_wide_mlp"}
        | {"global_head_dim", "num_global_key_value_heads", "enable_moe_block", "num_experts", "top_k_experts"}
        | {"moe_intermediate_size", "use_bidirectional_attention"},
    ),
    "lfm2": _DECODER
    | {"block_auto_adjust_ff_dim", "block_ff_dim", "block_ffn_dim_multiplier", "block_multiple_of", "conv_L_cache"}
    | {"full_attn_idxs", "norm_eps"},
    "qwen3_5_text": _DECODER | _DELTA,
    "qwen3_5_moe_text": _DECODER
    | _DELTA
    | {"num_experts", "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size"},
    "qwen3_next": _DECODER
    | _DELTA
    | {"num_experts", "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size"}
    | {"norm_topk_prob", "decoder_sparse_step", "mlp_only_layers"},
    "mamba2": _STATES
    | {"num_heads", "head_dim", "state_size", "n_groups", "conv_kernel", "expand", "use_bias", "use_conv_bias"}
    | {"layer_norm_epsilon"},
    # the frame around the settings of a model that also sees
    **dict.fromkeys(("gemma3", "gemma3n", "gemma4", "gemma4_unified", "qwen3_5", "qwen3_5_moe"), _FRAME),
}

HARMLESS = frozenset(
    (
        # transformers' own records and ways of running
        "_attn_implementation", "_attn_implementation_autoset", "_commit_hash", "_flash_attn_2_enabled",
        "_from_model_config", "_name_or_path", "attn_implementation", "chunk_size_feed_forward", "dtype",
        "experts_implementation", "name_or_path", "output_attentions", "output_hidden_states", "pretraining_tp",
        "return_dict", "tie_last_hidden_states", "torch_dtype", "torchscript", "transformers_version", "use_bfloat16",
        "use_cache", "use_return_dict",
        # training
        "attention_dropout", "hidden_dropout", "initializer_range", "is_decoder", "neftune_noise_alpha",
        # classes and tasks that a language model has none of
        "finetuning_task", "id2label", "label2id", "num_labels", "problem_type", "task_specific_params",
        "tf_legacy_loss", "tokenizer_class",
        # for generation, where transformers takes them from generation_config.json alone
        "assistant_confidence_threshold", "assistant_lookbehind", "bad_words_ids", "begin_suppress_tokens",
        "cache_implementation", "decoder_start_token_id", "diversity_penalty", "do_sample", "early_stopping",
        "encoder_no_repeat_ngram_size", "encoder_repetition_penalty", "epsilon_cutoff", "eta_cutoff",
        "exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id", "length_penalty",
        "max_length", "min_length", "no_repeat_ngram_size", "num_assistant_tokens", "num_assistant_tokens_schedule",
        "num_beam_groups", "num_beams", "num_return_sequences", "output_scores", "remove_invalid_values",
        "repetition_penalty", "return_dict_in_generate", "suppress_tokens", "target_lookbehind", "temperature",
        "top_k", "top_p", "typical_p",
        # notes of the programs that wrote the checkpoint
        "is_llama_config", "transformers.js_config", "unsloth_fixed", "unsloth_version",
    )
)  # fmt: skip
# how tokens behind the next are drafted, and the other name of a state's type
_MTP = frozenset(("mtp_num_hidden_layers", "mtp_use_dedicated_embeddings", "mamba_ssm_dtype"))
_SEES = frozenset(("vision_config", "image_token_id", "video_token_id", "vision_start_token_id")) | frozenset(
    ("vision_end_token_id", "vision_token_id", "language_model_only")
)
# how a state space is set up before it is trained, and how prompts are cut
_BEFORE_TRAINING = frozenset(
    (
        "chunk_size", "rescale_prenorm_residual", "residual_in_fp32", "time_step_floor", "time_step_max",
        "time_step_min", "time_step_rank", "time_step_scale", "time_step_init_scheme",
    )
)  # fmt: skip
HARMLESS_IN: dict[str, frozenset[str]] = {
    "distilbert": frozenset(("dropout", "qa_dropout", "seq_classif_dropout", "sinusoidal_pos_embds", "tie_weights_")),
    "jina_embeddings_v3": _DROPOUT,
    "modernbert": frozenset(("embedding_dropout", "mlp_dropout", "classifier_dropout", "initializer_cutoff_factor"))
    | {"decoder_bias", "deterministic_flash_attn", "sparse_prediction", "sparse_pred_ignore_index", "reference_compile"}
    | {"repad_logits_with_grad", "layer_norm_eps", "position_embedding_type", "gradient_checkpointing"},
    "nomic_bert": _DROPOUT
    | {"attn_pdrop", "embd_pdrop", "resid_pdrop", "dense_seq_output", "fused_bias_fc", "fused_dropout_add_ln"}
    | {"pad_vocab_size_multiple", "use_flash_attn", "use_xentropy", "last_layer_subset", "reorder_and_upcast_attn"}
    | {"summary_activation", "summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj"}
    | {"scale_attn_by_inverse_layer_idx", "num_labels", "moe_impl", "moe_resid_pdrop", "router_aux_loss_coef"}
    | {"pad_vocab_to_multiple_of", "ffn_div"},
    **dict.fromkeys(("roberta", "xlm-roberta"), _DROPOUT | {"gradient_checkpointing", "output_past"}),
    "bert": _DROPOUT
    | {"gradient_checkpointing", "summary_type", "pooler_fc_size", "pooler_num_attention_heads"}
    | {"pooler_num_fc_layers", "pooler_size_per_head", "pooler_type", "directionality", "model_max_length"},
    "llama": frozenset(),
    "mistral": frozenset(("max_window_layers", "use_sliding_window")),  # its window counts without them
    "qwen2": frozenset(("attention_bias",)),  # q, k and v have one, o has none
    "qwen3": frozenset(),
    "lfm2": frozenset(("block_dim", "block_mlp_init_scale", "block_norm_eps", "block_out_init_scale", "num_heads"))
    | frozenset(("block_use_xavier_init", "conv_dim", "conv_dim_out", "conv_use_xavier_init", "theta")),
    "mixtral": _ROUTING | {"router_jitter_noise", "max_window_layers", "use_sliding_window"},
    "qwen3_moe": _ROUTING,
    # its window, and where that begins, count with use_sliding_window alone
    "qwen2_moe": _ROUTING | {"attention_bias", "sliding_window", "max_window_layers"},
    "olmoe": _ROUTING,
    # an older spelling of the experts that a token is sent to, and a length that its rotation says
    "gpt_oss": _ROUTING | {"experts_per_token", "initial_context_length"},
    "granite": frozenset(),
    "granitemoe": _ROUTING,
    "granitemoeshared": _ROUTING,
    "granitemoehybrid": _ROUTING | _BEFORE_TRAINING | {"mamba_chunk_size", "init_method"},
    "falcon_h1": _BEFORE_TRAINING | {"mamba_chunk_size", "mlp_expansion_factor", "num_logits_to_keep"},
    # its attention knows no positions; a limit of time steps that transformers has in prompts alone, llama.cpp never
    "nemotron_h": _BEFORE_TRAINING
    | {"output_router_logits", "use_mamba_kernels", "mamba_ssm_cache_dtype", "moe_shared_expert_overlap", "expand"}
    | {"num_logits_to_keep", "num_nextn_predict_layers", "mtp_layers_block_type", "mtp_hybrid_override_pattern"}
    | {"partial_rotary_factor", "norm_eps"},
    "gemma": frozenset(),
    "gemma2": frozenset(("cache_implementation",)),
    "gemma3_text": frozenset(("_sliding_window_pattern",)),
    "qwen3_5_text": _MTP,
    "qwen3_5_moe_text": _MTP | _ROUTING,
    "qwen3_next": _MTP | _ROUTING,
    # what the width must be, and two keys that transformers' class does not have: it is so, and not so
    "mamba2": _BEFORE_TRAINING | {"intermediate_size", "rms_norm", "norm_before_gate"},
    **dict.fromkeys(("qwen3_5", "qwen3_5_moe"), _SEES),
    **dict.fromkeys(("gemma4_text", "gemma4_unified_text"), _ROUTING),
    **dict.fromkeys(
        ("gemma4", "gemma4_unified"),
        frozenset(("vision_config", "audio_config", "image_token_id", "video_token_id", "audio_token_id"))
        | frozenset(("boi_token_id", "eoi_token_id", "boa_token_id", "eoa_token_id", "eoa_token_index"))
        | frozenset(("vision_soft_tokens_per_image",)),
    ),
    # scores are not scaled, and numbers are held between bounds in training alone
    "gemma3n_text": frozenset(("query_pre_attn_scalar", "altup_coef_clip", "altup_lr_multiplier")),
    "gemma3n": frozenset(("vision_config", "audio_config", "image_token_id", "audio_token_id", "boi_token_id"))
    | frozenset(("eoi_token_id", "boa_token_id", "eoa_token_id", "audio_soft_tokens_per_image"))
    | frozenset(("vision_soft_tokens_per_image",)),
    "gemma3": frozenset(("vision_config", "mm_tokens_per_image", "boi_token_index", "eoi_token_index"))
    | frozenset(("image_token_index", "boi_token_id", "eoi_token_id", "image_token_id")),
}

ONLY: dict[str, tuple[Any, ...]] = {
    "activation": ("swiglu",),
    "add_cross_attention": (False,),
    "attention_bias": (False,),
    "attn_layer_indices": (),
    "attn_output_gate": (True,),
    "attn_logit_softcapping": (),
    "block_use_swiglu": (True,),
    "causal": (False,),
    "classifier_bias": (False,),
    "clip_qkv": (),
    "conv_bias": (False,),
    "final_logit_softcapping": (),
    "is_encoder_decoder": (False,),
    "mamba_use_mlp": (True,),
    "mamba_proj_bias": (False,),
    "mlp_bias": (False,),
    "mlp_fc1_bias": (False,),
    "mlp_fc2_bias": (False,),
    "mlp_only_layers": ([],),
    "norm_bias": (False,),
    "norm_topk_prob": (True,),
    "normalization_function": ("rmsnorm",),
    "num_experts": (0,),
    "num_local_experts": (0,),
    "parallel_block": (False,),
    "parallel_block_tied_norm": (False,),
    "partial_rotary_factor": (1,),
    "position_embedding_type": ("absolute",),
    "prenorm": (False,),
    "pruned_heads": ({},),
    "qkv_proj_bias": (False,),
    "rope_interleaved": (False,),
    "rotary_emb_fraction": (1,),
    "rotary_emb_interleaved": (False,),
    "rotary_emb_scale_base": (),
    "rotary_scaling_factor": (),
    "scale_attn_weights": (True,),
    "sliding_window": (),
    "tie_embedding": (True,),
    "tie_encoder_decoder": (False,),
    "use_bidirectional_attention": (False,),
    "use_embedding_sharing": (True,),
    "use_gated_activation": (True,),
    "use_mrope": (False,),
    "use_parallel_block": (True,),
    "use_parallel_embedding": (False,),
    "order_of_interleaved_layers": ("local_attn_first",),
    "rotary_pct": (1,),
    "use_pos_enc": (True,),
    "use_rms_norm": (False,),
    "use_sliding_window": (False,),
}

ONLY_IN: dict[str, dict[str, tuple[Any, ...]]] = {
    "gemma3n_text": {"altup_correct_scale": (True,)},
    "minimax_m2": {"scoring_func": ("sigmoid",), "use_routing_bias": (True,), "use_qk_norm": (True,)}
    | {"qk_norm_type": ("per_layer",), "shared_intermediate_size": (0,)},
    "starcoder2": {"mlp_type": ("default",), "norm_type": ("layer_norm",)},
    "nomic_bert": {"num_shared_experts": (0,), "expert_choice_router": (False,), "add_pooling_layer": (False,)}
    | {"moe_normalize_expert_weights": (False,)},
    "phi3": {"full_attn_mod": (1,), "interpolate_factor": (1,), "lm_head_bias": (False,)},
}

NOTED = {"auto_map": "names a program of its author's own; the architecture's usual one was converted, as it says"}

_DELTA_DEFAULTS = {
    "head_dim": 256,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
}
_GEMMA4_DEFAULTS: dict[str, Any] = {
    "vocab_size": 262144,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 30,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131072,
    "sliding_window": 512,
    "tie_word_embeddings": True,
    "rope_parameters": {
        "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
}

DEFAULTS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("roberta", "xlm-roberta"), ROBERTA_DEFAULTS),
    "distilbert": ROBERTA_DEFAULTS | {"num_hidden_layers": 6, "type_vocab_size": 1},
    "jina_embeddings_v3": ROBERTA_DEFAULTS
    | {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    | {"max_position_embeddings": 8194, "type_vocab_size": 1, "layer_norm_eps": 1e-5, "rope_theta": 20000.0},
    "modernbert": {
        "hidden_size": 768,
        "intermediate_size": 1152,
        "num_hidden_layers": 22,
        "num_attention_heads": 12,
        "max_position_embeddings": 8192,
        "hidden_activation": "gelu",
        "norm_eps": 1e-5,
        "local_attention": 128,
        "classifier_pooling": "cls",
        "tie_word_embeddings": True,
    },
    "nomic_bert": ROBERTA_DEFAULTS | {"max_position_embeddings": 2048, "hidden_act": "silu", "rope_theta": 1000.0},
    "bert": BERT_DEFAULTS,
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28},
    "qwen3": {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28, "head_dim": 128},
    "lfm2": {
        "num_key_value_heads": 8,
        "norm_eps": 1e-5,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
        "max_position_embeddings": 128000,
    },
    "qwen3_moe": {"num_key_value_heads": 4, "sliding_window": 4096, "intermediate_size": 6144}
    | {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768},
    "mixtral": {"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e6}
    | {"num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen2_moe": {"num_key_value_heads": 16, "num_experts": 60, "num_experts_per_tok": 4}
    | {"moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632},
    "olmoe": {"rms_norm_eps": 1e-5, "num_experts": 64, "num_experts_per_tok": 8},
    "gpt_oss": {
        "num_key_value_heads": 8,
        "head_dim": 64,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
        "sliding_window": 128,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072,
        "rope_theta": 150000.0,
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
            "rope_theta": 150000.0,
        },
    },
    "granite": {},
    "mamba2": {"hidden_size": 4096, "num_hidden_layers": 64, "vocab_size": 32768, "num_heads": 128, "head_dim": 64}
    | {"state_size": 128, "n_groups": 8, "conv_kernel": 4, "expand": 2, "layer_norm_epsilon": 1e-5},
    "granitemoe": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "granitemoeshared": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "granitemoehybrid": {"num_local_experts": 8, "num_experts_per_tok": 2, "shared_intermediate_size": 1024}
    | {"mamba_n_heads": 128, "mamba_n_groups": 1, "mamba_d_state": 256, "mamba_d_conv": 4, "mamba_expand": 2},
    "falcon_h1": {"num_key_value_heads": 8, "mamba_d_ssm": 1024, "mamba_n_heads": 128, "mamba_n_groups": 1}
    | {"mamba_d_state": 256, "mamba_d_conv": 4, "mamba_expand": 2, "rms_norm_eps": 1e-5}
    | {"max_position_embeddings": 8192},
    "nemotron_h": {"num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 21504, "layer_norm_epsilon": 1e-5}
    | {"mamba_num_heads": 128, "mamba_head_dim": 64, "n_groups": 8, "ssm_state_size": 128, "conv_kernel": 4}
    | {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 7688, "mlp_hidden_act": "relu2"}
    | {"moe_shared_expert_intermediate_size": 7688, "max_position_embeddings": 4096},
    "gemma": {"num_key_value_heads": 16, "head_dim": 256, "tie_word_embeddings": True}
    | {"max_position_embeddings": 8192},
    "gemma2": {
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 8192,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "tie_word_embeddings": True,
    },
    # the first checkpoints of models that also see say only what differs
    "gemma3_text": {
        "vocab_size": 262208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 131072,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "tie_word_embeddings": True,
    },
    "gemma3": {"tie_word_embeddings": True},
    "gemma3n_text": {"vocab_size": 262400, "hidden_size": 2048, "intermediate_size": 16384, "num_hidden_layers": 35}
    | {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 256, "max_position_embeddings": 32768}
    | {"sliding_window": 512, "final_logit_softcapping": 30.0, "hidden_size_per_layer_input": 256}
    | {"vocab_size_per_layer_input": 262144, "altup_active_idx": 0, "altup_num_inputs": 4, "laurel_rank": 64}
    | {"num_kv_shared_layers": 15, "tie_word_embeddings": True},
    "gemma3n": {"tie_word_embeddings": True},
    "gemma4_text": _GEMMA4_DEFAULTS | {"hidden_size_per_layer_input": 256, "vocab_size_per_layer_input": 262144},
    "gemma4_unified_text": _GEMMA4_DEFAULTS | {"max_position_embeddings": 262144, "sliding_window": 1024},
    "gemma4": {"tie_word_embeddings": True},
    "gemma4_unified": {"tie_word_embeddings": True},
    "qwen3_5_text": _DELTA_DEFAULTS | {"num_key_value_heads": 4},
    "qwen3_5_moe_text": _DELTA_DEFAULTS
    | {"num_key_value_heads": 2, "num_experts": 256, "num_experts_per_tok": 8}
    | {"moe_intermediate_size": 512, "shared_expert_intermediate_size": 512},
    "qwen3_next": _DELTA_DEFAULTS
    | {"num_key_value_heads": 2, "num_experts": 512, "num_experts_per_tok": 10, "max_position_embeddings": 32768}
    | {"moe_intermediate_size": 512, "shared_expert_intermediate_size": 512},
    "qwen3_5": {"tie_word_embeddings": False},
    "qwen3_5_moe": {"tie_word_embeddings": False},
}


_SEEING = {
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"), _SEES),
    "glm_ocr": frozenset(
        ("vision_config", "image_token_id", "video_token_id", "image_start_token_id", "image_end_token_id")
    )
    | {"video_start_token_id", "video_end_token_id"},
    "mistral3": frozenset(("vision_config", "image_token_index", "image_token_id", "multimodal_projector_bias"))
    | {"projector_hidden_act", "spatial_merge_size", "vision_feature_layer"},
}
USED |= {
    **dict.fromkeys(_SEEING, _FRAME),
    "cohere": _DECODER | {"attention_bias", "layer_norm_eps", "logit_scale", "use_qk_norm"},
    "cohere2": _DECODER
    | {"attention_bias", "layer_norm_eps", "logit_scale", "sliding_window", "sliding_window_pattern"},
    "starcoder2": _DECODER | {"norm_epsilon", "sliding_window", "use_bias"},
    "lfm2_moe": _DECODER
    | _EXPERTS
    | {"conv_L_cache", "norm_eps", "moe_intermediate_size", "num_dense_layers", "norm_topk_prob", "use_expert_bias"}
    | {"routed_scaling_factor", "full_attn_idxs"},
    "minimax_m2": _DECODER | _EXPERTS | {"rotary_dim", "partial_rotary_factor", "attn_type_list"},
    "glm4_moe": _DECODER
    | {"attention_bias", "moe_intermediate_size", "num_experts_per_tok", "n_routed_experts", "n_shared_experts"}
    | {"n_group", "topk_group", "first_k_dense_replace", "norm_topk_prob", "routed_scaling_factor"}
    | {"partial_rotary_factor", "num_nextn_predict_layers", "use_qk_norm", "num_local_experts"},
    "phi3": _DECODER | {"sliding_window", "partial_rotary_factor"},
    "ministral3": _DECODER | {"sliding_window"},
    "glm4": _DECODER | {"attention_bias", "partial_rotary_factor", "num_nextn_predict_layers"},
    "glm_ocr_text": _DECODER | {"attention_bias", "partial_rotary_factor", "num_nextn_predict_layers"},
    "smollm3": _DECODER | {"attention_bias", "mlp_bias", "no_rope_layers", "no_rope_layer_interval"},
    "olmo2": _DECODER | {"attention_bias"},
    "olmo3": _DECODER | {"attention_bias", "sliding_window"},
    "exaone4": _DECODER | {"sliding_window", "sliding_window_pattern", "num_nextn_predict_layers"},
    "seed_oss": _DECODER | {"attention_bias", "attention_out_bias", "mlp_bias"},
    "ernie4_5": _DECODER | {"use_bias"},
    "qwen2_vl_text": _DECODER | _SLIDING,
    "qwen2_5_vl_text": _DECODER | _SLIDING,
    "qwen3_vl_text": _DECODER | {"attention_bias"},
    "qwen3_vl_moe_text": _DECODER
    | _EXPERTS
    | {"attention_bias", "moe_intermediate_size", "decoder_sparse_step", "mlp_only_layers"},
}
HARMLESS_IN |= {
    **dict.fromkeys(USED.keys() - HARMLESS_IN.keys(), frozenset()),
    **_SEEING,
    "cohere2": frozenset(
        ("cache_implementation", "_sliding_window_pattern", "layer_switch", "position_embedding_type")
    ),
    "starcoder2": frozenset(("residual_dropout", "embedding_dropout")),
    "lfm2_moe": _ROUTING,
    "minimax_m2": _ROUTING | {"router_jitter_noise", "use_mtp", "num_mtp_modules", "mtp_transformer_layers"},
    "glm4_moe": _ROUTING | {"num_mtp_layers"},
    "phi3": frozenset(("resid_pdrop", "embd_pdrop")),
    "smollm3": frozenset(("sliding_window", "max_window_layers")),  # it counts with use_sliding_window alone
    "seed_oss": frozenset(("residual_dropout",)),
    "qwen3_vl_moe_text": _ROUTING | {"sliding_window"},
}
DEFAULTS |= {
    **{kind: {"tie_word_embeddings": kind == "mistral3"} for kind in _SEEING},
    "cohere": {"layer_norm_eps": 1e-5, "rope_theta": 500000.0, "logit_scale": 0.0625, "tie_word_embeddings": True}
    | {"max_position_embeddings": 8192},
    "cohere2": {"layer_norm_eps": 1e-5, "logit_scale": 0.0625, "tie_word_embeddings": True}
    | {"max_position_embeddings": 8192, "sliding_window": 4096},
    "starcoder2": {"num_key_value_heads": 2, "norm_epsilon": 1e-5, "max_position_embeddings": 4096}
    | {"tie_word_embeddings": True},
    "lfm2_moe": {"num_key_value_heads": 8, "norm_eps": 1e-5, "rope_theta": 1e6, "tie_word_embeddings": True}
    | {"max_position_embeddings": 128000, "num_experts": 32, "num_experts_per_tok": 4, "num_dense_layers": 2}
    | {"intermediate_size": 7168, "moe_intermediate_size": 1792},
    "minimax_m2": {"num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-6, "rope_theta": 5000000.0}
    | {"max_position_embeddings": 196608, "num_local_experts": 256, "num_experts_per_tok": 8},
    "glm4_moe": {"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "max_position_embeddings": 131072}
    | {"moe_intermediate_size": 1408, "num_experts_per_tok": 8, "n_routed_experts": 128, "n_shared_experts": 1}
    | {"first_k_dense_replace": 1},
    "phi3": {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "original_max_position_embeddings": 4096},
    "ministral3": {
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 262144,
    },
    "glm4": {"num_key_value_heads": 2, "head_dim": 128, "rms_norm_eps": 1.5625e-7}
    | {"max_position_embeddings": 131072, "attention_bias": True},
    "glm_ocr_text": {"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "max_position_embeddings": 131072},
    "smollm3": {"num_key_value_heads": 4, "rope_theta": 2000000.0, "tie_word_embeddings": True}
    | {"max_position_embeddings": 32768},
    "olmo2": {"rms_norm_eps": 1e-5, "max_position_embeddings": 2048},
    "olmo3": {"rms_norm_eps": 1e-5, "max_position_embeddings": 2048, "rope_theta": 500000.0, "sliding_window": 4096},
    "exaone4": {"num_key_value_heads": 32, "rms_norm_eps": 1e-5, "max_position_embeddings": 2048}
    | {"sliding_window": 4096},
    "seed_oss": {"num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 524288},
    "ernie4_5": {"num_key_value_heads": 2, "head_dim": 128, "rms_norm_eps": 1e-5, "rope_theta": 500000.0}
    | {"max_position_embeddings": 131072, "tie_word_embeddings": True},
    **{
        kind: {"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "max_position_embeddings": 32768}
        | {"sliding_window": 4096, "max_window_layers": 80}
        for kind in ("qwen2_vl_text", "qwen2_5_vl_text")
    },
    "qwen3_vl_text": {"num_key_value_heads": 32, "head_dim": 128, "rope_theta": 500000.0}
    | {"max_position_embeddings": 128000},
    "qwen3_vl_moe_text": {"num_key_value_heads": 16, "rope_theta": 500000.0, "max_position_embeddings": 128000}
    | {"num_experts": 60, "num_experts_per_tok": 4, "moe_intermediate_size": 1408},
}

USED |= long_tail_keys.USED
HARMLESS_IN |= long_tail_keys.HARMLESS_IN
ONLY_IN |= long_tail_keys.ONLY_IN
DEFAULTS |= long_tail_keys.DEFAULTS
ALIASES |= long_tail_keys.ALIASES


# latent attention, and experts in groups
_LATENT = _DECODER | {
    *("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "n_routed_experts"),
    *("n_shared_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob", "routed_scaling_factor"),
    *("first_k_dense_replace", "n_group", "topk_group", "topk_method"),
}
USED |= {
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT | {"rope_interleave", "num_nextn_predict_layers"},
    "glm4_moe_lite": _LATENT - {"first_k_dense_replace"}
    | {"rope_interleave", "num_nextn_predict_layers", "mlp_layer_types"},
}
_BALANCE = _ROUTING | {"aux_loss_alpha", "seq_aux", "ep_size", "qk_head_dim"}  # for training, or computed from others
HARMLESS_IN |= dict.fromkeys(("deepseek_v2", "deepseek_v3", "glm4_moe_lite"), _BALANCE | {"num_mtp_layers"})
ONLY_IN |= {
    "deepseek_v2": {"scoring_func": ("softmax",), "moe_layer_freq": (1,)},
    "deepseek_v3": {"scoring_func": ("sigmoid",), "moe_layer_freq": (1,)},
    "glm4_moe_lite": {"scoring_func": ("sigmoid",), "moe_layer_freq": (1,), "first_k_dense_replace": (1,)},
}
DEFAULTS |= {
    "deepseek_v2": {"vocab_size": 102400, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
    | {"num_attention_heads": 32, "max_position_embeddings": 2048, "first_k_dense_replace": 0, "kv_lora_rank": 512}
    | {"q_lora_rank": 1536, "n_routed_experts": 64, "n_shared_experts": 2, "qk_nope_head_dim": 128}
    | {"qk_rope_head_dim": 64, "v_head_dim": 128, "moe_intermediate_size": 1407, "topk_method": "greedy"},
    "deepseek_v3": {"vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432, "num_hidden_layers": 61}
    | {"num_attention_heads": 128, "num_key_value_heads": 128, "max_position_embeddings": 4096}
    | {"first_k_dense_replace": 3, "kv_lora_rank": 512, "q_lora_rank": 1536, "n_routed_experts": 256}
    | {"n_shared_experts": 1, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_group": 8}
    | {"topk_group": 4, "num_experts_per_tok": 8, "moe_intermediate_size": 2048, "routed_scaling_factor": 2.5}
    | {"norm_topk_prob": True, "rope_interleave": True},
    "glm4_moe_lite": {"vocab_size": 154880, "hidden_size": 2048, "intermediate_size": 10240, "num_hidden_layers": 47}
    | {"num_attention_heads": 20, "num_key_value_heads": 20, "max_position_embeddings": 202752, "kv_lora_rank": 512}
    | {"q_lora_rank": 768, "n_routed_experts": 64, "n_shared_experts": 1, "qk_nope_head_dim": 192}
    | {"qk_rope_head_dim": 64, "v_head_dim": 256, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 4}
    | {"moe_intermediate_size": 1536, "routed_scaling_factor": 1.8, "norm_topk_prob": True, "rms_norm_eps": 1e-5}
    | {"rope_interleave": True},
}

# drafts that are files of their own (models/drafts/)
USED |= {
    "eagle3": _DECODER
    | {"target_hidden_size", "norm_before_residual", "norm_before_fc", "eagle_config", "speculators_model_type"}
    | {"eagle_aux_hidden_state_layer_ids", "draft_vocab_size", "transformer_layer_config"},
    "dflash": _DECODER | _SLIDING | {"block_size", "target_layer_ids", "dflash_config", "num_target_layers"},
}
HARMLESS_IN |= {
    "eagle3": frozenset(("speculators_config", "speculators_version", "embed_requires_grad", "has_no_defaults_at_init"))
    | {"max_window_layers", "target_model_type", "ttt_steps"},
    "dflash": frozenset(),
}
ONLY_IN |= {
    "eagle3": {"fc_norm": (False,), "norm_output": (False,)},
    "dflash": {},
}
DEFAULTS |= {"eagle3": {}, "dflash": {}}


def check_keys(folder: Path, values: Mapping[str, Any], model_type: str) -> list[str]:
    """What the user should know of these settings. UnsupportedError for one that edgellm does not know."""
    used, harmless = USED[model_type], HARMLESS | HARMLESS_IN[model_type]
    only, noted = ONLY | ONLY_IN.get(model_type, {}), NOTED | long_tail_keys.NOTED_IN.get(model_type, {})
    notes = []
    for key, value in values.items():
        if value is None or key in used or key in harmless or _is_one_of(value, only.get(key, ())):
            continue
        if key in noted:
            notes.append(f"config.json: {key} {noted[key]}.")
            continue
        known = " or ".join(["null", *(repr(one).lower() for one in only[key])]) if key in only else "models without it"
        raise UnsupportedError(
            f"{folder.name}/config.json: {short(key)} is {short(value)}, and the answers may depend on it; edgellm "
            f"converts {known} for a {model_type} model. Take another model of this family.",
            code="CHECKPOINT_CONFIG",
        )
    return notes


def _is_one_of(value: Any, allowed: tuple[Any, ...]) -> bool:
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in allowed)
