"""edgellm and llama.cpp on the same file, with the same threads, in turn: a table and one line of JSON.

    python benchmarks/vs_llama_cpp.py [model.gguf ...] [--tests all] [--threads 2] [--rounds 5] [--llama-bench PATH]...

Without a model it measures those sizes that people run, 1B and 4B with random weights (random_model.py; 4.6 GB in
edgellm's cache folder), and SmolLM2.

llama.cpp is the Python package ``xllamacpp`` where it is installed, and every llama-bench binary whose path is given.
Nothing is installed. Each measurement is a process of its own that loads the model, warms up, and runs every test once;
the sides take turns, so that a slow minute of the machine hits all of them, and the median of the rounds counts.

pp512        prompt tokens per second for 512 random tokens, in batches of 512
tg64         decode steps per second over 64 greedy steps behind a prompt of one token
... @ d4096  the same behind 4096 tokens that are in the cache already
16x128+64    16 requests at once, each with 128 tokens of prompt and 64 of answer: tokens of answers per second, from
             the first request to the last token
start        seconds from the start of a process to the first token behind a prompt of 8, the file in the page cache
cold         the same with no compiled kernels (edgellm only has such a thing)
memory       peak resident MiB of a process that reads 512 tokens and makes 64; the mapped file counts

edgellm and xllamacpp are measured through their public interface, greedy sampling included; llama-bench leaves
sampling out, which is in its favour, and knows pp and tg only.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

LEAST_ID, MOST_ID = 1000, 20000  # random ids from here: no control tokens in any vocabulary that is worth a benchmark
RANDOM_MODELS = (("1b", "Q4_K_M"), ("1b", "Q8_0"), ("4b", "Q4_K_M"))
BATCH = 512
WARM_UP_STEPS = 8
START_PROMPT = 8
ALL_TESTS = "pp512,tg64,tg32@d4096,16x128+64,start,cold,memory"
UNITS = {"pp": "t/s", "tg": "t/s", "streams": "t/s", "start": "s", "cold": "s", "memory": "MiB"}


@dataclass(frozen=True)
class Test:
    """``n`` tokens of a prompt read ("pp") or of an answer made ("tg"), behind ``depth`` tokens, or another kind.

    streams   requests at once, ``n`` tokens of answer behind ``n_prompt`` each
    """

    kind: str
    n: int = 0
    depth: int = 0
    streams: int = 1
    stream_prompt: int = 0

    @classmethod
    def parse(cls, text: str) -> Test:
        """``pp512``, ``tg64``, ``tg32@d4096``, ``16x128+64``, ``start``, ``cold`` or ``memory``."""
        text = text.replace(" ", "")
        if found := re.fullmatch(r"(pp|tg)([1-9]\d*)(?:@d(\d+))?", text):
            return cls(found[1], int(found[2]), int(found[3] or 0))
        if found := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)\+([1-9]\d*)", text):
            return cls("streams", int(found[3]), streams=int(found[1]), stream_prompt=int(found[2]))
        if text in ("start", "cold", "memory"):
            return cls(text)
        raise SystemExit(f"{text!r} is no test; write pp512, tg64, tg32@d4096, 16x128+64, start, cold or memory.")

    @property
    def name(self) -> str:
        """llama-bench's word for it, where it has one."""
        if self.kind == "streams":
            return f"{self.streams}x{self.stream_prompt}+{self.n}"
        return f"{self.kind}{self.n or ''}" + (f" @ d{self.depth}" if self.depth else "")

    @property
    def is_rate(self) -> bool:
        """Whether it is a rate of one request, which several tests can share a process for."""
        return self.kind in ("pp", "tg")

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

    def answer_all(self, prompts: list[list[int]], n: int) -> None:
        """All prompts at once, n tokens of answer to each."""
        ...


