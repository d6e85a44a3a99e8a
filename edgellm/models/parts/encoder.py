"""What encoders share: the end of their programs, which gives hidden states in place of logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from edgellm.formats.model_file import ModelFile
from edgellm.kernels.pooling import KINDS, Dense, PoolingKind
from edgellm.kernels.program import Program
from edgellm.models.parts.blocks import ProgramBuilder
from edgellm.models.parts.checkpoint_config import CheckpointConfig
from edgellm.models.parts.checkpoint_form import TypedMetadata
from edgellm.models.parts.hparams import flag, hparam_error, key_of
from edgellm.models.parts.pooling import read_pooling

HIDDEN = "h_out"
TABLES = {
    "embeddings.word_embeddings": "token_embd",
    "embeddings.token_type_embeddings": "token_types",
    "embeddings.LayerNorm": "token_embd_norm",
}
"""What stands before the layers of a checkpoint -> in GGUF."""
POST_NORM_LAYER = {
    "norm1": "attn_output_norm",
    "norm2": "layer_output_norm",
    # as transformers calls them
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "attn_output_norm",
    "post_mlp_layernorm": "layer_output_norm",
}
"""What layers of BERT's rotated kin share, as their authors and as transformers call it."""


def check_sees_both_ways(gguf: ModelFile) -> None:
    """FormatError where the file says that a token of an encoder sees only those before it."""
    if key_of(gguf, "attention.causal") in gguf.metadata and flag(gguf, "attention.causal", False):
        raise hparam_error(gguf, "attention.causal", True, "false")


def finish_encoder(
    m: ProgramBuilder,
    x: str = "x",
    *,
    rank_of: PoolingKind = "cls",
    head_activation: Literal["", "tanh", "gelu_erf"] = "tanh",
    head: Sequence[Dense] = (),
) -> Program:
    """The program whose result are the rows of ``x``.

    rank_of, head_activation   what a classifier reads, and what stands behind its first layer
    head                       a projection of the pooled vector
    """
    m.select_outputs(x, HIDDEN)
    m.hidden = HIDDEN
    m.pooling = read_pooling(m, of=rank_of, activation=head_activation, head=head, default="mean")
    return m.finish(is_encoder=True)


def encoder_metadata(config: CheckpointConfig, architecture: str, *, eps_key: str = "layer_norm_eps") -> TypedMetadata:
    """The keys that all encoders share."""
    found: TypedMetadata = {
        "block_count": (config.n_layer, "UINT32"),
        "context_length": (config.integer("max_position_embeddings"), "UINT32"),
        "embedding_length": (config.integer("hidden_size"), "UINT32"),
        "feed_forward_length": (config.integer("intermediate_size"), "UINT32"),
        "attention.head_count": (config.integer("num_attention_heads"), "UINT32"),
        "attention.layer_norm_epsilon": (config.real(eps_key), "FLOAT32"),
        "attention.causal": (False, "BOOL"),
    }
    return {f"{architecture}.{key}": value for key, value in found.items()}


def is_classifier(config: CheckpointConfig) -> bool:
    """Whether the checkpoint is of a class that gives scores to texts."""
    classes = config.get("architectures")
    named = classes[0] if isinstance(classes, list) and classes else ""
    return isinstance(named, str) and named.endswith("ForSequenceClassification")


def classifier_metadata(config: CheckpointConfig, architecture: str) -> TypedMetadata:
    """That a classifier ranks, and what its scores are called where they have names."""
    if not is_classifier(config):
        return {}
    found: TypedMetadata = {f"{architecture}.pooling_type": (KINDS.index("rank"), "UINT32")}
    named = config.object_of("id2label", config.get("id2label"))
    labels = [named[key] for key in sorted(named, key=lambda key: (len(key), key))]
    if labels and all(isinstance(label, str) and not label.startswith("LABEL_") for label in labels):
        found[f"{architecture}.classifier.output_labels"] = (labels, "ARRAY[STRING]")
    return found
