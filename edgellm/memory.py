"""How much memory a model will need, and whether this machine has it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgellm.engine.cache import pool_blocks
from edgellm.formats.errors import MemoryWouldExceedError
from edgellm.kernels.executors import executor_class
from edgellm.kernels.kv import pool_nbytes
from edgellm.kernels.ops import Embed
from edgellm.machine.cores import default_threads
from edgellm.machine.memory import SystemMemory, system_memory

if TYPE_CHECKING:
    from edgellm.kernels.program import Program

PROCESS_NBYTES = 180 << 20  # the interpreter, numpy, numba and LLVM once the kernels are loaded
GIB = 1 << 30


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes that a loaded model takes when its context is full.

    weights   the mapped file; the system can drop these pages and read them again. On a GPU what it keeps of them.
              Tables of embeddings beside the first are left out: a token reads one row of such a table
    kv        keys and values of all contexts
    work      the buffers of one step, and weights that are unpacked to float32
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


def kv_nbytes(program: Program, n_ctx: int, max_tokens: int, n_parallel: int, executor: str) -> int:
    """Bytes of the executor's cache for ``n_parallel`` contexts."""
    blocks = pool_blocks(program.cache_layers, n_ctx, min(max_tokens, n_ctx), n_parallel)
    return pool_nbytes(program.cache_layers, blocks, executor_class(executor).kv_dtype)


def estimate(
    program: Program,
    file_nbytes: int,
    n_ctx: int,
    max_tokens: int = 512,
    n_parallel: int = 1,
    *,
    executor: str = "cpu",
    n_threads: int | None = None,
) -> MemoryNeed:
    """What ``program`` needs for ``n_parallel`` contexts of ``n_ctx`` tokens and steps of at most ``max_tokens``."""
    max_tokens = min(max_tokens, n_ctx)
    make = executor_class(executor)
    work = make.work_nbytes(program, max_tokens, n_threads or default_threads())
    looked_up = sum(program.tensors[op.weight].nbytes for op in program.ops if isinstance(op, Embed) and not op.embeds)
    weights = make.weights_nbytes(program) if hasattr(make, "weights_nbytes") else file_nbytes - looked_up
    return MemoryNeed(weights, kv_nbytes(program, n_ctx, max_tokens, n_parallel, executor), work, PROCESS_NBYTES)


def check_fits(need: MemoryNeed, memory: SystemMemory | None = None) -> None:
    """Raise MemoryWouldExceedError when the model does not fit what is free now of ``memory``, else of the system's."""
    memory = memory or system_memory()
    if need.total > memory.available:
        gib = [f"{n / GIB:.2f} GiB" for n in (need.total, need.weights, need.kv, memory.available)]
        raise MemoryWouldExceedError(
            f"the model needs {gib[0]} (weights {gib[1]}, context {gib[2]}) and {gib[3]} are free. "
            "Take a smaller context (-c), a smaller model, or close other programs."
        )
