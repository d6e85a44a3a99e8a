"""The GPU that tests compute on: the first adapter of this machine, software too; where there is none they skip."""

from __future__ import annotations

import functools

import pytest

from edgellm.formats.errors import EdgeLLMError
from edgellm.kernels.gpu import adapters


@functools.cache
def _why_none() -> str | None:
    if not adapters.is_installed():
        return "the package wgpu is not installed: pip install edgellm[gpu]"
    try:
        found = adapters.adapters()
    except EdgeLLMError as error:
        return str(error)
    if not found or found[0].missing:
        return "there is no adapter for Vulkan, Metal or Direct3D 12: install a driver, or Mesa's software Vulkan"
    return None


def device(name: str) -> str:
    """A device's name for a row of the executor table, such as ``gpu:0``; skips where there is none."""
    if name == "gpu":
        if why := _why_none():
            pytest.skip(why)
        return "gpu:0"
    return name
