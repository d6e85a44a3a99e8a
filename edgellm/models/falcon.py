"""Falcon 1 and 2: attention and feed-forward side by side, by one LayerNorm or two; few heads of keys and values."""

from __future__ import annotations

import numpy as np

from edgellm.formats.model_file import ModelFile
from edgellm.kernels.program import Program
from edgellm.models.parts.blocks import BlockNorms, build_decoder, plain_feed_forward
from edgellm.models.parts.checkpoint_config import CheckpointConfig
from edgellm.models.parts.checkpoint_form import (
    CheckpointForm,
    TypedMetadata,
    decoder_metadata,
    refuse_activation,
    typed_metadata,
    with_layer_norms,
)
from edgellm.models.parts.joined_heads import rows_of_qkv

CONTEXT = 2048
"""Of the first models, whose config.json does not say it."""


def build(gguf: ModelFile) -> Program:
    """x += attention(norm(x)) + Wdown gelu(Wup norm(x)): see ``build_decoder``."""
    apart = any(".attn_norm_2." in name for name in gguf.tensors)  # attention's, where the other is the feed-forward's
    return build_decoder(
        gguf,
        adjacent=False,
        layer_norms=True,
        needs_bias="n",
        side_by_side=True,
        norms=BlockNorms("attn_norm_2", ffn="attn_norm") if apart else BlockNorms(ffn=""),
        ffn=lambda m, blk: plain_feed_forward(m, blk, "gelu_erf", x="h"),
    )


def checkpoint_metadata(config: CheckpointConfig) -> TypedMetadata:
    """The keys of this architecture, from config.json."""
    refuse_activation(config, "gelu")
    for key, wanted in (("alibi", False), ("parallel_attn", True)):
        if config.flag(key, wanted) is not wanted:
            raise config.refuse(key, f"models of this architecture where it is {str(wanted).lower()}")
    n_embd = config.integer("hidden_size")
    found = decoder_metadata(config, "falcon", n_ff=config.integer("intermediate_size", 4 * n_embd), eps_key=EPS)
    found["falcon.tensor_data_layout"] = ("jploski", "STRING")
    sizes = {"attention.head_count_kv": key_heads(config)}
    return with_layer_norms(found, "falcon") | typed_metadata("falcon", sizes)


EPS = "layer_norm_epsilon"


def key_heads(config: CheckpointConfig) -> int:
    """How many heads of keys and values there are."""
    if config.flag("new_decoder_architecture", False):
        return config.integer("num_key_value_heads", config.integer("num_attention_heads"))
    if not config.flag("multi_query", True):
        raise config.refuse("multi_query", "models of this architecture whose heads share keys (true)")
    return 1


def _orders(config: CheckpointConfig) -> dict[str, np.ndarray]:
    order = np.concatenate(rows_of_qkv(config, by_group=True, n_kv=key_heads(config)))
    return {"attn_qkv.weight": order, "attn_qkv.bias": order}


def _biases(config: CheckpointConfig) -> frozenset[str]:
    linear = frozenset(("attn_qkv", "attn_output", "ffn_up", "ffn_down"))
    return frozenset(("attn_norm", "attn_norm_2")) | (linear if config.flag("bias", False) else frozenset())


CHECKPOINT = CheckpointForm(
    classes={"FalconForCausalLM": "falcon", "FalconModel": "falcon"},
    metadata=checkpoint_metadata,
    biases=_biases,
    renames=((r"^transformer\.", ""), (r"^h\.", "model.layers.")),
    layer={
        "input_layernorm": "attn_norm",
        "ln_attn": "attn_norm_2",
        "ln_mlp": "attn_norm",
        "self_attention.query_key_value": "attn_qkv",
        "self_attention.dense": "attn_output",
        "mlp.dense_h_to_4h": "ffn_up",
        "mlp.dense_4h_to_h": "ffn_down",
    },
    around={"word_embeddings": "token_embd", "ln_f": "output_norm", "lm_head": "output"},
    around_biases=frozenset(("output_norm",)),
    row_orders=_orders,
    extra=lambda _: {},
)
