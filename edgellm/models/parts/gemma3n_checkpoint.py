"""How checkpoints keep Gemma 3n: the names of its tensors, and its settings as GGUF keys."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np

from edgellm.models.parts.checkpoint_config import CheckpointConfig
from edgellm.models.parts.checkpoint_form import (
    DECODER,
    GEMMA_LAYER,
    QK_NORMS,
    CheckpointForm,
    TypedMetadata,
    count_of,
    decoder_metadata,
    layer_kinds,
    refuse_activation,
)
from edgellm.models.parts.checkpoint_rope import frequency_factors, rotations_by_layer


def checkpoint_metadata(config: CheckpointConfig) -> TypedMetadata:
    """The keys of this architecture, from config.json."""
    refuse_activation(config, "gelu_pytorch_tanh")
    wide, near = rotations_by_layer(config)
    if near.kind != "default":
        raise config.refuse(f"{near.key}.rope_type", "sliding layers whose rotation is not scaled", near.kind)
    widths = _widths(config)
    found = decoder_metadata(config, "gemma3n", lambda _: wide, n_ff=max(widths))
    if "gemma3n.rope.scaling.attn_factor" in found:
        raise config.refuse(f"{wide.key}.attention_factor", "yarn without it", wide.numbers)
    cap = config.real("final_logit_softcapping", 0.0)
    if cap < 0 or config.get("final_logit_softcapping") == 0:
        raise config.wrong("final_logit_softcapping", cap, "a number above 0")
    slides = layer_kinds(config, lambda i: (i + 1) % 5 != 0)
    sizes: TypedMetadata = {
        "attention.sliding_window": (config.integer("sliding_window"), "UINT32"),
        "attention.sliding_window_pattern": (np.array(slides), "ARRAY[BOOL]"),
        "attention.shared_kv_layers": (count_of(config, "num_kv_shared_layers"), "UINT32"),
        "altup.active_idx": (count_of(config, "altup_active_idx"), "UINT32"),
        "altup.num_inputs": (config.integer("altup_num_inputs"), "UINT32"),
        "embedding_length_per_layer_input": (config.integer("hidden_size_per_layer_input"), "UINT32"),
        "activation_sparsity_scale": (np.array(_deviations(config), np.float32), "ARRAY[FLOAT32]"),
        "rope.freq_base_swa": (near.base, "FLOAT32"),
        "final_logit_softcapping": (cap, "FLOAT32"),  # 0, too: without the key it is 30
    }
    if isinstance(config.get("intermediate_size"), list):
        sizes["feed_forward_length"] = (np.array(widths, np.int32), "ARRAY[INT32]")
    return found | {f"gemma3n.{key}": value for key, value in sizes.items()}


def _widths(config: CheckpointConfig) -> list[int]:
    """Of the feed-forward of each layer."""
    widths = config.get("intermediate_size")
    if not isinstance(widths, list):
        return [config.integer("intermediate_size")] * config.n_layer
    if len(widths) != config.n_layer:
        raise config.wrong("intermediate_size", widths, f"one number, or one for each of {config.n_layer} layers")
    return [config.integer_of("intermediate_size", width) for width in widths]


def _deviations(config: CheckpointConfig) -> list[float]:
    """How far above the mean activations of each layer are cut off, -infinity for one where none is."""
    key = "activation_sparsity_pattern"
    shares = config.get(key)
    if shares is None:
        n = 10 if config.n_layer > 10 else 0
        shares = [0.95] * n + [0.0] * (config.n_layer - n)
    if not isinstance(shares, list) or len(shares) != config.n_layer:
        raise config.wrong(key, shares, f"one number for each of {config.n_layer} layers")
    found = [float(np.float32(config.real_of(key, share))) for share in shares]
    if not all(0 <= share < 1 for share in found):
        raise config.wrong(key, shares, "numbers from 0 to less than 1")
    return [NormalDist().inv_cdf(share) if share > 0 else -math.inf for share in found]


def wide_factors(config: CheckpointConfig) -> dict[str, np.ndarray]:
    """The divisors of the layers that see everything; sliding layers have none."""
    return frequency_factors(rotations_by_layer(config)[0])


def all_tokens(config: CheckpointConfig) -> dict[str, int]:
    """The second table has no rows for tokens of pictures and sounds: they are 0, as llama.cpp's converter has it."""
    config.integer("vocab_size_per_layer_input")
    return {"per_layer_token_embd.weight": config.integer("vocab_size")}


GEMMA3N_LAYER = (
    GEMMA_LAYER
    | QK_NORMS
    | {
        "altup.correction_coefs": "altup_correct_coef",
        "altup.prediction_coefs": "altup_predict_coef",
        "altup.modality_router": "altup_router",
        "altup.router_norm": "altup_router_norm",
        "laurel.linear_left": "laurel_l",
        "laurel.linear_right": "laurel_r",
        "laurel.post_laurel_norm": "laurel_post_norm",
        "per_layer_input_gate": "inp_gate",
        "per_layer_projection": "proj",
        "post_per_layer_input_norm": "post_norm",
    }
)

GEMMA3N_FORM = CheckpointForm(
    classes={"Gemma3nForConditionalGeneration": "gemma3n", "Gemma3nForCausalLM": "gemma3n_text"},
    metadata=checkpoint_metadata,
    layer=GEMMA3N_LAYER,
    around=DECODER
    | {
        "model.embed_tokens_per_layer": "per_layer_token_embd",
        "model.per_layer_model_projection": "per_layer_model_proj",
        "model.per_layer_projection_norm": "per_layer_proj_norm",
    },
    numbered={"model.altup_projections": "altup_proj", "model.altup_unembed_projections": "altup_unembd_proj"},
    bare={"altup.correct_output_scale": ("altup_correct_scale.weight",)},
    rows_of=all_tokens,
    extra=wide_factors,
    space_prefix=False,
)
