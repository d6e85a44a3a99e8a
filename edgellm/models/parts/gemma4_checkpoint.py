"""How checkpoints keep Gemma 4: the names of its tensors, and its settings as GGUF keys."""

from __future__ import annotations

from typing import Any

import numpy as np

from edgellm.models.parts.checkpoint_config import CheckpointConfig
from edgellm.models.parts.checkpoint_form import (
    DECODER,
    GEMMA_LAYER,
    QK_NORMS,
    CheckpointForm,
    TypedMetadata,
    decoder_metadata,
    layer_kinds,
    refuse_activation,
)
from edgellm.models.parts.checkpoint_rope import Rotation, rotations_by_layer

KINDS = ("default", "proportional")
"""How layers that see everything may rotate."""
STANDS_STILL = 1e30
"""What the frequencies of dimensions that do not turn are divided by, as llama.cpp's converter writes it."""


def checkpoint_metadata(config: CheckpointConfig) -> TypedMetadata:
    """The keys of this architecture, from config.json."""
    refuse_activation(config, "gelu_pytorch_tanh")
    if config.get("use_bidirectional_attention") not in (None, False, "vision"):
        raise config.refuse("use_bidirectional_attention", "models whose text sees what is before it")
    if _count(config, "hidden_size_per_layer_input") and config.get("vocab_size") is not None:
        n_vocab = config.integer("vocab_size")
        if config.integer("vocab_size_per_layer_input") != n_vocab:
            raise config.refuse("vocab_size_per_layer_input", f"models with {n_vocab:,} of them, as of vocab_size")
    slides = _slides(config)
    n_shared, n_ff = _count(config, "num_kv_shared_layers"), config.integer("intermediate_size")
    wide, near = rotations_by_layer(config, KINDS)
    if near.kind != "default":
        raise config.refuse(f"{near.key}.rope_type", "sliding layers whose rotation is not scaled", near.kind)
    head_dim, n_head_kv = _wide_heads(config, slides)
    found = decoder_metadata(config, "gemma4", lambda _: Rotation(config, wide.key, "default", wide.base, {}))
    sizes: TypedMetadata = {
        "attention.key_length": (head_dim, "UINT32"),
        "attention.value_length": (head_dim, "UINT32"),
        "attention.key_length_swa": (config.head_dim, "UINT32"),
        "attention.value_length_swa": (config.head_dim, "UINT32"),
        "attention.sliding_window": (config.integer("sliding_window"), "UINT32"),
        "attention.sliding_window_pattern": (np.array(slides), "ARRAY[BOOL]"),
        "attention.shared_kv_layers": (n_shared, "UINT32"),
        "embedding_length_per_layer_input": (_count(config, "hidden_size_per_layer_input"), "UINT32"),
        "rope.dimension_count": (head_dim, "UINT32"),
        "rope.dimension_count_swa": (config.head_dim, "UINT32"),
        "rope.freq_base_swa": (near.base, "FLOAT32"),
    }
    n_near = config.integer("num_key_value_heads")
    if n_head_kv != n_near:
        each = [n_near if slide else n_head_kv for slide in slides]
        sizes["attention.head_count_kv"] = (np.array(each, np.int32), "ARRAY[INT32]")
    if config.flag("use_double_wide_mlp", False):
        each = [n_ff * (1 + (i >= config.n_layer - n_shared)) for i in range(config.n_layer)]
        sizes["feed_forward_length"] = (np.array(each, np.int32), "ARRAY[INT32]")
    if config.flag("enable_moe_block", False):
        sizes["expert_count"] = (config.integer("num_experts"), "UINT32")
        sizes["expert_used_count"] = (config.integer("top_k_experts"), "UINT32")
        sizes["expert_feed_forward_length"] = (config.integer("moe_intermediate_size"), "UINT32")
    for key in ("num_experts", "top_k_experts", "moe_intermediate_size", "num_global_key_value_heads"):
        config.integer(key, 1)  # whole numbers, where they have no effect as well
    cap = config.real("final_logit_softcapping", 0.0)
    if cap < 0 or config.get("final_logit_softcapping") == 0:
        raise config.wrong("final_logit_softcapping", cap, "a number above 0")
    sizes["final_logit_softcapping"] = (cap, "FLOAT32")  # 0, too: without the key llama.cpp takes 30
    return found | {f"gemma4.{key}": value for key, value in sizes.items()}


