"""GPT-NeoX (Pythia, Dolly, StableLM 1): LayerNorms and biases everywhere, a part of each head rotated.

Attention and feed-forward stand side by side, each with a norm of its own, where the file says so.
"""

from __future__ import annotations

import numpy as np

from edgellm.formats.model_file import ModelFile
from edgellm.kernels.ops.elementwise import Curve
from edgellm.kernels.program import Program
from edgellm.models.parts.blocks import build_decoder, plain_feed_forward
from edgellm.models.parts.checkpoint_config import CheckpointConfig
from edgellm.models.parts.checkpoint_form import (
    CheckpointForm,
    TypedMetadata,
    decoder_metadata,
    refuse_activation,
    typed_metadata,
    with_layer_norms,
)
from edgellm.models.parts.checkpoint_rope import rotated_dims, rotation_of_a_part
from edgellm.models.parts.hparams import flag, hparam_error, key_of
from edgellm.models.parts.joined_heads import rows_of_qkv

GPT_MODULES = frozenset(("attn_norm", "attn_qkv", "attn_output", "ffn_norm", "ffn_up", "ffn_down"))
"""Of a layer of the GPT family, all of which have a bias."""

CURVE = "hidden_activation"
CURVES: dict[str, Curve] = {"gelu": "gelu_erf", "gelu_fast": "gelu", "gelu_new": "gelu", "gelu_pytorch_tanh": "gelu"}
"""What transformers calls them, as files that edgellm writes have them; other programs take the tanh form for all."""


def build(gguf: ModelFile) -> Program:
    """x += attention(norm(x)) + Wdown gelu(Wup norm(x)), or one behind the other: see ``build_decoder``."""
    found = gguf.metadata.get(key_of(gguf, CURVE), "gelu")
    if not isinstance(found, str) or found not in CURVES:
        raise hparam_error(gguf, CURVE, found, " or ".join(CURVES))
    return build_decoder(
        gguf,
        adjacent=False,
        layer_norms=True,
        needs_bias="qkvon",
        side_by_side=flag(gguf, "use_parallel_residual", True),
        ffn=lambda m, blk: plain_feed_forward(m, blk, CURVES[found], needs_bias=True),
    )


def checkpoint_metadata(config: CheckpointConfig) -> TypedMetadata:
    """The keys of this architecture, from config.json."""
    refuse_activation(config, *CURVES)
    if not config.flag("attention_bias", True):
        raise config.refuse("attention_bias", "models of this architecture with biases (true)")
    found = decoder_metadata(config, "gptneox", rotation_of_a_part, eps_key="layer_norm_eps")
    found = with_layer_norms(found, "gptneox") | typed_metadata(
        "gptneox",
        {
            "rope.dimension_count": rotated_dims(config, 0.25),
            "use_parallel_residual": config.flag("use_parallel_residual", True),
        },
    )
    if config.get("hidden_act") not in (None, "gelu"):
        found[f"gptneox.{CURVE}"] = (config.get("hidden_act"), "STRING")
    return found


def _orders(config: CheckpointConfig) -> dict[str, np.ndarray]:
    order = np.concatenate(rows_of_qkv(config, by_group=True))
    return {"attn_qkv.weight": order, "attn_qkv.bias": order}


CHECKPOINT = CheckpointForm(
    classes={"GPTNeoXForCausalLM": "gpt_neox", "GPTNeoXModel": "gpt_neox"},
    metadata=checkpoint_metadata,
    biases=lambda _: GPT_MODULES,
    renames=((r"^gpt_neox\.", "model."),),
    layer={
        "input_layernorm": "attn_norm",
        "attention.query_key_value": "attn_qkv",
        "attention.dense": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        "mlp.dense_h_to_4h": "ffn_up",
        "mlp.dense_4h_to_h": "ffn_down",
    },
    around={
        "model.embed_in": "token_embd",
        "model.final_layer_norm": "output_norm",
        "embed_out": "output",
        "lm_head": "output",
    },
    around_biases=frozenset(("output_norm",)),
    row_orders=_orders,
    leaves_out=lambda _: r".*\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",
    extra=lambda _: {},
)
