"""ModernBERT: norms before the blocks, gated feed-forwards; one layer of three sees the whole text, two their vicinity.

The first layer has no norm of its own: what comes in is normed already.
"""

from __future__ import annotations

from edgellm.formats.model_file import ModelFile
from edgellm.kernels.ops import ApplyRope
from edgellm.kernels.ops.elementwise import Activation
from edgellm.kernels.pooling import KINDS
from edgellm.kernels.program import Program
from edgellm.models.parts.blocks import ProgramBuilder
from edgellm.models.parts.checkpoint_config import CheckpointConfig
from edgellm.models.parts.checkpoint_form import CheckpointForm, TypedMetadata, layer_kinds, refuse_activation
from edgellm.models.parts.checkpoint_rope import rotations_by_layer
from edgellm.models.parts.encoder import (
    check_sees_both_ways,
    classifier_metadata,
    encoder_metadata,
    finish_encoder,
    is_classifier,
)
from edgellm.models.parts.hparams import hparam_error, integer, key_of, read_hparams, read_rope, real
from edgellm.models.parts.local_layers import local_layers, pattern_metadata
from edgellm.models.parts.post_norm import project_qkv

PERIOD = 3
ACTIVATIONS: dict[str, Activation] = {"gelu": "gelu_erf", "silu": "silu", "swish": "silu"}


def build(gguf: ModelFile) -> Program:
    """x += Wo attention(rope(q), rope(k), v);  x += Wdown (gelu(Wgate h) * Wup h), each of h = norm(x)."""
    check_sees_both_ways(gguf)
    hp = read_hparams(gguf, eps_key="attention.layer_norm_epsilon")
    m = ProgramBuilder(gguf, hp)
    base = real(gguf, "rope.freq_base", 10000.0)
    m.ropes["global"] = read_rope(gguf, hp, base, adjacent=False)
    m.ropes["local"] = read_rope(gguf, hp, real(gguf, "rope.freq_base_swa", 10000.0), adjacent=False)
    window = integer(gguf, "attention.sliding_window", 0)
    activation = _activation(gguf)
    m.embed("x")
    m.layer_norm("x", "token_embd_norm", "x")
    for i, local in enumerate(local_layers(gguf, hp.n_layer, PERIOD, global_first=True)):
        blk, h = f"blk.{i}", "x"
        if i or f"{blk}.attn_norm.weight" in gguf.tensors:
            h = "h"
            m.layer_norm("x", f"{blk}.attn_norm", h)
        q, k, v = project_qkv(m, h, blk)
        near = local and window > 0
        m.ops += [ApplyRope(x, hp.head_dim_k, "local" if near else "global") for x in (q, k)]
        m.self_attention(q, k, v, "attn", reach=max(window // 2, 1) if near else 0)
        m.linear("attn", f"{blk}.attn_output", "proj", hp.n_embd)
        m.add("x", "proj", "x")
        m.layer_norm("x", f"{blk}.ffn_norm", "h")
        m.linear("h", f"{blk}.ffn_up", "gate_up", 2 * hp.n_ff)
        gate, up = m.part("gate_up", 0, hp.n_ff), m.part("gate_up", hp.n_ff, hp.n_ff)
        m.gated_unit(gate, up, m.buffer("ffn", hp.n_ff), activation)
        m.linear("ffn", f"{blk}.ffn_down", "proj", hp.n_embd)
        m.add("x", "proj", "x")
    m.layer_norm("x", "output_norm", "x")
    rank_of = KINDS[integer(gguf, "classifier.pooling_type", KINDS.index("mean"))]
    return finish_encoder(m, rank_of=rank_of, head_activation="gelu_erf")


def _activation(gguf: ModelFile) -> Activation:
    found = gguf.metadata.get(key_of(gguf, "hidden_activation"), "gelu")
    if found not in ACTIVATIONS:
        raise hparam_error(gguf, "hidden_activation", found, " or ".join(ACTIVATIONS))
    return ACTIVATIONS[found]


def checkpoint_metadata(config: CheckpointConfig) -> TypedMetadata:
    """The keys of this architecture, from config.json."""
    refuse_activation(config, *ACTIVATIONS)
    refuse_activation(config, "gelu", keys=("classifier_activation",))
    period = config.integer("global_attn_every_n_layers", PERIOD)
    wide, near = rotations_by_layer(config)
    for rope in (wide, near):
        if rope.kind != "default":
            raise config.refuse(f"{rope.key}.rope_type", "rotations that are not scaled", rope.kind)
    found = encoder_metadata(config, "modern-bert", eps_key="norm_eps")
    for key, rope, flat, default in (
        ("rope.freq_base", wide, "global_rope_theta", 160000.0),
        ("rope.freq_base_swa", near, "local_rope_theta", 10000.0),
    ):
        base = rope.numbers.get("rope_theta", config.get(flat))
        found[f"modern-bert.{key}"] = (config.real_of(flat, base, default), "FLOAT32")
    found["modern-bert.rope.scaling.type"] = ("none", "STRING")
    found["modern-bert.attention.sliding_window"] = (config.integer("local_attention"), "UINT32")
    slides = layer_kinds(config, lambda i: i % period != 0)
    found["modern-bert.attention.sliding_window_pattern"] = pattern_metadata(slides, global_first=True)
    found["modern-bert.hidden_activation"] = (config.get("hidden_activation"), "STRING")
    found["modern-bert.vocab_size"] = (config.integer("vocab_size"), "UINT32")
    if is_classifier(config):
        pooling = config.get("classifier_pooling")
        if pooling not in ("cls", "mean"):
            raise config.refuse("classifier_pooling", "cls or mean")
        found["modern-bert.classifier.pooling_type"] = (KINDS.index(pooling), "UINT32")
    return found | classifier_metadata(config, "modern-bert")


CHECKPOINT = CheckpointForm(
    classes={
        "ModernBertModel": "modernbert",
        "ModernBertForMaskedLM": "modernbert",
        "ModernBertForSequenceClassification": "modernbert",
    },
    metadata=checkpoint_metadata,
    biases=lambda _: frozenset(),
    renames=((r"^model\.(?!layers\.)", ""),),
    layer={
        "attn_norm": "attn_norm",
        "attn.Wqkv": "attn_qkv",
        "attn.Wo": "attn_output",
        "mlp_norm": "ffn_norm",
        "mlp.Wi": "ffn_up",
        "mlp.Wo": "ffn_down",
    },
    around={
        "embeddings.tok_embeddings": "token_embd",
        "embeddings.norm": "token_embd_norm",
        "final_norm": "output_norm",
        "head.dense": "cls",
        "head.norm": "cls.norm",
        "classifier": "cls.output",
    },
    around_biases=frozenset(("cls.output",)),
    leaves_out=lambda config: "" if is_classifier(config) else r"(decoder|head)\..*",
    extra=lambda _: {},
)
