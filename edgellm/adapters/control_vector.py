"""A control vector: for some layers a direction that is added to what leaves the layer.

    general.architecture        "controlvector"
    controlvector.model_hint    a word on its model, in its makers' own names: it is shown and proves nothing
    controlvector.layer_count   layers that it was made for
    tensors                     direction.N (n_embd,) for the layer N, from 1 on: the first layer, 0, has none

These are llama.cpp's files.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from edgellm.adapters.adapter_file import checked_keys, digest_of, finite, refused, wrong
from edgellm.formats.findings import short
from edgellm.formats.gguf import GGUFFile, QuantizedTensor

ARCHITECTURE = "controlvector"
KEYS = (f"{ARCHITECTURE}.model_hint", f"{ARCHITECTURE}.layer_count")
MAX_LAYER = 1 << 16


@dataclass(frozen=True)
class ControlVector:
    """An open file of one.

    directions   by layer
    counted      the layers that it counts in; ``digest`` stands for their directions alone
    """

    name: str
    path: Path
    directions: dict[int, QuantizedTensor]
    counted: tuple[int, ...]
    hint: str
    digest: str
    gguf: GGUFFile

    def close(self) -> None:
        """Let go of the file."""
        self.gguf.close()


def open_control_vector(path: Path, name: str | None = None, layers: tuple[int, int] | None = None) -> ControlVector:
    """Open the file and prove it. FormatError or UnsupportedError with a code that begins with ``ADAPTER_``.

    layers   the first and the last that it counts in, all of its own by default
    """
    gguf = GGUFFile.open(path)
    try:
        found = _vector(gguf, name or path.stem, layers or (1, MAX_LAYER))
        gguf.check()
        return found
    except BaseException:
        gguf.close()
        raise


def _vector(gguf: GGUFFile, name: str, layers: tuple[int, int]) -> ControlVector:
    path, directions = gguf.path, dict[int, QuantizedTensor]()
    if (kind := gguf.metadata.get("general.architecture")) != ARCHITECTURE:
        advice = "Give the file of a control vector."
        raise wrong(path, f"general.architecture is {short(kind)}", repr(ARCHITECTURE), advice)
    checked_keys(gguf, KEYS)
    for tensor_name, tensor in gguf.tensors.items():
        found = re.fullmatch(r"direction\.(\d{1,9})", tensor_name, re.ASCII)
        if found is None:
            what = f"has the tensor {short(tensor_name)}, which is no direction of a layer"
            raise refused(path, what, "Make the control vector anew.")
        layer = int(found[1])
        if not 1 <= layer <= MAX_LAYER or str(layer) != found[1]:
            raise wrong(path, f"has the tensor {tensor_name}", f"layers from 1 to {MAX_LAYER}")
        if len(tensor.shape) != 1:
            raise wrong(path, f"{tensor_name} has the shape {tensor.shape}", "vectors")
        directions[layer] = finite(tensor, path)
    if not directions:
        raise wrong(path, "has no tensors", "directions of layers")
    counted = tuple(layer for layer in sorted(directions) if layers[0] <= layer <= layers[1])
    hint, digest = gguf.metadata.get(KEYS[0]), digest_of(gguf, *counted)
    return ControlVector(name, path, directions, counted, hint if isinstance(hint, str) else "", digest, gguf)
