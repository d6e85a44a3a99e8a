"""What a Hugging Face checkpoint of an architecture looks like, and what its GGUF file is to say of it.

Each architecture file has one ``CheckpointForm``: the names its tensors go by, what happens to their numbers, and the
metadata that its own ``build`` reads back. The keys are those that llama.cpp's converter writes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from edgellm.models.parts.checkpoint_config import CheckpointConfig
from edgellm.models.parts.checkpoint_rope import Rotation, TypedMetadata, frequency_factors, rope_metadata, rotation

# a decoder layer's modules in transformers -> in GGUF
DECODER_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
QK_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
GEMMA_LAYER = DECODER_LAYER | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
DECODER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


QKV = frozenset(("attn_q", "attn_k", "attn_v"))
FEED_FORWARD = frozenset(("ffn_gate", "ffn_up", "ffn_down"))


def factors_of(rotate: Callable[[CheckpointConfig], Rotation]) -> Callable[[CheckpointConfig], dict[str, np.ndarray]]:
    """What makes the divisors of frequencies, of a rotation that the architecture reads in a way of its own."""
    return lambda config: frequency_factors(rotate(config))


def _llama3_factors(config: CheckpointConfig) -> dict[str, np.ndarray]:
    return frequency_factors(rotation(config))


def attention_biases(config: CheckpointConfig) -> frozenset[str]:
    """The modules with a bias where ``attention_bias`` says whether they have one."""
    return QKV | {"attn_output"} if config.flag("attention_bias", False) else frozenset()


@dataclass(frozen=True)
class Place:
    """Where a checkpoint's tensor, or a part of it, goes.

    name    of the GGUF tensor
    expert  which of its matrices it is, None for a whole tensor
    part    (i, n): the i-th of n equal parts of the rows, or of each expert's rows
    rows    these of its rows, of as many as ``of`` says, in this order; None for what the other fields say
    """

    name: str
    expert: int | None = None
    part: tuple[int, int] = (0, 1)
    rows: np.ndarray | None = None
    of: int = 0


@dataclass(frozen=True)
class HeadRows:
    """Rows of every head of a checkpoint's matrix as a tensor with a matrix for each head.

    each     rows that a head has there, from ``first`` on the ``n`` that are taken
    turned   whether the matrices are the other way round
    """

    n_heads: int
    each: int
    first: int
    n: int
    turned: bool = False


@dataclass(frozen=True)
class CheckpointForm:
    """How one architecture is kept in a checkpoint.

    classes       names in config.json's ``architectures``, with the ``model_type`` of each; the first is the usual one
    renamed_kinds   other ``model_type``s of the same settings: what they are called -> one of those of ``classes``
    metadata      the keys of the architecture, without tokenizer and name
    biases        modules of a layer that have a bias, by their GGUF names
    layer         modules of a layer: name in the checkpoint -> name in GGUF
    experts       modules of one expert -> the GGUF tensor that holds those of a layer
    stacked       modules of a layer whose rows, or those of every expert, are several GGUF tensors one after another
    pieces        modules of a layer whose rows are those of several GGUF modules: which of them each has, in its order
    by_head       modules of a layer that are a vector for each head, ``norms.0``, ``norms.1`` ..., likewise
    bare          parameters of a layer by their whole names, likewise, with the whole rest of the GGUF names
    numbers       what becomes of the numbers of some tensors of a layer
    factors       of some tensors, by the rest of their names in a layer: what their numbers are multiplied by, one for
                  all or one for each row
    shapes        of some tensors, likewise, that are vectors in the checkpoint
    row_orders, column_orders   of some tensors of a layer, by the rest of their GGUF names: which row of the
                  checkpoint's is the first, the second ...; a vector's elements are its rows
    head_rows   of some tensors of a layer, likewise, that are rows of every head
    transposed    matrices, by the rest of their names in a layer, that are (n_in, n_out) in the checkpoint
    transposed_experts   matrices of experts are (n_in, n_out) where they are plain, and gate and up alternate in them
    joined_experts       matrices of all experts of a layer are one (n_experts * n_ff, n_embd), the last ones too
    turned_experts       matrices of all experts of a layer are (n_in, n_out) where their shape says so
    pairs_heads   rows of q and k are reordered, so that rotated pairs are neighbours
    norm_shift    added to every norm weight
    around        the modules outside of layers, likewise
    around_biases   those of them that have a bias, by their GGUF names
    numbered      modules outside of layers that are several, ``name.0``, ``name.1`` ...: matrices of one GGUF tensor
    renames       (pattern, replacement) in turn on a tensor's name, which makes it ``model.layers.N.`` or one around
    first_rows    how many rows at the start of some tensors no model reads, by their GGUF names
    rows_of       how many rows some tensors are to have, likewise: those that the checkpoint has not are 0
    needs_class   config.json has to name the class: its ``model_type`` is another architecture's too
    settings      the row of ``checkpoint_keys`` that its settings are held to, where that is not their ``model_type``
    has_projections   sentence-transformers keeps matrices behind the pooling beside it
    leaves_out_zeros   a pattern of the names of tensors that other programs know nothing of: left out where they are 0
    leaves_out    a pattern of the names of tensors that a model of these settings has no use for
    extra         tensors that the checkpoint has only as numbers of its config, by GGUF name: the rotation's divisors
    extra_is_usual  whether other programs know these tensors in the architecture
    space_prefix  whether a text starts with a space, where the tokenizer itself does not say
    variant       the architecture, and the form of it, that some settings stand for; None for the architecture's own
    """

    classes: Mapping[str, str]
    metadata: Callable[[CheckpointConfig], TypedMetadata]
    biases: Callable[[CheckpointConfig], frozenset[str]] = attention_biases
    layer: Mapping[str, str] = field(default_factory=lambda: DECODER_LAYER)
    around: Mapping[str, str] = field(default_factory=lambda: DECODER)
    around_biases: frozenset[str] = frozenset()
    numbered: Mapping[str, str] = field(default_factory=dict)
    renames: Sequence[tuple[str, str]] = ()
    leaves_out_zeros: str = ""
    leaves_out: Callable[[CheckpointConfig], str] = lambda _: ""
    first_rows: Callable[[CheckpointConfig], Mapping[str, int]] = lambda _: {}
    rows_of: Callable[[CheckpointConfig], Mapping[str, int]] = lambda _: {}
    needs_class: bool = False
    renamed_kinds: Mapping[str, str] = field(default_factory=dict)
    settings: str = ""
    has_projections: bool = False
    experts: Mapping[str, str] = field(default_factory=dict)
    stacked: Mapping[str, Sequence[str]] = field(default_factory=dict)
    pieces: Callable[[CheckpointConfig], Mapping[str, Mapping[str, np.ndarray]]] = lambda _: {}
    by_head: Callable[[CheckpointConfig], Mapping[str, str]] = lambda _: {}
    bare: Mapping[str, Sequence[str]] = field(default_factory=dict)
    numbers: Mapping[str, Callable[[np.ndarray], np.ndarray]] = field(default_factory=dict)
    factors: Callable[[CheckpointConfig], Mapping[str, float | np.ndarray]] = lambda _: {}
    shapes: Callable[[CheckpointConfig], Mapping[str, tuple[int, int]]] = lambda _: {}
    row_orders: Callable[[CheckpointConfig], Mapping[str, np.ndarray]] = lambda _: {}
    column_orders: Callable[[CheckpointConfig], Mapping[str, np.ndarray]] = lambda _: {}
    head_rows: Callable[[CheckpointConfig], Mapping[str, HeadRows]] = lambda _: {}
    transposed: frozenset[str] = frozenset()
    transposed_experts: bool = False
    joined_experts: bool = False
    turned_experts: bool = False
    pairs_heads: bool = False
    norm_shift: float = 0.0
    extra: Callable[[CheckpointConfig], dict[str, np.ndarray]] = _llama3_factors
    extra_is_usual: bool = False
    space_prefix: bool = True
    variant: Callable[[CheckpointConfig], tuple[str, CheckpointForm | None]] | None = None

    @property
    def has_experts(self) -> bool:
        """Whether models of the architecture may have any."""
        return bool(self.experts or self.stacked or self.transposed_experts)

    def places(
        self,
        name: str,
        n_layer: int,
        biases: frozenset[str],
        pieces: Mapping[str, Mapping[str, np.ndarray]] = {},
        by_head: Mapping[str, str] = {},
    ) -> tuple[Place, ...]:
        """Where a checkpoint's tensor goes (``model.layers.3.mlp.up_proj.weight``); nowhere when it is unknown."""
        for pattern, replacement in self.renames:
            name = re.sub(pattern, replacement, name)
        module, _, parameter = name.rpartition(".")
        if (known := self.around.get(module)) and (
            parameter == "weight" or (parameter == "bias" and known in self.around_biases)
        ):
            return (Place(f"{known}.{parameter}"),)
        several, _, number = module.rpartition(".")
        if (
            (known := self.numbered.get(several))
            and parameter == "weight"
            and re.fullmatch(r"\d{1,6}", number, re.ASCII)
        ):
            return (Place(f"{known}.weight", int(number)),)
        found = re.fullmatch(r"model\.layers\.(\d{1,6})\.(.+?)(?:\.(weight|bias))?", name, re.ASCII)
        if found is None or int(found[1]) >= n_layer:
            return ()
        blk, rest, parameter = f"blk.{int(found[1])}", found[2], found[3]
        if (whole := f"{rest}.{parameter}" if parameter else rest) in self.bare:
            names = self.bare[whole]
            return tuple(Place(f"{blk}.{one}", part=(i, len(names))) for i, one in enumerate(names))
        if rest in self.stacked and parameter in ("weight", None):
            names = self.stacked[rest]
            return tuple(Place(f"{blk}.{one}.weight", part=(i, len(names))) for i, one in enumerate(names))
        if (parts := pieces.get(rest)) and (parameter == "weight" or (parameter == "bias" and biases >= parts.keys())):
            n = sum(map(len, parts.values()))
            return tuple(Place(f"{blk}.{one}.{parameter}", rows=rows, of=n) for one, rows in parts.items())
        head = re.fullmatch(r"(.+)\.norms\.(\d{1,6})", rest, re.ASCII)
        if head and head[1] in by_head and parameter == "weight":
            return (Place(f"{blk}.{by_head[head[1]]}.weight", int(head[2])),)
        blocks = r"(?:mlp|block_sparse_moe|feed_forward|mixer)"
        one = re.fullmatch(blocks + r"\.experts\.(\d{1,6})\.(\w+)", rest, re.ASCII)
        known = self.experts.get(one[2]) if one else self.layer.get(rest)
        if known is None or not (parameter == "weight" or (parameter == "bias" and known in biases)):
            return ()
        return (Place(f"{blk}.{known}.{parameter}", int(one[1]) if one else None),)


