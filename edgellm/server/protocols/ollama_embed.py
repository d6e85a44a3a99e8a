"""Ollama's /api/embed, and its older /api/embeddings for one text."""

from __future__ import annotations

import time
from typing import Annotated, Any, ClassVar

from msgspec import Meta

from edgellm.server.bodies import Body
from edgellm.server.http import Call, Json, Reply, Route
from edgellm.server.models import VECTOR_MODELS
from edgellm.server.protocols.embeddings import MAX_TEXTS, check_vectors, written
from edgellm.server.protocols.ollama import bare_name, error_body, seconds

__all__ = ["ROUTES", "error_body"]


class EmbedBody(Body, kw_only=True):
    """The body of /api/embed. A text that is too long loses its end unless ``truncate`` is false."""

    ignored: ClassVar[frozenset[str]] = frozenset(("options",))

    model: Annotated[str, Meta(min_length=1)]
    input: str | Annotated[list[str], Meta(max_length=MAX_TEXTS)] | None = None
    truncate: bool | None = None
    dimensions: Annotated[int, Meta(ge=0, le=1 << 20)] | None = None
    keep_alive: float | str | None = None


class EmbeddingsBody(Body, kw_only=True):
    """The body of /api/embeddings."""

    ignored: ClassVar[frozenset[str]] = frozenset(("options",))

    model: Annotated[str, Meta(min_length=1)]
    prompt: str | None = None
    keep_alive: float | str | None = None


async def embed(call: Call) -> Reply:
    """Vectors of length 1; without a text the model is loaded, or let go of."""
    body: EmbedBody = call.body
    texts = [body.input] if body.input and isinstance(body.input, str) else list(body.input or ())
    return await _embedded(call, texts, truncate=body.truncate is not False)


async def embeddings(call: Call) -> Reply:
    """The vector of one text as the model gives it; of none without a text."""
    body: EmbeddingsBody = call.body
    reply = await _embedded(call, [body.prompt] if body.prompt else [], truncate=True, normalize=False)
    vectors = reply.content["embeddings"]
    return Json({"embedding": vectors[0] if vectors else []})


async def _embedded(call: Call, texts: list[str], **options: Any) -> Json:
    """As /api/embed tells them; more dimensions than there are leave a vector whole."""
    body, counts, started = call.body, list[int](), time.perf_counter()
    keep_alive, name = seconds("keep_alive", body.keep_alive), bare_name(body.model)
    options["lora"] = call.server.models.scales_of(name)
    with call.server.admitted():
        async with call.server.models.lease(name, keep_alive, kinds=call.kinds) as entry:
            load_s = time.perf_counter() - started
            size = min(getattr(body, "dimensions", None) or entry.leased.vector_size, entry.leased.vector_size)
            check_vectors(entry.leased, "input", len(texts), size)
            vectors = await entry.leased.aembed(texts, **options, dimensions=size, counted=counts.append)
    call.server.metrics.prompt_tokens += sum(counts)
    return Json(
        {
            "model": body.model,
            "embeddings": await written(vectors),
            "total_duration": int(1e9 * (time.perf_counter() - started)),
            "load_duration": int(1e9 * load_s),
            "prompt_eval_count": sum(counts),
        }
    )


ROUTES = (
    Route("POST", "/api/embed", embed, EmbedBody, summary="Vectors of texts", kinds=VECTOR_MODELS),
    Route("POST", "/api/embeddings", embeddings, EmbeddingsBody, summary="The vector of a text", kinds=VECTOR_MODELS),
)
