"""Jina BERT v3: XLM-RoBERTa with rotated heads in place of rows for positions. Adapters for tasks are other files."""

from __future__ import annotations

from edgellm.formats.model_file import ModelFile
from edgellm.kernels.program import Program
from edgellm.models.parts.checkpoint_config import CheckpointConfig
from edgellm.models.parts.checkpoint_form import QKV, CheckpointForm, TypedMetadata, refuse_activation
from edgellm.models.parts.checkpoint_rope import rope_metadata, rotation
from edgellm.models.parts.encoder import POST_NORM_LAYER, TABLES, encoder_metadata
from edgellm.models.parts.post_norm import build_post_norm, curved


def build(gguf: ModelFile) -> Program:
    """x = norm(x + Wo attention(rope(q), rope(k), v));  x = norm(x + Wdown gelu(Wup x))"""
    return build_post_norm(gguf, curved("gelu_erf"), "rotated")


def checkpoint_metadata(config: CheckpointConfig) -> TypedMetadata:
    """The keys of this architecture, from config.json."""
    refuse_activation(config, "gelu")
    found = encoder_metadata(config, "jina-bert-v3")
    found |= {f"jina-bert-v3.{key}": value for key, value in rope_metadata(rotation(config)).items()}
    found["tokenizer.ggml.token_type_count"] = (config.integer("type_vocab_size"), "UINT32")
    return found


CHECKPOINT = CheckpointForm(
    classes={"JinaEmbeddingsV3Model": "jina_embeddings_v3", "JinaEmbeddingsV3ForMaskedLM": "jina_embeddings_v3"},
    metadata=checkpoint_metadata,
    biases=lambda _: QKV | {"attn_output", "attn_output_norm", "ffn_up", "ffn_down", "layer_output_norm", "attn_qkv"},
    renames=(
        (r"^(roberta|model|jina_embeddings_v3)\.(?!layers\.)", ""),
        (r"^encoder\.layers\.", "model.layers."),
        (r"^emb_ln\.", "embeddings.LayerNorm."),
    ),
    layer=POST_NORM_LAYER
    | {
        "mixer.Wqkv": "attn_qkv",
        "mixer.out_proj": "attn_output",
        "mlp.fc1": "ffn_up",
        "mlp.fc2": "ffn_down",
    },
    around=TABLES,
    around_biases=frozenset(("token_embd_norm",)),
    leaves_out=lambda _: r"(lm_head\.|(roberta\.)?pooler\.).*",
    extra=lambda _: {},
)
