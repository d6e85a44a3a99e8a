"""``POST /v1/responses``: OpenAI's newer protocol, as agents speak it.

An answer is a list of items (reasoning, message, function_call), and a stream tells of each from its first to its last
piece. Tools of kinds that a server would have to run itself are left out, never refused: agents always send some.
What was thought is told as text; with ``include: ["reasoning.encrypted_content"]`` it is also packed into the item, so
that a client that keeps no reasoning text gives it back and the prefix stays cached.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import Meta

from edgellm.messages.events import (
    ContentDelta,
    Event,
    Finished,
    ReasoningDelta,
    ToolCallBegin,
    ToolCallDelta,
    ToolCallEnd,
)
from edgellm.sampling import SamplingParams
from edgellm.server.answering import count_tokens, events
from edgellm.server.bodies import wrong_shape
from edgellm.server.chat_request import (
    MAX_TOP_LOGPROBS,
    ChatRequest,
    ToolChoice,
    checked_template_kwargs,
    checked_tool_name,
    checked_tools,
    schema_format,
)
from edgellm.server.errors import ServerError, invalid
from edgellm.server.http import Call, Json, Reply, Route, Stream
from edgellm.server.protocols.openai_wire import (
    Effort,
    SamplingBody,
    error_body,
    new_id,
    plain_logprob,
    sampling_fields,
)
from edgellm.server.relay import now
from edgellm.server.response_store import ResponseStore
from edgellm.server.sse import event

__all__ = ["ROUTES", "error_body"]

FORMAT_FIELD = "text.format.schema"
SEALED = "edgellm:"  # begins an encrypted_content of ours; nothing in it is secret
TEXT_PARTS = frozenset(("input_text", "output_text", "text", "summary_text", "reasoning_text", "refusal"))
UNSEEN = "[{}: this model reads text only]"  # in place of a picture that a tool gave: the agent cannot take it back
FAILURE_CODES = {"context_exceeded": "context_length_exceeded", "overloaded": "server_is_overloaded"}
Summary = Literal["auto", "concise", "detailed"]


class Part(msgspec.Struct):
    """A part of an item's content."""

    type: str
    text: str | None = None


class Item(msgspec.Struct):
    """An item of the input; which fields there are depends on its type."""

    type: str | None = None
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: str | list[Part] | None = None
    id: str | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | dict[str, Any] | None = None
    input: str | None = None
    output: str | list[Part] | dict[str, Any] | None = None
    summary: list[Part] | None = None
    encrypted_content: str | None = None


