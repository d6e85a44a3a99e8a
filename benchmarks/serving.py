"""edgellm serve and llama.cpp's own server on the same file, asked over HTTP, in turn: a table and a line of JSON.

    python benchmarks/serving.py [model.gguf] [--threads 2] [--rounds 3] [--clients 1,4,16,32] [--tokens 64]

llama.cpp's server is the one in the Python package ``xllamacpp``. Each server is a process of its own; the sides take
turns, and the median of the rounds counts. Clients are threads of this program, each with a connection of its own: it
runs on the cores of the servers, which is the same for both. The third side is edgellm without a server, asked by as
many threads through ``llm.stream``: what serving costs.

c4 t/s      tokens of answers per second of 4 clients that ask at once, from the first request to the last token
c4 first    seconds to the first token, the mean over the clients
prefix      seconds to the first token of a request with a prefix of 2,000 tokens, new to the server and then known
side        seconds to the first token of a short request while a prompt of 2,000 tokens is being read
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import random
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgellm.llm import LLM

WORDS = (
    *("river", "stone", "garden", "winter", "engine", "paper", "cloud", "market"),
    *("window", "forest", "silver", "morning", "bridge", "letter"),
)
CONTEXT = 3072  # tokens of each client
PREFIX_WORDS = 1950

LLAMA = """
import sys, time, xllamacpp
path, threads, parallel, context = sys.argv[1], *map(int, sys.argv[2:5])
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.port = path, parallel * context, parallel, 0
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
params.n_gpu_layers, params.warmup = 0, True
server = xllamacpp.Server(params)
print(" at " + server.listening_address + "/v1", flush=True)
time.sleep(1e6)
"""


Ask = Callable[[str, int], tuple[float, int]]
"""From a prompt and a number of tokens to the seconds to the first token, and how many came."""


@contextlib.contextmanager
def running(side: str, model: str, threads: int, parallel: int) -> Iterator[Ask]:
    """One side, ready to be asked."""
    if side == "in process":
        import edgellm

        with edgellm.load(model, n_ctx=CONTEXT, n_threads=threads, n_parallel=parallel) as llm:
            llm.engine.scheduler.interactive = True  # as a server has it
            yield partial(ask_library, llm)
        return
    if side == "edgellm":
        command = [sys.executable, "-m", "edgellm", "serve", model, "--port", "0", "-t", str(threads)]
        command += ["-c", str(CONTEXT), "-np", str(parallel)]
    else:
        command = [sys.executable, "-c", LLAMA, model, str(threads), str(parallel), str(CONTEXT)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    try:
        while " at http" not in (line := process.stdout.readline()):
            if not line:
                raise SystemExit(f"{side} did not start: {process.wait()}")
        host, _, port = line.split(" at http://")[1].split("/")[0].rpartition(":")
        yield partial(ask, (host, int(port)))
    finally:
        process.kill()
        process.wait()


def ask(address: tuple[str, int], prompt: str, n: int) -> tuple[float, int]:
    """Seconds to the first token of a streamed chat, and how many came."""
    body = {"messages": [{"role": "user", "content": prompt}], "max_tokens": n, "stream": True, "temperature": 0}
    connection = http.client.HTTPConnection(*address, timeout=600)
    started, first, count = time.perf_counter(), 0.0, 0
    data = json.dumps({**body, "ignore_eos": True, "stream_options": {"include_usage": True}}).encode()
    connection.request("POST", "/v1/chat/completions", data, {"Content-Type": "application/json"})
    reply = connection.getresponse()
    if reply.status != 200:
        raise SystemExit(f"HTTP {reply.status}: {reply.read()[:300]!r}")
    for line in reply:
        if line.startswith(b"data: {"):
            chunk = json.loads(line[6:])
            if not first and any(choice["delta"].get("content") for choice in chunk["choices"]):
                first = time.perf_counter() - started
            count = (chunk.get("usage") or {}).get("completion_tokens", count)
    connection.close()
    return first, count


def ask_library(llm: LLM, prompt: str, n: int) -> tuple[float, int]:
    """The same of a model in this process."""
    started, first = time.perf_counter(), 0.0
    messages = [{"role": "user", "content": prompt}]
    for chunk in llm.stream(messages, temperature=0, max_tokens=n, ignore_eos=True):
        if not first and chunk.text:
            first = time.perf_counter() - started
    return first, chunk.timings.generation_n


def text(dice: random.Random, n: int) -> str:
    """So many words that no cache knows."""
    return " ".join(dice.choices(WORDS, k=n))


def together(ask: Ask, prompts: list[str], n: int) -> tuple[float, float]:
    """Tokens per second over all, and the mean of the seconds to the first."""
    got: list[tuple[float, int]] = []
    threads = [threading.Thread(target=lambda one=one: got.append(ask(one, n))) for one in prompts]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - started
    return sum(count for _, count in got) / seconds, statistics.mean(first for first, _ in got)


def measured(ask: Ask, clients: list[int], n: int, dice: random.Random) -> dict[str, float]:
    """One round."""
    ask(text(dice, 40), 8)
    row: dict[str, float] = {}
    for number in clients:
        row[f"c{number} t/s"], row[f"c{number} first"] = together(ask, [text(dice, 100) for _ in range(number)], n)
    prefix = text(dice, PREFIX_WORDS)
    row["prefix new"] = ask(f"{prefix}. {text(dice, 8)}?", 4)[0]
    row["prefix known"] = ask(f"{prefix}. {text(dice, 8)}?", 4)[0]
    long = threading.Thread(target=ask, args=(text(dice, PREFIX_WORDS), 4))
    long.start()
    time.sleep(0.3)  # it is being read
    row["side"] = ask(text(dice, 20), 4)[0]
    long.join()
    return row


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clients", default="1,4,16,32")
    parser.add_argument("--tokens", type=int, default=64)
    options = parser.parse_args()
    from edgellm.store.catalogue import installed

    model = str(Path(installed(options.model)))
    clients = [int(part) for part in options.clients.split(",")]
    rounds: dict[str, list[dict[str, float]]] = {"edgellm": [], "llama.cpp": [], "in process": []}
    for number in range(options.rounds):
        for side, rows in rounds.items():
            with running(side, model, options.threads, max(clients)) as asked:
                rows.append(measured(asked, clients, options.tokens, random.Random(number)))
            print(f"round {number + 1}, {side}: {rows[-1]}", file=sys.stderr, flush=True)
    table: dict[str, Any] = {
        name: {side: statistics.median(row[name] for row in rows) for side, rows in rounds.items()}
        for name in rounds["edgellm"][0]
    }
    print(f"| {Path(model).name} | {' | '.join(rounds)} | of llama.cpp | of in process |\n|---|" + "---:|" * 5)
    for name, sides in table.items():
        ratios = [sides["edgellm"] / sides[other] for other in ("llama.cpp", "in process")]
        print(f"| {name} | {' | '.join(f'{number:.3g}' for number in [*sides.values(), *ratios])} |")
    print(json.dumps({"model": Path(model).name, "threads": options.threads, "rounds": options.rounds, **table}))


if __name__ == "__main__":
    main()
