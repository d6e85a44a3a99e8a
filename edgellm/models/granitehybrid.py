"""Granite 4 with states: most layers are Mamba-2, the others attention, mostly without positions; experts or none."""

from __future__ import annotations

from dataclasses import replace

from edgellm.formats.model_file import ModelFile
from edgellm.kernels.program import Program
from edgellm.models.granite import CHECKPOINT as GRANITE
from edgellm.models.granite import granite_metadata, read_scales, rotates
from edgellm.models.granitemoe import CHECKPOINT as GRANITEMOE
from edgellm.models.granitemoe import checkpoint_metadata as granitemoe_metadata
from edgellm.models.granitemoe import read_feed_forward
from edgellm.models.parts.blocks import (
    LayerKind,
    ProgramBuilder,
    feed_forward,
    project_logits,
    rope_factors,
    self_attention,
)
from edgellm.models.parts.checkpoint_config import CheckpointConfig
from edgellm.models.parts.checkpoint_form import CheckpointForm, TypedMetadata, attention_biases
from edgellm.models.parts.hparams import integer, read_hparams, read_rope, real
from edgellm.models.parts.mamba2 import mamba2, read_mamba2
from edgellm.models.parts.mamba2_checkpoint import (
    CONTEXT_LENGTH,
    MAMBA2_NUMBERS,
    SIZES_OF_MAMBA,
    kinds_by_name,
    mamba2_biases,
    mamba2_layer,
    mamba2_metadata,
    mamba2_shapes,
    mamba2_vectors,
)


def build(gguf: ModelFile) -> Program:
    """x += s mixer(RMSNorm(x)), x += s ffn(RMSNorm(x)); a layer without key heads is Mamba-2."""
    net, scales = read_mamba2(gguf), read_scales(gguf)
    hp = read_hparams(gguf, by_layer=("n_head_kv",))
    ffn = read_feed_forward(gguf) if integer(gguf, "expert_count", 0) else _dense
    m = ProgramBuilder(gguf, hp)
    rope = read_rope(gguf, hp, real(gguf, "rope.freq_base", 10000.0), adjacent=True, factors=rope_factors(m))
    if rotates(gguf):
        m.ropes["rope"] = rope
    m.embed("x", scales.embeddings)
    for i in range(hp.n_layer):
        blk = f"blk.{i}"
        m.hp = hp.layer(i)
        m.rms_norm("x", f"{blk}.attn_norm", "h")
        if m.hp.n_head_kv:
            self_attention(m, blk, LayerKind("rope" if m.ropes else None), scale=scales.scores)
        else:
            mamba2(m, blk, net)
        m.add("x", "proj", "x", scales.residual)
        m.rms_norm("x", f"{blk}.ffn_norm", "h")
        ffn(m, blk)
        m.add("x", "proj", "x", scales.residual)
    project_logits(m, scale=scales.logits)
    return m.finish()


def _dense(m: ProgramBuilder, blk: str) -> None:
    feed_forward(m, blk, "silu")


# ---- checkpoints -----------------------------------------------------------------------------------------------------

KINDS = {"state": ("mamba", "linear_attention"), "attention": ("attention", "full_attention")}


def _kinds(config: CheckpointConfig) -> list[str]:
    return kinds_by_name(config, KINDS, ["state"] * config.n_layer)


def _with_sizes(config: CheckpointConfig) -> CheckpointConfig:
    """The settings with the width of a head, which may be what the others leave."""
    if config.get("mamba_d_head") not in (None, "auto"):
        return config
    inner, n_heads = config.integer("mamba_expand") * config.integer("hidden_size"), config.integer("mamba_n_heads")
    if inner % n_heads:
        raise config.wrong("mamba_n_heads", n_heads, f"a divisor of mamba_expand * hidden_size ({inner})")
    return replace(config, values={**config.values, "mamba_d_head": inner // n_heads})


def checkpoint_metadata(config: CheckpointConfig, architecture: str = "granitehybrid") -> TypedMetadata:
    """The keys of this architecture, and of the others that settings of its class stand for, from config.json."""
    config, kinds = _with_sizes(config), _kinds(config)
    has_experts, rotated = bool(config.get("num_local_experts")), config.get("position_embedding_type") == "rope"
    values = {**config.values, "layer_types": None}
    if not has_experts:
        values["intermediate_size"] = config.integer("shared_intermediate_size")
    plain = replace(config, values=values)
    found = granitemoe_metadata(plain, architecture) if has_experts else granite_metadata(plain, architecture)
    found[f"{architecture}.rope.scaling.finetuned"] = (rotated, "BOOL")
    if architecture != "granitehybrid":
        return found
    n_head_kv = config.integer("num_key_value_heads", config.integer("num_attention_heads"))
    found[f"{architecture}.attention.head_count_kv"] = (
        [n_head_kv * (kind == "attention") for kind in kinds],
        "ARRAY[INT32]",
    )
    if not rotated:
        found[f"{architecture}.context_length"] = (CONTEXT_LENGTH, "UINT32")
    inner = config.integer("mamba_n_heads") * config.integer("mamba_d_head")
    if inner != config.integer("mamba_expand") * config.integer("hidden_size"):
        raise config.wrong("mamba_d_head", config.get("mamba_d_head"), "mamba_expand * hidden_size over mamba_n_heads")
    return found | mamba2_metadata(config, architecture, SIZES_OF_MAMBA)


def _biases(config: CheckpointConfig) -> frozenset[str]:
    return attention_biases(config) | mamba2_biases(config, "mamba_conv_bias", "mamba_proj_bias", "mamba_proj_bias")


WITH_EXPERTS = replace(
    GRANITEMOE,
    layer={**GRANITEMOE.layer, **mamba2_layer("mamba")},
    biases=_biases,
    bare=mamba2_vectors("mamba"),
    numbers=MAMBA2_NUMBERS,
    shapes=lambda config: mamba2_shapes(_with_sizes(config), SIZES_OF_MAMBA),
)
DENSE = replace(
    WITH_EXPERTS,
    layer={**GRANITE.layer, **mamba2_layer("mamba"), "shared_mlp.output_linear": "ffn_down"},
    stacked={"shared_mlp.input_linear": ("ffn_gate", "ffn_up")},
)


def variant(config: CheckpointConfig) -> tuple[str, CheckpointForm]:
    """A class for four architectures: with states or without, with experts or without."""
    form = WITH_EXPERTS if config.get("num_local_experts") else DENSE
    if "state" in _kinds(config):
        return "granitehybrid", replace(form, metadata=checkpoint_metadata)
    architecture = "granitemoe" if config.get("num_local_experts") else "granite"
    return architecture, replace(form, metadata=lambda config: checkpoint_metadata(config, architecture))


CHECKPOINT = replace(
    WITH_EXPERTS,
    classes={"GraniteMoeHybridForCausalLM": "granitemoehybrid", "GraniteMoeHybridModel": "granitemoehybrid"},
    metadata=checkpoint_metadata,
    variant=variant,
)
