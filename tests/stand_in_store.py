"""An empty store of models, no settings of this machine, and a stand-in server for every source: for tests to share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from stand_in_hub import StandIn, stand_in

import edgellm.store.download
import edgellm.store.web
from edgellm.formats.errors import EdgeLLMError
from edgellm.store.catalogue import pull
from edgellm.store.sources import pip_command


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home, no settings of this machine, and no patience."""
    for name in (
        "HF_TOKEN",
        "HF_HUB_OFFLINE",
        "PIP_EXTRA_INDEX_URL",
        "UV_DEFAULT_INDEX",
        "UV_INDEX_URL",
        "PIP_FIND_LINKS",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("EDGELLM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setattr(pip_command, "_pip_settings", lambda: ())
    monkeypatch.setattr(edgellm.store.download, "BACKOFF_S", 0.001)
    monkeypatch.setattr(edgellm.store.web, "BACKOFF_S", 0.001)
    return tmp_path / "home" / "models"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    with stand_in() as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        monkeypatch.setenv("PIP_INDEX_URL", f"{running.url}/simple")
        yield running


def add_rows(text: str) -> None:
    path = Path(os.environ["EDGELLM_HOME"]) / "config" / "models.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def leftovers(store: Path) -> list[str]:
    """What an ended pull should not leave behind."""
    return [str(path.relative_to(store)) for path in (store / ".incoming").rglob("*") if path.is_file()]


def code_of(name: str) -> str:
    with pytest.raises(EdgeLLMError) as raised:
        pull(name)
    return raised.value.code
