"""Models to convert or quantize: a GGUF file, a folder with a Hugging Face checkpoint, or a name that stands for one.

Nothing is decoded before it is asked for, so the memory needed is that of the rows in hand.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from edgellm.formats.errors import ParameterError
from edgellm.formats.gguf import GGUFFile, QuantizedTensor, stacked_experts
from edgellm.machine.paths import models_dir, path_if_there
from edgellm.machine.progress import ByteProgress
from edgellm.quantize.checkpoint import open_checkpoint
from edgellm.quantize.draft import draft_kind, open_draft
from edgellm.quantize.input_model import InputModel, InputTensor

__all__ = ["FLOAT_TYPES", "InputModel", "InputTensor", "open_checkpoint", "open_gguf", "open_input"]


def open_input(
    name_or_path: str | os.PathLike[str],
    progress: ByteProgress | None = None,
    *,
    pre: str | None = None,
    with_json: bool = True,
    base: str | Path | None = None,
) -> InputModel:
    """The model behind a GGUF file, a checkpoint folder, or a name of the catalogue; a name may be fetched first.

    ``hf:owner/repo`` is the repository's checkpoint where it has one, else its GGUF file. pre, with_json: how the
    tokenizer of a checkpoint is written, see ``tokenizer_metadata``. base: the model of a draft, see ``open_draft``.

    EdgeLLMError with the reader's code for what cannot be read, UnsupportedError for what edgellm does not convert.
    """
    path = _fetched(name_or_path, progress)
    if (kind := draft_kind(path)) is not None:
        return open_draft(path, kind, base, pre=pre, with_json=with_json)
    if base is not None:
        raise ParameterError(f"--base goes with the folder of an adapter or a draft, and {path} is neither.")
    return open_checkpoint(path, pre=pre, with_json=with_json) if path.is_dir() else open_gguf(path)


def _fetched(name_or_path: str | os.PathLike[str], progress: ByteProgress | None) -> Path:
    """The file or the checkpoint folder that a name stands for, fetched when it is not here."""
    if (path := path_if_there(name_or_path)) is not None:
        return path
    from edgellm.store.catalogue import fetched, references_of
    from edgellm.store.sources.hub_checkpoint import fetch_checkpoint, installed_checkpoint, is_repository

    references = references_of(os.fspath(name_or_path))
    if len(references) == 1 and is_repository(references[0]):
        root = models_dir()
        folder = installed_checkpoint(references[0], root) or fetch_checkpoint(references[0], root, progress)
        if folder is not None:
            return folder
    return fetched(name_or_path, progress)


def open_gguf(path: str | os.PathLike[str]) -> InputModel:
    """A GGUF file as a source, all parts of it when it is split."""
    gguf = GGUFFile.open(Path(path))
    try:
        _ = gguf.architecture
        tensors = stacked_experts(gguf.tensors)
        return InputModel(
            Path(path),
            "gguf",
            {key: (value, gguf.value_types[key]) for key, value in gguf.metadata.items()},
            {name: _stored_tensor(tensor, gguf) for name, tensor in tensors.items()},
            n_parts=gguf.get("split.count", int, 1) or 1,
            part_sizes=_part_sizes(gguf, tensors),
            gguf=gguf,
        )
    except BaseException:
        gguf.close()
        raise


def _part_sizes(gguf: GGUFFile, tensors: Mapping[str, QuantizedTensor]) -> list[int]:
    """Tensors of each part of a split model; a stack counts where its first expert is."""
    firsts = {tensor.pieces[0].name for tensor in tensors.values()}
    kept, sizes, start = [name in firsts for name in gguf.tensors], [], 0
    for size in gguf.part_sizes:
        sizes.append(sum(kept[start : start + size]))
        start += size
    return sizes


def _stored_tensor(tensor: QuantizedTensor, gguf: GGUFFile) -> InputTensor:
    """A tensor of a GGUF file; its bytes are a view of the mapped file."""
    return InputTensor(
        tensor.name,
        tensor.shape,
        tensor.quant,
        decode=lambda start, stop: tensor.dequantize(slice(start, stop)),
        stored=tensor.stored,
        quantized=tensor.quant.name not in FLOAT_TYPES,
        release=lambda: gguf.release(tensor),
    )


FLOAT_TYPES = ("F64", "F32", "BF16", "F16", "I8", "I16", "I32", "I64")
"""Types that hold numbers one by one."""
