"""Ollama's own protocol under ``/api``: lines of JSON that stream unless told not to, times in nanoseconds.

Models come and go with ``edgellm pull`` and ``edgellm rm``, never over HTTP: what would make, change or fetch one is
refused by name. A prompt that does not fit is an error here, where Ollama cuts its beginning off.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import math
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, ClassVar, Literal

import msgspec
import numpy as np
from msgspec import Meta

from edgellm.formats.errors import ParameterError
from edgellm.formats.file_types import FILE_TYPES
from edgellm.formats.gguf import GGUFFile
from edgellm.messages.events import (
    ContentDelta,
    Event,
    Finished,
    ReasoningDelta,
    ToolCallBegin,
    ToolCallDelta,
    ToolCallEnd,
)
from edgellm.sampling.params import LIMITS, checked
from edgellm.server.answering import events, texts
from edgellm.server.bodies import Body
from edgellm.server.chat_request import (
    MAX_TOP_LOGPROBS,
    ChatRequest,
    checked_stops,
    checked_tool_name,
    checked_tools,
    schema_format,
)
from edgellm.server.errors import ServerError, invalid
from edgellm.server.http import Call, Json, Reply, Route, Stream
from edgellm.server.models import ModelEntry
from edgellm.server.protocols.openai_responses import arguments_of
from edgellm.server.protocols.openai_wire import plain_logprob
from edgellm.server.server import Server
from edgellm.server.sse import line
from edgellm.server.text_request import PromptRead, TextRequest

SPOKEN = "0.12.6"  # the version of Ollama whose interface this is; clients refuse older ones
TAG = ":latest"
FOREVER = datetime(9999, 12, 31, tzinfo=UTC)
UNITS = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}
DURATION = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(ms|us|µs|ns|h|m|s)")
FILE_TYPE_NAMES = {row.label: row.name for row in FILE_TYPES}
MAX_LISTED = 64
DONE = {"stop": "stop", "tool_calls": "stop", "length": "length", "context_full": "length", "cancelled": "stop"}

OPTIONS = {name: name for name in LIMITS} | {"repeat_last_n": "penalty_last_n"}
HARMLESS_OPTIONS = frozenset(
    # how a model is loaded, which the server's command line says (num_ctx is its --ctx-size); what would be shifted out
    # of a full context; samplers that Ollama itself no longer has
    [
        "num_ctx",
        "num_batch",
        "num_gpu",
        "main_gpu",
        "num_thread",
        "numa",
        "low_vram",
        "use_mmap",
        "use_mlock",
        "f16_kv",
        "vocab_only",
        "logits_all",
        "embedding_only",
        "num_keep",
        "tfs_z",
        "penalize_newline",
        "draft_num_predict",
    ]
)


class Function(msgspec.Struct):
    """What was called, the arguments as an object."""

    name: str
    arguments: dict[str, Any] | str = {}


class ToolCall(msgspec.Struct):
    """A call in the history."""

    function: Function
    id: str | None = None


class ChatMessage(msgspec.Struct):
    """A message of the history."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    thinking: str | None = None
    images: list[str] | None = None
    tool_calls: list[ToolCall] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None


class AskedBody(Body, kw_only=True):
    """What chats and completions have in common."""

    # an answer that outgrows the context ends: nothing is cut off or shifted out, whatever these say
    ignored: ClassVar[frozenset[str]] = frozenset(("truncate", "shift", "_debug_render_only"))

    model: Annotated[str, Meta(min_length=1)]
    stream: bool | None = None
    think: bool | Literal["low", "medium", "high", "max"] | None = None
    format: Any = None
    keep_alive: float | str | None = None
    options: dict[str, Any] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)] | None = None


class ChatBody(AskedBody, kw_only=True):
    """The body of /api/chat."""

    messages: Annotated[list[ChatMessage], Meta(max_length=100_000)] | None = None
    tools: list[dict[str, Any]] | None = None


class GenerateBody(AskedBody, kw_only=True):
    """The body of /api/generate."""

    prompt: str | None = None
    system: str | None = None
    template: str | None = None
    suffix: str | None = None
    raw: bool | None = None
    context: list[int] | None = None
    images: list[str] | None = None


