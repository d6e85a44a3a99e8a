"""What the file of an adapter says of itself, for ``edgellm show``, and what is wrong with it, for ``verify``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from edgellm.adapters.control_vector import ARCHITECTURE, open_control_vector
from edgellm.adapters.lora import open_lora
from edgellm.formats.errors import EdgeLLMError
from edgellm.formats.findings import Finding
from edgellm.formats.gguf import GGUFFile


def kind_of_adapter(gguf: GGUFFile) -> str | None:
    """ "lora" or "control vector"; None for what is no adapter."""
    if gguf.metadata.get("general.type") == "adapter":
        return "lora"
    return "control vector" if gguf.metadata.get("general.architecture") == ARCHITECTURE else None


def adapter_facts(path: Path, kind: str) -> dict[str, Any]:
    """Everything that ``show`` knows of an adapter, fit for JSON. Raises what opening it raises."""
    if kind == "control vector":
        vector = open_control_vector(path)
        try:
            layers = sorted(vector.directions)
            width = vector.directions[layers[0]].shape[0]
            facts = {"model_hint": vector.hint, "layers": layers, "n_embd": width, "size": vector.gguf.nbytes}
        finally:
            vector.close()
        return {"path": str(path), "kind": kind, **facts}
    lora = open_lora(path)
    try:
        weights = sorted({re.sub(r"^blk\.\d+\.|\.weight$", "", name) for name in lora.pairs})
        named = {key: lora.gguf.metadata.get(f"general.{key}") for key in ("name", "base_model.0.name", "license")}
        facts = {
            "architecture": lora.architecture,
            "alpha": lora.alpha,
            "ranks": lora.ranks,
            "weights": weights,
            "pairs": len(lora.pairs),
            "types": sorted({half.quant.name for pair in lora.pairs.values() for half in (pair.a, pair.b)}),
            "size": lora.gguf.nbytes,
            **{key: value if isinstance(value, str) else None for key, value in named.items()},
        }
    finally:
        lora.close()
    return {"path": str(path), "kind": kind, **facts}


def adapter_findings(path: Path) -> list[Finding] | None:
    """What is wrong with an adapter, but for what only its model can tell; None for what is none."""
    with GGUFFile.open(path) as gguf:
        kind = kind_of_adapter(gguf)
    if kind is None:
        return None
    try:
        adapter_facts(path, kind)
    except EdgeLLMError as error:
        return [Finding(error.code, str(error).removeprefix(f"{path.name}: "), "", file=path.name)]
    return []
