"""Open a folder with a Hugging Face checkpoint: config.json, and the tensors of one or several safetensors files.

Nothing of the folder is run: weights in pickled files are refused. Names of files that the folder's own JSON gives are
taken only when they are plain names in the same folder.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgellm.formats.errors import FormatError, ModelNotFoundError, UnsupportedError
from edgellm.formats.findings import PULL_AGAIN, short
from edgellm.formats.safetensors import SafetensorsFile, StoredTensor, parse_json

MAX_CONFIG_NBYTES = 1 << 24  # real ones have a few kilobytes
MAX_INDEX_NBYTES = 1 << 26
MAX_SHARDS = 4096
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "consolidated.00.pth")


@dataclass
class Checkpoint:
    """An open checkpoint. ``config`` is config.json; ``tensors`` are by their names in the files."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, StoredTensor]
    n_shards: int = 1
    _json: dict[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def open(cls, folder: str | Path) -> Checkpoint:
        """Open it and prove every header. FormatError ``CHECKPOINT_*``, ``SAFETENSORS_*`` or ``MODEL_TRUNCATED``."""
        folder = Path(folder)
        config = read_json(folder, "config.json", MAX_CONFIG_NBYTES)
        if config is None:
            raise ModelNotFoundError(
                f"{folder}: has no config.json, so it is no Hugging Face checkpoint. Give the folder that has it, or "
                "the path of a .gguf file.",
                code="CHECKPOINT_CONFIG",
            )
        names = _shards(folder)
        tensors: dict[str, StoredTensor] = {}
        for name in names:
            for tensor in SafetensorsFile.open(folder / name).tensors.values():
                if tensor.name in tensors:
                    raise FormatError(
                        f"{name}: {short(tensor.name)}: is in another file of the checkpoint too. {PULL_AGAIN}",
                        code="CHECKPOINT_SHARD",
                    )
                tensors[tensor.name] = tensor
        _check_index(folder, tensors)
        return cls(folder, config, tensors, len(names))

    @property
    def text_config(self) -> Mapping[str, Any]:
        """The settings of the language model: of a part of its own in the config of a model that also sees."""
        inner = self.config.get("text_config")
        return inner if isinstance(inner, dict) else self.config

    @property
    def quantization(self) -> dict[str, Any] | None:
        """``quantization_config``; None for a checkpoint that is not quantized."""
        for config in (self.config, self.text_config):
            found = config.get("quantization_config", config.get("compression_config"))
            if found is not None:
                if not isinstance(found, dict):
                    raise wrong_config(self.folder, "quantization_config", found, "an object")
                return found
        return None

    def json(self, name: str, limit: int = MAX_CONFIG_NBYTES) -> dict[str, Any] | None:
        """Another JSON file of the folder, read once; None when it is not there."""
        if name not in self._json:
            self._json[name] = read_json(self.folder, name, limit)
        found: dict[str, Any] | None = self._json[name]
        return found

    def text(self, name: str, limit: int = MAX_CONFIG_NBYTES) -> str | None:
        """A text file of the folder, None when it is not there."""
        raw = _read(self.folder / name, limit)
        return None if raw is None else raw.decode("utf-8", "replace")


def wrong_config(folder: Path, key: str, found: object, expected: str) -> FormatError:
    """What stands under a key of config.json, what was expected there."""
    return FormatError(
        f"{folder.name}/config.json: {key} is {short(found)}, expected {expected}. {PULL_AGAIN}",
        code="CHECKPOINT_CONFIG",
    )


def read_json(folder: Path, name: str, limit: int) -> dict[str, Any] | None:
    """The object in a JSON file, None when there is no such file. FormatError ``CHECKPOINT_CONFIG``."""
    raw = _read(folder / name, limit)
    if raw is None:
        return None
    value = parse_json(raw, name, "CHECKPOINT_CONFIG")
    if not isinstance(value, dict):
        raise FormatError(f"{name}: a JSON object was expected. {PULL_AGAIN}", code="CHECKPOINT_CONFIG")
    return value


def _read(path: Path, limit: int) -> bytes | None:
    with contextlib.suppress(FileNotFoundError, NotADirectoryError, IsADirectoryError):
        if not path.is_file():
            return None
        nbytes = path.stat().st_size
        if nbytes > limit:
            raise FormatError(
                f"{path.name}: is {nbytes:,} bytes long, expected up to {limit:,}. {PULL_AGAIN}",
                code="CHECKPOINT_CONFIG",
            )
        return path.read_bytes()
    return None


def _weight_map(folder: Path) -> dict[str, str] | None:
    """Tensor -> file, as the index says; None without an index. Files are plain names in the folder."""
    index = read_json(folder, INDEX, MAX_INDEX_NBYTES)
    if index is None:
        return None
    weight_map = index.get("weight_map")
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


def _shards(folder: Path) -> list[str]:
    """The files that hold the tensors. FormatError ``CHECKPOINT_SHARD`` when one is missing."""
    weight_map = _weight_map(folder)
    names = sorted(set(weight_map.values())) if weight_map else [SINGLE]
    if weight_map is None and not (folder / SINGLE).is_file():
        others = sorted(path.name for path in folder.glob("*.safetensors") if path.is_file())
        if len(others) == 1:
            return others
        pickled = next((name for name in PICKLED if (folder / name).exists()), None)
        if pickled:
            raise UnsupportedError(
                f"{folder.name}: has its weights in {pickled}, a pickled file, which can run a stranger's program when "
                f"it is read. {SINGLE} was expected: take a revision of the checkpoint with safetensors files.",
                code="CHECKPOINT_PICKLE",
            )
        raise FormatError(
            f"{folder.name}: has no {SINGLE} and no {INDEX}. Download all files of the checkpoint into one folder.",
            code="CHECKPOINT_SHARD",
        )
    if len(names) > MAX_SHARDS:
        raise FormatError(f"{INDEX}: names {len(names):,} files, expected up to {MAX_SHARDS:,}. {PULL_AGAIN}")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise FormatError(
            f"{folder.name}: {len(missing)} of {len(names)} files are missing: {', '.join(missing[:5])}. Download all "
            "files of the checkpoint into one folder.",
            code="CHECKPOINT_SHARD",
        )
    return names


def _check_index(folder: Path, tensors: Mapping[str, StoredTensor]) -> None:
    """Every tensor of the index is there. Tensors that it does not list are no harm."""
    missing = [name for name in _weight_map(folder) or () if name not in tensors]
    if missing:
        raise FormatError(
            f"{folder.name}: {len(missing)} tensors of {INDEX} are in no file, the first is {short(missing[0])}. "
            f"{PULL_AGAIN}",
            code="CHECKPOINT_TENSOR",
        )