class NamedBody(Body, kw_only=True):
    """A model by its name; ``name`` is the older field."""

    ignored: ClassVar[frozenset[str]] = frozenset(("verbose", "insecure", "stream", "system", "template", "options"))

    model: str | None = None
    name: str | None = None


# -- from the body to the request -------------------------------------------------------------------------------------


def chat_request(body: ChatBody) -> ChatRequest:
    """A chat as every protocol means it. ServerError names the field that is wrong."""
    messages = [_message(message, f"messages[{number}]") for number, message in enumerate(body.messages or ())]
    return _request(body, messages, tools=checked_tools("tools", _tools(body.tools)))


def generate_request(body: GenerateBody) -> ChatRequest:
    """A prompt as a chat of one turn, or as it stands."""
    for name, reason in (
        ("suffix", "no model here writes into a gap"),
        ("template", "the model's own chat template is used; give it to `edgellm serve --chat-template`"),
        ("context", "send the turns to /api/chat instead"),
        ("images", "this model reads text only"),
    ):
        if getattr(body, name):
            raise invalid(name, f"{reason}. Leave it out.")
    told = [{"role": "system", "content": body.system}] if body.system else []
    return _request(body, [*told, {"role": "user", "content": body.prompt or ""}])


def _request(body: AskedBody, messages: Sequence[Mapping[str, Any]], **more: Any) -> ChatRequest:
    options = dict(body.options or {})
    stops = options.pop("stop", None)
    texts = [stops] if isinstance(stops, str) else stops or []
    if not (isinstance(texts, list) and all(isinstance(text, str) for text in texts)):
        raise invalid("options.stop", "it must be a text or a list of texts.")
    return ChatRequest(
        model=body.model,
        messages=messages,
        response_format=_format(body.format),
        format_field="format",
        reasoning=body.think,
        max_tokens=_max_tokens(options.pop("num_predict", None)),
        stop=checked_stops("options.stop", texts),
        sampling=sampling_fields(options),
        logprobs=(body.top_logprobs or 0) if body.logprobs or body.top_logprobs else None,
        keep_alive=seconds("keep_alive", body.keep_alive),
        **more,
    )


