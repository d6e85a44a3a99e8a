"""BERT and its kin: learned positions, two types of text, a norm behind every block; tokens see their whole text."""

from __future__ import annotations

from edgellm.formats.model_file import ModelFile
from edgellm.kernels.program import Program
from edgellm.models.parts.blocks import ProgramBuilder
from edgellm.models.parts.checkpoint_config import CheckpointConfig
from edgellm.models.parts.checkpoint_form import QKV, CheckpointForm, TypedMetadata, refuse_activation
from edgellm.models.parts.encoder import (
    check_sees_both_ways,
    classifier_metadata,
    encoder_metadata,
    finish_encoder,
    is_classifier,
)
from edgellm.models.parts.hparams import read_hparams


def build(gguf: ModelFile) -> Program:
    """x = norm(x + Wo attention(q, k, v));  x = norm(x + Wdown gelu(Wup x)), of x = norm(token + type + position)."""
    check_sees_both_ways(gguf)
    hp = read_hparams(gguf, eps_key="attention.layer_norm_epsilon")
    m = ProgramBuilder(gguf, hp)
    m.embed("x")
    if "token_types.weight" in gguf.tensors:
        m.add_rows("x", "token_types", "x", of="types", n_rows=gguf.tensors["token_types.weight"].shape[0])
    m.add_rows("x", "position_embd", "x", of="positions", n_rows=hp.context_length)
    m.layer_norm("x", "token_embd_norm", "x", needs_bias=True)
    for i in range(hp.n_layer):
        blk = f"blk.{i}"
        for name, n_heads, head_dim in (
            ("q", hp.n_head, hp.head_dim_k),
            ("k", hp.n_head_kv, hp.head_dim_k),
            ("v", hp.n_head_kv, hp.head_dim_v),
        ):
            m.linear("x", f"{blk}.attn_{name}", name, n_heads * head_dim)
        m.self_attention("q", "k", "v", "attn")
        m.linear("attn", f"{blk}.attn_output", "proj", hp.n_embd)
        m.add("x", "proj", "x")
        m.layer_norm("x", f"{blk}.attn_output_norm", "x", needs_bias=True)
        m.linear("x", f"{blk}.ffn_up", "up", hp.n_ff)
        m.activate("up", "up", "gelu_erf")
        m.linear("up", f"{blk}.ffn_down", "proj", hp.n_embd)
        m.add("x", "proj", "x")
        m.layer_norm("x", f"{blk}.layer_output_norm", "x", needs_bias=True)
    return finish_encoder(m)


def checkpoint_metadata(config: CheckpointConfig) -> TypedMetadata:
    """The keys of this architecture, from config.json."""
    refuse_activation(config, "gelu")
    if config.flag("is_decoder", False):
        raise config.refuse("is_decoder", "encoders, whose tokens see their whole text")
    found = encoder_metadata(config, "bert")
    found["tokenizer.ggml.token_type_count"] = (config.integer("type_vocab_size"), "UINT32")
    return found | classifier_metadata(config, "bert")


def left_out(config: CheckpointConfig) -> str:
    """Heads of training, and the layer behind the first token where no classifier reads it."""
    heads = r"cls\.(predictions|seq_relationship)\..*|(bert\.)?embeddings\.position_ids"
    return heads if is_classifier(config) else rf"{heads}|(bert\.)?pooler\..*"


CHECKPOINT = CheckpointForm(
    classes={
        "BertModel": "bert",
        "BertForMaskedLM": "bert",
        "BertForPreTraining": "bert",
        "BertForSequenceClassification": "bert",
    },
    metadata=checkpoint_metadata,
    biases=lambda _: QKV | {"attn_output", "attn_output_norm", "ffn_up", "ffn_down", "layer_output_norm"},
    renames=((r"^bert\.", ""), (r"^encoder\.layer\.", "model.layers.")),
    layer={
        "attention.self.query": "attn_q",
        "attention.self.key": "attn_k",
        "attention.self.value": "attn_v",
        "attention.output.dense": "attn_output",
        "attention.output.LayerNorm": "attn_output_norm",
        "intermediate.dense": "ffn_up",
        "output.dense": "ffn_down",
        "output.LayerNorm": "layer_output_norm",
    },
    around={
        "embeddings.word_embeddings": "token_embd",
        "embeddings.position_embeddings": "position_embd",
        "embeddings.token_type_embeddings": "token_types",
        "embeddings.LayerNorm": "token_embd_norm",
        "pooler.dense": "cls",
        "classifier": "cls.output",
    },
    around_biases=frozenset(("token_embd_norm", "cls", "cls.output")),
    leaves_out=left_out,
    extra=lambda _: {},
)