def _slides(config: CheckpointConfig) -> list[bool]:
    """Which layers slide; the last one never does in transformers, whatever the settings say."""
    return [*layer_kinds(config, lambda i: (i + 1) % 6 != 0)[:-1], False]


def _count(config: CheckpointConfig, key: str) -> int:
    """A whole number that may be 0."""
    return 0 if not config.get(key) else config.integer(key)


def _wide_heads(config: CheckpointConfig, slides: list[bool]) -> tuple[int, int]:
    """Size and number of key heads of layers that see everything, from either spelling of the settings."""
    n_head_kv = config.integer("num_key_value_heads")
    each = config.get("per_layer_config")
    if each is None:
        alike = not config.flag("attention_k_eq_v", False)
        n_wide = n_head_kv if alike else config.integer("num_global_key_value_heads", n_head_kv)
        return config.integer("global_head_dim", 512), n_wide
    wide = [str(i) for i, slide in enumerate(slides) if not slide]
    found: list[dict[str, Any]] = [config.object_of("per_layer_config", each)]
    found = [config.object_of(f"per_layer_config.{i}", found[0].get(i)) for i in wide]
    known = {"head_dim", "num_key_value_heads"}
    if set(each) - set(wide) or any(one != found[0] or set(one) - known for one in found):
        raise config.refuse("per_layer_config", "layers that slide as the settings say, and others that are alike")
    head_dim = found[0].get("head_dim", config.head_dim)
    n_wide = found[0].get("num_key_value_heads", n_head_kv)
    return (
        config.integer_of("per_layer_config.head_dim", head_dim),
        config.integer_of("per_layer_config.num_key_value_heads", n_wide),
    )


def wide_factors(config: CheckpointConfig) -> dict[str, np.ndarray]:
    """The divisors of layers that see everything: 1 for the part of a head that turns."""
    wide, _ = rotations_by_layer(config, KINDS)
    head_dim, _ = _wide_heads(config, _slides(config))
    part, factor = 1.0, 1.0
    if wide.kind == "proportional":
        part, factor = wide.real("partial_rotary_factor", 1.0), wide.positive("factor", 1.0)
    turning = int(part * head_dim // 2)
    if not 0 <= turning <= head_dim // 2:
        raise config.wrong(f"{wide.key}.partial_rotary_factor", part, "a number from 0 to 1")
    factors = np.full(head_dim // 2, STANDS_STILL, np.float32)
    factors[:turning] = factor
    return {"rope_freqs.weight": factors}


GEMMA4_LAYER = (
    GEMMA_LAYER
    | QK_NORMS
    | {
        "per_layer_input_gate": "inp_gate",
        "per_layer_projection": "proj",
        "post_per_layer_input_norm": "post_norm",
        "router.proj": "ffn_gate_inp",
        "post_feedforward_layernorm_1": "post_ffw_norm_1",
        "pre_feedforward_layernorm_2": "pre_ffw_norm_2",
        "post_feedforward_layernorm_2": "post_ffw_norm_2",
    }
)

GEMMA4_FORM = CheckpointForm(
    classes={
        "Gemma4ForCausalLM": "gemma4_text",
        "Gemma4ForConditionalGeneration": "gemma4",
        "Gemma4UnifiedForCausalLM": "gemma4_unified_text",
        "Gemma4UnifiedForConditionalGeneration": "gemma4_unified",
    },
    metadata=checkpoint_metadata,
    layer=GEMMA4_LAYER,
    around=DECODER
    | {
        "model.embed_tokens_per_layer": "per_layer_token_embd",
        "model.per_layer_model_projection": "per_layer_model_proj",
        "model.per_layer_projection_norm": "per_layer_proj_norm",
    },
    bare={
        "layer_scalar": ("layer_output_scale.weight",),
        "router.scale": ("ffn_gate_inp.scale",),
        "router.per_expert_scale": ("ffn_down_exps.scale",),
    },
    stacked={"experts.gate_up_proj": ("ffn_gate_up_exps",), "experts.down_proj": ("ffn_down_exps",)},
    extra=wide_factors,
    extra_is_usual=True,
    space_prefix=False,
)
