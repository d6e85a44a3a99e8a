"""How far a model's answers stand from a base's: Kullback-Leibler divergence over a text, and the file of a base.

The base is the same model before it was quantized: a second open model, or a file of its answers in the format of
llama-perplexity's ``--kl-divergence-base``, so that either program reads what the other wrote:

    "_logits_" | n_ctx u32 | n_vocab i32 | n_chunks i32 | tokens i32 (n_chunks, n_ctx)
    for each chunk, for each of its n_ctx - 1 - n_ctx / 2 scored rows:
        step f32 | lowest f32 | q u16 (n_vocab, made even)          ln p = step * q + lowest

16 nats below the likeliest token is the lowest that a row keeps. A step is at most 2.5e-4 nats.
"""

from __future__ import annotations

import contextlib
import functools
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgellm import arguments
from edgellm.formats.errors import FormatError, ParameterError
from edgellm.formats.mapped_file import FileMap
from edgellm.formats.regular_file import open_regular
from edgellm.machine.atomic import whole_file
from edgellm.measure.perplexity import ROWS, Chunk, ChunkModel, Perplexity, cut, log_softmax, mean_and_error

MAGIC = b"_logits_"
HEADER = struct.Struct("<8sIii")
DEEPEST = 16.0  # nats under the likeliest token
LEAST_LOG_P = -16.0  # less likely tokens of the base add nothing, as in llama-perplexity


# ---- the file of a base ----------------------------------------------------------------------------------------------


def row_layout(n_vocab: int) -> np.dtype:
    """One scored row of the file."""
    return np.dtype([("step", "<f4"), ("lowest", "<f4"), ("q", "<u2", n_vocab + n_vocab % 2)])


@contextlib.contextmanager
def base_writer(
    path: Path, ids: Sequence[int], n_ctx: int, n_chunks: int, n_vocab: int
) -> Iterator[Callable[[np.ndarray], None]]:
    """For a ``with`` block: a call with the scored rows of each chunk's logits writes them. The file is there when the
    block ends, and not when it raises."""
    layout = row_layout(n_vocab)
    with whole_file(arguments.path("the file of the base", path, new=True)) as file:
        file.write(HEADER.pack(MAGIC, n_ctx, n_vocab, n_chunks))
        file.write(np.asarray(ids[: n_chunks * n_ctx], "<i4").tobytes())

        def add(logits: np.ndarray) -> None:
            for start in range(0, len(logits), ROWS):
                file.write(pack_rows(logits[start : start + ROWS], layout).tobytes())

        yield add


def pack_rows(logits: np.ndarray, layout: np.dtype) -> np.ndarray:
    """Logits (n, n_vocab) float32 as rows of the file."""
    rows = np.zeros(len(logits), layout)
    highest = logits.max(axis=1, keepdims=True)
    lowest = np.maximum(logits.min(axis=1, keepdims=True), highest - np.float32(DEEPEST))
    total = np.log(np.exp(logits - highest).sum(axis=1, keepdims=True, dtype=np.float64)).astype(np.float32)
    step = (highest - lowest) / np.float32(65535)
    inverse = np.divide(1, step, out=np.zeros_like(step), where=step > 0)
    rows["q"][:, : logits.shape[1]] = np.rint(np.maximum(logits - lowest, 0) * inverse)
    rows["step"], rows["lowest"] = step[:, 0], (lowest - highest - total)[:, 0]
    return rows


class Base:
    """A base read from a file: the tokens it was made with, and its log-probabilities chunk by chunk."""

    def __init__(self, path: str | Path) -> None:
        self.path = arguments.path("the file of the base", path)
        with open_regular(self.path) as file:
            nbytes = os.fstat(file.fileno()).st_size
            head = file.read(HEADER.size)
        if len(head) < HEADER.size or not head.startswith(MAGIC):
            raise self._error(f"begins with {head[:8]!r}", f"{MAGIC!r}, the mark of a file of --save-logits")
        _, self.n_ctx, self.n_vocab, self.n_chunks = HEADER.unpack(head)
        if not (4 <= self.n_ctx < 1 << 24 and 1 <= self.n_vocab < 1 << 24 and 1 <= self.n_chunks < 1 << 24):
            raise self._error(
                f"names a context of {self.n_ctx}, a vocabulary of {self.n_vocab} and {self.n_chunks} chunks",
                "sizes that a run can have",
            )
        n_tokens, self.n_scored = self.n_chunks * self.n_ctx, self.n_ctx - 1 - self.n_ctx // 2
        layout = row_layout(self.n_vocab)
        start = HEADER.size + 4 * n_tokens
        wanted = start + self.n_chunks * self.n_scored * layout.itemsize
        if nbytes != wanted:
            raise self._error(f"has {nbytes} bytes", f"{wanted} for {self.n_chunks} chunks of {self.n_ctx}")
        self.tokens = np.fromfile(self.path, "<i4", n_tokens, offset=HEADER.size)
        if self.tokens.min() < 0 or self.tokens.max() >= self.n_vocab:
            raise self._error("has token ids outside its vocabulary", f"ids from 0 to {self.n_vocab - 1}")
        n_rows = self.n_chunks * self.n_scored
        with open(self.path, "rb") as file:
            self._map = FileMap.of(file.fileno(), self.path)
        self.rows = np.frombuffer(self._map, layout, n_rows, start).reshape(self.n_chunks, self.n_scored)

    def _error(self, found: str, expected: str) -> FormatError:
        return FormatError(
            f"{self.path.name} {found}; expected {expected}. Make it again with `edgellm perplexity --save-logits`.",
            code="LOGITS_FILE",
        )

    def chunks(self, prefix: Sequence[int]) -> list[Chunk]:
        """The chunks to run; the file keeps the text's own tokens, without BOS."""
        return cut(self.tokens.tolist(), prefix, self.n_ctx)

    def log_probabilities(self, index: int, part: slice) -> np.ndarray:
        """(n, n_vocab) float32 of some rows of a chunk."""
        rows = self.rows[index, part]
        lowest, step = rows["lowest"][:, None], rows["step"][:, None]
        log_p = rows["q"][:, : self.n_vocab] * step + lowest
        self._map.check()
        if not np.isfinite(log_p).all():
            raise self._error(f"has NaN or infinity in chunk {index + 1}", "finite numbers")
        return log_p


