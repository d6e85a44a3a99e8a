"""Spoils files of a kernel cache in every way a disk or a user might, and starts executors over the remains.

As a program: ``cache_corruptions.py SEED N`` spoils the cache N times and starts an executor after each; it prints one
line per start: what was done, how many kernels were compiled, whether the logits were right.
"""

from __future__ import annotations

import os
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np

from edgellm.kernels.cpu.compile import trials
from edgellm.kernels.cpu.compile.kernel_cache import default_folder
from edgellm.kernels.cpu.run.executor import CPUExecutor
from edgellm.kernels.program import Batch, Program


def small_program() -> Program:
    """Eight small kernels: the team, embed_f32, add, select_outputs, and the vocabulary's."""
    sketch = trials.sketch(0)
    trials.add_trial(sketch, "team_lead")
    return sketch.program()


def start_and_run(program: Program, form: str | None = None) -> tuple[np.ndarray, int, str]:
    """Logits of a fresh executor, how many kernels it compiled, and the form it took."""
    executor = CPUExecutor(program, 0, 2, 16, form=form)
    logits = executor.run(Batch.single(program, [3, 1, 2])).copy()
    executor.close()
    return logits, executor.n_compiled, executor.isa.name


def expected_logits(program: Program) -> np.ndarray:
    """The same from the reference."""
    return trials.ReferenceExecutor(program, 0).run(Batch.single(program, [3, 1, 2]))


def _flip_bits(path: Path, other: Path, rng: np.random.Generator) -> None:
    data = bytearray(path.read_bytes())
    for _ in range(rng.integers(1, 9)):
        data[rng.integers(len(data))] ^= 1 << rng.integers(8)
    path.write_bytes(data)


def _flip_a_bit_of_the_digest(path: Path, other: Path, rng: np.random.Generator) -> None:
    data = bytearray(path.read_bytes())
    data[rng.integers(32)] ^= 1 << rng.integers(8)
    path.write_bytes(data)


def _truncate(path: Path, other: Path, rng: np.random.Generator) -> None:
    os.truncate(path, rng.integers(path.stat().st_size))


def _append(path: Path, other: Path, rng: np.random.Generator) -> None:
    path.write_bytes(path.read_bytes() + rng.bytes(rng.integers(1, 5000)))


def _fill_with_noise(path: Path, other: Path, rng: np.random.Generator) -> None:
    path.write_bytes(rng.bytes(rng.integers(1, 20000)))


def _swap(path: Path, other: Path, rng: np.random.Generator) -> None:
    one, two = path.read_bytes(), other.read_bytes()
    path.write_bytes(two)
    other.write_bytes(one)


def _copy_another(path: Path, other: Path, rng: np.random.Generator) -> None:
    shutil.copyfile(other, path)


def _empty(path: Path, other: Path, rng: np.random.Generator) -> None:
    path.write_bytes(b"")


def _delete(path: Path, other: Path, rng: np.random.Generator) -> None:
    path.unlink()


def _directory(path: Path, other: Path, rng: np.random.Generator) -> None:
    path.unlink()
    path.mkdir()


def _link_to_another(path: Path, other: Path, rng: np.random.Generator) -> None:
    path.unlink()
    path.symlink_to(other)


def _link_to_itself(path: Path, other: Path, rng: np.random.Generator) -> None:
    path.unlink()
    path.symlink_to(path)


def _link_to_zeros(path: Path, other: Path, rng: np.random.Generator) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def _pipe(path: Path, other: Path, rng: np.random.Generator) -> None:
    path.unlink()
    os.mkfifo(path)


def _unreadable(path: Path, other: Path, rng: np.random.Generator) -> None:
    path.chmod(0)


def _huge(path: Path, other: Path, rng: np.random.Generator) -> None:
    os.truncate(path, 1 << 40)  # sparse


def _foreign(path: Path, other: Path, rng: np.random.Generator) -> None:
    if os.getuid() == 0:
        os.chown(path, 12345, 12345)
    else:
        path.unlink()


CORRUPTIONS: tuple[Callable[[Path, Path, np.random.Generator], None], ...] = (
    _flip_bits, _flip_a_bit_of_the_digest, _truncate, _append, _fill_with_noise, _swap, _copy_another, _empty, _delete,
    _directory, _link_to_another, _link_to_itself, _link_to_zeros, _pipe, _unreadable, _huge, _foreign,
)  # fmt: skip


def corrupt(folder: Path, rng: np.random.Generator, which: int) -> str:
    """Do the corruption number ``which`` to a random kernel file, after removing what an earlier one left behind."""
    for path in folder.glob("*.kernel"):
        if path.is_symlink() or not path.is_file():
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    files = sorted(folder.glob("*.kernel"))
    one, other = rng.choice(len(files), 2, replace=False)
    change = CORRUPTIONS[which % len(CORRUPTIONS)]
    change(files[one], files[other], rng)
    return change.__name__.strip("_")


def main(seed: int, n: int) -> None:
    warnings.simplefilter("error")
    program = small_program()
    expected = expected_logits(program)
    start_and_run(program)
    rng = np.random.default_rng(seed)
    for i in range(n):
        done = corrupt(default_folder(), rng, seed * n + i)
        logits, n_compiled, _ = start_and_run(program)
        print(done, n_compiled, np.array_equal(logits, expected), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
