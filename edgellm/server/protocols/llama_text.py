"""llama-server's helpers for text: its tokens and back (also in vLLM's shape), and a chat as the model reads it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from msgspec import Meta

from edgellm.server.bodies import Body
from edgellm.server.chat_request import checked_template_kwargs, checked_tools
from edgellm.server.errors import invalid
from edgellm.server.http import Call, Json, Reply, Route
from edgellm.server.protocols.llama_wire import error_body
from edgellm.server.protocols.openai_chat import ChatMessage, Tool, plain_tool, to_message

if TYPE_CHECKING:
    from edgellm.llm import LLM

__all__ = ["ROUTES", "error_body"]

MAX_IDS = 1 << 22


class TokenizeBody(Body, kw_only=True):
    """``content`` as llama-server has it, or ``prompt`` as vLLM has it, which adds special tokens by default."""

    content: str | None = None
    prompt: str | None = None
    model: str | None = None
    add_special: bool = False
    add_special_tokens: bool = True
    parse_special: bool = True
    with_pieces: bool = False


class DetokenizeBody(Body, kw_only=True):
    """Token ids."""

    tokens: Annotated[list[Annotated[int, Meta(ge=0, le=2**31 - 1)]], Meta(max_length=MAX_IDS)]
    model: str | None = None


class ApplyTemplateBody(Body, kw_only=True):
    """A chat to be shown as text."""

    ignored: ClassVar[frozenset[str]] = frozenset(("stream", "temperature", "max_tokens", "reasoning_format"))

    messages: Annotated[list[ChatMessage], Meta(min_length=1, max_length=100_000)]
    model: str | None = None
    tools: list[Tool] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None


async def tokenize(call: Call) -> Reply:
    """The ids of a text."""
    body: TokenizeBody = call.body
    text, special = (body.content, body.add_special) if body.prompt is None else (body.prompt, body.add_special_tokens)
    if text is None:
        raise invalid("content", "it is missing.")
    async with call.server.models.lease(body.model) as entry:
        ids = await asyncio.to_thread(entry.leased.tokenize, text, special, body.parse_special)
        tokens = [_piece(entry.leased, token) for token in ids] if body.with_pieces else ids
        return Json({"tokens": tokens, "count": len(ids), "max_model_len": entry.leased.n_ctx})


def _piece(llm: LLM, token: int) -> dict[str, Any]:
    """A token with its text, or its bytes where they are none."""
    raw = llm.tokenizer.token_bytes(token)
    try:
        return {"id": token, "piece": raw.decode()}
    except UnicodeDecodeError:
        return {"id": token, "piece": list(raw)}


async def detokenize(call: Call) -> Reply:
    """The text of ids, control tokens as their names."""
    body: DetokenizeBody = call.body
    async with call.server.models.lease(body.model) as entry:
        n_vocab = entry.leased.tokenizer.n_vocab
        for number, token in enumerate(body.tokens):
            if token >= n_vocab:
                raise invalid(f"tokens[{number}]", f"it is {token}; ids go up to {n_vocab - 1}.")
        text = await asyncio.to_thread(entry.leased.detokenize, body.tokens, True)
        return Json({"content": text, "prompt": text})


async def tokenizer_info(call: Call) -> Reply:
    """What lm-evaluation-harness asks of a remote tokenizer."""
    async with call.server.models.lease(call.query.get("model")) as entry:
        tokenizer = entry.leased.tokenizer
        eos = _text(entry.leased, tokenizer.eos_id)
        told = {"bos_token": _text(entry.leased, tokenizer.bos_id), "eos_token": eos, "pad_token": eos}
        return Json({**told, "chat_template": entry.leased.gguf.metadata.get("tokenizer.chat_template")})


def _text(llm: LLM, token: int | None) -> str | None:
    return None if token is None else llm.tokenizer.token_bytes(token).decode("utf-8", "replace")


async def apply_template(call: Call) -> Reply:
    """The text that the model is given for a chat."""
    body: ApplyTemplateBody = call.body
    if body.continue_final_message and body.add_generation_prompt:
        raise invalid("continue_final_message", "it excludes add_generation_prompt; send that as false.")
    messages = [to_message(message, f"messages[{number}]") for number, message in enumerate(body.messages)]
    kwargs = checked_template_kwargs("chat_template_kwargs", body.chat_template_kwargs)
    kwargs |= {"tools": checked_tools("tools", [plain_tool(tool) for tool in body.tools or ()])}
    kwargs |= {"add_generation_prompt": body.add_generation_prompt}
    kwargs |= {"continue_final_message": body.continue_final_message}
    async with call.server.models.lease(body.model) as entry:
        return Json({"prompt": await asyncio.to_thread(entry.leased.apply_template, messages, **kwargs)})


ROUTES = (
    Route("POST", "/tokenize", tokenize, TokenizeBody, summary="The tokens of a text"),
    Route("POST", "/detokenize", detokenize, DetokenizeBody, summary="The text of tokens"),
    Route("GET", "/tokenizer_info", tokenizer_info, summary="Special tokens and the chat template"),
    Route("POST", "/apply-template", apply_template, ApplyTemplateBody, summary="A chat as the model reads it"),
)
