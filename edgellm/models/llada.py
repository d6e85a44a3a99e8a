"""LLaDA: llama's layers, whose tokens see all of their text; it writes by denoising.

GGUF files of this architecture store q and k with their rows reordered, so that rotated pairs are neighbours.
"""

from __future__ import annotations

from edgellm.formats.model_file import ModelFile
from edgellm.kernels.program import Program
from edgellm.models.parts.checkpoint_config import CheckpointConfig
from edgellm.models.parts.checkpoint_form import CheckpointForm, TypedMetadata, decoder_metadata, refuse_activation
from edgellm.models.parts.denoising import build_denoiser, denoising_metadata

MASK = 126336  # of a checkpoint that does not name it
BLOCK = 32


def build(gguf: ModelFile) -> Program:
    """See ``build_denoiser``."""
    return build_denoiser(gguf, shifted=False, algorithm="confidence", block=BLOCK, adjacent=True)


def checkpoint_metadata(config: CheckpointConfig) -> TypedMetadata:
    """The keys of this architecture, from config.json."""
    refuse_activation(config, "silu", keys=("activation_type",))
    found = decoder_metadata(config, "llada")
    found["llada.vocab_size"] = (config.integer("vocab_size"), "UINT32")
    found["llada.rope.dimension_count"] = (config.head_dim, "UINT32")
    return found | denoising_metadata(config, "llada", shifted=False, mask=MASK)


CHECKPOINT = CheckpointForm(
    classes={"LLaDAModelLM": "llada"},
    metadata=checkpoint_metadata,
    layer={
        "attn_norm": "attn_norm",
        "q_proj": "attn_q",
        "k_proj": "attn_k",
        "v_proj": "attn_v",
        "attn_out": "attn_output",
        "ff_norm": "ffn_norm",
        "ff_proj": "ffn_gate",
        "up_proj": "ffn_up",
        "ff_out": "ffn_down",
    },
    renames=(
        (r"^model\.transformer\.blocks\.", "model.layers."),
        (r"^model\.transformer\.(wte|ln_f|ff_out)\.", r"\1."),
    ),
    around={"wte": "token_embd", "ln_f": "output_norm", "ff_out": "output"},
    biases=lambda _: frozenset(),
    needs_class=True,
    pairs_heads=True,
)
