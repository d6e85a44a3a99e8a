"""What llama-server's own endpoints share: errors with whole numbers as codes, and the settings of an answer."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

from edgellm.server.errors import ServerError
from edgellm.server.protocols.openai_wire import ERROR_TYPES

if TYPE_CHECKING:
    from edgellm.sampling import SamplingParams
    from edgellm.server.text_request import TextRequest

_NAMES = {"penalty_last_n": "repeat_last_n"}
_UNTOLD = frozenset(("processors", "sampler_trace", "logit_bias"))


def error_body(error: ServerError) -> tuple[int, dict[str, Any]]:
    """The status and body of an error; ``param`` is the field."""
    told = {"code": error.status, "message": error.message, "type": ERROR_TYPES[error.kind], "param": error.field}
    return error.status, {"error": {**told, **error.details}}


def settings(params: SamplingParams, request: TextRequest | None = None) -> dict[str, Any]:
    """How tokens are chosen, in llama-server's names; with what the request says of the end of its answer."""
    told = {_NAMES.get(one.name, one.name): getattr(params, one.name) for one in fields(params)}
    told = {name: list(value) if isinstance(value, tuple) else value for name, value in told.items()}
    told = {name: value for name, value in told.items() if name not in _UNTOLD}
    told["logit_bias"] = [{"id": token, "bias": _number(value)} for token, value in params.logit_bias.items()]
    if request is not None:
        n = -1 if request.max_tokens is None else request.max_tokens
        told |= {"n_predict": n, "max_tokens": n, "stop": list(request.stop), "stream": False}
    return told


def _number(value: Any) -> float:
    """JSON has no infinity."""
    return max(float(value), -1e9)
