"""A folder with a Hugging Face checkpoint as a source: tensors under their GGUF names, and all metadata of a file."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from edgellm.formats import bus_error
from edgellm.formats.checkpoint import Checkpoint
from edgellm.formats.checkpoints import Weight, open_weights, scheme_of
from edgellm.formats.errors import FormatError, UnsupportedError
from edgellm.formats.file_types import QUANTIZATION_VERSION
from edgellm.formats.findings import PULL_AGAIN, short
from edgellm.formats.gguf_writer import rows_in_chunks
from edgellm.formats.model_file import ModelFile
from edgellm.formats.quant_types import QUANT_TYPES
from edgellm.formats.stored_numbers import FLOATS
from edgellm.models import alike, architectures, build_program, module_of
from edgellm.models.parts.checkpoint_config import CheckpointConfig
from edgellm.models.parts.checkpoint_form import CheckpointForm, Place
from edgellm.models.parts.checkpoint_keys import ALIASES, DEFAULTS, HARMLESS_IN, USED, check_keys
from edgellm.quantize.arranged import (
    every_nth,
    experts_apart,
    from_row,
    of_these_rows,
    part_of_rows,
    rearranged,
    rows_of_heads,
    stacked,
    transposed,
    transposed_matrix,
    with_paired_heads,
    with_rows,
)
from edgellm.quantize.general_metadata import general_metadata, generation_notes
from edgellm.quantize.input_model import InputModel, InputTensor
from edgellm.quantize.pooling_metadata import module_paths, pooling_metadata
from edgellm.quantize.projections import PROJECTION, projections
from edgellm.sampling.params import SamplingParams
from edgellm.tokenizer.checkpoint_vocabulary import tokenizer_metadata

_SEEING = (
    *("gemma3", "gemma3n", "gemma4", "gemma4_unified", "glm_ocr", "qwen2_vl", "qwen2_5_vl"),
    *("qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"),
)
FRAMES = {kind: (f"{kind}_text",) for kind in _SEEING} | {"mistral3": ("ministral3", "mistral")}
"""model_type of settings around those of the text, and those that the text's own may have, the usual one first."""
FLAT = ("qwen2_vl", "qwen2_5_vl")
"""Of these, those whose first checkpoints have the settings of the text beside their own, and no ``text_config``."""
TIES = ("qwen2_vl", "qwen2_5_vl", "glm_ocr")
"""Of these, those whose embedding is the output's matrix where the settings of the text say so, too."""
# kept by some writers, without a meaning for the weights; parts of a model that sees or hears
IGNORED = re.compile(
    r".*\.(rotary_emb\.inv_freq|masked_bias|(input|output|activation|[kvq])_(global_)?(scale|zero_point))"
    r"|.*\b(vision_tower|vision_model|multi_modal_projector|audio_tower|visual|embed_vision|embed_audio)\b.*"
    r"|(model\.)?mtp\..*"  # drafts of the tokens that follow the next
)


FULL = ("ssm_conv1d.weight", "altup_correct_coef.weight", "altup_predict_coef.weight")
"""Small matrices that are float32 whatever the others are."""
UNUSUAL = "Programs other than edgellm may refuse the file: {} is not usual in its architecture."


def open_checkpoint(folder: str | Path, *, pre: str | None = None, with_json: bool = True) -> InputModel:
    """Open the checkpoint and prove that it is a whole model of an architecture that edgellm runs.

    pre, with_json   see ``tokenizer_metadata``

    FormatError with the code of what is wrong; UnsupportedError for an architecture, scheme or tokenizer that edgellm
    does not have.
    """
    bus_error.install()  # weights are compared before there is a source
    checkpoint = Checkpoint.open(folder)
    architecture, form, model_type = find_form(checkpoint)
    config, notes = read_config(checkpoint, model_type)
    architecture, form = settled(architecture, form, config)
    scheme = scheme_of(checkpoint)
    metadata = form.metadata(config)
    n_experts = metadata.get(f"{architecture}.expert_count", (0, ""))[0]
    tensors = _tensors(checkpoint, config, form, n_experts, bool(scheme), notes)
    if form.has_projections:
        sizes, matrices = projections(checkpoint, architecture, module_paths(checkpoint, PROJECTION))
        metadata |= sizes
        for name, (stored_name, weight) in matrices.items():
            tensors[name] = input_tensor(name, stored_name, weight, config, form, False)
    n_vocab = tensors["token_embd.weight"].shape[0] if "token_embd.weight" in tensors else 0
    tokenizer, more = tokenizer_metadata(
        checkpoint, n_vocab, space_prefix=form.space_prefix, pre=pre, with_json=with_json
    )
    notes += more + generation_notes(checkpoint)
    n_params = sum(tensor.n_elements for tensor in tensors.values())
    whole = {
        "general.architecture": (architecture, "STRING"),
        "general.type": ("model", "STRING"),
        **general_metadata(checkpoint, n_params),
        **metadata,
        **pooling_metadata(checkpoint, architecture, (PROJECTION,) * form.has_projections),
        "general.quantization_version": (QUANTIZATION_VERSION, "UINT32"),
        **tokenizer,
    }
    source = InputModel(
        Path(folder), "checkpoint", whole, tensors, n_parts=checkpoint.n_shards, scheme=scheme, notes=notes
    )
    _prove(source)
    return source


