"""Which type every tensor gets: llama-quantize's mixes and options, tensor by tensor and in its order.

A mix such as Q4_K_M names a type for most matrices and gives some more bits: the first, last and every third layer
of ``attn_v`` and ``ffn_down``, the output matrix, the token embedding where it is the output matrix too. Vectors, norms
and a few small matrices stay as they are. A row that the type's blocks do not divide falls back to smaller blocks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from edgellm.formats.errors import ParameterError, UnsupportedError
from edgellm.formats.file_types import WRITTEN
from edgellm.formats.quant_types import QUANT_TYPES, QuantType
from edgellm.formats.stored_numbers import FLOATS
from edgellm.kernels.cpu.encoders import ENCODED
from edgellm.quantize.input_model import InputModel, InputTensor

COPY = "COPY"  # every tensor as it is

ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M", "MXFP4": "MXFP4_MOE"}

FALLBACKS = {
    **dict.fromkeys(("Q2_K", "Q3_K", "TQ1_0", "TQ2_0"), "Q4_0"),
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
    "IQ4_XS": "IQ4_NL",
}
"""The type with smaller blocks for a row that a type's blocks do not divide; F16 where those do not either."""


@dataclass(frozen=True)
class Recipe:
    """What the user asked for.

    file_type        a name of formats.file_types, or COPY
    pure             every matrix gets the file's type, no mix
    overrides        (regular expression, type) for tensor names; the first that is found counts
    output_type      of output.weight; embedding_type: of the token embeddings
    leave_output     output.weight stays as it is
    """

    file_type: str
    pure: bool = False
    overrides: tuple[tuple[re.Pattern[str], str], ...] = ()
    output_type: str | None = None
    embedding_type: str | None = None
    leave_output: bool = False


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor, the type it gets, and what is to be said about that ("" if nothing)."""

    source: InputTensor
    target: QuantType
    note: str = ""
    needs_importance: bool = False

    @property
    def name(self) -> str:
        """The tensor's name."""
        return self.source.name

    @property
    def changes(self) -> bool:
        """Whether the tensor is encoded anew."""
        return self.source.quant is not self.target

    @property
    def nbytes(self) -> int:
        """Bytes it will have."""
        return self.target.nbytes(self.source.shape)


def parse_file_type(name: str) -> str:
    """The name of a mix, in any case; UnsupportedError for a type that edgellm does not write."""
    wanted = ALIASES.get(name.upper(), name.upper())
    if wanted not in (*WRITTEN, COPY):
        known = ", ".join((*WRITTEN, COPY))
        raise UnsupportedError(f"{name!r} is no type that edgellm writes. Choose one of {known}.", code="QUANTIZE_TYPE")
    return wanted


def parse_tensor_type(name: str) -> str:
    """The tensor type of a name in any case; UnsupportedError for one that edgellm does not write."""
    if name.upper() not in ENCODED:
        raise UnsupportedError(
            f"{name!r} is no tensor type that edgellm writes. Choose one of {', '.join(ENCODED)}.", code="QUANTIZE_TYPE"
        )
    return name.upper()


def parse_override(text: str) -> tuple[re.Pattern[str], str]:
    """``RE=TYPE`` of --tensor-type, such as ``ffn_down=q6_k``."""
    expression, equals, quant = text.rpartition("=")
    if not equals or not expression or not quant:
        raise ParameterError(f"{text!r} is no REGEX=TYPE such as 'ffn_down=q6_k'.")
    try:
        return re.compile(expression.lower()), parse_tensor_type(quant)
    except re.error as error:
        raise ParameterError(f"{expression!r} is no regular expression: {error}.") from error


# ---- the model -------------------------------------------------------------------------------------------------------


