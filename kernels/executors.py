"""The table of executors: one row for each kind of device that runs programs. Whatever offers a choice reads it.

A device is called as its row; ``gpu:N`` names one of several (kernels/gpu/adapters.py), and ``auto`` is the best GPU,
else the CPU.

Light to import: an executor's own module comes when it is asked for.
"""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

from edgellm import arguments
from edgellm.formats.errors import UnsupportedError

if TYPE_CHECKING:
    from edgellm.kernels.gpu.memory import DeviceMemory
    from edgellm.kernels.kv import CachePool
    from edgellm.kernels.placement import DeviceNeed, Placement
    from edgellm.kernels.program import Executor, Program
    from edgellm.machine.progress import Progress

GPULayers = int | Literal["auto"]
MAX_LAYERS = 1 << 16
RESERVED_NBYTES = 512 << 20  # of the device's free memory: what its driver takes, compiled shaders, the screen

EXECUTORS = {
    "cpu": "edgellm.kernels.cpu.run.executor.CPUExecutor",
    "gpu": "edgellm.kernels.gpu.executor.GPUExecutor",
    "reference": "edgellm.kernels.reference.ReferenceExecutor",
}

CHOICES = "auto, cpu, gpu, gpu:N or reference"
_NUMBERED = re.compile(r"gpu:(\d{1,3})")


def known(name: str) -> str:
    """The name, where it is a device's; ParameterError otherwise."""
    if not isinstance(name, str) or not (name in EXECUTORS or name == "auto" or _NUMBERED.fullmatch(name)):
        raise arguments.wrong("executor", name, f"one of {CHOICES}")
    return name


def resolved(name: str) -> str:
    """The name of a device in place of ``auto``."""
    return ("gpu" if _has_gpu() else "cpu") if known(name) == "auto" else name


def _has_gpu() -> bool:
    """Whether there is a GPU that computes, and the package for it; what only pretends to be one does not count."""
    from edgellm.formats.errors import EdgeLLMError
    from edgellm.kernels.gpu import adapters

    try:
        return adapters.is_installed() and bool(adapters.choose(None))
    except EdgeLLMError:
        return False


def executor_class(name: str) -> Any:
    """The ``Executor`` of a device, for what it says of itself before one is made."""
    module, _, attribute = EXECUTORS[resolved(name).partition(":")[0]].rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def device_memory(name: str) -> DeviceMemory | None:
    """The memory that a GPU computes in; None for another device."""
    if not is_gpu(name):
        return None
    from edgellm.kernels.gpu import adapters, memory

    return memory.device_memory(adapters.choose(_index(name)))


def bandwidth(name: str, n_threads: int) -> float | None:
    """Bytes per second that a device reads from its memory, a GPU copies in its own; None for the reference."""
    if is_gpu(name):
        from edgellm.kernels.gpu.copy_bandwidth import copy_bandwidth

        return copy_bandwidth(_index(name))
    if resolved(name) != "cpu":
        return None
    from edgellm.kernels.cpu.run.read_bandwidth import read_bandwidth

    return read_bandwidth(n_threads)


def describe(name: str) -> str:
    """A device by name, such as "gpu:0 NVIDIA L4 (Vulkan)"."""
    if not is_gpu(name):
        return resolved(name)
    from edgellm.kernels.gpu import adapters

    return str(adapters.choose(_index(name)))


def _index(name: str) -> int | None:
    """N of ``gpu:N``."""
    numbered = _NUMBERED.fullmatch(name)
    return int(numbered[1]) if numbered else None


def is_gpu(name: str) -> bool:
    """Whether it is a GPU's name."""
    return resolved(name).partition(":")[0] == "gpu"


def check_split(executor: str, gpu_layers: GPULayers, cpu_moe: bool) -> None:
    """ParameterError for layers on a GPU that are no number, or of a device that is none."""
    if gpu_layers != "auto":
        arguments.whole_number("gpu_layers", gpu_layers, 0, MAX_LAYERS)
        if gpu_layers and executor in ("cpu", "reference"):
            raise arguments.wrong("gpu_layers", gpu_layers, f"0 with the device {executor}; layers go to gpu or gpu:N")
    arguments.flag("cpu_moe", cpu_moe)


