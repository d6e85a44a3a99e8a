"""GLM 4 (0414) and the text of GLM-OCR: norms before and behind each block, half of a head is rotated.

One matrix has the rows of gate and up. Rotated pairs are neighbours; in files of models that also see, whose rotation
has sections, they are half the rotated part apart.
"""

from __future__ import annotations

import numpy as np

from edgellm.formats.model_file import ModelFile
from edgellm.kernels.program import Program
from edgellm.models.parts.blocks import AROUND, build_decoder
from edgellm.models.parts.checkpoint_config import CheckpointConfig
from edgellm.models.parts.checkpoint_form import (
    DECODER_LAYER,
    QKV,
    CheckpointForm,
    TypedMetadata,
    decoder_metadata,
    refuse_activation,
    refuse_windows,
)
from edgellm.models.parts.checkpoint_rope import Rotation, rope_sections, rotated_dims, rotation
from edgellm.models.parts.hparams import integers, key_of

SECTIONS = "rope.dimension_sections"


def build(gguf: ModelFile) -> Program:
    """x += norm(attention);  x += norm(ffn): see ``build_decoder``."""
    n_sections = len(np.atleast_1d(gguf.metadata.get(key_of(gguf, SECTIONS), 0)))
    sections = integers(gguf, SECTIONS, n_sections, 0)
    return build_decoder(gguf, adjacent=not any(sections), norms=AROUND)


def checkpoint_metadata(config: CheckpointConfig) -> TypedMetadata:
    """The keys of this architecture, from config.json."""
    refuse_activation(config, "silu", "swish")
    refuse_windows(config)
    found = decoder_metadata(config, "glm4", _rotation)
    found["glm4.rope.dimension_count"] = (_rotated(config), "UINT32")
    if _sees(config):
        found[f"glm4.{SECTIONS}"] = (rope_sections(config, (8, 12, 12)), "ARRAY[INT32]")
    return found


def _sees(config: CheckpointConfig) -> bool:
    return config.model_type == "glm_ocr_text"


def _rotation(config: CheckpointConfig) -> Rotation:
    own = ("partial_rotary_factor", "mrope_section") if _sees(config) else ("partial_rotary_factor",)
    return rotation(config, ("default", "linear", "yarn"), own)


def _rotated(config: CheckpointConfig) -> int:
    return rotated_dims(config, 1.0 if _sees(config) else 0.5)


def halved_pairs(config: CheckpointConfig) -> dict[str, np.ndarray]:
    """Rows of q and k where rotated pairs are neighbours in the checkpoint, and half the rotated part apart in GGUF."""
    if not _sees(config):
        return {}
    n_rot, head = _rotated(config), config.head_dim
    order = np.concatenate([np.arange(0, n_rot, 2), np.arange(1, n_rot, 2), np.arange(n_rot, head)])
    n_head = config.integer("num_attention_heads")
    heads = {"attn_q": n_head, "attn_k": config.integer("num_key_value_heads", n_head)}
    return {
        f"{name}.{kind}": (np.arange(n)[:, None] * head + order).reshape(-1)
        for name, n in heads.items()
        for kind in ("weight", "bias")
    }


CHECKPOINT = CheckpointForm(
    classes={"Glm4ForCausalLM": "glm4", "Glm4Model": "glm4", "GlmOcrForConditionalGeneration": "glm_ocr"},
    metadata=checkpoint_metadata,
    biases=lambda config: QKV if config.flag("attention_bias", not _sees(config)) else frozenset(),
    layer=DECODER_LAYER
    | {
        "post_self_attn_layernorm": "post_attention_norm",
        "post_attention_layernorm": "ffn_norm",
        "post_mlp_layernorm": "post_ffw_norm",
        "mlp.gate_up_proj": "ffn_up",
    },
    row_orders=halved_pairs,
    extra=lambda _: {},
)
