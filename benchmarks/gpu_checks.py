"""All that is to be known of a real GPU, in one command that ends in time: what is right first, then what is fast.

    python benchmarks/gpu_checks.py [--device gpu] [--minutes 12] [--models smollm2,gemma3-270m]
                                    [--shapes 1b,8b,experts-7b,delta-4b] [--out FOLDER]
    python benchmarks/gpu_checks.py --device gpu:0 --quick      # whether all of it runs, on software Vulkan too

Each check is a process of its own with a share of the time; one that is too slow or wrong does not keep the others from
running. In order: every shader against the reference and itself in other numbers of columns (doctor), the tests of
kernels/gpu, the greedy text of each model against the CPU's, whole and with half of the layers, the rate of a copy, the
cost of a dispatch that does nothing, and how fast products of single tokens, of eight and of many read their weights;
then for models, and for files of random weights in the shapes of real ones (random_model.py: dense, experts, states),
one after the other, the rates of a prompt, of one answer, of one behind 4,096 tokens and of 16 together, and those of
llama.cpp's Vulkan build, where it is installed. The log of each check goes into the folder; the last line is JSON. The
exit status is 1 when something was wrong.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgellm.kernels.gpu.device import Device
    from edgellm.kernels.gpu.walk import Dispatch

ROOT = Path(__file__).resolve().parent.parent
PROMPT = "The three largest rivers of Europe are"
N_EMPTY = 400
COLUMNS, SHAPES = (1, 8, 33), ((4096, 4096), (14336, 4096), (4096, 14336))  # tokens; rows and columns of weights
EMPTY = """
@group(0) @binding(0) var<storage, read_write> y: array<u32>;
@compute @workgroup_size(64) fn main() { y[0] = 1u; }
"""


def greedy(model: str, device: str, n: int) -> None:
    """Print whether the text is the CPU's, with all layers there and with half of them."""
    import edgellm

    def text(**options: object) -> str:
        with edgellm.load(model, n_ctx=256, **options) as llm:  # type: ignore[arg-type]
            print(llm.runs_on)
            return llm.generate(PROMPT, temperature=0, max_tokens=n).text

    expected = text()
    with edgellm.load(model, n_ctx=256, executor=device) as llm:
        where = llm.memory_estimate.where
        assert where is not None
        half = where.n_layers // 2
    for options in ({"executor": device}, {"executor": device, "gpu_layers": half}):
        found = text(**options)
        print(f"{options}: {'the same' if found == expected else f'ANOTHER TEXT: {found!r} for {expected!r}'}")
        if found != expected:
            sys.exit(1)


def memory_and_dispatches(device: str, nbytes: int) -> None:
    """Print the rate of a copy, and what a dispatch costs that another one waits for."""
    from edgellm.kernels.gpu import adapters
    from edgellm.kernels.gpu.copy_bandwidth import copy_bandwidth
    from edgellm.kernels.gpu.device import Device

    number = device.partition(":")[2]
    index = int(number) if number else None
    rate = copy_bandwidth(index, nbytes)
    gpu = Device(adapters.choose(index))
    rows = [gpu.dispatch(EMPTY, [gpu.buffer(256)], "w", (1, 1, 1))] * N_EMPTY
    best = _best_s(gpu, rows)
    gpu.close()
    print(json.dumps({"copy_gb_per_s": round(rate / 1e9, 1), "us_per_dispatch": round(1e6 * best / N_EMPTY, 2)}))


def products(device: str, *, quick: bool) -> None:
    """Print for types and shapes the bytes of weights per second that a product of 1, 8 or 33 tokens reads."""
    import numpy as np

    from edgellm.kernels.gpu import lowering
    from edgellm.kernels.gpu.executor import GPUExecutor
    from edgellm.kernels.ops import Matmul
    from edgellm.kernels.ops.sketch import Sketch

    number = device.partition(":")[2]
    least = (1 if quick else 512) << 20  # more than a cache holds
    for quant, shape in itertools.product(("Q4_K", "Q6_K", "Q8_0"), ((256, 512),) if quick else SHAPES):
        s, tokens = Sketch(np.random.default_rng(1), COLUMNS[-1]), dict[str, float]()
        while sum(tensor.nbytes for tensor in s.tensors.values()) < least:
            weight = s.tensor(quant, shape)
            s.emit(weight, Matmul(s.input(shape[1]), weight, s.buffer(shape[0])))
        program = s.program()
        executor = GPUExecutor(program, 1, max_tokens=COLUMNS[-1], index=int(number) if number else None)
        for n in COLUMNS:
            rows = lowering.record(executor._there, program.ops, (), lowering.Counts(n, 1, 1), fuse=True)
            tokens[str(n)] = sum(tensor.nbytes for tensor in s.tensors.values()) / _best_s(executor.device, rows)
        executor.close()
        print(
            json.dumps({quant: shape, "gb_per_s": {n: round(rate / 1e9, 2) for n, rate in tokens.items()}}), flush=True
        )


