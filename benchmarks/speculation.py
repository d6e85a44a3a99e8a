"""Drafts beside plain decoding and beside llama.cpp's own: a table and one line of JSON.

    python benchmarks/speculation.py [model] [--draft MODEL] [--rounds 3] [--threads 2] [--steps 128] [--ceiling FILE]

Three texts, greedy: code that is to be written again with a name changed, a long text that is to be summed up, and a
story about nothing that stands in the prompt. Each is answered plainly, with n-grams and with a draft model where one
is named, by edgellm and by llama.cpp (the package ``xllamacpp``, where it is installed: without drafts, and its
ngram-simple and ngram-mod). The sides take turns, each loaded anew, and the median of the rounds counts. edgellm's
answers must be the same with and without drafts.

--ceiling FILE says what drafts can bring at best with a model, by the kernels alone: how many steps of one token a step
of n costs (1.4 for 4 tokens is what is wanted), and how much faster answers come whose drafts are all right and free.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent.parent
SIZES = (1, 2, 4, 8, 16)
CODE = "\n".join((HERE / "formats" / "stored_numbers.py").read_text("utf-8").splitlines()[:90])
LONG = (HERE / "LICENSE").read_text("utf-8")[:5000]
TASK = "The same file, where `values` is called `numbers`:"
TEXTS = {
    "edit": f"Here is a file:\n\n```python\n{CODE}\n```\n\n{TASK}\n\n```python\n",
    "summary": f"{LONG}\n\nIn short, this licence says the following. ",
    "story": "Once upon a time, in a village by the sea, there lived an old clockmaker who",
}
Answer = tuple[float, list[int], str]  # tokens per second, the tokens, what else is to be told


def edgellm_side(model: str, n_threads: int, **options: Any) -> tuple[Callable[[list[int], int], Answer], Any]:
    """How edgellm answers, and what closes it."""
    import edgellm

    llm = edgellm.load(model, n_threads=n_threads, n_ctx=4096, **options)

    def answer(prompt: list[int], n: int) -> Answer:
        found = llm.generate(prompt, max_tokens=n, temperature=0, ignore_eos=True)
        times = found.timings
        told = f"{times.accepted_n}/{times.drafted_n}" if times.drafted_n else ""
        return times.generation_tps, list(found.tokens), told

    return answer, llm.close


def llama_side(model: str, n_threads: int, kind: str | None = None) -> tuple[Callable[[list[int], int], Answer], Any]:
    """How llama.cpp answers, with drafts of a kind."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = model
    params.n_ctx, params.n_parallel, params.n_gpu_layers, params.fit_params = 4096, 1, 0, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = n_threads
    params.cache_ram_mib, params.n_ctx_checkpoints, params.warmup, params.verbosity = 0, 0, True, 0
    if kind is not None:
        params.speculative.types = [getattr(xllamacpp.common_speculative_type, f"COMMON_SPECULATIVE_TYPE_{kind}")]
    server = xllamacpp.Server(params)

    def answer(prompt: list[int], n: int) -> Answer:
        asked = {"prompt": prompt, "n_predict": n, "ignore_eos": True, "temperature": 0, "samplers": []}
        found = server.handle_completions({**asked, "cache_prompt": False, "stream": False, "return_tokens": True})
        times = found["timings"]
        told = f"{times.get('draft_n_accepted', 0)}/{times['draft_n']}" if times.get("draft_n") else ""
        return 1e3 * (n - 1) / times["predicted_ms"], list(found.get("tokens", [])), told

    return answer, lambda: None


def sides_of(model: str, draft: str | None, n_threads: int) -> dict[str, Callable[[], Any]]:
    """What is compared, by name."""
    sides: dict[str, Callable[[], Any]] = {
        "edgellm": lambda: edgellm_side(model, n_threads),
        "edgellm ngram": lambda: edgellm_side(model, n_threads, speculate="ngram"),
    }
    if draft is not None:
        sides["edgellm draft"] = lambda: edgellm_side(model, n_threads, draft=draft)
    try:
        import xllamacpp  # noqa: F401
    except ImportError:
        return sides
    for name, kind in (("", None), (" ngram-simple", "NGRAM_SIMPLE"), (" ngram-mod", "NGRAM_MOD")):
        sides[f"llama.cpp{name}"] = lambda kind=kind: llama_side(model, n_threads, kind)
    return sides


