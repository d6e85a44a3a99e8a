"""``path:``: a file that is already on this machine, for rows of the user's own models.toml."""

from __future__ import annotations

from pathlib import Path

from edgellm.formats.errors import DownloadError
from edgellm.machine.paths import typed_file
from edgellm.machine.progress import ByteProgress
from edgellm.store.sources.source import Expected, one


class LocalSource:
    """A path that is used where it stands."""

    def installed(self, references: tuple[str, ...], root: Path) -> Path | None:
        return typed_file(one(references))

    def fetch(
        self, references: tuple[str, ...], root: Path, work: Path, expected: Expected, progress: ByteProgress | None
    ) -> Path:
        raise DownloadError(
            f"{one(references)}: there is no such file, and nowhere to fetch it from. Correct the path in models.toml.",
            code="PULL_NOT_FOUND",
        )
