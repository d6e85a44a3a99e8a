"""How much memory a model will need, and whether this machine has it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgellm.engine.cache import pool_blocks
from edgellm.formats.errors import EdgeLLMError, MemoryWouldExceedError
from edgellm.kernels.executors import GPULayers, describe, executor_class, needs, placed
from edgellm.kernels.kv import pool_nbytes
from edgellm.kernels.ops.embed import looked_up
from edgellm.machine.cores import default_threads
from edgellm.machine.memory import SystemMemory, system_memory

if TYPE_CHECKING:
    from edgellm.kernels.gpu.memory import DeviceMemory
    from edgellm.kernels.placement import DeviceNeed, Placement
    from edgellm.kernels.program import Program

PROCESS_NBYTES = 180 << 20  # the interpreter, numpy, numba and LLVM once the kernels are loaded
GIB = 1 << 30
MAX_CANVAS = 1024  # tokens that are denoised together at most: SamplingParams.diffusion_length


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes that a loaded model takes when its context is full.

    weights   the mapped file; the system can drop these pages and read them again. On a GPU what it keeps of them.
              Tables of embeddings beside the first are left out: a token reads one row of such a table
    kv        keys and values of all contexts
    work      the buffers of one step, and weights that are unpacked to float32
    process   what the program itself takes
    in_file   of the weights those of experts that may stay in the file: a token reads others of them than the last
    draft     all that a draft model takes beside them
    device    what of the first three a GPU holds; None without one
    where     which ops stand on it
    """

    weights: int
    kv: int
    work: int
    process: int
    device: DeviceNeed | None = None
    where: Placement | None = None
    in_file: int = 0
    draft: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.kv + self.work + self.process + self.draft

    def of_system(self, device: DeviceMemory | None) -> int:
        """What is in the system's memory: all, but for what a GPU keeps in its own."""
        return self.total - (self.device.total if self.device and device and device.is_own else 0)

    def of_device(self, device: DeviceMemory | None) -> int:
        """What is in a GPU's own memory."""
        return self.total - self.of_system(device)


def step_tokens(program: Program, n_ctx: int, max_tokens: int) -> int:
    """Tokens that a step has at most; a text whose tokens see both ways is in one."""
    return max(max_tokens, n_ctx) if program.takes_whole_texts else min(max_tokens, n_ctx)


def kv_nbytes(program: Program, n_ctx: int, max_tokens: int, n_parallel: int, executor: str) -> int:
    """Bytes of the executor's cache for ``n_parallel`` contexts."""
    blocks = pool_blocks(program.cache_layers, n_ctx, step_tokens(program, n_ctx, max_tokens), n_parallel)
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
    gpu_layers: GPULayers = "auto",
    cpu_moe: bool = False,
) -> MemoryNeed:
    """What ``program`` needs for ``n_parallel`` contexts of ``n_ctx`` tokens and steps of at most ``max_tokens``."""
    max_tokens, n_threads = step_tokens(program, n_ctx, max_tokens), n_threads or default_threads()
    blocks = pool_blocks(program.cache_layers, n_ctx, max_tokens, n_parallel)
    where = placed(executor, program, blocks, max_tokens, gpu_layers, cpu_moe, n_threads)
    if where is not None and where.on_gpu:
        host, device = needs(program, where, blocks, max_tokens, n_threads)
        weights, kv, work = host.weights + device.weights, host.kv + device.kv, host.work + device.work
        return MemoryNeed(weights, kv, work, PROCESS_NBYTES, device, where)
    make = executor_class(executor if where is None else "cpu")
    kv = pool_nbytes(program.cache_layers, blocks, make.kv_dtype)
    weights = file_nbytes - sum(program.tensors[name].nbytes for name in looked_up(program))
    work = make.work_nbytes(program, max_tokens, n_threads)
    if program.denoising is not None:  # logits of all places of a canvas, which is MAX_CANVAS tokens at most
        work += min(max_tokens, MAX_CANVAS) * program.n_vocab * 4
    in_file = make.in_file_nbytes(program) if hasattr(make, "in_file_nbytes") else 0
    return MemoryNeed(weights, kv, work, PROCESS_NBYTES, None, where, in_file)


def placement_text(need: MemoryNeed, executor: str) -> str:
    """What computes, such as "gpu:0 NVIDIA L4 (Vulkan), 12 of 32 layers; the rest on the CPU"."""
    where = need.where
    if where is None:
        return describe(executor)
    if not where.on_gpu:
        return "cpu"
    if not where.is_split:
        return describe(executor)
    if where.layers > where.n_layers:
        return f"{describe(executor)}; some of its ops on the CPU"
    return f"{describe(executor)}, {where.layers} of {where.n_layers} layers; the rest on the CPU"


def check_fits(need: MemoryNeed, memory: SystemMemory | None = None, device: DeviceMemory | None = None) -> None:
    """Raise MemoryWouldExceedError when the model does not fit what is free now of ``memory``, None the system's.

    device   that of the GPU which has a part of it
    """
    memory = memory or system_memory()
    if device is not None and need.device is not None and need.device.total > device.available:
        less = "fewer layers there (--gpu-layers), "
        raise _too_large(need.device, need.device.total, device.available, " on the GPU", less)
    in_system = need.of_system(device)
    if in_system - need.in_file > memory.available:
        raise _too_large(need, in_system, memory.available, "", "")


def experts_stay_in_file(need: MemoryNeed, memory: SystemMemory | None = None) -> bool:
    """Whether a model that fits does so because its experts are read from the file as tokens are sent to them."""
    return need.in_file > 0 and need.total > (memory or system_memory()).available


def _too_large(need: MemoryNeed | DeviceNeed, total: int, free: int, there: str, less: str) -> EdgeLLMError:
    gib = [f"{n / GIB:.2f} GiB" for n in (total, need.weights, need.kv, free)]
    in_file = getattr(need, "in_file", 0)
    rest = f", of which {in_file / GIB:.2f} GiB of experts may stay on the disk" if in_file else ""
    if draft := getattr(need, "draft", 0):
        rest += f", {draft / GIB:.2f} GiB of it for the draft model"
    return MemoryWouldExceedError(
        f"the model needs {gib[0]}{there} (weights {gib[1]}, context {gib[2]}){rest} and {gib[3]} are free. Take {less}"
        "a smaller context (-c), a smaller model, or close other programs."
    )
