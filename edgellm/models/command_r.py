"""Command R: one LayerNorm for attention and feed-forward, which stand side by side; logits are scaled.

Rotated pairs are neighbours, in checkpoints too. In files of Command R+ each head of q and k is normed by a weight of
its own; its checkpoints are not converted.
"""

from __future__ import annotations

from edgellm.formats.model_file import ModelFile
from edgellm.kernels.program import Program
from edgellm.models.parts.blocks import BlockNorms, Scales, build_decoder
from edgellm.models.parts.checkpoint_config import CheckpointConfig
from edgellm.models.parts.checkpoint_form import (
    DECODER_LAYER,
    CheckpointForm,
    TypedMetadata,
    decoder_metadata,
    refuse_activation,
    refuse_windows,
    with_layer_norms,
)
from edgellm.models.parts.hparams import real

SIDE_BY_SIDE = BlockNorms(ffn="")
"""A feed-forward that reads what attention read."""
COHERE_LAYER = {name: there for name, there in DECODER_LAYER.items() if name != "post_attention_layernorm"}


def build(gguf: ModelFile) -> Program:
    """x += attention(h) + ffn(h), h = norm(x): see ``build_decoder``."""
    return build_decoder(
        gguf,
        adjacent=True,
        norms=SIDE_BY_SIDE,
        scales=logit_scale(gguf),
        layer_norms=True,
        qk_norms="unlike heads" if any(".attn_q_norm." in name for name in gguf.tensors) else "none",
    )


def logit_scale(gguf: ModelFile) -> Scales:
    """What logits are multiplied by."""
    return Scales(logits=real(gguf, "logit_scale", 0.0) or 1.0)


def cohere_metadata(config: CheckpointConfig, architecture: str) -> TypedMetadata:
    """The keys of the family, from config.json."""
    refuse_activation(config, "silu", "swish")
    scale = config.real("logit_scale")
    if scale <= 0:
        raise config.wrong("logit_scale", scale, "a number above 0")
    found = with_layer_norms(decoder_metadata(config, architecture, eps_key="layer_norm_eps"), architecture)
    found[f"{architecture}.logit_scale"] = (scale, "FLOAT32")
    found.setdefault(f"{architecture}.rope.scaling.type", ("none", "STRING"))
    return found


def checkpoint_metadata(config: CheckpointConfig) -> TypedMetadata:
    """The keys of this architecture, from config.json."""
    refuse_windows(config)
    if config.flag("use_qk_norm", False):
        raise config.refuse("use_qk_norm", "models of this architecture without it (false)")
    return cohere_metadata(config, "command-r")


CHECKPOINT = CheckpointForm(
    classes={"CohereForCausalLM": "cohere", "CohereModel": "cohere"},
    metadata=checkpoint_metadata,
    layer=COHERE_LAYER,
)
