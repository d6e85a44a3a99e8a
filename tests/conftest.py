"""Fixtures that many tests share: the two real models, when they are on this machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def _real_model(name: str, file: str) -> Path:
    """The model ``name`` of the catalogue in the product's store, else $EDGELLM_TEST_MODELS/<file>; skips without."""
    from edgellm.catalogue import find

    folder = os.environ.get("EDGELLM_TEST_MODELS")
    found = find(name)
    if found is None and folder and (Path(folder) / file).is_file():
        found = Path(folder) / file
    if found is None:
        pytest.skip(
            f"the model is not here: run 'edgellm pull {name}', or set EDGELLM_TEST_MODELS to a folder with {file}"
        )
    return found


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """SmolLM2-135M-Instruct Q4_1."""
    return _real_model("smollm2", "smollm2.gguf")


@pytest.fixture(scope="session")
def gemma_path() -> Path:
    """Gemma 3 270M Q4_K_M."""
    return _real_model("gemma3-270m", "gemma.gguf")
