"""The one way to a file of a checkpoint's folder: a regular file of that folder, opened once, read up to a limit.

The folder is untrusted. A link in it could put any file of this machine into a model that is then published, so
links are refused by name. One kind is followed: the cache of Hugging Face's own client keeps ``models--owner--name/``
with ``snapshots/<revision>/<file>`` as links to ``blobs/<hash>`` of the same model.
"""

from __future__ import annotations

import os
from pathlib import Path, PurePath

from edgellm.formats.errors import FormatError
from edgellm.formats.findings import PULL_AGAIN, short
from edgellm.formats.mapped_file import FileMap, unreadable
from edgellm.formats.regular_file import FLAGS, NotAFileError, open_descriptor


class CheckpointFolder:
    """A folder whose files are asked for by name, ``/`` between the parts of one that lies deeper."""

    def __init__(self, path: str | Path) -> None:
        """The user's own way to the folder may have links; from here on there are none."""
        self.path = Path(path)
        self._root = Path(os.path.realpath(path))
        self._blobs = _blobs_of(self._root)

    @property
    def name(self) -> str:
        """The folder's name for a message."""
        return self.path.name

    def has(self, name: str) -> bool:
        """Whether there is such a file, or something else in its place that ``read`` has an error for."""
        return os.path.lexists(self._root / name) and not (self._root / name).is_dir()

    def names(self, ending: str, under: str = "") -> list[str]:
        """Names of files that end so, sorted. FormatError ``CHECKPOINT_LINK`` when ``under`` is a link."""
        folder = self._root / under
        if under and folder.is_symlink():
            raise self._link(under, os.readlink(folder))
        if not folder.is_dir():
            return []
        found = sorted(entry.name for entry in os.scandir(folder) if entry.name.endswith(ending))
        return [name for name in ((f"{under}/{name}" if under else name) for name in found) if self.has(name)]

    def read(self, name: str, limit: int) -> bytes | None:
        """The bytes of a file, None when there is none.

        FormatError ``CHECKPOINT_LINK``, ``MODEL_NOT_A_FILE``, or ``CHECKPOINT_CONFIG`` for one over ``limit`` bytes;
        EdgeLLMError ``MODEL_UNREADABLE``.
        """
        descriptor = self._open(name)
        if descriptor is None:
            return None
        try:
            with os.fdopen(descriptor, "rb") as file:
                content = file.read(limit + 1)
        except OSError as error:
            raise unreadable(short(name), error) from error
        if len(content) > limit:
            raise FormatError(
                f"{short(name)}: is longer than {limit:,} bytes, expected up to that. {PULL_AGAIN}",
                code="CHECKPOINT_CONFIG",
            )
        return content

    def map(self, name: str, least: int = 1) -> FileMap:
        """The whole file as a read-only map.

        FormatError ``CHECKPOINT_SHARD`` when there is none, ``MODEL_TRUNCATED`` when it is shorter than ``least``
        bytes, else as ``read``.
        """
        descriptor = self._open(name)
        if descriptor is None:
            raise FormatError(
                f"{short(name)}: is missing. Download all files of the checkpoint into one folder.",
                code="CHECKPOINT_SHARD",
            )
        try:
            nbytes = os.fstat(descriptor).st_size
            if nbytes < least:
                raise FormatError(
                    f"{short(name)}: is {nbytes} bytes long, and the format has at least {least}. {PULL_AGAIN}",
                    code="MODEL_TRUNCATED",
                )
            return FileMap.of(descriptor, self._root / name)
        except OSError as error:
            raise unreadable(short(name), error) from error
        finally:
            os.close(descriptor)

    def _open(self, name: str) -> int | None:
        """A descriptor of the regular file, None when there is none."""
        path = self._root / name
        try:
            if any(part in ("..", "") for part in name.split("/")) or PurePath(name).is_absolute():
                raise FormatError(f"{short(name)}: is no name of a file in the folder.", code="CHECKPOINT_LINK")
            for folder in [parent for parent in path.parents if parent.is_relative_to(self._root)][:-1]:
                if folder.is_symlink():
                    raise self._link(folder.name, os.readlink(folder))
            if path.is_symlink():
                path = self._blob(name, path)
            return open_descriptor(path, flags=FLAGS | getattr(os, "O_NOFOLLOW", 0))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except NotAFileError as error:
            if error.kind == "a directory":
                return None
            raise FormatError(
                f"{short(name)}: is {error.kind}. Give a folder that holds the files themselves.",
                code="MODEL_NOT_A_FILE",
            ) from None
        except (OSError, ValueError) as error:
            raise unreadable(short(name), error) from error

    def _blob(self, name: str, path: Path) -> Path:
        """What a link of Hugging Face's cache stands for."""
        target = os.readlink(path)
        blob = Path(os.path.normpath(path.parent / target))
        if self._blobs is None or blob.parent != self._blobs or blob.is_symlink():
            raise self._link(name, target)
        return blob

    def _link(self, name: str, target: str) -> FormatError:
        return FormatError(
            f"{short(self.name)}/{short(name)}: is a link to {short(target)}, and what it leads to would become part "
            "of the model. A file of the folder itself was expected (or a link of Hugging Face's cache into its own "
            "blobs): if the link is yours, put the file in its place.",
            code="CHECKPOINT_LINK",
        )


def _blobs_of(root: Path) -> Path | None:
    """The folder of blobs for a snapshot in Hugging Face's cache."""
    for folder in root.parents:
        if folder.name == "snapshots" and folder.parent.name.startswith("models--"):
            blobs = folder.parent / "blobs"
            return None if blobs.is_symlink() else blobs
    return None
