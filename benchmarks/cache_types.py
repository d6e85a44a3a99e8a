"""What keys and values in fewer bits, and fewer of them, cost: perplexity, divergence, and a needle in a long text.

    python benchmarks/cache_types.py model.gguf text.txt [-c 512,4096] [--chunks 4] [--types q8_0,q4_0,kivi2]
        [--keeps quest:1024,snapkv:1024] [--needle 8000] [--llama-cpp 32] [--quiet]

A row for each type, of keys and values alike, and for each way to keep fewer (of f16): bytes that a token's step reads
at the end of a context; for each context the perplexity, the mean Kullback-Leibler divergence from the model with a
float32 cache, and from one of float16. What is kept at the end of a prompt is chosen in the middle of a chunk, and the
second half is scored. ``--needle N``: of five numbers in a text of N tokens, how many an answer names, and the mean
probability of their first digits; another number stands in each question's place. ``--llama-cpp N`` adds llama.cpp's
divergence from itself, with the same types, over the last N tokens of the first chunk of the first context, and ours
over the same. ``--quiet`` prints the last line alone, which is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from edgellm.formats.gguf import GGUFFile
    from edgellm.kernels.program import Program
    from edgellm.measure.perplexity import Chunk

TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "iq4_nl", "q4_1", "q4_0", "kivi2")
STEP = 256  # tokens
COMPARED = 8  # one of so many scored rows is compared whole: a row of a large vocabulary is a megabyte
CITIES = ("Paris", "Oslo", "Lima", "Cairo", "Tokyo")

LLAMA_CPP = """
import json, sys, xllamacpp
path, ids, n, n_vocab, name = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
params = xllamacpp.CommonParams()
params.model.path = path
params.n_ctx, params.n_parallel, params.warmup = len(ids) + 64, 1, False
params.cache_type_k = params.cache_type_v = getattr(xllamacpp.ggml_type, "GGML_TYPE_" + name.upper())
params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_ENABLED
server = xllamacpp.Server(params)
for end in range(len(ids) - n, len(ids)):
    request = {"prompt": ids[:end], "n_predict": 1, "n_probs": n_vocab, "temperature": 0, "cache_prompt": True}
    told = server.handle_completions(request | {"logit_bias": [[int(sys.argv[6]), 1e4]]})
    row = told["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    print("ROW", json.dumps([p for _, p in sorted((t["id"], t["logprob"]) for t in row)]))
"""


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """(n, n_vocab) float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def divergence(base: np.ndarray, found: np.ndarray) -> np.ndarray:
    """KL(base || found) of each row of log-probabilities; what a base holds impossible adds nothing."""
    base = base.astype(np.float64)
    weight = np.exp(base)
    return np.where(weight > 0, weight * (base - found), 0).sum(axis=-1)


def answers(program: Program, chunk: Chunk, n_threads: int, snap_tokens: int = 0) -> Iterator[tuple[int, np.ndarray]]:
    """The scored rows of a chunk in pieces: number of the first, logits. See ``Chunk``.

    snap_tokens   keep so many tokens of what lies before the scored ones
    """
    from edgellm.engine.cache import KVCache, pool_blocks
    from edgellm.engine.snapkv import WINDOW, SnapKV, Watch
    from edgellm.kernels.executors import open_executor
    from edgellm.kernels.program import Batch

    n = len(chunk.ids) - 1
    blocks = pool_blocks(program.cache_layers, n + 32, STEP, 2)
    executor = open_executor("cpu", program, blocks, n_threads=n_threads, max_tokens=STEP)
    snap = SnapKV(program, snap_tokens, STEP) if snap_tokens else None
    end = snap.end(chunk.first) if snap is not None else 0
    stops = [end - WINDOW, end] if end else []
    with contextlib.closing(executor):
        cache = KVCache(executor.pool, n + 32)
        sequence = cache.open((), shared=False)
        while (at := sequence.length) < n:
            stop = min([at + STEP, n, *(stop for stop in stops if stop > at)])
            cache.reserve(sequence, stop - at)
            positions = np.arange(at, stop, dtype=np.int32)
            batch = Batch(
                chunk.ids[at:stop].astype(np.int32), positions - np.int32(sequence.dropped),
                np.zeros(stop - at, np.int32), positions >= chunk.first, tuple(t[None] for t in sequence.tables),
                rope_positions=positions if sequence.dropped else None,
            )  # fmt: skip
            watch = Watch(executor, sequence, None) if snap is not None and stop == end else None
            logits = executor.run(batch, watch)
            if len(logits):
                yield max(at, chunk.first) - chunk.first, logits
            cache.commit(sequence, chunk.ids[at:stop].tolist())
            if watch is not None and snap is not None:
                snap.keep(cache, sequence, watch, lambda: False)


class Scores:
    """What the answers of a program are worth: losses, and some rows whole."""

    def __init__(self, program: Program, chunks: Sequence[Chunk], n_threads: int, snap_tokens: int = 0) -> None:
        losses, rows = list[np.ndarray](), list[np.ndarray]()
        for chunk in chunks:
            for first, logits in answers(program, chunk, n_threads, snap_tokens):
                for i in range(0, len(logits), 16):
                    some = log_softmax(logits[i : i + 16])
                    numbers = np.arange(first + i, first + i + len(some))
                    losses.append(-some[np.arange(len(some)), chunk.targets[numbers]])
                    rows.append(some[numbers % COMPARED == 0].astype(np.float32))
        self.perplexity = float(np.exp(np.concatenate(losses).mean()))
        self.rows = np.concatenate(rows)

    def divergence(self, other: Scores) -> float:
        """The mean of KL(other || self)."""
        pairs = zip(other.rows, self.rows, strict=True)
        return float(np.mean([divergence(base, own) for base, own in pairs]))


def needles(path: Path, text: str, n: int, options: dict[str, Any], n_threads: int) -> tuple[int, float]:
    """How many of the numbers in a text of n tokens an answer names, and the mean probability of their first token."""
    import edgellm

    numbers = np.random.default_rng(1).integers(10000, 99999, len(CITIES)).tolist()
    said = [f"\nThe secret number of {city} is {number}.\n" for city, number in zip(CITIES, numbers, strict=True)]
    with edgellm.load(path, n_ctx=n + 128, n_threads=n_threads, **options) as llm:
        ids = llm.tokenize(text)
        room = n - sum(len(llm.tokenize(one, add_special=False)) for one in said)
        hay = (ids * (room // len(ids) + 1))[:room]
        for i, one in reversed(list(enumerate(said))):
            place = room * (2 * i + 1) // (2 * len(said))
            hay[place:place] = llm.tokenize(one, add_special=False)
        n_found, chances = 0, list[float]()
        for city, number in zip(CITIES, numbers, strict=True):
            question = llm.tokenize(f"\nThe secret number of {city} is", add_special=False)
            answer = llm.generate([*hay, *question], max_tokens=8, temperature=0, ignore_eos=True)
            n_found += answer.text.strip().startswith(str(number))
            wanted = llm.tokenize(f" {number}", add_special=False)
            told = llm.generate([*hay, *question], max_tokens=1, temperature=0, logprobs=20)
            of_first = {one.token: one.logprob for one in told.logprobs[0].top}
            logprob = of_first.get(wanted[0])
            chances.append(0.0 if logprob is None else math.exp(logprob))
    return n_found, float(np.mean(chances))


def llama_cpp(path: Path, ids: list[int], n: int, n_vocab: int, name: str, letter: int) -> np.ndarray:
    """Log-probabilities (n, n_vocab) of llama.cpp behind the last n beginnings of ids."""
    told = [str(path), json.dumps(ids), str(n), str(n_vocab), name, str(letter)]
    done = subprocess.run([sys.executable, "-c", LLAMA_CPP, *told], capture_output=True, text=True, timeout=1800)
    rows = [json.loads(line[4:]) for line in done.stdout.splitlines() if line.startswith("ROW ")]
    if len(rows) != n:
        raise SystemExit(done.stderr[-2000:])
    return np.array(rows)


def measure(gguf: GGUFFile, args: argparse.Namespace) -> list[dict[str, object]]:
    """A row for each type, and each way to keep fewer."""
    from edgellm.arguments import kv_keep
    from edgellm.kernels.chosen_blocks import with_kept_keys
    from edgellm.kernels.typed_cache import with_cache_types
    from edgellm.measure.perplexity import cut
    from edgellm.models import build_program
    from edgellm.tokenizer import Tokenizer

    program, tokenizer = build_program(gguf), Tokenizer.from_gguf(gguf.metadata)
    text = args.text.read_text("utf-8")
    ids, prefix = tokenizer.encode(text, add_special=True), list(tokenizer.special.prefix[:1])
    chunks = {n: cut(ids, prefix, n, args.chunks) for n in map(int, args.n_ctx.split(","))}
    bases = {
        (n, name): Scores(with_cache_types(program, name, name), those, args.threads)
        for n, those in chunks.items()
        for name in ("f32", "f16")
    }
    n_first = min(chunks)
    letter, first = tokenizer.encode("a", add_special=False)[0], list(map(int, chunks[n_first][0].ids))
    theirs = None
    if args.llama_cpp:
        theirs = llama_cpp(args.model, first, args.llama_cpp, program.n_vocab, "f32", letter)
    rows: list[dict[str, object]] = []
    ways = [(name, None) for name in args.types.split(",") if name]
    ways += [("f16", keep) for keep in args.keeps.split(",") if keep]
    for name, kept in ways:
        keep = kv_keep("--keeps", kept)
        typed = with_kept_keys(with_cache_types(program, name, name), keep, max(chunks))
        snap_tokens = keep.n_tokens if keep is not None and keep.way == "snapkv" else 0
        n_most = max(chunks)
        row: dict[str, object] = {"type": name, "keep": kept or "all"}
        row["read_nbytes"] = sum(layer.seen_nbytes(n_most) for layer in typed.cache_layers)
        for n, those in chunks.items():
            found = Scores(typed, those, args.threads, snap_tokens)
            row[f"perplexity_{n}"] = found.perplexity
            row[f"kl_f32_{n}"], row[f"kl_f16_{n}"] = (found.divergence(bases[n, base]) for base in ("f32", "f16"))
        if args.needle:
            options = {"cache_type_k": name, "cache_type_v": name, "kv_keep": kept}
            row["needles"], row["needle_chance"] = needles(args.model, text, args.needle, options, args.threads)
        if theirs is not None and kept is None and name not in ("f32", "kivi2"):
            last = slice(-args.llama_cpp, None)
            base, own = (
                log_softmax(np.concatenate([part.copy() for _, part in answers(one, chunks[n_first][0], args.threads)]))
                for one in (with_cache_types(program, "f32", "f32"), typed)
            )
            row["kl_last"] = float(divergence(base[last], own[last]).mean())
            others = llama_cpp(args.model, first, args.llama_cpp, program.n_vocab, name, letter)
            row["kl_llama_cpp"] = float(divergence(theirs, others).mean())
        rows.append(row)
        if not args.quiet:
            told = (f"{key} {value:.3g}" if isinstance(value, float) else str(value) for key, value in row.items())
            print(" | ".join(told), flush=True)
    return rows


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("-c", dest="n_ctx", default="512", metavar="LIST")
    parser.add_argument("--chunks", type=int, default=4)
    parser.add_argument("--types", default=",".join(TYPES[1:]))
    parser.add_argument("--keeps", default="", metavar="LIST")
    parser.add_argument("--needle", type=int, default=0, metavar="N")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--llama-cpp", type=int, default=0, metavar="N")
    parser.add_argument("--quiet", action="store_true")
    args = parser.parse_args()
    from edgellm.formats.gguf import GGUFFile

    with contextlib.closing(GGUFFile.open(args.model)) as gguf:
        rows = measure(gguf, args)
    print(json.dumps({"model": args.model.name, "n_ctx": args.n_ctx, "chunks": args.chunks, "rows": rows}))


if __name__ == "__main__":
    main()
