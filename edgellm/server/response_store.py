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
    _items: dict[str, dict[str, Any]] = field(default_factory=dict)  # of the outputs, by id

    def keep(self, resource: dict[str, Any], before: Sequence[dict[str, Any]], given: Sequence[dict[str, Any]]) -> None:
        """Keep an answer to ``before`` (the talk that it goes on from) and ``given``."""
        nbytes = len(msgspec.json.encode((resource, given)))
        items = [*before, *given, *resource["output"]]
        self._kept[resource["id"]] = StoredResponse(resource, given, items, nbytes)
        self._items |= {item["id"]: item for item in resource["output"]}
        self.nbytes += nbytes
        while self._kept and (len(self._kept) > self.max_responses or self.nbytes > self.max_nbytes):
            self._drop(next(iter(self._kept)))

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
        self.get(name, field)
        self._drop(name)

    def item(self, name: str, field: str) -> dict[str, Any]:
        """The item of an answer by its own id; ServerError invalid_request names the ``field`` that refers to it."""
        if name not in self._items:
            raise ServerError(
                "invalid_request",
                f"{field}: there is no item {name[:64]!r} in the answers that are kept here. Send the whole item.",
                field,
            )
        return self._items[name]

    def _drop(self, name: str) -> None:
        gone = self._kept.pop(name)
        self.nbytes -= gone.nbytes
        for item in gone.resource["output"]:
            self._items.pop(item["id"], None)
