"""DFlash: a few layers that draft a whole block in one step, from the last token and as many masks as are to come.

Tokens of a block see each other both ways, and the features of all tokens before: a layer keeps keys and values of
these, by its own matrices, in the places of the tokens that they are of. A block's own are only there for its step.
"""

from __future__ import annotations

import numpy as np

from edgellm.formats.errors import FormatError
from edgellm.formats.model_file import ModelFile
from edgellm.kernels.ops import ApplyRope, SelectOutputs, StoreKV
from edgellm.kernels.program import Program
from edgellm.models.drafts import DraftProgram, Target, borrow, own, read_ids, target_layers, with_vocabulary
from edgellm.models.drafts.features import Features
from edgellm.models.parts.blocks import ProgramBuilder, feed_forward, self_attention, the_rope
from edgellm.models.parts.checkpoint_config import CheckpointConfig
from edgellm.models.parts.checkpoint_form import (
    DECODER,
    DECODER_LAYER,
    QK_NORMS,
    CheckpointForm,
    TypedMetadata,
    decoder_metadata,
    refuse_activation,
    refuse_sliding_layers,
)
from edgellm.models.parts.hparams import BROKEN_FILE, HParams, file_name, integer, read_hparams

MASK = "tokenizer.ggml.mask_token_id"


def build(gguf: ModelFile, target: Target) -> DraftProgram:
    """Layers as those of Qwen 3, and what puts features in their cache. UnsupportedError for what has more than that"""
    hp = with_vocabulary(read_hparams(gguf), gguf, target)
    layers = target_layers(gguf, target)
    m = ProgramBuilder(gguf, hp)
    ids = read_ids(m, target)
    borrow(m, target, head=ids is None)
    features = Features(
        layers,
        own(m, "fc.weight", hp.n_embd, len(layers) * target.n_embd),
        behind=own(m, "enc.output_norm.weight", hp.n_embd),
        eps=hp.eps,
    )
    m.ropes = {"rope": the_rope(m, adjacent=False)}
    m.embed("x")
    for i in range(hp.n_layer):
        blk = f"blk.{i}"
        m.norm("x", f"{blk}.attn_norm", "h")
        self_attention(m, blk, qk_norms="heads")
        m.add("x", "proj", "x")
        m.norm("x", f"{blk}.ffn_norm", "h")
        feed_forward(m, blk, "silu")
        m.add("x", "proj", "x")
    m.select_outputs("x", "x_out")
    m.rms_norm("x_out", "output_norm", "h_out")
    m.hidden = "h_out"
    m.linear("h_out", "output", Program.output, hp.n_vocab if ids is None else len(ids))
    block = integer(gguf, "block_size", 16)
    return DraftProgram(m.finish(), features, ids, _keeper(gguf, hp, m), (block, _mask(gguf, hp)))


def _keeper(gguf: ModelFile, hp: HParams, of: ProgramBuilder) -> Program:
    """The program that puts rows of features into the cache of the other one, layer by layer."""
    m = ProgramBuilder(gguf, hp)
    m.found, m.ropes, m.cache_layers = of.found, of.ropes, of.cache_layers
    m.embed("features")
    n_k, n_v = hp.n_head_kv * hp.head_dim_k, hp.n_head_kv * hp.head_dim_v
    for i in range(hp.n_layer):
        m.linear("features", f"blk.{i}.attn_k", "k", n_k)
        m.linear("features", f"blk.{i}.attn_v", "v", n_v)
        m.rms_norm("k", f"blk.{i}.attn_k_norm", "k", hp.head_dim_k)
        m.ops += [ApplyRope("k", hp.head_dim_k, "rope"), StoreKV("k", "v", i)]
    m.ops.append(SelectOutputs("features", m.buffer(Program.output, hp.n_embd, "outputs")))
    m.used |= set(m.found)  # the rest is the other program's
    return m.finish()


def _mask(gguf: ModelFile, hp: HParams) -> int:
    mask = gguf.metadata.get(MASK)
    if type(mask) is not int or not 0 <= mask < hp.n_vocab:
        raise FormatError(
            f"{file_name(gguf)}: {MASK} is {mask!r}, expected an id of the vocabulary's {hp.n_vocab}. {BROKEN_FILE}",
            code="MODEL_HPARAMS",
        )
    return mask


def checkpoint_metadata(config: CheckpointConfig, n_layer: int, n_embd: int, n_vocab: int) -> TypedMetadata:
    """The keys of a draft for a model of these sizes, from config.json."""
    refuse_activation(config, "silu", "swish")
    refuse_sliding_layers(config)
    inner = config.object_of("dflash_config", config.get("dflash_config"))
    both = {key: inner.get(key, config.get(key)) for key in ("block_size", "mask_token_id", "target_layer_ids")}
    for key in inner.keys() - both.keys():
        raise config.refuse(f"dflash_config.{key}", "DFlash drafts without it", inner[key])
    outputs = both["target_layer_ids"]
    if not isinstance(outputs, list) or not outputs or any(type(one) is not int or one < 0 for one in outputs):
        raise config.wrong("target_layer_ids", outputs, "an array of numbers of layers")
    found = decoder_metadata(config, "dflash")
    found |= {
        "dflash.vocab_size": (n_vocab, "UINT32"),
        "dflash.rope.dimension_count": (config.head_dim, "UINT32"),
        "dflash.block_size": (config.integer_of("block_size", both["block_size"]), "UINT32"),
        "dflash.target_layers": (np.array(outputs, np.int32) + 1, "ARRAY[INT32]"),  # the inputs of those behind
        MASK: (config.integer_of("mask_token_id", both["mask_token_id"]), "UINT32"),
    }
    return found


CHECKPOINT = CheckpointForm(
    classes={"DFlashDraftModel": "dflash"},
    metadata=lambda config: checkpoint_metadata(config, config.n_layer, config.integer("hidden_size"), 1),
    layer=DECODER_LAYER | QK_NORMS,
    around=DECODER | {"fc": "fc", "hidden_norm": "enc.output_norm"},
)
