"""edgellm and llama.cpp on the same file, with the same threads, in turn: a table and one line of JSON.

    python benchmarks/vs_llama_cpp.py model.gguf [--tests pp512,tg64,tg32@d4096] [--threads 2] [--rounds 3]
                                                 [--llama-bench PATH]...

llama.cpp is the Python package ``xllamacpp`` where it is installed, and every llama-bench binary whose path is given.
Nothing is installed. Each measurement is a process of its own that loads the model, warms up, and runs every test once;
the sides take turns, so that a slow minute of the machine hits all of them, and the median of the rounds counts.

pp512        prompt tokens per second for 512 random tokens, in batches of 512
tg64         decode steps per second over 64 greedy steps behind a prompt of one token
... @ d4096  the same behind 4096 tokens that are in the cache already

edgellm and xllamacpp are measured through their public interface, greedy sampling included; llama-bench leaves
sampling out, which is in its favour.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import re
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

LEAST_ID, MOST_ID = 1000, 20000  # random ids from here: no control tokens in any vocabulary that is worth a benchmark
BATCH = 512
WARM_UP_STEPS = 8


@dataclass(frozen=True)
class Test:
    """``n`` tokens of a prompt read ("pp") or of an answer made ("tg"), behind ``depth`` tokens."""

    kind: str
    n: int
    depth: int = 0

    @classmethod
    def parse(cls, text: str) -> Test:
        """``pp512``, ``tg64`` or ``tg32@d4096``."""
        found = re.fullmatch(r"(pp|tg)([1-9]\d*)(?:@d(\d+))?", text.replace(" ", ""))
        if found is None:
            raise SystemExit(f"{text!r} is no test; write pp512, tg64 or tg32@d4096.")
        return cls(found[1], int(found[2]), int(found[3] or 0))

    @property
    def name(self) -> str:
        """llama-bench's word for it."""
        return f"{self.kind}{self.n}" + (f" @ d{self.depth}" if self.depth else "")

    @property
    def n_prompt(self) -> int:
        """Tokens of the prompt behind the depth."""
        return self.n if self.kind == "pp" else 1

    @property
    def n_steps(self) -> int:
        """Decode steps. The first token of an answer comes out of the prompt and costs none."""
        return 0 if self.kind == "pp" else self.n


class Side(Protocol):
    """A loaded model of one program."""

    def measure(self, prompt: list[int], depth: int, n_steps: int) -> tuple[float, float]:
        """Prompt tokens per second, those of ``depth`` left out, and decode steps per second."""
        ...


class EdgeLLM:
    """edgellm through ``edgellm.load`` and ``stream``."""

    def __init__(self, model: str, n_threads: int, n_ctx: int) -> None:
        import edgellm

        self.llm = edgellm.load(model, n_threads=n_threads, n_ctx=n_ctx, max_tokens_per_step=BATCH)

    def measure(self, prompt: list[int], depth: int, n_steps: int) -> tuple[float, float]:
        if depth:
            self._answer(prompt[:depth], 1)
        timings = self._answer(prompt, n_steps + 1)
        return timings.prompt_tps, timings.generation_tps

    def _answer(self, prompt: list[int], max_tokens: int) -> Any:
        chunks = list(self.llm.stream(prompt, max_tokens=max_tokens, temperature=0, ignore_eos=True))
        timings = chunks[-1].timings
        assert timings.generation_n == max_tokens, "the answer ended early"
        return timings


class XLlamaCpp:
    """llama.cpp through xllamacpp's server object; its own ``timings`` are taken."""

    def __init__(self, model: str, n_threads: int, n_ctx: int) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = model
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_parallel = n_ctx, BATCH, BATCH, 1
        params.n_gpu_layers, params.fit_params = 0, False
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = n_threads
        params.load_mode = xllamacpp.llama_load_mode.LLAMA_LOAD_MODE_MMAP
        params.cache_ram_mib, params.n_ctx_checkpoints, params.warmup, params.verbosity = 0, 0, True, 0
        self.server = xllamacpp.Server(params)

    def measure(self, prompt: list[int], depth: int, n_steps: int) -> tuple[float, float]:
        if depth:
            self._answer(prompt[:depth], 1, True)
        timings = self._answer(prompt, n_steps + 1, bool(depth))
        assert timings["predicted_n"] == n_steps + 1, "the answer ended early"
        assert timings["prompt_n"] == len(prompt) - depth, "the tokens before the prompt were not in the cache"
        # predicted_ms runs from the first token on: it holds n_steps steps, not predicted_n
        return timings["prompt_per_second"], 1e3 * n_steps / timings["predicted_ms"]

    def _answer(self, prompt: list[int], n_predict: int, cache_prompt: bool) -> dict[str, float]:
        answer = self.server.handle_completions(
            {
                "prompt": prompt,
                "n_predict": n_predict,
                "ignore_eos": True,
                "temperature": 0,
                "samplers": [],
                "cache_prompt": cache_prompt,
                "stream": False,
            }
        )
        timings: dict[str, float] = answer["timings"]
        return timings


