"""How a checkpoint makes the vector of a text, from the files of sentence-transformers beside it."""

from __future__ import annotations

from typing import Any

from edgellm.formats.checkpoint import MAX_CONFIG_NBYTES, Checkpoint
from edgellm.formats.errors import FormatError, UnsupportedError
from edgellm.formats.findings import PULL_AGAIN, short
from edgellm.formats.gguf_header import TypedMetadata
from edgellm.formats.json_text import parse_json
from edgellm.kernels.pooling import KINDS, PoolingKind

MODULES = "modules.json"
# what a pooling is called there: an older file has a flag for each, a newer one a word
FLAGS: dict[str, PoolingKind] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "last",
}
WORDS: dict[str, PoolingKind] = {"cls": "cls", "mean": "mean", "lasttoken": "last"}
OTHER_FLAGS = ("pooling_mode_max_tokens", "pooling_mode_mean_sqrt_len_tokens", "pooling_mode_weightedmean_tokens")
HARMLESS = ("Transformer", "Pooling", "Normalize")
"""Modules that need nothing more: vectors are normalised for whoever asks for it."""


def pooling_metadata(checkpoint: Checkpoint, architecture: str, known: tuple[str, ...] = ()) -> TypedMetadata:
    """``pooling_type`` of a checkpoint that says it; nothing for the others.

    known   further modules that the architecture has a place for

    UnsupportedError for a pooling that GGUF has no number for, or a module that nothing computes.
    """
    found: TypedMetadata = {}
    for module in _modules(checkpoint):
        kind = _kind_of(module)
        if kind not in (*HARMLESS, *known):
            raise UnsupportedError(
                f"{MODULES}: has the module {short(module.get('type'))}; edgellm converts {', '.join(HARMLESS)}. "
                "Take another model.",
                code="CHECKPOINT_CONFIG",
            )
        if kind == "Pooling":
            name = f"{module.get('path')}/config.json"
            pooling = _pooling(name, checkpoint.json(name) or {})
            found[f"{architecture}.pooling_type"] = (KINDS.index(pooling), "UINT32")
    return found


def module_paths(checkpoint: Checkpoint, kind: str) -> list[str]:
    """The folders of the modules of this kind, in their order."""
    return [str(module.get("path")) for module in _modules(checkpoint) if _kind_of(module) == kind]


def _modules(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """What a text goes through, one after another; empty without a list of it."""
    raw = checkpoint.files.read(MODULES, MAX_CONFIG_NBYTES)
    if raw is None:
        return []
    modules = parse_json(raw, MODULES, "CHECKPOINT_CONFIG")
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise FormatError(f"{MODULES}: a list of modules was expected. {PULL_AGAIN}", code="CHECKPOINT_CONFIG")
    return modules


def _kind_of(module: dict[str, Any]) -> str:
    return str(module.get("type", "")).rpartition(".")[2]


def _pooling(name: str, config: dict[str, Any]) -> PoolingKind:
    modes = {kind for flag, kind in FLAGS.items() if config.get(flag) is True}
    modes |= {WORDS[mode] for mode in [config.get("pooling_mode")] if isinstance(mode, str) and mode in WORDS}
    others = [flag for flag in OTHER_FLAGS if config.get(flag) is True]
    if len(modes) != 1 or others:
        raise UnsupportedError(
            f"{short(name)}: pools by {', '.join([*sorted(modes), *others]) or 'nothing that edgellm knows'}; edgellm "
            "converts one of cls, mean and last token. Take another model.",
            code="CHECKPOINT_CONFIG",
        )
    return modes.pop()
