"""InternLM 2 and 2.5: llama whose checkpoints have q, k and v as one matrix, in groups that share keys."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from edgellm.formats.model_file import ModelFile
from edgellm.kernels.program import Program
from edgellm.models.parts.blocks import build_decoder
from edgellm.models.parts.checkpoint_config import CheckpointConfig
from edgellm.models.parts.checkpoint_form import (
    QKV,
    CheckpointForm,
    TypedMetadata,
    decoder_metadata,
    refuse_activation,
)
from edgellm.models.parts.checkpoint_rope import Rotation, rotation
from edgellm.models.parts.joined_heads import paired, rows_of_qkv


def build(gguf: ModelFile) -> Program:
    """See ``build_decoder``."""
    return build_decoder(gguf, adjacent=True)


def checkpoint_metadata(config: CheckpointConfig) -> TypedMetadata:
    """The keys of this architecture, from config.json."""
    refuse_activation(config, "silu", "swish")
    return decoder_metadata(config, "internlm2", _rotation)


def _rotation(config: CheckpointConfig) -> Rotation:
    """One of the kind "dynamic" is another in contexts alone that are longer than the model's own."""
    rope = rotation(config, ("default", "linear", "dynamic"))
    return replace(rope, kind="default") if rope.kind == "dynamic" else rope


def _pieces(config: CheckpointConfig) -> dict[str, dict[str, np.ndarray]]:
    q, k, v = rows_of_qkv(config, by_group=True)
    return {"attention.wqkv": {"attn_q": paired(config, q), "attn_k": paired(config, k), "attn_v": v}}


CHECKPOINT = CheckpointForm(
    classes={"InternLM2ForCausalLM": "internlm2"},
    metadata=checkpoint_metadata,
    biases=lambda config: QKV | {"attn_output"} if config.flag("bias", False) else frozenset(),
    layer={
        "attention_norm": "attn_norm",
        "attention.wo": "attn_output",
        "ffn_norm": "ffn_norm",
        "feed_forward.w1": "ffn_gate",
        "feed_forward.w3": "ffn_up",
        "feed_forward.w2": "ffn_down",
    },
    around={"model.tok_embeddings": "token_embd", "model.norm": "output_norm", "output": "output"},
    pieces=_pieces,
    extra=lambda _: {},
)