def compare(model: str, draft: str | None, n_threads: int, rounds: int, steps: int) -> dict[str, Any]:
    """Medians of the rates of each side and text."""
    from edgellm.formats.gguf import GGUFFile
    from edgellm.tokenizer import Tokenizer

    with GGUFFile.open(model) as gguf:
        tokenizer = Tokenizer.from_gguf(gguf.metadata)
        prompts = {name: [*tokenizer.special.prefix, *tokenizer.encode(text, False)] for name, text in TEXTS.items()}
    rates: dict[str, dict[str, list[float]]] = {}
    told: dict[str, dict[str, str]] = {}
    plain: dict[str, list[int]] = {}
    for _ in range(rounds):
        for side, opened in sides_of(model, draft, n_threads).items():
            answer, close = opened()
            answer(prompts["story"][:8], 8)
            for name, prompt in prompts.items():
                rate, tokens, more = answer(prompt, steps)
                rates.setdefault(side, {}).setdefault(name, []).append(rate)
                told.setdefault(side, {})[name] = more
                if side.startswith("edgellm") and plain.setdefault(name, tokens) != tokens:
                    raise SystemExit(f"{side}: the answer to {name} is another than without drafts")
            close()
    medians = {side: {name: statistics.median(found) for name, found in of.items()} for side, of in rates.items()}
    print(f"| {'side':<22} |" + "".join(f" {name:>22} |" for name in TEXTS))
    print(f"|{'-' * 24}|" + "".join(f"{'-' * 23}:|" for _ in TEXTS))
    for side, of in medians.items():
        base = medians["edgellm" if side.startswith("edgellm") else "llama.cpp"]
        cells = [f"{of[name]:.1f} {of[name] / base[name]:.2f}x {told[side][name]}" for name in TEXTS]
        print(f"| {side:<22} |" + "".join(f" {cell:>22} |" for cell in cells))
    return {"model": model, "tokens_per_second": medians, "accepted": told}


def ceiling(model: str, n_threads: int, rounds: int) -> dict[str, Any]:
    """Seconds of steps of n tokens of one sequence that all want logits, behind 256 tokens."""
    from edgellm.formats.gguf import GGUFFile
    from edgellm.kernels.executors import open_executor
    from edgellm.kernels.program import Batch
    from edgellm.models import build_program

    with GGUFFile.open(model) as gguf:
        program = build_program(gguf)
        executor = open_executor("cpu", program, 16, n_threads=n_threads)
        tokens = np.random.default_rng(0).integers(0, program.n_vocab, 512)
        executor.run(Batch.single(program, tokens[:256], 0, "last"))
        seconds: dict[int, list[float]] = {}
        for _ in range(3 * rounds):
            for n in SIZES:
                batch = Batch.single(program, tokens[256 : 256 + n], 256)
                executor.run(batch)
                began = time.perf_counter()
                executor.run(batch)
                seconds.setdefault(n, []).append(time.perf_counter() - began)
        executor.close()
    best = {n: statistics.median(found) for n, found in seconds.items()}
    steps = {n: best[n] / best[1] for n in SIZES}
    for n in SIZES:
        print(
            f"{n:>3} tokens a step: {1e3 * best[n]:7.2f} ms, {steps[n]:.2f} steps of one, {n / steps[n]:.2f}x at best"
        )
    return {"model": model, "steps_of_one": steps}


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--draft")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=128)
    parser.add_argument("--ceiling", metavar="FILE")
    given = parser.parse_args(arguments)
    if given.ceiling:
        print(json.dumps(ceiling(given.ceiling, given.threads, given.rounds)))
        return
    from edgellm.store import catalogue

    model = str(catalogue.fetched(given.model, lambda done, total: None))
    print(json.dumps(compare(model, given.draft, given.threads, given.rounds, given.steps)))


if __name__ == "__main__":
    main()