def placed(
    name: str,
    program: Program,
    n_blocks: Sequence[int] | int,
    max_tokens: int,
    gpu_layers: GPULayers = "auto",
    cpu_moe: bool = False,
    n_threads: int = 1,
) -> Placement | None:
    """Where the ops of a program go; None where there is but one device.

    gpu_layers   of the last ones on the GPU; "auto": as many as fit the memory that is free there now
    cpu_moe      experts stay on the CPU
    """
    if not is_gpu(name):
        return None
    from edgellm.kernels import placement
    from edgellm.kernels.gpu.lowering import unknown
    from edgellm.machine.memory import system_memory

    has_kernel = functools.cache(lambda op: unknown(program, op) is None)

    def at(layers: int) -> Placement:
        return placement.place(program, layers, cpu_moe=cpu_moe, has_kernel=has_kernel)

    if gpu_layers != "auto":
        return at(gpu_layers)
    blocks = [n_blocks] * len(program.groups) if isinstance(n_blocks, int) else list(n_blocks)
    memory = device_memory(name)
    assert memory is not None, "it is a GPU"

    def fits(layers: int) -> bool:
        try:
            host, device = needs(program, at(layers), blocks, max_tokens, n_threads)
        except UnsupportedError:  # the CPU has no kernel for what it would get
            return False
        if device.total > memory.available - RESERVED_NBYTES:
            return False
        # what the CPU has of the weights are pages of the file, which the system may drop
        rest = host.kv + host.work + (0 if memory.is_own else device.total)
        return not layers or rest <= system_memory().available - RESERVED_NBYTES

    n_layers = at(0).n_layers
    return at(n_layers + 1 if fits(n_layers + 1) else placement.most_layers(n_layers, fits))


def needs(
    program: Program, where: Placement, n_blocks: Sequence[int], max_tokens: int, n_threads: int
) -> tuple[DeviceNeed, DeviceNeed]:
    """What the CPU and what the GPU hold of a program; of a file's weights the CPU holds pages of the file."""
    from edgellm.kernels.kv import pool_nbytes
    from edgellm.kernels.ops.embed import looked_up
    from edgellm.kernels.placement import DeviceNeed

    parts, found = where.cut(program), list[DeviceNeed]()
    for i, (part, kind) in enumerate(zip(parts.programs, ("cpu", "gpu"), strict=True)):
        if part is None:
            found.append(DeviceNeed(0, 0, 0))
            continue
        make = executor_class(kind)
        own = program if not where.is_split else part
        kept = (
            make.weights_nbytes(own)
            if kind == "gpu"
            else sum(tensor.nbytes for name, tensor in own.tensors.items() if name not in looked_up(own))
        )
        kv = pool_nbytes(part.cache_layers, parts.n_blocks(i, n_blocks), make.kv_dtype)
        found.append(DeviceNeed(kept, kv, make.work_nbytes(own, max_tokens, n_threads)))
    return found[0], found[1]


def open_executor(
    name: str,
    program: Program,
    n_blocks: Sequence[int] | int,
    *,
    n_threads: int = 1,
    max_tokens: int = 512,
    on_compile: Progress | None = None,
    gpu_layers: GPULayers = "auto",
    cpu_moe: bool = False,
    beside: Executor | None = None,
    pool: CachePool | None = None,
) -> Executor:
    """An executor for steps of at most ``max_tokens`` tokens, with a cache of its own.

    n_blocks     of the cache, for each group of ``program.groups``, or as many for every group
    on_compile   told of the kernels that are compiled, on the first start
    gpu_layers, cpu_moe   see ``placed``: what a GPU does not take the CPU computes
    beside       another one that never runs at the same time and is closed later: where both can, they share threads
    pool         the cache of another one, of a program with the same layers, where it is not on a GPU
    """
    options: dict[str, Any] = {"n_threads": n_threads, "max_tokens": max_tokens, "on_compile": on_compile}
    where = placed(name, program, n_blocks, max_tokens, gpu_layers, cpu_moe, n_threads)
    if where is None or not where.on_gpu:
        make = executor_class(name if where is None else "cpu")
        if beside is not None and type(beside) is make and getattr(beside, "n_threads", None) == n_threads:
            options["beside"] = beside
        if pool is not None:
            options["pool"] = pool
        return make(program, n_blocks, **options)
    which: dict[str, Any] = {} if (index := _index(name)) is None else {"index": index}
    if not where.is_split:
        return executor_class(name)(program, n_blocks, **options, **which)
    from edgellm.kernels.cpu.run.executor import CPUExecutor
    from edgellm.kernels.gpu.part import GPUPart
    from edgellm.kernels.split import MakePart, SplitExecutor

    makes: list[MakePart] = [
        lambda part, blocks: CPUExecutor(part, blocks, is_part=True, **options),
        lambda part, blocks: GPUPart(part, blocks, **options, **which),
    ]
    return cast("Executor", SplitExecutor(where.cut(program), n_blocks, makes, max_tokens))
