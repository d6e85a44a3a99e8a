"""EAGLE-3: one layer that reads the embedding of a token beside a state of the one before it, and drafts the next.

The state is what three layers of the model read there, brought together, or for a token that was only drafted the
layer's own output before its norm. Its head may know the likeliest tokens alone.
"""

from __future__ import annotations

import numpy as np

from edgellm.formats.model_file import ModelFile
from edgellm.kernels.ops import Embed, RMSNorm
from edgellm.kernels.program import Program
from edgellm.models.drafts import (
    DraftProgram,
    Target,
    borrow,
    mismatch,
    own,
    read_ids,
    target_layers,
    with_vocabulary,
)
from edgellm.models.drafts.features import Features
from edgellm.models.parts.blocks import ProgramBuilder, feed_forward, self_attention, the_rope
from edgellm.models.parts.checkpoint_config import CheckpointConfig
from edgellm.models.parts.checkpoint_form import (
    DECODER,
    DECODER_LAYER,
    CheckpointForm,
    TypedMetadata,
    decoder_metadata,
    refuse_activation,
    refuse_windows,
)
from edgellm.models.parts.hparams import flag, hparam_error, integer, read_hparams

BLK = "blk.0"


def build(gguf: ModelFile, target: Target) -> DraftProgram:
    """x = g + Wo attention(RMSNorm(embedding) | RMSNorm(g));  x += Wdown (silu(Wgate h) * Wup h), h = RMSNorm(x)"""
    hp = with_vocabulary(read_hparams(gguf), gguf, target)
    if hp.n_layer != 1:
        raise hparam_error(gguf, "block_count", hp.n_layer, "1, as an EAGLE-3 draft has one layer")
    layers = target_layers(gguf, target, 3)
    n_target = integer(gguf, "target_hidden_size", target.n_embd)
    if n_target != target.n_embd:
        raise mismatch(gguf, f"it reads states of {n_target}", f"states of {target.n_embd}")
    m = ProgramBuilder(gguf, hp)
    ids = read_ids(m, target)
    borrow(m, target, head=ids is None)
    n_inputs = len(layers) * n_target
    has_norm = flag(gguf, "norm_before_fc", False)
    features = Features(
        layers,
        own(m, "fc.weight", hp.n_embd, n_inputs),
        before=own(m, "enc.output_norm.weight", n_inputs) if has_norm else None,
        eps=hp.eps,
    )
    m.ropes = {"rope": the_rope(m, adjacent=True)}
    m.embed("state")
    m.ops.append(Embed("token_embd.weight", m.buffer("embedding", hp.n_embd), embeds=False))
    m.buffer("both", 2 * hp.n_embd)
    token, state = m.part("both", 0, hp.n_embd), m.part("both", hp.n_embd, hp.n_embd)
    for x, out, norm in (("embedding", token, "attn_norm"), ("state", state, "attn_norm_2")):
        m.ops.append(RMSNorm(x, m.weight(f"{BLK}.{norm}.weight", hp.n_embd), out, hp.eps))
    self_attention(m, BLK, x="both")
    m.add("proj", state if flag(gguf, "norm_before_residual", False) else "state", "x")
    m.norm("x", f"{BLK}.ffn_norm", "h")
    feed_forward(m, BLK, "silu")
    m.add("x", "proj", "x")
    m.select_outputs("x", "x_out")
    m.hidden = "x_out"
    m.rms_norm("x_out", "output_norm", "h_out")
    m.linear("h_out", "output", Program.output, hp.n_vocab if ids is None else len(ids))
    return DraftProgram(m.finish(), features, ids)


IN_EAGLE_CONFIG = {
    "parallel_draft_step": (1,),
    "use_aux_hidden_state": (True,),
    "use_input_layernorm_in_first_layer": (True,),
    "use_last_layernorm": (True,),
    "use_mtp_layernorm": (False,),
    "next_layer_regular": (True,),
}
"""What the settings within ``eagle_config`` may be, beside those that are read."""


def checkpoint_metadata(config: CheckpointConfig, n_layer: int, n_embd: int, n_vocab: int) -> TypedMetadata:
    """The keys of a draft for a model of these sizes, from config.json."""
    refuse_activation(config, "silu", "swish")
    refuse_windows(config)
    inner = config.object_of("eagle_config", config.get("eagle_config"))
    for key, value in inner.items():
        if value not in (None, *IN_EAGLE_CONFIG.get(key, ())) and key not in ("norm_before_fc", LAYERS):
            raise config.refuse(f"eagle_config.{key}", "EAGLE-3 drafts without it", value)
    found = decoder_metadata(config, "eagle3")
    before_fc = inner.get("norm_before_fc", config.get("norm_before_fc"))
    more = {
        "vocab_size": (n_vocab, "UINT32"),
        "rope.dimension_count": (config.head_dim, "UINT32"),
        "target_layers": (np.array(_layers(config, n_layer), np.int32), "ARRAY[INT32]"),
        "target_hidden_size": (config.integer("target_hidden_size", n_embd), "UINT32"),
        "norm_before_residual": (config.flag("norm_before_residual", False), "BOOL"),
        "norm_before_fc": (before_fc is True, "BOOL"),
    }
    return found | {f"eagle3.{key}": value for key, value in more.items()}


LAYERS = "eagle_aux_hidden_state_layer_ids"


def _layers(config: CheckpointConfig, n_layer: int) -> list[int]:
    """The layers whose inputs are read: a low one, a middle one and a high one where the settings say no others.

    Within ``eagle_config`` some count outputs, which are one less; what is neither usual way is refused.
    """
    usual = [2, n_layer // 2, n_layer - 3]
    inner = config.object_of("eagle_config", config.get("eagle_config")).get(LAYERS)
    given = config.get(LAYERS) if inner is None else inner
    if given in (None, [], usual, [i - 1 for i in usual]):
        return usual
    is_list = isinstance(given, list) and len(given) == 3 and all(type(one) is int and one >= 0 for one in given)
    if not is_list or inner is not None or config.get("speculators_model_type") is None:
        raise config.refuse(LAYERS, f"drafts that read the layers {usual} of {n_layer}", given)
    return list(given)


CHECKPOINT = CheckpointForm(
    classes=dict.fromkeys(
        ("LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM", "Eagle3Speculator", "Eagle3DraftModel"), "eagle3"
    ),
    metadata=lambda config: checkpoint_metadata(config, config.n_layer, config.integer("hidden_size"), 1),
    layer=DECODER_LAYER | {"hidden_norm": "attn_norm_2"},
    around=DECODER | {"fc": "fc", "input_norm": "enc.output_norm"},
    renames=((r"^midlayer\.", "model.layers.0."),),
    pairs_heads=True,
)
