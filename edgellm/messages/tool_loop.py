"""A chat with tools: the model calls, functions run, the model goes on with what they return."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgellm import arguments
from edgellm.chat_template import Message
from edgellm.messages.tools import ToolBox, error_text, result_text

MAX_ROUNDS = 1000


@dataclass(frozen=True, eq=False)
class Reply(Message):
    """The last message of a chat, equal to a Message that says the same; ``steps`` are the calls and results before."""

    steps: tuple[Message, ...] = ()


class ToolLoop:
    """Rounds of one chat.

    messages    what the model is given next
    described   the tools as JSON
    """

    def __init__(self, messages: Sequence[Any], tools: Sequence[Any] | None, max_rounds: int) -> None:
        self._rounds_left = arguments.whole_number("max_rounds", max_rounds, 0, MAX_ROUNDS)
        self._tools = ToolBox(tools)
        self.described = self._tools.described
        self.messages = arguments.items("messages", messages, "text, or a list of messages")
        self._n_given = len(self.messages)
        self._reply: Message | None = None

    def take(self, message: Message) -> bool:
        """A message of the model; whether its calls are to be run, and another one asked for."""
        self._reply = message
        calls = message.tool_calls or ()
        whole = getattr(message.content, "finish_reason", "stop") == "stop"
        goes_on = bool(calls) and whole and self._rounds_left > 0 and self._tools.runs(calls)
        self._rounds_left -= goes_on
        return goes_on

    @property
    def reply(self) -> Reply:
        """The last message."""
        last, steps = self._reply, tuple(self.messages[self._n_given :])
        assert last is not None, "a message was taken"
        return Reply(
            last.role, last.content, tool_calls=last.tool_calls, reasoning_content=last.reasoning_content, steps=steps
        )

    def run(self) -> None:
        """Run the calls one after the other; coroutines run to their end here."""
        self._add([self._text(call) for call in self._calls()])

    async def arun(self) -> None:
        """Run the calls side by side: functions on threads, coroutines on this loop."""
        self._add(await asyncio.gather(*(self._atext(call) for call in self._calls())))

    def _calls(self) -> Sequence[Mapping[str, Any]]:
        assert self._reply is not None, "a message was taken"
        return self._reply.tool_calls or ()

    def _add(self, results: Sequence[str]) -> None:
        assert self._reply is not None, "a message was taken"
        self.messages.append(self._reply)
        for call, result in zip(self._calls(), results, strict=True):
            self.messages.append(Message("tool", result, name=call["function"]["name"], tool_call_id=call["id"]))

    def _text(self, call: Mapping[str, Any]) -> str:
        try:
            result = self._tools.begin(call)
            return result_text(asyncio.run(_awaited(result)) if inspect.isawaitable(result) else result)
        except Exception as error:  # whatever a function raises is for the model to know
            return error_text(error)

    async def _atext(self, call: Mapping[str, Any]) -> str:
        try:
            result = await asyncio.to_thread(self._tools.begin, call)
            return result_text(await result if inspect.isawaitable(result) else result)
        except Exception as error:
            return error_text(error)


async def _awaited(result: Any) -> Any:
    return await result
