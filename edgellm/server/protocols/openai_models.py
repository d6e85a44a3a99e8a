"""``GET /v1/models`` for three readers at once (OpenAI, Codex, llama-server), and ``GET /health``."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from edgellm.loading import Kind
from edgellm.server.errors import ServerError
from edgellm.server.http import Call, Json, Reply, Route
from edgellm.server.models import ModelEntry
from edgellm.server.protocols import anthropic
from edgellm.server.protocols.openai_wire import error_body
from edgellm.server.server import Server

__all__ = ["ROUTES", "error_body"]


async def models(call: Call) -> Reply:
    """All models; ``data`` is OpenAI's list, ``models`` has what Codex and llama-server's clients read."""
    if "anthropic-version" in call.headers:
        return Json(await anthropic.model_list(call.server))
    entries = await call.server.models.usable()
    told = await asyncio.gather(*(_told(call.server, entry) for entry in entries))
    told += [_adapted(one, adapter) for one in told[:1] for adapter in call.server.models.adapters()]
    data = [openai for openai, _ in told]
    return Json({"object": "list", "data": data, "models": [other for _, other in told]})


async def model(call: Call) -> Reply:
    """One of them."""
    entry = await call.server.models.find(call.path_params["name"])
    if "anthropic-version" in call.headers:
        return Json(await anthropic.model_info(call.server, entry))
    told = await _told(call.server, entry)
    if adapter := call.server.models.adapter_of(call.path_params["name"]):
        told = _adapted(told, adapter)
    return Json(told[0])


def _adapted(told: tuple[dict[str, Any], dict[str, Any]], adapter: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A model with an adapter, as a model of its own."""
    openai, other = told
    name = f"{openai['id']}:{adapter}"
    own = {"id": name, "aliases": [], "parent": openai["id"], "root": adapter}
    return openai | own, other | dict.fromkeys(("name", "model", "slug", "display_name"), name)


async def _told(server: Server, entry: ModelEntry) -> tuple[dict[str, Any], dict[str, Any]]:
    facts = await server.models.facts(entry)
    card = facts.card
    created = entry.created
    meta = {
        "vocab_type": 1 if card.tokenizer == "llama" else 2,
        "n_vocab": card.n_vocab,
        "n_ctx": facts.n_ctx,
        "n_ctx_train": card.context_length,
        "n_embd": card.n_embd,
        "n_params": card.n_params,
        "size": card.nbytes,
        "ftype": card.file_type,
    }
    openai = {
        "id": entry.name,
        "object": "model",
        "created": created,
        "owned_by": "edgellm",
        "aliases": list(entry.names[1:]),
        "tags": [],
        "meta": meta,
        "context_window": facts.n_ctx,
        "max_model_len": facts.n_ctx,
        "status": {"value": "loaded" if entry.llm is not None else "unloaded"},
    }
    return openai, {**_for_llama(entry, created, meta, facts.kind), **_for_codex(entry, facts.n_ctx, card.name)}


def _for_llama(entry: ModelEntry, created: int, meta: dict[str, Any], kind: Kind) -> dict[str, Any]:
    changed = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(created))
    details = {"format": "gguf", "family": "", "families": [], "parameter_size": "", "quantization_level": ""}
    return {
        "name": entry.name,
        "model": entry.name,
        "modified_at": changed,
        "size": meta["size"],
        "digest": "",
        "type": "model",
        "description": "",
        "tags": [],
        "capabilities": ["completion" if kind == "chat" else kind],
        "parameters": "",
        "details": details,
    }


def _for_codex(entry: ModelEntry, n_ctx: int, title: str | None) -> dict[str, Any]:
    return {
        "slug": entry.name,
        "display_name": title or entry.name,
        "description": None,
        "default_reasoning_level": None,
        "supported_reasoning_levels": [],
        "shell_type": "default",
        "visibility": "list",
        "supported_in_api": True,
        "priority": 0,
        "upgrade": None,
        "base_instructions": "",
        "supports_reasoning_summaries": False,
        "support_verbosity": False,
        "default_verbosity": None,
        "apply_patch_tool_type": None,
        "truncation_policy": {"mode": "tokens", "limit": min(10_000, n_ctx // 4)},
        "supports_parallel_tool_calls": True,
        "context_window": n_ctx,
        "max_context_window": n_ctx,
        "auto_compact_token_limit": None,
        "effective_context_window_percent": 95,
        "experimental_supported_tools": [],
        "input_modalities": ["text"],
    }


async def health(call: Call) -> Reply:
    """Whether the server answers and its engines move; public, so that whoever starts it can wait for it."""
    if stuck := call.server.watchdog.stuck():
        raise ServerError("server_error", f"The engine of {', '.join(stuck)} hangs. Restart the server.", status=503)
    return Json({"status": "ok"})


ROUTES = (
    Route("GET", "/v1/models", models, summary="The models"),
    Route("GET", "/models", models, summary="The models"),
    Route("GET", "/v1/models/{name:path}", model, summary="One model"),
    Route("GET", "/health", health, public=True, summary="Whether the server answers"),
    Route("GET", "/v1/health", health, public=True, summary="Whether the server answers"),
)
