"""Granite 3 (dense): llama with four numbers that multiply embeddings, scores, what blocks add, and logits."""

from __future__ import annotations

from edgellm.formats.model_file import ModelFile
from edgellm.kernels.program import Program
from edgellm.models.parts.blocks import Scales, build_decoder
from edgellm.models.parts.checkpoint_config import CheckpointConfig
from edgellm.models.parts.checkpoint_form import (
    FEED_FORWARD,
    CheckpointForm,
    TypedMetadata,
    attention_biases,
    decoder_metadata,
    refuse_activation,
    refuse_windows,
)
from edgellm.models.parts.hparams import flag, hparam_error, real


def build(gguf: ModelFile) -> Program:
    """See ``build_decoder``."""
    return build_decoder(gguf, adjacent=True, rotates=rotates(gguf), scales=read_scales(gguf))


def read_scales(gguf: ModelFile) -> Scales:
    """The four numbers; the logits' is a divisor, and of the others 0 stands for none."""
    divisor = real(gguf, "logit_scale")
    if divisor == 0:
        raise hparam_error(gguf, "logit_scale", divisor, "a number above 0, which logits are divided by")
    embeddings, residual, scores = (
        real(gguf, key, 0.0) for key in ("embedding_scale", "residual_scale", "attention.scale")
    )
    return Scales(embeddings or 1.0, residual or 1.0, scores or None, 1 / divisor)


def rotates(gguf: ModelFile) -> bool:
    """Whether positions count: in this family ``rope.scaling.finetuned`` says it."""
    return flag(gguf, "rope.scaling.finetuned", True)


def granite_metadata(config: CheckpointConfig, architecture: str) -> TypedMetadata:
    """The keys of the family, from config.json."""
    refuse_activation(config, "silu", "swish")
    refuse_windows(config)
    scales = {
        "attention.scale": "attention_multiplier",
        "embedding_scale": "embedding_multiplier",
        "residual_scale": "residual_multiplier",
        "logit_scale": "logits_scaling",
    }
    found = decoder_metadata(config, architecture)
    found[f"{architecture}.vocab_size"] = (config.integer("vocab_size"), "UINT32")
    found[f"{architecture}.rope.dimension_count"] = (config.head_dim, "UINT32")
    for key, name in scales.items():
        number = config.real(name, 1.0)
        if number <= 0:
            raise config.wrong(name, number, "a number above 0")
        found[f"{architecture}.{key}"] = (number, "FLOAT32")
    return found


CHECKPOINT = CheckpointForm(
    classes={"GraniteForCausalLM": "granite", "GraniteModel": "granite"},
    metadata=lambda config: granite_metadata(config, "granite"),
    biases=lambda config: attention_biases(config) | (FEED_FORWARD if config.flag("mlp_bias", False) else frozenset()),
    pairs_heads=True,
)
