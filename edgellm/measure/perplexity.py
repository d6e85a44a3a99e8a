"""How well a model predicts a text: llama-perplexity's procedure, chunk by chunk.

The text is cut into chunks of ``n_ctx`` tokens. Each starts from an empty cache, with BOS in the place of its first
token where the vocabulary wants one, and the tokens of its second half are scored. Perplexity is exp of the mean
negative log-likelihood. Whatever else is asked of a model over a text (divergence, importance of weights) runs the
same chunks through ``ChunkModel``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from edgellm import arguments
from edgellm.engine.denoising import check_in_order
from edgellm.engine.request_checks import check_logits
from edgellm.formats.errors import ParameterError
from edgellm.kernels.chosen_blocks import check_chosen_context, read_throughout, with_kept_keys
from edgellm.kernels.executors import GPULayers, check_split, open_executor
from edgellm.kernels.kv import BLOCK_TOKENS
from edgellm.kernels.program import Batch, Hook
from edgellm.kernels.typed_cache import with_cache_types
from edgellm.loading import open_program
from edgellm.machine.cores import default_threads
from edgellm.tokenizer import Tokenizer

if TYPE_CHECKING:
    from edgellm.engine.engine import Engine

LEAST_CONTEXT = 4  # tokens: a second half needs two, one to be foretold
ROWS = 8  # of logits taken at once: a large vocabulary makes long rows


@dataclass(frozen=True)
class Chunk:
    """The ids of one chunk (n_ctx,) int32. Logits are wanted from row ``first`` on and score the tokens after it."""

    ids: np.ndarray
    first: int

    @property
    def targets(self) -> np.ndarray:
        """The token that each wanted row should have foretold, (n_scored,) int32."""
        return self.ids[self.first + 1 :]


@dataclass(frozen=True)
class Perplexity:
    """``value`` with its standard error, over ``n_scored`` tokens."""

    value: float
    error: float
    n_scored: int

    @classmethod
    def of(cls, losses: np.ndarray) -> Perplexity:
        """Of negative log-likelihoods (n,)."""
        mean, error = mean_and_error(losses)
        value = exp(mean)
        return cls(value, value * error if error else 0.0, len(losses))


def exp(value: float) -> float:
    """e to the value; infinity, as C has it, where no float is large enough."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """The mean of (n,) and its standard error, 0 for fewer than two."""
    values = np.asarray(values, np.float64)
    error = values.std() / math.sqrt(len(values) - 1) if len(values) > 1 else 0.0
    return float(values.mean()), float(error)


def cut(ids: Sequence[int], prefix: Sequence[int], n_ctx: int, n_chunks: int | None = None) -> list[Chunk]:
    """Whole chunks only; what is left at the end is not scored. ``prefix`` is the BOS id, or nothing."""
    whole = len(ids) // n_ctx if n_ctx >= LEAST_CONTEXT else 0
    if n_ctx < LEAST_CONTEXT or whole < 1 or (n_chunks is not None and n_chunks < 1):
        raise ParameterError(
            f"The text has {len(ids)} tokens and chunks of {n_ctx} are asked for. It must have at least one chunk, and "
            f"a chunk at least {LEAST_CONTEXT} tokens. Give a longer text or another context."
        )
    chunks = []
    for start in range(0, whole * n_ctx, n_ctx)[:n_chunks]:
        chunk = np.array(ids[start : start + n_ctx], np.int32)
        chunk[: len(prefix)] = prefix
        chunks.append(Chunk(chunk, n_ctx // 2))
    return chunks


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """(n, n_vocab) float32 log-probabilities; the sum is taken in float64."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True, dtype=np.float64)).astype(np.float32)
    return shifted