def settled(architecture: str, form: CheckpointForm, config: CheckpointConfig) -> tuple[str, CheckpointForm]:
    """The architecture and its form once the settings are known: some stand for another one."""
    if form.variant is None:
        return architecture, form
    architecture, own = form.variant(config)
    return architecture, own or module_of(architecture).CHECKPOINT


def find_form(checkpoint: Checkpoint) -> tuple[str, CheckpointForm, str]:
    """The architecture as GGUF names it, its form, and the kind of settings. UnsupportedError for any other model."""
    classes = checkpoint.config.get("architectures")
    named = classes[0] if isinstance(classes, list) and classes else None
    model_type = checkpoint.config.get("model_type")
    known: list[str] = []
    for architecture in architectures():
        form = module_of(architecture).CHECKPOINT
        known += form.classes
        kind = form.classes.get(named) if isinstance(named, str) else None
        said = form.renamed_kinds.get(model_type, model_type) if isinstance(model_type, str) else model_type
        if named is None and said in form.classes.values() and not form.needs_class:
            kind = said
        if kind is None:
            continue
        # transformers goes by model_type, GGUF converters by the class
        if said not in (None, kind, form.settings or kind):
            raise UnsupportedError(
                f"{checkpoint.folder.name}/config.json: model_type is {short(model_type)}, and a {named} is a {kind}. "
                "Correct the one that is wrong.",
                code="CHECKPOINT_ARCHITECTURE",
            )
        for key in ("num_local_experts", "num_experts") if not (form.has_experts or form.variant) else ():
            if checkpoint.text_config.get(key):
                raise UnsupportedError(
                    f"{checkpoint.folder.name}: is a mixture of experts ({key}); edgellm runs dense models of its "
                    "architecture. Take a model without experts."
                )
        return architecture, form, form.settings or kind
    raise UnsupportedError(
        f"{checkpoint.folder.name}/config.json: the model is a {short(named or model_type)}, which is none of the "
        f"classes that edgellm converts{alike(str(named or model_type), known)}; `edgellm doctor` lists their "
        "architectures. Take a model of one of these.",
        code="CHECKPOINT_ARCHITECTURE",
    )


def read_config(checkpoint: Checkpoint, model_type: str) -> tuple[CheckpointConfig, list[str]]:
    """The settings of the language model, every key known, and what the user should know of them."""
    folder, values = checkpoint.folder, checkpoint.config
    if model_type in FRAMES:
        frame, values = _frame_and_text(checkpoint, model_type)
        notes = check_keys(folder, frame, model_type)
        tied = frame.get("tie_word_embeddings", DEFAULTS[model_type]["tie_word_embeddings"])
        tied = tied or (model_type in TIES and values.get("tie_word_embeddings"))
        kinds = FRAMES[model_type]
        model_type = values["model_type"] if values.get("model_type") in kinds else kinds[0]
        notes += check_keys(folder, values, model_type)
        values["tie_word_embeddings"] = tied  # that of the text alone has no effect
        values["vision_config"] = frame.get("vision_config")
    else:
        notes = check_keys(folder, values, model_type)
    named = ALIASES.get(model_type, {})
    own = {usual: key for key, usual in named.items() if key in values}
    values = {named.get(key, key): value for key, value in values.items()}
    return CheckpointConfig(folder, DEFAULTS[model_type] | values, model_type, own), notes


