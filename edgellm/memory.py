"""How much memory a model will need, and whether this machine has it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgellm.engine.cache import pool_blocks
from edgellm.formats.errors import MemoryWouldExceedError
from edgellm.kernels.kv import pool_nbytes
from edgellm.machine.memory import SystemMemory, system_memory

if TYPE_CHECKING:
    from edgellm.kernels.program import Program

PROCESS_NBYTES = 180 << 20  # the interpreter, numpy, numba and LLVM once the kernels are loaded
GIB = 1 << 30


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes that a loaded model takes when its context is full.

    weights   the mapped file; the system can drop these pages and read them again
    kv        keys and values of all contexts
    work      the buffers of one step
    process   what the program itself takes
    """

    weights: int
    kv: int
    work: int
    process: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.kv + self.work + self.process


def estimate(
    program: Program, weights_nbytes: int, n_ctx: int, max_tokens: int = 512, n_parallel: int = 1
) -> MemoryNeed:
    """What ``program`` needs for ``n_parallel`` contexts of ``n_ctx`` tokens and steps of at most ``max_tokens``."""
    blocks = pool_blocks(program.cache_layers, n_ctx, max_tokens, n_parallel)
    kv = pool_nbytes(program.cache_layers, blocks)
    rows = {"tokens": max_tokens, "outputs": 1}
    work = sum(4 * buffer.width * rows[buffer.rows] for buffer in program.buffers.values())
    return MemoryNeed(weights_nbytes, kv, work, PROCESS_NBYTES)


def check_fits(need: MemoryNeed, memory: SystemMemory | None = None) -> None:
    """Raise MemoryWouldExceedError when the model does not fit the memory that is free now."""
    memory = memory or system_memory()
    if need.total > memory.available:
        gib = [f"{n / GIB:.2f} GiB" for n in (need.total, need.weights, need.kv, memory.available)]
        raise MemoryWouldExceedError(
            f"the model needs {gib[0]} (weights {gib[1]}, context {gib[2]}) and {gib[3]} are free. "
            "Take a smaller context (-c), a smaller model, or close other programs."
        )
