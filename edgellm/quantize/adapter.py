"""A folder with a LoRA adapter of PEFT as a source: pairs A, B under the GGUF names of what they change.

What an architecture's converter does to the rows of a weight W is done to the rows of B, and what it does to its
columns to those of A, since W + s B A is what counts. The base is asked for its settings alone, never for its weights.

    adapter_config.json          r, lora_alpha, what is scaled otherwise; every key is known, or refused by name
    adapter_model.safetensors    base_model.model.MODULE.lora_A.weight (r, n_in), .lora_B.weight (n_out, r)

Of experts that are one parameter A is (n_expert r, n_in), expert by expert, and B (n_out, r n_expert), rank by rank.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from edgellm.adapters.lora import MAX_ALPHA, MAX_RANK
from edgellm.formats.checkpoint import MAX_CONFIG_NBYTES, Checkpoint, read_json
from edgellm.formats.checkpoint_folder import CheckpointFolder
from edgellm.formats.checkpoints import Weight
from edgellm.formats.errors import FormatError, ParameterError, UnsupportedError
from edgellm.formats.findings import PULL_AGAIN, short
from edgellm.formats.gguf import GGUFFile
from edgellm.formats.gguf_header import TypedMetadata
from edgellm.formats.quant_types import QUANT_TYPES
from edgellm.formats.safetensors import SafetensorsFile, StoredTensor
from edgellm.formats.stored_numbers import FLOATS, encode_plain
from edgellm.machine.paths import path_if_there
from edgellm.models import architectures, module_of
from edgellm.models.parts.checkpoint_config import CheckpointConfig
from edgellm.models.parts.checkpoint_form import CheckpointForm, Place
from edgellm.quantize.arranged import every_nth, part_of_rows, rearranged
from edgellm.quantize.checkpoint import find_form, input_tensor, plain_name, read_config, settled
from edgellm.quantize.input_model import InputModel, InputTensor

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
USED = frozenset(
    ("peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "base_model_name_or_path")
)
# which modules it was made for, how it was trained and begun: the pairs say all that counts
HARMLESS = frozenset(
    (
        *("auto_mapping", "exclude_modules", "inference_mode", "layers_pattern", "layers_to_transform", "lora_dropout"),
        *("peft_version", "revision", "runtime_config", "target_modules", "target_parameters", "task_type"),
        *("megatron_core", "eva_config", "qalora_group_size", "ensure_weight_tying", "fan_in_fan_out"),
    )
)
"""``fan_in_fan_out`` says how the base keeps its weight; A and B are the same way round in any case."""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),  # others change the base as well
    "loftq_config": ({},),
}
"""Values that change nothing; of all other keys None, False and what is empty."""
HALVES = {"lora_A.weight": "a", "lora_B.weight": "b", "lora_embedding_A": "a", "lora_embedding_B": "b"}
COPIES = ("embed_tokens.base_layer.weight", "lm_head.base_layer.weight")
"""The base's own, which PEFT writes beside a pair for it; a vocabulary that has grown is no copy."""
ROOT = "base_model.model."
OTHER_MODEL = "It is an adapter of another model: give --base with its own."
SIZES = {
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "moe_intermediate_size": "expert_feed_forward_length",
    "num_local_experts": "expert_count",
}
"""What is read of a GGUF file in place of config.json."""
READS = frozenset(
    (
        *("attn_q", "attn_k", "attn_v", "attn_qkv", "attn_gate", "attn_q_a", "attn_kv_a_mqa", "ssm_in"),
        *("shortconv.in_proj", "ffn_gate", "ffn_up", "ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps"),
        *("ffn_gate_up_exps", "ffn_gate_shexp", "ffn_up_shexp", "output"),
    )
)
WRITES = frozenset(
    ("attn_output", "ssm_out", "shortconv.out_proj", "ffn_down", "ffn_down_exps", "ffn_down_shexp", "token_embd")
)
"""Weights whose columns, or rows, are as many as a token's row in the model has numbers (hidden_size)."""
SIZES_OF_WEIGHTS = ("hidden_size", "vocab_size", "head_dim", "num_attention_heads", "num_key_value_heads")
OTHER_HEADS = (
    *("kv_lora_rank", "linear_num_value_heads", "hidden_size_per_layer_input", "per_layer_config"),
    *("global_head_dim", "num_attention_heads_per_layer"),
)
"""Settings of models whose heads are not all of one width, or have gates beside them."""


