"""``POST /v1/chat/completions``: OpenAI's chat, with llama-server's further fields."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
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
from edgellm.server.answering import choices
from edgellm.server.chat_request import (
    MAX_CHOICES,
    MAX_GRAMMAR_CHARS,
    MAX_TOP_LOGPROBS,
    ChatRequest,
    ToolChoice,
    checked_lora,
    checked_stops,
    checked_template_kwargs,
    checked_tools,
    schema_format,
)
from edgellm.server.errors import ServerError, invalid
from edgellm.server.http import Call, Json, Reply, Route, Stream
from edgellm.server.protocols.openai_wire import (
    FINGERPRINT,
    CountOrAll,
    Effort,
    LoraScales,
    SamplingBody,
    chat_logprob,
    error_body,
    llama_timings,
    new_id,
    sampling_fields,
    usage,
)
from edgellm.server.relay import now
from edgellm.server.sse import event

FINISH = {"stop": "stop", "tool_calls": "tool_calls", "length": "length", "context_full": "length", "cancelled": "stop"}

# for billing, storing and routing, which is not done here, and hints that change no answer
# fmt: off
IGNORED = frozenset((
    "user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "verbosity", "prediction", "web_search_options", "cache_prompt", "id_slot", "n_keep", "include_reasoning",
    "reasoning_format",
))
# fmt: on


class Part(msgspec.Struct):
    """A part of a message's content; text is what edgellm reads."""

    type: str
    text: str | None = None


class CalledFunction(msgspec.Struct):
    """What a model called, the arguments as the JSON text that it wrote."""

    name: str
    arguments: str = "{}"


class ToolCall(msgspec.Struct):
    """A call in the history."""

    function: CalledFunction
    id: str | None = None
    type: Literal["function"] = "function"


class ChatMessage(msgspec.Struct):
    """A message of the history."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class NamedFunction(msgspec.Struct):
    """A function by its name."""

    name: str


class NamedTool(msgspec.Struct):
    """The one tool to be called."""

    function: NamedFunction
    type: Literal["function"] = "function"


class FunctionDescription(msgspec.Struct):
    """What a tool does, and the JSON schema of its arguments."""

    name: Annotated[str, Meta(min_length=1, max_length=256)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct):
    """A function that the model may call."""

    function: FunctionDescription
    type: Literal["function"] = "function"


class NamedSchema(msgspec.Struct):
    """A JSON schema and its name."""

    schema: dict[str, Any] | bool | None = None
    name: str | None = None
    strict: bool | None = None
    description: str | None = None


class ResponseFormat(msgspec.Struct):
    """What the answer must be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None
    schema: dict[str, Any] | None = None


class StreamOptions(msgspec.Struct):
    """What a stream tells beside the answer."""

    include_usage: bool = False


class ReasoningOptions(msgspec.Struct, forbid_unknown_fields=True):
    """How much is thought, as routers ask for it; summaries are not made, the reasoning itself is told."""

    effort: Effort | None = None
    max_tokens: CountOrAll | None = None
    enabled: bool | None = None
    summary: str | None = None
    exclude: Literal[False] | None = None


