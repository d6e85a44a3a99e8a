"""A folder with a draft for another model as a source: EAGLE-3 and DFlash, as their makers publish them.

Such a folder has no tokenizer, and says little of the model; both come from the model's own folder or GGUF file.
"""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgellm.formats.checkpoint import MAX_CONFIG_NBYTES, Checkpoint, read_json
from edgellm.formats.checkpoint_folder import CheckpointFolder
from edgellm.formats.checkpoints import open_weights, scheme_of
from edgellm.formats.errors import FormatError, ParameterError, UnsupportedError
from edgellm.formats.file_types import QUANTIZATION_VERSION
from edgellm.formats.findings import PULL_AGAIN, short
from edgellm.formats.gguf import GGUFFile
from edgellm.formats.gguf_header import TypedMetadata
from edgellm.formats.quant_types import QUANT_TYPES
from edgellm.machine.paths import path_if_there
from edgellm.models import DRAFTS
from edgellm.models.drafts import Target, build_draft
from edgellm.models.parts.checkpoint_config import CheckpointConfig
from edgellm.models.parts.checkpoint_form import CheckpointForm
from edgellm.models.parts.checkpoint_keys import DEFAULTS, check_keys
from edgellm.quantize.checkpoint import IGNORED, as_model_file, find_form, input_tensor, plain_name, read_config
from edgellm.quantize.general_metadata import general_metadata
from edgellm.quantize.input_model import InputModel, InputTensor
from edgellm.tokenizer.checkpoint_vocabulary import tokenizer_metadata

IDS, IDS_BACK = "d2t", "t2d"
"""How far the model's id is from each of the draft's own; the other way round, which nobody needs."""


@dataclass(frozen=True)
class _Model:
    """What a draft is for: its sizes, and its tokenizer."""

    n_layer: int
    n_embd: int
    n_vocab: int
    tokenizer: TypedMetadata
    notes: list[str]


def draft_kind(folder: Path) -> str | None:
    """Which of DRAFTS a folder with config.json has; None for anything else."""
    settings = read_json(CheckpointFolder(folder), "config.json", MAX_CONFIG_NBYTES) if folder.is_dir() else None
    if settings is None:
        return None
    classes = settings.get("architectures")
    named = classes[0] if isinstance(classes, list) and classes else None
    for kind in DRAFTS:
        if isinstance(named, str) and named in _form(kind).classes:
            return kind
    # the first ones were published under the class of their model
    return "eagle3" if "draft_vocab_size" in settings and settings.get("num_hidden_layers") == 1 else None


def _form(kind: str) -> CheckpointForm:
    form: CheckpointForm = _module(kind).CHECKPOINT
    return form


def _module(kind: str) -> Any:
    return importlib.import_module(f"edgellm.models.drafts.{kind}")


def open_draft(
    folder: Path, kind: str, base: str | Path | None, *, pre: str | None = None, with_json: bool = True
) -> InputModel:
    """The draft as a source, fit for ``convert``.

    base             the folder of the model that it is for, or its GGUF file
    pre, with_json   see ``tokenizer_metadata``

    FormatError with the code of what is wrong; UnsupportedError for a setting that edgellm does not have.
    """
    checkpoint = Checkpoint.open(folder)
    values = dict(checkpoint.config)
    inner = values.get("transformer_layer_config")
    values |= inner if isinstance(inner, dict) else {}
    notes = check_keys(checkpoint.folder, values, kind)
    config = CheckpointConfig(checkpoint.folder, DEFAULTS[kind] | values, kind)
    model = _model(folder, base, _form(kind), pre, with_json)
    tensors = _tensors(checkpoint, config, _form(kind), model)
    n_params = sum(tensor.n_elements for tensor in tensors.values())
    metadata = {
        "general.architecture": (kind, "STRING"),
        "general.type": ("model", "STRING"),
        **general_metadata(checkpoint, n_params),
        **_module(kind).checkpoint_metadata(config, model.n_layer, model.n_embd, model.n_vocab),
        "general.quantization_version": (QUANTIZATION_VERSION, "UINT32"),
    }
    metadata = {**model.tokenizer, **metadata}
    source = InputModel(
        folder,
        "checkpoint",
        metadata,
        tensors,
        n_parts=checkpoint.n_shards,
        scheme=scheme_of(checkpoint),
        notes=[*notes, *model.notes],
    )
    shapes = {name: _Shape((model.n_vocab, model.n_embd)) for name in ("token_embd.weight", "output.weight")}
    build_draft(as_model_file(source), Target(model.n_vocab, model.n_embd, model.n_layer, shapes))
    return source


