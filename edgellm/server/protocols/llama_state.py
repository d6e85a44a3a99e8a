"""llama-server's ``/props``, ``/slots`` and ``/metrics``: what a model is set to, who is answered, what was done."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from edgellm.engine.requests import GenerationRequest
from edgellm.server.http import Call, Json, Plain, Reply, Route
from edgellm.server.metrics import cache_used
from edgellm.server.protocols.llama_wire import error_body, settings
from edgellm.server.server import Server

if TYPE_CHECKING:
    from edgellm.llm import LLM

__all__ = ["ROUTES", "error_body"]

CAPABILITIES = {
    "supports_tools": "tools",
    "supports_tool_calls": "tool_calls",
    "supports_system_role": "system",
    "supports_preserve_reasoning": "reasoning_content",
}
"""Of a chat template, and the word in its text that says so."""


async def props(call: Call) -> Reply:
    """Of the model ``?model=``, or of the first."""
    models = call.server.models
    async with models.lease(call.query.get("model")) as entry:
        return Json(await asyncio.to_thread(_props, entry.leased, entry.name, models.options.n_parallel))


def _props(llm: LLM, name: str, n_parallel: int) -> dict[str, Any]:
    template = str(llm.gguf.metadata.get("tokenizer.chat_template") or "")
    special = {"bos_token": llm.tokenizer.bos_id, "eos_token": llm.tokenizer.eos_id}
    return {
        "default_generation_settings": {"params": settings(llm.default_params), "n_ctx": llm.n_ctx},
        "total_slots": n_parallel,
        "model_alias": name,
        "model_path": llm.path.name,
        "modalities": {"vision": False, "audio": False, "video": False},
        "endpoint_slots": True,
        "endpoint_props": False,
        "endpoint_metrics": True,
        "chat_template": template,
        "chat_template_caps": {what: word in template for what, word in CAPABILITIES.items()},
        **{
            key: "" if token is None else llm.tokenizer.token_bytes(token).decode("utf-8", "replace")
            for key, token in special.items()
        },
        "build_info": "edgellm",
        "is_sleeping": False,
    }


async def slots(call: Call) -> Reply:
    """The answers under way, each as a slot, and idle ones up to the number of whole contexts."""
    told: list[dict[str, Any]] = []
    n_idle = call.server.models.options.n_parallel
    for entry in await call.server.models.entries():
        if entry.llm is not None:
            speculative = call.server.models.options.speculate is not None
            for request in _requests(entry.llm):
                told.append(_slot(len(told), entry.name, entry.llm.n_ctx, speculative, request))
    for number in range(len(told), n_idle):
        told.append({"id": number, "n_ctx": 0, "speculative": False, "is_processing": False})
    return Json(told)


def _requests(llm: LLM) -> list[GenerationRequest]:
    """A look at what the engine's thread works on."""
    return [one for one in list(llm.engine.scheduler.requests) if isinstance(one, GenerationRequest)]


def _slot(number: int, model: str, n_ctx: int, speculative: bool, request: GenerationRequest) -> dict[str, Any]:
    done = min(request.n_computed, request.n_prompt)
    reused = request.reused or 0
    return {
        "id": number,
        "model": model,
        "n_ctx": n_ctx,
        "speculative": speculative,
        "is_processing": True,
        "id_task": request.order,
        "n_prompt_tokens": request.n_prompt,
        "n_prompt_tokens_processed": max(0, done - reused),
        "n_prompt_tokens_cache": reused,
        "next_token": [
            {
                "has_next_token": request.n_wanted > 0,
                "n_remain": request.n_wanted,
                "n_decoded": request.generated,
            }
        ],
    }


async def metrics(call: Call) -> Reply:
    """Counters and gauges as Prometheus reads them."""
    return Plain("".join(_metric_lines(call.server)).encode(), "text/plain; version=0.0.4; charset=utf-8")


def metric_rows(server: Server) -> tuple[tuple[str, str, str, float], ...]:
    """What there is to count and to measure: the kind, the name, what it is, and its value."""
    did = server.metrics
    engines = [entry.llm.engine for entry in server.models.loaded() if entry.llm is not None]
    waiting = sum(one.sequence is None for engine in engines for one in list(engine.scheduler.requests))
    steps = sum(engine.scheduler.n_steps for engine in engines)
    parts = sum(engine.scheduler.n_parts for engine in engines)
    return (
        ("counter", "prompt_tokens_total", "Tokens of prompts computed.", did.prompt_tokens),
        ("counter", "prompt_tokens_cached_total", "Tokens of prompts found in the cache.", did.prompt_tokens_cached),
        ("counter", "prompt_seconds_total", "Time of that.", did.prompt_s),
        ("counter", "tokens_predicted_total", "Tokens generated.", did.generated_tokens),
        ("counter", "tokens_predicted_seconds_total", "Time of that.", did.generated_s),
        ("counter", "n_decode_total", "Steps.", steps),
        ("counter", "n_tokens_max", "Most tokens of a text.", did.longest),
        ("counter", "spec_decode_num_draft_tokens_total", "Tokens drafted.", did.drafted),
        ("counter", "spec_decode_num_accepted_tokens_total", "Drafted tokens accepted.", did.accepted),
        ("gauge", "prompt_tokens_seconds", "Prompt tokens per second.", _rate(did.prompt_tokens, did.prompt_s)),
        ("gauge", "predicted_tokens_seconds", "Tokens per second.", _rate(did.generated_tokens, did.generated_s)),
        ("gauge", "requests_processing", "Requests under way.", server.active - waiting),
        ("gauge", "requests_deferred", "Requests that wait.", waiting),
        (
            "gauge",
            "kv_cache_usage_ratio",
            "Share of the fullest cache that requests hold.",
            max(map(cache_used, engines), default=0.0),
        ),
        ("gauge", "n_busy_slots_per_decode", "Requests that share a step.", parts / steps if steps else 0.0),
    )


def _metric_lines(server: Server) -> Iterator[str]:
    for kind, name, text, value in metric_rows(server):
        yield f"# HELP llamacpp:{name} {text}\n# TYPE llamacpp:{name} {kind}\nllamacpp:{name} {value:g}\n"


def _rate(n: int, seconds: float) -> float:
    return n / seconds if seconds else 0.0


ROUTES = (
    Route("GET", "/props", props, summary="What the model is set to"),
    Route("GET", "/slots", slots, summary="Answers under way"),
    Route("GET", "/metrics", metrics, summary="Counters for Prometheus"),
)
