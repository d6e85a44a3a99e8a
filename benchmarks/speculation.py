"""Drafts beside plain decoding and beside llama.cpp's own: a table and one line of JSON.

    python benchmarks/speculation.py [model] [--draft MODEL] [--rounds 3] [--threads 2] [--steps 128] [--kinds simple]
    python benchmarks/speculation.py --ceiling FILE
    python benchmarks/speculation.py --rejected FILE --threads 1

Three texts, greedy: code that is to be written again with a name changed, a long text that is to be summed up, and a
story about nothing that stands in the prompt. Each is answered plainly, with n-grams and with a draft where one is
named, a model or a file made for this one, by edgellm and by llama.cpp (the package ``xllamacpp``, where it is
installed: without drafts, with each of its kinds of n-grams, and with the same draft). The sides take turns, each
loaded anew, and the median of the rounds counts; so does the median of a side's ratios to plain decoding in the same
round. edgellm's answers must be the same with and without drafts; llama.cpp's are compared, and how many of the three
differ is told.

--ceiling FILE says what drafts can bring at best with a model, by the kernels alone: how many steps of one token a step
of n costs (1.4 for 4 tokens is what is wanted), and how much faster answers come whose drafts are all right and free.

--rejected FILE says what a model with states pays for a draft that is right in part: a step that tries drafts and the
step behind it, where states are taken back by the log of rows, beside a log that is not kept, and tokens that are
computed again. Pairs in turn, CPU time with one thread.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
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
Answer = tuple[float, Any, str]  # tokens per second, the tokens or the text, what else is to be told


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


def draft_kind(draft: str) -> str:
    """What llama.cpp calls the kind of a draft."""
    from edgellm.formats.gguf import GGUFFile

    with GGUFFile.open(draft) as gguf:
        return {"eagle3": "DRAFT_EAGLE3", "dflash": "DRAFT_DFLASH"}.get(gguf.architecture, "DRAFT_SIMPLE")


def llama_side(
    model: str, n_threads: int, kind: str | None = None, draft: str | None = None
) -> tuple[Callable[[list[int], int], Answer], Any]:
    """How llama.cpp answers, with drafts of a kind."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = model
    params.n_ctx, params.n_parallel, params.n_gpu_layers, params.fit_params = 4096, 1, 0, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = n_threads
    params.cache_ram_mib, params.n_ctx_checkpoints, params.warmup, params.verbosity = 0, 0, True, 0
    if kind is not None:
        params.speculative.types = [getattr(xllamacpp.common_speculative_type, f"COMMON_SPECULATIVE_TYPE_{kind}")]
    if draft is not None:
        of = params.speculative.draft
        of.mparams.path, of.n_gpu_layers = draft, 0
        of.cpuparams.n_threads = of.cpuparams_batch.n_threads = n_threads
    server = xllamacpp.Server(params)

    def answer(prompt: list[int], n: int) -> Answer:
        # without any sampler it draws by chance, at temperature 0, too
        asked = {"prompt": prompt, "n_predict": n, "ignore_eos": True, "samplers": ["top_k"], "top_k": 1}
        found = server.handle_completions({**asked, "cache_prompt": False, "stream": False})
        times = found["timings"]
        told = f"{times.get('draft_n_accepted', 0)}/{times['draft_n']}" if times.get("draft_n") else ""
        return 1e3 * (n - 1) / times["predicted_ms"], found["choices"][0]["text"], told

    return answer, lambda: None


def sides_of(model: str, draft: str | None, n_threads: int, kinds: Sequence[str]) -> dict[str, Callable[[], Any]]:
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
    sides["llama.cpp"] = lambda: llama_side(model, n_threads)
    for name in kinds:
        kind = f"NGRAM_{name.upper().replace('-', '_')}"
        sides[f"llama.cpp ngram-{name}"] = functools.partial(llama_side, model, n_threads, kind)
    if draft is not None:
        sides["llama.cpp draft"] = lambda: llama_side(model, n_threads, draft_kind(draft), draft)
    return sides


