"""Kernels that have computed right on this CPU: what was just compiled is tested once, before its first use.

LLVM or a CPU description may be wrong where we could not try it. A kernel of a form that computes wrong numbers is not
used: the next form takes its place, and one warning says so.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

from edgellm.formats.errors import NumericError, UnsupportedError
from edgellm.kernels.cpu.compile import isa, kernel_table
from edgellm.kernels.cpu.compile.kernel_cache import KernelCache, default_folder
from edgellm.kernels.program import Executor
from edgellm.machine.progress import Progress


def verified_kernels(
    names: Sequence[str], form: str | None, on_compile: Progress | None, make_executor: Callable[..., Executor]
) -> tuple[KernelCache, dict[str, bytes]]:
    """Object code of the kernels, all of one form, with the cache it came from.

    ``form`` is the first to try, None the best. ``make_executor`` is CPUExecutor, which the test runs.
    Raises UnsupportedError when no form computes right on this CPU.
    """
    first = isa.detect(form).name
    forms = isa.available_forms()
    wrong: Exception | None = None
    for candidate in forms[forms.index(first) :]:
        cache = KernelCache(isa.detect(candidate), default_folder())
        objects = cache.objects(names, on_compile)
        found = _first_wrong(cache, [name for name in names if not cache.is_verified(name)], make_executor)
        if found is None:
            if wrong is not None:
                warnings.warn(
                    f"The {first} kernels compute wrong numbers on this CPU ({wrong}), so the slower {candidate} ones "
                    "are used. Please report the output of `edgellm doctor`.",
                    RuntimeWarning,
                    stacklevel=3,
                )
            return cache, objects
        wrong = wrong or found
    raise UnsupportedError(
        f"No kernels compute right numbers on this CPU ({wrong}), where the reference does. "
        "Use the reference executor, and please report the output of `edgellm doctor`.",
        code="KERNEL_SELFTEST",
    ) from wrong


def _first_wrong(cache: KernelCache, names: Sequence[str], make_executor: Callable[..., Executor]) -> Exception | None:
    """What is wrong with the first kernel that fails, None when all pass; those that do are marked in the cache."""
    if not names:
        return None
    from edgellm.kernels.cpu.compile import trials  # on a warm start there is nothing to try

    team = [name for name in names if name in kernel_table.TEAM]  # tried by running the others, but for the last
    tried = [name for name in names if name not in team] + [name for name in team if name == kernel_table.DECODE]
    try:
        for name in tried:
            result = trials.try_kernel(name, cache, make_executor)
            if not result.ok:
                found = f"{name}: error {result.nmse:.1e}, at most {result.limit:.0e} expected"
                return NumericError(found, code="KERNEL_SELFTEST")
            cache.mark_verified(name)
    except Exception as error:  # a broken kernel may break the test itself; the start goes on with the next form
        return error
    for name in team:
        cache.mark_verified(name)
    return None
