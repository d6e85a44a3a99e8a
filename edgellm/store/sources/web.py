"""``https://host/path/model.gguf``: one file from a web server."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote

from edgellm.formats.errors import DownloadError, FormatError
from edgellm.formats.split_files import PART
from edgellm.machine.progress import ByteProgress
from edgellm.store.download import RemoteFile, download
from edgellm.store.sources.source import GGUF_MAGIC, Expected, one, path_in
from edgellm.store.web import check_url


def _prove(path: Path) -> None:
    """Without a checksum the reader's own validator says whether all of the file is there."""
    from edgellm.formats.gguf import GGUFFile

    try:
        GGUFFile.open(path).close()
    except FormatError as error:
        raise DownloadError(f"{error} The download was thrown away.", code="PULL_CONTENT") from error


class WebSource:
    """Keeps the file under ``web/<host>/<path>``; the query of a URL is no part of the model's name."""

    def installed(self, references: tuple[str, ...], root: Path) -> Path | None:
        path = self._place(references, root)
        return path if path.is_file() else None

    def fetch(
        self, references: tuple[str, ...], root: Path, work: Path, expected: Expected, progress: ByteProgress | None
    ) -> Path:
        target = self._place(references, root)
        remote = RemoteFile(references[0], expected.sha256, expected.nbytes, GGUF_MAGIC)
        prove = None if expected.sha256 or PART.fullmatch(target.name) else _prove
        return download(remote, target, work / f"{target.name}.part", progress, prove)

    def _place(self, references: tuple[str, ...], root: Path) -> Path:
        one(references)
        parts = check_url(references[0])
        names = unquote(parts.path).strip("/").split("/")
        if not names[-1].lower().endswith(".gguf"):
            raise DownloadError(f"{references[0]}: the name of a model file ends in .gguf.", code="PULL_NAME")
        return path_in(root, "web", parts.netloc.replace(":", "+"), *names)