def _frame_and_text(checkpoint: Checkpoint, model_type: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings around those of the text, and these."""
    values = checkpoint.config
    if model_type not in FLAT or values.get("text_config") is not None:
        return values, dict(checkpoint.text_config)
    around = HARMLESS_IN[model_type] | {"text_config"}
    frame = {key: value for key, value in values.items() if key in around | USED[model_type]}
    return frame, {key: value for key, value in values.items() if key not in around}


# -- tensors ---------------------------------------------------------------------------------------------------------


def _tensors(
    checkpoint: Checkpoint,
    config: CheckpointConfig,
    form: CheckpointForm,
    n_experts: int,
    quantized: bool,
    notes: list[str],
) -> dict[str, InputTensor]:
    """All tensors under their GGUF names: embedding, layers in order, the output's norm and matrix."""
    found: dict[str, InputTensor] = {}
    experts: dict[str, dict[int, InputTensor]] = {}
    biases = form.biases(config)
    unknown, left_out = [], form.leaves_out(config) or _draft_layers(config)
    first_rows, pieces, by_head = form.first_rows(config), form.pieces(config), form.by_head(config)
    rows_of = form.rows_of(config)
    for stored_name, weight in open_weights(checkpoint).items():
        if left_out and re.fullmatch(left_out, stored_name):
            continue
        places = form.places(plain_name(stored_name), config.n_layer, biases, pieces, by_head)
        if not places and not IGNORED.fullmatch(stored_name) and not _is_no_bias(stored_name, weight):
            unknown.append(stored_name)
        for place in places:
            if place.name in found or place.expert in experts.get(place.name, ()):
                raise FormatError(
                    f"{short(stored_name)}: two tensors are {place.name}. {PULL_AGAIN}", code="CHECKPOINT_TENSOR"
                )
            tensor = _placed(place, stored_name, weight, config, form, quantized)
            if form.leaves_out_zeros and re.fullmatch(form.leaves_out_zeros, stored_name):
                if not tensor.decode(0, 1).any():
                    continue
                notes.append(UNUSUAL.format(place.name))
            tensor = from_row(tensor, first_rows.get(place.name, 0), stored_name)
            tensor = with_rows(tensor, rows_of.get(place.name), stored_name)
            if place.expert is None:
                found[place.name] = tensor
            else:
                experts.setdefault(place.name, {})[place.expert] = tensor
    _stack(checkpoint, experts, n_experts, by_head, found)
    _check_heads(checkpoint, config, by_head, found)
    if unknown:
        raise UnsupportedError(
            f"{checkpoint.folder.name}: {len(unknown)} tensors have no place in {next(iter(form.classes))} as its "
            f"config.json says it is ({', '.join(short(name) for name in unknown[:3])}{' ...' * (len(unknown) > 3)}); "
            "without them the answers would be wrong. Take another checkpoint of the model.",
            code="MODEL_TENSOR_UNKNOWN",
        )
    if "output" in form.around.values():
        _tie_output(checkpoint, config, found, notes)
    _check_biases(checkpoint, config, biases, found)
    rows = found["token_embd.weight"].shape[0] if "token_embd.weight" in found else config.get("vocab_size")
    if rows != config.integer("vocab_size", rows):
        raise config.wrong("vocab_size", config.get("vocab_size"), f"{rows:,}, the rows of the embedding")
    for name, numbers in form.extra(config).items():
        found[name] = _computed(name, numbers)
        if not (form.pairs_heads or form.extra_is_usual):
            notes.append(UNUSUAL.format(name))
    return {name: found[name] for name in sorted(found, key=_place)}


def _stack(
    checkpoint: Checkpoint,
    apart: Mapping[str, dict[int, InputTensor]],
    n_experts: int,
    by_head: Mapping[str, str],
    found: dict[str, InputTensor],
) -> None:
    """What the checkpoint has expert by expert, or head by head, as one tensor each."""
    for name, tensors in apart.items():
        if name in found:
            raise FormatError(
                f"{checkpoint.folder.name}: {name} is there as one and expert by expert. {PULL_AGAIN}",
                code="CHECKPOINT_TENSOR",
            )
        is_of_experts = name.startswith("blk.") and name.split(".")[2] not in by_head.values()
        # of all others the program asks for as many as there are to be
        found[name] = stacked(name, tensors, n_experts if is_of_experts else len(tensors))


def _check_heads(
    checkpoint: Checkpoint, config: CheckpointConfig, by_head: Mapping[str, str], found: Mapping[str, InputTensor]
) -> None:
    """FormatError where vectors of heads are not there, which the settings say are."""
    for i, (module, name) in itertools.product(range(config.n_layer), by_head.items()):
        if f"blk.{i}.{name}.weight" not in found:
            raise FormatError(
                f"{checkpoint.folder.name}: layer {i} has no {module}, which config.json says it has. {PULL_AGAIN}",
                code="CHECKPOINT_TENSOR",
            )


def _draft_layers(config: CheckpointConfig) -> str:
    """A pattern of the names of tensors behind the last layer, which draft the tokens that follow the next."""
    n_drafts = config.integer("num_nextn_predict_layers") if config.get("num_nextn_predict_layers") else 0
    layers = "|".join(str(config.n_layer + i) for i in range(min(n_drafts, 64)))
    return rf"model\.(?:language_model\.)?layers\.(?:{layers})\..*" if layers else ""


def _placed(
    place: Place, stored_name: str, weight: Weight, config: CheckpointConfig, form: CheckpointForm, quantized: bool
) -> InputTensor:
    """What goes to one place of a weight, in GGUF's order."""
    tensor = input_tensor(place.name, stored_name, weight, config, form, quantized)
    if place.rows is not None:
        return of_these_rows(tensor, place.rows, place.of, stored_name)
    if re.sub(r"^blk\.\d+\.", "", place.name) in form.transposed:
        tensor = transposed_matrix(tensor, stored_name)
    if form.joined_experts and place.name.endswith("_exps.weight"):
        tensor = experts_apart(tensor, config.integer("num_experts"), stored_name)
        return transposed(tensor) if "ffn_down" in place.name else tensor
    if place.name.endswith("_exps.weight") and _is_transposed(weight, place.name, config, form):
        tensor = transposed(tensor)
    if (of := form.head_rows(config).get(re.sub(r"^blk\.\d+\.", "", place.name))) is not None:
        return rows_of_heads(tensor, of, stored_name)
    cut = every_nth if form.transposed_experts else part_of_rows
    return cut(rearranged(tensor, form, config), *place.part, stored_name)


def _is_no_bias(name: str, weight: Weight) -> bool:
    """Whether a tensor without a place is a bias of zeros, as GPTQ's writers put everywhere."""
    return name.endswith(".bias") and len(weight.shape) == 1 and not weight.decode(0, 1).any()


def _tie_output(
    checkpoint: Checkpoint, config: CheckpointConfig, found: dict[str, InputTensor], notes: list[str]
) -> None:
    """Leave out an output matrix that is the embedding. As in transformers, one that differs stays, whatever the
    config says, and stands for the embedding where that is missing."""
    head, embedding = found.get("output.weight"), found.get("token_embd.weight")
    if not config.flag("tie_word_embeddings", False):
        if head is None:
            raise FormatError(
                f"{checkpoint.folder.name}: lm_head.weight is missing, and tie_word_embeddings is not true. "
                f"{PULL_AGAIN}",
                code="CHECKPOINT_TENSOR",
            )
    elif head is not None and embedding is None:
        found["token_embd.weight"] = replace(found.pop("output.weight"), name="token_embd.weight")
    elif head is not None and embedding is not None and _equal(head, embedding):
        del found["output.weight"]
    elif head is not None:
        notes.append(
            "config.json says that lm_head.weight is the embedding, and the checkpoint has another one: it is kept, as "
            "transformers keeps it."
        )


def _equal(one: InputTensor, other: InputTensor) -> bool:
    if one.shape != other.shape:
        return False
    chunks = rows_in_chunks(one.n_rows, 4 * one.n_in)
    return all(np.array_equal(one.rows(*rows), other.rows(*rows)) for rows in chunks)


def _check_biases(
    checkpoint: Checkpoint, config: CheckpointConfig, biases: frozenset[str], found: dict[str, InputTensor]
) -> None:
    wanted = [f"blk.{i}.{module}.bias" for i in range(config.n_layer) for module in sorted(biases)]
    missing = [name for name in wanted if name not in found and name.replace(".bias", ".weight") in found]
    if missing:
        raise FormatError(
            f"{checkpoint.folder.name}: {len(missing)} biases are missing, the first is {missing[0]}; its class, or "
            f"attention_bias or mlp_bias in config.json, says that the model has them. {PULL_AGAIN}",
            code="CHECKPOINT_TENSOR",
        )


def plain_name(name: str) -> str:
    """The name as the class for text alone has it: a model that also sees, or has no head, spells it otherwise."""
    name = re.sub(r"^(?:model\.)?language_model\.(?:model\.)?", "model.", name)
    name = re.sub(r"^(?:model\.)?backbone\.", "model.", name)
    name = name.replace("model.lm_head.", "lm_head.")
    return re.sub(r"^(?=layers\.|embed_tokens\.|norm\.)", "model.", name)


def _place(name: str) -> tuple[int, int, str]:
    """Where a tensor stands in the file."""
    if name.startswith("blk."):
        _, layer, rest = name.split(".", 2)
        return 1, int(layer), rest
    return (0 if name.startswith(("token_embd", "rope_f")) else 2), 0, name


def input_tensor(
    name: str, stored_name: str, weight: Weight, config: CheckpointConfig, form: CheckpointForm, quantized: bool
) -> InputTensor:
    """A weight with the changes that its architecture's GGUF form asks for; its numbers are proved finite when read."""
    if len(weight.shape) == 3 and weight.shape[1] == 1:  # one filter for each channel
        weight = replace(weight, shape=(weight.shape[0], weight.shape[2]))
    if name.endswith(("_shexp.weight", "exp_probs_b.bias")) and weight.shape[:1] == (1,):  # how much of it, a vector
        weight = replace(weight, shape=weight.shape[1:])
    most = 3 if name.endswith("_exps.weight") else 2
    if not weight.shape or not all(weight.shape) or len(weight.shape) > most:
        expected = "a vector or a matrix" if most == 2 else "one or several matrices"
        raise FormatError(
            f"{short(stored_name)}: has the shape {weight.shape}, expected {expected}. {PULL_AGAIN}",
            code="MODEL_SHAPE",
        )
    raw = weight.stored
    shift = form.norm_shift if name.endswith("norm.weight") and not name.endswith("ssm_norm.weight") else 0.0
    plain_floats = raw is not None and raw.kind.name in FLOATS and len(weight.shape) > 1 and name.endswith("weight")
    plain_floats = plain_floats and not name.endswith(FULL)

    def decode(start: int, stop: int) -> np.ndarray:
        with np.errstate(invalid="ignore", over="ignore"):
            rows = weight.decode(start, stop)
        if not np.isfinite(rows).all():
            row = start + int(np.flatnonzero(~np.isfinite(rows).all(axis=-1))[0])
            raise FormatError(
                f"{short(stored_name)}: row {row:,} holds NaN or infinity, expected numbers. {PULL_AGAIN}",
                code="TENSOR_NAN",
            )
        return rows + np.float32(shift) if shift else rows

    def stored(start: int, stop: int) -> np.ndarray:
        if raw is None or not plain_floats:
            return np.ascontiguousarray(decode(start, stop)).view(np.uint8)
        decode(start, stop)  # for its proof
        return raw.raw.reshape(math.prod(weight.shape[:-1]), -1)[start:stop]

    tensor = InputTensor(
        name,
        weight.shape,
        QUANT_TYPES[raw.kind.name if raw is not None and plain_floats else "F32"],
        decode,
        stored,
        quantized=quantized and raw is None,
    )
    n_heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}.get(name.split(".")[-2])
    if form.pairs_heads and n_heads:
        n_head = config.integer(n_heads, config.integer("num_attention_heads"))
        tensor = with_paired_heads(tensor, n_head, stored_name)
    return tensor


