"""What happens while a message is written, as a stream of small tuples; every protocol is a way to write them down.

A message is any number of reasoning, content and tool calls. A call begins, gets pieces of its arguments (together
one JSON object) and ends; one that was cut off never ends and is not in the message. ``Finished`` is the last event.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from edgellm.engine.requests import Timings
    from edgellm.generation import TokenLogprob

FinishReason = Literal["stop", "tool_calls", "length", "context_full", "cancelled"]


class PromptProgress(NamedTuple):
    """Tokens of the prompt that are done, of all; ``reused`` of them were in the prefix cache."""

    done: int
    total: int
    reused: int


class ContentDelta(NamedTuple):
    """More of the answer. ``logprobs`` are those of the tokens that were read since the last event that has any."""

    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


class ReasoningDelta(NamedTuple):
    """More of what the model thinks before it answers."""

    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


class ToolCallBegin(NamedTuple):
    """The call number ``index`` of the message; ``id`` is the model's own or made for it."""

    index: int  # type: ignore[assignment]  # a tuple has a method of that name
    id: str
    name: str


class ToolCallDelta(NamedTuple):
    """A piece of the JSON text of the arguments."""

    index: int  # type: ignore[assignment]  # a tuple has a method of that name
    arguments: str


class ToolCallEnd(NamedTuple):
    """The arguments are whole: one JSON object. Only now may the call be executed."""

    index: int  # type: ignore[assignment]  # a tuple has a method of that name


class Finished(NamedTuple):
    """The answer is over.

    reason        "tool_calls" where the message has one and ended by itself, else as in ``GenerationChunk``
    stop          what ended it: the stop string, or the id of the end-of-generation token
    n_reasoning   tokens of the reasoning, its markers included
    """

    reason: FinishReason
    stop: str | int | None
    timings: Timings
    n_reasoning: int


Event = PromptProgress | ContentDelta | ReasoningDelta | ToolCallBegin | ToolCallDelta | ToolCallEnd | Finished
