"""Llama 2 and 3, Mistral, Mixtral, SmolLM2 and everything else that was converted as ``llama``.

GGUF files of this architecture store q and k with their rows reordered, so that rotated pairs are neighbours.
"""

from __future__ import annotations

from edgellm.formats.model_file import ModelFile
from edgellm.kernels.program import Program
from edgellm.models.parts.blocks import build_decoder
from edgellm.models.parts.checkpoint_config import CheckpointConfig
from edgellm.models.parts.checkpoint_form import (
    DECODER_LAYER,
    FEED_FORWARD,
    CheckpointForm,
    TypedMetadata,
    attention_biases,
    decoder_metadata,
    layer_kinds,
    refuse_activation,
)
from edgellm.models.parts.experts import STACKED_EXPERTS, expert_feed_forward, expert_metadata, read_experts
from edgellm.models.parts.hparams import integer

SLIDING = ("mistral", "mixtral")
"""Kinds of settings in which a window counts."""


def build(gguf: ModelFile) -> Program:
    """The decoder that the others are variants of; with experts it is Mixtral's."""
    window = integer(gguf, "attention.sliding_window", 0)  # Mistral 7B v0.1, where the converter kept it
    if not integer(gguf, "expert_count", 0):
        return build_decoder(gguf, adjacent=True, window=window)
    experts = read_experts(gguf, integer(gguf, "feed_forward_length", least=1))
    return build_decoder(
        gguf, adjacent=True, window=window, ffn=lambda m, blk: expert_feed_forward(m, blk, experts, "silu")
    )


def checkpoint_metadata(config: CheckpointConfig) -> TypedMetadata:
    """The keys of this architecture, from config.json."""
    refuse_activation(config, "silu", "swish")
    found = decoder_metadata(config, "llama")
    found["llama.vocab_size"] = (config.integer("vocab_size"), "UINT32")
    found["llama.rope.dimension_count"] = (config.head_dim, "UINT32")
    if config.model_type == "mixtral":
        found |= expert_metadata(config, "llama")
    window = config.get("sliding_window") if config.model_type in SLIDING else None
    if len({window is not None, *layer_kinds(config, lambda _: window is not None)}) > 1:
        raise config.refuse("layer_types", "models of this architecture whose layers all slide, or none")
    if window is not None:
        found["llama.attention.sliding_window"] = (config.integer("sliding_window"), "UINT32")
    return found


def checkpoint_biases(config: CheckpointConfig) -> frozenset[str]:
    """The modules that have a bias; none in Mistral."""
    return attention_biases(config) | (FEED_FORWARD if config.flag("mlp_bias", False) else frozenset())


CHECKPOINT = CheckpointForm(
    classes={
        "LlamaForCausalLM": "llama",
        "LLaMAForCausalLM": "llama",
        "MistralForCausalLM": "mistral",
        "MixtralForCausalLM": "mixtral",
        "LlamaModel": "llama",
        "MistralModel": "mistral",
        "MixtralModel": "mixtral",
    },
    metadata=checkpoint_metadata,
    biases=checkpoint_biases,
    layer=DECODER_LAYER | {"block_sparse_moe.gate": "ffn_gate_inp", "mlp.gate": "ffn_gate_inp"},
    experts={"w1": "ffn_gate_exps", "w3": "ffn_up_exps", "w2": "ffn_down_exps"},
    stacked=STACKED_EXPERTS,
    pairs_heads=True,
)
