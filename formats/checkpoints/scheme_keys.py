"""Every key of a ``quantization_config``: what is in none of these rows is refused by name.

USED      read by a scheme's file
HARMLESS  how the weights were found, which modules have them (the tensors tell that themselves), how activations
          and keys and values would be rounded
ONLY      would change what the weights mean, unless it is null or one of these values
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from edgellm.formats.errors import UnsupportedError
from edgellm.formats.findings import short

USED = frozenset(
    (
        "quant_method", "bits", "w_bit", "group_size", "checkpoint_format", "version", "weight_block_size",
        "load_in_4bit", "load_in_8bit", "_load_in_4bit", "_load_in_8bit", "config_groups", "format", "mode",
        "quant_algo", "quant_config", "sparsity_config",
    )
)  # fmt: skip
HARMLESS = frozenset(
    (
        "_is_quantized_training_enabled", "act_group_aware", "activation_scale_ub", "activation_scheme", "awq_config",
        "backend", "batch_size", "block_name_to_quantize", "bnb_4bit_compute_dtype", "bnb_4bit_quant_storage",
        "bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "cache_block_outputs", "cache_examples_on_gpu",
        "damp_auto_increment", "damp_percent", "dataset", "desc_act", "device_map", "do_fuse", "dynamic",
        "dynamic_config", "exllama_config", "expert_dtype", "failsafe", "fmt", "fuse_max_seq_len",
        "global_compression_ratio", "hyb_act", "ignore", "ignored_layers", "kv_cache_quant_algo", "kv_cache_scheme",
        "llm_int8_enable_fp32_cpu_offload", "llm_int8_has_fp16_weight", "llm_int8_skip_modules", "llm_int8_threshold",
        "lm_head", "max_input_length", "meta", "model_file_base_name", "model_name_or_path", "model_seqlen",
        "module_name_preceding_first_block", "modules_in_block_to_quantize", "modules_to_convert",
        "modules_to_fuse", "modules_to_not_convert", "mse", "offload_meta", "pack_dtype", "pad_token_id",
        "parallel_packing", "producer", "q_group_size",
        "quant_library", "quantization_status", "quantizer", "scale_fmt", "skip_modules",
        "static_groups", "sym", "tokenizer", "true_sequential", "use_cuda_fp16", "use_exllama", "zero_point",
    )
)  # fmt: skip
ONLY: dict[str, tuple[Any, ...]] = {
    "adapter": ({},),
    "dequantize": (False,),
    "is_marlin_format": (False,),
    "rotation": (),
    "transform_config": ({},),
}


def check_scheme_keys(folder: str, config: Mapping[str, Any], modules: Iterable[str]) -> None:
    """UnsupportedError ``CHECKPOINT_SCHEME`` for a setting that edgellm does not know; ``modules`` have their own."""
    known = USED | HARMLESS | set(modules)
    for key, value in config.items():
        if value is None or key in known or value in ONLY.get(key, ()):
            continue
        raise UnsupportedError(
            f"{folder}: quantization_config has {short(key)} = {short(value)}, and the weights may depend on it; "
            "edgellm decodes checkpoints without it. Take another one of the model, or one that is not quantized.",
            code="CHECKPOINT_SCHEME",
        )