class EdgeLLM:
    """edgellm through ``edgellm.load`` and ``stream``."""

    def __init__(self, model: str, n_threads: int, n_ctx: int, n_parallel: int = 1) -> None:
        import edgellm

        self.llm = edgellm.load(
            model, n_threads=n_threads, n_ctx=n_ctx, n_parallel=n_parallel, max_tokens_per_step=BATCH
        )

    def answer_all(self, prompts: list[list[int]], n: int) -> None:
        at_once(lambda prompt: self._answer(prompt, n), prompts)

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

    def __init__(self, model: str, n_threads: int, n_ctx: int, n_parallel: int = 1) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = model
        params.n_ctx, params.n_parallel = n_ctx * n_parallel, n_parallel
        params.n_batch, params.n_ubatch = BATCH, BATCH
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

    def answer_all(self, prompts: list[list[int]], n: int) -> None:
        at_once(lambda prompt: self._answer(prompt, n, False), prompts)

    def _answer(self, prompt: list[int], n_predict: int, cache_prompt: bool) -> dict[str, float]:
        answer = self.server.handle_completions(
            {
                "prompt": prompt,
                "n_predict": n_predict,
                "ignore_eos": True,
                "samplers": ["top_k"],  # without any it draws by chance from all tokens, at temperature 0, too
                "top_k": 1,
                "cache_prompt": cache_prompt,
                "stream": False,
            }
        )
        timings: dict[str, float] = answer["timings"]
        return timings


SIDES: dict[str, Callable[..., Side]] = {"edgellm": EdgeLLM, "xllamacpp": XLlamaCpp}