@dataclass
class _Model:
    """What the rules ask of a model, and how many of a kind have gone by."""

    architecture: str
    n_layer: int
    n_gqa: int
    n_expert: int
    is_70b: bool
    n_attn_v: int
    tied: bool
    seen: dict[str, int] = field(default_factory=dict)

    def next(self, kind: str) -> int:
        """The number of this one among its kind."""
        number = self.seen.get(kind, 0)
        self.seen[kind] = number + 1
        return number


_LAYERS_OF_70B = {"qwen2": 80, "deci": 80, "olmo": 80, "jais2": 68}


def _model(source: InputModel, names: Iterable[str]) -> _Model:
    architecture = source.architecture

    def number(key: str, default: int) -> int:
        value = source.metadata.get(f"{architecture}.{key}", (default, ""))[0]
        first = value if isinstance(value, int | float) else next(iter(value), default)  # one for all layers, or a list
        return int(first)

    n_layer, n_head = number("block_count", 0), number("attention.head_count", 0)
    n_head_kv, n_expert = number("attention.head_count_kv", n_head), number("expert_count", 0)
    if architecture == "llama":
        is_70b = n_layer == 80 and n_head != n_head_kv and n_expert != 8
    else:
        is_70b = n_layer == _LAYERS_OF_70B.get(architecture)
    kinds = [_kind(name) for name in names]
    n_gqa = n_head // n_head_kv if n_head_kv else 0
    n_attn_v = sum(kind in _LIKE_ATTN_V for kind in kinds)
    return _Model(architecture, n_layer, n_gqa, n_expert, is_70b, n_attn_v, "output" not in kinds)


_KINDS = (
    "attn_qkv.weight",
    "attn_kv_b.weight",
    "attn_v.weight",
    "attn_k.weight",
    "attn_q.weight",
    "attn_output.weight",
)
_LIKE_ATTN_V = ("attn_v", "attn_qkv", "attn_kv_b")
_EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")


def _kind(name: str) -> str:
    """What a tensor is for, as the rules see it."""
    if name == "output.weight":
        return "output"
    if name in _EMBEDDINGS:
        return "token_embd"
    for kind in (*_KINDS, "ffn_up", "ffn_gate", "ffn_down"):
        if kind in name:
            return kind.removesuffix(".weight")
    return ""


# parts of names of matrices that are too small, or matter too much, to be quantized
_KEPT = (
    *("_norm.weight", "ffn_gate_inp.weight", "ffn_gate_tid2eid.weight", "altup", "laurel", "per_layer_model_proj"),
    *("ssm_conv1d", "shortconv.conv.weight", "indexer.k_proj.weight", "indexer.q_proj.weight"),
    *(
        f"time_mix_{part}.weight"
        for part in ("first", "w0", "w1", "w2", "v0", "v1", "v2", "a0", "a1", "a2", "g1", "g2")
    ),
    *("time_mix_decay_w1.weight", "time_mix_decay_w2.weight", "time_mix_lerp_fused.weight", "attn_rel_b.weight"),
    *(".position_embd", "sam.pos_embd", "sam.neck.", "sam.net_", ".rel_pos", ".patch_embd", ".patch_merger"),
    *("a.rvq.codebook", "mm.a.code_embd"),
)
_KEPT_WHOLE = ("position_embd.weight", "token_types.weight")


def _is_quantized_at_all(tensor: InputTensor, recipe: Recipe) -> bool:
    name = tensor.name
    if tensor.n_rows == 1 or not name.endswith("weight"):  # a row of one is a vector to ggml
        return False
    if recipe.file_type == COPY or name in _KEPT_WHOLE or (recipe.leave_output and name == "output.weight"):
        return False
    return not any(part in name for part in _KEPT)


# ---- the rules -------------------------------------------------------------------------------------------------------


def plan(
    source: InputModel, recipe: Recipe, *, with_importance: bool = False, keep_order: bool = False
) -> list[PlannedTensor]:
    """The type of every tensor, in llama-quantize's order (that of the source with ``keep_order``).

    The rules count tensors of a kind as they go by, so the order is part of them.
    """
    names = list(source.tensors)
    if not keep_order:
        names.sort(key=_by_layer)
    model = _model(source, names)
    return [_planned(source.tensors[name], recipe, model, with_importance) for name in names]


