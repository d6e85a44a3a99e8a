"""What architecture files are made of: a program that grows op by op, and the parts that decoders share.

Every weight is asked for by its GGUF name together with the shape that the hyperparameters demand, and compared
exactly: after ``finish`` no executor needs to look at a shape again. Buffers are few and the same in every layer:

    x     the residual stream            h         the normed input of a block
    q k v attn   the attention           proj      what a block adds to x
    gate up ffn  the feed-forward        x_out h_out logits   the rows that want logits
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Literal, cast

import numpy as np

from edgellm.formats.errors import FormatError, UnsupportedError
from edgellm.formats.gguf import QuantizedTensor, stacked_experts
from edgellm.formats.quant_types import QUANT_TYPES
from edgellm.kernels.kv import CacheLayer, KVLayer
from edgellm.kernels.ops import (
    Activate,
    Add,
    AddRows,
    ApplyRope,
    Attention,
    Clamp,
    Embed,
    GatedUnit,
    LayerNorm,
    Matmul,
    Op,
    RMSNorm,
    Scale,
    SelectOutputs,
    SelfAttention,
    SigmoidGate,
    Softcap,
    SplitHeads,
    StoreKV,
)
from edgellm.kernels.ops.elementwise import Activation, Curve
from edgellm.kernels.ops.encoder import Index
from edgellm.kernels.pooling import Pooling
from edgellm.kernels.program import Buffer, Program, RowKind
from edgellm.kernels.rope import Rope
from edgellm.models.parts.hparam_keys import check_keys
from edgellm.models.parts.hparams import (
    BROKEN_FILE,
    HParams,
    file_name,
    hparam_error,
    integer,
    read_hparams,
    read_rope,
    real,
)
from edgellm.models.parts.pooling import read_pooling

if TYPE_CHECKING:
    from edgellm.formats.model_file import ModelFile, ModelTensor

# a vision tower, stored rotation tables, and what inputs are divided by before they are rounded to four bits: a text
# model computes the same without them
IGNORED_PREFIXES = ("v.", "a.", "mm.", "mtp.")  # what sees, hears, brings both to the text, and drafts
IGNORED_SUFFIXES = (".attn_rot_embd", ".attn_rot_embd.weight", ".input_scale")


class ProgramBuilder:
    """Collects ops, buffers, tensors, caches and rotations; ``finish`` makes the program of them."""

    def __init__(self, gguf: ModelFile, hp: HParams) -> None:
        """UnsupportedError for a hyperparameter that no program would hold."""
        check_keys(gguf)
        self.gguf = gguf
        self.found: dict[str, ModelTensor] = stacked_experts(gguf.tensors)
        self.hp = hp
        self.ops: list[Op] = []
        self.buffers: dict[str, Buffer] = {}
        self.tensors: dict[str, QuantizedTensor] = {}
        self.used: set[str] = set()  # tensors that the program holds, or that were read while building it
        self.cache_layers: list[CacheLayer] = []
        self.ropes: dict[str, Rope] = {}
        self.layer_norms = False  # what ``norm`` makes
        self.norms_need_bias = False
        self.bare_norms = False  # that have neither weight nor bias
        self.clamp = 0.0  # what q, k and v are cut off at, 0 where they are not
        self.both_ways = False  # what ``attention`` sees
        self.hidden = ""
        self.pooling: Pooling | None = None

    def weight(self, name: str, *shape: int) -> str:
        """Take a tensor of exactly this shape into the program."""
        self.tensors[name] = cast("QuantizedTensor", self.checked(name, *shape))  # by whoever runs the program
        return name

    def checked(self, name: str, *shape: int) -> ModelTensor:
        """The tensor; FormatError when it is missing or not of exactly this shape."""
        if name not in self.found:
            apart = name.removesuffix("_exps.weight") + ".0.weight"
            reason = f" as one or, like {apart}, of one shape and type for each expert" if apart in self.found else ""
            raise FormatError(
                f"{file_name(self.gguf)}: the tensor {name} is missing; a {self.gguf.architecture} model with "
                f"{self.hp.n_layer} layers must have it{reason}. {BROKEN_FILE}",
                code="MODEL_TENSOR_MISSING",
            )
        tensor = self.found[name]
        if tuple(tensor.shape) != shape:
            raise FormatError(
                f"{file_name(self.gguf)}: {name} has the shape {tuple(tensor.shape)}, the metadata demand {shape}. "
                f"{BROKEN_FILE}",
                code="MODEL_SHAPE",
            )
        self.used.add(name)
        return tensor

    def buffer(self, name: str, width: int, rows: RowKind = "tokens", dtype: str = "float32") -> str:
        """Declare a buffer, or use it again in the same shape."""
        wanted = Buffer(name, width, rows, dtype)
        known = self.buffers.setdefault(name, wanted)
        assert known == wanted, f"buffer {name} has two shapes"
        return name

    def part(self, of: str, first: int, width: int) -> str:
        """Columns of a buffer, as a buffer of their own."""
        name = f"{of}[{first}:{first + width}]"
        self.buffers[name] = replace(self.buffers[of], name=name, width=width, of=of, first=first)
        return name

    def like(self, x: str, out: str) -> str:
        """Declare ``out`` in the shape of ``x``."""
        return self.buffer(out, self.buffers[x].width, self.buffers[x].rows)

    def embed(self, out: str, scale: float = 1.0) -> None:
        """out = scale * token_embd[token]"""
        weight = self.weight("token_embd.weight", self.hp.n_vocab, self.hp.n_embd)
        self.ops.append(Embed(weight, self.buffer(out, self.hp.n_embd), scale))

    def rms_norm(self, x: str, name: str, out: str, width: int | None = None) -> None:
        """out = RMSNorm(x), over whole rows or over heads of ``width``."""
        weight = self.weight(f"{name}.weight", width or self.buffers[x].width)
        self.ops.append(RMSNorm(x, weight, self.like(x, out), self.hp.eps))

    def norm(self, x: str, name: str, out: str) -> None:
        """out = norm(x), of the kind that the architecture has around its blocks."""
        if self.bare_norms:
            self.ops.append(LayerNorm(x, self.ones(self.buffers[x].width), self.like(x, out), self.hp.eps))
        elif self.layer_norms:
            self.layer_norm(x, name, out, needs_bias=self.norms_need_bias)
        else:
            self.rms_norm(x, name, out)

    def layer_norm(self, x: str, name: str, out: str, *, needs_bias: bool = False) -> None:
        """out = LayerNorm(x), with the bias where the file has one."""
        width = self.buffers[x].width
        weight = self.weight(f"{name}.weight", width)
        has_bias = needs_bias or f"{name}.bias" in self.gguf.tensors
        bias = self.weight(f"{name}.bias", width) if has_bias else None
        self.ops.append(LayerNorm(x, weight, self.like(x, out), self.hp.eps, bias))

    def layer_norm_heads(self, x: str, name: str, n_heads: int) -> None:
        """x = LayerNorm(x), each head by its own row of the weight."""
        width = self.buffers[x].width // n_heads
        rows = self.checked(f"{name}.weight", n_heads, width).dequantize().reshape(n_heads, 1, width)
        for i, row in enumerate(rows):
            head, weight = self.part(x, i * width, width), f"{name}.weight[{i}]"
            self.tensors[weight] = QuantizedTensor(weight, (width,), QUANT_TYPES["F32"], row.view(np.uint8))
            self.ops.append(LayerNorm(head, weight, head, self.hp.eps))

    def linear(
        self, x: str, name: str, out: str, n_out: int, *, needs_bias: bool = False, bias_of: str | None = None
    ) -> None:
        """out = x W^T, times the scale and plus the bias where the file has them, that of ``bias_of`` or its own."""
        rows = self.buffers[x].rows
        weight = self.weight(f"{name}.weight", n_out, self.buffers[x].width)
        if name != "token_embd" and f"{name}.scale" in self.gguf.tensors:
            self._scale(name)
        bias_name = f"{bias_of or name}.bias"
        has_bias = needs_bias or bias_name in self.gguf.tensors
        bias = self.weight(bias_name, n_out) if has_bias else None
        self.ops.append(Matmul(x, weight, self.buffer(out, n_out, rows), bias))

    def row_weight(self, name: str, width: int) -> str:
        """Take a vector into the program as a matrix of one row, which it may be stored as."""
        shape = (1, width) if name in self.gguf.tensors and len(self.gguf.tensors[name].shape) == 2 else (width,)
        tensor = cast("QuantizedTensor", self.checked(name, *shape))
        self.tensors[name] = replace(tensor, shape=(1, width))
        return name

    def ones(self, width: int) -> str:
        """The weight of a norm that has none."""
        name = f"ones.{width}"
        data = np.ones((1, width), np.float32).view(np.uint8)
        self.tensors[name] = QuantizedTensor(name, (width,), QUANT_TYPES["F32"], data)
        return name

    def scaled(self, name: str, scale: float, *shape: int) -> str:
        """Take a tensor into the program whose numbers are all to be multiplied by ``scale``."""
        self.tensors[name] = self.tensors[self.weight(name, *shape)].times(scale)
        return name

    def number(self, name: str) -> float:
        """The one number of a tensor; FormatError where it is NaN or infinite."""
        return self.numbers(name, 1)[0]

    def numbers(self, name: str, n: int) -> list[float]:
        """The n numbers of a tensor; FormatError where one is NaN or infinite."""
        values: list[float] = self.checked(name, n).dequantize().reshape(-1).tolist()
        for value in values:
            if not math.isfinite(value):
                raise FormatError(
                    f"{file_name(self.gguf)}: {name} has {value}, expected a number. {BROKEN_FILE}", code="TENSOR_NAN"
                )
        return values

    def _scale(self, name: str) -> None:
        """Multiply a matrix by the one number that stands beside it, as NVFP4 files have it."""
        scale = self.number(f"{name}.scale")
        self.tensors[f"{name}.weight"] = self.tensors[f"{name}.weight"].times(scale)

    def cache_layer(self, layer: CacheLayer) -> int:
        """Take a layer into the cache; its number."""
        self.cache_layers.append(layer)
        return len(self.cache_layers) - 1

    def attention(
        self, q: str, k: str, v: str, out: str, *, scale: float, window: int = 0, softcap: float = 0.0,
        sinks: str | None = None,
    ) -> None:  # fmt: skip
        """Store k and v in a cache of their own, then out = softmax(scale q k^T) v over it.

        Where tokens see both ways nothing is kept: ``self_attention``.
        """
        hp = self.hp
        if self.both_ways:
            self.self_attention(q, k, v, out, scale=scale)
            return
        layer = self.cache_layer(KVLayer(hp.n_head_kv, hp.head_dim_k, hp.head_dim_v, window))
        self.ops.append(StoreKV(k, v, layer))
        buffer = self.buffer(out, hp.n_head * hp.head_dim_v)
        self.ops.append(Attention(q, buffer, layer, hp.n_head, scale, softcap, sinks))

    def self_attention(
        self, q: str, k: str, v: str, out: str, *, scale: float | None = None, reach: int = 0, fades: bool = False
    ) -> None:
        """out = softmax(scale q k^T) v within each text, both ways; ``scale`` is else 1/sqrt(head size).

        reach   tokens further away are not seen; 0: all are
        fades   scores lose by the distance, see ``SelfAttention``
        """
        hp = self.hp
        buffer = self.buffer(out, hp.n_head * hp.head_dim_v)
        scale = scale or 1 / math.sqrt(hp.head_dim_k)
        self.ops.append(SelfAttention(q, k, v, buffer, hp.n_head, hp.n_head_kv, scale, reach, fades))

    def activate(self, x: str, out: str, activation: Curve) -> None:
        """out = activation(x)"""
        self.ops.append(Activate(x, self.like(x, out), activation))

    def add_rows(self, x: str, name: str, out: str, *, of: Index, n_rows: int) -> None:
        """out[t] = x[t] + the row of a table for the position, or the type, of t; the table has ``n_rows``."""
        weight = self.weight(f"{name}.weight", n_rows, self.buffers[x].width)
        self.ops.append(AddRows(x, weight, self.like(x, out), of))

    def add_row(self, x: str, name: str, out: str) -> None:
        """out = x + a vector, for every token"""
        self.ops.append(AddRows(x, self.row_weight(name, self.buffers[x].width), self.like(x, out), "none"))

    def gated_unit(self, gate: str, up: str, out: str, activation: Activation) -> None:
        """out = activation(gate) * up"""
        self.ops.append(GatedUnit(gate, up, self.like(gate, out), activation))

    def add(self, x: str, y: str, out: str, scale: float = 1.0) -> None:
        """out = x + scale * y"""
        self.ops.append(Add(x, y, self.like(x, out), scale))

    def select_outputs(self, x: str, out: str) -> None:
        """out = the rows of x that want logits"""
        self.ops.append(SelectOutputs(x, self.buffer(out, self.buffers[x].width, "outputs")))

    def finish(self, *, is_encoder: bool = False) -> Program:
        """The program. UnsupportedError if the file has weights that the program would leave out."""
        unused = [
            name
            for name in self.found
            if name not in self.used and not name.startswith(IGNORED_PREFIXES) and not name.endswith(IGNORED_SUFFIXES)
        ]
        if unused:
            raise UnsupportedError(
                f"{file_name(self.gguf)}: {len(unused)} tensors have no place in the architecture "
                f"{self.gguf.architecture} as edgellm knows it ({', '.join(unused[:3])}{' ...' * (len(unused) > 3)}); "
                "without them the answers would be wrong. Take another conversion of the model.",
                code="MODEL_TENSOR_UNKNOWN",
            )
        return Program(
            architecture=self.gguf.architecture,
            ops=tuple(self.ops),
            buffers=self.buffers,
            tensors=self.tensors,
            cache_layers=tuple(self.cache_layers),
            ropes=self.ropes,
            n_vocab=self.hp.n_vocab,
            context_length=self.hp.context_length,
            n_embd=self.hp.n_embd,
            output=self.hidden if is_encoder else Program.output,
            hidden=self.hidden,
            is_encoder=is_encoder,
            pooling=self.pooling,
        )


QKNorms = Literal["none", "heads", "rows", "turned heads", "unlike heads"]
"""What is normed of q and k: each head by itself or a row as a whole, before they are rotated; or heads behind that; or
each head by LayerNorm and a weight of its own, before."""


@dataclass(frozen=True)
class Scales:
    """Numbers that multiply: embeddings, what a block adds to x, scores (None: 1/sqrt(head size)), logits.

    softcap      of scores, see ``Attention``
    logits_cap   of logits, see ``Softcap``; 0 for none
    """

    embeddings: float = 1.0
    residual: float = 1.0
    scores: float | None = None
    logits: float = 1.0
    softcap: float = 0.0
    logits_cap: float = 0.0


@dataclass(frozen=True)
class BlockNorms:
    """Names of a layer's norms, "" where there is none: of what attention reads and makes, and the feed-forward.

    A feed-forward without a norm reads what attention read; without any norm both read x.
    """

    attention: str = "attn_norm"
    behind_attention: str = ""
    ffn: str = "ffn_norm"
    behind_ffn: str = ""


AFTER = BlockNorms("", "post_attention_norm", "", "post_ffw_norm")
AROUND = BlockNorms("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm")


@dataclass(frozen=True)
class LayerKind:
    """What a layer sees: the name of its rotation, None for none, and its window, 0 for all positions.

    q_rope   the rotation of queries, where it is another than that of keys
    """

    rope: str | None = "rope"
    window: int = 0
    q_rope: str | None = None


def build_decoder(
    gguf: ModelFile,
    *,
    adjacent: bool,
    window: int = 0,
    rotates: bool = True,
    needs_bias: str = "",
    qk_norms: QKNorms = "none",
    scales: Scales = Scales(),
    ffn: Callable[[ProgramBuilder, str], None] | None = None,
    norms: BlockNorms = BlockNorms(),
    ropes: Callable[[ProgramBuilder], dict[str, Rope]] | None = None,
    kinds: Callable[[int], LayerKind] | None = None,
    layer_norms: bool = False,
    bare_norms: bool = False,
    clamp: float = 0.0,
    side_by_side: bool = False,
    adds_positions: bool = False,
    nextn: bool = False,
    both_ways: bool = False,
) -> Program:
    """x += Wo attention(rope(q), rope(k), v);  x += Wdown (silu(Wgate h) * Wup h), each of h = RMSNorm(x).

    adjacent     rotated pairs are neighbours, else half a head apart
    window       positions that a token sees, 0 for all
    rotates      False for a model that knows no positions
    needs_bias   letters of those of q, k, v, o, norms (n) and logits (l) that have one
    ffn          adds the ops from h to proj in place of the last product's
    ropes        makes the rotations, by name, in place of the only one
    kinds        what layer i sees, where layers differ
    layer_norms  norms take the mean away, too, and may have a bias
    bare_norms   they have neither weight nor bias
    clamp        q, k and v are cut off at it on both sides before they are rotated, 0 where they are not
    side_by_side    the feed-forward reads x as it is before attention, not behind it
    adds_positions  a row for each position is added to the embeddings
    nextn        the program of the first of those blocks that draft
    both_ways    a token sees all of its text

    Blocks behind the last one are drafts of the tokens that follow the next, and are left out.
    """
    hp = read_hparams(gguf, eps_key=f"attention.layer_norm_{'' if layer_norms else 'rms_'}epsilon")
    m = ProgramBuilder(gguf, hp)
    m.layer_norms, m.norms_need_bias, m.bare_norms = layer_norms, "n" in needs_bias, bare_norms
    m.clamp, m.both_ways = clamp, both_ways
    turned = ropes(m) if ropes else {"rope": the_rope(m, adjacent=adjacent)}
    m.ropes = turned if rotates else {}

    seen = kinds or (lambda i: LayerKind("rope" if rotates else None, window))
    layer = partial(_decoder_layer, m, seen, scales, needs_bias, qk_norms, ffn, norms, side_by_side)
    if nextn:
        first = begin_nextn(m, scales.embeddings)
        layer(first)
        return finish_nextn(m, first)
    m.embed("x", scales.embeddings)
    if adds_positions:
        m.add_rows("x", "position_embd", "x", of="positions", n_rows=hp.context_length)
    for i in range(hp.n_layer - leave_out_drafts(m)):
        layer(i)
    project_logits(m, scale=scales.logits, cap=scales.logits_cap, needs_bias="l" in needs_bias)
    return m.finish()


def _decoder_layer(
    m: ProgramBuilder,
    kinds: Callable[[int], LayerKind],
    scales: Scales,
    needs_bias: str,
    qk_norms: QKNorms,
    ffn: Callable[[ProgramBuilder, str], None] | None,
    norms: BlockNorms,
    side_by_side: bool,
    i: int,
) -> None:
    """Layer i, as ``build_decoder`` says."""
    blk = f"blk.{i}"
    x = norm_before(m, "x", blk, norms.attention)
    self_attention(
        m, blk, kinds(i), x=x, scale=scales.scores, needs_bias=needs_bias, qk_norms=qk_norms, softcap=scales.softcap
    )
    norm_behind(m, blk, norms.behind_attention)
    if side_by_side:
        x = norm_before(m, "x", blk, norms.ffn) if norms.ffn else x
    m.add("x", "proj", "x", scales.residual)
    if not side_by_side:
        x = norm_before(m, "x", blk, norms.ffn) if norms.ffn else x
    ffn(m, blk) if ffn else feed_forward(m, blk, "silu", x=x)
    norm_behind(m, blk, norms.behind_ffn)
    m.add("x", "proj", "x", scales.residual)


def norm_before(m: ProgramBuilder, x: str, blk: str, name: str) -> str:
    """What a block reads: x, or h = norm(x) where there is a norm of this name."""
    if not name:
        return x
    m.norm(x, f"{blk}.{name}", "h")
    return "h"


def norm_behind(m: ProgramBuilder, blk: str, name: str) -> None:
    """proj = norm(proj), where there is a norm of this name."""
    if name:
        m.norm("proj", f"{blk}.{name}", "proj")


def the_rope(m: ProgramBuilder, *, adjacent: bool, base: float = 10000.0) -> Rope:
    """The rotation of all layers, of this base where the file has none."""
    base = real(m.gguf, "rope.freq_base", base)
    return read_rope(m.gguf, m.hp, base, adjacent=adjacent, factors=rope_factors(m))


def long_rope(m: ProgramBuilder, *, adjacent: bool) -> Rope:
    """The rotation of a model with frequencies for the context it was first trained with, and others for longer ones.

    The run's context decides, as in llama.cpp; transformers goes over to the others once a text is that long.
    """
    names = [f"rope_factors_{kind}.weight" for kind in ("short", "long")]
    if not any(name in m.gguf.tensors for name in names):
        return the_rope(m, adjacent=adjacent)
    base = real(m.gguf, "rope.freq_base", 10000.0)
    short, long = (
        read_rope(m.gguf, m.hp, base, adjacent=adjacent, factors=rope_factors(m, required=True, name=name), long=True)
        for name in names
    )
    length = integer(m.gguf, "rope.scaling.original_context_length", m.hp.context_length)
    return replace(short, beyond=(length, long.inv_freq))


def leave_out_drafts(m: ProgramBuilder) -> int:
    """How many blocks at the end draft the tokens that follow the next: a program does without their tensors."""
    n_drafts, n_layer = integer(m.gguf, "nextn_predict_layers", 0), m.hp.n_layer
    if n_drafts >= n_layer:
        raise hparam_error(m.gguf, "nextn_predict_layers", n_drafts, f"fewer than block_count, which is {n_layer}")
    drafts = tuple(f"blk.{i}." for i in range(n_layer - n_drafts, n_layer))
    m.used |= {name for name in m.gguf.tensors if name.startswith(drafts)}
    return n_drafts


def begin_nextn(m: ProgramBuilder, scale: float = 1.0) -> int:
    """x of the first block that drafts the token after the next, and its number; ``scale`` is that of embeddings.

    Such a block (``nextn``) is a program of its own over the same file. Its row at a position reads the embedding of
    the token there and the hidden state that the model's head had read one position before, or its own for a token that
    was only drafted; ``Batch.embeddings`` brings these states:

        x = [RMSNorm(embedding; enorm) | RMSNorm(state; hnorm)] Weh^T, one layer as the model's own, a norm, the head

    UnsupportedError for a file without one.
    """
    n_drafts = leave_out_drafts(m)
    if not n_drafts:
        raise UnsupportedError(
            f"{file_name(m.gguf)} has no block that drafts tokens (nextn_predict_layers). Take another conversion of "
            "the model, or draft with n-grams or a small model.",
            code="NO_NEXTN",
        )
    hp, number = m.hp, m.hp.n_layer - n_drafts
    blk = f"blk.{number}"
    m.used |= set(m.found)  # the rest is the model's
    m.embed("state")
    own = f"{blk}.nextn.embed_tokens.weight"
    table = m.weight(own if own in m.found else "token_embd.weight", hp.n_vocab, hp.n_embd)
    m.ops.append(Embed(table, m.buffer("embedding", hp.n_embd), scale, embeds=False))
    m.buffer("both", 2 * hp.n_embd)
    for first, x, norm in ((0, "embedding", "enorm"), (hp.n_embd, "state", "hnorm")):
        weight = m.weight(f"{blk}.nextn.{norm}.weight", hp.n_embd)
        m.ops.append(RMSNorm(x, weight, m.part("both", first, hp.n_embd), hp.eps))
    m.linear("both", f"{blk}.nextn.eh_proj", "x", hp.n_embd)
    return number


def finish_nextn(m: ProgramBuilder, number: int) -> Program:
    """The program, with the block's own norm and head where it has them, else the model's."""
    norm, head = (f"blk.{number}.nextn.shared_head_{part}" for part in ("norm", "head"))
    m.select_outputs("x", "x_out")
    m.rms_norm("x_out", norm if f"{norm}.weight" in m.found else "output_norm", "h_out")
    m.hidden = "h_out"
    if f"{head}.weight" not in m.found:
        head = "output" if "output.weight" in m.found else "token_embd"
    m.linear("h_out", head, Program.output, m.hp.n_vocab)
    return m.finish()


def self_attention(
    m: ProgramBuilder,
    blk: str,
    kind: LayerKind = LayerKind(),
    *,
    x: str = "h",
    scale: float | None = None,
    softcap: float = 0.0,
    needs_bias: str = "",
    qk_norms: QKNorms = "none",
    has_sinks: bool = False,
    gated: bool = False,
) -> None:
    """proj = attention(rope(q), rope(k), v) Wo^T of q, k, v = x Wq^T, x Wk^T, x Wv^T; ``scale`` is else 1/sqrt(head)

    softcap, has_sinks   what the softmax of scores has, see ``Attention``
    gated                heads of Wq are [q | gate], and attention is multiplied by sigmoid(gate)
    """
    hp = m.hp
    project_heads(m, blk, x, needs_bias=needs_bias, gated=gated)
    if m.clamp > 0:
        m.ops += [Clamp(name, name, m.clamp) for name in "qkv"]
    width = hp.head_dim_k if qk_norms != "rows" else None
    if qk_norms in ("heads", "rows"):
        m.rms_norm("q", f"{blk}.attn_q_norm", "q", width)
        m.rms_norm("k", f"{blk}.attn_k_norm", "k", width)
    if qk_norms == "unlike heads":
        m.layer_norm_heads("q", f"{blk}.attn_q_norm", hp.n_head)
        m.layer_norm_heads("k", f"{blk}.attn_k_norm", hp.n_head_kv)
    if kind.rope is not None:
        m.ops += [ApplyRope("q", hp.head_dim_k, kind.q_rope or kind.rope), ApplyRope("k", hp.head_dim_k, kind.rope)]
    if qk_norms == "turned heads":
        m.rms_norm("q", f"{blk}.attn_q_norm", "q", width)
        m.rms_norm("k", f"{blk}.attn_k_norm", "k", width)
    sinks = m.weight(f"{blk}.attn_sinks.weight", hp.n_head) if has_sinks else None
    scale = scale or 1 / math.sqrt(hp.head_dim_k)
    m.attention("q", "k", "v", "attn", scale=scale, window=kind.window, softcap=softcap, sinks=sinks)
    if gated:
        m.ops.append(SigmoidGate("attn", "attn_gate", "attn"))
    m.linear("attn", f"{blk}.attn_output", "proj", hp.n_embd, needs_bias="o" in needs_bias)


def project_heads(m: ProgramBuilder, blk: str, x: str, *, needs_bias: str = "", gated: bool = False) -> None:
    """q, k, v = x Wq^T, x Wk^T, x Wv^T, by three matrices or by one that has the rows of all; see ``self_attention``"""
    hp = m.hp
    n_q, n_k, n_v = hp.n_head * hp.head_dim_k, hp.n_head_kv * hp.head_dim_k, hp.n_head_kv * hp.head_dim_v
    if f"{blk}.attn_qkv.weight" in m.gguf.tensors and not gated:
        m.linear(x, f"{blk}.attn_qkv", "qkv", n_q + n_k + n_v, needs_bias=any(letter in needs_bias for letter in "qkv"))
        m.ops.append(SplitHeads("qkv", m.buffer("q", n_q), m.buffer("kv", n_k + n_v), n_q))
        m.ops.append(SplitHeads("kv", m.buffer("k", n_k), m.buffer("v", n_v), n_k))
        return
    m.linear(x, f"{blk}.attn_q", "q_gate" if gated else "q", n_q * (1 + gated), needs_bias="q" in needs_bias)
    if gated:
        m.ops.append(SplitHeads("q_gate", m.buffer("q", n_q), m.buffer("attn_gate", n_q), hp.head_dim_k))
    m.linear(x, f"{blk}.attn_k", "k", n_k, needs_bias="k" in needs_bias)
    m.linear(x, f"{blk}.attn_v", "v", n_v, needs_bias="v" in needs_bias)


def feed_forward(
    m: ProgramBuilder, blk: str, activation: Activation, *, x: str = "h", of: str = "", out: str = "proj"
) -> None:
    """out = (activation(x Wgate^T) * x Wup^T) Wdown^T; without Wgate its rows stand before those of Wup

    of   ends the names of its buffers, where layers have several widths
    """
    gate, up, ffn, n_ff = f"gate{of}", f"up{of}", f"ffn{of}", m.hp.n_ff
    whole = m.gguf.tensors.get(f"{blk}.ffn_up.weight")
    if f"{blk}.ffn_gate.weight" not in m.gguf.tensors and (whole is None or whole.shape[0] == 2 * n_ff):
        m.linear(x, f"{blk}.ffn_up", f"gate_up{of}", 2 * n_ff)
        m.ops.append(SplitHeads(f"gate_up{of}", m.buffer(gate, n_ff), m.buffer(up, n_ff), n_ff))
    else:
        m.linear(x, f"{blk}.ffn_gate", gate, n_ff)
        m.linear(x, f"{blk}.ffn_up", up, n_ff)
    m.gated_unit(gate, up, ffn, activation)
    m.linear(ffn, f"{blk}.ffn_down", out, m.hp.n_embd)


def plain_feed_forward(m: ProgramBuilder, blk: str, curve: Curve, *, x: str = "h", needs_bias: bool = False) -> None:
    """proj = curve(x Wup^T) Wdown^T"""
    m.linear(x, f"{blk}.ffn_up", "up", m.hp.n_ff, needs_bias=needs_bias)
    m.activate("up", "ffn", curve)
    m.linear("ffn", f"{blk}.ffn_down", "proj", m.hp.n_embd, needs_bias=needs_bias)


def project_logits(
    m: ProgramBuilder, norm: str = "output_norm", scale: float = 1.0, *, cap: float = 0.0, needs_bias: bool = False
) -> None:
    """logits = scale * RMSNorm(x) W^T for the rows that want them; without output.weight the embedding is W.

    cap   of the logits, see ``Softcap``; 0 for none
    """
    m.select_outputs("x", "x_out")
    m.norm("x_out", norm, "h_out")
    m.hidden, m.pooling = "h_out", read_pooling(m)
    if scale != 1.0:
        m.ops.append(Scale("h_out", "h_out", scale))
    name = "output" if "output.weight" in m.gguf.tensors else "token_embd"
    m.linear("h_out", name, Program.output, m.hp.n_vocab, needs_bias=needs_bias, bias_of="output")
    if cap:
        m.ops.append(Softcap(Program.output, Program.output, cap))


def rope_factors(m: ProgramBuilder, *, required: bool = False, name: str = "rope_freqs.weight") -> np.ndarray | None:
    """What every frequency is divided by (Llama 3.1 and later), (n_rot / 2,) float32, where the file has it."""
    if name not in m.gguf.tensors and not required:
        return None
    factors = m.checked(name, m.hp.n_rot // 2).dequantize().reshape(-1)
    if not (np.isfinite(factors) & (factors > 0)).all():
        raise FormatError(
            f"{file_name(m.gguf)}: {name} has values that are not positive numbers, expected divisors of "
            f"frequencies. {BROKEN_FILE}",
            code="MODEL_HPARAMS",
        )
    return factors
