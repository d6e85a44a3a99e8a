"""Decode with experts that are on the disk: tokens per second, and what of the disk's own rate that is.

    python benchmarks/random_model.py experts-30b Q4_K_M model.gguf
    python benchmarks/experts_on_disk.py model.gguf [--steps 8] [--threads 2]

Before each step every page of every expert is taken out of memory (MADV_PAGEOUT), which is a memory that holds none:
the step must read all that its token is sent to. "fetched" asks for these pages as soon as the router has chosen,
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
import time
from concurrent.futures import ThreadPoolExecutor
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


def main() -> None:
    """Measure both ways in turn and print a table and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2, help="of both, in turn")
    parser.add_argument("--threads", type=int, default=default_threads())
    options = parser.parse_args()
    rate = disk_rate(options.model)
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