def sampling_fields(options: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of SamplingParams from options; each is known, known to be harmless, or refused by name."""
    fields = {}
    for name, value in options.items():
        if value is None or name in HARMLESS_OPTIONS:
            continue
        if name not in OPTIONS:
            raise invalid(f"options.{name[:40]}", "edgellm does not know this option. Leave it out.")
        field = OPTIONS[name]
        kind, least, greatest = LIMITS[field]
        if field == "seed" and isinstance(value, int) and -(2**63) <= value < -1:  # their seeds are signed
            value += 2**64
        try:
            fields[field] = checked(field, value, kind, least, greatest)
        except ParameterError as error:
            raise invalid(f"options.{name}", str(error).removeprefix(f"{field}: ")) from None
    return fields


def _max_tokens(given: Any) -> int | None:
    if given is None:
        return None
    if isinstance(given, bool) or not isinstance(given, int) or not -2 <= given < 2**31:
        raise invalid("options.num_predict", "it must be a whole number, at least 0; -1 and -2 go on to the end.")
    return None if given < 0 else given


def _format(given: Any) -> Any:
    if given in (None, ""):
        return None
    if given == "json":
        return {"type": "json_object"}
    if not isinstance(given, dict):
        raise invalid("format", 'it must be "json" or a JSON schema.')
    return schema_format("format", given)


def _message(message: ChatMessage, where: str) -> dict[str, Any]:
    if message.images:
        raise invalid(f"{where}.images", "this model reads text only.")
    plain: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.thinking:
        plain["reasoning_content"] = message.thinking
    if message.tool_name:
        plain["name"] = message.tool_name
    if message.tool_call_id:
        plain["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        plain["tool_calls"] = [
            {
                "id": call.id or f"call_{number}",
                "type": "function",
                "function": {"name": call.function.name, "arguments": arguments_of(call.function.arguments)},
            }
            for number, call in enumerate(message.tool_calls)
        ]
    return plain


def _tools(tools: Sequence[dict[str, Any]] | None) -> list[dict[str, Any]]:
    for number, tool in enumerate(tools or ()):
        function = tool.get("function")
        if not isinstance(function, dict):
            raise invalid(f"tools[{number}].function", "it must be an object that describes a function.")
        checked_tool_name(f"tools[{number}].function.name", function.get("name"))
        if not isinstance(function.get("parameters", {}), dict):
            raise invalid(f"tools[{number}].function.parameters", "it must be a JSON schema, an object.")
    return [{**tool, "type": "function"} for tool in tools or ()]


def seconds(field: str, given: float | str | None) -> float | None:
    """A keep_alive in seconds, below 0 for ever: a number, or text such as "5m" or "1h30m"."""
    if given is None or isinstance(given, int | float):
        return given
    text = given.strip()
    sign, bare = (-1.0, text[1:]) if text.startswith("-") else (1.0, text)
    with contextlib.suppress(ValueError):
        number = float(bare)
        if bare and bare[0] in "0123456789.":
            return sign * number
    if not bare or DURATION.sub("", bare):
        raise invalid(field, f'{given[:40]!r} is no duration. Send seconds, or text such as "5m" or "1h30m".')
    return sign * sum(float(number) * UNITS[unit] for number, unit in DURATION.findall(bare))


def bare_name(name: str) -> str:
    """The name without ``:latest``."""
    return name.removesuffix(TAG)


# -- from events to lines ---------------------------------------------------------------------------------------------


class LineWriter:
    """One answer in the making: the lines of its stream, and all of them in one."""

    def __init__(self, body: AskedBody, load_ns: int) -> None:
        self.chat = isinstance(body, ChatBody)
        self.name, self.load_ns, self.began = body.model, load_ns, time.monotonic_ns()
        self.text: list[str] = []
        self.thinking: list[str] = []
        self.calls: list[dict[str, Any]] = []
        self.logprobs: list[dict[str, Any]] = []
        self.end: dict[str, Any] = {"done": False}
        self._arguments: list[str] = []

    def add(self, one: Event) -> Iterator[dict[str, Any]]:
        """The lines that an event adds."""
        if isinstance(one, ContentDelta | ReasoningDelta):
            logprobs = [plain_logprob(token) for token in one.logprobs]
            self.logprobs += logprobs
            thinking = isinstance(one, ReasoningDelta)
            (self.thinking if thinking else self.text).append(one.text)
            if one.text or logprobs:
                told = {"thinking": one.text} if thinking else {"content": one.text}
                yield self._line(told, **({"logprobs": logprobs} if logprobs else {}))
        elif isinstance(one, ToolCallBegin):
            self._arguments = []
            self.calls.append({"id": one.id, "function": {"index": one.index, "name": one.name, "arguments": None}})
        elif isinstance(one, ToolCallDelta):
            self._arguments.append(one.arguments)
        elif isinstance(one, ToolCallEnd):
            self.calls[-1]["function"]["arguments"] = json.loads("".join(self._arguments) or "{}")
            yield self._line({"tool_calls": [self.calls[-1]]})
        elif isinstance(one, Finished):
            timings = one.timings
            self.end = {
                "done": True,
                "done_reason": DONE[one.reason],
                "total_duration": time.monotonic_ns() - self.began,
                "load_duration": self.load_ns,
                "prompt_eval_count": timings.prompt_n,
                "prompt_eval_duration": int(timings.prompt_ms * 1e6),
                "eval_count": timings.generation_n,
                "eval_duration": int(timings.generation_ms * 1e6),
            }
            yield self._line({}, **self.end)

    def nothing(self) -> dict[str, Any]:
        """A line that says nothing, for clients that would give up."""
        return self._line({})

    def whole(self, **end: Any) -> dict[str, Any]:
        """All of it in one."""
        told: dict[str, Any] = {"content": "".join(self.text)}
        if self.thinking:
            told["thinking"] = "".join(self.thinking)
        if calls := [call for call in self.calls if call["function"]["arguments"] is not None]:
            told["tool_calls"] = calls
        return self._line(told, **({"logprobs": self.logprobs} if self.logprobs else {}), **(end or self.end))

    def _line(self, told: dict[str, Any], **more: Any) -> dict[str, Any]:
        head = {"model": self.name, "created_at": _now()}
        message = {"role": "assistant", "content": "", **told}
        if self.chat:
            return {**head, "message": message, "done": False, **more}
        thinking = {"thinking": message["thinking"]} if "thinking" in message else {}
        return {**head, "response": message["content"], **thinking, "done": False, **more}


def _now() -> str:
    return _rfc3339(datetime.now(UTC))


def _rfc3339(when: datetime) -> str:
    return when.strftime("%Y-%m-%dT%H:%M:%S.%fZ")


# -- the handlers -----------------------------------------------------------------------------------------------------


def error_body(error: ServerError) -> tuple[int, dict[str, Any]]:
    """The status and body of an error."""
    return error.status, {"error": error.message}


async def chat(call: Call) -> Reply:
    """A whole message, or its lines; without messages the model is loaded, or unloaded."""
    body: ChatBody = call.body
    return await _answered(call, body, chat_request(body), bool(body.messages))


async def generate(call: Call) -> Reply:
    """What follows a prompt, or its lines; without a prompt the model is loaded, or unloaded."""
    body: GenerateBody = call.body
    return await _answered(call, body, generate_request(body), bool(body.prompt))


async def _answered(call: Call, body: AskedBody, request: ChatRequest, asked: bool) -> Reply:
    entry = await call.server.models.find(bare_name(body.model))
    request = replace(request, model=bare_name(body.model))
    if not asked:
        return await _load(call, body, request, entry)
    writer = LineWriter(body, 0 if entry.llm is not None else -1)
    raw = body.prompt or "" if isinstance(body, GenerateBody) and body.raw else None

    async def told() -> AsyncIterator[bytes]:
        answer = events(call.server, request) if raw is None else _raw_events(call.server, raw, request)
        async with contextlib.aclosing(answer) as source:
            async for one in source:
                if writer.load_ns < 0:
                    writer.load_ns = int(entry.load_s * 1e9)
                for part in writer.add(one):
                    yield line(part)

    if body.stream is not False:
        return Stream(
            told(),
            failed=lambda error: line(error_body(error)[1]),
            ping=lambda: line(writer.nothing()),
            media_type="application/x-ndjson",
        )
    async for _ in told():
        pass
    return Json(writer.whole())


async def _raw_events(server: Server, prompt: str, request: ChatRequest) -> AsyncGenerator[Event, None]:
    """What follows a text as it stands, without a template."""
    names = ("model", "max_tokens", "stop", "sampling", "logprobs", "response_format", "keep_alive", "lora")
    text = TextRequest(prompt=prompt, **{name: getattr(request, name) for name in names})
    async with contextlib.aclosing(texts(server, text)) as source:
        async for item in source:
            if isinstance(item, PromptRead):
                continue
            if item.text or item.logprobs:
                yield ContentDelta(item.text, (item.logprobs,) if item.logprobs else ())
            if item.finish_reason:
                yield Finished(item.finish_reason, item.stop, item.timings, 0)


async def _load(call: Call, body: AskedBody, request: ChatRequest, entry: ModelEntry) -> Reply:
    """Load the model, or let it go where it is to be kept for no time at all."""
    if request.keep_alive == 0:
        if entry.leases == 0:
            await call.server.models.unload(entry)
        reason = "unload"
    else:
        async with call.server.models.lease(entry.name, request.keep_alive):
            reason = "load"
    return Json(LineWriter(body, 0).whole(done=True, done_reason=reason))


async def tags(call: Call) -> Reply:
    """The models that there are."""
    entries = await call.server.models.usable()
    return Json({"models": list(await asyncio.gather(*(_summary(call, entry) for entry in entries)))})


async def running(call: Call) -> Reply:
    """The models in memory."""
    told = []
    for entry in await call.server.models.entries():
        if entry.llm is None:
            continue
        left = None if entry.expires is None else entry.expires - time.monotonic()
        until = FOREVER if left is None else datetime.now(UTC) + timedelta(seconds=max(left, 0))
        more = {"expires_at": _rfc3339(until), "size_vram": 0, "context_length": entry.llm.n_ctx}
        told.append({**await _summary(call, entry), **more, "size": entry.llm.memory_estimate.total})
    return Json({"models": told})


async def show(call: Call) -> Reply:
    """What a model's file says of itself."""
    body: NamedBody = call.body
    entry = await call.server.models.find(bare_name(_model_name(body)))
    summary = await _summary(call, entry)
    facts = await call.server.models.facts(entry)
    metadata = await asyncio.to_thread(_metadata, entry)
    sampling = facts.card.sampling
    return Json(
        {
            "license": facts.card.licence or "",
            "modelfile": f"FROM {entry.name}\n",
            "parameters": "\n".join(f"{name} {value}" for name, value in sampling.items()),
            "template": facts.card.chat_template or "",
            "details": summary["details"],
            "model_info": metadata,
            "capabilities": summary["capabilities"],
            "modified_at": summary["modified_at"],
        }
    )


def _metadata(entry: ModelEntry) -> dict[str, Any]:
    """The file's metadata; of a long list, such as the vocabulary, only that it is there."""
    if entry.llm is not None:
        found = entry.llm.gguf.metadata
    else:
        with GGUFFile.open(entry.path) as file:
            found = file.metadata
    return {key: _plain(value) for key, value in found.items() if key != "tokenizer.chat_template"}


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, list) and len(value) > MAX_LISTED:
        return None
    return value if not isinstance(value, float) or math.isfinite(value) else None


