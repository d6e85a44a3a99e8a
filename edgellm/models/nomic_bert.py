"""Nomic BERT: BERT with rotated heads in place of rows for positions, and a gated feed-forward."""

from __future__ import annotations

from edgellm.formats.model_file import ModelFile
from edgellm.kernels.program import Program
from edgellm.models.parts.blocks import ProgramBuilder
from edgellm.models.parts.checkpoint_config import CheckpointConfig
from edgellm.models.parts.checkpoint_form import CheckpointForm, TypedMetadata, refuse_activation
from edgellm.models.parts.checkpoint_rope import rope_metadata, rotation
from edgellm.models.parts.encoder import POST_NORM_LAYER, TABLES, encoder_metadata
from edgellm.models.parts.post_norm import build_post_norm

HEADS = r"(cls\.|lm_head\.|(nomic_bert\.)?pooler\.).*|.*\.(position_ids|inv_freq)"
"""Of training, and what nothing reads."""


def build(gguf: ModelFile) -> Program:
    """x = norm(x + Wo attention(rope(q), rope(k), v));  x = norm(x + Wdown (silu(Wgate x) * Wup x))"""
    return build_post_norm(gguf, _feed_forward, "rotated")


def _feed_forward(m: ProgramBuilder, blk: str) -> None:
    m.linear("x", f"{blk}.ffn_gate", "gate", m.hp.n_ff)
    m.linear("x", f"{blk}.ffn_up", "up", m.hp.n_ff)
    m.gated_unit("gate", "up", "gate", "silu")
    m.linear("gate", f"{blk}.ffn_down", "proj", m.hp.n_embd)


def checkpoint_metadata(config: CheckpointConfig) -> TypedMetadata:
    """The keys of this architecture, from config.json."""
    refuse_activation(config, "silu", "swish", "swiglu")
    for key in ("qkv_proj_bias", "mlp_fc1_bias", "mlp_fc2_bias"):
        if config.flag(key, False):
            raise config.refuse(key, "models of this architecture without biases (false)")
    return nomic_metadata(config, "nomic-bert")


def nomic_metadata(config: CheckpointConfig, architecture: str) -> TypedMetadata:
    """The keys of the family, from config.json."""
    if config.get("head_dim") not in (None, config.integer("hidden_size") // config.integer("num_attention_heads")):
        raise config.refuse("head_dim", "heads that fill the hidden size")
    found = encoder_metadata(config, architecture)
    trained = config.get("max_trained_positions")
    if trained is not None:
        length = min(config.integer("max_position_embeddings"), config.integer("max_trained_positions"))
        found[f"{architecture}.context_length"] = (length, "UINT32")
    found |= {f"{architecture}.{key}": value for key, value in rope_metadata(rotation(config)).items()}
    found["tokenizer.ggml.token_type_count"] = (config.integer("type_vocab_size"), "UINT32")
    return found


def _variant(config: CheckpointConfig) -> tuple[str, CheckpointForm | None]:
    """With experts it is an architecture of its own."""
    return ("nomic-bert-moe", None) if config.get("moe_every_n_layers") else ("nomic-bert", CHECKPOINT)


CHECKPOINT = CheckpointForm(
    classes=dict.fromkeys(("NomicBertModel", "NomicBertForMaskedLM", "NomicBertForPreTraining"), "nomic_bert"),
    metadata=checkpoint_metadata,
    biases=lambda _: frozenset(("attn_output_norm", "layer_output_norm")),
    renames=(
        (r"^(bert|nomic_bert)\.", ""),
        (r"^encoder\.layers\.", "model.layers."),
        (r"^emb_ln\.", "embeddings.LayerNorm."),
    ),
    layer=POST_NORM_LAYER
    | {
        "attn.Wqkv": "attn_qkv",
        "attn.out_proj": "attn_output",
        "mlp.fc11": "ffn_up",
        "mlp.fc12": "ffn_gate",
        "mlp.fc2": "ffn_down",
        # as transformers calls them
        "mlp.up_proj": "ffn_up",
        "mlp.gate_proj": "ffn_gate",
        "mlp.down_proj": "ffn_down",
    },
    around=TABLES,
    around_biases=frozenset(("token_embd_norm",)),
    leaves_out=lambda _: HEADS,
    extra=lambda _: {},
    variant=_variant,
)
