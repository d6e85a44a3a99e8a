"""EuroBERT (and jina-embeddings-v5-text-nano): llama's layers, whose tokens see their whole text."""

from __future__ import annotations

from edgellm.formats.model_file import ModelFile
from edgellm.kernels.ops import ApplyRope
from edgellm.kernels.program import Program
from edgellm.models.parts.blocks import ProgramBuilder, feed_forward
from edgellm.models.parts.checkpoint_config import CheckpointConfig
from edgellm.models.parts.checkpoint_form import (
    CheckpointForm,
    TypedMetadata,
    decoder_metadata,
    refuse_activation,
)
from edgellm.models.parts.encoder import check_sees_both_ways, finish_encoder
from edgellm.models.parts.hparams import read_hparams, read_rope, real
from edgellm.models.parts.post_norm import project_qkv


def build(gguf: ModelFile) -> Program:
    """x += Wo attention(rope(q), rope(k), v);  x += Wdown (silu(Wgate h) * Wup h), each of h = RMSNorm(x)."""
    check_sees_both_ways(gguf)
    hp = read_hparams(gguf)
    m = ProgramBuilder(gguf, hp)
    m.ropes["rope"] = read_rope(gguf, hp, real(gguf, "rope.freq_base", 10000.0), adjacent=False)
    m.embed("x")
    for i in range(hp.n_layer):
        blk = f"blk.{i}"
        m.rms_norm("x", f"{blk}.attn_norm", "h")
        q, k, v = project_qkv(m, "h", blk)
        m.ops += [ApplyRope(x, hp.head_dim_k, "rope") for x in (q, k)]
        m.self_attention(q, k, v, "attn")
        m.linear("attn", f"{blk}.attn_output", "proj", hp.n_embd)
        m.add("x", "proj", "x")
        m.rms_norm("x", f"{blk}.ffn_norm", "h")
        feed_forward(m, blk, "silu")
        m.add("x", "proj", "x")
    m.rms_norm("x", "output_norm", "x")
    return finish_encoder(m)


def checkpoint_metadata(config: CheckpointConfig) -> TypedMetadata:
    """The keys of this architecture, from config.json."""
    refuse_activation(config, "silu", "swish")
    found = decoder_metadata(config, "eurobert")
    found["eurobert.attention.causal"] = (False, "BOOL")
    return found


CHECKPOINT = CheckpointForm(
    classes=dict.fromkeys(("EuroBertModel", "EuroBertForMaskedLM"), "eurobert"),
    metadata=checkpoint_metadata,
    around={"model.embed_tokens": "token_embd", "model.norm": "output_norm"},
    leaves_out=lambda _: r"lm_head\..*",
    extra=lambda _: {},
)
