"""SmolLM3: llama whose every fourth layer knows no positions.

Files store q and k with their rows reordered, so that rotated pairs are neighbours.
"""

from __future__ import annotations

from edgellm.formats.model_file import ModelFile
from edgellm.kernels.program import Program
from edgellm.models.parts.blocks import LayerKind, build_decoder
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

PERIOD = 4


def build(gguf: ModelFile) -> Program:
    """See ``build_decoder``."""
    return build_decoder(gguf, adjacent=True, kinds=lambda i: LayerKind("rope" if (i + 1) % PERIOD else None))


def checkpoint_metadata(config: CheckpointConfig) -> TypedMetadata:
    """The keys of this architecture, from config.json."""
    refuse_activation(config, "silu", "swish")
    refuse_windows(config)
    turned, wanted = config.get("no_rope_layers"), [int((i + 1) % PERIOD != 0) for i in range(config.n_layer)]
    if turned is None and config.integer("no_rope_layer_interval", PERIOD) != PERIOD:
        raise config.refuse("no_rope_layer_interval", f"models of this architecture where it is {PERIOD}")
    if turned is not None and turned != wanted:
        raise config.refuse("no_rope_layers", "models of this architecture whose every fourth layer is not rotated")
    found = decoder_metadata(config, "smollm3")
    found["smollm3.vocab_size"] = (config.integer("vocab_size"), "UINT32")
    found["smollm3.rope.dimension_count"] = (config.head_dim, "UINT32")
    return found


CHECKPOINT = CheckpointForm(
    classes={"SmolLM3ForCausalLM": "smollm3", "SmolLM3Model": "smollm3"},
    metadata=checkpoint_metadata,
    biases=lambda config: attention_biases(config) | (FEED_FORWARD if config.flag("mlp_bias", False) else frozenset()),
    pairs_heads=True,
)
