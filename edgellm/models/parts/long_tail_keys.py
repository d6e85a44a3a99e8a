"""Rows of ``checkpoint_keys`` for architectures of the long tail: what their config.json may have and means."""

from __future__ import annotations

from typing import Any

from edgellm.models.parts.checkpoint_key_sets import DECODER, DROPOUT, ENCODER, EXPERTS, ROBERTA_DEFAULTS, ROUTING

_BAILING = (
    DECODER
    | EXPERTS
    | {"moe_intermediate_size", "num_shared_experts", "norm_topk_prob", "first_k_dense_replace", "use_bias"}
    | {"use_qkv_bias", "moe_shared_expert_intermediate_size"}
)
_BAILING_DEFAULTS = {"rms_norm_eps": 1e-6, "max_position_embeddings": 16384}
_BAILING_ONLY: dict[str, tuple[Any, ...]] = {"norm_head": (False,), "norm_softmax": (False,), "use_rmsnorm": (True,)}
_BAILING_ONLY |= {"using_split_qkv_in_self_attention": (False,)}
_UNUSED = frozenset(("embedding_dropout", "output_dropout", "max_window_layers", "sliding_window"))
"""Of the family; windows count with ``use_sliding_window`` alone."""

_GPT2_NAMES = {
    "n_embd": "hidden_size",
    "n_inner": "intermediate_size",
    "n_head": "num_attention_heads",
    "n_layer": "num_hidden_layers",
    "n_positions": "max_position_embeddings",
    "activation_function": "hidden_act",
    "layer_norm_epsilon": "layer_norm_eps",
}
USED: dict[str, frozenset[str]] = {
    "jina_bert": ENCODER | {"layer_norm_eps", "type_vocab_size", "feed_forward_type"},
    "dots1": DECODER
    | EXPERTS
    | {"moe_intermediate_size", "n_routed_experts", "n_shared_experts", "n_group", "topk_group", "norm_topk_prob"}
    | {"first_k_dense_replace", "routed_scaling_factor", "sliding_window", "max_window_layers", "attention_bias"},
    "ernie4_5_moe": DECODER
    | {"use_bias", "moe_num_experts", "moe_k", "moe_num_shared_experts", "moe_layer_start_index"}
    | {"moe_layer_end_index", "moe_layer_interval", "moe_intermediate_size", "num_experts", "num_experts_per_tok"},
    "hunyuan_v1_dense": DECODER | {"attention_bias", "attention_head_dim"},
    "hunyuan_v1_moe": DECODER
    | EXPERTS
    | {"moe_topk", "moe_intermediate_size", "num_shared_expert", "attention_bias", "attention_head_dim"},
    "bailing_moe": _BAILING,
    "bailing_moe_v2": _BAILING
    | {"n_group", "topk_group", "routed_scaling_factor", "partial_rotary_factor", "rotary_dim"}
    | {"num_nextn_predict_layers"},
    "cohere2_moe": DECODER
    | EXPERTS
    | {"attention_bias", "layer_norm_eps", "logit_scale", "sliding_window", "sliding_window_pattern"}
    | {"num_shared_experts", "expert_selection_fn", "mlp_layer_types", "prefix_dense_sliding_window_pattern"}
    | {"norm_topk_prob", "prefix_dense_intermediate_size", "first_k_dense_replace", "num_nextn_predict_layers"},
    "laguna": DECODER
    | EXPERTS
    | {"sliding_window", "moe_intermediate_size", "shared_expert_intermediate_size", "attention_bias", "gating"}
    | {"num_attention_heads_per_layer", "mlp_layer_types", "moe_routed_scaling_factor", "mlp_only_layers"}
    | {"swa_rope_parameters", "partial_rotary_factor"},
}
_GPT = DECODER - {"rms_norm_eps", "num_key_value_heads"} | {"layer_norm_eps", "n_ctx"}
USED |= {
    "exaone": DECODER | {"attention_bias", "mlp_bias", "num_layers", "layer_norm_epsilon", "activation_function"},
    "internlm2": DECODER | {"bias"},
    "minicpm": DECODER | {"attention_bias", "scale_emb", "scale_depth", "dim_model_base"},
    "stablelm": DECODER
    | {"layer_norm_eps", "use_qkv_bias", "qk_layernorm", "use_parallel_residual", "partial_rotary_factor"},
    "phi": DECODER | {"layer_norm_eps", "qk_layernorm", "partial_rotary_factor"},
    "gpt_neox": DECODER
    | {"layer_norm_eps", "use_parallel_residual", "partial_rotary_factor", "attention_bias", "rotary_pct"}
    | {"rotary_emb_base"},
    "gpt2": _GPT | frozenset(_GPT2_NAMES),
    "gpt_bigcode": _GPT | frozenset(_GPT2_NAMES) | {"multi_query"},
    "falcon": DECODER
    | {
        "layer_norm_epsilon",
        "num_kv_heads",
        "multi_query",
        "new_decoder_architecture",
        "parallel_attn",
        "bias",
        "alibi",
    }
    | {"ffn_hidden_size", "activation", "n_head", "n_layer", "n_head_kv", "num_ln_in_parallel_attn"},
    "olmo": DECODER | {"clip_qkv", "attention_bias"},
    "glm": DECODER | {"attention_bias", "partial_rotary_factor"},
    "arcee": DECODER | {"attention_bias", "mlp_bias"},
    "nemotron": DECODER | {"attention_bias", "mlp_bias", "norm_eps", "partial_rotary_factor", "rope_percent"},
    "eurobert": DECODER,
}
# of the first checkpoints of Hunyuan, whose class may also have classes, see, share keys, and have latent attention
_HUNYUAN_HARMLESS = frozenset(
    (
        "eod_token_id", "org_vocab_size", "pad_id", "sep_id", "im_start_id", "im_end_id", "im_newline_id",
        "text_start_id", "text_end_id", "image_token_id", "video_start_id", "video_end_id", "mask_init_id",
        "cla_share_factor", "class_num", "dense_list", "pool_type", "xdrope_section", "num_media_embeds",
        "skip_cls_token", "anyres_pooling_size", "anyres_vit_max_image_size", "anyres_vit_two_views",
        "vit_add_patchemb_bias", "vit_input_resolution", "vit_mapping_type", "vit_norm_type", "vit_patch", "vit_path",
        "vit_remove_prenorm", "vit_token", "vit_type", "vit_used_rms_norm", "kv_lora_rank", "q_lora_rank",
        "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
    )
)  # fmt: skip
_HUNYUAN_ONLY: dict[str, tuple[Any, ...]] = {
    "use_qk_norm": (True,),
    "use_cla": (False,),
    "use_mla": (False,),
    "mamba": (False,),
    "add_classification_head": (False,),
    "norm_type": ("rms", "hf_rms"),
    "n_group": (False,),
    "topk_group": (False,),
    "position_embedding_xdrope": (False,),
    "use_rotary_pos_emb": (True,),
}
HARMLESS_IN: dict[str, frozenset[str]] = {
    "jina_bert": DROPOUT | {"gradient_checkpointing", "attn_implementation", "emb_pooler", "model_max_length"},
    "dots1": ROUTING | {"use_sliding_window"},
    "ernie4_5_moe": ROUTING | {"moe_norm_min", "moe_capacity", "num_nextn_predict_layers"},
    "hunyuan_v1_dense": _HUNYUAN_HARMLESS,
    "hunyuan_v1_moe": ROUTING | _HUNYUAN_HARMLESS | {"moe_drop_tokens", "moe_random_routing_dropped_token"},
    "bailing_moe": ROUTING | _UNUSED,
    "bailing_moe_v2": ROUTING | _UNUSED | {"router_dtype", "mtp_loss_scaling_factor"},
    "cohere2_moe": ROUTING | {"cache_implementation", "_sliding_window_pattern", "layer_switch"},
    "laguna": ROUTING | {"gating_types"},
}
_GPT_HARMLESS = frozenset(
    (
        "attn_pdrop", "embd_pdrop", "resid_pdrop", "summary_activation", "summary_first_dropout", "summary_type",
        "summary_proj_to_labels", "summary_use_proj", "reorder_and_upcast_attn", "attention_softmax_in_fp32",
        "scale_attention_softmax_in_fp32", "inference_runner", "max_batch_size", "max_sequence_length",
        "pre_allocate_kv_cache", "validate_runner_input", "gradient_checkpointing", "predict_special_tokens",
    )
)  # fmt: skip
HARMLESS_IN |= {
    "exaone": frozenset(("embed_dropout", "attention_dropout")),
    "internlm2": frozenset(("attn_implementation",)),
    "minicpm": frozenset(("mup_denominator",)),  # of training
    "stablelm": frozenset(("rope_pct", "norm_eps")),
    "phi": frozenset(("embd_pdrop", "resid_pdrop")),
    "gpt_neox": frozenset(("classifier_dropout",)),
    "gpt2": _GPT_HARMLESS,
    "gpt_bigcode": _GPT_HARMLESS | {"num_key_value_heads"},
    "falcon": frozenset(("ff_factor",)),  # ffn_hidden_size counts, and the shapes
    **dict.fromkeys(("olmo", "glm", "arcee", "nemotron"), frozenset()),
    "eurobert": frozenset(("classifier_pooling", "clf_pooling", "num_labels"))
    | {"bos_token", "eos_token", "pad_token", "mask_token"},
}
ONLY_IN: dict[str, dict[str, tuple[Any, ...]]] = {
    "jina_bert": {"position_embedding_type": ("alibi",)},
    "ernie4_5_moe": {"moe_use_aux_free": (True,), "moe_gate": ("topk",)},
    "dots1": {"scoring_func": ("noaux_tc", "sigmoid"), "topk_method": ("noaux_tc",), "moe_layer_freq": (1,)},
    "hunyuan_v1_dense": _HUNYUAN_ONLY,
    "hunyuan_v1_moe": _HUNYUAN_ONLY
    | {"use_mixed_mlp_moe": (True,), "moe_layer_num_skipped": (0,), "norm_topk_prob": (True,)}
    | {"routed_scaling_factor": (False, 1), "group_limited_greedy": (False,)},
    "bailing_moe": _BAILING_ONLY,
    "bailing_moe_v2": _BAILING_ONLY
    | {"use_qk_norm": (True,), "score_function": ("sigmoid",), "moe_router_enable_expert_bias": (True,)},
    "cohere2_moe": {"shared_expert_combination_strategy": ("average",)},
    "laguna": {"moe_apply_router_weight_on_input": (False,), "moe_router_logit_softcapping": (0,)}
    | {"norm_topk_prob": (True,), "decoder_sparse_step": (1,), "moe_router_use_sigmoid": (True,)}
    | {"swa_attention_sink_enabled": (False,), "qk_norm_type": ("rmsnorm",)},
}
ONLY_IN |= {
    "gpt2": {"scale_attn_by_inverse_layer_idx": (False,)},
    "gpt_bigcode": {"scale_attn_by_inverse_layer_idx": (False,)},
    "falcon": {"apply_residual_connection_post_layernorm": (False,)},
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "jina_bert": ROBERTA_DEFAULTS | {"feed_forward_type": "original", "pad_token_id": 0},
    "dots1": {"num_key_value_heads": 32, "max_position_embeddings": 2048, "max_window_layers": 62}
    | {"moe_intermediate_size": 1408, "sliding_window": 4096},
    "ernie4_5_moe": {"num_key_value_heads": 4, "rms_norm_eps": 1e-5, "rope_theta": 500000.0}
    | {"max_position_embeddings": 131072, "tie_word_embeddings": True, "moe_num_experts": 64, "moe_k": 6}
    | {"moe_num_shared_experts": 2, "moe_layer_start_index": 1, "moe_intermediate_size": 1536},
    "hunyuan_v1_dense": {"rms_norm_eps": 1e-5, "max_position_embeddings": 2048},
    "hunyuan_v1_moe": {"rms_norm_eps": 1e-5, "max_position_embeddings": 2048, "num_experts": 1, "moe_topk": 1},
    "bailing_moe": _BAILING_DEFAULTS,
    "bailing_moe_v2": _BAILING_DEFAULTS,
    "cohere2_moe": {"layer_norm_eps": 1e-5, "logit_scale": 0.0625, "tie_word_embeddings": True, "head_dim": 128}
    | {"max_position_embeddings": 8192, "sliding_window": 4096, "num_experts": 8, "num_experts_per_tok": 2},
    "laguna": {"num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 131072, "sliding_window": 512}
    | {"moe_intermediate_size": 512, "shared_expert_intermediate_size": 512, "num_experts": 256}
    | {"num_experts_per_tok": 8},
}
DEFAULTS |= {
    "exaone": {"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 500000.0}
    | {"max_position_embeddings": 4096},
    "internlm2": {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048},
    "minicpm": {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "scale_emb": 1, "scale_depth": 1}
    | {"dim_model_base": 1},
    "stablelm": {"num_key_value_heads": 32, "layer_norm_eps": 1e-5, "max_position_embeddings": 4096},
    "phi": {"layer_norm_eps": 1e-5, "max_position_embeddings": 2048},
    "gpt_neox": {"layer_norm_eps": 1e-5, "max_position_embeddings": 2048, "hidden_act": "gelu"},
    "gpt2": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "layer_norm_eps": 1e-5}
    | {"max_position_embeddings": 1024, "tie_word_embeddings": True},
    "gpt_bigcode": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "layer_norm_eps": 1e-5}
    | {"max_position_embeddings": 1024, "tie_word_embeddings": True},
    "falcon": {"layer_norm_epsilon": 1e-5, "max_position_embeddings": 2048, "tie_word_embeddings": True},
    "olmo": {"max_position_embeddings": 2048},
    "glm": {"num_key_value_heads": 2, "head_dim": 128, "rms_norm_eps": 1.5625e-7, "attention_bias": True}
    | {"max_position_embeddings": 131072},
    "arcee": {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "hidden_act": "relu2"},
    "nemotron": {"norm_eps": 1e-5, "max_position_embeddings": 4096, "hidden_act": "relu2"},
    "eurobert": {"rms_norm_eps": 1e-5, "max_position_embeddings": 8192},
}
NOTED_IN = {
    "minicpm": {"sparse_config": "chooses parts of long texts to attend to; all of a text is attended to here"},
}
"""Keys of one kind that change what is computed, which the user is told."""
ALIASES: dict[str, dict[str, str]] = {
    "exaone": {
        "num_layers": "num_hidden_layers",
        "layer_norm_epsilon": "rms_norm_eps",
        "activation_function": "hidden_act",
    },
    "gpt_neox": {"rotary_pct": "partial_rotary_factor", "rotary_emb_base": "rope_theta"},
    "gpt2": _GPT2_NAMES,
    "gpt_bigcode": _GPT2_NAMES,
    "falcon": {
        "num_kv_heads": "num_key_value_heads",
        "ffn_hidden_size": "intermediate_size",
        "activation": "hidden_act",
        "n_head": "num_attention_heads",
        "n_layer": "num_hidden_layers",
        "n_head_kv": "num_key_value_heads",
    },
}

