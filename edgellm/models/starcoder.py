"""StarCoder 1 (GPT-BigCode): GPT-2 whose heads share one of keys and values."""

from __future__ import annotations

from dataclasses import replace

from edgellm.formats.model_file import ModelFile
from edgellm.kernels.program import Program
from edgellm.models.gpt2 import CHECKPOINT as GPT2
from edgellm.models.gpt2 import build as build_gpt2
from edgellm.models.gpt2 import gpt_metadata
from edgellm.models.parts.checkpoint_config import CheckpointConfig
from edgellm.models.parts.checkpoint_form import TypedMetadata, refuse_activation


def build(gguf: ModelFile) -> Program:
    """As GPT-2."""
    return build_gpt2(gguf)


def checkpoint_metadata(config: CheckpointConfig) -> TypedMetadata:
    """The keys of this architecture, from config.json."""
    refuse_activation(config, "gelu_pytorch_tanh", "gelu_new")
    if not config.flag("multi_query", True):
        raise config.refuse("multi_query", "models of this architecture with one head of keys and values (true)")
    return gpt_metadata(config, "starcoder") | {"starcoder.attention.head_count_kv": (1, "UINT32")}


CHECKPOINT = replace(
    GPT2,
    classes={"GPTBigCodeForCausalLM": "gpt_bigcode", "GPTBigCodeModel": "gpt_bigcode"},
    metadata=checkpoint_metadata,
    transposed=frozenset(),
)