def decoder_metadata(
    config: CheckpointConfig,
    architecture: str,
    rotate: Callable[[CheckpointConfig], Rotation] = rotation,
    *,
    n_ff: int | None = None,
    eps_key: str = "rms_norm_eps",
) -> TypedMetadata:
    """The keys that all decoders share. UnsupportedError for a rotation that edgellm does not have."""
    n_head = config.integer("num_attention_heads")
    found: TypedMetadata = {
        "block_count": (config.n_layer, "UINT32"),
        "context_length": (config.integer("max_position_embeddings"), "UINT32"),
        "embedding_length": (config.integer("hidden_size"), "UINT32"),
        "feed_forward_length": (n_ff or config.integer("intermediate_size"), "UINT32"),
        "attention.head_count": (n_head, "UINT32"),
        "attention.head_count_kv": (config.integer("num_key_value_heads", n_head), "UINT32"),
    }
    found |= rope_metadata(rotate(config))
    found["attention.layer_norm_rms_epsilon"] = (config.real(eps_key, 1e-6), "FLOAT32")
    if config.get("head_dim") is not None:
        found["attention.key_length"] = found["attention.value_length"] = (config.head_dim, "UINT32")
    return {f"{architecture}.{key}": value for key, value in found.items()}


def typed_metadata(architecture: str, values: Mapping[str, float]) -> TypedMetadata:
    """Keys of the architecture, each of the type that its value has."""
    kinds = {bool: "BOOL", int: "UINT32", float: "FLOAT32"}
    return {f"{architecture}.{key}": (value, kinds[type(value)]) for key, value in values.items()}


