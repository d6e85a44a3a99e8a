"""EmbeddingGemma: Gemma 3 whose tokens see both ways, with projections behind the pooling."""

from __future__ import annotations

import math

from edgellm.formats.errors import FormatError
from edgellm.formats.model_file import ModelFile
from edgellm.kernels.ops import ApplyRope
from edgellm.kernels.pooling import Dense
from edgellm.kernels.program import Program
from edgellm.models import gemma3
from edgellm.models.parts.blocks import ProgramBuilder, feed_forward
from edgellm.models.parts.checkpoint_config import CheckpointConfig
from edgellm.models.parts.checkpoint_form import GEMMA_LAYER, QK_NORMS, CheckpointForm, TypedMetadata
from edgellm.models.parts.encoder import check_sees_both_ways, finish_encoder
from edgellm.models.parts.hparams import integer, read_hparams
from edgellm.models.parts.local_layers import local_layers
from edgellm.models.parts.post_norm import project_qkv


def build(gguf: ModelFile) -> Program:
    """x += norm(Wo attention(rope(norm(q)), rope(norm(k)), v));  x += norm(Wdown (gelu(Wgate h) * Wup h))."""
    check_sees_both_ways(gguf)
    hp = read_hparams(gguf)
    m = ProgramBuilder(gguf, hp)
    m.ropes = gemma3.both_rotations(m)
    window = integer(gguf, "attention.sliding_window", least=2)
    m.embed("x", scale=math.sqrt(hp.n_embd))
    for i, local in enumerate(local_layers(gguf, hp.n_layer, gemma3.PERIOD)):
        blk = f"blk.{i}"
        m.rms_norm("x", f"{blk}.attn_norm", "h")
        q, k, v = project_qkv(m, "h", blk)
        for x, name in ((q, "q"), (k, "k")):
            m.rms_norm(x, f"{blk}.attn_{name}_norm", x, hp.head_dim_k)
        m.ops += [ApplyRope(x, hp.head_dim_k, "local" if local else "global") for x in (q, k)]
        m.self_attention(q, k, v, "attn", reach=window // 2 if local else 0)
        m.linear("attn", f"{blk}.attn_output", "proj", hp.n_embd)
        m.rms_norm("proj", f"{blk}.post_attention_norm", "proj")
        m.add("x", "proj", "x")
        m.rms_norm("x", f"{blk}.ffn_norm", "h")
        feed_forward(m, blk, "gelu")
        m.rms_norm("proj", f"{blk}.post_ffw_norm", "proj")
        m.add("x", "proj", "x")
    m.rms_norm("x", "output_norm", "x")
    return finish_encoder(m, head=_projections(m))


def _projections(m: ProgramBuilder) -> tuple[Dense, ...]:
    """The matrices behind the pooling, each as wide as the one before; FormatError where they do not fit."""
    found, width = [], m.hp.n_embd
    for name in ("dense_2", "dense_3"):
        weight = f"{name}.weight"
        if weight not in m.gguf.tensors:
            continue
        n_out = integer(m.gguf, f"{name}_feat_out")
        if integer(m.gguf, f"{name}_feat_in") != width:
            raise FormatError(
                f"{weight}: {m.gguf.architecture}.{name}_feat_in is not {width}, the width of what it reads. Download "
                "the file again, or take another conversion.",
                code="MODEL_SHAPE",
            )
        found.append(Dense(m.weight(weight, n_out, width)))
        width = n_out
    return tuple(found)


def checkpoint_metadata(config: CheckpointConfig) -> TypedMetadata:
    """The keys of this architecture, from config.json."""
    if not config.flag("use_bidirectional_attention", False):
        raise config.refuse("use_bidirectional_attention", "models of this class whose tokens see both ways", False)
    found = gemma3.shared_metadata(config)
    return {key.replace("gemma3.", "gemma-embedding.", 1): value for key, value in found.items()}


CHECKPOINT = CheckpointForm(
    classes={"Gemma3TextModel": "gemma3_text"},
    needs_class=True,
    metadata=checkpoint_metadata,
    extra=gemma3.wide_factors,
    layer=GEMMA_LAYER | QK_NORMS,
    norm_shift=1.0,
    space_prefix=False,
    has_projections=True,
)