@dataclass(frozen=True)
class _Pair:
    """What an adapter adds to a module: scale B A."""

    module: str
    a: StoredTensor
    b: StoredTensor
    is_embedding: bool


@dataclass(frozen=True)
class _Base:
    """What there is to know of the model that an adapter is for.

    shapes   of its tensors, where it is a GGUF file
    """

    architecture: str
    form: CheckpointForm
    config: CheckpointConfig
    shapes: Mapping[str, tuple[int, ...]] | None = None


def is_adapter_folder(path: Path) -> bool:
    """Whether a folder has an adapter, and no model of its own."""
    return path.is_dir() and (path / CONFIG).is_file() and not (path / "config.json").is_file()


def open_adapter(folder: Path, base: str | Path | None = None) -> InputModel:
    """The adapter as a source, fit for ``convert``.

    base   a folder with the model's config.json, or its GGUF file; None looks where the adapter says, if that is here

    FormatError or UnsupportedError with the code ``ADAPTER_...`` for what is wrong or unknown.
    """
    files = CheckpointFolder(folder)
    config = read_json(files, CONFIG, MAX_CONFIG_NBYTES)
    if config is None:
        raise FormatError(f"{folder}: has no {CONFIG}. Give the folder of an adapter.", code="ADAPTER_FILE")
    _check_config(folder, config)
    of = _base(folder, config, base)
    pairs = _pairs(folder, SafetensorsFile.open_in(files, WEIGHTS).tensors, of.config)
    ranks = {module: _rank(folder, config, pair) for module, pair in pairs.items()}
    alpha, scales = _scales(folder, config, ranks)
    tensors: dict[str, InputTensor] = {}
    experts: dict[str, dict[int, tuple[np.ndarray, np.ndarray, str]]] = {}
    for pair in pairs.values():
        for place, a, b in _placed(folder, pair, ranks[pair.module], of):
            b, kind = _times(b, scales[pair.module]), _kind(pair, scales[pair.module])
            if place.expert is not None:
                experts.setdefault(place.name, {})[place.expert] = (a, b, kind)
            else:
                _add(tensors, place.name, a, b, kind)
    for name, of_experts in experts.items():
        _add(tensors, name, *_stacked(folder, name, of_experts, of.config))
    _check_shapes(folder, tensors, of)
    named = config.get("base_model_name_or_path")
    metadata: TypedMetadata = {
        "general.architecture": (of.architecture, "STRING"),
        "general.type": ("adapter", "STRING"),
        "general.name": (folder.resolve().name, "STRING"),
        "adapter.type": ("lora", "STRING"),
        "adapter.lora.alpha": (alpha, "FLOAT32"),
    }
    if isinstance(named, str) and named and path_if_there(named) is None:
        metadata["general.base_model.count"] = (1, "UINT32")
        metadata["general.base_model.0.name"] = (named.rpartition("/")[2], "STRING")
    return InputModel(folder, "adapter", metadata, tensors, notes=_notes(tensors, of))


def _wrong(folder: Path, found: str, expected: str, advice: str = PULL_AGAIN) -> FormatError:
    return FormatError(f"{folder.name}: {found}, expected {expected}. {advice}", code="ADAPTER_FILE")


def _refused(folder: Path, what: str) -> UnsupportedError:
    return UnsupportedError(
        f"{folder.name}: {what}. Merge the adapter into its model (PEFT's merge_and_unload), and convert the result.",
        code="ADAPTER_UNSUPPORTED",
    )


# -- the settings of the adapter ---------------------------------------------------------------------------------------