# ---- comparing -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """Position by position, over n scored tokens.

    divergence    (n,) float64, nats: sum of p_base (ln p_base - ln p) over the vocabulary
    change        (n,) float32: p - p_base of the token that the text has
    same_top      (n,) bool: both name the same token first
    losses, base_losses   (n,) float32: -ln p and -ln p_base of the token that the text has
    """

    divergence: np.ndarray
    change: np.ndarray
    same_top: np.ndarray
    losses: np.ndarray
    base_losses: np.ndarray

    @classmethod
    def of_rows(cls, base: np.ndarray, log_p: np.ndarray, targets: np.ndarray) -> Comparison:
        """Of log-probabilities (n, n_vocab) of the base and of the model."""
        p_base = np.exp(base)
        p_base[base <= LEAST_LOG_P] = 0
        divergence = np.einsum("ij,ij->i", p_base, base - log_p, dtype=np.float64)
        at = targets.astype(np.int64)[:, None]
        loss, base_loss = (-np.take_along_axis(rows, at, 1)[:, 0] for rows in (log_p, base))
        same = base.argmax(axis=1) == log_p.argmax(axis=1)
        return cls(divergence, np.exp(-loss) - np.exp(-base_loss), same, loss, base_loss)

    @classmethod
    def joined(cls, parts: Sequence[Comparison]) -> Comparison:
        """One after the other."""
        names = ("divergence", "change", "same_top", "losses", "base_losses")
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))

    def figures(self) -> dict[str, float | int]:
        """Every figure that llama-perplexity prints, under plain names; ``_error`` is the standard error."""
        own, base = Perplexity.of(self.losses), Perplexity.of(self.base_losses)
        ratio, ratio_error = mean_and_error(self.losses.astype(np.float64) - self.base_losses)
        kl, kl_error = mean_and_error(self.divergence)
        top, top_error = mean_and_error(self.same_top)
        square, square_error = mean_and_error(np.square(self.change, dtype=np.float64))
        rms = square**0.5
        return {
            "scored": own.n_scored,
            "perplexity": own.value,
            "perplexity_error": own.error,
            "base_perplexity": base.value,
            "base_perplexity_error": base.error,
            "ln_perplexity_ratio": ratio,
            "ln_perplexity_ratio_error": ratio_error,
            "mean_kl": kl,
            "mean_kl_error": kl_error,
            "median_kl": float(np.median(self.divergence)),
            "p90_kl": float(np.percentile(self.divergence, 90)),
            "p99_kl": float(np.percentile(self.divergence, 99)),
            "max_kl": float(self.divergence.max()),
            "mean_change": float(self.change.mean(dtype=np.float64)),
            "rms_change": rms,
            "rms_change_error": 0.5 * square_error / rms if rms else 0.0,
            "max_change": float(np.abs(self.change).max()),
            "same_top": top,
            "same_top_error": top_error,
        }


def compare_chunk(logits: np.ndarray, targets: np.ndarray, base_log_p: Callable[[slice], np.ndarray]) -> Comparison:
    """The scored rows of one chunk, some at a time; ``base_log_p`` gives the base's of a slice of rows."""
    parts = []
    for start in range(0, len(targets), ROWS):
        part = slice(start, start + ROWS)
        parts.append(Comparison.of_rows(base_log_p(part), log_softmax(logits[part]), targets[part]))
    return Comparison.joined(parts)


def compare_with_base(model: ChunkModel, base: Base, n_chunks: int | None = None) -> Iterator[Comparison]:
    """Chunk by chunk, over the tokens of the base."""
    require_vocabulary(model, base.n_vocab, base.path.name)
    for index, chunk in enumerate(base.chunks(model.prefix)[:n_chunks]):
        yield compare_chunk(model.logits(chunk), chunk.targets, functools.partial(base.log_probabilities, index))


def compare_models(model: ChunkModel, base: ChunkModel, chunks: Sequence[Chunk]) -> Iterator[Comparison]:
    """Chunk by chunk, two open models over the same tokens."""
    require_vocabulary(model, base.program.n_vocab, base.gguf.path.name)
    for chunk in chunks:
        base_logits = base.logits(chunk)

        def base_log_p(part: slice, rows: np.ndarray = base_logits) -> np.ndarray:
            return log_softmax(rows[part])

        yield compare_chunk(model.logits(chunk), chunk.targets, base_log_p)


def require_vocabulary(model: ChunkModel, n_vocab: int, name: str) -> None:
    """ParameterError for a base that cannot be of the same model."""
    if model.program.n_vocab != n_vocab:
        raise ParameterError(
            f"{model.gguf.path.name} has a vocabulary of {model.program.n_vocab} tokens, the base {name} one of "
            f"{n_vocab}. Compare with a base that the same model made."
        )
