"""``POST /v1/messages``: Anthropic's protocol, as Claude Code and its SDKs speak it.

An answer is a list of blocks (thinking, text, tool_use); in a stream each stops before the next one starts. No event
takes a block back, and clients run every tool_use that they were told of: a call is told once it is whole, or as it
comes where the tool asks for that with ``eager_input_streaming``. A turn of the role "system" in the midst of the talk
stays where it is, for whoever moves it loses the cached prefix behind it.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import re
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import Meta

from edgellm.messages.events import (
    ContentDelta,
    Event,
    Finished,
    PromptProgress,
    ReasoningDelta,
    ToolCallBegin,
    ToolCallDelta,
    ToolCallEnd,
)
from edgellm.server.answering import count_tokens, events
from edgellm.server.bodies import Body, wrong_shape
from edgellm.server.chat_request import (
    ChatRequest,
    ToolChoice,
    checked_stops,
    checked_tool_name,
    checked_tools,
    schema_format,
)
from edgellm.server.errors import Kind, ServerError, invalid
from edgellm.server.http import Call, Json, Reply, Route, Stream
from edgellm.server.models import ModelEntry
from edgellm.server.protocols.openai_responses import UNSEEN, sealed, unsealed
from edgellm.server.protocols.openai_wire import new_id
from edgellm.server.server import Server
from edgellm.server.sse import event

ERRORS: dict[Kind, tuple[int, str]] = {
    "invalid_request": (400, "invalid_request_error"),
    "authentication": (401, "authentication_error"),
    "permission": (403, "permission_error"),
    "not_found": (404, "not_found_error"),
    "too_large": (413, "request_too_large"),
    "context_exceeded": (400, "invalid_request_error"),
    "not_supported": (400, "invalid_request_error"),
    "overloaded": (529, "overloaded_error"),
    "rate_limited": (429, "rate_limit_error"),
    "server_error": (500, "api_error"),
}
STOP_REASONS = {
    "stop": "end_turn",
    "tool_calls": "tool_use",
    "length": "max_tokens",
    "context_full": "model_context_window_exceeded",
    "cancelled": "end_turn",
}
FORMAT_FIELD = "output_config.format.schema"
PING = event({"type": "ping"}, "ping")

# a checksum of the request at the start of Claude Code's system prompt: left as it is, no prefix is ever found again
BILLING = re.compile(r"(?m)^(x-anthropic-billing-header:.*?\bcch=)[^;\s]*")

BlockKind = Literal[
    "text", "thinking", "redacted_thinking", "tool_use", "tool_result", "mid_conv_system",
    "image", "document", "search_result", "server_tool_use", "web_search_tool_result", "web_fetch_tool_result",
    "code_execution_tool_result", "bash_code_execution_tool_result", "text_editor_code_execution_tool_result",
    "tool_search_tool_result", "tool_reference", "container_upload", "compaction",
]  # fmt: skip


class Source(msgspec.Struct):
    """Where a document comes from."""

    type: str
    data: str | None = None
    media_type: str | None = None


class Block(msgspec.Struct):
    """A block of content; which fields there are depends on its type."""

    type: BlockKind
    text: str | None = None
    thinking: str | None = None
    signature: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None
    content: Any = None  # text or blocks; of a server's own tools anything
    is_error: bool | None = None
    source: Any = None


class TextBlock(msgspec.Struct):
    """A block of a system prompt."""

    text: str
    type: Literal["text"] = "text"


class InputMessage(msgspec.Struct):
    """A turn of the talk."""

    role: Literal["user", "assistant", "system"]
    content: str | list[Block]


class Thinking(msgspec.Struct):
    """How much is thought before the answer."""

    type: Literal["enabled", "adaptive", "disabled"]
    budget_tokens: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None
    display: Literal["summarized", "omitted", "full"] | None = None


class Choice(msgspec.Struct):
    """Which tools may be called."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class OutputFormat(msgspec.Struct):
    """A JSON schema that the answer keeps."""

    schema: dict[str, Any]
    type: Literal["json_schema"] = "json_schema"


