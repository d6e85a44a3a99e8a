"""EXAONE 4: norms stand behind each block and not before, every head of q and k is normed.

Where layers slide, those that see everything are not rotated.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from edgellm.formats.model_file import ModelFile
from edgellm.kernels.program import Program
from edgellm.models.parts.blocks import AFTER, LayerKind, build_decoder
from edgellm.models.parts.checkpoint_config import CheckpointConfig
from edgellm.models.parts.checkpoint_form import (
    DECODER_LAYER,
    QK_NORMS,
    CheckpointForm,
    TypedMetadata,
    decoder_metadata,
    layer_kinds,
    refuse_activation,
)
from edgellm.models.parts.hparams import integer
from edgellm.models.parts.local_layers import local_layers

PERIOD = 4
N_LAYER_32B = 64  # whose first files say nothing of their window
WINDOW_32B = 4096


def build(gguf: ModelFile) -> Program:
    """x += norm(attention of x);  x += norm(ffn of x): see ``build_decoder``."""
    n_drafts = integer(gguf, "nextn_predict_layers", 0)
    n_main = integer(gguf, "block_count") - n_drafts
    window = integer(gguf, "attention.sliding_window", WINDOW_32B if n_main == N_LAYER_32B else 0)
    slides = local_layers(gguf, n_main, PERIOD, n_drafts=n_drafts) if window else []

    def kinds(i: int) -> LayerKind:
        if not window:
            return LayerKind()
        return LayerKind(window=window) if slides[i] else LayerKind(None)

    return build_decoder(gguf, adjacent=False, norms=AFTER, qk_norms="heads", kinds=kinds)


def checkpoint_metadata(config: CheckpointConfig) -> TypedMetadata:
    """The keys of this architecture, from config.json."""
    refuse_activation(config, "silu", "swish")
    found = decoder_metadata(config, "exaone4")
    found["exaone4.vocab_size"] = (config.integer("vocab_size"), "UINT32")
    slides = layer_kinds(config, _slides(config))
    if config.get("sliding_window") is not None:
        found["exaone4.attention.sliding_window"] = (config.integer("sliding_window"), "UINT32")
        found["exaone4.attention.sliding_window_pattern"] = (np.array(slides), "ARRAY[BOOL]")
    elif any(slides):
        raise config.wrong("sliding_window", None, "a number, where layer_types has layers that slide")
    return found


def _slides(config: CheckpointConfig) -> Callable[[int], bool]:
    """Which layers slide, from a pattern such as LLLG or a period."""
    pattern = config.get("sliding_window_pattern")
    if config.get("sliding_window") is None:
        return lambda i: False
    if isinstance(pattern, str) and pattern and set(pattern) <= {"L", "G"}:
        return lambda i: pattern[i % len(pattern)] == "L"
    period = config.integer("sliding_window_pattern", PERIOD)
    return lambda i: (i + 1) % period != 0


CHECKPOINT = CheckpointForm(
    classes={"Exaone4ForCausalLM": "exaone4", "Exaone4Model": "exaone4"},
    metadata=checkpoint_metadata,
    biases=lambda _: frozenset(),
    layer={name: there for name, there in DECODER_LAYER.items() if name != "input_layernorm"}
    | QK_NORMS
    | {"post_attention_layernorm": "post_attention_norm", "post_feedforward_layernorm": "post_ffw_norm"},
    extra_is_usual=True,
)