def _by_layer(name: str) -> tuple[int, bytes]:
    found = re.match(r"blk\.(\d+)\.", name)
    return (int(found[1]) if found else -1), name.encode()


def _planned(tensor: InputTensor, recipe: Recipe, model: _Model, with_importance: bool) -> PlannedTensor:
    if not _is_quantized_at_all(tensor, recipe):
        return PlannedTensor(tensor, tensor.quant)
    quant = _wanted_type(tensor, recipe, model, with_importance)
    fitting = _fitting_type(tensor, quant)
    note = ""
    if fitting != quant:
        note = f"{quant} needs rows of a multiple of {QUANT_TYPES[quant].block_size}, these have {tensor.n_in}"
        quant = fitting
    needs = quant == "Q2_K" and recipe.file_type == "Q2_K_S" and _kind(tensor.name) not in ("output", "token_embd")
    return PlannedTensor(tensor, QUANT_TYPES[quant], note, needs)


def _wanted_type(tensor: InputTensor, recipe: Recipe, model: _Model, with_importance: bool) -> str:
    """The type by the options, else by the mix."""
    kind, name, default = _kind(tensor.name), tensor.name, WRITTEN[recipe.file_type].quant
    named = next((quant for expression, quant in recipe.overrides if expression.search(name)), None)
    # the table of embeddings per layer follows --token-embedding-type unless an override names it
    if recipe.embedding_type and kind == "token_embd" and not (name == _EMBEDDINGS[1] and named):
        return recipe.embedding_type
    if recipe.output_type and kind == "output":
        return recipe.output_type
    if default in FLOATS:
        return default
    if named is not None:
        return named
    return default if recipe.pure else _mixed_type(tensor, kind, recipe, model, with_importance)


def _fitting_type(tensor: InputTensor, quant: str) -> str:
    """The type itself, or what takes its place where its blocks do not divide the row."""
    if tensor.n_in % QUANT_TYPES[quant].block_size == 0:
        return quant
    smaller = FALLBACKS.get(quant, quant)
    return smaller if tensor.n_in % QUANT_TYPES[smaller].block_size == 0 else "F16"


def _mixed_type(tensor: InputTensor, kind: str, recipe: Recipe, model: _Model, with_importance: bool) -> str:
    default = WRITTEN[recipe.file_type].quant
    if kind == "output" or (model.tied and kind == "token_embd"):
        return _output_type(tensor, recipe, model, default)
    if recipe.file_type == "MXFP4_MOE":
        is_expert = len(tensor.shape) > 2 and tensor.shape[-3] > 1
        if model.architecture == "bailingmoe3":
            is_expert = is_expert and kind in ("ffn_up", "ffn_gate", "ffn_down")
        return "MXFP4" if is_expert else "Q8_0"
    if kind == "token_embd":
        return "Q4_K" if recipe.file_type in ("TQ1_0", "TQ2_0") else default
    rule = _RULES.get(kind)
    return rule(recipe.file_type, tensor.name, model, with_importance) or default if rule else default


def _output_type(tensor: InputTensor, recipe: Recipe, model: _Model, default: str) -> str:
    if recipe.output_type:
        return recipe.output_type
    if recipe.file_type == "MXFP4_MOE" or model.architecture == "falcon":
        return "Q8_0"
    if tensor.n_in % QUANT_TYPES[default].block_size != 0 or default == "Q8_0":
        return "Q8_0"
    return "Q6_K"


def _more_bits(i: int, n: int) -> bool:
    """The first and last eighth, and every third between."""
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


