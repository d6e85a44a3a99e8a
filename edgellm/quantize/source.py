"""Models to convert or quantize: a GGUF file, a folder with a Hugging Face checkpoint, or a name that stands for one.

Nothing is decoded before it is asked for, so the memory needed is that of the rows in hand.
"""

from __future__ import annotations

import os
from pathlib import Path

from edgellm.download import Progress
from edgellm.formats.gguf import GGUFFile, QuantizedTensor
from edgellm.quantize.checkpoint_source import open_checkpoint
from edgellm.quantize.model_source import ModelSource, SourceTensor

__all__ = ["FLOAT_TYPES", "ModelSource", "SourceTensor", "open_checkpoint", "open_gguf", "open_source"]


def open_source(name_or_path: str | os.PathLike[str], progress: Progress | None = None) -> ModelSource:
    """The model behind a GGUF file, a checkpoint folder, or a name of the catalogue; a name may be fetched first.

    EdgeLLMError with the reader's code for what cannot be read, UnsupportedError for what edgellm does not convert.
    """
    if Path(name_or_path).is_dir():
        return open_checkpoint(Path(name_or_path))
    from edgellm.catalogue import resolve

    return open_gguf(resolve(name_or_path, progress))


def open_gguf(path: str | os.PathLike[str]) -> ModelSource:
    """A GGUF file as a source, all parts of it when it is split."""
    gguf = GGUFFile.open(Path(path))
    try:
        _ = gguf.architecture
        return ModelSource(
            Path(path),
            "gguf",
            {key: (value, gguf.value_types[key]) for key, value in gguf.metadata.items()},
            {name: _stored_tensor(tensor) for name, tensor in gguf.tensors.items()},
            n_parts=gguf.get("split.count", int, 1) or 1,
            _close=gguf.close,
        )
    except BaseException:
        gguf.close()
        raise


def _stored_tensor(tensor: QuantizedTensor) -> SourceTensor:
    """A tensor of a GGUF file; its bytes are a view of the mapped file."""
    return SourceTensor(
        tensor.name,
        tensor.shape,
        tensor.quant,
        decode=lambda start, stop: tensor.dequantize(slice(start, stop)),
        stored=lambda start, stop: tensor.data[start:stop],
        quantized=tensor.quant.name not in FLOAT_TYPES,
    )


FLOAT_TYPES = ("F64", "F32", "BF16", "F16", "I8", "I16", "I32", "I64")
"""Types that hold numbers one by one."""
