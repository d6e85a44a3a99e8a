"""What keys and values in fewer bits cost: perplexity, and how far the answers stand from those of a float32 cache.

    python benchmarks/cache_types.py model.gguf text.txt [-c 512] [--chunks 4] [--types q8_0,q4_0] [--llama-cpp 32]

A row for each type, of keys and values alike: bytes of a token, perplexity, the mean Kullback-Leibler divergence from
the model with a float32 cache, and that without the rotation. ``--llama-cpp N`` adds llama.cpp's divergence from
itself, with the same types, over the last N tokens of the first chunk, and ours over the same. The last line is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from edgellm.formats.gguf import GGUFFile
    from edgellm.kernels.program import Program
    from edgellm.measure.perplexity import Chunk

TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "iq4_nl", "q4_1", "q4_0")

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
    weight = np.exp(base)
    return np.where(weight > 0, weight * (base - found), 0).sum(axis=-1)


def answers(program: Program, chunk: Chunk, n_ctx: int, n_threads: int) -> np.ndarray:
    """Logits of the scored rows of a chunk."""
    from edgellm.kernels.executors import open_executor
    from edgellm.kernels.program import Batch

    executor = open_executor("cpu", program, -(-n_ctx // 32), n_threads=n_threads, max_tokens=n_ctx)
    with contextlib.closing(executor):
        batch = Batch.single(program, chunk.ids)
        batch.outputs[: chunk.first] = False
        return executor.run(batch)[:-1].copy()


def llama_cpp(path: Path, ids: list[int], n: int, n_vocab: int, name: str, letter: int) -> np.ndarray:
    """Log-probabilities (n, n_vocab) of llama.cpp behind the last n beginnings of ids."""
    told = [str(path), json.dumps(ids), str(n), str(n_vocab), name, str(letter)]
    done = subprocess.run([sys.executable, "-c", LLAMA_CPP, *told], capture_output=True, text=True, timeout=1800)
    rows = [json.loads(line[4:]) for line in done.stdout.splitlines() if line.startswith("ROW ")]
    if len(rows) != n:
        raise SystemExit(done.stderr[-2000:])
    return np.array(rows)


def measure(gguf: GGUFFile, args: argparse.Namespace) -> list[dict[str, object]]:
    """A row for each type."""
    from edgellm.kernels.typed_cache import with_cache_types
    from edgellm.measure.perplexity import cut
    from edgellm.models import build_program
    from edgellm.tokenizer import Tokenizer

    program, tokenizer = build_program(gguf), Tokenizer.from_gguf(gguf.metadata)
    ids = tokenizer.encode(args.text.read_text("utf-8"), add_special=True)
    chunks = cut(ids, list(tokenizer.special.prefix[:1]), args.n_ctx, args.chunks)
    base = [log_softmax(answers(with_cache_types(program, "f32", "f32"), c, args.n_ctx, args.threads)) for c in chunks]
    letter, first = tokenizer.encode("a", add_special=False)[0], list(map(int, chunks[0].ids))
    theirs = None
    if args.llama_cpp:
        theirs = llama_cpp(args.model, first, args.llama_cpp, program.n_vocab, "f32", letter)
    rows: list[dict[str, object]] = []
    for name in args.types.split(","):
        row: dict[str, object] = {"type": name}
        for rotates in (True, False):
            typed = with_cache_types(program, name, name, rotates=rotates)
            found = [log_softmax(answers(typed, chunk, args.n_ctx, args.threads)) for chunk in chunks]
            kl = np.concatenate([divergence(one, other) for one, other in zip(base, found, strict=True)])
            row["kl" if rotates else "kl_not_rotated"] = float(kl.mean())
            if rotates:
                row["token_nbytes"] = sum(layer.seen_nbytes(1) for layer in typed.cache_layers)
                losses = [-f[np.arange(len(f)), c.targets] for f, c in zip(found, chunks, strict=True)]
                row["perplexity"] = float(np.exp(np.concatenate(losses).mean()))
                if theirs is not None:
                    last = slice(-args.llama_cpp, None)
                    row["kl_last"] = float(divergence(base[0][last], found[0][last]).mean())
                    own = llama_cpp(args.model, first, args.llama_cpp, program.n_vocab, name, letter)
                    row["kl_llama_cpp"] = float(divergence(theirs, own).mean())
        rows.append(row)
        print(
            " | ".join(f"{key} {value:.3g}" if isinstance(value, float) else str(value) for key, value in row.items())
        )
        sys.stdout.flush()
    return rows


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("-c", dest="n_ctx", type=int, default=512)
    parser.add_argument("--chunks", type=int, default=4)
    parser.add_argument("--types", default=",".join(TYPES[1:]))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--llama-cpp", type=int, default=0, metavar="N")
    args = parser.parse_args()
    from edgellm.formats.gguf import GGUFFile

    with contextlib.closing(GGUFFile.open(args.model)) as gguf:
        rows = measure(gguf, args)
    print(json.dumps({"model": args.model.name, "n_ctx": args.n_ctx, "chunks": args.chunks, "rows": rows}))


if __name__ == "__main__":
    main()
