"""What a Hugging Face checkpoint of an architecture looks like, and what its GGUF file is to say of it.

Each architecture file has one ``CheckpointForm``: the names its tensors go by, what happens to their numbers, and the
metadata that its own ``build`` reads back. The keys are those that llama.cpp's converter writes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
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
DECODER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


QKV = frozenset(("attn_q", "attn_k", "attn_v"))
FEED_FORWARD = frozenset(("ffn_gate", "ffn_up", "ffn_down"))


def _llama3_factors(config: CheckpointConfig) -> dict[str, np.ndarray]:
    return frequency_factors(rotation(config))


def attention_biases(config: CheckpointConfig) -> frozenset[str]:
    """The modules with a bias where ``attention_bias`` says whether they have one."""
    return QKV | {"attn_output"} if config.flag("attention_bias", False) else frozenset()


@dataclass(frozen=True)
class CheckpointForm:
    """How one architecture is kept in a checkpoint.

    classes       names in config.json's ``architectures``, with the ``model_type`` of each; the first is the usual one
    metadata      the keys of the architecture, without tokenizer and name
    biases        modules of a layer that have a bias, by their GGUF names
    layer         modules of a layer: name in the checkpoint -> name in GGUF
    experts       modules of one expert -> the GGUF tensor that holds those of a layer
    pairs_heads   rows of q and k are reordered, so that rotated pairs are neighbours
    norm_shift    added to every norm weight
    around        the modules outside of layers, likewise
    extra         tensors that the checkpoint has only as numbers of its config, by GGUF name: the rotation's divisors
    space_prefix  whether a text starts with a space, where the tokenizer itself does not say
    """

    classes: Mapping[str, str]
    metadata: Callable[[CheckpointConfig], TypedMetadata]
    biases: Callable[[CheckpointConfig], frozenset[str]] = attention_biases
    layer: Mapping[str, str] = field(default_factory=lambda: DECODER_LAYER)
    around: Mapping[str, str] = field(default_factory=lambda: DECODER)
    experts: Mapping[str, str] = field(default_factory=dict)
    pairs_heads: bool = False
    norm_shift: float = 0.0
    extra: Callable[[CheckpointConfig], dict[str, np.ndarray]] = _llama3_factors
    space_prefix: bool = True

    def tensor_name(self, name: str, n_layer: int, biases: frozenset[str]) -> str | None:
        """The GGUF name of a checkpoint's tensor (``model.layers.3.mlp.up_proj.weight``), None for an unknown one.

        That of an expert is part of the tensor that is named: ``expert`` says which.
        """
        module, _, parameter = name.rpartition(".")
        if parameter == "weight" and module in self.around:
            return f"{self.around[module]}.weight"
        head, _, rest = module.removeprefix("model.layers.").partition(".")
        known = None
        if module.startswith("model.layers.") and head.isdecimal():
            known = self.layer.get(rest) if self.expert(name) is None else self.experts.get(rest.rpartition(".")[2])
        has_place = parameter == "weight" or (parameter == "bias" and known in biases)
        return f"blk.{int(head)}.{known}.{parameter}" if known and has_place and int(head) < n_layer else None

    def expert(self, name: str) -> int | None:
        """The number of the expert whose tensor this is (``model.layers.3.mlp.experts.7.up_proj.weight``)."""
        found = re.fullmatch(r"model\.layers\.\d+\.mlp\.experts\.(\d{1,6})\.\w+\.weight", name, re.ASCII)
        return int(found[1]) if found and self.experts else None


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


def plain_metadata(config: CheckpointConfig) -> TypedMetadata:
    """All keys of an architecture that is named as its ``model_type``: silu, and layers that do not slide."""
    refuse_activation(config, "silu", "swish")
    refuse_sliding_layers(config)
    return decoder_metadata(config, config.model_type)


def refuse_activation(config: CheckpointConfig, *known: str) -> None:
    """UnsupportedError for an activation that is not the architecture's own."""
    for key in ("hidden_act", "hidden_activation"):
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


def refuse_sliding_layers(config: CheckpointConfig) -> None:
    """UnsupportedError when some layers slide, in an architecture whose layers do not."""
    slides = config.flag("use_sliding_window", False) and config.get("sliding_window") is not None
    first = config.get("max_window_layers") if slides else config.n_layer
    if type(first) is not int:
        raise config.wrong("max_window_layers", first, "a whole number")
    if any(layer_kinds(config, lambda i: i >= first)):
        key = "use_sliding_window" if config.get("layer_types") is None else "layer_types"
        raise config.refuse(key, "models of this architecture whose layers see the whole context")