def _model_name(body: NamedBody) -> str:
    name = body.model or body.name
    if not name:
        raise invalid("model", "it is missing.")
    return name


async def _summary(call: Call, entry: ModelEntry) -> dict[str, Any]:
    facts = await call.server.models.facts(entry)
    card = facts.card
    name = entry.name if ":" in entry.name else entry.name + TAG
    # another one for each file and version of it: hashing all of a large model would take minutes
    known = f"{entry.path.name} {card.nbytes} {entry.created}"
    details = {
        "parent_model": "",
        "format": "gguf",
        "family": card.architecture,
        "families": [card.architecture],
        "parameter_size": card.size_label,
        "quantization_level": FILE_TYPE_NAMES.get(card.file_type) or card.file_type,
        "context_length": card.context_length,
        "embedding_length": card.n_embd,
    }
    return {
        "name": name,
        "model": name,
        "modified_at": _rfc3339(datetime.fromtimestamp(entry.created, UTC)),
        "size": card.nbytes,
        "digest": hashlib.sha256(known.encode("utf-8", "surrogateescape")).hexdigest(),
        "details": details,
        "capabilities": ["embedding"] if facts.kind != "chat" else capabilities(card.chat_template),
    }


def capabilities(template: str | None) -> list[str]:
    """What can be asked of a model with this chat template."""
    text = template or ""
    tools = ["tools"] if "tools" in text else []
    thinking = ["thinking"] if "enable_thinking" in text or "reasoning_effort" in text or "<think>" in text else []
    return ["completion", *tools, *thinking]