def _check_config(folder: Path, config: dict[str, Any]) -> None:
    """Every key is used, known to be harmless, or at rest."""
    if config.get("peft_type") != "LORA":
        raise _refused(folder, f"{CONFIG}: peft_type is {short(config.get('peft_type'))}; edgellm converts LORA")
    for key in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(key) or {}
        if not isinstance(pattern, dict):
            raise _wrong(folder, f"{CONFIG}: {key} is {short(pattern)}", "an object")
        for name in pattern:  # PEFT takes any regular expression, and some take for ever
            if not re.fullmatch(r"\^?(?:[\w-]|\\?\.)+", name, re.ASCII):
                raise _refused(
                    folder, f"{CONFIG}: {key} has {short(name)}; edgellm knows names of modules and their ends"
                )
    for key, value in config.items():
        if key in USED or key in HARMLESS or not value:
            continue
        if not any(value is one or value == one for one in NEUTRAL.get(key, ())):
            raise _refused(folder, f"{CONFIG}: {short(key)} is {short(value)}, and the answers may depend on it")


def _scales(folder: Path, config: dict[str, Any], ranks: Mapping[str, int]) -> tuple[float, dict[str, float]]:
    """The alpha of the file, and what B of each module is multiplied by so that alpha / rank is its scale."""
    by_root = bool(config.get("use_rslora"))

    def number(key: str, value: Any) -> float:
        sound = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= MAX_ALPHA
        if not sound:
            raise _wrong(folder, f"{CONFIG}: {key} is {short(value)}", f"a number above 0 and up to {MAX_ALPHA:g}")
        return float(value)

    usual = number("lora_alpha", config.get("lora_alpha"))
    wanted = {}
    for module, rank in ranks.items():
        alpha = number("alpha_pattern", _matched(module, config.get("alpha_pattern") or {}, usual))
        wanted[module] = (alpha / math.sqrt(rank) if by_root else alpha / rank) * rank  # the alpha that gives its scale
    alpha = float(np.float32(max(set(wanted.values()), key=list(wanted.values()).count)))
    return alpha, {module: value / alpha for module, value in wanted.items()}


def _rank(folder: Path, config: dict[str, Any], pair: _Pair) -> int:
    """The rank that PEFT scales by; of experts in one parameter the tensors have it once for each."""
    rank = _matched(pair.module, config.get("rank_pattern") or {}, config.get("r"))
    if type(rank) is not int or not 1 <= rank <= MAX_RANK:
        raise _wrong(folder, f"{short(pair.module)}: the rank is {short(rank)}", f"one from 1 to {MAX_RANK:,}")
    return rank


def _check_rank(folder: Path, pair: _Pair, rank: int, n_expert: int = 1) -> None:
    if pair.b.shape[-1] != rank * n_expert:
        of_all = f", for each of {n_expert} experts" if n_expert > 1 else ""
        found = f"{short(pair.module)}: the rank is {rank}{of_all}, its B {pair.b.shape}"
        raise _wrong(folder, found, "ranks that agree")


def _matched(module: str, pattern: dict[str, Any], usual: Any) -> Any:
    """The value of the first key that is the end of the module's name, or behind ^ all of it."""
    for key, value in pattern.items():
        name = key.replace("\\.", ".").removeprefix("^")
        if module == name or (not key.startswith("^") and module.endswith(f".{name}")):
            return value
    return usual


# -- its tensors -------------------------------------------------------------------------------------------------------


