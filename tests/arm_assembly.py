"""The kernels as assembly for Arm CPUs, and what is wrong with it: calls, loops without vectors, numbers taken apart.

``test_cpu_arm.py`` looks at one kernel of each kind; ``python tests/arm_assembly.py`` at all of them, for every CPU.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass

import llvmlite.binding as llvm

from edgellm.kernels.cpu.compile import isa, jit, kernel_table
from edgellm.kernels.cpu.compile.kernel_table import KERNELS, TEAM

FORMS = {"neon": "+neon", "neon_dotprod": "+neon,+dotprod", "neon_i8mm": "+neon,+dotprod,+i8mm"}
"""The forms for Arm, with the features that they need."""
LINUX, MACOS = "aarch64-unknown-linux-gnu", "arm64-apple-darwin"
CPUS = {"cortex-a76": LINUX, "apple-m1": MACOS, "generic": LINUX}  # generic: any 64-bit Arm, armv8-a

# kernels by the beginning of their name -> vector instructions that their innermost loops must have, one of each group
LOOPS: dict[str, tuple[str, ...]] = {
    "matmul_f16": ("fmla", "fcvtl"),
    "matmul_f32": ("fmla",),
    "matmul_bf16": ("fmla", "shll|ushll"),
    "matmul_": ("smlal", "smlal2", "fmla"),
    "embed_q": ("fmul|fmla", "scvtf|ucvtf"),
    "attention": ("fmla",),
    "gated_": ("fmla", "fdiv"),
    "rms_norm": ("fmla",),
    "quantize": ("fmul", "fcvtzs"),
    "add": ("fadd",),
}


@dataclass(frozen=True)
class Instruction:
    """One line of assembly. ``name`` is without the shape that Apple writes after it: fmla.4s."""

    name: str
    operands: str
    is_vector: bool

    @property
    def takes_apart(self) -> bool:
        """Moves one lane of a vector to or from an integer register."""
        return self.name in ("umov", "smov") or (
            self.name in ("mov", "ins") and "[" in self.operands and bool(re.search(r"\b[wx]\d+", self.operands))
        )


@functools.cache
def portable_ir(kernel: str, multiplies_bytes: bool = False) -> str:
    """LLVM IR before any CPU is chosen: the slow part, done once."""
    return jit.portable_ir(kernel, kernel_table.function(kernel, "neon_dotprod" if multiplies_bytes else None))


@functools.cache
def target(cpu: str, form: str = "neon") -> isa.Isa:
    """The kernels' target for a CPU of the table. RuntimeError where llvmlite has no code generator for Arm."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    triple = CPUS[cpu]
    llvm.Target.from_triple(triple)
    return isa.Isa(
        form, triple, "" if cpu == "generic" else cpu, FORMS[form], isa.primitives(form, {"neon": True}, triple)
    )


@functools.cache
def assembly(kernel: str, cpu: str, form: str = "neon") -> str:
    """What ``jit.compile_ir`` makes of a kernel for an Arm CPU, as text."""
    return jit.assembly(kernel, portable_ir(kernel, form != "neon"), target(cpu, form))


def _instruction(line: str) -> Instruction | None:
    found = re.match(r"\s+([a-z][a-z0-9]*)((?:\.\w+)?)\s*([^/;]*)", line)
    if found is None:
        return None
    name, shape, operands = found.groups()
    if name == "b":
        name += shape
    return Instruction(name, operands.strip(), bool(re.search(r"\.\d+[bhsd]\b", f"{shape} {operands}")))


def innermost_loops(text: str) -> Iterator[list[Instruction]]:
    """Instructions from a label to the last branch back to it, where no smaller such part lies inside."""
    labels: dict[str, int] = {}
    lines: list[Instruction] = []
    spans: dict[int, int] = {}
    for line in text.splitlines():
        if label := re.match(r"(\.?LBB\w+):", line):
            labels[label[1]] = len(lines)
        elif (instruction := _instruction(line)) is not None:
            lines.append(instruction)
            goal = re.search(r"\.?LBB\w+$", instruction.operands)
            if goal and goal[0] in labels and re.fullmatch(r"b(\.\w+)?|cbn?z|tbn?z", instruction.name):
                spans[labels[goal[0]]] = len(lines)
    for start, stop in spans.items():
        if not any(start <= a and b <= stop and (a, b) != (start, stop) for a, b in spans.items()):
            yield lines[start:stop]


def faults(kernel: str, text: str) -> list[str]:
    """What a kernel's assembly should not have, or lacks."""
    found = [f"calls {name}" for name in re.findall(r"^\s+bl\s+(\S+)", text, re.M)]
    if kernel not in TEAM:
        found += [f"calls an address in {name}" for name in re.findall(r"^\s+blr\s+(\S+)", text, re.M)]
    loops = list(innermost_loops(text))
    vector_names = {i.name for loop in loops for i in loop if i.is_vector}
    wanted = next((names for prefix, names in LOOPS.items() if kernel.startswith(prefix)), ())
    if "smlal" in wanted and vector_names & set(_PRODUCTS_OF_BYTES):
        wanted = ("mla|fmla",)
    found += [f"no vector {name} in a loop" for name in wanted if not vector_names & set(name.split("|"))]
    for loop in loops:
        products = sum(i.is_vector and i.name in _PRODUCTS for i in loop)
        apart = sum(i.takes_apart for i in loop)
        if products and apart > products:
            found.append(f"{apart} lanes moved one by one in a loop of {products} vector products")
        on_stack, of_bytes = sum("[sp" in i.operands for i in loop), sum(i.name in _PRODUCTS_OF_BYTES for i in loop)
        if of_bytes and on_stack > of_bytes // 8:
            found.append(f"{on_stack} accesses to the stack in a loop of {of_bytes} products of bytes")
    return found


_PRODUCTS_OF_BYTES = ("sdot", "smmla")
_PRODUCTS = ("fmla", "smlal", "smlal2", "smull", "smull2", "fmul", *_PRODUCTS_OF_BYTES)


def main() -> None:
    """Print every fault of every kernel for every CPU."""
    for form, cpu, kernel in itertools.product(FORMS, CPUS, KERNELS):
        found = "; ".join(faults(kernel, assembly(kernel, cpu, form))) or "ok"
        print(f"{form:12}  {cpu:10}  {kernel:20}  {found}", flush=True)


if __name__ == "__main__":
    main()