def compare(
    model: str, draft: str | None, n_threads: int, rounds: int, steps: int, kinds: Sequence[str]
) -> dict[str, Any]:
    """Medians of the rates of each side and text, and of their ratios to plain decoding in the same round."""
    from edgellm.formats.gguf import GGUFFile
    from edgellm.tokenizer import Tokenizer

    with GGUFFile.open(model) as gguf:
        tokenizer = Tokenizer.from_gguf(gguf.metadata)
        prompts = {name: [*tokenizer.special.prefix, *tokenizer.encode(text, False)] for name, text in TEXTS.items()}
    rates: dict[str, dict[str, list[float]]] = {}
    told: dict[str, dict[str, str]] = {}
    plain: dict[str, dict[str, Any]] = {"edgellm": {}, "llama.cpp": {}}
    others: dict[str, set[str]] = {}
    for _ in range(rounds):
        for side, opened in sides_of(model, draft, n_threads, kinds).items():
            (answer, close), known = opened(), plain[side.partition(" ")[0]]
            answer(prompts["story"][:8], 8)
            for name, prompt in prompts.items():
                rate, said, more = answer(prompt, steps)
                rates.setdefault(side, {}).setdefault(name, []).append(rate)
                told.setdefault(side, {})[name] = more
                if known.setdefault(name, said) != said:
                    others.setdefault(side, set()).add(name)
                    if side.startswith("edgellm"):
                        raise SystemExit(f"{side}: the answer to {name} is another than without drafts")
            close()
    found: dict[str, Any] = {}
    print(f"| {'side':<22} |" + "".join(f" {name:>22} |" for name in TEXTS))
    print(f"|{'-' * 24}|" + "".join(f"{'-' * 23}:|" for _ in TEXTS))
    for side, of in rates.items():
        base, cells = rates[side.partition(" ")[0]], []
        for name in TEXTS:
            ratio = statistics.median(a / b for a, b in zip(of[name], base[name], strict=True))
            found.setdefault(side, {})[name] = {"rate": statistics.median(of[name]), "ratio": ratio}
            cells.append(f"{statistics.median(of[name]):.1f} {ratio:.2f}x {told[side][name]}")
        print(f"| {side:<22} |" + "".join(f" {cell:>22} |" for cell in cells))
    for side, names in others.items():
        print(f"{side}: another answer than without drafts to {', '.join(sorted(names))}")
    return {"model": model, "tokens_per_second": found, "accepted": told}


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


def rejected(model: str, n_threads: int, rounds: int) -> dict[str, Any]:
    """Milliseconds of a step that tries 3 or 7 drafts and of the one behind it, which has the next token."""
    from edgellm.formats.gguf import GGUFFile
    from edgellm.kernels.cpu.run.executor import CPUExecutor
    from edgellm.kernels.program import Batch
    from edgellm.kernels.row_log import with_log
    from edgellm.models import build_program

    clock = time.thread_time if n_threads == 1 else time.perf_counter
    with GGUFFile.open(model) as gguf:
        program = with_log(build_program(gguf))
        executor = CPUExecutor(program, 16, n_threads)
        tokens = np.random.default_rng(0).integers(0, program.n_vocab, 512)
        executor.run(Batch.single(program, tokens[:256], 0, "last"))

        def step(start: int, n: int, read: int, written: int, *, logged: bool = False) -> Batch:
            batch = Batch.single(program, tokens[start : start + n], start)
            slots = np.array([[read, written]], np.int32)
            tables = [slots if g.kind == "state" else t for g, t in zip(program.groups, batch.tables, strict=True)]
            return dataclasses.replace(batch, tables=tuple(tables), logged=logged)

        def with_replay(n: int, right: int) -> None:
            executor.run(tried := step(256, n, 0, 1, logged=True))
            executor.replay(tried, [right])
            executor.run(step(256 + right, 1, 1, 2))

        def computed_again(n: int, right: int) -> None:
            executor.run(step(256, n, 0, 1))
            executor.run(step(256, right + 1, 0, 2))

        found: dict[str, tuple[float, float]] = {}
        for n, right in ((4, 1), (4, 2), (4, 3), (8, 1), (8, 4), (8, 7)):
            times: tuple[list[float], list[float]] = [], []
            for _ in range(3 * rounds):
                for way, of in zip((with_replay, computed_again), times, strict=True):
                    began = clock()
                    way(n, right)
                    of.append(1e3 * (clock() - began))
            a, b = map(statistics.median, times)
            ratio = statistics.median(y / x for x, y in zip(*times, strict=True))
            print(f"{right} of {n} tokens right: {a:7.2f} ms with the log, {b:7.2f} computed again, {ratio:.2f}x")
            found[f"{right}/{n}"] = a, b
        executor.close()
    return {"model": model, "milliseconds": found}


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--draft")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=128)
    parser.add_argument("--kinds", default="simple,mod,cache,map-k", help="llama.cpp's n-grams")
    parser.add_argument("--ceiling", metavar="FILE")
    parser.add_argument("--rejected", metavar="FILE")
    given = parser.parse_args(arguments)
    if given.ceiling:
        print(json.dumps(ceiling(given.ceiling, given.threads, given.rounds)))
        return
    if given.rejected:
        print(json.dumps(rejected(given.rejected, given.threads, given.rounds)))
        return
    from edgellm.store import catalogue

    model = str(catalogue.fetched(given.model, lambda done, total: None))
    kinds = [kind for kind in given.kinds.split(",") if kind]
    print(json.dumps(compare(model, given.draft, given.threads, given.rounds, given.steps, kinds)))


if __name__ == "__main__":
    main()
