"""Vectors of texts and scores of documents: OpenAI's /v1/embeddings, llama-server's /embedding and /rerank.

A text that is longer than the model's context is an error: nothing is cut off without ``truncate``.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Iterable
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import msgspec
import numpy as np
from msgspec import Meta

from edgellm.server.bodies import Body
from edgellm.server.errors import invalid
from edgellm.server.http import Call, Json, Reply, Route
from edgellm.server.models import RERANKERS, VECTOR_MODELS
from edgellm.server.protocols.openai_wire import error_body

if TYPE_CHECKING:
    from edgellm.llm import LLM

__all__ = ["ROUTES", "error_body"]

MAX_TEXTS = 2048  # OpenAI's own limit
MAX_NUMBERS = 1 << 22  # in the vectors of a reply: 80 MB of JSON
MAX_DOCUMENTS = 1 << 16  # each has but one score
_TEXTS = {
    "oneOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}},
        {"type": "array", "items": {"type": "integer"}},
        {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}},
    ]
}
Texts = Annotated[Any, Meta(extra_json_schema=_TEXTS)]
Dimensions = Annotated[int, Meta(ge=1, le=1 << 20)]


class EmbeddingsBody(Body, kw_only=True):
    """The body of /v1/embeddings."""

    ignored: ClassVar[frozenset[str]] = frozenset(("user", "safety_identifier"))

    input: Texts
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Dimensions | None = None
    truncate: bool | None = None


class EmbeddingBody(Body, kw_only=True):
    """The body of llama-server's own: a text, several, or tokens, as ``content`` or ``input``."""

    ignored: ClassVar[frozenset[str]] = frozenset(("user", "image_data"))

    content: Texts = None
    input: Texts = None
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    embd_normalize: Annotated[int, Meta(ge=-1, le=2)] = 2


class Document(msgspec.Struct):
    """A document as some clients write it."""

    text: str


class RerankBody(Body, kw_only=True):
    """The body of /rerank: ``documents`` as Jina and Cohere have them, ``texts`` as text-embeddings-inference does.

    Of the last five fields only what is done in any case is taken.
    """

    ignored: ClassVar[frozenset[str]] = frozenset(("user",))

    query: str
    documents: Annotated[list[str | Document], Meta(max_length=MAX_DOCUMENTS)] | None = None
    texts: Annotated[list[str], Meta(max_length=MAX_DOCUMENTS)] | None = None
    model: str | None = None
    top_n: Annotated[int, Meta(ge=1, le=1 << 24)] | None = None
    return_documents: bool = False
    return_text: bool = False
    truncate: bool = False
    truncation_direction: Literal["right", "Right"] | None = None
    max_chunks_per_doc: None = None
    max_tokens_per_doc: None = None
    rank_fields: list[Literal["text"]] | None = None
    raw_scores: bool | None = None


def read_texts(field: str, given: Any) -> list[str | list[int]]:
    """A text, texts, the tokens of a text, or of several, as a list; ServerError names what is wrong."""
    if isinstance(given, str):
        return [given]
    if not isinstance(given, list):
        raise invalid(field, "it must be a text, a list of texts, a list of tokens, or a list of such lists.")
    if given and all(type(one) is int for one in given):
        return [_ids(field, given)]
    if not given or len(given) > MAX_TEXTS:
        raise invalid(field, f"it has {len(given)} texts; 1 to {MAX_TEXTS} can be embedded at once.")
    texts: list[str | list[int]] = []
    for i, one in enumerate(given):
        if not isinstance(one, str) and not (isinstance(one, list) and all(type(token) is int for token in one)):
            raise invalid(f"{field}[{i}]", "it must be a text, or a list of tokens.")
        texts.append(one if isinstance(one, str) else _ids(f"{field}[{i}]", one))
    return texts


def _ids(field: str, ids: list[int]) -> list[int]:
    if not ids:
        raise invalid(field, "it has no tokens.")
    if wrong := [token for token in ids if not 0 <= token < 1 << 31]:
        raise invalid(field, f"{str(wrong[0])[:20]} is no token.")
    return ids


def check_vectors(llm: LLM, field: str, n_texts: int, dimensions: int | None = None) -> None:
    """ServerError for a model whose file makes no vectors of texts, and for more of them than a reply may have."""
    if llm.pooling == "none":
        raise invalid(
            "model",
            "its file does not say how the rows of a text become one vector. Take another model, or /embedding, which "
            "gives all rows.",
        )
    check_size(field, n_texts, min(dimensions or llm.vector_size, llm.vector_size))


def check_size(field: str, n_rows: int, width: int) -> None:
    """ServerError for so many rows of so many numbers, where a reply may not have them."""
    if (n := n_rows * width) > MAX_NUMBERS:
        raise invalid(
            field, f"its vectors have {n:,} numbers, a reply has room for {MAX_NUMBERS:,}. Send the texts in parts."
        )


async def written(vectors: Iterable[np.ndarray], form: str | None = None) -> list[str | msgspec.Raw]:
    """Vectors as a reply has them; made on a thread, one by one, so that others have their turn between."""
    return await asyncio.to_thread(lambda: [_written(vector, form) for vector in vectors])


