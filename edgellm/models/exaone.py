"""EXAONE 3 and 3.5, EXAONE Deep: llama by other names, with rotated pairs half a head apart."""

from __future__ import annotations

from edgellm.formats.model_file import ModelFile
from edgellm.kernels.program import Program
from edgellm.models.parts.blocks import build_decoder
from edgellm.models.parts.checkpoint_config import CheckpointConfig
from edgellm.models.parts.checkpoint_form import (
    FEED_FORWARD,
    CheckpointForm,
    TypedMetadata,
    attention_biases,
    decoder_metadata,
    refuse_activation,
    refuse_windows,
)


def build(gguf: ModelFile) -> Program:
    """See ``build_decoder``."""
    return build_decoder(gguf, adjacent=False)


def checkpoint_metadata(config: CheckpointConfig) -> TypedMetadata:
    """The keys of this architecture, from config.json."""
    refuse_activation(config, "silu", "swish")
    refuse_windows(config)
    found = decoder_metadata(config, "exaone")
    found["exaone.rope.dimension_count"] = (config.head_dim, "UINT32")
    return found


CHECKPOINT = CheckpointForm(
    classes={"ExaoneForCausalLM": "exaone"},
    metadata=checkpoint_metadata,
    biases=lambda config: attention_biases(config) | (FEED_FORWARD if config.flag("mlp_bias", False) else frozenset()),
    renames=((r"^transformer\.h\.", "model.layers."), (r"^transformer\.", "")),
    layer={
        "ln_1": "attn_norm",
        "attn.attention.q_proj": "attn_q",
        "attn.attention.k_proj": "attn_k",
        "attn.attention.v_proj": "attn_v",
        "attn.attention.out_proj": "attn_output",
        "ln_2": "ffn_norm",
        "mlp.c_fc_0": "ffn_gate",
        "mlp.c_fc_1": "ffn_up",
        "mlp.c_proj": "ffn_down",
    },
    around={"wte": "token_embd", "ln_f": "output_norm", "lm_head": "output"},
    extra_is_usual=True,
)
