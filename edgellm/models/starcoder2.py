"""StarCoder 2: LayerNorms, biases everywhere, and a feed-forward without a gate.

The window counts where a file says it, as the models were trained; llama.cpp has no key for it.
"""

from __future__ import annotations

from edgellm.formats.model_file import ModelFile
from edgellm.kernels.program import Program
from edgellm.models.parts.blocks import build_decoder, plain_feed_forward
from edgellm.models.parts.checkpoint_config import CheckpointConfig
from edgellm.models.parts.checkpoint_form import (
    DECODER_LAYER,
    QKV,
    CheckpointForm,
    TypedMetadata,
    decoder_metadata,
    refuse_activation,
    refuse_windows,
    with_layer_norms,
)
from edgellm.models.parts.hparams import integer


def build(gguf: ModelFile) -> Program:
    """x += Wo attention(rope(q), rope(k), v) + b;  x += Wdown gelu(Wup h + b) + b: see ``build_decoder``."""
    return build_decoder(
        gguf,
        adjacent=False,
        window=integer(gguf, "attention.sliding_window", 0),
        needs_bias="qkvon",
        layer_norms=True,
        ffn=lambda m, blk: plain_feed_forward(m, blk, "gelu", needs_bias=True),
    )


def checkpoint_metadata(config: CheckpointConfig) -> TypedMetadata:
    """The keys of this architecture, from config.json."""
    refuse_activation(config, "gelu_pytorch_tanh")
    refuse_windows(config)
    if not config.flag("use_bias", True):
        raise config.refuse("use_bias", "models of this architecture with biases (true)")
    found = with_layer_norms(decoder_metadata(config, "starcoder2", eps_key="norm_epsilon"), "starcoder2")
    if config.get("sliding_window") is not None:
        found["starcoder2.attention.sliding_window"] = (config.integer("sliding_window"), "UINT32")
    return found


CHECKPOINT = CheckpointForm(
    classes={"Starcoder2ForCausalLM": "starcoder2", "Starcoder2Model": "starcoder2"},
    metadata=checkpoint_metadata,
    biases=lambda _: QKV | {"attn_output", "ffn_up", "ffn_down", "attn_norm", "ffn_norm"},
    layer=DECODER_LAYER | {"mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"},
    around_biases=frozenset(("output_norm",)),
)
