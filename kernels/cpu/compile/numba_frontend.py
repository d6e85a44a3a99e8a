"""The one place that knows numba's inside: a Python function in, the LLVM IR of it and of all it calls out.

Numba compiles through a "codegen" that optimises and loads every function it sees. While a kernel is being compiled
that codegen is replaced by one that only links, so that the IR stays portable and is optimised once, later, for the
target that ``isa.py`` chose. Written against numba 0.61 to 0.68.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from numba.core import codegen, compiler, registry, types
from numba.core.compiler_lock import global_compiler_lock

KERNEL_SIGNATURE = types.void(types.int64, types.int64, types.int64, types.int64)


class _LinkOnlyLibrary(codegen.JITCodeLibrary):
    """Functions joined into one module, neither optimised nor loaded."""

    def _optimize_functions(self, ll_module: Any) -> None:
        ll_module.data_layout = self._codegen._data_layout

    def _optimize_final_module(self) -> None:
        pass

    def _finalize_final_module(self) -> None:
        self._finalized = True


class _LinkOnlyCodegen(codegen.JITCPUCodegen):
    _library_class = _LinkOnlyLibrary

    def set_env(self, env_name: str, env: Any) -> None:
        """Nothing is loaded, and kernels use no Python objects: there is no environment to fill in."""


_lock = threading.Lock()
_codegen: Any = None


@contextmanager
def _link_only() -> Iterator[None]:
    global _codegen
    context = registry.cpu_target.target_context
    if _codegen is None:
        _codegen = _LinkOnlyCodegen("edgellm")
    original = context._internal_codegen
    context._internal_codegen = _codegen
    try:
        yield
    finally:
        context._internal_codegen = original


def kernel_ir(symbol: str, function: Callable[..., None]) -> str:
    """LLVM IR that defines ``void symbol(i64, i64, i64, i64)`` from a Python kernel and the blocks it calls."""
    flags = compiler.Flags()
    flags.no_cpython_wrapper = True
    flags.no_cfunc_wrapper = True
    flags.error_model = "numpy"
    flags.nrt = False
    with _lock, global_compiler_lock, _link_only():
        result = compiler.compile_extra(
            registry.cpu_target.typing_context,
            registry.cpu_target.target_context,
            function,
            KERNEL_SIGNATURE.args,
            KERNEL_SIGNATURE.return_type,
            flags,
            {},
        )
        text = str(result.library._final_module)
        # numba keeps what it compiled for callers to come, with the modules of all that it calls: 60 MB of a product
        registry.cpu_target.target_context.remove_user_function(result.entry_point)
        return text + _ENTRY.format(symbol=symbol, native=result.fndesc.llvm_func_name)


# numba's functions return a status and leave an exception behind; a kernel has no use for either
_ENTRY = """
define void @{symbol}(i64 %op, i64 %step, i64 %thread, i64 %n_threads) {{
  %result = alloca ptr
  %exception = alloca ptr
  %status = call i32 @"{native}"(
    ptr %result, ptr %exception, i64 %op, i64 %step, i64 %thread, i64 %n_threads
  ) alwaysinline
  ret void
}}
"""