def _is_transposed(weight: Weight, name: str, config: CheckpointConfig, form: CheckpointForm) -> bool:
    """Whether matrices of experts are (n_in, n_out); equal sides count as the usual way round, as in transformers."""
    if form.turned_experts and len(weight.shape) == 3:
        return weight.shape[-1] != config.integer("moe_intermediate_size" if "ffn_down" in name else "hidden_size")
    return form.transposed_experts and weight.stored is not None


def _computed(name: str, numbers: np.ndarray) -> InputTensor:
    row = np.ascontiguousarray(numbers, np.float32).reshape(1, -1)
    return InputTensor(
        name,
        numbers.shape,
        QUANT_TYPES["F32"],
        lambda start, stop: row[start:stop],
        lambda start, stop: row[start:stop].view(np.uint8),
    )


# -- proof -----------------------------------------------------------------------------------------------------------


class _Unwritten:
    """The converted model as an architecture reads it, before it is a file."""

    def __init__(self, source: InputModel) -> None:
        self.path, self.architecture, self.tensors = source.path, source.architecture, source.tensors
        self.metadata: dict[str, Any] = {key: value for key, (value, _) in source.metadata.items()}
        self.overrides: dict[str, Any] = {}


def as_model_file(source: InputModel) -> ModelFile:
    """A converted model as an architecture reads it, before it is a file."""
    return _Unwritten(source)


def _prove(source: InputModel) -> None:
    """Every tensor is there in the shape that the metadata demand, and the recommended sampling is in range: the
    architecture builds its program."""
    file = _Unwritten(source)
    build_program(file)
    SamplingParams.from_metadata(file.metadata)
