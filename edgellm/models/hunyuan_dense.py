"""Hunyuan (dense): llama whose heads of q and k are normed behind their rotation.

A factor of the rotation, ``alpha``, is part of the base that files have.
"""

from __future__ import annotations

from dataclasses import replace

from edgellm.formats.model_file import ModelFile
from edgellm.kernels.program import Program
from edgellm.models.parts.blocks import build_decoder
from edgellm.models.parts.checkpoint_config import CheckpointConfig
from edgellm.models.parts.checkpoint_form import (
    DECODER_LAYER,
    CheckpointForm,
    TypedMetadata,
    decoder_metadata,
    factors_of,
    refuse_activation,
    refuse_windows,
)
from edgellm.models.parts.checkpoint_rope import KINDS, Rotation, rotation

LENGTH = 256 * 1024  # of the context that alpha stands for; config.json says less


def build(gguf: ModelFile) -> Program:
    """See ``build_decoder``."""
    return build_decoder(gguf, adjacent=False, qk_norms="turned heads")


def hunyuan_metadata(config: CheckpointConfig, architecture: str) -> TypedMetadata:
    """The keys of the family, from config.json."""
    refuse_activation(config, "silu", "swish")
    refuse_windows(config)
    if config.get("attention_head_dim") not in (None, config.head_dim):
        raise config.refuse("attention_head_dim", f"{config.head_dim}, the width of a head")
    found = decoder_metadata(config, architecture, rotation_with_alpha)
    if _rotation(config).kind == "dynamic":
        found[f"{architecture}.rope.scaling.type"] = ("none", "STRING")
        found[f"{architecture}.rope.scaling.factor"] = (1.0, "FLOAT32")
        for key in ("rope.scaling.original_context_length", "context_length"):
            found[f"{architecture}.{key}"] = (LENGTH, "UINT32")
    return found


def _rotation(config: CheckpointConfig) -> Rotation:
    return rotation(config, (*KINDS, "dynamic"), ("alpha",))


def rotation_with_alpha(config: CheckpointConfig) -> Rotation:
    """Of the kind "dynamic" as these models have it: the base is larger once and for all."""
    rope = _rotation(config)
    if rope.kind != "dynamic":
        return rope
    if rope.numbers.get("alpha") is None:
        raise config.refuse(f"{rope.key}.alpha", "dynamic rotations that have it", rope.numbers)
    dim = config.head_dim
    return replace(rope, base=rope.base * rope.positive("alpha") ** (dim / (dim - 2)))


HUNYUAN_LAYER = DECODER_LAYER | {
    "self_attn.query_layernorm": "attn_q_norm",
    "self_attn.key_layernorm": "attn_k_norm",
}
CHECKPOINT = CheckpointForm(
    classes={"HunYuanDenseV1ForCausalLM": "hunyuan_v1_dense", "HunYuanDenseV1Model": "hunyuan_v1_dense"},
    metadata=lambda config: hunyuan_metadata(config, "hunyuan-dense"),
    layer=HUNYUAN_LAYER,
    extra=factors_of(rotation_with_alpha),
)
