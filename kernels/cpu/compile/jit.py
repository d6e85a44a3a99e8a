"""From a Python function to an object file: numba types it and writes LLVM IR, LLVM compiles that for the chosen CPU.

Numba's own optimiser and JIT are left out: they would compile for the CPU they stand on, twice, and keep the code in
pickles. A kernel becomes one relocatable object with one exported symbol, which ``kernel_cache`` can keep as bytes and
``load_object`` can run without importing numba.

Kernels have one signature, ``void kernel(op, step, thread, n_threads)``, all int64: the address of the op's row in
the table, the address of the step's record (``layout.py``), and who is calling.
"""

from __future__ import annotations

import ctypes
import importlib
import re
from typing import Any

import llvmlite.binding as llvm

from edgellm.formats.errors import EdgeLLMError
from edgellm.kernels.cpu.compile.isa import Isa

llvm.initialize_native_target()
llvm.initialize_native_asmprinter()

SYMBOL = "edgellm_{}"

KERNEL = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)
"""A loaded kernel as Python calls it, by its address."""

_LIBC = {"memset", "memcpy", "memmove"}


def _is_intrinsic(name: str) -> bool:
    return name.startswith("llvm.")


def compile_object(name: str, function: Any, isa: Isa) -> bytes:
    """The object code of a kernel for an instruction set. Imports numba; takes about half a second."""
    return compile_ir(name, portable_ir(name, function), isa)


def portable_ir(name: str, function: Any) -> str:
    """Unoptimised LLVM IR of a kernel and everything it calls, the primitives of simd.py undefined."""
    frontend = importlib.import_module("edgellm.kernels.cpu.compile.numba_frontend")
    return str(frontend.kernel_ir(SYMBOL.format(name), function))


def compile_ir(name: str, ir_text: str, isa: Isa) -> bytes:
    """Link the primitives in, optimise, and emit an object for the ISA's target."""
    machine, module = _optimised(name, ir_text, isa)
    return bytes(machine.emit_object(module))


def assembly(name: str, ir_text: str, isa: Isa) -> str:
    """The same as text, to read."""
    machine, module = _optimised(name, ir_text, isa)
    return str(machine.emit_assembly(module))


def _optimised(name: str, ir_text: str, isa: Isa) -> tuple[llvm.TargetMachine, llvm.ModuleRef]:
    # Where macOS runs on Arm, LLVM's loader gives a call no stub, and libc is too far for a direct one
    codemodel = "large" if isa.triple.startswith(("arm64-apple", "aarch64-apple")) else "small"
    machine = llvm.Target.from_triple(isa.triple).create_target_machine(
        cpu=isa.cpu, features=isa.features, opt=3, reloc="pic", codemodel=codemodel, jit=True
    )
    context = llvm.create_context()  # of its own, which takes its types and constants along when it goes
    module = llvm.parse_assembly(_retarget(ir_text, isa.triple, str(machine.target_data)), context)
    primitives = llvm.parse_assembly(isa.primitives, context)
    primitives.triple, primitives.data_layout = isa.triple, str(machine.target_data)
    module.link_in(primitives)
    for function in module.functions:
        if not function.is_declaration and function.name != SYMBOL.format(name):
            function.linkage = llvm.Linkage.internal
    tuning = llvm.create_pipeline_tuning_options(speed_level=3)
    tuning.slp_vectorization = True
    builder = llvm.create_pass_builder(machine, tuning)
    builder.getModulePassManager().run(module, builder)
    foreign = [
        f.name for f in module.functions if f.is_declaration and f.name not in _LIBC and not _is_intrinsic(f.name)
    ]
    assert not foreign, f"kernel {name} calls {foreign}, which only numba's process has"
    return machine, module


def _retarget(ir_text: str, triple: str, layout: str) -> str:
    """The same IR for another machine: both our targets are 64-bit and little-endian, so only the header differs."""
    text = re.sub(r'^target triple = ".*"$', f'target triple = "{triple}"', ir_text, flags=re.M)
    return re.sub(r'^target datalayout = ".*"$', f'target datalayout = "{layout}"', text, flags=re.M)


class CodeMemory:
    """Loaded object code. Addresses stay valid as long as this lives, which is until the process ends."""

    def __init__(self) -> None:
        machine = llvm.Target.from_triple(llvm.get_process_triple()).create_target_machine(jit=True)
        # llvmlite's own memory manager reserves one space for all sections of an object. LLVM's takes any hole for
        # each, and aborts the process when a mapped model of 2 GiB lies between code and its constants.
        self._engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine, use_lmm=True)

    def load(self, name: str, code: bytes) -> int:
        """Map an object that ``compile_object`` made on this machine and return its kernel's address."""
        self._engine.add_object_file(llvm.ObjectFileRef.from_data(code))
        self._engine.finalize_object()
        address = int(self._engine.get_function_address(SYMBOL.format(name)))
        if not address:
            raise EdgeLLMError(
                f"The object code of the kernel {name} lacks its symbol. Delete it: edgellm doctor --clear-cache",
                code="KERNEL_CODE",
            )
        return address
