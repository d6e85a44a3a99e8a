"""Fixtures that many tests share: the two real models, when they are on this machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def _real_model(name: str) -> Path:
    """The model called ``name`` in the product's own store, else $EDGELLM_TEST_MODELS/<name>.gguf; skips without."""
    try:
        from edgellm.catalogue import find_local
    except ImportError:
        found = None
    else:
        found = find_local(name)
    folder = os.environ.get("EDGELLM_TEST_MODELS")
    if found is None and folder and (Path(folder) / f"{name}.gguf").is_file():
        found = Path(folder) / f"{name}.gguf"
    if found is None:
        pytest.skip(f"the model {name} is not here: pull it, or set EDGELLM_TEST_MODELS to a folder with {name}.gguf")
    return Path(found)


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """SmolLM2-135M-Instruct Q4_1."""
    return _real_model("smollm2")


@pytest.fixture(scope="session")
def gemma_path() -> Path:
    """Gemma 3 270M Q4_K_M."""
    return _real_model("gemma")