class OutputConfig(msgspec.Struct):
    """What the answer must be, and how much is thought for it."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class PromptBody(Body, kw_only=True):
    """What stands in the prompt; the body of /v1/messages/count_tokens."""

    ignored: ClassVar[frozenset[str]] = frozenset(
        # for billing, routing and caches elsewhere; hints of which the answer does not depend
        [
            "metadata",
            "service_tier",
            "inference_geo",
            "cache_control",
            "context_management",
            "betas",
            "speed",
            "diagnostics",
            "user_profile_id",
            "fallbacks",
        ]
    )

    model: Annotated[str, Meta(min_length=1)]
    messages: Annotated[list[InputMessage], Meta(min_length=1, max_length=100_000)]
    system: str | list[TextBlock] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Choice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None
    mcp_servers: Annotated[list[Any], Meta(max_length=0)] | None = None
    container: None = None


class MessagesBody(PromptBody, kw_only=True):
    """The body of a message."""

    max_tokens: Annotated[int, Meta(ge=0, le=2**31 - 1)]
    stream: bool | None = None
    stop_sequences: list[str] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None


# -- from the body to the request -------------------------------------------------------------------------------------


def to_request(body: PromptBody) -> ChatRequest:
    """The body as every protocol means it. ServerError names the field that is wrong."""
    tools = function_tools(body.tools)
    config = body.output_config or OutputConfig()
    wanted = config.format or body.output_format
    messages = to_messages(body)
    goes_on = messages[-1]["role"] == "assistant" and messages[-1].get("content")
    fields = ("temperature", "top_p", "top_k")
    given = {name: getattr(body, name, None) for name in fields}
    return ChatRequest(
        model=body.model,
        messages=messages,
        tools=checked_tools("tools", tools),
        tool_choice=_tool_choice(body, [tool["function"]["name"] for tool in tools]),
        parallel_tool_calls=not (body.tool_choice and body.tool_choice.disable_parallel_tool_use),
        response_format=None if wanted is None else schema_format(FORMAT_FIELD, wanted.schema),
        format_field=FORMAT_FIELD,
        reasoning=_reasoning(body.thinking, config.effort),
        max_tokens=getattr(body, "max_tokens", None),
        stop=checked_stops("stop_sequences", getattr(body, "stop_sequences", None)),
        sampling={name: value for name, value in given.items() if value is not None},
        template_kwargs={"continue_final_message": True} if goes_on else {},
    )


def _reasoning(thinking: Thinking | None, effort: str | None) -> bool | int | str | None:
    """Nobody who leaves it out expects thinking; "adaptive" leaves it to the model, or says how much."""
    if thinking is None or thinking.type == "disabled":
        return False
    if thinking.type == "adaptive":
        return effort
    if thinking.budget_tokens is None:
        raise invalid("thinking.budget_tokens", "it is missing.")
    return thinking.budget_tokens


def function_tools(tools: Sequence[dict[str, Any]] | None) -> list[dict[str, Any]]:
    """The client's own tools as templates have them; kinds with a version in their type are left out."""
    found = []
    for number, tool in enumerate(tools or ()):
        if tool.get("type") not in (None, "custom"):
            continue
        name, schema = checked_tool_name(f"tools[{number}].name", tool.get("name")), tool.get("input_schema")
        if not isinstance(schema, dict):
            raise invalid(f"tools[{number}].input_schema", "it must be a JSON schema, an object.")
        told = {"description": tool["description"]} if isinstance(tool.get("description"), str) else {}
        strict = {"strict": True} if tool.get("strict") is True else {}
        found.append({"type": "function", "function": {"name": name, **told, "parameters": schema, **strict}})
    return found


def _tool_choice(body: PromptBody, names: list[str]) -> ToolChoice:
    choice = body.tool_choice
    if choice is None or choice.type in ("auto", "none"):
        return "auto" if choice is None else choice.type
    if not names:
        raise invalid("tool_choice", "it wants a call, and there is no tool that the client runs.")
    if choice.type == "any":
        return "required"
    if choice.name not in names:
        raise invalid("tool_choice.name", "it is none of the tools.")
    return {"name": str(choice.name)}


def to_messages(body: PromptBody) -> list[dict[str, Any]]:
    """The system prompt and the turns as chat templates have them."""
    messages: list[dict[str, Any]] = []
    if body.system:
        texts = [body.system] if isinstance(body.system, str) else [block.text for block in body.system]
        messages.append({"role": "system", "content": BILLING.sub(r"\g<1>0", "\n\n".join(texts))})
    names: dict[str, str] = {}  # id of a tool_use -> its tool
    for number, message in enumerate(body.messages):
        where = f"messages[{number}].content"
        if isinstance(message.content, str):
            messages.append({"role": message.role, "content": message.content})
        elif message.role == "assistant":
            messages.append(_assistant(message.content, where, names))
        else:
            messages += _turn(message.role, message.content, where, names)
    return messages