@dataclass(frozen=True)
class _Shape:
    """A tensor of the model, of which the shape alone is known."""

    shape: tuple[int, ...]

    def dequantize(self) -> np.ndarray:
        """None of its numbers are here."""
        return np.empty(self.shape, np.float32)


def _model(folder: Path, base: str | Path | None, form: CheckpointForm, pre: str | None, with_json: bool) -> _Model:
    path = path_if_there(base) if base is not None else None
    if path is None:
        found = "has no tokenizer" if base is None else f"--base is {short(base)}, which is not here"
        raise ParameterError(
            f"{folder.name}: is a draft for another model, and {found}. Give --base with the folder of that model, of "
            "which config.json and the tokenizer are enough, or with its GGUF file."
        )
    if not path.is_dir():
        with GGUFFile.open(path) as gguf:
            n_layer = gguf.require(f"{gguf.architecture}.block_count", int)
            n_layer -= gguf.get(f"{gguf.architecture}.nextn_predict_layers", int, 0)
            n_embd = gguf.require(f"{gguf.architecture}.embedding_length", int)
            n_vocab = len(gguf.require("tokenizer.ggml.tokens", list))
            tokenizer = {
                key: (value, gguf.value_types[key])
                for key, value in gguf.metadata.items()
                if key.startswith("tokenizer.") and "chat_template" not in key
            }
        return _Model(n_layer, n_embd, n_vocab, tokenizer, [])
    checkpoint = Checkpoint.of_base(path)
    _, own, model_type = find_form(checkpoint)
    config, _ = read_config(checkpoint, model_type)
    n_vocab = config.integer("vocab_size")
    tokenizer, notes = tokenizer_metadata(
        checkpoint, n_vocab, space_prefix=own.space_prefix, pre=pre, with_json=with_json
    )
    tokenizer = {key: value for key, value in tokenizer.items() if "chat_template" not in key}
    return _Model(config.n_layer, config.integer("hidden_size"), n_vocab, tokenizer, notes)


def _tensors(
    checkpoint: Checkpoint, config: CheckpointConfig, form: CheckpointForm, model: _Model
) -> dict[str, InputTensor]:
    """All tensors under their GGUF names."""
    found: dict[str, InputTensor] = {}
    unknown = []
    for stored_name, weight in open_weights(checkpoint).items():
        if stored_name in (IDS, IDS_BACK):
            if stored_name == IDS:
                found[IDS] = _ids(weight.decode(0, 1), model.n_vocab)
            continue
        for place in form.places(plain_name(stored_name), config.n_layer, form.biases(config)):
            if place.name in found:
                raise FormatError(
                    f"{short(stored_name)}: two tensors are {place.name}. {PULL_AGAIN}", code="CHECKPOINT_TENSOR"
                )
            found[place.name] = input_tensor(place.name, stored_name, weight, config, form, False)
            break
        else:
            if not re.fullmatch(IGNORED, stored_name):
                unknown.append(stored_name)
    if unknown:
        raise UnsupportedError(
            f"{checkpoint.folder.name}: {len(unknown)} tensors have no place in a draft of this kind "
            f"({', '.join(short(name) for name in unknown[:3])}{' ...' * (len(unknown) > 3)}); without them it would "
            "draft otherwise. Take another checkpoint.",
            code="MODEL_TENSOR_UNKNOWN",
        )
    for name, numbers in form.extra(config).items():
        found[name] = _row(name, np.ascontiguousarray(numbers, np.float32).reshape(1, -1), "F32")
    return found


def _ids(offsets: np.ndarray, n_vocab: int) -> InputTensor:
    """The model's id of each of the draft's own, from how far it is away."""
    ids = offsets.reshape(-1).astype(np.int64) + np.arange(offsets.size)
    if ids.min() < 0 or ids.max() >= n_vocab or len(np.unique(ids)) < len(ids):
        raise FormatError(
            f"{IDS}: leads to the ids {ids.min()} to {ids.max()}, {len(np.unique(ids))} of them, expected {len(ids)} "
            f"different ones below {n_vocab}. It is the draft of another model, or damaged. {PULL_AGAIN}",
            code="CHECKPOINT_TENSOR",
        )
    return _row(IDS, ids.astype("<i8").reshape(1, -1), "I64")


def _row(name: str, row: np.ndarray, kind: str) -> InputTensor:
    """A vector of numbers as they are stored."""

    def decode(start: int, stop: int) -> np.ndarray:
        return row[start:stop].astype(np.float32)

    def stored(start: int, stop: int) -> np.ndarray:
        return row[start:stop].view(np.uint8)

    return InputTensor(name, (row.shape[1],), QUANT_TYPES[kind], decode, stored)
