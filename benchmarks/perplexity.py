"""Perplexity of a model on a text, and how far an executor's answers stand from the reference's.

    python benchmarks/perplexity.py MODEL.gguf TEXT.txt
    python benchmarks/perplexity.py MODEL.gguf TEXT.txt --executor reference --save-logits base.npy --chunks 8
    python benchmarks/perplexity.py MODEL.gguf TEXT.txt --executor cpu --against base.npy --chunks 8

The procedure is llama-perplexity's: the text is cut into chunks of ``--context`` tokens, each starts from an empty
cache and with BOS in the place of its first token where the vocabulary wants one, and the tokens of its second half
are scored. ``--against`` adds the mean Kullback-Leibler divergence from the base to this executor, in nats, and the
share of positions where both name the same token first. The base is a file of ``--save-logits``, or the word
``reference``, which runs the reference executor beside. The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgellm.formats.gguf import GGUFFile
from edgellm.kernels.kv import BLOCK_TOKENS, KVPool
from edgellm.kernels.program import Batch, Executor, Program
from edgellm.models import build_program


@dataclass(frozen=True)
class Chunk:
    """The ids of one chunk; logits are wanted from row ``first`` on, and score the tokens after it."""

    ids: np.ndarray
    first: int

    @property
    def targets(self) -> np.ndarray:
        """The token that each wanted row should have foretold."""
        return self.ids[self.first + 1 :]


def make_reference(program: Program, pool: KVPool, n_threads: int, max_tokens: int) -> Executor:
    """numpy float32; numpy chooses its threads itself."""
    from edgellm.kernels.reference import ReferenceExecutor

    return ReferenceExecutor(program, pool, max_tokens)


def make_cpu(program: Program, pool: KVPool, n_threads: int, max_tokens: int) -> Executor:
    """The SIMD kernels."""
    from edgellm.kernels.cpu.executor import CPUExecutor

    return CPUExecutor(program, pool, n_threads, max_tokens)


# name: (maker, type of the keys and values it keeps)
EXECUTORS: dict[str, tuple[Callable[[Program, KVPool, int, int], Executor], str]] = {
    "reference": (make_reference, "float32"),
    "cpu": (make_cpu, "float16"),
}


def open_executor(name: str, program: Program, n_threads: int, context: int) -> Executor:
    """An executor with a pool for one chunk."""
    make, kv_dtype = EXECUTORS[name]
    n_blocks = -(-context // BLOCK_TOKENS)
    pool = KVPool(program.kv_layers, program.windows, [n_blocks] * len(program.windows), kv_dtype)
    return make(program, pool, n_threads, context)


def read_ids(gguf: GGUFFile, text: str) -> tuple[list[int], int | None]:
    """The ids of the text, and the BOS id where chunks begin with one."""
    from edgellm.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_gguf(gguf.metadata)
    ids = tokenizer.encode(text, add_special=True)
    adds_bos = bool(tokenizer.encode("", add_special=True)[:1] == [tokenizer.bos_id])
    return ids, tokenizer.bos_id if adds_bos else None


def cut(ids: list[int], bos: int | None, context: int, n_chunks: int | None) -> Iterator[Chunk]:
    """Whole chunks only; what is left at the end is not scored."""
    for start in range(0, len(ids) - context + 1, context)[:n_chunks]:
        chunk = np.array(ids[start : start + context], np.int32)
        if bos is not None:
            chunk[0] = bos
        yield Chunk(chunk, context // 2)


def scored_logits(executor: Executor, chunk: Chunk) -> np.ndarray:
    """Logits (n_scored, n_vocab) of the rows that foretell the second half's tokens."""
    batch = Batch.single(executor.program, chunk.ids)
    batch.outputs[: chunk.first] = False
    return executor.run(batch)[:-1]  # the last token foretells nothing that is there


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    """log softmax of each row, float64."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted


def open_base(source: str, program: Program, n_threads: int, context: int) -> Callable[[int, Chunk], np.ndarray]:
    """What answers are compared with: a function that gives the logits (n_scored, n_vocab) of the i-th chunk."""
    if source in EXECUTORS:
        executor = open_executor(source, program, n_threads, context)
        return lambda index, chunk: scored_logits(executor, chunk)
    saved: np.ndarray = np.load(source, mmap_mode="r")

    def from_file(index: int, chunk: Chunk) -> np.ndarray:
        wanted = (len(chunk.targets), program.n_vocab)
        if index >= len(saved) or saved.shape[1:] != wanted:
            raise SystemExit(
                f"{source} holds logits of the shape {saved.shape}; chunk {index + 1} of this run needs {wanted}. "
                "Write it again with --save-logits and the same model, --context and --chunks."
            )
        return saved[index]

    return from_file


def compare(base: np.ndarray, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """KL divergence (n,) from base to logits in nats, and where the same token is first (n,) bool."""
    divergence = np.empty(len(base))
    rows = 32  # float64 rows of a large vocabulary at a time
    for start in range(0, len(base), rows):
        part = slice(start, start + rows)
        base_log, log = log_probabilities(base[part]), log_probabilities(logits[part])
        divergence[part] = (np.exp(base_log) * (base_log - log)).sum(axis=1)
    return divergence, base.argmax(axis=1) == logits.argmax(axis=1)


def negative_log_likelihoods(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """-ln p(target) of each row, float64."""
    rows = 32
    parts = [
        -np.take_along_axis(log_probabilities(logits[i : i + rows]), targets[i : i + rows, None], axis=1)[:, 0]
        for i in range(0, len(logits), rows)
    ]
    return np.concatenate(parts)


def measure(args: argparse.Namespace, gguf: GGUFFile) -> dict[str, object]:
    """Run every chunk and print the running perplexity; the figures of the last line."""
    program = build_program(gguf)
    ids, bos = read_ids(gguf, args.text.read_text(encoding="utf-8"))
    chunks = list(cut(ids, bos, args.context, args.chunks))
    if not chunks:
        raise SystemExit(f"{args.text} has {len(ids)} tokens, expected at least {args.context}. Give a longer text.")
    executor = open_executor(args.executor, program, args.threads, args.context)
    base_logits = open_base(args.against, program, args.threads, args.context) if args.against else None
    saved = None
    if args.save_logits:
        shape = (len(chunks), len(chunks[0].targets), program.n_vocab)
        saved = np.lib.format.open_memmap(args.save_logits, mode="w+", dtype=np.float32, shape=shape)
    losses: list[np.ndarray] = []
    divergences: list[np.ndarray] = []
    same_tops: list[np.ndarray] = []
    seconds = 0.0
    for index, chunk in enumerate(chunks):
        start = time.perf_counter()
        logits = scored_logits(executor, chunk)
        seconds += time.perf_counter() - start
        losses.append(negative_log_likelihoods(logits, chunk.targets))
        line = f"chunk {index + 1}/{len(chunks)}  perplexity {math.exp(np.concatenate(losses).mean()):.4f}"
        if saved is not None:
            saved[index] = logits
        if base_logits is not None:
            divergence, same = compare(base_logits(index, chunk), logits)
            divergences.append(divergence)
            same_tops.append(same)
            line += f"  KL {np.concatenate(divergences).mean():.3e}  same top {np.concatenate(same_tops).mean():.2%}"
        print(line, file=sys.stderr, flush=True)
    loss = np.concatenate(losses)
    figures: dict[str, object] = {
        "model": args.model.name,
        "text": args.text.name,
        "executor": args.executor,
        "context": args.context,
        "chunks": len(chunks),
        "scored": len(loss),
        "perplexity": round(math.exp(loss.mean()), 5),
        "perplexity_error": round(math.exp(loss.mean()) * loss.std(ddof=1) / math.sqrt(len(loss)), 5),
        "prompt_tps": round(len(chunks) * args.context / seconds, 1),
    }
    if base_logits is not None:
        divergence = np.concatenate(divergences)
        figures |= {
            "against": args.against,
            "mean_kl_divergence": float(divergence.mean()),
            "max_kl_divergence": float(divergence.max()),
            "same_top_share": round(float(np.concatenate(same_tops).mean()), 6),
        }
    executor.close()
    return figures


def main() -> None:
    """Read the command line, measure, print the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--executor", choices=list(EXECUTORS), default="cpu")
    parser.add_argument("--against", metavar="reference|FILE.npy", help="compare with these answers")
    parser.add_argument("--save-logits", type=Path, metavar="FILE.npy", help="keep the scored logits as a base")
    parser.add_argument("--chunks", type=int, help="stop after so many")
    parser.add_argument("--context", type=int, default=512, help="tokens of a chunk (default 512)")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    with GGUFFile.open(args.model) as gguf:
        print(json.dumps(measure(args, gguf)))


if __name__ == "__main__":
    main()