def _assistant(blocks: Sequence[Block], where: str, names: dict[str, str]) -> dict[str, Any]:
    texts, thoughts, calls = [], [], []
    for number, block in enumerate(blocks):
        if block.type == "text":
            texts.append(_given(block.text, f"{where}[{number}].text"))
        elif block.type == "thinking":
            thoughts.append(block.thinking or unsealed(block.signature))
        elif block.type == "tool_use":
            name = _given(block.name, f"{where}[{number}].name")
            call = _given(block.id, f"{where}[{number}].id")
            names[call] = name
            function = {"name": name, "arguments": block.input or {}}
            calls.append({"id": call, "type": "function", "function": function})
        elif block.type in ("image", "document", "tool_result"):
            raise invalid(f"{where}[{number}].type", f"a turn of the assistant has no {block.type}.")
    return {
        "role": "assistant",
        "content": "\n\n".join(texts) if texts else None,
        **({"reasoning_content": "\n\n".join(thoughts)} if any(thoughts) else {}),
        **({"tool_calls": calls} if calls else {}),
    }


def _turn(role: str, blocks: Sequence[Block], where: str, names: dict[str, str]) -> Iterator[dict[str, Any]]:
    """A turn of the user, or in-line of the system: texts in a row are one message, each tool's result is its own."""
    texts: list[str] = []
    for number, block in enumerate(blocks):
        at = f"{where}[{number}]"
        if block.type == "tool_result":
            if texts:
                yield {"role": role, "content": "\n\n".join(texts)}
                texts = []
            call = _given(block.tool_use_id, f"{at}.tool_use_id")
            named = {"name": names[call]} if call in names else {}
            text = _result(block.content, f"{at}.content")
            said = f"Error: {text}" if block.is_error and not text.lower().startswith("error") else text
            yield {"role": "tool", "tool_call_id": call, **named, "content": said}
        elif block.type == "mid_conv_system":
            if texts:
                yield {"role": role, "content": "\n\n".join(texts)}
                texts = []
            yield {"role": "system", "content": _result(block.content, f"{at}.content")}
        elif block.type == "text":
            texts.append(_given(block.text, f"{at}.text"))
        elif (shown := _text(block)) is not None:
            texts.append(shown)
        elif block.type not in ("compaction", "container_upload", "tool_reference"):
            raise invalid(f"{at}.type", f"it is {block.type!r}; this model reads text, and results of tools.")
    if texts or not blocks:
        yield {"role": role, "content": "\n\n".join(texts)}


def _text(block: Block) -> str | None:
    """The text of a block that is text, one way or another."""
    if block.type == "text":
        return block.text
    if block.type == "document" and isinstance(block.source, dict) and block.source.get("type") == "text":
        data = block.source.get("data")
        return data if isinstance(data, str) else None
    return _result(block.content, "content") if block.type == "search_result" else None


def _result(content: Any, where: str) -> str:
    """The text of a tool's result. What is no text becomes a note of it, for the agent cannot take it back."""
    if content is None or isinstance(content, str):
        return content or ""
    try:
        blocks = msgspec.convert(content, list[Block])
    except msgspec.ValidationError as error:
        raise wrong_shape(error, where) from None
    return "\n".join(UNSEEN.format(block.type) if (text := _text(block)) is None else text for block in blocks)


def _given(value: str | None, where: str) -> str:
    if not value and not (value == "" and where.endswith(".text")):
        raise invalid(where, "it is missing.")
    return value or ""


# -- from events to blocks --------------------------------------------------------------------------------------------


EAGER = "fine-grained-tool-streaming-2025-05-14"
"""In the header anthropic-beta: what ``eager_input_streaming`` was called before tools had it."""