def _best_s(gpu: Device, rows: Sequence[Dispatch]) -> float:
    """Seconds of dispatches, the least of a few passes."""
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        gpu.run(rows)
        gpu.wait()
        best = min(best, time.perf_counter() - started)
    return best


def checks(given: argparse.Namespace) -> list[tuple[str, list[str], float]]:
    """Names, commands, and most seconds of each."""
    python, device, quick = [sys.executable], given.device, given.quick
    here, edgellm = [*python, __file__, "--device", device, *["--quick"] * quick], [*python, "-m", "edgellm"]
    models = [name for name in given.models.split(",") if name]
    files = {name: given.out / f"{name}-q4_k_m.gguf" for name in given.shapes.split(",") if name}
    tests = ["-k", "rms_norm or adapter_that_is_not_there or not_finite"] if quick else []
    prompt, steps, behind, together = ("16", "4", "64", "1,2") if quick else ("512", "64", "4096", "1,16")
    found = [
        *([] if quick else [("shaders", [*edgellm, "doctor", "--no-bandwidth", "--software-gpus"], 180.0)]),
        ("tests", [*python, "-m", "pytest", "-q", "-x", *tests, str(ROOT / "tests/kernels/gpu")], 300.0),
        *((f"greedy {model}", [*here, "--part", f"greedy {model}"], 60.0) for model in models),
        ("memory", [*here, "--part", "memory"], 30.0),
        ("products", [*here, "--part", "products"], 60.0),
    ]  # fmt: skip
    bench = [*edgellm, "bench", "--device", device, "-r", "1" if quick else "3"]
    vulkan = [*python, str(ROOT / "benchmarks/vs_llama_cpp_vulkan.py"), "--device", device]
    vulkan += ["--tests", f"pp{prompt},tg{steps}", "--rounds", "1" if quick else "3"]
    for name, path in ({model: model for model in models} | files).items():
        if name in files:
            write = [*python, str(ROOT / "benchmarks/random_model.py"), name, "Q4_K_M", str(path)]
            found.append((f"write {name}", write, 90.0))
        found.append((f"bench {name}", [*bench, "-m", str(path), "-p", prompt, "-n", steps, "-np", together], 90.0))
        deep = [*bench, "-m", str(path), "-p", "0", "-n", steps, "-d", behind, "--no-bandwidth"]
        found.append((f"bench {name} deep", deep, 60.0))
        found.append((f"llama.cpp {name}", [*vulkan, str(path)], 90.0))
    return [(name, command, most * (4 if quick else 1)) for name, command, most in found]


def main() -> None:
    """Parse the command line, run the checks, say what came of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="gpu")
    parser.add_argument("--minutes", type=float, default=12)
    parser.add_argument("--models", default="smollm2,gemma3-270m")
    parser.add_argument("--shapes", default="1b,8b,experts-7b,delta-4b", help="of random_model.py")
    parser.add_argument("--quick", action="store_true", help="the smallest sizes, few tests and no random weights")
    parser.add_argument("--out", type=Path, default=Path("gpu-checks"))
    parser.add_argument("--part", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.part == "memory":
        return memory_and_dispatches(given.device, (4 if given.quick else 128) << 20)
    if given.part == "products":
        return products(given.device, quick=given.quick)
    if given.part:
        return greedy(given.part.partition(" ")[2], given.device, 6 if given.quick else 24)
    if given.quick:
        given.shapes = ""
    given.out.mkdir(parents=True, exist_ok=True)
    deadline, results = time.monotonic() + 60 * given.minutes, {}
    for name, command, most in checks(given):
        left, started = deadline - time.monotonic(), time.monotonic()
        with (given.out / f"{name.replace(' ', '-')}.log").open("w+") as log:
            try:
                code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, timeout=max(0.1, min(most, left)))
                results[name] = "right" if code.returncode == 0 else "WRONG"
            except subprocess.TimeoutExpired:
                results[name] = "too slow" if left > 1 else "no time left"
            log.seek(0)
            last = (log.read().strip().splitlines() or [""])[-1]
        print(f"{name}: {results[name]}, {time.monotonic() - started:.0f} s  {last[:300]}", flush=True)
    print(json.dumps(results))
    sys.exit("WRONG" in results.values())


if __name__ == "__main__":
    main()
