"""A batch: every line of a file of requests answered once, without HTTP, by the server's own protocols.

Lines run side by side and share the steps of the engine. Those of one model run before those of the next, so models
that do not fit into the memory together take turns. Whoever answers a line may be another process (edgellm.ray.batch);
the file of answers is written here alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from typing import Any, NamedTuple, Protocol

from edgellm.formats.errors import EdgeLLMError
from edgellm.server.batch_file import Answers, Place, Requests, read_line
from edgellm.server.errors import Kind, ServerError, invalid
from edgellm.server.http import Json, encode
from edgellm.server.protocols.openai_wire import new_id
from edgellm.server.routes import ProtocolRoute, all_routes, call_route
from edgellm.server.server import Server

ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")
PASSING: tuple[Kind, ...] = ("overloaded", "server_error")  # what may go well another time is no answer to a line
AT_ONCE = 64  # lines under way: enough to fill the steps of an engine, few enough to lose little

Progress = Callable[[int, int], None]


class Outcome(NamedTuple):
    """What came of a run.

    n_lines    of the batch; ``n_before`` of them were answered before
    n_wrong    lines that this run answered with an error
    n_left     lines that it could not answer, for ``reason``: the next run tries them again
    """

    n_lines: int
    n_before: int
    n_wrong: int
    n_left: int = 0
    reason: str = ""


class Answering(Protocol):
    """Answers the lines of a batch."""

    async def load(self, model: str) -> None:
        """Load a model before its lines come; what makes all of them fail is raised. "" is that of lines without one.

        A name that nobody has is the error of its lines.
        """
        ...

    async def answer(self, place: Place, raw: bytes) -> tuple[bytes, bool]:
        """The line of answers to a line of requests, and whether it tells of an error. PassingError for none."""
        ...

    async def close(self) -> None:
        """Let go of the models."""
        ...


class PassingError(Exception):
    """A line was not answered, and may be another time."""


async def answer_batch(
    by: Answering, requests: Requests, answers: Answers, progress: Progress, at_once: int = AT_ONCE
) -> Outcome:
    """Answer what is not answered yet. What stops it, such as a model that cannot be loaded, is raised: run it again.

    progress   called with the lines that are answered, and all of them
    """
    left = [place for place in requests.places if place.id not in answers.done]
    order = {place.model: number for number, place in reversed(list(enumerate(left)))}
    left.sort(key=lambda place: order[place.model])  # stable: the first model of the file first
    n_before, n_wrong, reasons = len(answers.done), 0, list[str]()
    progress(n_before, len(requests.places))

    async def work(places: Iterator[Place]) -> None:
        nonlocal n_wrong
        for place in places:
            try:
                line, is_wrong = await by.answer(place, requests.read(place))
            except PassingError as error:
                reasons.append(str(error))
                continue
            await answers.add(line)
            answers.done.add(place.id)
            n_wrong += is_wrong
            progress(len(answers.done), len(requests.places))

    for model, places in groupby(left, key=lambda place: place.model):
        await by.load(model)
        await _together(work, places, at_once)
    return Outcome(len(requests.places), n_before, n_wrong, len(reasons), reasons[0] if reasons else "")


async def _together(work: Callable[[Iterator[Place]], Any], places: Iterable[Place], n: int) -> None:
    """Several workers on the same places; the first error ends all of them."""
    shared = iter(places)
    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(n):
                group.create_task(work(shared))
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None


class Here:
    """Answers by a server of this process."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self._served = {row.route.path: row for row in all_routes() if row.route.path in ENDPOINTS}

    async def load(self, model: str) -> None:
        """See ``Answering``."""
        name, models = model or None, self.server.models
        if name is None and not await models.usable():
            entries = await models.entries()
            name = entries[0].name if entries else None  # to load it says what is wrong with it
        try:
            async with models.lease(name):
                pass
        except ServerError as error:
            if error.kind != "not_found" or not model:
                raise

    async def close(self) -> None:
        """See ``Answering``."""
        await self.server.models.close()

    async def answer(self, place: Place, raw: bytes) -> tuple[bytes, bool]:
        """See ``Answering``."""
        custom_id, line, wrong = read_line(raw)
        if line is not None and line.url not in self._served:
            wrong = f"url is {line.url[:80]!r}. A batch takes {', '.join(ENDPOINTS)}."
        told: dict[str, Any] = {"id": place.id, "custom_id": custom_id, "response": None, "error": None}
        if line is None or wrong:
            told["error"] = {"code": "invalid_line", "message": f"Line {place.number}: {wrong}", "line": place.number}
            return encode(told), True
        status, body = await _respond(self.server, self._served[line.url], bytes(line.body))
        told["response"] = {"status_code": status, "request_id": new_id("req_"), "body": body}
        return encode(told), status >= 400


async def _respond(server: Server, row: ProtocolRoute, raw: bytes) -> tuple[int, Any]:
    """Status and body, as they would come over HTTP."""
    try:
        reply = await call_route(server, row.route, raw)
        if not isinstance(reply, Json):
            raise invalid("stream", "a batch gives whole answers. Leave it out.")
        return reply.status, reply.content
    except Exception as error:
        told = ServerError.of(error)
        if told.kind in PASSING:
            known = isinstance(error, EdgeLLMError | MemoryError)
            raise PassingError(told.message if known else f"{type(error).__name__}: {error}") from error
        status, body = row.protocol.error_body(told)
        return status, body