class MessageWriter:
    """One message in the making: its blocks so far, and the events that tell of each change.

    eager   whether calls are told as they come where their tool does not say
    """

    def __init__(self, body: MessagesBody, *, eager: bool = False) -> None:
        self.body = body
        self.content: list[dict[str, Any]] = []
        self.end: dict[str, Any] = {"stop_reason": None, "stop_sequence": None}
        self.usage = _usage(0, 0, 0, 0)
        self.message = {"id": new_id("msg_"), "type": "message", "role": "assistant", "model": body.model}
        self.begun = False
        self._kind: str | None = None  # of the open block, the last one
        self._number = -1  # of that block among all that the stream has told
        self._pieces: list[str] = []
        self._held: tuple[ToolCallBegin, list[str]] | None = None  # a call that is told once it is whole
        asks = ((str(tool.get("name")), tool.get("eager_input_streaming")) for tool in body.tools or ())
        self._eager = {name for name, asked in asks if (eager if asked is None else asked is True)}

    def as_dict(self) -> dict[str, Any]:
        """The message as it stands."""
        nothing = {"stop_details": None, "container": None}
        return {**self.message, "content": list(self.content), **self.end, **nothing, "usage": self.usage}

    def add(self, one: Event) -> Iterator[bytes]:
        """What an event of the answer changes."""
        if isinstance(one, PromptProgress):
            self.usage = _usage(one.total, one.reused, 0, 0)
            if not one.done:  # what the cache has of it is not known yet
                return
        if not self.begun:
            self.begun = True
            yield _event("message_start", message=self.as_dict())
        if isinstance(one, ContentDelta):
            yield from self._add("text", one.text, {"text": ""}, "text_delta")
        elif isinstance(one, ReasoningDelta):
            yield from self._add("thinking", one.text, {"thinking": "", "signature": ""}, "thinking_delta")
        elif isinstance(one, ToolCallBegin | ToolCallDelta | ToolCallEnd):
            yield from self._call(one)
        elif isinstance(one, Finished):
            yield from self._finish(one)

    def _call(self, one: ToolCallBegin | ToolCallDelta | ToolCallEnd) -> Iterator[bytes]:
        if isinstance(one, ToolCallBegin):
            self._held = None if one.name in self._eager else (one, [])
            if self._held is None:
                yield from self._open_call(one)
        elif isinstance(one, ToolCallDelta) and self._held is not None:
            self._held[1].append(one.arguments)
        elif isinstance(one, ToolCallDelta):
            yield self._input(one.arguments)
        else:
            if self._held is not None:
                begin, pieces = self._held
                self._held = None
                yield from self._open_call(begin)
                if arguments := "".join(pieces):
                    yield self._input(arguments)
            self.content[-1]["input"] = msgspec.json.decode("".join(self._pieces) or "{}")
            yield from self._stop()

    def _input(self, arguments: str) -> bytes:
        self._pieces.append(arguments)
        return self._delta({"type": "input_json_delta", "partial_json": arguments})

    def _open_call(self, one: ToolCallBegin) -> Iterator[bytes]:
        name = re.sub(r"[^a-zA-Z0-9_-]", "_", one.id) or new_id("toolu_")
        yield from self._open("tool_use", {"id": name, "name": one.name, "input": {}, "caller": {"type": "direct"}})

    def _add(self, kind: str, text: str, empty: dict[str, Any], delta: str) -> Iterator[bytes]:
        if not text:
            return
        if self._kind != kind:
            yield from self._open(kind, empty)
        self._pieces.append(text)
        if kind == "text" or not self._omits_thinking:
            yield self._delta({"type": delta, kind: text})

    @property
    def _omits_thinking(self) -> bool:
        return self.body.thinking is not None and self.body.thinking.display == "omitted"

    def _open(self, kind: str, block: dict[str, Any]) -> Iterator[bytes]:
        yield from self._close()
        told = {"type": kind, **block, **({"citations": None} if kind == "text" else {})}
        self.content.append(told)
        self._kind, self._pieces, self._number = kind, [], self._number + 1
        yield _event("content_block_start", index=self._number, content_block=dict(told))

    def _delta(self, delta: dict[str, Any]) -> bytes:
        return _event("content_block_delta", index=self._number, delta=delta)

    def _close(self) -> Iterator[bytes]:
        """End the open block. A call that has not ended is none: whoever got it would run it."""
        kind, text = self._kind, "".join(self._pieces)
        if kind is None:
            return
        block = self.content[-1]
        if kind == "tool_use":
            self.content.pop()
        elif kind == "thinking":
            omitted = self._omits_thinking
            block |= {"thinking": "" if omitted else text, "signature": signature(text, packed=omitted)}
            yield self._delta({"type": "signature_delta", "signature": block["signature"]})
        else:
            block["text"] = text
        yield from self._stop()

    def _stop(self) -> Iterator[bytes]:
        self._kind = None
        yield _event("content_block_stop", index=self._number)

    def _finish(self, one: Finished) -> Iterator[bytes]:
        yield from self._close()
        reason = STOP_REASONS[one.reason]
        stopped = one.reason == "stop" and isinstance(one.stop, str)
        self.end = {
            "stop_reason": "stop_sequence" if stopped else reason,
            "stop_sequence": one.stop if stopped else None,
        }
        timings = one.timings
        self.usage = _usage(timings.prompt_n, timings.reused_n, timings.generation_n, one.n_reasoning)
        nothing = {"container": None, "stop_details": None}
        left_out = ("cache_creation", "inference_geo", "service_tier")
        usage = {name: value for name, value in self.usage.items() if name not in left_out}
        yield _event("message_delta", delta={**self.end, **nothing}, usage=usage)
        yield _event("message_stop")