SIDES = {"edgellm": EdgeLLM, "xllamacpp": XLlamaCpp}


def measure_side(name: str, model: str, tests: list[Test], n_threads: int) -> dict[str, float]:
    """Tokens per second of each test in this process; every prompt is new, so that no cache knows it."""
    n_ctx = max(test.depth + test.n_prompt + test.n_steps for test in tests) + BATCH
    ids = random.Random(os.getpid())

    def prompt(n: int) -> list[int]:
        return [ids.randrange(LEAST_ID, MOST_ID) for _ in range(n)]

    side: Side = SIDES[name](model, n_threads, n_ctx)
    side.measure(prompt(max(test.n_prompt for test in tests)), 0, WARM_UP_STEPS)
    rates = {}
    for test in tests:
        prompt_tps, step_tps = side.measure(prompt(test.depth + test.n_prompt), test.depth, test.n_steps)
        rates[test.name] = prompt_tps if test.kind == "pp" else step_tps
    return rates


def run_side(name: str, model: str, tests: list[Test], n_threads: int) -> dict[str, float]:
    """``measure_side`` in a new process."""
    names = ",".join(test.name for test in tests)
    command = [sys.executable, __file__, model, "--measure", name, "--tests", names, "--threads", str(n_threads)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-2000:]}")
    rates: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return rates


def run_llama_bench(binary: str, model: str, tests: list[Test], n_threads: int) -> dict[str, float]:
    """The same tests by a llama-bench binary, one repetition each."""
    rates = {}
    for test in tests:
        command = [binary, "-m", model, "-t", str(n_threads), "-r", "1", "-o", "json", "-ngl", "0"]
        command += ["-b", str(BATCH), "-ub", str(BATCH), "-d", str(test.depth)]
        command += ["-p", str(test.n if test.kind == "pp" else 0), "-n", str(test.n_steps)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{binary} failed:\n{done.stderr[-2000:]}")
        rates[test.name] = float(json.loads(done.stdout)[0]["avg_ts"])
    return rates


def compare(
    model: str, tests: list[Test], n_threads: int, rounds: int, binaries: list[str]
) -> dict[str, dict[str, list[float]]]:
    """side -> test -> tokens per second of every round."""
    sides = [name for name in SIDES if name == "edgellm" or importlib.util.find_spec(name)]
    samples: dict[str, dict[str, list[float]]] = {}
    for i in range(rounds):
        turn = [*sides, *binaries]
        for name in turn if i % 2 == 0 else reversed(turn):
            print(f"round {i + 1} of {rounds}: {name}", file=sys.stderr, flush=True)
            run = run_llama_bench if name in binaries else run_side
            for test, rate in run(name, model, tests, n_threads).items():
                samples.setdefault(name, {}).setdefault(test, []).append(rate)
    return {name: samples[name] for name in (*sides, *binaries)}


def print_table(samples: dict[str, dict[str, list[float]]], tests: list[Test]) -> None:
    """Medians with the span of the rounds, and edgellm's ratio to every other side."""
    others = [name for name in samples if name != "edgellm"]
    rows = [["test", *samples, *(f"edgellm / {Path(name).name}" for name in others)]]
    for test in tests:
        medians = {name: statistics.median(rates[test.name]) for name, rates in samples.items()}
        spans = {name: f"{min(r[test.name]):.1f}-{max(r[test.name]):.1f}" for name, r in samples.items()}
        row = [test.name, *(f"{medians[name]:.1f} ({spans[name]})" for name in samples)]
        rows.append(row + [f"{medians['edgellm'] / medians[name]:.2f}x" for name in others])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def main() -> None:
    """Read the command line; measure one side, or compare all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a .gguf file, or a name that edgellm knows")
    parser.add_argument("--tests", default="pp512,tg64", help="with commas between (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="of both sides (default: all cores)")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each side (default: %(default)s)")
    parser.add_argument("--llama-bench", action="append", default=[], metavar="PATH", help="a llama-bench binary")
    parser.add_argument("--measure", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()

    from edgellm.catalogue import resolve
    from edgellm.cores import default_threads
    from edgellm.machine import cpu_name

    tests = [Test.parse(text) for text in options.tests.split(",")]
    model, n_threads = str(resolve(options.model)), options.threads or default_threads()
    if options.measure:
        print(json.dumps(measure_side(options.measure, model, tests, n_threads)))
        return
    samples = compare(model, tests, n_threads, options.rounds, options.llama_bench)
    print(f"{Path(model).name}, {cpu_name()}, {n_threads} threads, tokens per second, median of {options.rounds}")
    print_table(samples, tests)
    print(json.dumps({"model": model, "cpu": cpu_name(), "n_threads": n_threads, "samples_ts": samples}))


if __name__ == "__main__":
    main()
