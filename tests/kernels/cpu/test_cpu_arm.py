"""The kernels as code for Arm CPUs: NEON in the inner loops, no calls, and which form such a CPU is given."""

from __future__ import annotations

from collections.abc import Iterator

import arm_assembly
import llvmlite.binding as llvm
import pytest
from arm_assembly import Instruction, faults

from edgellm.formats.errors import ParameterError
from edgellm.kernels.cpu.compile import isa, jit

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
    caches = (isa.host_features, isa.detect)
    for function in caches:
        function.cache_clear()
    yield monkeypatch
    for function in caches:
        function.cache_clear()


def test_an_arm_cpu_gets_neon_for_its_own_name_and_never_sve(on_arm: pytest.MonkeyPatch) -> None:
    assert isa.available_forms() == ["neon", "portable"]
    found = isa.detect()
    assert (found.name, found.cpu) == ("neon", "neoverse-v1")
    assert set(found.features.split(",")) == {"+neon", "+dotprod", "-sve"}
    with pytest.raises(ParameterError, match="neon, portable"):
        isa.detect("avx2")


def test_an_arm_cpu_that_llvm_knows_nothing_of_has_neon(on_arm: pytest.MonkeyPatch) -> None:
    """As on macOS, where no list of features is to be had."""

    def unknown() -> dict[str, bool]:
        raise RuntimeError("failed to get host cpu features.")

    on_arm.setattr(llvm, "get_host_cpu_features", unknown)
    assert isa.available_forms() == ["neon", "portable"]
    assert isa.detect().features == "+neon"


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
