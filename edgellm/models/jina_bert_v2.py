"""Jina BERT v2: BERT whose scores fade by the distance (ALiBi) and whose feed-forward is a gated unit.

The model for code also norms rows of q and k, and x a second time behind attention.
"""

from __future__ import annotations

from edgellm.formats.model_file import ModelFile
from edgellm.kernels.program import Program
from edgellm.models.bert import CHECKPOINT as BERT
from edgellm.models.parts.blocks import ProgramBuilder, feed_forward
from edgellm.models.parts.checkpoint_config import CheckpointConfig
from edgellm.models.parts.checkpoint_form import QKV, CheckpointForm, TypedMetadata, refuse_activation
from edgellm.models.parts.encoder import classifier_metadata, encoder_metadata
from edgellm.models.parts.post_norm import build_post_norm, curved

NORMS = frozenset(("attn_q_norm", "attn_k_norm", "attn_output_norm", "attn_norm_2", "layer_output_norm"))


def build(gguf: ModelFile) -> Program:
    """x = norm(x + Wo attention(q, k, v));  x = norm(x + Wdown (gelu(Wgate x) * Wup x))"""
    return build_post_norm(gguf, _feed_forward, "distances")


def _feed_forward(m: ProgramBuilder, blk: str) -> None:
    """proj = Wdown (gelu(Wgate x) * Wup x), or Wdown gelu(Wup x) where there is no gate."""
    up = m.gguf.tensors.get(f"{blk}.ffn_up.weight")
    if f"{blk}.ffn_gate.weight" not in m.gguf.tensors and up is not None and up.shape[0] == m.hp.n_ff:
        curved("gelu_erf")(m, blk)
        return
    feed_forward(m, blk, "gelu_erf", x="x")


def checkpoint_metadata(config: CheckpointConfig) -> TypedMetadata:
    """The keys of this architecture, from config.json."""
    refuse_activation(config, "gelu")
    if config.get("position_embedding_type") != "alibi":
        raise config.refuse("position_embedding_type", "models of this architecture with alibi")
    if config.get("feed_forward_type") != "geglu":
        raise config.refuse("feed_forward_type", "models of this architecture with geglu")
    found = encoder_metadata(config, "jina-bert-v2")
    found["tokenizer.ggml.token_type_count"] = (config.integer("type_vocab_size"), "UINT32")
    return found | classifier_metadata(config, "jina-bert-v2")


CHECKPOINT = CheckpointForm(
    classes={f"JinaBert{task}": "bert" for task in ("Model", "ForMaskedLM")},
    metadata=checkpoint_metadata,
    biases=lambda _: QKV | NORMS | {"attn_output", "ffn_down"},
    renames=BERT.renames,
    layer={name: there for name, there in BERT.layer.items() if name.startswith("attention.")}
    | {
        "attention.self.layer_norm_q": "attn_q_norm",
        "attention.self.layer_norm_k": "attn_k_norm",
        "layer_norm_1": "attn_norm_2",
        "layer_norm_2": "layer_output_norm",
        "mlp.layernorm": "layer_output_norm",
        "mlp.wo": "ffn_down",
        "mlp.down_layer": "ffn_down",
        "mlp.gated_layers_w": "ffn_gate",
        "mlp.gated_layers_v": "ffn_up",
    },
    stacked={"mlp.gated_layers": ("ffn_gate", "ffn_up"), "mlp.up_gated_layer": ("ffn_up", "ffn_gate")},
    around={name: there for name, there in BERT.around.items() if "embeddings" in name},
    around_biases=frozenset(("token_embd_norm",)),
    leaves_out=BERT.leaves_out,
    extra=lambda _: {},
    needs_class=True,
    settings="jina_bert",
)
