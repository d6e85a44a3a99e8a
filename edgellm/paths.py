"""Where edgellm keeps things on this machine: models, chats, the user's own settings, what can be made again.

``EDGELLM_HOME`` puts all of them under one folder; without it they stand where the operating system wants them.
"""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

DEFAULT_MODEL = "smollm2"  # of the catalogue; here, so that a screen can name it without what pulls models


def _home() -> Path | None:
    home = os.environ.get("EDGELLM_HOME")
    return Path(home).expanduser().absolute() if home else None


def models_dir() -> Path:
    """The store of models that were pulled."""
    home = _home()
    return home / "models" if home else platformdirs.user_data_path("edgellm", appauthor=False) / "models"


def config_dir() -> Path:
    """The user's own models.toml and settings."""
    home = _home()
    return home / "config" if home else platformdirs.user_config_path("edgellm", appauthor=False)


def cache_dir() -> Path:
    """What may be deleted at any time."""
    home = _home()
    return home / "cache" if home else platformdirs.user_cache_path("edgellm", appauthor=False)


def sessions_dir() -> Path:
    """Chats, and what is kept to go on with them at once. For the user's eyes only."""
    home = _home()
    return home / "sessions" if home else platformdirs.user_data_path("edgellm", appauthor=False) / "sessions"
