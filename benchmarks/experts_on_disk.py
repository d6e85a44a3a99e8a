"""Decode with experts that are on the disk: tokens per second, and what of the disk's own rate that is.

    python benchmarks/random_model.py experts-30b Q4_K_M model.gguf
    python benchmarks/experts_on_disk.py model.gguf [--steps 8] [--threads 2] [--memory 6]

Before each step every page of every expert is taken out of memory (MADV_PAGEOUT), which is a memory that holds none:
the step must read all that its token is sent to. With --memory GIB all but so much of the machine's memory is locked
away by another process instead, for a file that is larger than what is left, and an answer is written as any other is:
then what stays in memory counts for it. "fetched" asks for these pages as soon as the router has chosen,
"mapped" leaves them to come as they are read. What the disk gave is counted by the system (/proc/self/io); its own rate
is that of large reads of the same file past the page cache. Linux, and a file that is yours.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from edgellm.formats.gguf import GGUFFile
from edgellm.kernels.cpu.run.executor import CPUExecutor
from edgellm.kernels.cpu.run.experts_ahead import pieces_of
from edgellm.kernels.ops import ExpertMatmul
from edgellm.kernels.program import Batch, Program
from edgellm.machine.cores import default_threads
from edgellm.models import build_program

MADV_PAGEOUT = 21
READ_NBYTES, N_READERS = 4 << 20, 4


def disk_rate(path: Path, nbytes: int = 1 << 30) -> float:
    """Bytes per second of large reads past the page cache, several at once."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
    starts = range(0, min(nbytes, path.stat().st_size // READ_NBYTES * READ_NBYTES), READ_NBYTES)

    def read(start: int) -> int:
        with mmap.mmap(-1, READ_NBYTES) as buffer:  # whole pages, as O_DIRECT wants them
            return os.preadv(descriptor, [buffer], start)

    begun = time.perf_counter()
    with ThreadPoolExecutor(N_READERS) as readers:
        total = sum(readers.map(read, starts))
    os.close(descriptor)
    return total / (time.perf_counter() - begun)


def read_nbytes() -> int:
    """What this process has had read from disks."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["read_bytes"])


def evict(program: Program) -> None:
    """Take all experts out of memory."""
    libc = ctypes.CDLL(None, use_errno=True)
    for op in program.ops:
        for address, nbytes in pieces_of(program.tensors[op.weight]).tolist() if isinstance(op, ExpertMatmul) else ():
            first = address // mmap.PAGESIZE * mmap.PAGESIZE
            libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(address + nbytes - first), MADV_PAGEOUT)


def measure(path: Path, fetched: bool, n_steps: int, n_threads: int, seed: int) -> dict[str, float]:
    """Medians over single steps: seconds, and bytes that came from the disk."""
    with GGUFFile.open(path) as gguf:
        program = build_program(gguf)
        executor = CPUExecutor(program, 4, n_threads, 8)
        if fetched:
            executor.leave_experts_in_file()
        rng = np.random.default_rng(seed)
        seconds, nbytes = [], []
        for position in range(n_steps + 2):
            evict(program)
            before, started = read_nbytes(), time.perf_counter()
            executor.run(Batch.single(program, rng.integers(0, program.n_vocab, 1), position))
            seconds.append(time.perf_counter() - started)
            nbytes.append(read_nbytes() - before)
        experts = sum(op.nbytes_per_token(program.tensors) for op in program.ops if isinstance(op, ExpertMatmul))
        executor.close()
    return {"seconds": statistics.median(seconds[2:]), "read": statistics.median(nbytes[2:]), "active": float(experts)}


_HOLD = """
import ctypes, mmap, sys
open("/proc/self/oom_score_adj", "w").write("1000")  # the first to go, should memory end
libc, held, keep = ctypes.CDLL(None, use_errno=True), [], int(sys.argv[1])
def available():
    return next(int(line.split()[1]) << 10 for line in open("/proc/meminfo") if line.startswith("MemAvailable"))
while available() > keep:
    held.append(mmap.mmap(-1, min(256 << 20, available() - keep + mmap.PAGESIZE)))
    address = ctypes.addressof(ctypes.c_char.from_buffer(held[-1]))
    if libc.mlock(ctypes.c_void_p(address), ctypes.c_size_t(len(held[-1]))):
        sys.exit("mlock: error %d; it needs root, or a high limit of locked memory" % ctypes.get_errno())
print(sum(map(len, held)), flush=True)
sys.stdin.read()
"""


@contextmanager
def little_memory(nbytes: int) -> Iterator[int]:
    """All but so much of what memory is available is locked by a process of its own; how much that is."""
    with subprocess.Popen([sys.executable, "-c", _HOLD, str(nbytes)], stdin=-1, stdout=-1, text=True) as holder:
        assert holder.stdin is not None and holder.stdout is not None
        line = holder.stdout.readline()
        if not line:
            raise SystemExit("no memory was locked")
        yield int(line)
        holder.stdin.close()


def answer(path: Path, n: int, n_threads: int, rate: float) -> dict[str, float]:
    """An answer of n tokens behind as many that warm up, as ``edgellm.load`` does it in what memory there is."""
    import edgellm

    with edgellm.load(path, n_threads=n_threads, n_ctx=4 * n) as llm:
        program = llm.program
        active = sum(op.nbytes_per_token(program.tensors) for op in program.ops if isinstance(op, ExpertMatmul))
        before, times = read_nbytes(), []
        for _ in llm.stream([1000, 2000, 3000], max_tokens=2 * n, temperature=1.0, seed=1, ignore_eos=True):
            times.append(time.perf_counter())
            before = read_nbytes() if len(times) == n else before
    seconds = (times[-1] - times[n - 1]) / n
    read = (read_nbytes() - before) / n
    return {"seconds": seconds, "read": read, "active": float(active), "share": active / seconds / rate}


def main() -> None:
    """Measure both ways in turn and print a table and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2, help="of both, in turn")
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--memory", type=float, metavar="GIB", help="lock all but so much, and write --steps tokens")
    options = parser.parse_args()
    rate = disk_rate(options.model)
    if options.memory:
        with little_memory(int(options.memory * 2**30)) as locked:
            print(f"file {options.model.stat().st_size / 1e9:.1f} GB, disk {rate / 1e9:.2f} GB/s", end=", ")
            print(f"{locked / 2**30:.1f} GiB locked away, {options.memory:g} GiB left")
            found = answer(options.model, options.steps, options.threads, rate)
        print(
            f"{1 / found['seconds']:.2f} tokens/s  {found['active'] / 1e6:.0f} MB of experts a token, "
            f"{found['read'] / 1e6:.0f} MB read, {found['share']:.2f} of the disk's rate"
        )
        print(json.dumps(found | {"disk": rate}))
        return
    results: dict[str, list[dict[str, float]]] = {}
    print(f"disk {rate / 1e9:.2f} GB/s")
    for turn, fetched in enumerate((True, False) * options.rounds):
        found = measure(options.model, fetched, options.steps, options.threads, turn)
        name, share = "fetched" if fetched else "mapped", found["active"] / found["seconds"] / rate
        results.setdefault(name, []).append(found | {"share": share})
        print(
            f"{name:8} {1 / found['seconds']:6.2f} tokens/s  {found['active'] / 1e6:.0f} MB of experts a token, "
            f"{found['read'] / 1e6:.0f} MB read, {share:.2f} of the disk's rate"
        )
    print(json.dumps(results | {"disk": rate}))


if __name__ == "__main__":
    main()
