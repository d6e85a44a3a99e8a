"""Texts to vectors, and documents to scores: which ids a text becomes, what is done with its pooled hidden states."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from edgellm import arguments
from edgellm.engine.embedding import encode
from edgellm.formats.errors import ContextFullError, ParameterError, UnsupportedError
from edgellm.kernels.pooling import Pooling, head_tensors

if TYPE_CHECKING:
    from edgellm.adapters.scales import AdapterScales
    from edgellm.engine.requests import CancelFlag
    from edgellm.loading import Model

Text = str | Sequence[int]
Poolings = Literal["mean", "cls", "last", "none"]
Ids = tuple[list[int], list[int] | None]
"""The tokens of a text, and which text of a pair each is of."""

RERANK_TEMPLATE = "tokenizer.chat_template.rerank"
MAX_TEXTS = 1 << 24
_PLACES = re.compile(r"\{(query|document)\}")


@dataclass(frozen=True)
class RankedDocument:
    """A document by its place in the list that was given, and how well it answers; the greater the better."""

    index: int
    score: float


class Embedder:
    """The way from texts to vectors of one model. May be used from any number of threads."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.tokenizer = model.tokenizer
        self.n_ctx, self.n_embd = model.engine.n_ctx, model.program.n_embd
        self._pooling = model.program.pooling

    @cached_property
    def head(self) -> dict[str, np.ndarray]:
        """The weights of the pooling's head, float32."""
        return {} if self._pooling is None else head_tensors(self._pooling, self.model.program.tensors)

    # -- vectors ---------------------------------------------------------------------------------------------------

    def embed(
        self,
        texts: str | Sequence[Text],
        *,
        normalize: bool,
        truncate: bool,
        dimensions: int | None,
        pooling: Poolings | None,
        prompt: str | None,
        cancel: CancelFlag | None,
        counted: Callable[[int], None],
        adapters: AdapterScales | None = None,
    ) -> np.ndarray | list[np.ndarray]:
        """See ``LLM.embed``; ``counted`` is told how many tokens each text has."""
        if not self.model.program.hidden:
            raise UnsupportedError(
                f"{self.model.path.name} has no hidden states to make vectors of. Take a model for embeddings.",
                code="EMBEDDINGS",
            )
        given = [texts] if isinstance(texts, str) else arguments.items("texts", texts, "a list of texts")
        chosen = self.pooling(pooling)
        normalize, truncate = arguments.flag("normalize", normalize), arguments.flag("truncate", truncate)
        before = "" if prompt is None else arguments.text("prompt", prompt)
        width = self.width(chosen)
        if dimensions is not None:
            width = arguments.whole_number("dimensions", dimensions, 1, width)
            if chosen.kind == "none":
                raise ParameterError("dimensions cut the vector of a text, and pooling is none. Leave one of them out.")
        checked = [_checked(text) for text in given]

        def ids() -> Iterator[Ids]:
            for i, text in enumerate(checked):
                tokens = self.text_ids(before + text if isinstance(text, str) else text, truncate=truncate, number=i)
                counted(len(tokens))
                yield tokens, None

        rows = encode(self.model.engine, ids(), chosen.rows, cancel, adapters)
        vectors = [self._finish(chosen, row, width, normalize=normalize) for row in rows]
        if chosen.kind == "none":
            return vectors
        return np.stack(vectors) if vectors else np.zeros((0, width), np.float32)

    def pooling(self, asked: Poolings | None) -> Pooling:
        """The file's, or the one asked for; a model for chats embeds by the mean of its rows."""
        if asked is not None:
            if asked not in get_args(Poolings):
                raise arguments.wrong("pooling", asked, f"None or one of {', '.join(get_args(Poolings))}")
            projects = self._pooling is not None and self._pooling.kind != "rank" and asked != "none"
            return Pooling(asked, head=self._pooling.head if projects and self._pooling is not None else ())
        if self._pooling is None:
            return Pooling("mean")
        if self._pooling.kind == "rank":
            raise UnsupportedError(
                f"{self.model.path.name} gives scores to pairs of texts and no vectors. Use rerank, or a model for "
                "embeddings.",
                code="EMBEDDINGS",
            )
        return self._pooling

    def width(self, pooling: Pooling) -> int:
        """Numbers in a vector."""
        return int(self.model.program.tensors[pooling.head[-1].weight].shape[0]) if pooling.head else self.n_embd

    def _finish(self, pooling: Pooling, rows: np.ndarray, width: int, *, normalize: bool) -> np.ndarray:
        vector = pooling.through_head(rows, self.head)[..., :width]
        return _normalized(vector) if normalize else vector

    # -- ids -------------------------------------------------------------------------------------------------------

    def text_ids(self, text: Text, *, truncate: bool, number: int | None = None) -> list[int]:
        """The ids of a text with what the vocabulary puts around it; ids that are given stay as they are.

        truncate   leave out the end of a text that is too long; else ContextFullError says how long it is
        """
        if not isinstance(text, str):
            return self._fitting(list(text)[: self.n_ctx] if truncate else list(text), number)
        ids = self.tokenizer.encode(text, True)
        if len(ids) > self.n_ctx and truncate:
            n_around = len(self.tokenizer.special.suffix)
            return [*ids[: max(0, self.n_ctx - n_around)], *self.tokenizer.special.suffix][: self.n_ctx]
        return self._fitting(ids, number)

    def _fitting(self, ids: list[int], number: int | None) -> list[int]:
        which = "The text" if number is None else f"Text {number}"
        if not ids:
            raise ParameterError(f"{which} has 0 tokens. Give one that has some.")
        if len(ids) > self.n_ctx:
            raise ContextFullError(
                f"{which} has {len(ids)} tokens, the model has room for {self.n_ctx}. Shorten it, cut it in parts, or "
                "ask for it to be cut off (truncate).",
                n_tokens=len(ids),
                n_ctx=self.n_ctx,
            )
        return ids

    # -- scores ----------------------------------------------------------------------------------------------------

    def rerank(
        self,
        query: str,
        documents: Sequence[str],
        top_n: int | None,
        truncate: bool,
        cancel: CancelFlag | None,
        counted: Callable[[int], None],
        adapters: AdapterScales | None = None,
    ) -> list[RankedDocument]:
        """See ``LLM.rerank``."""
        arguments.text("query", query)
        given = [arguments.text("documents", one) for one in arguments.items("documents", documents, "a list of texts")]
        if top_n is not None:
            arguments.whole_number("top_n", top_n, 0, MAX_TEXTS)
        arguments.flag("truncate", truncate)
        pooling = self._pooling
        if pooling is None or pooling.kind != "rank":
            raise UnsupportedError(
                f"{self.model.path.name} has no classifier that gives scores to pairs of texts. Take a model for "
                "reranking, or compare vectors of embed.",
                code="RERANK",
            )

        def ids() -> Iterator[Ids]:
            pair = partial(self._in_template, self._template) if self._template else self._pair
            for i, document in enumerate(given):
                tokens, types = pair(query, document)
                over = len(tokens) - self.n_ctx
                if over > 0 and truncate:
                    tokens, types = self._cut(partial(pair, query, document), document, over)
                counted(len(tokens))
                yield self._fitting(tokens, i), types

        rows = encode(self.model.engine, ids(), pooling.rows, cancel, adapters)
        scores = [float(pooling.through_head(row, self.head)[0]) for row in rows]
        ranked = [RankedDocument(i, score) for i, score in enumerate(scores)]
        return sorted(ranked, key=lambda one: -one.score)[: len(ranked) if top_n is None else top_n]

    @cached_property
    def _template(self) -> str:
        found = self.model.gguf.metadata.get(RERANK_TEMPLATE, "")
        return found if isinstance(found, str) else ""

    @cached_property
    def _has_types(self) -> bool:
        types = self.model.program.tensors.get("token_types.weight")  # RoBERTa's kin use the first row alone
        return types is not None and types.shape[0] > 1 and self.tokenizer.kind == "bert"

    def _pair(self, query: str, document: str, n_less: int = 0) -> Ids:
        """[CLS] query [SEP] document [SEP]; <s> query </s></s> document </s> where the file does not say otherwise.

        n_less   tokens that the document's end has less
        """
        special, own = self.tokenizer.special, self.tokenizer.encode(document, False)
        first = self.tokenizer.encode(query, True)
        doubled = self.tokenizer.kind != "bert" and self.tokenizer.vocabulary.flag("add_sep_token", True)
        between = [*special.suffix] if doubled else []
        second = [*own[: len(own) - n_less], *special.suffix]
        types = [0] * (len(first) + len(between)) + [1] * len(second)
        return [*first, *between, *second], types if self._has_types else None

    def _in_template(self, template: str, query: str, document: str, n_less: int = 0) -> Ids:
        """The pair in the places that the file's template has for them; marks count in the template alone."""
        from edgellm.chat_template.user_text import Segment

        if n_less:  # words may reach from the document into the template, so it is the text that is cut
            document = self.tokenizer.decode(self.tokenizer.encode(document, False)[:-n_less])
        texts, segments, end = {"query": query, "document": document}, list[Segment](), 0
        for place in _PLACES.finditer(template):
            segments += [Segment(template[end : place.start()], True), Segment(texts[place[1]], False)]
            end = place.end()
        segments.append(Segment(template[end:], True))
        return self.tokenizer.encode_segments(segments, False), None

    def _cut(self, pair: Callable[[int], Ids], document: str, over: int) -> Ids:
        """The pair with as much less of the document's end as is too long."""
        n, n_less = len(self.tokenizer.encode(document, False)), 0
        while True:
            n_less = min(n, n_less + over)
            found = pair(n_less)
            over = len(found[0]) - self.n_ctx
            if over <= 0 or n_less == n:
                return found


async def in_thread(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """What it returns on a thread of its own, which a flag tells that nobody waits any more.

    Those of the event loop are few, and a thread waits here for long.
    """
    import asyncio
    from concurrent.futures import ThreadPoolExecutor
    from contextvars import copy_context

    options.setdefault("cancel", threading.Event())
    work = partial(copy_context().run, function, *args, **options)
    thread = ThreadPoolExecutor(1, "edgellm-embed")
    try:
        return await asyncio.get_running_loop().run_in_executor(thread, work)
    except asyncio.CancelledError:
        with contextlib.suppress(AttributeError):  # a flag of the caller's that only says
            options["cancel"].set()
        raise
    finally:
        thread.shutdown(wait=False)


def _checked(text: Any) -> str | list[int]:
    return text if isinstance(text, str) else arguments.token_ids("texts", text)


def _normalized(vectors: np.ndarray) -> np.ndarray:
    """Of length 1; a vector of zeros stays."""
    length = np.sqrt(np.sum(np.square(vectors, dtype=np.float64), axis=-1, keepdims=True))
    normed: np.ndarray = (vectors / np.where(length == 0.0, 1.0, length)).astype(np.float32)
    return normed
