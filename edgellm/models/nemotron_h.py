"""Nemotron-H: layers of one kind each, Mamba-2, attention without positions, or a feed-forward of squared ReLUs."""

from __future__ import annotations

from collections.abc import Callable

from edgellm.formats.model_file import ModelFile
from edgellm.kernels.ops import Activate
from edgellm.kernels.program import Program
from edgellm.models import module_of
from edgellm.models.parts.blocks import LayerKind, ProgramBuilder, leave_out_drafts, project_logits, self_attention
from edgellm.models.parts.checkpoint_config import CheckpointConfig
from edgellm.models.parts.checkpoint_form import CheckpointForm, TypedMetadata, decoder_metadata, refuse_activation
from edgellm.models.parts.hparams import read_hparams, real
from edgellm.models.parts.mamba2 import mamba2, read_mamba2
from edgellm.models.parts.mamba2_checkpoint import (
    CONTEXT_LENGTH,
    MAMBA2_NUMBERS,
    kinds_by_name,
    mamba2_biases,
    mamba2_layer,
    mamba2_metadata,
    mamba2_shapes,
    mamba2_vectors,
)

FeedForward = Callable[[ProgramBuilder, str], None]
"""Adds the ops from h to proj."""


def build(gguf: ModelFile) -> Program:
    """See ``build_layers``."""
    return build_layers(gguf, lambda m, blk: squared_relu(m, blk, "ffn_up", "ffn_down", m.hp.n_ff, "proj"))


def build_layers(gguf: ModelFile, ffn: FeedForward) -> Program:
    """x += one(RMSNorm(x)): a feed-forward where a layer has a width of one, attention where it has key heads, else a
    Mamba-2. Blocks behind the last one are drafts of the tokens that follow the next, and are left out.
    """
    net, eps = read_mamba2(gguf), real(gguf, "attention.layer_norm_epsilon", 1e-5)
    hp = read_hparams(gguf, by_layer=("n_head_kv", "n_ff"), eps=max(eps, 1e-12))
    m = ProgramBuilder(gguf, hp)
    m.embed("x")
    for i in range(hp.n_layer - leave_out_drafts(m)):
        blk = f"blk.{i}"
        m.hp = hp.layer(i)
        m.rms_norm("x", f"{blk}.attn_norm", "h")
        if m.hp.n_ff:
            ffn(m, blk)
        elif m.hp.n_head_kv:
            self_attention(m, blk, LayerKind(None))
        else:
            mamba2(m, blk, net)
        m.add("x", "proj", "x")
    project_logits(m)
    return m.finish()


def squared_relu(m: ProgramBuilder, blk: str, up: str, down: str, n_ff: int, out: str) -> None:
    """out = relu(h Wup^T)^2 Wdown^T"""
    between = f"up{n_ff}"
    m.linear("h", f"{blk}.{up}", between, n_ff)
    m.ops.append(Activate(between, between, "relu_squared"))
    m.linear(between, f"{blk}.{down}", out, m.hp.n_embd)


# ---- checkpoints -----------------------------------------------------------------------------------------------------

SIZES = {
    "heads": "mamba_num_heads",
    "head_dim": "mamba_head_dim",
    "groups": "n_groups",
    "state": "ssm_state_size",
    "taps": "conv_kernel",
}
STATE, ATTENTION, DENSE, EXPERTS = "state", "attention", "dense", "experts"
KINDS = {
    STATE: ("mamba", "linear_attention"),
    ATTENTION: ("attention", "full_attention"),
    DENSE: ("mlp",),
    EXPERTS: ("moe",),
}
LETTERS = {"M": STATE, "*": ATTENTION, "-": DENSE, "E": EXPERTS}


def kinds_of(config: CheckpointConfig) -> list[str]:
    """The kind of each layer: as a list says, or a letter for each. UnsupportedError for feed-forwards of both kinds,
    which files cannot tell apart."""
    pattern = config.get("hybrid_override_pattern")
    if config.get("layers_block_type") is None and pattern is not None:
        known = isinstance(pattern, str) and len(pattern) == config.n_layer and set(pattern) <= LETTERS.keys()
        if not known:
            raise config.refuse(
                "hybrid_override_pattern", f"one of {' '.join(LETTERS)} for each of {config.n_layer} layers"
            )
        kinds = [LETTERS[letter] for letter in pattern]
    else:
        kinds = kinds_by_name(config, KINDS, [STATE, EXPERTS, ATTENTION, DENSE], "layers_block_type")
    if DENSE in kinds and EXPERTS in kinds:
        raise config.refuse("layers_block_type", "models whose feed-forwards all have experts, or none")
    return kinds


def checkpoint_metadata(config: CheckpointConfig, architecture: str = "nemotron_h") -> TypedMetadata:
    """The keys of this architecture, and of that with experts, from config.json."""
    refuse_activation(config, "relu2", keys=("mlp_hidden_act",))
    refuse_activation(config, "silu", "swish", keys=("mamba_hidden_act",))
    if config.get("attention_head_dim") not in (None, config.head_dim):
        raise config.refuse("attention_head_dim", f"models whose heads are head_dim wide ({config.head_dim})")
    kinds, n_ff = kinds_of(config), config.integer("intermediate_size")
    n_head_kv = config.integer("num_key_value_heads", config.integer("num_attention_heads"))
    found = decoder_metadata(config, architecture, n_ff=n_ff, eps_key="layer_norm_epsilon")
    own: TypedMetadata = {
        "context_length": (CONTEXT_LENGTH, "UINT32"),
        "vocab_size": (config.integer("vocab_size"), "UINT32"),
        "feed_forward_length": ([n_ff * (kind == DENSE) for kind in kinds], "ARRAY[INT32]"),
        "attention.head_count_kv": ([n_head_kv * (kind == ATTENTION) for kind in kinds], "ARRAY[INT32]"),
        "attention.layer_norm_epsilon": (config.real("layer_norm_epsilon"), "FLOAT32"),
        "rope.scaling.finetuned": (False, "BOOL"),
    }
    found |= {f"{architecture}.{key}": value for key, value in own.items()}
    return found | mamba2_metadata(config, architecture, SIZES)


def _biases(config: CheckpointConfig) -> frozenset[str]:
    found = mamba2_biases(config, "use_conv_bias", "use_bias", "use_bias")
    return found | (frozenset(("ffn_up", "ffn_down")) if config.flag("mlp_bias", False) else frozenset())


def variant(config: CheckpointConfig) -> tuple[str, CheckpointForm]:
    """A class for two architectures."""
    if EXPERTS not in kinds_of(config):
        return "nemotron_h", CHECKPOINT
    return "nemotron_h_moe", module_of("nemotron_h_moe").CHECKPOINT


CHECKPOINT = CheckpointForm(
    classes={"NemotronHForCausalLM": "nemotron_h", "NemotronHModel": "nemotron_h"},
    metadata=checkpoint_metadata,
    biases=_biases,
    layer=mamba2_layer("mixer")
    | {
        "norm": "attn_norm",
        "mixer.q_proj": "attn_q",
        "mixer.k_proj": "attn_k",
        "mixer.v_proj": "attn_v",
        "mixer.o_proj": "attn_output",
        "mixer.up_proj": "ffn_up",
        "mixer.down_proj": "ffn_down",
    },
    around={"model.embeddings": "token_embd", "model.norm_f": "output_norm", "lm_head": "output"},
    bare=mamba2_vectors("mixer"),
    numbers=MAMBA2_NUMBERS,
    shapes=lambda config: mamba2_shapes(config, SIZES),
    extra=lambda _: {},
    variant=variant,
)