def _attn_v(file_type: str, name: str, model: _Model, with_importance: bool) -> str | None:
    i, n = model.next("attn_v"), model.n_attn_v
    quant = None
    if file_type == "Q2_K":
        quant = "Q4_K" if model.n_gqa >= 4 else "Q3_K"
    elif file_type == "Q2_K_S" and model.n_gqa >= 4:
        quant = "Q4_K"
    elif file_type == "Q3_K_M":
        quant = "Q5_K" if i < 2 else "Q4_K"
    elif file_type == "Q3_K_L" or (file_type in ("IQ4_NL", "IQ4_XS") and model.n_gqa >= 4):
        quant = "Q5_K"
    elif file_type in ("Q4_K_M", "Q5_K_M") and _more_bits(i, n):
        quant = "Q6_K"
    elif file_type == "Q4_K_S" and i < 4:
        quant = "Q5_K"
    if model.is_70b and (quant or WRITTEN[file_type].quant) in ("Q3_K", "Q4_K"):
        quant = "Q5_K"  # eight heads share it there, so it is small
    return "Q8_0" if model.n_expert == 8 else quant


def _attn_k(file_type: str, name: str, model: _Model, with_importance: bool) -> str | None:
    return "Q8_0" if model.n_expert == 8 else None


def _layer(kind: str, name: str, model: _Model) -> int:
    """The layer of a tensor: counted, or by its name where experts make several of a kind."""
    number = model.next(kind)
    if model.n_expert <= 1:
        return number
    found = re.match(r"blk\.(\d+)\.", name)
    if found is None or int(found[1]) >= model.n_layer:
        raise UnsupportedError(
            f"{name}: its layer cannot be told from its name, and the mixes of a mixture of experts need it. "
            "Use --pure.",
            code="QUANTIZE_LAYER",
        )
    return int(found[1])


def _ffn_down(file_type: str, name: str, model: _Model, with_importance: bool) -> str | None:
    i, n, falcon = _layer("ffn_down", name, model), model.n_layer, model.architecture == "falcon"
    if file_type == "Q2_K":
        return "Q3_K"
    if file_type == "Q2_K_S":
        return "Q4_K" if i < n // 8 else None
    if file_type == "Q3_K_M":
        return "Q5_K" if i < n // 16 else "Q4_K" if not falcon or _more_bits(i, n) else "Q3_K"
    if file_type == "Q3_K_L":
        return "Q4_K" if falcon else "Q5_K"
    if file_type == "Q4_K_M" and falcon:
        return "Q6_K" if i < n // 16 else "Q5_K" if _more_bits(i, n) else "Q4_K"
    if file_type in ("Q4_K_M", "Q5_K_M"):
        return "Q6_K" if _more_bits(i, n) else None
    if i >= n // 8:
        return None
    if (file_type in ("IQ4_NL", "IQ4_XS") and not with_importance) or (file_type == "Q4_K_S" and not falcon):
        return "Q5_K"
    # with an importance the first layers may go wild in Q4_0 and Q5_0
    return {"Q4_0": "Q4_1", "Q5_0": "Q5_1"}.get(file_type) if with_importance else None


_EIGHT_EXPERTS = ("Q2_K", "Q3_K_S", "Q3_K_M", "IQ4_NL", "Q4_K_S", "Q4_K_M", "IQ4_XS")


def _attn_output(file_type: str, name: str, model: _Model, with_importance: bool) -> str | None:
    if model.architecture == "falcon":
        return "Q4_K" if file_type == "Q3_K_L" else None
    if model.n_expert == 8:
        return "Q5_K" if file_type in _EIGHT_EXPERTS else None
    return {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K"}.get(file_type)


_Rule = Callable[[str, str, _Model, bool], str | None]
_RULES: dict[str, _Rule] = {
    **dict.fromkeys(_LIKE_ATTN_V, _attn_v),
    "attn_k": _attn_k,
    "ffn_down": _ffn_down,
    "attn_output": _attn_output,
}