class ChatBody(SamplingBody, kw_only=True):
    """The body of a chat."""

    ignored: ClassVar[frozenset[str]] = IGNORED

    messages: Annotated[list[ChatMessage], Meta(min_length=1, max_length=100_000)]
    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: CountOrAll | None = None
    max_completion_tokens: CountOrAll | None = None
    n_predict: CountOrAll | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    n_cmpl: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    stop: str | list[str] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["auto", "none", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    json_schema: dict[str, Any] | None = None
    grammar: Annotated[str, Meta(max_length=MAX_GRAMMAR_CHARS)] | None = None
    reasoning_effort: Effort | None = None
    reasoning: ReasoningOptions | None = None
    reasoning_budget_tokens: CountOrAll | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None
    modalities: list[Literal["text"]] | None = None
    return_progress: bool | None = None
    lora: LoraScales | None = None


def to_request(body: ChatBody) -> ChatRequest:
    """The body as every protocol means it. ServerError names the field that is wrong."""
    kwargs = checked_template_kwargs("chat_template_kwargs", body.chat_template_kwargs)
    if body.continue_final_message:
        if body.add_generation_prompt:
            raise invalid("continue_final_message", "it excludes add_generation_prompt; send that as false.")
        kwargs["continue_final_message"] = True
    if body.top_logprobs is not None and not body.logprobs:
        raise invalid("top_logprobs", "it needs logprobs: true.")
    given = (body.max_completion_tokens, body.max_tokens, body.n_predict)
    return ChatRequest(
        model=body.model or "",
        messages=[to_message(message, f"messages[{number}]") for number, message in enumerate(body.messages)],
        tools=checked_tools("tools", [plain_tool(tool) for tool in body.tools or ()]),
        tool_choice=_tool_choice(body),
        parallel_tool_calls=body.parallel_tool_calls is not False,
        response_format=_one_form(body),
        grammar=body.grammar or None,
        reasoning=_reasoning(body),
        max_tokens=next((n for n in given if n is not None), None),
        stop=checked_stops("stop", body.stop),
        n=body.n or body.n_cmpl or 1,
        sampling=sampling_fields(body),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        template_kwargs=kwargs,
        lora=checked_lora("lora", body.lora),
    )


def to_message(message: ChatMessage, where: str) -> dict[str, Any]:
    """A message as templates have it; ServerError for a part that is no text."""
    plain = {name: value for name, value in msgspec.to_builtins(message).items() if value is not None}
    if isinstance(message.content, list):
        for number, part in enumerate(message.content):
            if part.type not in ("text", "input_text", "output_text", "refusal") or part.text is None:
                at = f"{where}.content[{number}]"
                raise invalid(f"{at}.type", f"it is {part.type[:40]!r}; this server's models read text parts only.")
        plain["content"] = [{"type": "text", "text": part.text} for part in message.content]
    plain.setdefault("content", None)
    if "reasoning" in plain:
        plain.setdefault("reasoning_content", plain.pop("reasoning"))
    if message.role == "developer":
        plain["role"] = "system"
    return plain


def plain_tool(tool: Tool) -> dict[str, Any]:
    """A tool without what it does not have."""
    data: dict[str, Any] = msgspec.to_builtins(tool)
    return {**data, "function": {name: one for name, one in data["function"].items() if one is not None}}


def _tool_choice(body: ChatBody) -> ToolChoice:
    choice = body.tool_choice
    if choice is None or choice in ("auto", "none"):
        return choice or "auto"
    names = [tool.function.name for tool in body.tools or ()]
    if not names:
        raise invalid("tool_choice", "it wants a call, and there are no tools.")
    if isinstance(choice, str):
        return choice
    if choice.function.name not in names:
        raise invalid("tool_choice.function.name", "it is none of the tools.")
    return {"name": choice.function.name}


def format_of(given: ResponseFormat | None) -> Any:
    """What the library takes; None for plain text."""
    if given is None or given.type == "text":
        return None
    if given.type == "json_object":
        if given.schema is None:
            return {"type": "json_object"}
        schema: Any = given.schema
    elif given.json_schema is None or given.json_schema.schema is None:
        raise invalid("response_format.json_schema.schema", "it is missing.")
    else:
        schema = given.json_schema.schema
    return schema_format("response_format.json_schema.schema", schema)


def _one_form(body: ChatBody) -> Any:
    """The schema of the answer, by OpenAI's field or llama-server's; a grammar stands for itself."""
    given = {"response_format": format_of(body.response_format), "json_schema": body.json_schema}
    named = [name for name, value in {**given, "grammar": body.grammar or None}.items() if value is not None]
    if len(named) > 1:
        raise invalid(named[-1], f"{named[0]} says already what the answer must be. Send one of them.")
    if body.grammar and body.tools and body.tool_choice != "none":
        raise invalid("grammar", "it would forbid the calls of the tools. Send one of them.")
    if body.json_schema is not None:
        return schema_format("json_schema", body.json_schema)
    return given["response_format"]


def _reasoning(body: ChatBody) -> bool | int | str | None:
    """Tokens at most, or else an effort, or else whether at all."""
    more = body.reasoning or ReasoningOptions()
    budget = next((n for n in (body.reasoning_budget_tokens, more.max_tokens) if n not in (None, -1)), None)
    if budget is not None:
        return budget or False
    effort = body.reasoning_effort or more.effort
    return more.enabled if effort is None else effort != "none" and effort


async def chat_completions(call: Call) -> Reply:
    """A whole answer, or its chunks."""
    body: ChatBody = call.body
    request = to_request(body)
    name = body.model or (await call.server.models.find(None)).name
    head = {"id": new_id("chatcmpl-"), "created": int(now()), "model": name}
    if body.stream:
        return Stream(_chunks(call, body, request, head), failed=_failed)
    return Json(await _whole(call, request, head))


def _failed(error: ServerError) -> bytes:
    return event(error_body(error)[1])


class _Choice:
    """One answer in the making."""

    def __init__(self) -> None:
        self.content: list[str] = []
        self.reasoning: list[str] = []
        self.begun: list[dict[str, Any]] = []
        self.calls: list[dict[str, Any]] = []  # those of them that have ended: whoever got another would run it
        self.logprobs: list[dict[str, Any]] = []
        self.finished: Finished | None = None

    def add(self, event: Event) -> None:
        if isinstance(event, ContentDelta | ReasoningDelta):
            (self.content if isinstance(event, ContentDelta) else self.reasoning).append(event.text)
            self.logprobs += map(chat_logprob, event.logprobs)
        elif isinstance(event, ToolCallBegin):
            self.begun.append(_call(event))
        elif isinstance(event, ToolCallDelta):
            self.begun[event.index]["function"]["arguments"] += event.arguments
        elif isinstance(event, ToolCallEnd):
            self.calls.append(self.begun[event.index])
        elif isinstance(event, Finished):
            self.finished = event

    def as_dict(self, index: int, with_logprobs: bool) -> dict[str, Any]:
        assert self.finished is not None, "every answer ends"
        content = "".join(self.content)
        message: dict[str, Any] = {"role": "assistant", "content": content or (None if self.calls else "")}
        message["refusal"] = None
        if self.reasoning:
            message["reasoning_content"] = message["reasoning"] = "".join(self.reasoning)
        if self.calls:
            message["tool_calls"] = self.calls
        logprobs = {"content": self.logprobs, "refusal": None} if with_logprobs else None
        reason = FINISH[self.finished.reason]
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason}


