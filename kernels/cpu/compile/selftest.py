"""Every CPU kernel against the numpy reference, on the CPU at hand; ``edgellm doctor`` prints what ``run`` finds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from edgellm.kernels.cpu.compile.isa import detect
from edgellm.kernels.cpu.compile.kernel_cache import KernelCache, default_folder
from edgellm.kernels.cpu.compile.kernel_table import KERNELS
from edgellm.kernels.cpu.compile.trials import SelfTestResult, try_kernel
from edgellm.kernels.cpu.run.executor import CPUExecutor

__all__ = ["SelfTestResult", "run"]


def run(form: str | None = None, n_threads: int = 2, kernels: Iterable[str] | None = None) -> Iterator[SelfTestResult]:
    """Try the named kernels, all by default, in an instruction-set form, the best by default.

    Raises ParameterError for a form that this CPU cannot run.
    """
    cache = KernelCache(detect(form), default_folder())
    for kernel in KERNELS if kernels is None else kernels:
        yield try_kernel(kernel, cache, CPUExecutor, n_threads)