def at_once(answer: Callable[[list[int]], Any], prompts: list[list[int]]) -> None:
    """``answer`` for every prompt, each on a thread of its own, until all are done."""
    threads = [threading.Thread(target=answer, args=(prompt,)) for prompt in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def measure_side(name: str, model: str, tests: list[Test], n_threads: int) -> dict[str, float]:
    """The result of each test in this process; every prompt is new, so that no cache knows it."""
    ids = random.Random(os.getpid())

    def prompt(n: int) -> list[int]:
        return [ids.randrange(LEAST_ID, MOST_ID) for _ in range(n)]

    test = tests[0]
    if test.kind in ("start", "cold"):
        SIDES[name](model, n_threads, BATCH).measure(prompt(START_PROMPT), 0, 0)
        return {test.name: time.time()}  # whoever started this process knows when
    if test.kind == "memory":
        SIDES[name](model, n_threads, 2 * BATCH).measure(prompt(512), 0, 64)
        return {test.name: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
    if test.kind == "streams":
        side = SIDES[name](model, n_threads, test.stream_prompt + test.n + 64, test.streams)
        side.answer_all([prompt(test.stream_prompt) for _ in range(test.streams)], WARM_UP_STEPS)
        prompts = [prompt(test.stream_prompt) for _ in range(test.streams)]
        started = time.perf_counter()
        side.answer_all(prompts, test.n)
        return {test.name: test.streams * test.n / (time.perf_counter() - started)}
    side = SIDES[name](model, n_threads, max(t.depth + t.n_prompt + t.n_steps for t in tests) + BATCH)
    side.measure(prompt(max(t.n_prompt for t in tests)), 0, WARM_UP_STEPS)
    rates = {}
    for t in tests:
        prompt_tps, step_tps = side.measure(prompt(t.depth + t.n_prompt), t.depth, t.n_steps)
        rates[t.name] = prompt_tps if t.kind == "pp" else step_tps
    return rates


def run_side(name: str, model: str, tests: list[Test], n_threads: int) -> dict[str, float]:
    """``measure_side`` in new processes: one for all rates of a single request, one for each other test."""
    rates = [test for test in tests if test.is_rate]
    results: dict[str, float] = {}
    for group in ([rates] if rates else []) + [[test] for test in tests if not test.is_rate]:
        if group[0].kind == "cold" and name != "edgellm":
            continue
        with tempfile.TemporaryDirectory() as empty:
            cold = {"EDGELLM_KERNEL_CACHE": empty} if group[0].kind == "cold" else {}
            names = ",".join(test.name for test in group)
            command = [
                sys.executable,
                __file__,
                model,
                "--measure",
                name,
                "--tests",
                names,
                "--threads",
                str(n_threads),
            ]
            started = time.time()
            done = subprocess.run(command, capture_output=True, text=True, env=os.environ | cold)
        if done.returncode:
            raise SystemExit(f"{name} failed:\n{done.stderr[-2000:]}")
        found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
        results |= {key: value - started if key in ("start", "cold") else value for key, value in found.items()}
    return results


def run_llama_bench(binary: str, model: str, tests: list[Test], n_threads: int) -> dict[str, float]:
    """The same tests by a llama-bench binary, one repetition each."""
    rates = {}
    for test in [test for test in tests if test.is_rate]:
        command = [binary, "-m", model, "-t", str(n_threads), "-r", "1", "-o", "json", "-ngl", "0"]
        command += ["-b", str(BATCH), "-ub", str(BATCH)]
        command += ["-d", str(test.depth)] if test.depth else []  # ik_llama.cpp's has no -d
        command += ["-p", str(test.n if test.kind == "pp" else 0), "-n", str(test.n_steps)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{binary} failed:\n{done.stderr[-2000:]}")
        rates[test.name] = float(json.loads(done.stdout)[0]["avg_ts"])
    return rates


def compare(
    model: str, tests: list[Test], n_threads: int, rounds: int, binaries: list[str]
) -> dict[str, dict[str, list[float]]]:
    """side -> test -> result of every round."""
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
    """Medians with the span of the rounds, and how many times better edgellm is than every other side."""
    others = [name for name in samples if name != "edgellm"]
    rows = [["test", *samples, *(f"better than {Path(name).name}" for name in others)]]
    for test in tests:
        row, medians = [f"{test.name} [{UNITS[test.kind]}]"], {}
        for name, results in samples.items():
            values = results.get(test.name)
            if values is None:
                row.append("-")
                continue
            medians[name] = statistics.median(values)
            digits = 2 if UNITS[test.kind] == "s" else 1
            row.append(f"{medians[name]:.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})")
        for name in others:
            if name not in medians:
                row.append("-")
                continue
            ratio = medians["edgellm"] / medians[name]
            row.append(f"{ratio if UNITS[test.kind] == 't/s' else 1 / ratio:.2f}x")
        rows.append(row)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def usual_models() -> list[str]:
    """The files of RANDOM_MODELS, written now if they are not there, and the default model."""
    from random_model import write_random_model

    from edgellm.machine.paths import cache_dir
    from edgellm.store import DEFAULT_MODEL
    from edgellm.store.catalogue import fetched

    folder = cache_dir() / "benchmarks"
    folder.mkdir(parents=True, exist_ok=True)
    paths = {folder / f"random-{shape}-{mix.lower()}.gguf": (shape, mix) for shape, mix in RANDOM_MODELS}
    for path, (shape, mix) in paths.items():
        if not path.exists():
            print(f"writing {path}", file=sys.stderr, flush=True)
            write_random_model(shape, mix, path)
    return [*(str(path) for path in paths), str(fetched(DEFAULT_MODEL))]


def main() -> None:
    """Read the command line; measure one side, or compare all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="model", help="a .gguf file, or a name that edgellm knows")
    parser.add_argument("--tests", default="pp512,tg64", help="with commas between, or all (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="of both sides (default: all cores)")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each side (default: %(default)s)")
    parser.add_argument("--llama-bench", action="append", default=[], metavar="PATH", help="a llama-bench binary")
    parser.add_argument("--measure", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()

    from edgellm.machine.cores import default_threads
    from edgellm.machine.cpu import cpu_name
    from edgellm.store.catalogue import fetched

    listed = ALL_TESTS if options.tests == "all" else options.tests
    tests, n_threads = [Test.parse(text) for text in listed.split(",")], options.threads or default_threads()
    if options.measure:
        print(json.dumps(measure_side(options.measure, options.models[0], tests, n_threads)))
        return
    results = []
    for model in [str(fetched(name)) for name in options.models] or usual_models():
        samples = compare(model, tests, n_threads, options.rounds, options.llama_bench)
        print(f"{Path(model).name}, {cpu_name()}, {n_threads} threads, median of {options.rounds} (least-most)")
        print_table(samples, tests)
        results.append({"model": model, "cpu": cpu_name(), "n_threads": n_threads, "samples": samples})
    print(json.dumps(results))


if __name__ == "__main__":
    main()