def _pairs(folder: Path, tensors: dict[str, StoredTensor], of: CheckpointConfig) -> dict[str, _Pair]:
    """All tensors of the file, two and two, by the module that they change."""
    halves: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in tensors.items():
        if name.endswith(COPIES) and tensor.shape[0] == of.get("vocab_size"):
            continue
        suffix = next((one for one in HALVES if name.endswith(f".{one}")), None)
        if suffix is None or not name.startswith(ROOT) or len(tensor.shape) != 2:
            raise _refused(folder, f"has the tensor {short(name)}, which is no half of a pair")
        if tensor.kind.name not in FLOATS:
            raise _refused(folder, f"{short(name)} is {tensor.kind.name}")
        of_module = halves.setdefault(name.removeprefix(ROOT).removesuffix(f".{suffix}"), {})
        of_module[HALVES[suffix]] = tensor
    pairs = {}
    for module, found in halves.items():
        if len(found) < 2:
            raise _wrong(folder, f"{short(module)} has one half of a pair", "lora_A and lora_B")
        a, b = found["a"], found["b"]
        if a.shape[0] != b.shape[1]:
            raise _wrong(folder, f"{short(module)} has A {a.shape} and B {b.shape}", "ranks that agree")
        pairs[module] = _Pair(module, a, b, "lora_embedding" in a.name)
    if not pairs:
        raise _wrong(folder, f"{WEIGHTS} has no tensors", "pairs of them")
    return pairs


def _numbers(folder: Path, tensor: StoredTensor) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        values = tensor.float32()
    if not np.isfinite(values).all():
        raise FormatError(f"{folder.name}: {short(tensor.name)} holds NaN or infinity. {PULL_AGAIN}", code="TENSOR_NAN")
    return values


def _placed(folder: Path, pair: _Pair, rank: int, of: _Base) -> list[tuple[Place, np.ndarray, np.ndarray]]:
    """Where a pair goes, with A and B in GGUF's order; two places where GGUF cuts a weight in two."""
    name = plain_name(f"{pair.module}.weight")
    a, b = _numbers(folder, pair.a), _numbers(folder, pair.b)
    places = of.form.places(name, of.config.n_layer, frozenset())
    if not places:
        places, a, b = _of_stacked_experts(folder, pair, rank, of, a, b)
    else:
        _check_rank(folder, pair, rank)
    found = []
    for place in places:
        rest = re.sub(r"^blk\.\d+\.", "", place.name)
        changed = rest in of.form.numbers or of.form.shapes(of.config).get(rest) is not None
        changed = changed or place.rows is not None or of.form.head_rows(of.config).get(rest) is not None
        if changed or place.name in of.form.first_rows(of.config) or rest.endswith("norm.weight"):
            raise _refused(folder, f"changes {short(pair.module)}, which GGUF files keep in another form")
        if pair.is_embedding != (place.name == "token_embd.weight"):
            raise _wrong(folder, f"{short(pair.module)} has {short(pair.a.name)}", "an embedding's pair there alone")
        _check_sizes(folder, pair, rest.removesuffix(".weight"), of)
        columns = of.form.column_orders(of.config).get(rest)
        if pair.is_embedding:  # a row for each token
            found.append((place, np.ascontiguousarray(a.T), b))
        else:
            found.append((place, a if columns is None else a[..., columns], _rows(place, b, of, pair)))
    return found


def _check_sizes(folder: Path, pair: _Pair, weight: str, of: _Base) -> None:
    """FormatError where config.json says of a weight that it has other columns than A, or other rows than B."""
    if of.shapes is not None:  # which say it of all
        return
    sizes = {name: value for name in SIZES_OF_WEIGHTS if type(value := of.config.get(name)) is int}
    if (hidden := sizes.get("hidden_size")) is None:
        return
    heads = sizes.get("num_attention_heads")
    n_in, n_out = hidden if weight in READS else None, hidden if weight in WRITES else None
    if weight in ("output", "token_embd"):
        n_in, n_out = (n_in or sizes.get("vocab_size")), (n_out or sizes.get("vocab_size"))
    if heads and all(of.config.get(name) is None for name in OTHER_HEADS):
        width = sizes.get("head_dim") or hidden // heads
        if weight in ("attn_k", "attn_v") and of.config.get("num_key_value_heads") is not None:
            heads = sizes.get("num_key_value_heads", 0)
        n_out = n_out or (width * heads if weight in ("attn_q", "attn_k", "attn_v") else 0)
        n_in = n_in or (width * heads if weight == "attn_output" else 0)
    found = pair.a.shape[1], pair.b.shape[0]
    expected = n_in or found[0], n_out or found[1]
    if found != expected:
        shapes = f"{short(pair.module)} has A {pair.a.shape} and B {pair.b.shape}"
        wanted = f"A with {expected[0]} columns and B with {expected[1]} rows, as its base has them"
        raise _wrong(folder, shapes, wanted, OTHER_MODEL)


