"""Mamba-2: layers with a state alone, no attention and no feed-forward."""

from __future__ import annotations

from edgellm.formats.model_file import ModelFile
from edgellm.kernels.program import Program
from edgellm.models.parts.blocks import ProgramBuilder, project_logits
from edgellm.models.parts.checkpoint_config import CheckpointConfig
from edgellm.models.parts.checkpoint_form import CheckpointForm, TypedMetadata, refuse_activation
from edgellm.models.parts.hparams import read_recurrent_hparams
from edgellm.models.parts.mamba2 import mamba2, read_mamba2
from edgellm.models.parts.mamba2_checkpoint import (
    CONTEXT_LENGTH,
    MAMBA2_NUMBERS,
    mamba2_biases,
    mamba2_layer,
    mamba2_metadata,
    mamba2_shapes,
    mamba2_vectors,
)


def build(gguf: ModelFile) -> Program:
    """x += mixer(RMSNorm(x))"""
    net = read_mamba2(gguf)
    hp = read_recurrent_hparams(gguf)
    m = ProgramBuilder(gguf, hp)
    m.embed("x")
    for i in range(hp.n_layer):
        m.rms_norm("x", f"blk.{i}.attn_norm", "h")
        mamba2(m, f"blk.{i}", net)
        m.add("x", "proj", "x")
    project_logits(m)
    return m.finish()


SIZES = {
    "heads": "num_heads",
    "head_dim": "head_dim",
    "groups": "n_groups",
    "state": "state_size",
    "taps": "conv_kernel",
}


def checkpoint_metadata(config: CheckpointConfig) -> TypedMetadata:
    """The keys of this architecture, from config.json."""
    refuse_activation(config, "silu", "swish")
    n_embd, inner = config.integer("hidden_size"), config.integer("num_heads") * config.integer("head_dim")
    if config.integer("expand") * n_embd != inner:
        raise config.wrong(
            "expand", config.get("expand"), f"{inner} (num_heads * head_dim) over hidden_size ({n_embd})"
        )
    numbers = {
        "context_length": CONTEXT_LENGTH,
        "embedding_length": n_embd,
        "feed_forward_length": 0,
        "attention.head_count": 0,
        "block_count": config.n_layer,
        "vocab_size": config.integer("vocab_size"),
    }
    found: TypedMetadata = {f"mamba2.{key}": (value, "UINT32") for key, value in numbers.items()}
    found |= mamba2_metadata(config, "mamba2", SIZES)
    return found | {"mamba2.attention.layer_norm_rms_epsilon": (config.real("layer_norm_epsilon"), "FLOAT32")}


CHECKPOINT = CheckpointForm(
    classes={"Mamba2ForCausalLM": "mamba2", "Mamba2Model": "mamba2"},
    metadata=checkpoint_metadata,
    biases=lambda config: mamba2_biases(config, "use_conv_bias", "use_bias", "use_bias"),
    layer=mamba2_layer("mixer") | {"norm": "attn_norm"},
    around={"model.embeddings": "token_embd", "model.norm_f": "output_norm", "lm_head": "output"},
    bare=mamba2_vectors("mixer"),
    numbers=MAMBA2_NUMBERS,
    shapes=lambda config: mamba2_shapes(config, SIZES),
    extra=lambda _: {},
)
