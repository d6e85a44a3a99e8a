"""Map a model file into memory, read-only, through the one descriptor that was checked to be a regular file."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

from edgellm.formats.errors import EdgeLLMError, FormatError, ModelNotFoundError
from edgellm.formats.findings import PULL_AGAIN, Finding
from edgellm.formats.large_pages import advise_large_pages
from edgellm.formats.regular_file import NotAFileError, open_descriptor

MIN_NBYTES = 24  # magic, version, two counts


def map_file(path: Path) -> mmap.mmap:
    """The whole file as a read-only map.

    Raises ModelNotFoundError, FormatError ``MODEL_NOT_A_FILE`` (directory, pipe, device), ``MODEL_UNREADABLE``, or
    ``GGUF_NOT_A_GGUF`` when it is too short for any header.
    """
    try:
        descriptor = open_descriptor(path)
    except NotAFileError as error:
        raise _not_a_file(path, error.kind) from None
    except (FileNotFoundError, NotADirectoryError):
        raise ModelNotFoundError(f"{path}: there is no such file. Check the path, or pull the model by name.") from None
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from None
    try:
        nbytes = os.fstat(descriptor).st_size
        if nbytes < MIN_NBYTES:
            message = f"is {nbytes} bytes long, and a GGUF file has at least {MIN_NBYTES}"
            raise Finding("GGUF_NOT_A_GGUF", message, PULL_AGAIN, file=path.name, offset=0).error()
        mapped = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # no address space or no more maps
        raise _unreadable(path, error) from None
    finally:
        os.close(descriptor)
    advise_large_pages(mapped)
    return mapped


def _unreadable(path: Path, error: Exception) -> EdgeLLMError:
    reason = getattr(error, "strerror", None) or str(error)
    message = f"{path}: cannot be opened ({reason}). A readable file was expected: check its permissions and the disk."
    return EdgeLLMError(message, code="MODEL_UNREADABLE")


def _not_a_file(path: Path, kind: str) -> FormatError:
    message = f"{path}: is {kind}, and a regular file was expected. Give the path of a .gguf file."
    return FormatError(message, code="MODEL_NOT_A_FILE")