def _call(event: ToolCallBegin) -> dict[str, Any]:
    return {"id": event.id, "type": "function", "function": {"name": event.name, "arguments": ""}}


async def _whole(call: Call, request: ChatRequest, head: dict[str, Any]) -> dict[str, Any]:
    made = [_Choice() for _ in range(request.n)]
    async with contextlib.aclosing(choices(call.server, request)) as source:
        async for number, one in source:
            made[number].add(one)
    ends = [choice.finished for choice in made if choice.finished is not None]
    return {
        "object": "chat.completion",
        **head,
        "choices": [choice.as_dict(number, request.logprobs is not None) for number, choice in enumerate(made)],
        "usage": _usage(ends),
        "system_fingerprint": FINGERPRINT,
        "timings": llama_timings(ends[0].timings),
    }


def _usage(ends: list[Finished]) -> dict[str, Any]:
    written = sum(end.timings.generation_n for end in ends)
    return usage(ends[0].timings, sum(end.n_reasoning for end in ends), written)


async def _chunks(call: Call, body: ChatBody, request: ChatRequest, head: dict[str, Any]) -> AsyncIterator[bytes]:
    """The chunks in the order that clients rely on: role, deltas, finish reason; usage; the end."""
    with_usage = body.stream_options is not None and body.stream_options.include_usage
    frame = {"object": "chat.completion.chunk", **head, "system_fingerprint": FINGERPRINT}
    if with_usage:
        frame["usage"] = None
    ends: list[Finished] = []

    def chunk(number: int, delta: dict[str, Any], reason: str | None = None, **more: Any) -> bytes:
        choice = {"index": number, "delta": delta, "logprobs": more.pop("logprobs", None), "finish_reason": reason}
        return event({**frame, "choices": [choice], **more})

    begun: set[int] = set()
    async with contextlib.aclosing(choices(call.server, request)) as source:
        async for number, one in source:
            if number not in begun:
                begun.add(number)
                yield chunk(number, {"role": "assistant", "content": "", "refusal": None})
            if isinstance(one, Finished):
                ends.append(one)
                yield chunk(number, {}, FINISH[one.reason], timings=llama_timings(one.timings))
            elif isinstance(one, PromptProgress):
                if body.return_progress:
                    progress = {"total": one.total, "cache": one.reused, "processed": one.done}
                    yield chunk(number, {}, prompt_progress=progress)
            elif (delta := _delta(one)) is not None:
                logprobs = getattr(one, "logprobs", ())
                told = {"content": [chat_logprob(token) for token in logprobs], "refusal": None} if logprobs else None
                yield chunk(number, delta, logprobs=told)
    if with_usage:
        yield event({**frame, "choices": [], "usage": _usage(ends)})
    yield b"data: [DONE]\n\n"


def _delta(one: Event) -> dict[str, Any] | None:
    if isinstance(one, ContentDelta):
        return {"content": one.text}
    if isinstance(one, ReasoningDelta):
        return {"reasoning_content": one.text, "reasoning": one.text}
    if isinstance(one, ToolCallBegin):
        return {"tool_calls": [{"index": one.index, **_call(one)}]}
    if isinstance(one, ToolCallDelta):
        return {"tool_calls": [{"index": one.index, "function": {"arguments": one.arguments}}]}
    return None


ROUTES = (
    Route("POST", "/v1/chat/completions", chat_completions, ChatBody, summary="Answer a chat"),
    Route("POST", "/chat/completions", chat_completions, ChatBody, summary="Answer a chat"),
)