def negative_log_likelihoods(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """-ln p(target) of each row, float32 (n,)."""
    losses = np.empty(len(targets), np.float32)
    for start in range(0, len(targets), ROWS):
        part = slice(start, start + ROWS)
        losses[part] = -np.take_along_axis(log_softmax(logits[part]), targets[part, None].astype(np.int64), 1)[:, 0]
    return losses


def perplexity(engine: Engine, tokenizer: Tokenizer, ids: Sequence[int], n_ctx: int) -> float:
    """The figure for a model that an engine holds."""
    losses: list[np.ndarray] = []
    for chunk in cut(ids, list(tokenizer.special.prefix[:1]), n_ctx):

        def reduce(start: int, logits: np.ndarray, chunk: Chunk = chunk) -> np.ndarray:
            skip = max(0, chunk.first - start)
            targets = chunk.ids[start + skip + 1 : start + len(logits) + 1]
            return negative_log_likelihoods(logits[skip : skip + len(targets)], targets)

        losses += engine.score(chunk.ids.tolist(), reduce)
    return Perplexity.of(np.concatenate(losses)).value


# ---- a model for chunks alone ----------------------------------------------------------------------------------------


class ChunkModel:
    """An open file with an executor whose cache holds one chunk. For a ``with`` block."""

    def __init__(
        self,
        path: str | Path,
        n_ctx: int = 512,
        *,
        executor: str = "cpu",
        gpu_layers: GPULayers = "auto",
        cpu_moe: bool = False,
        n_threads: int | None = None,
        kv_overrides: Mapping[str, Any] | None = None,
        cache_type_k: str = "f16",
        cache_type_v: str = "f16",
        kv_keep: str | None = None,
    ) -> None:
        arguments.whole_number("n_ctx", n_ctx, LEAST_CONTEXT, arguments.MAX_CONTEXT)
        arguments.whole_number("n_threads", n_threads or 1, 1, arguments.MAX_THREADS)
        check_split(executor, gpu_layers, cpu_moe)
        keep = read_throughout("kv_keep", kv_keep)
        with open_program(path, kv_overrides) as (self.gguf, program):
            self.program = with_kept_keys(with_cache_types(program, cache_type_k, cache_type_v), keep, n_ctx)
            check_chosen_context(self.program, n_ctx)
            self.tokenizer = Tokenizer.from_gguf(self.gguf.metadata, proved=True)
            self.n_ctx = n_ctx
            n_blocks = -(-n_ctx // BLOCK_TOKENS)
            threads = n_threads or default_threads()
            self.executor = open_executor(
                executor, self.program, n_blocks, n_threads=threads, max_tokens=n_ctx, gpu_layers=gpu_layers,
                cpu_moe=cpu_moe,
            )  # fmt: skip

    @property
    def prefix(self) -> list[int]:
        """The BOS id where the vocabulary wants one."""
        return list(self.tokenizer.special.prefix[:1])

    def ids(self, text: str) -> list[int]:
        """The tokens of a text."""
        return self.tokenizer.encode(text, add_special=True)

    def chunks(self, ids: Sequence[int], n_chunks: int | None = None) -> list[Chunk]:
        """See ``cut``."""
        return cut(ids, self.prefix, self.n_ctx, n_chunks)

    def logits(self, chunk: Chunk) -> np.ndarray:
        """Logits (n_scored, n_vocab) of the rows that predict the second half's tokens; valid until the next call."""
        check_logits(self.program)
        check_in_order(self.program)
        batch = Batch.single(self.program, chunk.ids)
        batch.outputs[: chunk.first] = False
        logits = self.executor.run(batch)
        self.gguf.check()
        return logits[:-1]  # the last token predicts nothing that is there

    def watch(self, chunk: Chunk, hook: Hook, outputs: bool = True) -> None:
        """Run a chunk for what a hook sees of it; without ``outputs`` only the last token goes through the output."""
        self.executor.run(Batch.single(self.program, chunk.ids, outputs="all" if outputs else "last"), hook)

    def losses(self, chunks: Sequence[Chunk]) -> Iterator[np.ndarray]:
        """The negative log-likelihoods of each chunk's tokens, (n_scored,) in nats, as they are computed."""
        for chunk in chunks:
            yield negative_log_likelihoods(self.logits(chunk), chunk.targets)

    def close(self) -> None:
        """Let go of everything. May be called twice."""
        self.executor.close()
        self.gguf.close()

    def __enter__(self) -> ChunkModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
