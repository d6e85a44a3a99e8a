"""Granite 3 with experts, and with one that all tokens share where the file has it."""

from __future__ import annotations

from collections.abc import Callable

from edgellm.formats.model_file import ModelFile
from edgellm.kernels.program import Program
from edgellm.models.granite import granite_metadata, read_scales, rotates
from edgellm.models.parts.blocks import ProgramBuilder, build_decoder
from edgellm.models.parts.checkpoint_config import CheckpointConfig
from edgellm.models.parts.checkpoint_form import DECODER_LAYER, CheckpointForm, TypedMetadata
from edgellm.models.parts.experts import expert_feed_forward, expert_metadata, read_experts, shared_expert
from edgellm.models.parts.hparams import integer


def build(gguf: ModelFile) -> Program:
    """As Granite, but x += s (experts(h) + shared(h))."""
    ffn = read_feed_forward(gguf)
    return build_decoder(gguf, adjacent=True, rotates=rotates(gguf), scales=read_scales(gguf), ffn=ffn)


def read_feed_forward(gguf: ModelFile) -> Callable[[ProgramBuilder, str], None]:
    """What adds proj = experts(h) + shared(h), the latter where the file has one."""
    shared = integer(gguf, "expert_shared_feed_forward_length", 0)
    experts = read_experts(gguf, integer(gguf, "feed_forward_length", least=1), shared=shared)

    def ffn(m: ProgramBuilder, blk: str) -> None:
        expert_feed_forward(m, blk, experts, "silu")
        if experts.shared:
            shared_expert(m, blk, experts.shared, "silu")

    return ffn


def checkpoint_metadata(config: CheckpointConfig, architecture: str = "granitemoe") -> TypedMetadata:
    """The keys of this architecture, and of one that has these too, from config.json."""
    found = granite_metadata(config, architecture) | expert_metadata(config, architecture)
    if config.model_type in ("granitemoeshared", "granitemoehybrid"):
        if not config.get("shared_intermediate_size"):
            raise config.refuse("shared_intermediate_size", "models of this class that have a shared expert")
        shared = config.integer("shared_intermediate_size")
        found[f"{architecture}.expert_shared_feed_forward_length"] = (shared, "UINT32")
    return found


CHECKPOINT = CheckpointForm(
    classes={
        "GraniteMoeForCausalLM": "granitemoe",
        "GraniteMoeSharedForCausalLM": "granitemoeshared",
        "GraniteMoeModel": "granitemoe",
        "GraniteMoeSharedModel": "granitemoeshared",
    },
    metadata=checkpoint_metadata,
    layer=DECODER_LAYER
    | {"block_sparse_moe.router.layer": "ffn_gate_inp", "shared_mlp.output_linear": "ffn_down_shexp"},
    stacked={
        "block_sparse_moe.input_linear": ("ffn_gate_exps", "ffn_up_exps"),
        "block_sparse_moe.output_linear": ("ffn_down_exps",),
        "shared_mlp.input_linear": ("ffn_gate_shexp", "ffn_up_shexp"),
    },
    pairs_heads=True,
)