def _check_shapes(folder: Path, tensors: Mapping[str, InputTensor], of: _Base) -> None:
    """FormatError where a pair does not fit the tensor of the GGUF file that it is for."""
    if of.shapes is None:
        return
    for name in (half.removesuffix(".lora_b") for half in tensors if half.endswith(".lora_b")):
        a, b = (tensors[f"{name}.{half}"].shape for half in ("lora_a", "lora_b"))
        tied = name == "output.weight" and name not in of.shapes
        shape = of.shapes.get("token_embd.weight" if tied else name)
        if shape is None:
            raise _refused(folder, f"changes {short(name)}, which its base has not")
        expected = (*shape[:-2], b[-1], shape[-1]), (*shape[:-1], b[-1])
        if name == "token_embd.weight":  # a row of A for each token
            expected = (shape[0], b[-1]), (shape[1], b[-1])
        if (a, b) != expected:
            wanted = f"{expected[0]} and {expected[1]} for the {shape} of its base"
            raise _wrong(folder, f"{short(name)} has A {a} and B {b}", wanted, OTHER_MODEL)


def _rows(place: Place, b: np.ndarray, of: _Base, pair: _Pair) -> np.ndarray:
    """The rows of B as those of the weight."""
    flat = b.reshape(-1, b.shape[-1])
    form = replace(of.form, column_orders=lambda _: {})
    weight = Weight(b.shape, lambda start, stop: flat[start:stop])
    tensor = rearranged(input_tensor(place.name, pair.module, weight, of.config, form, False), form, of.config)
    cut = every_nth if form.transposed_experts else part_of_rows
    part = cut(tensor, *place.part, pair.module)
    return np.ascontiguousarray(part.rows()).reshape(part.shape)


def _of_stacked_experts(
    folder: Path, pair: _Pair, rank: int, of: _Base, a: np.ndarray, b: np.ndarray
) -> tuple[tuple[Place, ...], np.ndarray, np.ndarray]:
    """Experts that are one parameter: which one its shape tells, as names do not."""
    module = plain_name(re.sub(r"(\.base_layer)+$", "", pair.module) + ".")
    wide = of.config.get("hidden_size")
    narrow = of.config.get("moe_intermediate_size") or of.config.get("intermediate_size")
    n_expert = of.config.get("num_local_experts") or of.config.get("num_experts") or 0
    by_shape = {(wide, 2 * (narrow or 0)): "gate_up_proj", (narrow, wide): "down_proj"}
    parameter = by_shape.get((a.shape[1], b.shape[0]))
    places = of.form.places(f"{module}{parameter}", of.config.n_layer, frozenset()) if parameter else ()
    turned = of.form.turned_experts or of.form.joined_experts
    if not places or turned or not n_expert or a.shape[0] % n_expert:
        raise _refused(folder, f"changes {short(pair.module)}, which has no place in a {of.architecture} model")
    _check_rank(folder, pair, rank, n_expert)
    by_expert = a.reshape(n_expert, -1, a.shape[1])
    return places, by_expert, np.ascontiguousarray(b.reshape(len(b), -1, n_expert).transpose(2, 0, 1))


def _times(b: np.ndarray, scale: float) -> np.ndarray:
    return b if scale == 1.0 else b * np.float32(scale)


def _kind(pair: _Pair, scale: float) -> str:
    """The type that holds what comes of a pair."""
    return pair.b.kind.name if scale == 1.0 and pair.a.kind is pair.b.kind else "F32"


