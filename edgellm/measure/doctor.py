"""What edgellm finds on this machine: the CPU, the form of every kernel, whether each computes right, memory, versions.

A kernel that computes wrong on one kind of CPU is the bug that a test elsewhere cannot see, so the self-test of every
kernel against the numpy reference is made to run here, on the user's own machine.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgellm.formats.errors import ParameterError
from edgellm.formats.large_pages import large_pages
from edgellm.machine.cores import default_threads
from edgellm.machine.cpu import cpu_name
from edgellm.machine.memory import system_memory
from edgellm.machine.paths import cache_dir, config_dir, models_dir, sessions_dir

if TYPE_CHECKING:
    from edgellm.kernels.cpu.compile.selftest import SelfTestResult

PACKAGES = ("edgellm", "numpy", "numba", "llvmlite", "tokenizers", "sentencepiece", "jinja2", "click", "rich")

# CPU features that a kernel could use, in the names LLVM has for them
FEATURES = ("sse2", "sse4.2", "avx", "fma", "f16c", "avx2", "avxvnni", "avxvnniint8",
            "avx512f", "avx512bw", "avx512vl", "avx512vnni", "avx512bf16", "avx512fp16",
            "amx-tile", "amx-int8", "amx-bf16", "neon", "dotprod", "i8mm", "bf16", "sve", "sve2", "sme")  # fmt: skip


@dataclass(frozen=True)
class KernelCacheState:
    """The compiled kernels on disk.

    n_ready   files made from these very kernels, for this CPU, by these versions
    n_stale   files of another version or CPU, of no use here
    trouble   why nothing can be kept there, None when all is well
    """

    folder: Path | None
    n_ready: int
    n_stale: int
    nbytes: int
    trouble: str | None = None


def machine_facts() -> dict[str, Any]:
    """System, CPU and memory, fit for JSON."""
    memory = system_memory()
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "cpu": cpu_name(),
        "cores": default_threads(),
        "memory_total": memory.total,
        "memory_available": memory.available,
        "large_pages": large_pages(),
        "folders": {
            "models": _place(models_dir),
            "sessions": _place(sessions_dir),
            "config": _place(config_dir),
            "cache": _place(cache_dir),
        },
    }


def _place(folder: Callable[[], Path]) -> str:
    """A folder, or what is wrong with the settings that should name it."""
    try:
        return str(folder())
    except ParameterError as error:
        return f"NONE: {error}"


def model_facts() -> dict[str, Any]:
    """What kinds of model can be run, fit for JSON."""
    from edgellm.models import architectures

    return {"architectures": architectures()}


def package_versions() -> dict[str, str]:
    """The versions of what edgellm stands on; a package that is missing says so."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "missing"
    return versions


def kernel_facts() -> dict[str, Any]:
    """The executors; the CPU's chosen form, those it could run, its features, the types with kernels of their own."""
    from edgellm.formats.quant_types import QUANT_TYPES
    from edgellm.kernels.cpu.compile import isa, kernel_table
    from edgellm.kernels.executors import EXECUTORS

    features = isa.host_features()
    fast = [name for name in QUANT_TYPES if f"matmul_{name.lower()}" in kernel_table.KERNELS]
    return {
        "executors": list(EXECUTORS),
        "form": isa.detect().name,
        "form_emulated": isa.detect().name in isa.EMULATED,
        "forms": isa.cpu_forms(),
        "form_setting": os.environ.get(isa.FORM_VARIABLE) or None,
        "features": [name for name in FEATURES if features.get(name)],
        "fast_types": fast,
        "dequantized_types": [name for name in QUANT_TYPES if name not in fast],
    }


def gpu_facts() -> list[dict[str, Any]]:
    """The GPUs by the names that ``--device`` takes; none where the package for them is missing."""
    from edgellm.kernels.gpu import adapters, memory

    if not adapters.is_installed():
        return []
    facts = []
    for adapter in adapters.adapters():
        there = memory.device_memory(adapter)
        facts.append({
            "device": f"gpu:{adapter.index}", "name": adapter.name, "interface": adapter.interface,
            "kind": adapter.kind, "driver": adapter.driver, "software": adapter.is_software,
            "missing": list(adapter.missing), "memory_total": there.total,
            "memory_available": there.available, "memory_is_own": there.is_own,
        })  # fmt: skip
    return facts


def gpu_self_test(index: int) -> Iterator[SelfTestResult]:
    """Run every shader on a GPU against the reference, and try that its sums have one order."""
    from edgellm.kernels.gpu import selftest

    yield from selftest.run(index)


def kernel_cache_state() -> KernelCacheState:
    """Count the compiled kernels on disk. A damaged one is found and made again when it is needed."""
    from edgellm.kernels.cpu.compile.isa import detect
    from edgellm.kernels.cpu.compile.kernel_cache import KernelCache, default_folder, why_not_kept
    from edgellm.kernels.cpu.compile.kernel_table import KERNELS

    try:
        folder = default_folder()
        trouble = why_not_kept(folder)
    except ParameterError as error:
        folder, trouble = None, str(error)
    if folder is None:
        return KernelCacheState(None, 0, 0, 0, trouble)
    cache = KernelCache(detect(), folder)
    ready = {path for name in KERNELS if (path := cache.path(name)) is not None and path.is_file()}
    files = [path for path in folder.glob("*.kernel") if path.is_file()] if cache.folder else []
    nbytes = sum(path.stat().st_size for path in files)
    return KernelCacheState(folder, len(ready), len(set(files) - ready), nbytes, trouble)


def clear_kernel_cache() -> int:
    """Delete the compiled kernels; the number of files that went."""
    from edgellm.kernels.cpu.compile.kernel_cache import default_folder

    n_removed, folder = 0, default_folder()
    for path in folder.glob("*") if folder is not None else ():
        if path.suffix in (".kernel", ".part"):
            path.unlink(missing_ok=True)
            n_removed += 1
    return n_removed


def self_test() -> Iterator[SelfTestResult]:
    """Run every kernel on this CPU against the reference; see ``kernels.selftest``."""
    from edgellm.kernels.cpu.compile import selftest

    yield from selftest.run()


def bandwidths() -> dict[int, float]:
    """Bytes per second that a plain loop reads from memory, by number of threads: one, and all cores."""
    from edgellm.kernels.cpu.run.read_bandwidth import read_bandwidth

    return {n: read_bandwidth(n) for n in dict.fromkeys((1, default_threads()))}
