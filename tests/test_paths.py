"""Where things are kept: one variable moves all of it, and a tilde is the user's home in each."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgellm import paths
from edgellm.kernels.cpu.kernel_cache import default_folder


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of our own and no variable set."""
    for name in ("EDGELLM_HOME", "EDGELLM_KERNEL_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    return tmp_path


def test_one_variable_moves_models_settings_and_compiled_kernels(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    monkeypatch.setenv("EDGELLM_HOME", "~/elsewhere")
    root = home / "elsewhere"
    assert (paths.models_dir(), paths.config_dir(), paths.cache_dir()) == tuple(
        root / name for name in ("models", "config", "cache")
    )
    assert default_folder() == root / "cache" / "kernels"


def test_without_it_compiled_kernels_lie_in_the_cache_folder() -> None:
    assert default_folder() == paths.cache_dir() / "kernels"


def test_compiled_kernels_may_have_a_folder_of_their_own(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    monkeypatch.setenv("EDGELLM_KERNEL_CACHE", "~/kernels")
    assert default_folder() == home / "kernels"