async def version(call: Call) -> Reply:
    """The version of Ollama whose interface this is."""
    return Json({"version": SPOKEN})


async def pull(call: Call) -> Reply:
    """Success for a model that is here; none is fetched over HTTP."""
    body: NamedBody = call.body
    try:
        await call.server.models.find(bare_name(_model_name(body)))
    except ServerError as error:
        advice = "Models are not fetched over HTTP; bring it with `edgellm pull`."
        raise ServerError("not_found", f"{error.message} {advice}", "model") from None
    return Json({"status": "success"})


async def refused(call: Call) -> Reply:
    """What changes the models."""
    raise ServerError(
        "not_supported",
        "Models are not made, changed or deleted over HTTP. Use `edgellm pull`, `edgellm quantize` and `edgellm rm`.",
    )


ROUTES = (
    Route("POST", "/api/chat", chat, ChatBody, summary="Answer a chat"),
    Route("POST", "/api/generate", generate, GenerateBody, summary="Go on with a prompt"),
    Route("GET", "/api/tags", tags, summary="The models"),
    Route("GET", "/api/ps", running, summary="The models in memory"),
    Route("POST", "/api/show", show, NamedBody, summary="One model"),
    Route("GET", "/api/version", version, summary="The version of the interface"),
    Route("POST", "/api/pull", pull, NamedBody, summary="Success for a model that is here"),
    *(Route("POST", f"/api/{name}", refused, summary="Refused") for name in ("create", "copy", "push")),
    Route("DELETE", "/api/delete", refused, summary="Refused"),
)