def _event(kind: str, **more: Any) -> bytes:
    return event({"type": kind, **more}, kind)


def _usage(prompt: int, reused: int, generated: int, reasoning: int) -> dict[str, Any]:
    """Tokens; those that the cache held do not count as input."""
    return {
        "input_tokens": max(prompt - reused, 0),
        "cache_read_input_tokens": reused,
        "cache_creation_input_tokens": 0,
        "cache_creation": None,
        "output_tokens": generated,
        "output_tokens_details": {"thinking_tokens": reasoning},
        "inference_geo": None,
        "server_tool_use": None,
        "service_tier": "standard",
    }


def signature(thought: str, *, packed: bool) -> str:
    """What a client gives back with a thinking block; ``packed`` holds the thought itself, which it was not shown."""
    if packed:
        return sealed(thought)
    return base64.b64encode(hashlib.sha256(thought.encode("utf-8", "surrogatepass")).digest()).decode()


# -- the handlers -----------------------------------------------------------------------------------------------------


def error_body(error: ServerError) -> tuple[int, dict[str, Any]]:
    """The status and body of an error; of a prompt that is too long in the words that clients look for."""
    status, kind = ERRORS[error.kind]
    message = error.message
    if error.kind == "context_exceeded" and error.details:
        message = "prompt is too long: {n_prompt_tokens} tokens > {n_ctx} maximum".format(**error.details)
    body = {"type": "error", "error": {"type": kind, "message": message}, "request_id": new_id("req_")}
    return (error.status if error.kind == "invalid_request" else status), body


async def messages(call: Call) -> Reply:
    """A whole message, or its events."""
    body: MessagesBody = call.body
    request = to_request(body)
    writer = MessageWriter(body, eager=EAGER in call.headers.get("anthropic-beta", ""))

    async def told() -> AsyncIterator[bytes]:
        async with contextlib.aclosing(events(call.server, request)) as source:
            async for one in source:
                for chunk in writer.add(one):
                    yield chunk

    headers = {"request-id": new_id("req_")}
    if body.stream:
        return Stream(told(), failed=lambda error: event(error_body(error)[1], "error"), ping=PING, headers=headers)
    async for _ in told():
        pass
    return Json(writer.as_dict(), headers=headers)


async def count(call: Call) -> Reply:
    """How many tokens the prompt of a message would have."""
    return Json({"input_tokens": await count_tokens(call.server, to_request(call.body))})


async def model_list(server: Server) -> dict[str, Any]:
    """The models as this protocol lists them: what GET /v1/models answers to who sends anthropic-version."""
    entries = await server.models.usable()
    data = await asyncio.gather(*(model_info(server, entry) for entry in entries))
    ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {"first_id": None, "last_id": None}
    return {"data": data, "has_more": False, **ends}


async def model_info(server: Server, entry: ModelEntry) -> dict[str, Any]:
    """One model as this protocol has it."""
    facts = await server.models.facts(entry)
    created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(entry.created))
    return {
        "type": "model",
        "id": entry.name,
        "display_name": facts.card.name or entry.name,
        "created_at": created,
        "max_input_tokens": facts.n_ctx,
        "max_tokens": facts.n_ctx,
        "capabilities": None,
        "lifecycle": "active",
        **dict.fromkeys(("line", "deprecated_at", "retires_at")),
    }


ROUTES = (
    Route("POST", "/v1/messages", messages, MessagesBody, summary="Answer, as a list of blocks"),
    Route("POST", "/v1/messages/count_tokens", count, PromptBody, summary="Count the tokens of a prompt"),
)