class TextFormat(msgspec.Struct):
    """What the text must be."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None
    description: str | None = None


class TextParam(msgspec.Struct):
    """How the text is written."""

    format: TextFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class ReasoningParam(msgspec.Struct):
    """How much is thought before the answer."""

    effort: Effort | None = None
    summary: Summary | None = None
    generate_summary: Summary | None = None


class AskedBody(SamplingBody, kw_only=True):
    """What stands in the prompt of a response; alone the body of /v1/responses/input_tokens."""

    ignored: ClassVar[frozenset[str]] = frozenset(
        # for billing, routing and caches elsewhere; hints of which the answer does not depend
        ("user", "client_metadata", "prompt_cache_retention", "stream_options", "moderation", "context_management")
    )

    model: Annotated[str, Meta(min_length=1)]
    input: str | Annotated[list[dict[str, Any]], Meta(max_length=100_000)] | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: TextParam | None = None
    reasoning: ReasoningParam | None = None
    truncation: Literal["auto", "disabled"] | None = None
    conversation: Any = None
    prompt: Any = None
    chat_template_kwargs: dict[str, Any] | None = None


class ResponseBody(AskedBody, kw_only=True):
    """The body of a response."""

    stream: bool | None = None
    include: list[str] | None = None
    max_output_tokens: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None
    max_tool_calls: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    store: bool | None = None
    background: bool | None = None
    metadata: Annotated[dict[str, Annotated[str, Meta(max_length=512)]], Meta(max_length=16)] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


# -- from the body to the request -------------------------------------------------------------------------------------


def to_request(body: AskedBody, store: ResponseStore) -> ChatRequest:
    """The body as every protocol means it; the store has the talk that it goes on from. ServerError names the field."""
    _refuse(body)
    kwargs = checked_template_kwargs("chat_template_kwargs", body.chat_template_kwargs)
    tools = function_tools(body)
    told = [{"role": "system", "content": body.instructions}] if body.instructions else []
    before = earlier(body, store)
    return ChatRequest(
        model=body.model,
        messages=told + to_messages([*before, *whole_items(body, store)], len(before)),
        tools=checked_tools("tools", tools),
        tool_choice=_tool_choice(body, [tool["function"]["name"] for tool in tools]),
        parallel_tool_calls=body.parallel_tool_calls is not False,
        response_format=_response_format(body.text.format if body.text else None),
        format_field=FORMAT_FIELD,
        reasoning=body.reasoning.effort if body.reasoning else None,
        max_tokens=getattr(body, "max_output_tokens", None),
        sampling=sampling_fields(body),
        logprobs=_logprobs(body),
        template_kwargs=kwargs,
    )


def _refuse(body: AskedBody) -> None:
    """What would change the answer and cannot be done."""
    for name, instead in (("conversation", "previous_response_id, or the whole talk as input"), ("prompt", "input")):
        if getattr(body, name) is not None:
            raise invalid(name, f"there are none on this server. Send {instead}.")
    if body.truncation == "auto":
        raise invalid("truncation", "nothing is cut off here without being said. Leave it out, and shorten the input.")
    if getattr(body, "background", None):
        raise invalid("background", "an answer ends with its connection here. Leave it out, or set it to false.")


def _logprobs(body: AskedBody) -> int | None:
    if not isinstance(body, ResponseBody):
        return None
    asked = "message.output_text.logprobs" in (body.include or ())
    return (body.top_logprobs or 0) if asked or body.top_logprobs else None


def input_items(body: AskedBody) -> list[dict[str, Any]]:
    """The input as a list of items."""
    if body.input is None:
        return []
    return [{"type": "message", "role": "user", "content": body.input}] if isinstance(body.input, str) else body.input


def earlier(body: AskedBody, store: ResponseStore) -> Sequence[dict[str, Any]]:
    """The items of the talk that a body goes on from."""
    name = body.previous_response_id
    return store.get(name, "previous_response_id").items if name else ()


def whole_items(body: AskedBody, store: ResponseStore) -> Iterator[dict[str, Any]]:
    """The input with the items themselves where it refers to some of earlier answers."""
    for number, item in enumerate(input_items(body)):
        name = item.get("id")
        if item.get("type") == "item_reference" and isinstance(name, str):
            yield store.item(name, f"input[{number}].id")
        else:
            yield item


def function_tools(body: AskedBody) -> list[dict[str, Any]]:
    """The functions among the tools as templates have them; of ``allowed_tools`` only those."""
    found: list[dict[str, Any]] = []
    for number, tool in enumerate(body.tools or ()):
        if tool.get("type") != "function":
            continue
        where, parameters = f"tools[{number}]", tool.get("parameters")
        name = checked_tool_name(f"{where}.name", tool.get("name"))
        if not (parameters is None or isinstance(parameters, dict)):
            raise invalid(f"{where}.parameters", "it must be a JSON schema, an object.")
        given = {key: tool[key] for key in ("description", "parameters", "strict") if tool.get(key) is not None}
        found.append({"type": "function", "function": {"name": name, **given}})
    choice: Any = body.tool_choice
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        listed = choice.get("tools")
        if not isinstance(listed, list):
            raise invalid("tool_choice.tools", "it must be a list of tools.")
        names = [tool.get("name") for tool in listed if isinstance(tool, dict)]
        return [tool for tool in found if tool["function"]["name"] in names]
    return found


def _tool_choice(body: AskedBody, names: list[str]) -> ToolChoice:
    choice, where = body.tool_choice, "tool_choice"
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        choice, where = choice.get("mode", "auto"), "tool_choice.mode"
    if isinstance(choice, dict) and choice.get("type") == "function":
        if choice.get("name") not in names:
            raise invalid("tool_choice.name", "it is none of the functions of tools.")
        return {"name": str(choice["name"])}
    if choice in (None, "auto", "none"):
        return str(choice or "auto")
    if choice != "required":
        raise invalid(where, 'it must be "auto", "none", "required", or a function of tools.')
    if not names:
        raise invalid(where, "it wants a call, and there is no function among the tools.")
    return "required"


def _response_format(given: TextFormat | None) -> Any:
    if given is None or given.type == "text":
        return None
    if given.type == "json_object":
        return {"type": "json_object"}
    if given.schema is None:
        raise invalid(FORMAT_FIELD, "it is missing.")
    return schema_format(FORMAT_FIELD, given.schema)


def to_messages(items: Sequence[dict[str, Any]], n_before: int = 0) -> list[dict[str, Any]]:
    """Items as messages: what the model said between two turns of others (reasoning, text, calls) is one message."""
    messages: list[dict[str, Any]] = []
    names: dict[str, str] = {}  # call id -> function
    for number, raw in enumerate(items):
        where = f"input[{number - n_before}]"
        try:
            item = msgspec.convert(raw, Item)
        except msgspec.ValidationError as error:
            raise wrong_shape(error, where) from None
        message = _message(item, where, names)
        if message is None:
            continue
        if message["role"] == "assistant" and messages and messages[-1]["role"] == "assistant":
            _join(messages[-1], message)
        else:
            messages.append(message)
    for message in messages:
        message.setdefault("content", None)
    if not messages:
        raise invalid("input", "there is no message in it.")
    return messages


def _join(last: dict[str, Any], more: dict[str, Any]) -> None:
    for name in ("reasoning_content", "content"):
        if more.get(name):
            last[name] = f"{last[name]}\n\n{more[name]}" if last.get(name) else more[name]
    if "tool_calls" in more:
        last["tool_calls"] = [*last.get("tool_calls", ()), *more["tool_calls"]]


def _message(item: Item, where: str, names: dict[str, str]) -> dict[str, Any] | None:
    """One item as a message, or as a part of one; None for what only other servers run."""
    kind = item.type or ("message" if item.role else None)
    if kind == "message":
        if item.role is None or item.content is None:
            raise invalid(f"{where}.{'role' if item.role is None else 'content'}", "it is missing.")
        role = "system" if item.role == "developer" else item.role
        return {"role": role, "content": _text(item.content, f"{where}.content")}
    if kind in ("function_call", "custom_tool_call"):
        if not item.call_id or not item.name:
            raise invalid(f"{where}.{'name' if item.call_id else 'call_id'}", "it is missing.")
        names[item.call_id] = item.name
        given: Any = {"input": item.input or ""} if kind == "custom_tool_call" else arguments_of(item.arguments)
        function = {"name": item.name, "arguments": given}
        return {"role": "assistant", "tool_calls": [{"id": item.call_id, "type": "function", "function": function}]}
    if kind in ("function_call_output", "custom_tool_call_output"):
        if not item.call_id or item.output is None:
            raise invalid(f"{where}.{'output' if item.call_id else 'call_id'}", "it is missing.")
        output = item.output if not isinstance(item.output, dict) else msgspec.json.encode(item.output).decode()
        named = {"name": names[item.call_id]} if item.call_id in names else {}
        text = _text(output, f"{where}.output", unseen=True)
        return {"role": "tool", "tool_call_id": item.call_id, **named, "content": text}
    if kind == "reasoning":
        thought = unsealed(item.encrypted_content) or _text(item.content or item.summary or "", f"{where}.content")
        return {"role": "assistant", "reasoning_content": thought} if thought else None
    if kind is None or kind == "item_reference":
        raise invalid(f"{where}.{'id' if kind else 'type'}", "it is missing.")
    if not kind.endswith(("_call", "_output", "_request", "_response", "_list_tools", "_tools", "compaction")):
        raise invalid(f"{where}.type", f"{kind[:40]!r} is no kind of item that edgellm knows.")
    return None


def _text(content: str | list[Part], where: str, *, unseen: bool = False) -> str:
    """The text of a content. A part that is none is an error, or with ``unseen`` a note of it."""
    if isinstance(content, str):
        return content
    texts = []
    for number, part in enumerate(content):
        if part.type in TEXT_PARTS and part.text is not None:
            texts.append(part.text)
        elif unseen:
            texts.append(UNSEEN.format(part.type))
        else:
            raise invalid(f"{where}[{number}].type", f"it is {part.type[:40]!r}; this model reads text parts only.")
    return "\n".join(texts)


def arguments_of(text: str | dict[str, Any] | None) -> Any:
    """The arguments of a call as templates want them: an object, or the text where it is none."""
    if not isinstance(text, str):
        return text or {}
    with contextlib.suppress(msgspec.DecodeError, RecursionError):
        found = msgspec.json.decode(text)
        if isinstance(found, dict):
            return found
    return text


def sealed(thought: str) -> str:
    """Reasoning as an opaque text that ``unsealed`` reads."""
    return SEALED + base64.b64encode(thought.encode("utf-8", "surrogatepass")).decode()


def unsealed(text: str | None) -> str:
    """The reasoning in a sealed text; "" for what another server sealed."""
    if text is None or not text.startswith(SEALED):
        return ""
    try:
        return base64.b64decode(text[len(SEALED) :], validate=True).decode()
    except (binascii.Error, UnicodeDecodeError):
        return ""


# -- from events to items ---------------------------------------------------------------------------------------------


class ResponseWriter:
    """One response in the making: the resource as it stands, and the events that tell of each change."""

    def __init__(self, body: ResponseBody, request: ChatRequest, params: SamplingParams) -> None:
        self.body, self.request, self.params = body, request, params
        self.id, self.created_at = new_id("resp_"), int(now())
        self.output: list[dict[str, Any]] = []
        self.end: dict[str, Any] = {"status": "in_progress"}
        self.n_events = 0
        self._item: dict[str, Any] | None = None  # the open one, the last of the output
        self._number = -1  # of that item among all that the stream has told
        self._pieces: list[str] = []
        self._logprobs: list[dict[str, Any]] = []  # of the open item's tokens
        self._n_told = 0  # of them

    @property
    def resource(self) -> dict[str, Any]:
        """The response as it stands, with each of its fields."""
        body, request, given = self.body, self.request, self.request.sampling
        reasoning = body.reasoning or ReasoningParam()
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created_at,
            "completed_at": None,
            "incomplete_details": None,
            "model": request.model,
            "previous_response_id": body.previous_response_id,
            "instructions": body.instructions,
            "output": [item for item in self.output if item is not self._item],
            "error": None,
            "tools": [_told_tool(tool) for tool in request.tools or ()],
            "tool_choice": _told_choice(request.tool_choice),
            "truncation": "disabled",
            "parallel_tool_calls": request.parallel_tool_calls,
            "text": {"format": _told_format(body.text), "verbosity": (body.text and body.text.verbosity) or "medium"},
            **{name: given.get(name, getattr(self.params, name)) for name in ("temperature", "top_p")},
            **{name: given.get(name, 0.0) for name in ("presence_penalty", "frequency_penalty")},
            "top_logprobs": body.top_logprobs or 0,
            "reasoning": {"effort": reasoning.effort, "summary": reasoning.summary or reasoning.generate_summary},
            "usage": None,
            "max_output_tokens": body.max_output_tokens,
            "max_tool_calls": body.max_tool_calls,
            "store": body.store is not False,
            "background": False,
            "service_tier": "default",
            "metadata": body.metadata or {},
            "safety_identifier": body.safety_identifier,
            "prompt_cache_key": body.prompt_cache_key,
            **self.end,
        }

    def begin(self) -> Iterator[bytes]:
        """The first two events, once."""
        if self.n_events == 0:
            yield self._event("response.created", response=self.resource)
            yield self._event("response.in_progress", response=self.resource)

    def ping(self) -> bytes:
        """That it is being worked on: some clients give up on a stream of comments alone."""
        return b"".join(self.begin()) or self._event("response.in_progress", response=self.resource)

    def add(self, one: Event) -> Iterator[bytes]:
        """What an event of the answer changes."""
        if isinstance(one, ContentDelta | ReasoningDelta):
            yield from self._add_text(one)
        elif isinstance(one, ToolCallBegin):
            yield from self._close("completed")
            item = {"type": "function_call", "id": new_id("fc_"), "call_id": one.id, "name": one.name, "arguments": ""}
            yield from self._open({**item, "status": "in_progress"})
        elif isinstance(one, ToolCallDelta):
            self._pieces.append(one.arguments)
            yield self._item_event("response.function_call_arguments.delta", delta=one.arguments)
        elif isinstance(one, ToolCallEnd):
            yield from self._close_call()
        elif isinstance(one, Finished):
            yield from self._finish(one)

    def fail(self, error: ServerError) -> Iterator[bytes]:
        """The end after an error."""
        yield from self.begin()
        code = FAILURE_CODES.get(error.kind, "server_error" if error.status >= 500 else "invalid_prompt")
        self.end = {"status": "failed", "error": {"code": code, "message": error.message}}
        yield self._event("response.failed", response=self.resource)

    def _add_text(self, one: ContentDelta | ReasoningDelta) -> Iterator[bytes]:
        kind = "message" if isinstance(one, ContentDelta) else "reasoning"
        if kind == "message":
            self._logprobs += map(plain_logprob, one.logprobs)
        if not one.text:
            return
        if self._item is None or self._item["type"] != kind:
            yield from self._close("completed")
            item: dict[str, Any] = {"type": kind, "id": new_id("msg_" if kind == "message" else "rs_"), "content": []}
            if kind == "message":
                item |= {"status": "in_progress", "role": "assistant"}
            else:
                item["summary"] = []
            yield from self._open(item)
            yield self._item_event("response.content_part.added", content_index=0, part=self._part())
        self._pieces.append(one.text)
        name = "response.output_text" if kind == "message" else "response.reasoning_text"
        told: dict[str, Any] = {"logprobs": self._logprobs[self._n_told :]} if kind == "message" else {}
        self._n_told = len(self._logprobs)
        yield self._item_event(f"{name}.delta", content_index=0, delta=one.text, **told)

    def _part(self) -> dict[str, Any]:
        """The one part of the open item, as it stands."""
        assert self._item is not None
        text = "".join(self._pieces)
        if self._item["type"] == "reasoning":
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": self._logprobs[: self._n_told]}

    def _open(self, item: dict[str, Any]) -> Iterator[bytes]:
        self.output.append(item)
        self._item, self._pieces, self._n_told, self._number = item, [], 0, self._number + 1
        yield self._event("response.output_item.added", output_index=self._number, item=dict(item))

    def _close_call(self) -> Iterator[bytes]:
        """End the open call, which is whole."""
        assert self._item is not None, "what ends has begun"
        self._item |= {"arguments": "".join(self._pieces), "status": "completed"}
        done = {name: self._item[name] for name in ("arguments", "name")}
        yield self._item_event("response.function_call_arguments.done", **done)
        yield from self._done(self._item)

    def _close(self, status: str) -> Iterator[bytes]:
        """End the open item. A call that has not ended is taken back: whoever got it would run it."""
        item = self._item
        if item is None:
            return
        if item["type"] == "function_call":
            self.output.remove(item)
            self._item = None
            return
        part = self._part()
        name = "response.output_text" if item["type"] == "message" else "response.reasoning_text"
        told = {"logprobs": part["logprobs"]} if item["type"] == "message" else {}
        yield self._item_event(f"{name}.done", content_index=0, text=part["text"], **told)
        yield self._item_event("response.content_part.done", content_index=0, part=part)
        item["content"] = [part]
        if item["type"] == "message":
            item["status"] = status
        elif "reasoning.encrypted_content" in (self.body.include or ()):
            item["encrypted_content"] = sealed(part["text"])
        yield from self._done(item)

    def _done(self, item: dict[str, Any]) -> Iterator[bytes]:
        yield self._event("response.output_item.done", output_index=self._number, item=item)
        del self._logprobs[: self._n_told]  # those of the text that begins now are not told yet
        self._item, self._n_told = None, 0

    def _finish(self, one: Finished) -> Iterator[bytes]:
        whole = one.reason in ("stop", "tool_calls")
        if not self.output:
            item = {"type": "message", "id": new_id("msg_"), "content": [], "status": "in_progress"}
            yield from self._open({**item, "role": "assistant"})
            yield self._item_event("response.content_part.added", content_index=0, part=self._part())
        yield from self._close("completed" if whole else "incomplete")
        timings = one.timings
        self.end = {
            "status": "completed" if whole else "incomplete",
            "completed_at": int(now()) if whole else None,
            "incomplete_details": None if whole else {"reason": "max_output_tokens"},
            "usage": {
                "input_tokens": timings.prompt_n,
                "input_tokens_details": {"cached_tokens": timings.reused_n, "cache_write_tokens": 0},
                "output_tokens": timings.generation_n,
                "output_tokens_details": {"reasoning_tokens": one.n_reasoning},
                "total_tokens": timings.prompt_n + timings.generation_n,
            },
        }
        yield self._event(f"response.{self.end['status']}", response=self.resource)

    def _item_event(self, kind: str, **more: Any) -> bytes:
        assert self._item is not None
        return self._event(kind, item_id=self._item["id"], output_index=self._number, **more)

    def _event(self, kind: str, **more: Any) -> bytes:
        number = self.n_events
        self.n_events += 1
        return event({"type": kind, "sequence_number": number, **more}, kind)


def _told_tool(tool: Any) -> dict[str, Any]:
    empty = {"description": None, "parameters": None, "strict": None}
    return {"type": "function", **empty, **tool["function"]}


def _told_choice(choice: ToolChoice) -> Any:
    return choice if isinstance(choice, str) else {"type": "function", "name": choice["name"]}


def _told_format(text: TextParam | None) -> dict[str, Any]:
    given = text.format if text else None
    if given is None or given.type != "json_schema":
        return {"type": "text" if given is None else given.type}
    return msgspec.to_builtins(given) | {"name": given.name or "answer", "strict": bool(given.strict)}


# -- the handlers -----------------------------------------------------------------------------------------------------


async def create(call: Call) -> Reply:
    """A whole response, or its events."""
    body: ResponseBody = call.body
    store = call.server.responses
    request = to_request(body, store)
    entry = await call.server.models.find(body.model)
    params = entry.llm.default_params if entry.llm is not None else SamplingParams()
    before, given = earlier(body, store), list(whole_items(body, store))  # now: the store may have dropped them later
    writer = ResponseWriter(body, request, params)

    async def told() -> AsyncIterator[bytes]:
        try:
            async with contextlib.aclosing(events(call.server, request)) as source:
                async for one in source:
                    for chunk in (*writer.begin(), *writer.add(one)):
                        yield chunk
        except ServerError as error:
            if not body.stream or error.kind != "context_exceeded":
                raise
            for chunk in writer.fail(error):
                yield chunk
        if body.store is not False and writer.end["status"] in ("completed", "incomplete"):
            store.keep(writer.resource, before, given)

    if body.stream:
        return Stream(told(), failed=lambda error: b"".join(writer.fail(error)), ping=writer.ping)
    async for _ in told():
        pass
    return Json(writer.resource)


async def input_tokens(call: Call) -> Reply:
    """How many tokens the prompt of a response would have."""
    n = await count_tokens(call.server, to_request(call.body, call.server.responses))
    return Json({"object": "response.input_tokens", "input_tokens": n})


async def retrieve(call: Call) -> Reply:
    """A response that was kept."""
    return Json(call.server.responses.get(call.path_params["name"], "response_id").resource)


async def delete(call: Call) -> Reply:
    """Forget a response."""
    name = call.path_params["name"]
    call.server.responses.forget(name, "response_id")
    return Json({"id": name, "object": "response", "deleted": True})


async def list_items(call: Call) -> Reply:
    """The input of a response that was kept."""
    given = call.server.responses.get(call.path_params["name"], "response_id").given
    items = [{"id": f"item_{number}", "type": "message", **item} for number, item in enumerate(given)]
    ends = {"first_id": items[0]["id"], "last_id": items[-1]["id"]} if items else {"first_id": None, "last_id": None}
    return Json({"object": "list", "data": items, "has_more": False, **ends})


async def compact(call: Call) -> Reply:
    """Refused as a path that is not there: clients then summarize by themselves."""
    raise ServerError("not_supported", "Talks are not compacted here. Ask the model for a summary.", status=404)


ROUTES = (
    Route("POST", "/v1/responses", create, ResponseBody, summary="Answer, as a list of items"),
    Route("POST", "/responses", create, ResponseBody, summary="Answer, as a list of items"),
    Route("POST", "/v1/responses/input_tokens", input_tokens, AskedBody, summary="Count the tokens of a prompt"),
    Route("POST", "/v1/responses/compact", compact, summary="Refused"),
    Route("GET", "/v1/responses/{name}", retrieve, summary="A response that was kept"),
    Route("DELETE", "/v1/responses/{name}", delete, summary="Forget a response"),
    Route("GET", "/v1/responses/{name}/input_items", list_items, summary="The input of a response"),
)
