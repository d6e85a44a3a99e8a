"""GPT-2: LayerNorms, biases everywhere, a row added for each position and no rotation."""

from __future__ import annotations

from edgellm.formats.model_file import ModelFile
from edgellm.kernels.program import Program
from edgellm.models.gptneox import GPT_MODULES
from edgellm.models.parts.blocks import build_decoder, plain_feed_forward
from edgellm.models.parts.checkpoint_config import CheckpointConfig
from edgellm.models.parts.checkpoint_form import (
    CheckpointForm,
    TypedMetadata,
    decoder_metadata,
    refuse_activation,
    with_layer_norms,
)

GPT_LAYER = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
GPT_RENAMES = ((r"^transformer\.", ""), (r"^h\.", "model.layers."))
GPT_AROUND = {"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm", "lm_head": "output"}


def build(gguf: ModelFile) -> Program:
    """x += attention(norm(x));  x += Wdown gelu(Wup norm(x)), of x = token + position: see ``build_decoder``."""
    return build_decoder(
        gguf,
        adjacent=False,
        rotates=False,
        adds_positions=True,
        layer_norms=True,
        needs_bias="qkvon",
        ffn=lambda m, blk: plain_feed_forward(m, blk, "gelu", needs_bias=True),
    )


def gpt_metadata(config: CheckpointConfig, architecture: str) -> TypedMetadata:
    """The keys of the family, from config.json."""
    n_ff = 4 * config.integer("hidden_size")
    if config.get("intermediate_size") is not None:
        n_ff = config.integer("intermediate_size")
    found = with_layer_norms(decoder_metadata(config, architecture, n_ff=n_ff, eps_key="layer_norm_eps"), architecture)
    del found[f"{architecture}.rope.freq_base"]
    return found


def checkpoint_metadata(config: CheckpointConfig) -> TypedMetadata:
    """The keys of this architecture, from config.json."""
    refuse_activation(config, "gelu_new", "gelu_pytorch_tanh")
    return gpt_metadata(config, "gpt2")


CHECKPOINT = CheckpointForm(
    classes={"GPT2LMHeadModel": "gpt2", "GPT2Model": "gpt2"},
    metadata=checkpoint_metadata,
    biases=lambda _: GPT_MODULES,
    renames=GPT_RENAMES,
    layer=GPT_LAYER,
    around=GPT_AROUND,
    around_biases=frozenset(("output_norm",)),
    transposed=frozenset(("attn_qkv.weight", "attn_output.weight", "ffn_up.weight", "ffn_down.weight")),
    leaves_out=lambda _: r".*\.attn\.(bias|masked_bias)",
    extra=lambda _: {},
)