def count_of(config: CheckpointConfig, key: str, default: int | None = None) -> int:
    """A whole number that may be 0."""
    value = default if config.get(key) is None else config.get(key)
    return 0 if type(value) is int and value == 0 else config.integer(key, default)


def leading_dense_layers(config: CheckpointConfig, default: int) -> int:
    """How many layers have no experts by ``mlp_layer_types``: the first ones. UnsupportedError for others."""
    kinds = config.get("mlp_layer_types")
    if kinds is None:
        return default
    n = kinds.count("dense") if isinstance(kinds, list) else -1
    if kinds != ["dense"] * n + ["sparse"] * (config.n_layer - n):
        raise config.refuse("mlp_layer_types", f"dense layers first, then sparse ones, {config.n_layer} in all")
    return n


def with_layer_norms(found: TypedMetadata, architecture: str) -> TypedMetadata:
    """The same keys of an architecture whose norms take the mean away."""
    found[f"{architecture}.attention.layer_norm_epsilon"] = found.pop(
        f"{architecture}.attention.layer_norm_rms_epsilon"
    )
    return found


def plain_metadata(config: CheckpointConfig) -> TypedMetadata:
    """All keys of an architecture that is named as its ``model_type``: silu, and layers that do not slide."""
    refuse_activation(config, "silu", "swish")
    refuse_sliding_layers(config)
    return decoder_metadata(config, config.model_type)


