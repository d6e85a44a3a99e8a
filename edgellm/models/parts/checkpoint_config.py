"""config.json of a checkpoint, read by key and type; whatever is off is named with the file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgellm.formats.errors import FormatError, UnsupportedError
from edgellm.formats.findings import short, wrong_config


@dataclass(frozen=True)
class CheckpointConfig:
    """The settings of a language model.

    values      config.json, with transformers' defaults for keys that it leaves out
    model_type  the row of ``checkpoint_keys`` that they are held to
    names       what config.json calls a setting, where that is another word
    """

    folder: Path
    values: Mapping[str, Any]
    model_type: str = ""
    names: Mapping[str, str] = field(default_factory=dict)

    def get(self, key: str) -> Any:
        """The value as it stands there, None when it is missing."""
        return self.values.get(key)

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number from 1 to 2^31."""
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        return self.integer_of(key, value)

    def integer_of(self, key: str, value: Any) -> int:
        """A whole number from 1 to 2^31 that was found under ``key``."""
        if type(value) is not int or not 1 <= value < 1 << 31:
            raise wrong_config(self.folder, key, value, "a whole number from 1")
        return value

    def real(self, key: str, default: float | None = None) -> float:
        """A finite number."""
        return self.real_of(key, self.values.get(key), default)

    def real_of(self, key: str, value: Any, default: float | None = None) -> float:
        """A finite number that was found under ``key``."""
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < math.inf:
            raise wrong_config(self.folder, key, value, "a number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """A truth value."""
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise wrong_config(self.folder, key, value, "true or false")
        return value

    def object_of(self, key: str, value: Any) -> dict[str, Any]:
        """An object that was found under ``key``; empty for null."""
        if not isinstance(value, dict | None):
            raise wrong_config(self.folder, key, value, "an object")
        return value or {}

    def refuse(self, key: str, expected: str, value: Any = None) -> UnsupportedError:
        """The error of a setting that edgellm's form of the architecture does not have."""
        found = self.values.get(key) if value is None else value
        return UnsupportedError(
            f"{self.folder.name}/config.json: {self.names.get(key, key)} is {short(found)}; edgellm converts "
            f"{expected}. Take another model of this family.",
            code="CHECKPOINT_CONFIG",
        )

    def wrong(self, key: str, found: object, expected: str) -> FormatError:
        """The error of a setting that no model of the architecture can have."""
        return wrong_config(self.folder, self.names.get(key, key), found, expected)

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        n_embd, n_head = self.integer("hidden_size"), self.integer("num_attention_heads")
        if self.get("head_dim") is None and n_embd % n_head:
            raise wrong_config(self.folder, "hidden_size", n_embd, f"a multiple of num_attention_heads ({n_head})")
        return self.integer("head_dim", n_embd // n_head)

    @property
    def n_layer(self) -> int:
        """Number of decoder layers."""
        kinds = self.get("layers_block_type")  # one for each, where nothing else says how many there are
        n_layer = self.integer("num_hidden_layers", len(kinds) if isinstance(kinds, list) and kinds else None)
        if n_layer > 512:
            raise wrong_config(self.folder, "num_hidden_layers", n_layer, "up to 512")
        return n_layer
