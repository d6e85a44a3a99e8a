"""A request for an answer as every protocol means it, and what its parts may be, whoever asks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from edgellm.server.bodies import check_depth
from edgellm.server.errors import invalid

MAX_CHOICES = 16
MAX_STOPS = 16
MAX_STOP_CHARS = 1024
MAX_BIASES = 1024
MAX_TOP_LOGPROBS = 20
MAX_TOOLS = 512
MAX_TOOL_NAME = 256
MAX_GRAMMAR_CHARS = 256 << 10
MAX_SCHEMA_NBYTES = 256 << 10
MAX_TOOLS_NBYTES = 4 << 20

TEMPLATE_KWARGS = frozenset(
    ("enable_thinking", "thinking", "reasoning_effort", "thinking_budget", "preserve_thinking", "clear_thinking")
)
"""What a request may say to a template; a template has other names that would cost, or say, something else."""

ToolChoice = str | Mapping[str, str]
Lora = dict[int | str, float] | None


@dataclass(frozen=True)
class ChatRequest:
    """A chat to be answered.

    model               a name of the server's list; "" its first model
    messages            as chat templates have them (the OpenAI protocol's fields)
    tools               descriptions as the OpenAI protocol has them
    tool_choice         "auto", "none", "required" or {"name": ...}
    response_format     as ``LLM.stream`` takes it; ``format_field`` is where the protocol has it
    grammar             of the answer, in GBNF or Lark
    reasoning           None as the model would, True, False, an effort ("low" ...), or tokens at most
    max_tokens          None goes on to the end of the context
    n                   answers to the same messages
    sampling            fields of SamplingParams
    logprobs            None, or how many of the likeliest tokens are told beside each one
    template_kwargs     for the template
    keep_alive          seconds that the model stays afterwards; None as the server has it
    begins              tokens that the answer is known to begin with, where another server has begun it
    lora                how much of each adapter, by its id or name, of others none; None as the server has it
    """

    model: str
    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None = None
    tool_choice: ToolChoice = "auto"
    parallel_tool_calls: bool = True
    response_format: Any = None
    grammar: str | None = None
    reasoning: bool | int | str | None = None
    max_tokens: int | None = None
    stop: Sequence[str] = ()
    n: int = 1
    sampling: Mapping[str, Any] = field(default_factory=dict)
    logprobs: int | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    keep_alive: float | None = None
    format_field: str = "response_format"
    begins: Sequence[int] = ()
    lora: Lora = None


def checked_lora(field: str, given: Sequence[Any] | None) -> Lora:
    """Scales by the ids of adapters, each named once."""
    if given is None:
        return None
    found: dict[int | str, float] = {one.id: one.scale for one in given}
    if len(found) < len(given):
        raise invalid(field, "an adapter is named twice.")
    return found


def checked_stops(field: str, stop: str | Sequence[str] | None) -> tuple[str, ...]:
    """Stop strings, few and short ones; empty ones stop nothing."""
    stops = [stop] if isinstance(stop, str) else list(stop or ())
    if len(stops) > MAX_STOPS or any(len(text) > MAX_STOP_CHARS for text in stops):
        raise invalid(field, f"at most {MAX_STOPS} texts of at most {MAX_STOP_CHARS} characters.")
    return tuple(text for text in stops if text)


def checked_bias(field: str, bias: Mapping[str, float] | None) -> dict[int | str, float]:
    """A number for each token id, ids written as JSON has keys."""
    if not bias:
        return {}
    if len(bias) > MAX_BIASES:
        raise invalid(field, f"at most {MAX_BIASES} tokens.")
    for token in bias:
        if not (token.isascii() and token.isdigit() and len(token) < 10):
            raise invalid(f"{field}.{token[:40]}", "the keys are token ids, written as digits.")
    return {int(token): value for token, value in bias.items()}


def checked_template_kwargs(field: str, given: Mapping[str, Any] | None) -> dict[str, Any]:
    """Names from the list, with plain values."""
    for name, value in (given or {}).items():
        if name not in TEMPLATE_KWARGS:
            raise invalid(f"{field}.{name[:40]}", f"a request may give {', '.join(sorted(TEMPLATE_KWARGS))}.")
        if not (value is None or isinstance(value, bool | int) or (isinstance(value, str) and len(value) <= 64)):
            raise invalid(f"{field}.{name}", "it must be true, false, a whole number, or a short text.")
    return dict(given or {})


def schema_format(field: str, schema: Any) -> dict[str, Any]:
    """The ``response_format`` of a JSON schema."""
    return {"type": "json_schema", "json_schema": {"schema": checked_schema(field, schema)}}


def checked_schema(field: str, schema: Any) -> Any:
    """A JSON schema of bounded size and depth."""
    if len(msgspec.json.encode(schema)) > MAX_SCHEMA_NBYTES:
        raise invalid(field, f"it has more than {MAX_SCHEMA_NBYTES >> 10} KiB.")
    check_depth(schema, 32)
    return schema


def checked_tool_name(field: str, name: Any) -> str:
    """The name of a function, for protocols whose tools are objects of any kind."""
    if not isinstance(name, str) or not 0 < len(name) <= MAX_TOOL_NAME:
        raise invalid(field, f"it must be a text of 1 to {MAX_TOOL_NAME} characters.")
    return name


def checked_tools(field: str, tools: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]] | None:
    """Descriptions of functions; their number and size are bounded."""
    if not tools:
        return None
    if len(tools) > MAX_TOOLS or len(msgspec.json.encode(tools)) > MAX_TOOLS_NBYTES:
        raise invalid(field, f"at most {MAX_TOOLS} tools with {MAX_TOOLS_NBYTES >> 20} MiB together.")
    return [dict(tool) for tool in tools]
