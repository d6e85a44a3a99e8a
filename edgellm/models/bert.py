"""BERT and its kin: learned positions, two types of text, a norm behind every block; tokens see their whole text.

RoBERTa, XLM-RoBERTa and DistilBERT are BERT with other names, and other rows of the table of positions.
"""

from __future__ import annotations

from edgellm.formats.model_file import ModelFile
from edgellm.kernels.program import Program
from edgellm.models.parts.checkpoint_config import CheckpointConfig
from edgellm.models.parts.checkpoint_form import QKV, CheckpointForm, TypedMetadata, refuse_activation
from edgellm.models.parts.encoder import (
    TABLES,
    classifier_metadata,
    encoder_metadata,
    is_classifier,
)
from edgellm.models.parts.post_norm import build_post_norm, curved


def build(gguf: ModelFile) -> Program:
    """x = norm(x + Wo attention(q, k, v));  x = norm(x + Wdown gelu(Wup x)), of x = norm(token + type + position)."""
    return build_post_norm(gguf, curved("gelu_erf"), "rows")


ROBERTA = ("roberta", "xlm-roberta")
_CLASSES = {"Bert": "bert", "Roberta": "roberta", "XLMRoberta": "xlm-roberta"}


def checkpoint_metadata(config: CheckpointConfig) -> TypedMetadata:
    """The keys of this architecture, from config.json."""
    refuse_activation(config, "gelu")
    if config.flag("is_decoder", False):
        raise config.refuse("is_decoder", "encoders, whose tokens see their whole text")
    found = encoder_metadata(config, "bert")
    n_rows = config.integer("max_position_embeddings") - first_position(config).get("position_embd.weight", 0)
    if n_rows < 1:
        raise config.wrong(
            "max_position_embeddings", config.get("max_position_embeddings"), "more than pad_token_id + 1"
        )
    found["bert.context_length"] = (n_rows, "UINT32")
    found["tokenizer.ggml.token_type_count"] = (config.integer("type_vocab_size"), "UINT32")
    return found | classifier_metadata(config, "bert")


def first_position(config: CheckpointConfig) -> dict[str, int]:
    """RoBERTa's first position is the row behind that of padding; those before it are never read."""
    if config.model_type not in ROBERTA:
        return {}
    padding = config.get("pad_token_id")
    if type(padding) is not int or not 0 <= padding < 1 << 31:
        raise config.wrong("pad_token_id", padding, "the id of padding, behind whose row positions begin")
    return {"position_embd.weight": padding + 1}


def left_out(config: CheckpointConfig) -> str:
    """Heads of training, and the layer behind the first token where no classifier reads it."""
    heads = r"cls\.(predictions|seq_relationship)\..*|(bert\.|roberta\.)?embeddings\.position_ids|lm_head\..*|vocab_.*"
    reads = is_classifier(config) and config.model_type == "bert"
    return heads if reads else rf"{heads}|(bert\.|roberta\.)?pooler\..*"


CHECKPOINT = CheckpointForm(
    classes={
        f"{name}{task}": kind
        for name, kind in _CLASSES.items()
        for task in ("Model", "ForMaskedLM", "ForSequenceClassification")
    }
    # its classifier has a curve that GGUF has no name for
    | {"BertForPreTraining": "bert", "DistilBertModel": "distilbert", "DistilBertForMaskedLM": "distilbert"},
    metadata=checkpoint_metadata,
    biases=lambda _: QKV | {"attn_output", "attn_output_norm", "ffn_up", "ffn_down", "layer_output_norm"},
    renames=(
        (r"^(bert|roberta|distilbert)\.", ""),
        (r"^(encoder|transformer)\.layer\.", "model.layers."),
        (r"^classifier\.dense\.", "pooler.dense."),
        (r"^classifier\.out_proj\.", "classifier."),
    ),
    layer={
        "attention.self.query": "attn_q",
        "attention.self.key": "attn_k",
        "attention.self.value": "attn_v",
        "attention.output.dense": "attn_output",
        "attention.output.LayerNorm": "attn_output_norm",
        "intermediate.dense": "ffn_up",
        "output.dense": "ffn_down",
        "output.LayerNorm": "layer_output_norm",
        # DistilBERT's
        "attention.q_lin": "attn_q",
        "attention.k_lin": "attn_k",
        "attention.v_lin": "attn_v",
        "attention.out_lin": "attn_output",
        "sa_layer_norm": "attn_output_norm",
        "ffn.lin1": "ffn_up",
        "ffn.lin2": "ffn_down",
        "output_layer_norm": "layer_output_norm",
    },
    around=TABLES
    | {
        "embeddings.position_embeddings": "position_embd",
        "pooler.dense": "cls",
        "classifier": "cls.output",
    },
    around_biases=frozenset(("token_embd_norm", "cls", "cls.output")),
    first_rows=first_position,
    leaves_out=left_out,
    extra=lambda _: {},
)