ACTIVATION_KEYS = ("hidden_act", "hidden_activation")


def refuse_activation(config: CheckpointConfig, *known: str, keys: Sequence[str] = ACTIVATION_KEYS) -> None:
    """UnsupportedError for an activation that is not the architecture's own, under the keys that count there."""
    for key in keys:
        if config.get(key) is not None and config.get(key) not in known:
            raise config.refuse(key, " or ".join(known))


def layer_kinds(config: CheckpointConfig, default: Callable[[int], bool]) -> list[bool]:
    """Whether each layer slides: as ``layer_types`` says, else as ``default(i)``. UnsupportedError for other kinds."""
    kinds = config.get("layer_types")
    if kinds is None:
        return [default(i) for i in range(config.n_layer)]
    known = ("full_attention", "sliding_attention")
    if not isinstance(kinds, list) or len(kinds) != config.n_layer or any(kind not in known for kind in kinds):
        raise config.refuse("layer_types", f"one of {' and '.join(known)} for each of {config.n_layer} layers")
    return [kind == "sliding_attention" for kind in kinds]


def refuse_windows(config: CheckpointConfig) -> None:
    """UnsupportedError for ``layer_types`` that slide, in an architecture without any other key for it."""
    if any(layer_kinds(config, lambda _: False)):
        raise config.refuse("layer_types", "models of this architecture whose layers see the whole context")


def refuse_sliding_layers(config: CheckpointConfig) -> None:
    """UnsupportedError when some layers slide, in an architecture whose layers do not."""
    slides = config.flag("use_sliding_window", False) and config.get("sliding_window") is not None
    first = config.get("max_window_layers") if slides else config.n_layer
    if type(first) is not int:
        raise config.wrong("max_window_layers", first, "a whole number")
    if any(layer_kinds(config, lambda i: i >= first)):
        key = "use_sliding_window" if config.get("layer_types") is None else "layer_types"
        raise config.refuse(key, "models of this architecture whose layers see the whole context")
