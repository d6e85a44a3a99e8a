"""Texts to vectors on the CPU: edgellm, llama.cpp and sentence-transformers, the same model and threads, in turn.

    python benchmarks/embeddings.py CHECKPOINT FILE.gguf... [--short 1000] [--long 50] [--threads 2] [--rounds 3]

CHECKPOINT is a folder that sentence-transformers reads, such as all-MiniLM-L6-v2, and the files are conversions of it
(``edgellm convert``, ``edgellm quantize``); llama.cpp (the package ``xllamacpp``) runs the same files. Each side gets
all texts in one call, after a warm-up: short ones of 2 to 24 words, and long ones that nearly fill the context. Medians
of the rounds and ratios; the least cosine to sentence-transformers' vectors says that all computed the same. One line
of JSON ends it. sentence-transformers is measured in float32, its usual form on a CPU, and stands beside every file.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

WORDS = (
    "the of and to in is was for that on as with by at from his it an be are which this had not but have one their "
    "were river capital country language machine vector question answer history water music science weather market"
)
Embed = Callable[[list[str]], np.ndarray]


def texts_of(n: int, least: int, most: int, seed: int) -> list[str]:
    """Random words."""
    chance = random.Random(seed)
    return [" ".join(chance.choices(WORDS.split(), k=chance.randint(least, most))) for _ in range(n)]


@contextlib.contextmanager
def edgellm_side(file: Path, threads: int) -> Iterator[Embed]:
    """This program."""
    import edgellm

    with edgellm.load(file, n_threads=threads) as llm:
        yield lambda texts: llm.embed(texts, truncate=True)


@contextlib.contextmanager
def llama_side(file: Path, threads: int) -> Iterator[Embed]:
    """llama-server in this process, sixteen texts at once."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.embedding, params.embd_normalize = True, 2
    params.n_ctx, params.n_batch, params.n_ubatch, params.n_parallel = 16 * 512, 2048, 2048, 16
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.warmup = True
    servers = [xllamacpp.Server(params)]

    def embed(texts: list[str]) -> np.ndarray:
        told = servers[0].handle_embeddings({"input": texts, "model": "x"})
        rows = sorted(told["data"], key=lambda one: one["index"])
        return np.array([one["embedding"] for one in rows], np.float32)

    yield embed
    servers.clear()  # it ends with its last owner


@contextlib.contextmanager
def transformers_side(folder: Path, threads: int) -> Iterator[Embed]:
    """Batches of 32 by length, as its users have them."""
    import torch
    from sentence_transformers import SentenceTransformer

    torch.set_num_threads(threads)
    model = SentenceTransformer(str(folder), device="cpu")
    model.max_seq_length = 512
    yield lambda texts: model.encode(texts, batch_size=32, normalize_embeddings=True, show_progress_bar=False)


def measure(sides: dict[str, Embed], texts: list[str], rounds: int) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """The median seconds of each side, which take turns, and its vectors."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    vectors = {name: embed(texts[: max(8, len(texts) // 10)]) for name, embed in sides.items()}  # warm up
    for _ in range(rounds):
        for name, embed in sides.items():
            started = time.perf_counter()
            vectors[name] = embed(texts)
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(times) for name, times in seconds.items()}, vectors


def report(kind: str, texts: list[str], seconds: dict[str, float], vectors: dict[str, np.ndarray]) -> dict[str, Any]:
    """Print a line for each side; the same as numbers."""
    told: dict[str, Any] = {"test": kind}
    judge = vectors.get("sentence-transformers")
    for name, s in seconds.items():
        cosine = float((vectors[name] * judge).sum(axis=1).min()) if judge is not None else float("nan")
        ratio = s / seconds["edgellm"]
        print(
            f"  {kind:14} {name:22} {len(texts) / s:9.1f} texts/s  {ratio:5.2f} x edgellm's time  cosine {cosine:.6f}"
        )
        told |= {name: len(texts) / s, f"{name} ratio": ratio}
    return told


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("files", type=Path, nargs="+")
    for name, default in (("short", 1000), ("long", 50), ("threads", 2), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    tests = {"short": texts_of(options.short, 2, 24, 1), "long": texts_of(options.long, 420, 480, 2)}
    results = []
    for file in options.files:
        with contextlib.ExitStack() as stack:
            print(f"{file.name}, {options.threads} threads, {options.rounds} rounds")
            sides = {"edgellm": stack.enter_context(edgellm_side(file, options.threads))}
            if importlib.util.find_spec("xllamacpp"):
                sides["llama.cpp"] = stack.enter_context(llama_side(file, options.threads))
            if importlib.util.find_spec("sentence_transformers"):
                judge = stack.enter_context(transformers_side(options.checkpoint, options.threads))
                sides["sentence-transformers"] = judge
            for name, texts in tests.items():
                results.append({"file": file.name} | report(name, texts, *measure(sides, texts, options.rounds)))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