def _stacked(
    folder: Path, name: str, experts: dict[int, tuple[np.ndarray, np.ndarray, str]], config: CheckpointConfig
) -> tuple[np.ndarray, np.ndarray, str]:
    """The pairs of all experts of a layer as one."""
    n = config.get("num_local_experts") or config.get("num_experts") or len(experts)
    alike = {(a.shape, b.shape) for a, b, _ in experts.values()}
    if sorted(experts) != list(range(n)) or len(alike) != 1:
        found = f"{name}: {len(experts)} experts have pairs, of {len(alike)} shapes"
        raise _wrong(folder, found, f"pairs of one shape for all {n}", "Train the adapter with all of them.")
    every = [experts[i] for i in range(n)]
    kinds = {kind for _, _, kind in every}
    return (
        np.stack([a for a, _, _ in every]),
        np.stack([b for _, b, _ in every]),
        kinds.pop() if len(kinds) == 1 else "F32",
    )


def _add(tensors: dict[str, InputTensor], name: str, a: np.ndarray, b: np.ndarray, kind: str) -> None:
    for half, values in (("lora_a", a), ("lora_b", b)):
        tensors[f"{name}.{half}"] = _tensor(f"{name}.{half}", values, kind)


def _tensor(name: str, values: np.ndarray, kind: str) -> InputTensor:
    rows = np.ascontiguousarray(values).reshape(-1, values.shape[-1])
    return InputTensor(
        name,
        values.shape,
        QUANT_TYPES[kind],
        lambda start, stop: rows[start:stop],
        lambda start, stop: encode_plain(rows[start:stop], kind),
    )


def _notes(tensors: dict[str, InputTensor], of: _Base) -> list[str]:
    if "output.weight.lora_a" in tensors and of.config.get("tie_word_embeddings"):
        return ["The model's output is its embedding: programs other than edgellm may refuse an adapter for it."]
    return []


# -- its base ----------------------------------------------------------------------------------------------------------


def _base(folder: Path, config: dict[str, Any], given: str | Path | None) -> _Base:
    """The architecture and its sizes, from a folder's config.json or a GGUF file."""
    named = given if given is not None else config.get("base_model_name_or_path")
    path = path_if_there(named) if isinstance(named, str | Path) and named else None
    if path is None:
        what = f"--base is {short(given)}" if given is not None else f"its base is {short(named)}"
        raise ParameterError(
            f"{folder.name}: {what}, which is not here. Give --base with the folder of the model, of which config.json "
            "is enough, or with its GGUF file."
        )
    return _of_folder(path) if path.is_dir() else _of_gguf(path)


def _of_folder(path: Path) -> _Base:
    checkpoint = Checkpoint.of_base(path)
    architecture, form, model_type = find_form(checkpoint)
    config, _ = read_config(checkpoint, model_type)
    architecture, form = settled(architecture, form, config)
    return _Base(architecture, form, config)


def _of_gguf(path: Path) -> _Base:
    with GGUFFile.open(path) as gguf:
        architecture = gguf.architecture
        form: CheckpointForm | None = module_of(architecture).CHECKPOINT if architecture in architectures() else None
        found = {name: gguf.metadata.get(f"{architecture}.{key}") for name, key in SIZES.items()}
        if "token_embd.weight" in gguf.tensors:
            found["vocab_size"] = gguf.tensors["token_embd.weight"].shape[0]
        shapes = {name: tensor.shape for name, tensor in gguf.tensors.items()}
    usual = CheckpointForm.__dataclass_fields__
    special = ("row_orders", "column_orders", "factors", "head_rows")
    asks = [name for name in special if getattr(form, name, None) is not usual[name].default]
    odd = [name for name, value in found.items() if value is not None and type(value) is not int]
    if form is None or asks or odd:
        raise UnsupportedError(
            f"{path.name}: a {architecture} model says too little of how its checkpoint was kept. Give --base with a "
            "folder that has the model's config.json.",
            code="ADAPTER_BASE",
        )
    config = CheckpointConfig(path, {name: value for name, value in found.items() if value is not None}, architecture)
    return _Base(architecture, form, config, shapes)
