"""Ministral 3 and Mistral Small 3.1: llama whose queries grow with the position, in steps of the first context.

Files store q and k with their rows reordered, so that rotated pairs are neighbours.
"""

from __future__ import annotations

from dataclasses import replace

from edgellm.formats.model_file import ModelFile
from edgellm.kernels.program import Program
from edgellm.kernels.rope import Rope
from edgellm.models.parts.blocks import LayerKind, ProgramBuilder, build_decoder, the_rope
from edgellm.models.parts.checkpoint_config import CheckpointConfig
from edgellm.models.parts.checkpoint_form import (
    CheckpointForm,
    TypedMetadata,
    decoder_metadata,
    factors_of,
    refuse_activation,
    refuse_windows,
)
from edgellm.models.parts.checkpoint_rope import KINDS, Rotation, rotation
from edgellm.models.parts.hparams import hparam_error, integer, real


def build(gguf: ModelFile) -> Program:
    """See ``build_decoder``; the rotation of queries carries their scale, so it must be one of whole heads."""
    return build_decoder(gguf, adjacent=True, ropes=rotations, kinds=lambda _: LayerKind(q_rope="queries"))


def rotations(m: ProgramBuilder) -> dict[str, Rope]:
    """That of keys, and that of queries."""
    rope, rate = the_rope(m, adjacent=True), real(m.gguf, "attention.temperature_scale", 0.0)
    if rate and rope.n_dims != m.hp.head_dim_k:
        raise hparam_error(m.gguf, "rope.dimension_count", rope.n_dims, f"the whole head, which is {m.hp.head_dim_k}")
    length = integer(m.gguf, "rope.scaling.original_context_length", m.hp.context_length)
    return {"rope": rope, "queries": replace(rope, warmth=(rate, length)) if rate else rope}


def checkpoint_metadata(config: CheckpointConfig) -> TypedMetadata:
    """The keys of this architecture, from config.json."""
    refuse_activation(config, "silu", "swish")
    refuse_windows(config)
    if config.get("sliding_window") is not None:
        raise config.refuse("sliding_window", "models of this architecture that see the whole context (null)")
    rope = _rotation(config)
    found = decoder_metadata(config, "mistral3", _rotation)
    found["mistral3.vocab_size"] = (config.integer("vocab_size"), "UINT32")
    found["mistral3.rope.dimension_count"] = (config.head_dim, "UINT32")
    if config.model_type == "ministral3":
        if rope.kind != "yarn":
            raise config.refuse(f"{rope.key}.rope_type", "yarn for a ministral3 model", rope.kind)
        found["mistral3.attention.temperature_scale"] = (rope.real("llama_4_scaling_beta"), "FLOAT32")
    if rope.kind == "yarn" and (every := rope.real("mscale_all_dim", 0.0)) and rope.real("mscale", 0.0):
        if rope.real("mscale") != 1:
            raise config.refuse(f"{rope.key}.mscale", "1 for models of this architecture", rope.real("mscale"))
        if rope.numbers.get("attention_factor") is None:  # the key says the same
            found.pop("mistral3.rope.scaling.attn_factor", None)
            found["mistral3.rope.scaling.yarn_log_multiplier"] = (every, "FLOAT32")
    return found


def _rotation(config: CheckpointConfig) -> Rotation:
    return rotation(config, KINDS, ("llama_4_scaling_beta", "max_position_embeddings"))


CHECKPOINT = CheckpointForm(
    classes={"Ministral3ForCausalLM": "ministral3", "Mistral3ForConditionalGeneration": "mistral3"},
    metadata=checkpoint_metadata,
    biases=lambda _: frozenset(),
    pairs_heads=True,
    extra=factors_of(_rotation),
)