# models that write by denoising
USED |= {
    "llada": DECODER
    | {"d_model", "n_layers", "n_heads", "n_kv_heads", "mlp_hidden_size", "max_sequence_length", "activation_type"}
    | {"weight_tying"},
    "llada_moe": DECODER
    | EXPERTS
    | {"expert_intermediate_size", "dense_intermediate_size", "norm_topk_prob", "qk_layernorm", "moe_layer_freq"},
    "Dream": DECODER,
}
HARMLESS_IN |= {
    "llada": frozenset(("alibi_bias_max", "attention_layer_norm_with_affine", "block_group_size", "embedding_dropout"))
    | {"flash_attention", "init_cutoff_factor", "init_device", "init_fn", "init_std", "mlp_ratio", "precision"}
    | {"residual_dropout", "rope_full_precision", "embedding_size"},
    "llada_moe": ROUTING | {"intermediate_size", "moe_router_enable_expert_bias", "router_topk_group"},
    "Dream": frozenset(("attention_bias", "sliding_window", "max_window_layers")),  # its code has no windows
}
ONLY_IN |= {
    "llada": {"alibi": (False,), "attention_layer_norm": (False,), "bias_for_layer_norm": (False,)}
    | {"block_type": ("llama",), "include_bias": (False,), "include_qkv_bias": (False,), "input_emb_norm": (False,)}
    | {"layer_norm_type": ("rms",), "layer_norm_with_affine": (True,), "multi_query_attention": (False,)}
    | {"rope": (True,), "scale_logits": (False,)},
    "llada_moe": {"moe_router_score_function": ("softmax",), "moe_router_enable_expert_bias": (False,)}
    | {"shared_expert_intermediate_size": (0,), "router_num_group": (1,), "routed_scaling_factor": (1,)},
    "Dream": {"use_sliding_window": (False,)},
}
DEFAULTS |= {
    "llada": {"rms_norm_eps": 1e-5, "max_position_embeddings": 1024, "hidden_act": None},
    "llada_moe": {"rms_norm_eps": 1e-5, "max_position_embeddings": 8192, "num_experts_per_tok": 8},
    "Dream": {"num_key_value_heads": 32, "max_position_embeddings": 32768, "rope_theta": 10000.0}
    | {"mask_token_id": 151666},
}
ALIASES |= {
    "llada": {
        "d_model": "hidden_size",
        "n_layers": "num_hidden_layers",
        "n_heads": "num_attention_heads",
        "n_kv_heads": "num_key_value_heads",
        "mlp_hidden_size": "intermediate_size",
        "max_sequence_length": "max_position_embeddings",
        "weight_tying": "tie_word_embeddings",
    }
}
