"""The kernels as code for Arm CPUs: NEON in the inner loops, no calls, and which form such a CPU is given."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import arm_assembly
import llvmlite.binding as llvm
import pytest
from arm_assembly import Instruction, faults

from edgellm.formats.errors import ParameterError
from edgellm.kernels.cpu.compile import arm_features, isa, jit

# one of each kind; `python tests/arm_assembly.py` looks at all of them
KERNELS = (
    "team_work", "rms_norm", "quantize", "add", "gated_silu", "attention", "matmul_q4_1", "matmul_q6_k", "matmul_f16",
    "embed_q8_0", "top_k",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _code_generator() -> None:
    try:
        arm_assembly.target("generic")
    except RuntimeError:
        pytest.skip("this llvmlite has no code generator for Arm")


@pytest.mark.parametrize("kernel", KERNELS)
def test_inner_loops_work_on_vectors(kernel: str) -> None:
    assert faults(kernel, arm_assembly.assembly(kernel, "cortex-a76")) == []


@pytest.mark.parametrize("cpu", ["apple-m1", "generic"])
@pytest.mark.parametrize("kernel", ["matmul_q4_1", "attention"])
def test_other_arm_cpus_get_vectors_too(kernel: str, cpu: str) -> None:
    assert faults(kernel, arm_assembly.assembly(kernel, cpu)) == []


@pytest.mark.parametrize("form", ["neon_dotprod", "neon_i8mm"])
@pytest.mark.parametrize("kernel", ["quantize", "matmul_q4_1", "matmul_q6_k"])
def test_products_of_bytes_keep_their_sums_in_registers(kernel: str, form: str) -> None:
    text = arm_assembly.assembly(kernel, "generic", form)
    assert faults(kernel, text) == []
    if kernel != "quantize":
        product = r"\tsdot\tv\d+.4s, v\d+.16b, v\d+.4b\[" if form == "neon_dotprod" else r"\tsmmla\t"
        assert re.search(product, text) and not re.search(r"\tsmlal2?\t", text)


def test_a_product_is_added_by_the_instruction_that_makes_it() -> None:
    """The portable pattern takes smull, smull2, addp and add."""
    text = arm_assembly.assembly("matmul_q4_1", "cortex-a76")
    assert text.count("\tsmlal") > 4 * text.count("\tsmull")


# ---- the judge of these tests ----------------------------------------------------------------------------------------

LOOP = """
edgellm_add:
.LBB0_1:
\tldr\tq0, [x0]
.LBB0_2:
{body}
\tb.ne\t.LBB0_2
\tcbnz\tx1, .LBB0_1
\tret
"""


def test_loops_are_found_and_told_apart() -> None:
    text = LOOP.format(body="\tfadd\tv0.4s, v1.4s, v2.4s")
    assert list(arm_assembly.innermost_loops(text)) == [
        [Instruction("fadd", "v0.4s, v1.4s, v2.4s", True), Instruction("b.ne", ".LBB0_2", False)]
    ]
    assert faults("add", text) == []
    assert faults("add", LOOP.format(body="\tfadd.4s\tv0, v1, v2")) == []  # as Apple writes it


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ("\tfadd\ts0, s1, s2", "no vector fadd in a loop"),
        ("\tfadd\tv0.4s, v1.4s, v2.4s\n\tbl\tfmaf", "calls fmaf"),
        ("\tfadd\tv0.4s, v1.4s, v2.4s\n\tblr\tx8", "calls an address in x8"),
        ("\tfadd\tv0.4s, v1.4s, v2.4s\n\tfmul\tv0.4s, v1.4s, v2.4s\n" + 2 * "\tmov\tv0.s[1], w3\n",
         "2 lanes moved one by one in a loop of 1 vector products"),
        ("\tfadd\tv0.4s, v1.4s, v2.4s\n\tfmul\tv0.4s, v1.4s, v2.4s\n" + 2 * "\tumov\tw3, v0.b[1]\n",
         "2 lanes moved one by one in a loop of 1 vector products"),
    ],
)  # fmt: skip
def test_faults_are_seen(body: str, fault: str) -> None:
    assert faults("add", LOOP.format(body=body)) == [fault]


# ---- on an Arm machine -----------------------------------------------------------------------------------------------


@pytest.fixture
def on_arm(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """This process believes that it runs on an Arm Linux whose features LLVM finds."""
    monkeypatch.setattr(llvm, "get_process_triple", lambda: arm_assembly.LINUX)
    monkeypatch.setattr(llvm, "get_host_cpu_name", lambda: "neoverse-v1")
    monkeypatch.setattr(llvm, "get_host_cpu_features", lambda: {"neon": True, "dotprod": True, "sve": True})
    caches = (isa.host_features, isa.detect, arm_features.arm_features)
    for function in caches:
        function.cache_clear()
    yield monkeypatch
    for function in caches:
        function.cache_clear()


def test_an_arm_cpu_gets_neon_for_its_own_name_and_never_sve(on_arm: pytest.MonkeyPatch) -> None:
    assert isa.available_forms() == ["neon_dotprod", "neon", "portable"]
    for form in ("neon_dotprod", "neon"):
        found = isa.detect(form)
        assert (found.name, found.cpu) == (form, "neoverse-v1")
        assert set(found.features.split(",")) == {"+neon", "+dotprod", "-sve"}
    assert isa.detect().name == "neon_dotprod"
    with pytest.raises(ParameterError, match="neon_dotprod, neon, portable"):
        isa.detect("avx2")


def test_an_arm_cpu_that_llvm_knows_nothing_of_has_neon(on_arm: pytest.MonkeyPatch) -> None:
    """As on macOS, where no list of features is to be had."""

    def unknown() -> dict[str, bool]:
        raise RuntimeError("failed to get host cpu features.")

    on_arm.setattr(llvm, "get_host_cpu_features", unknown)
    assert isa.available_forms() == ["neon", "portable"]
    assert isa.detect().features == "+neon"


@pytest.mark.parametrize(
    ("hwcap", "hwcap2", "form"),
    [(1 << 1, 1 << 13, "neon"), (1 << 20, 0, "neon_dotprod"), (1 << 20 | 1, 1 << 13 | 1, "neon_i8mm")],
)
def test_linux_says_what_an_arm_cpu_multiplies(on_arm: pytest.MonkeyPatch, hwcap: int, hwcap2: int, form: str) -> None:
    entries = {16: hwcap, 26: hwcap2}
    _ask_this(on_arm, "linux", getauxval=lambda entry: entries[entry])
    assert isa.detect().name == form


@pytest.mark.parametrize(
    ("known", "form"),
    [
        ((), "neon"),
        ((b"hw.optional.arm.FEAT_DotProd",), "neon_dotprod"),
        ((b"hw.optional.arm.FEAT_DotProd", b"hw.optional.arm.FEAT_I8MM"), "neon_i8mm"),
    ],
)
def test_macos_says_what_an_arm_cpu_multiplies(on_arm: pytest.MonkeyPatch, known: tuple[bytes, ...], form: str) -> None:
    def sysctlbyname(name: bytes, value: Any, nbytes: Any, new: Any, new_nbytes: int) -> int:
        value._obj.value = name in known
        return 0 if name in known else -1

    _ask_this(on_arm, "darwin", sysctlbyname=sysctlbyname)
    assert isa.detect().name == form


def _ask_this(patch: pytest.MonkeyPatch, system: str, **functions: Callable[..., int]) -> None:
    """A libc of an Arm machine in place of this one's; LLVM finds nothing."""

    class Function:
        def __init__(self, answer: Callable[..., int]) -> None:
            self.answer = answer

        def __call__(self, *arguments: Any) -> int:
            return self.answer(*arguments)

    libc = SimpleNamespace(**{name: Function(answer) for name, answer in functions.items()})
    patch.setattr(llvm, "get_host_cpu_features", lambda: {"neon": True})
    patch.setattr(arm_features.platform, "machine", lambda: "arm64")
    patch.setattr(arm_features.sys, "platform", system)
    patch.setattr(arm_features.ctypes, "CDLL", lambda name: libc)
    arm_features.arm_features.cache_clear()
    isa.host_features.cache_clear()
    isa.detect.cache_clear()


CALLS_MEMSET = """
target triple = "x86_64-unknown-linux-gnu"
target datalayout = ""
declare void @memset(ptr, i32, i64)
define void @edgellm_clear(i64 %op, i64 %step, i64 %thread, i64 %n) {
  %p = inttoptr i64 %op to ptr
  call void @memset(ptr %p, i32 0, i64 %n)
  ret void
}
"""


def test_code_for_macos_reaches_libc_at_any_distance() -> None:
    """LLVM's loader of Mach-O makes no stubs, and a direct call ends after 128 MB."""
    linux, macos = (jit.assembly("clear", CALLS_MEMSET, arm_assembly.target(cpu)) for cpu in ("cortex-a76", "apple-m1"))
    assert "_memset@GOTPAGE" in macos and "bl\t_memset" not in macos and "b\t_memset" not in macos
    assert "b\tmemset" in linux
