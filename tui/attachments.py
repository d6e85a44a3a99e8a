"""``@file`` in a message: the text files that go with it, and the names that can be completed."""

from __future__ import annotations

import os
import re
from pathlib import Path

from edgellm.formats.errors import ParameterError
from edgellm.formats.text_file import read_text
from edgellm.machine.paths import path_if_there, typed_path

MAX_NBYTES = 4 << 20
MAX_NAMES = 200  # of a folder that are looked at

_MENTION = re.compile(r"(?<!\S)@(\"[^\"]+\"|\S+)")


def with_files(text: str) -> tuple[str, list[str]]:
    """The message with the text of every file that it mentions in front, and their names.

    A mention that names no file stays as it is. FormatError for a file that is no text, or too large.
    """
    parts, names = [], []
    for mention in dict.fromkeys(_MENTION.findall(text)):
        path = path_if_there(mention.strip('"'))
        if path is None or not path.is_file() or f"{path.name}:\n```\n" in text:  # an edited message has it already
            continue
        parts.append(f"{path.name}:\n```\n{read_text(path, MAX_NBYTES).rstrip()}\n```")
        names.append(path.name)
    return "\n\n".join([*parts, text]), names


def missing_files(text: str) -> list[str]:
    """Names behind an @ that look like files (they have a dot or a slash) and are none."""
    names = (mention.strip('"') for mention in _MENTION.findall(text))
    files = (name for name in dict.fromkeys(names) if re.search(r"/|\.\w", name))
    return [name for name in files if path_if_there(name) is None]


def quoted(name: str) -> str:
    """A name as it stands behind the @; that of a folder with spaces is still open."""
    if " " not in name:
        return name
    return f'"{name}' if name.endswith("/") else f'"{name}"'


def file_names(word: str, limit: int = 8) -> list[str]:
    """Paths that begin as ``word`` does (without its @), folders with a slash behind; hidden ones when asked for."""
    head, slash, tail = word.rpartition("/")
    found: list[str] = []
    try:
        folder = typed_path(head + slash) if slash else Path(".")
        with os.scandir(folder) as entries:
            for number, entry in enumerate(entries):
                if number >= MAX_NAMES * 10 or len(found) >= MAX_NAMES:
                    break
                hidden = entry.name.startswith(".") and not tail.startswith(".")
                if not hidden and entry.name.lower().startswith(tail.lower()) and entry.name.isprintable():
                    found.append(head + slash + entry.name + ("/" if entry.is_dir() else ""))
    except (OSError, ParameterError):
        return []
    return sorted(found, key=lambda name: (name.endswith("/"), name.lower()))[:limit]
