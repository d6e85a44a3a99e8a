"""StableLM 2 and Stable Code: LayerNorms, a gated feed-forward, a quarter of each head rotated.

In the 12B size, whose file has no norm for it, the feed-forward reads what attention read, and each head of q and k is
normed by a weight of its own.
"""

from __future__ import annotations

from edgellm.formats.model_file import ModelFile
from edgellm.kernels.program import Program
from edgellm.models.parts.blocks import BlockNorms, build_decoder, feed_forward
from edgellm.models.parts.checkpoint_config import CheckpointConfig
from edgellm.models.parts.checkpoint_form import (
    QKV,
    CheckpointForm,
    TypedMetadata,
    decoder_metadata,
    refuse_activation,
    typed_metadata,
    with_layer_norms,
)
from edgellm.models.parts.checkpoint_rope import rotated_dims, rotation_of_a_part


def build(gguf: ModelFile) -> Program:
    """x += attention(h);  x += ffn(norm(x)), or both of one h: see ``build_decoder``."""
    apart = any(".ffn_norm." in name for name in gguf.tensors)
    return build_decoder(
        gguf,
        adjacent=False,
        layer_norms=True,
        needs_bias="n",
        qk_norms="unlike heads" if any(".attn_q_norm." in name for name in gguf.tensors) else "none",
        norms=BlockNorms() if apart else BlockNorms(ffn=""),
        ffn=lambda m, blk: feed_forward(m, blk, "silu"),
    )


HEAD_NORMS = {"self_attn.q_layernorm": "attn_q_norm", "self_attn.k_layernorm": "attn_k_norm"}


def checkpoint_metadata(config: CheckpointConfig) -> TypedMetadata:
    """The keys of this architecture, from config.json."""
    refuse_activation(config, "silu", "swish")
    found = decoder_metadata(config, "stablelm", rotation_of_a_part, eps_key="layer_norm_eps")
    return with_layer_norms(found, "stablelm") | typed_metadata(
        "stablelm",
        {
            "rope.dimension_count": rotated_dims(config, 0.25),
            "use_parallel_residual": config.flag("use_parallel_residual", False),
        },
    )


CHECKPOINT = CheckpointForm(
    classes={"StableLmForCausalLM": "stablelm", "StableLmModel": "stablelm"},
    metadata=checkpoint_metadata,
    biases=lambda config: (QKV if config.flag("use_qkv_bias", False) else frozenset()) | {"attn_norm", "ffn_norm"},
    by_head=lambda config: HEAD_NORMS if config.flag("qk_layernorm", False) else {},
    around_biases=frozenset(("output_norm",)),
    extra=lambda _: {},
)
