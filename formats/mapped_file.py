"""Map a model file into memory, read-only, through the one descriptor that was checked to be a regular file.

The file belongs to the user, and another program may cut it short at any time. So whoever has read from a map asks
``check`` before what came of it is used.
"""

from __future__ import annotations

import mmap
import os
import weakref
from pathlib import Path

import numpy as np

from edgellm.formats import bus_error
from edgellm.formats.errors import EdgeLLMError, FormatError, ModelNotFoundError
from edgellm.formats.findings import PULL_AGAIN, Finding
from edgellm.formats.large_pages import advise_large_pages
from edgellm.formats.regular_file import NotAFileError, open_descriptor

MIN_NBYTES = 24  # magic, version, two counts


class FileMap(mmap.mmap):
    """A read-only map that knows whether its file was still whole when it was read."""

    path: Path
    _slot = -1
    _forgotten: weakref.finalize[..., FileMap] | None = None

    @classmethod
    def of(cls, descriptor: int, path: Path) -> FileMap:
        """The whole file of an open descriptor. OSError, ValueError."""
        mapped = cls(descriptor, 0, access=mmap.ACCESS_READ)
        mapped.path = path
        mapped._slot = bus_error.watch(np.frombuffer(mapped, np.uint8).ctypes.data, len(mapped))
        _open_maps.add(mapped)
        mapped._forgotten = weakref.finalize(mapped, bus_error.forget, mapped._slot)
        return mapped

    def check(self) -> None:
        """EdgeLLMError ``MODEL_FILE_CHANGED`` once the file is shorter than it was: nothing read of it counts then."""
        if bus_error.was_cut(self._slot) or (not self.closed and self.size() < len(self)):
            raise EdgeLLMError(
                f"{self.path.name}: the file was cut short, or could not be read, while it was in use, so nothing "
                "computed from it counts. Let no other program write to it, and load it again when it is whole.",
                code="MODEL_FILE_CHANGED",
            )

    def close(self) -> None:
        """Unmap it. BufferError while an array still looks into it."""
        super().close()
        if self._forgotten is not None:
            self._forgotten()


_open_maps: weakref.WeakSet[FileMap] = weakref.WeakSet()


def check_open_maps() -> None:
    """``check`` of every map: before a result gets its name that may come of any of them."""
    for mapped in list(_open_maps):
        mapped.check()


def map_file(path: Path) -> FileMap:
    """The whole file as a read-only map.

    Raises ModelNotFoundError, FormatError ``MODEL_NOT_A_FILE`` (directory, pipe, device), ``MODEL_UNREADABLE``, or
    ``GGUF_NOT_A_GGUF`` when it is too short for any header.
    """
    try:
        descriptor = open_descriptor(path)
    except NotAFileError as error:
        message = f"{path}: is {error.kind}, and a regular file was expected. Give the path of a .gguf file."
        raise FormatError(message, code="MODEL_NOT_A_FILE") from None
    except (FileNotFoundError, NotADirectoryError):
        raise ModelNotFoundError(f"{path}: there is no such file. Check the path, or pull the model by name.") from None
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from None
    try:
        nbytes = os.fstat(descriptor).st_size
        if nbytes < MIN_NBYTES:
            message = f"is {nbytes} bytes long, and a GGUF file has at least {MIN_NBYTES}"
            raise Finding("GGUF_NOT_A_GGUF", message, PULL_AGAIN, file=path.name, offset=0).error()
        mapped = FileMap.of(descriptor, path)
    except (OSError, ValueError) as error:  # no address space or no more maps
        raise unreadable(path, error) from None
    finally:
        os.close(descriptor)
    advise_large_pages(mapped)
    return mapped


def unreadable(path: Path | str, error: Exception) -> EdgeLLMError:
    """What the system says of a file that it does not open, or not read."""
    reason = getattr(error, "strerror", None) or str(error)
    message = f"{path}: cannot be opened ({reason}). A readable file was expected: check its permissions and the disk."
    return EdgeLLMError(message, code="MODEL_UNREADABLE")
