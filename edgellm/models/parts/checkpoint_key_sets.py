"""Keys of config.json that many kinds of model have, for the rows of ``checkpoint_keys`` and ``long_tail_keys``."""

from __future__ import annotations

DECODER = frozenset(
    (
        "architectures", "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
        "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act", "hidden_activation", "rms_norm_eps",
        "max_position_embeddings", "original_max_position_embeddings", "rope_parameters", "rope_scaling", "rope_theta",
        "layer_types", "tie_word_embeddings", "quantization_config", "compression_config",
        "quantization", "bos_token_id", "eos_token_id", "unk_token_id", "sep_token_id", "pad_token_id", "cls_token_id",
        "mask_token_id",
    )
)  # fmt: skip
EXPERTS = frozenset(("num_experts", "num_local_experts", "num_experts_per_tok"))
ENCODER = DECODER - {"rms_norm_eps", "num_key_value_heads"} | {"id2label", "is_decoder"}
ROUTING = frozenset(("output_router_logits", "router_aux_loss_coef"))  # of experts, for training
DROPOUT = frozenset(("attention_probs_dropout_prob", "classifier_dropout", "hidden_dropout_prob"))
BERT_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
    "tie_word_embeddings": True,
}
ROBERTA_DEFAULTS = BERT_DEFAULTS | {"pad_token_id": 1}
