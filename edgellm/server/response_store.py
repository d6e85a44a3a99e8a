"""Answers of /v1/responses that a later request may go on from, in memory and within a bound; the oldest go first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from edgellm.server.errors import ServerError

MAX_RESPONSES = 1000
MAX_NBYTES = 64 << 20


@dataclass(frozen=True)
class StoredResponse:
    """One answer.

    resource   as its client got it
    given      the input items of its own request
    items      the whole talk so far, its own output too; items are shared with the answers before it
    """

    resource: dict[str, Any]
    given: Sequence[dict[str, Any]]
    items: Sequence[dict[str, Any]]
    nbytes: int


@dataclass
class ResponseStore:
    """The newest answers, by id. Used from one event loop."""

    max_responses: int = MAX_RESPONSES
    max_nbytes: int = MAX_NBYTES
    nbytes: int = 0
    _kept: OrderedDict[str, StoredResponse] = field(default_factory=OrderedDict)

    def keep(self, resource: dict[str, Any], before: Sequence[dict[str, Any]], given: Sequence[dict[str, Any]]) -> None:
        """Keep an answer to ``before`` (the talk that it goes on from) and ``given``."""
        nbytes = len(msgspec.json.encode((resource, given)))
        items = [*before, *given, *resource["output"]]
        self._kept[resource["id"]] = StoredResponse(resource, given, items, nbytes)
        self.nbytes += nbytes
        while self._kept and (len(self._kept) > self.max_responses or self.nbytes > self.max_nbytes):
            self.nbytes -= self._kept.popitem(last=False)[1].nbytes

    def get(self, name: str, field: str) -> StoredResponse:
        """The answer of an id; ServerError not_found names the ``field`` that asked for it."""
        if name not in self._kept:
            raise ServerError(
                "not_found",
                f"{field}: there is no response {name[:64]!r} here. The server keeps the last {self.max_responses} in "
                "memory, of requests without store: false. Send the whole talk as input.",
                field,
            )
        return self._kept[name]

    def forget(self, name: str, field: str) -> None:
        """Drop one; ServerError not_found for an unknown id."""
        self.nbytes -= self.get(name, field).nbytes
        del self._kept[name]
