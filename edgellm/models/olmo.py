"""OLMo 1: llama whose norms are LayerNorms without a weight."""

from __future__ import annotations

from edgellm.formats.model_file import ModelFile
from edgellm.kernels.program import Program
from edgellm.models.parts.blocks import build_decoder
from edgellm.models.parts.checkpoint_config import CheckpointConfig
from edgellm.models.parts.checkpoint_form import (
    CheckpointForm,
    TypedMetadata,
    decoder_metadata,
    refuse_activation,
    refuse_windows,
)

EPS = 1e-5


def build(gguf: ModelFile) -> Program:
    """See ``build_decoder``."""
    return build_decoder(gguf, adjacent=True, layer_norms=True, bare_norms=True)


def checkpoint_metadata(config: CheckpointConfig) -> TypedMetadata:
    """The keys of this architecture, from config.json."""
    refuse_activation(config, "silu", "swish")
    refuse_windows(config)
    if config.get("clip_qkv") is not None:
        raise config.refuse("clip_qkv", "models of this architecture without it (null)")
    found = decoder_metadata(config, "olmo")
    del found["olmo.attention.layer_norm_rms_epsilon"]
    found["olmo.attention.layer_norm_epsilon"] = (EPS, "FLOAT32")
    return found


CHECKPOINT = CheckpointForm(
    classes={"OlmoForCausalLM": "olmo", "OlmoModel": "olmo"}, metadata=checkpoint_metadata, pairs_heads=True
)
