"""What a client is told when something is wrong: kind, message, field. Each protocol has its own words for it."""

from __future__ import annotations

import re
import sys
import traceback
from typing import Any, Literal

from edgellm.formats.errors import (
    ClosedError,
    ContextFullError,
    EdgeLLMError,
    MemoryWouldExceedError,
    ModelNotFoundError,
    ParameterError,
    TemplateError,
    UnsupportedError,
)

Kind = Literal[
    "invalid_request",
    "authentication",
    "permission",
    "not_found",
    "too_large",
    "context_exceeded",
    "not_supported",
    "overloaded",
    "rate_limited",
    "server_error",
]

STATUS: dict[Kind, int] = {
    "invalid_request": 400,
    "authentication": 401,
    "permission": 403,
    "not_found": 404,
    "too_large": 413,
    "context_exceeded": 400,
    "not_supported": 501,
    "overloaded": 503,
    "rate_limited": 429,
    "server_error": 500,
}

_KINDS: tuple[tuple[type[EdgeLLMError], Kind], ...] = (
    (ContextFullError, "context_exceeded"),
    (ModelNotFoundError, "not_found"),
    (MemoryWouldExceedError, "overloaded"),
    (ClosedError, "overloaded"),
    (ParameterError, "invalid_request"),
    (TemplateError, "invalid_request"),
    (UnsupportedError, "invalid_request"),
)


_FIELD = re.compile(r"([a-z_]+(?:\[[^\]]*\])?(?:\.[a-z_]+)*)(?:: | is )")  # where the library names one


class ServerError(EdgeLLMError):
    """An error for the client.

    kind      one of ``STATUS``
    field     of the request, such as ``messages[0].content``, where it is about one
    status    of HTTP, where the kind's own is not meant
    headers   further ones of the response
    details   numbers that protocols tell: ``n_prompt_tokens`` and ``n_ctx`` of context_exceeded
    """

    code = "SERVER"

    def __init__(
        self,
        kind: Kind,
        message: str,
        field: str | None = None,
        *,
        status: int | None = None,
        headers: dict[str, str] | None = None,
        details: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.kind, self.message, self.field = kind, message, field
        self.status = STATUS[kind] if status is None else status
        self.headers = {} if headers is None else headers
        if kind == "overloaded":
            self.headers = {"retry-after": "1", **self.headers}
        self.details = {} if details is None else details

    @classmethod
    def of(cls, error: BaseException) -> ServerError:
        """Any error as one for the client; what is our own mistake tells nothing of the inside."""
        if isinstance(error, ServerError):
            return error
        if isinstance(error, EdgeLLMError):
            kind: Kind = next((kind for known, kind in _KINDS if isinstance(error, known)), "server_error")
            if error.code == "EXTRA_MISSING":
                kind = "not_supported"
            if error.code in ("EMBEDDINGS", "RERANK"):
                return cls(kind, f"model: {error}", "model")
            details = {}
            if isinstance(error, ContextFullError) and error.n_ctx:
                details = {"n_prompt_tokens": error.n_tokens, "n_ctx": error.n_ctx}
            named = _FIELD.match(str(error)) if isinstance(error, ParameterError) else None
            field = "model" if kind == "not_found" else "tools" if error.code == "TOOLS" else named and named[1]
            return cls(kind, str(error), field, details=details)
        if isinstance(error, MemoryError):
            return cls("overloaded", "There is no memory left for this request. Send a smaller one, or wait.")
        return cls("server_error", "The server failed; its log says where. Send the request again.")

    @classmethod
    def told(cls, error: BaseException) -> ServerError:
        """``of``, with what is our own mistake in the log."""
        told = cls.of(error)
        if told.kind == "server_error":
            traceback.print_exception(error, file=sys.stderr)
        return told


def invalid(field: str | None, message: str) -> ServerError:
    """An invalid request; the message begins with the field."""
    return ServerError("invalid_request", f"{field}: {message}" if field else message, field)
