"""Open a folder with a Hugging Face checkpoint: config.json, and the tensors of one or several safetensors files.

Nothing of the folder is run: weights in pickled files are refused. Every file comes from ``CheckpointFolder``; names of
files that the folder's own JSON gives are taken only when they are plain names in the same folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgellm.formats.checkpoint_folder import CheckpointFolder
from edgellm.formats.errors import FormatError, ModelNotFoundError, ParameterError, UnsupportedError
from edgellm.formats.findings import PULL_AGAIN, short, wrong_config
from edgellm.formats.json_text import parse_json
from edgellm.formats.safetensors import SafetensorsFile, StoredTensor
from edgellm.formats.text_file import decode_text

MAX_CONFIG_NBYTES = 1 << 24  # real ones have a few kilobytes
MAX_INDEX_NBYTES = 1 << 26
MAX_SHARDS = 4096
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
QUANTIZATION_KEYS = ("quantization_config", "compression_config", "quantization")  # the last is MLX's
TEMPLATES = "additional_chat_templates"  # folder of further ones
ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "consolidated.00.pth")


@dataclass
class Checkpoint:
    """An open checkpoint. ``config`` is config.json; ``tensors`` are by their names in the files."""

    files: CheckpointFolder
    config: dict[str, Any]
    tensors: dict[str, StoredTensor]
    n_shards: int = 1
    _json: dict[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def open(cls, folder: str | Path) -> Checkpoint:
        """Open it and prove every header. FormatError ``CHECKPOINT_*``, ``SAFETENSORS_*`` or ``MODEL_TRUNCATED``."""
        files = CheckpointFolder(folder)
        config = read_json(files, "config.json", MAX_CONFIG_NBYTES)
        if config is None:
            raise ModelNotFoundError(
                f"{folder}: has no config.json, so it is no Hugging Face checkpoint. {_instead(files)}",
                code="CHECKPOINT_CONFIG",
            )
        weight_map = _weight_map(files)
        names = _shards(files, weight_map)
        tensors: dict[str, StoredTensor] = {}
        for name in names:
            for tensor in SafetensorsFile.open_in(files, name).tensors.values():
                if tensor.name in tensors:
                    raise FormatError(
                        f"{name}: {short(tensor.name)}: is in another file of the checkpoint too. {PULL_AGAIN}",
                        code="CHECKPOINT_SHARD",
                    )
                tensors[tensor.name] = tensor
        _check_index(files, weight_map or {}, tensors)
        return cls(files, config, tensors, len(names))

    @classmethod
    def of_base(cls, folder: Path) -> Checkpoint:
        """The settings alone of the model that an adapter or a draft is for. ParameterError without them."""
        files = CheckpointFolder(folder)
        config = read_json(files, "config.json", MAX_CONFIG_NBYTES)
        if config is None:
            raise ParameterError(f"{folder}: has no config.json. Give --base with the folder of the model that has it.")
        return cls(files, config, {}, 0)

    @property
    def folder(self) -> Path:
        """The folder, for its name."""
        return self.files.path

    @property
    def text_config(self) -> Mapping[str, Any]:
        """The settings of the language model: of a part of its own in the config of a model that also sees."""
        inner = self.config.get("text_config")
        return inner if isinstance(inner, dict) else self.config

    @property
    def quantization(self) -> dict[str, Any] | None:
        """``quantization_config``, or how others call it; None for a checkpoint that is not quantized."""
        for config in (self.config, self.text_config):
            for key in QUANTIZATION_KEYS:
                found = config.get(key)
                if found is not None and not isinstance(found, dict):
                    raise wrong_config(self.folder, key, found, "an object")
                if found:
                    return found
        # older checkpoints of NVIDIA's say it in a file of its own
        return {"quant_method": "modelopt"} if self.json("hf_quant_config.json") else None

    def json(self, name: str, limit: int = MAX_CONFIG_NBYTES) -> dict[str, Any] | None:
        """Another JSON file of the folder, read once; None when it is not there."""
        if name not in self._json:
            self._json[name] = read_json(self.files, name, limit)
        found: dict[str, Any] | None = self._json[name]
        return found

    def text(self, name: str, limit: int = MAX_CONFIG_NBYTES) -> str | None:
        """A text file of the folder, None when it is not there. FormatError ``TEXT_ENCODING``."""
        raw = self.files.read(name, limit)
        return None if raw is None else decode_text(raw, name)


# files of folders that are something else: what they are, what to do
OTHER_FOLDERS = {
    "adapter_config.json": "It is an adapter (LoRA): merge it into its model, and give the folder of the result.",
    "model_index.json": "It is a model that makes pictures. Give one that makes text.",
    "params.json": "It is in the form of the model's makers. Take the model in the form of transformers.",
}


def _instead(files: CheckpointFolder) -> str:
    """What to do about a folder that is no checkpoint."""
    known = next((advice for name, advice in OTHER_FOLDERS.items() if files.has(name)), None)
    if known is None and files.names(".gguf"):
        return "It has .gguf files: give the path of one."
    return known or "Give the folder that has it, or the path of a .gguf file."


def read_json(files: CheckpointFolder, name: str, limit: int) -> dict[str, Any] | None:
    """The object in a JSON file, None when there is no such file. FormatError ``CHECKPOINT_CONFIG``."""
    raw = files.read(name, limit)
    if raw is None:
        return None
    value = parse_json(raw, name, "CHECKPOINT_CONFIG", infinities=name == "config.json")  # of a limit that is none
    if not isinstance(value, dict):
        raise FormatError(f"{name}: a JSON object was expected. {PULL_AGAIN}", code="CHECKPOINT_CONFIG")
    return value


def _weight_map(files: CheckpointFolder) -> dict[str, str] | None:
    """Tensor -> file, as the index says; None without an index. Files are plain names in the folder.

    One whole file counts before an index that does not name it, as in transformers: that of an older checkpoint.
    """
    index = read_json(files, INDEX, MAX_INDEX_NBYTES)
    if index is None:
        return None
    weight_map = index.get("weight_map")
    if files.has(SINGLE) and not (isinstance(weight_map, dict) and SINGLE in weight_map.values()):
        return None
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{INDEX}: weight_map is no object of file names. {PULL_AGAIN}", code="CHECKPOINT_INDEX")
    for name in set(map(str, weight_map.values())) | {n for n in weight_map.values() if not isinstance(n, str)}:
        plain = isinstance(name, str) and Path(name).name == name and "\\" not in name and ":" not in name
        if not plain or "\0" in name or not name.endswith(".safetensors"):
            raise FormatError(
                f"{INDEX}: names the file {short(name)}, expected plain names that end in .safetensors. The index may "
                "have been made to do harm: download the checkpoint from its author.",
                code="CHECKPOINT_INDEX",
            )
    return weight_map


def _shards(files: CheckpointFolder, weight_map: Mapping[str, str] | None) -> list[str]:
    """The files that hold the tensors. FormatError ``CHECKPOINT_SHARD`` when one is missing."""
    adapter = next((name for name in ADAPTER if files.has(name)), None)
    if adapter:
        raise UnsupportedError(
            f"{files.name}: has {adapter}, the file of an adapter, whose weights would be left out. A whole model was "
            "expected: merge the adapter into its model first, or take the file out to convert the model without it.",
            code="CHECKPOINT_ADAPTER",
        )
    names = sorted(set(weight_map.values())) if weight_map else [SINGLE]
    if weight_map is None and not files.has(SINGLE):
        others = files.names(".safetensors")
        if len(others) == 1:
            return others
        pickled = next((name for name in PICKLED if files.has(name)), None)
        if pickled:
            raise UnsupportedError(
                f"{files.name}: has its weights in {pickled}, a pickled file, which can run a stranger's program when "
                f"it is read. {SINGLE} was expected: take a revision of the checkpoint with safetensors files.",
                code="CHECKPOINT_PICKLE",
            )
        raise FormatError(
            f"{files.name}: has no {SINGLE} and no {INDEX}. Download all files of the checkpoint into one folder.",
            code="CHECKPOINT_SHARD",
        )
    if len(names) > MAX_SHARDS:
        raise FormatError(f"{INDEX}: names {len(names):,} files, expected up to {MAX_SHARDS:,}. {PULL_AGAIN}")
    missing = [name for name in names if not files.has(name)]
    if missing:
        raise FormatError(
            f"{files.name}: {len(missing)} of {len(names)} files are missing: {', '.join(missing[:5])}. Download all "
            "files of the checkpoint into one folder.",
            code="CHECKPOINT_SHARD",
        )
    return names


def _check_index(files: CheckpointFolder, weight_map: Mapping[str, str], tensors: Mapping[str, StoredTensor]) -> None:
    """Every tensor of the index is there. Tensors that it does not list are no harm."""
    missing = [name for name in weight_map if name not in tensors]
    if missing:
        raise FormatError(
            f"{files.name}: {len(missing)} tensors of {INDEX} are in no file, the first is {short(missing[0])}. "
            f"{PULL_AGAIN}",
            code="CHECKPOINT_TENSOR",
        )