async def embeddings(call: Call) -> Reply:
    """OpenAI's."""
    body: EmbeddingsBody = call.body
    texts, counts = read_texts("input", body.input), list[int]()
    with call.server.admitted():
        async with call.server.models.lease(body.model, kinds=call.kinds) as entry:
            check_vectors(entry.leased, "input", len(texts), body.dimensions)
            scales = call.server.models.scales_of(body.model or "")
            vectors = await entry.leased.aembed(
                texts, dimensions=body.dimensions, truncate=bool(body.truncate), counted=counts.append, lora=scales
            )
            call.server.metrics.prompt_tokens += sum(counts)
            data = [
                {"object": "embedding", "index": i, "embedding": vector}
                for i, vector in enumerate(await written(vectors, body.encoding_format))
            ]
            return Json({"object": "list", "data": data, "model": entry.name, "usage": _usage(counts)})


async def embedding(call: Call) -> Reply:
    """llama-server's own: a list, with a list of rows for each text."""
    body: EmbeddingBody = call.body
    field = "content" if body.content is not None else "input"
    texts, counts = read_texts(field, getattr(body, field)), list[int]()
    with call.server.admitted():
        async with call.server.models.lease(body.model, kinds=call.kinds) as entry:
            pools, width = entry.leased.pooling != "none", entry.leased.vector_size
            check_size(field, len(texts), width)

            def counted(n: int) -> None:
                counts.append(n)
                if not pools:
                    check_size(field, sum(counts), width)

            scales = call.server.models.scales_of(body.model or "")
            vectors = await entry.leased.aembed(texts, normalize=body.embd_normalize == 2, counted=counted, lora=scales)
            call.server.metrics.prompt_tokens += sum(counts)
            rows = [_scaled(np.atleast_2d(vector), body.embd_normalize) for vector in vectors]
            told = iter(await written((row for of_text in rows for row in of_text), body.encoding_format))
            return Json([{"index": i, "embedding": list(islice(told, len(of_text)))} for i, of_text in enumerate(rows)])


async def rerank(call: Call) -> Reply:
    """Documents with their scores, the best first."""
    body: RerankBody = call.body
    if (body.documents is None) == (body.texts is None):
        raise invalid("documents", "give the documents here, or as texts, and not both.")
    if body.raw_scores is False:
        raise invalid("raw_scores", "it must be true: scores are as the classifier gives them.")
    given = body.texts if body.documents is None else body.documents
    documents = [one if isinstance(one, str) else one.text for one in given or ()]
    if not documents:
        raise invalid("documents" if body.texts is None else "texts", "it is empty.")
    counts = list[int]()
    with call.server.admitted():
        async with call.server.models.lease(body.model, kinds=call.kinds) as entry:
            scales = call.server.models.scales_of(body.model or "")
            ranked = await entry.leased.arerank(
                body.query, documents, body.top_n, truncate=body.truncate, counted=counts.append, lora=scales
            )
            call.server.metrics.prompt_tokens += sum(counts)
    if body.texts is not None:
        return Json(
            [
                {"index": one.index, "score": one.score} | ({"text": documents[one.index]} if body.return_text else {})
                for one in ranked
            ]
        )
    results = [
        {"index": one.index, "relevance_score": one.score}
        | ({"document": {"text": documents[one.index]}} if body.return_documents else {})
        for one in ranked
    ]
    return Json({"object": "list", "model": entry.name, "usage": _usage(counts), "results": results})


def _written(vector: np.ndarray, form: str | None) -> str | msgspec.Raw:
    if form == "base64":
        return base64.b64encode(np.ascontiguousarray(vector, "<f4").tobytes()).decode()
    return msgspec.Raw(msgspec.json.encode(vector.tolist()))


def _scaled(rows: np.ndarray, normalize: int) -> np.ndarray:
    """llama-server's kinds: -1 as they are, 0 the largest is 32760, 1 their magnitudes sum up to 1, 2 length 1."""
    if normalize in (-1, 2):
        return rows
    size = np.abs(rows).max(axis=1) / 32760 if normalize == 0 else np.abs(rows).sum(axis=1)
    return rows / np.where(size == 0, 1, size)[:, None]


def _usage(counts: list[int]) -> dict[str, int]:
    return {"prompt_tokens": sum(counts), "total_tokens": sum(counts)}


ROUTES = (
    Route("POST", "/v1/embeddings", embeddings, EmbeddingsBody, summary="Vectors of texts", kinds=VECTOR_MODELS),
    *(
        Route(
            "POST", path, embedding, EmbeddingBody, summary="Vectors of texts, llama-server's form", kinds=VECTOR_MODELS
        )
        for path in ("/embedding", "/embeddings")
    ),
    *(
        Route("POST", path, rerank, RerankBody, summary="Documents by how well they answer a query", kinds=RERANKERS)
        for path in ("/rerank", "/reranking", "/v1/rerank", "/v1/reranking")
    ),
)
