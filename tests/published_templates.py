"""Chat templates as models publish them, from the packages that carry them."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest

# Packages that carry chat templates as models publish them. They need not be importable, so they install without
# their dependencies: pip install --no-deps trl==1.16.0 axolotl==0.19.0
CARRIERS = {"axolotl_": ("axolotl", "axolotl/utils/chat_templates/templates"), "": ("trl", "trl/chat_templates")}


def source_of(name: str) -> str:
    """The Jinja text of a row."""
    prefix = "axolotl_" if name.startswith("axolotl_") else ""
    package, folder = CARRIERS[prefix]
    try:
        files = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{package}, which carries this template, is not installed")
    return Path(str(files.locate_file(f"{folder}/{name.removeprefix(prefix)}.jinja"))).read_text(encoding="utf-8")
