"""The table of executors: one row for each kind of device that runs programs. Whatever offers a choice reads it.

A device is called as its row; ``gpu:N`` names one of several (kernels/gpu/adapters.py), and ``auto`` is the best GPU,
else the CPU.

Light to import: an executor's own module comes when it is asked for.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from edgellm import arguments

if TYPE_CHECKING:
    from edgellm.kernels.program import Executor, Program
    from edgellm.machine.memory import SystemMemory
    from edgellm.machine.progress import Progress

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


def own_memory(name: str) -> SystemMemory | None:
    """The memory that a device has of its own; None where it computes in the system's, or nobody tells."""
    if resolved(name).partition(":")[0] != "gpu":
        return None
    from edgellm.kernels.gpu import adapters, memory

    return memory.own_memory(adapters.choose(_index(name)))


def _index(name: str) -> int | None:
    """N of ``gpu:N``."""
    numbered = _NUMBERED.fullmatch(name)
    return int(numbered[1]) if numbered else None


def open_executor(
    name: str,
    program: Program,
    n_blocks: Sequence[int] | int,
    *,
    n_threads: int = 1,
    max_tokens: int = 512,
    on_compile: Progress | None = None,
) -> Executor:
    """An executor for steps of at most ``max_tokens`` tokens, with a cache of its own.

    n_blocks     of the cache, for each group of ``program.groups``, or as many for every group
    on_compile   told of the kernels that are compiled, on the first start
    """
    make, index = executor_class(name), _index(name)
    which = {} if index is None else {"index": index}
    return make(program, n_blocks, n_threads=n_threads, max_tokens=max_tokens, on_compile=on_compile, **which)
