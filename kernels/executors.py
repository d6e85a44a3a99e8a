"""The table of executors: one row for each device that runs programs. Whatever offers a choice reads it.

Light to import: an executor's own module comes when it is asked for.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from edgellm import arguments

if TYPE_CHECKING:
    from edgellm.kernels.program import Executor, Program
    from edgellm.machine.progress import Progress

EXECUTORS = {
    "cpu": "edgellm.kernels.cpu.run.executor.CPUExecutor",
    "reference": "edgellm.kernels.reference.ReferenceExecutor",
}


def known(name: str) -> str:
    """The name, where the table has it; ParameterError otherwise."""
    if not isinstance(name, str) or name not in EXECUTORS:
        raise arguments.wrong("executor", name, f"one of {', '.join(EXECUTORS)}")
    return name


def executor_class(name: str) -> Any:
    """The ``Executor`` of a row, for what it says of itself before one is made."""
    module, _, attribute = EXECUTORS[known(name)].rpartition(".")
    return getattr(importlib.import_module(module), attribute)


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
    make = executor_class(name)
    return make(program, n_blocks, n_threads=n_threads, max_tokens=max_tokens, on_compile=on_compile)
