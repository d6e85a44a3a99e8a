"""Where models come from: one small class for each kind of reference, and the table of them.

A reference such as ``hf:owner/repo:Q4_K_M`` says where to fetch and, without any network, where in the store the model
lies. A new kind is one file and one row of SOURCES.
"""

from __future__ import annotations

from edgellm.formats.errors import DownloadError
from edgellm.store.sources.hub import HubSource
from edgellm.store.sources.local import LocalSource
from edgellm.store.sources.pypi import PyPISource
from edgellm.store.sources.source import Expected, Source
from edgellm.store.sources.web import WebSource

__all__ = ["SOURCES", "Expected", "Source", "is_reference", "source_of"]

SOURCES: dict[str, Source] = {
    "pypi": PyPISource(),
    "hf": HubSource(),
    "https": WebSource(),
    "http": WebSource(),
    "path": LocalSource(),
}


def source_of(reference: str) -> Source:
    """The source that understands ``reference``; DownloadError PULL_NAME when its scheme is none of SOURCES."""
    scheme = reference.partition(":")[0]
    if scheme not in SOURCES:
        raise DownloadError(
            f"{reference!r}: models come from {', '.join(f'{name}:' for name in SOURCES)}, not from {scheme!r}.",
            code="PULL_NAME",
        )
    return SOURCES[scheme]


def is_reference(name: str) -> bool:
    """Whether ``name`` begins with the scheme of a source."""
    return ":" in name and name.partition(":")[0] in SOURCES
