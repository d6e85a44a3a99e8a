"""The instruction sets that the CPU kernels know: how each is recognised and what it does better than portable code.

The kernels are portable LLVM IR with a dozen undefined primitives (``simd.py``). An ``Isa`` is the LLVM text that
defines them, with the CPU name and features LLVM compiles for. The integer sums are exact and the float ones have a
fixed order, so every instruction set with a fused multiply-add gives the same bits.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass

import llvmlite.binding as llvm

from edgellm.formats.errors import ParameterError
from edgellm.kernels.cpu.compile.arm_features import arm_features
from edgellm.kernels.cpu.lib import amx, neon, table_lookup


@dataclass(frozen=True)
class Isa:
    """A set of primitives and the target they are compiled for."""

    name: str
    triple: str
    cpu: str
    features: str
    primitives: str  # LLVM IR


FORMS = ("amx", "avx512_vnni", "avx_vnni", "avx2", "neon_i8mm", "neon_dotprod", "neon", "portable")
"""Best first. ``neon`` is for every 64-bit Arm, those before it for one that multiplies bytes, ``portable`` for all
other CPUs and SSE2 on old x86."""

EMULATED = ("neon_i8mm", "neon_dotprod", "neon")
"""Forms that ran in emulators only: their bits are tested there, their speed was never measured."""

FORM_VARIABLE = "EDGELLM_CPU_FORM"
"""Environment variable: the best form to use, to try or to measure what older CPUs run."""

FETCHES_TO_FIRST_LEVEL = ("znver5",)
"""CPUs, as LLVM names them, that fetch into the first level, and weights twice, for some requests are lost: Zen 5 reads
Q6_K at 27 GB/s a core through the second level, at 28 by one request, at 37 by two. On others, of which Zen 4 was
measured, a line on its way to the first level keeps one of its few miss buffers, and the kernel's own loads wait for
one: there Q4_K runs at 9.8 GB/s, through the second level at 20.3. An LLVM that is older
calls it by another name."""

ROWS_APART = ("sapphirerapids", "emeraldrapids")
"""CPUs whose own fetching reads eight rows fastest where they are far apart, with AVX-512: an Emerald Rapids, of which
that was measured, and the same core before it. The eight rows of a step are then an eighth of a thread's part apart."""

_AVX512 = ("avx512f", "avx512bw", "avx512vl", "avx512vnni", "fma", "f16c")
_AVX2 = ("avx2", "fma", "f16c")
_NEEDS = {
    "amx": ("amx-tile", "amx-int8", *_AVX512),
    "avx512_vnni": _AVX512,
    "avx_vnni": ("avxvnni", *_AVX2),
    "avx2": _AVX2,
    "neon_i8mm": ("neon", "dotprod", "i8mm"),
    "neon_dotprod": ("neon", "dotprod"),
    "neon": ("neon",),
    "portable": (),
}

_WIDER = ("avx512", "avx10", "amx", "avxvnni", "evex512", "sve", "sme")


@functools.cache
def host_features() -> dict[str, bool]:
    """What LLVM says this CPU has; on 64-bit Arm at least NEON, which it does not find on every system."""
    always = {"neon": True} | arm_features() if _is_arm(llvm.get_process_triple()) else {}
    try:
        return dict(llvm.get_host_cpu_features()) | always
    except RuntimeError:
        return always


def _is_arm(triple: str) -> bool:
    return triple.startswith(("aarch64", "arm64"))


def cpu_forms() -> list[str]:
    """The forms that this CPU can run, best first."""
    features = host_features()
    forms = [name for name in FORMS if all(features.get(need, False) for need in _NEEDS[name])]
    return [name for name in forms if name != "amx" or amx.permitted()]


def available_forms() -> list[str]:
    """The same from ``$EDGELLM_CPU_FORM`` on, as on a CPU that has no more. ParameterError if it has not even that."""
    forms, first = cpu_forms(), os.environ.get(FORM_VARIABLE)
    if not first:
        return forms
    if first not in forms:
        raise ParameterError(
            f"{FORM_VARIABLE} is {first!r}, but this CPU runs {', '.join(forms)}. Set it to one of these, or unset it.",
            code="KERNEL_FORM",
        )
    return forms[forms.index(first) :]


@functools.cache
def detect(form: str | None = None) -> Isa:
    """The best available form, or the one asked for. ParameterError if it is not available."""
    forms = available_forms()
    if form is None:
        form = forms[0]
    if form not in forms:
        raise ParameterError(
            f"kernel form {form!r} cannot run on this CPU, or {FORM_VARIABLE} excludes it; it runs {', '.join(forms)}. "
            "Choose one of these.",
            code="KERNEL_FORM",
        )
    features = host_features()
    flags = dict(features)
    if form not in ("amx", "avx512_vnni"):  # keep LLVM from using wider registers than the form is named for
        flags = {k: v and (k in _NEEDS[form] or not k.startswith(_WIDER)) for k, v in flags.items()}
    if form == "portable" and "sse2" in features:
        flags = {k: v and k in ("sse", "sse2", "cx8", "cmov", "fxsr", "mmx", "64bit", "x87") for k, v in flags.items()}
    text = ",".join(("+" if on else "-") + name for name, on in sorted(flags.items()))
    cpu = llvm.get_host_cpu_name() if form != "portable" else ""
    triple = llvm.get_process_triple()
    return Isa(form, triple, cpu, text, primitives(form, flags, triple, cpu))


def primitives(form: str, features: dict[str, bool], triple: str, cpu: str = "") -> str:
    """LLVM IR that defines every ``edgellm.*`` function that simd.py declares."""
    is_arm = _is_arm(triple)
    is_x86 = triple.startswith(("x86_64", "i686", "amd64"))
    same = {"amx": "avx512_vnni", "avx_vnni": "avx2"}  # of pmaddwd and an addition LLVM makes vpdpwssd by itself
    family = "neon" if form in neon.BYTE_PRODUCTS else same.get(form, form)
    parts = [_MADD[family], _COMPARE, amx.primitives(form == "amx"), neon.byte_products(form)]
    parts.append(table_lookup.primitive(family))
    parts.append(_FMA if is_arm or features.get("fma") else _MUL_ADD)
    parts.append(_HALF if is_arm or features.get("f16c") else _HALF_BITS)
    pause = "call void @llvm.x86.sse2.pause()" if is_x86 else "call void @llvm.aarch64.hint(i32 1)" if is_arm else ""
    parts.append(_PAUSE.replace("PAUSE", pause))
    parts.append(_FETCH_FIRST if cpu in FETCHES_TO_FIRST_LEVEL else _FETCH_SECOND)
    parts.append(_constant("rows_apart", family == "avx512_vnni" and cpu in ROWS_APART))
    return "\n".join(parts)


def _constant(name: str, value: bool) -> str:
    return f'define i64 @"edgellm.{name}"() alwaysinline {{\n  ret i64 {int(value)}\n}}'


def _mask(*lanes: int) -> str:
    return "<" + ", ".join(f"i32 {lane}" for lane in lanes) + ">"


def _portable_madd(name: str, n: int) -> str:
    return f"""
define <{n} x i32> @"edgellm.{name}"(<{n} x i32> %acc, <{2 * n} x i16> %a, <{2 * n} x i16> %b) alwaysinline {{
  %x = sext <{2 * n} x i16> %a to <{2 * n} x i32>
  %y = sext <{2 * n} x i16> %b to <{2 * n} x i32>
  %m = mul nsw <{2 * n} x i32> %x, %y
  %even = shufflevector <{2 * n} x i32> %m, <{2 * n} x i32> poison, <{n} x i32> {_mask(*range(0, 2 * n, 2))}
  %odd = shufflevector <{2 * n} x i32> %m, <{2 * n} x i32> poison, <{n} x i32> {_mask(*range(1, 2 * n, 2))}
  %p = add <{n} x i32> %even, %odd
  %r = add <{n} x i32> %acc, %p
  ret <{n} x i32> %r
}}"""


_MADD = {
    # the arguments as LLVM had them until version 21; later ones rewrite them
    "avx512_vnni": """
declare <16 x i32> @llvm.x86.avx512.vpdpwssd.512(<16 x i32>, <16 x i32>, <16 x i32>)
define <16 x i32> @"edgellm.madd"(<16 x i32> %acc, <32 x i16> %a, <32 x i16> %b) alwaysinline {
  %x = bitcast <32 x i16> %a to <16 x i32>
  %y = bitcast <32 x i16> %b to <16 x i32>
  %r = call <16 x i32> @llvm.x86.avx512.vpdpwssd.512(<16 x i32> %acc, <16 x i32> %x, <16 x i32> %y)
  ret <16 x i32> %r
}
declare <8 x i32> @llvm.x86.avx512.vpdpwssd.256(<8 x i32>, <8 x i32>, <8 x i32>)
define <8 x i32> @"edgellm.madd8"(<8 x i32> %acc, <16 x i16> %a, <16 x i16> %b) alwaysinline {
  %x = bitcast <16 x i16> %a to <8 x i32>
  %y = bitcast <16 x i16> %b to <8 x i32>
  %r = call <8 x i32> @llvm.x86.avx512.vpdpwssd.256(<8 x i32> %acc, <8 x i32> %x, <8 x i32> %y)
  ret <8 x i32> %r
}
declare <16 x i32> @llvm.x86.avx512.vpdpbusd.512(<16 x i32>, <16 x i32>, <16 x i32>)
define <16 x i32> @"edgellm.dot_bytes"(<16 x i32> %acc, <8 x i64> %u, <8 x i64> %s) alwaysinline {
  %x = bitcast <8 x i64> %u to <16 x i32>
  %y = bitcast <8 x i64> %s to <16 x i32>
  %r = call <16 x i32> @llvm.x86.avx512.vpdpbusd.512(<16 x i32> %acc, <16 x i32> %x, <16 x i32> %y)
  ret <16 x i32> %r
}
declare <64 x i8> @llvm.x86.avx512.pshuf.b.512(<64 x i8>, <64 x i8>)
define <8 x i64> @"edgellm.lookup_64"(<64 x i8> %table, <8 x i64> %names) alwaysinline {
  %n = bitcast <8 x i64> %names to <64 x i8>
  %b = call <64 x i8> @llvm.x86.avx512.pshuf.b.512(<64 x i8> %table, <64 x i8> %n)
  %r = bitcast <64 x i8> %b to <8 x i64>
  ret <8 x i64> %r
}""",
    "avx2": f"""
declare <8 x i32> @llvm.x86.avx2.pmadd.wd(<16 x i16>, <16 x i16>)
define <16 x i32> @"edgellm.madd"(<16 x i32> %acc, <32 x i16> %a, <32 x i16> %b) alwaysinline {{
  %a0 = shufflevector <32 x i16> %a, <32 x i16> poison, <16 x i32> {_mask(*range(16))}
  %a1 = shufflevector <32 x i16> %a, <32 x i16> poison, <16 x i32> {_mask(*range(16, 32))}
  %b0 = shufflevector <32 x i16> %b, <32 x i16> poison, <16 x i32> {_mask(*range(16))}
  %b1 = shufflevector <32 x i16> %b, <32 x i16> poison, <16 x i32> {_mask(*range(16, 32))}
  %p0 = call <8 x i32> @llvm.x86.avx2.pmadd.wd(<16 x i16> %a0, <16 x i16> %b0)
  %p1 = call <8 x i32> @llvm.x86.avx2.pmadd.wd(<16 x i16> %a1, <16 x i16> %b1)
  %p = shufflevector <8 x i32> %p0, <8 x i32> %p1, <16 x i32> {_mask(*range(16))}
  %r = add <16 x i32> %acc, %p
  ret <16 x i32> %r
}}
define <8 x i32> @"edgellm.madd8"(<8 x i32> %acc, <16 x i16> %a, <16 x i16> %b) alwaysinline {{
  %p = call <8 x i32> @llvm.x86.avx2.pmadd.wd(<16 x i16> %a, <16 x i16> %b)
  %r = add <8 x i32> %acc, %p
  ret <8 x i32> %r
}}
declare <16 x i16> @llvm.x86.avx2.pmadd.ub.sw(<32 x i8>, <32 x i8>)
define <16 x i16> @"edgellm.dot_pairs"(<32 x i8> %u, <32 x i8> %s) alwaysinline {{
  %r = call <16 x i16> @llvm.x86.avx2.pmadd.ub.sw(<32 x i8> %u, <32 x i8> %s)
  ret <16 x i16> %r
}}""",
    "neon": neon.MADD,
    # LLVM knows this pattern: pmaddwd on SSE2
    "portable": _portable_madd("madd", 16) + _portable_madd("madd8", 8),
}

_COMPARE = """
declare <16 x float> @llvm.fabs.v16f32(<16 x float>)
define <16 x float> @"edgellm.max16"(<16 x float> %a, <16 x float> %b) alwaysinline {
  %c = fcmp ogt <16 x float> %a, %b
  %r = select <16 x i1> %c, <16 x float> %a, <16 x float> %b
  ret <16 x float> %r
}
define <16 x float> @"edgellm.min16"(<16 x float> %a, <16 x float> %b) alwaysinline {
  %c = fcmp olt <16 x float> %a, %b
  %r = select <16 x i1> %c, <16 x float> %a, <16 x float> %b
  ret <16 x float> %r
}
define <16 x float> @"edgellm.abs16"(<16 x float> %a) alwaysinline {
  %r = call <16 x float> @llvm.fabs.v16f32(<16 x float> %a)
  ret <16 x float> %r
}"""


def _fma(suffix: str, vector: str, fused: bool) -> str:
    if fused:
        intrinsic = "llvm.fma." + ("f32" if suffix == "1" else f"v{suffix}f32")
        declare = f"declare {vector} @{intrinsic}({vector}, {vector}, {vector})\n"
        body = f"  %r = call {vector} @{intrinsic}({vector} %a, {vector} %b, {vector} %c)"
    else:
        declare, body = "", f"  %m = fmul {vector} %a, %b\n  %r = fadd {vector} %m, %c"
    head = f'define {vector} @"edgellm.fma{suffix}"({vector} %a, {vector} %b, {vector} %c) alwaysinline {{'
    return f"{declare}{head}\n{body}\n  ret {vector} %r\n}}"


_WIDTHS = (("1", "float"), ("4", "<4 x float>"), ("8", "<8 x float>"), ("16", "<16 x float>"))
_FMA = "\n".join(_fma(suffix, vector, True) for suffix, vector in _WIDTHS)
_MUL_ADD = "\n".join(_fma(suffix, vector, False) for suffix, vector in _WIDTHS)


def _half(n: int) -> str:
    return f"""
define <{n} x float> @"edgellm.half{n}"(<{n} x i16> %h) alwaysinline {{
  %x = bitcast <{n} x i16> %h to <{n} x half>
  %r = fpext <{n} x half> %x to <{n} x float>
  ret <{n} x float> %r
}}"""


_HALF = (
    _half(8)
    + _half(16)
    + """
define <16 x i16> @"edgellm.tohalf16"(<16 x float> %x) alwaysinline {
  %h = fptrunc <16 x float> %x to <16 x half>
  %r = bitcast <16 x half> %h to <16 x i16>
  ret <16 x i16> %r
}"""
)


def _splat(n: int, value: int) -> str:
    return "<" + ", ".join([f"i32 {value}"] * n) + ">"


def _half_from_bits(n: int) -> str:
    """binary16 to binary32 in integers: shift the magnitude, scale by 2^112, restore infinity and NaN."""
    i32, scale = f"<{n} x i32>", "<" + ", ".join(["float 0x46F0000000000000"] * n) + ">"
    return f"""
define <{n} x float> @"edgellm.half{n}"(<{n} x i16> %h) alwaysinline {{
  %x = zext <{n} x i16> %h to {i32}
  %s = and {i32} %x, {_splat(n, 0x8000)}
  %sign = shl {i32} %s, {_splat(n, 16)}
  %magnitude = and {i32} %x, {_splat(n, 0x7FFF)}
  %shifted = shl {i32} %magnitude, {_splat(n, 13)}
  %f = bitcast {i32} %shifted to <{n} x float>
  %scaled = fmul <{n} x float> %f, {scale}
  %finite = bitcast <{n} x float> %scaled to {i32}
  %special = icmp uge {i32} %magnitude, {_splat(n, 0x7C00)}
  %infinite = or {i32} %shifted, {_splat(n, 0x7F800000)}
  %bits = select <{n} x i1> %special, {i32} %infinite, {i32} %finite
  %all = or {i32} %bits, %sign
  %r = bitcast {i32} %all to <{n} x float>
  ret <{n} x float> %r
}}"""


_HALF_BITS = (
    _half_from_bits(8)
    + _half_from_bits(16)
    + f"""
define <16 x i16> @"edgellm.tohalf16"(<16 x float> %x) alwaysinline {{
  %b = bitcast <16 x float> %x to <16 x i32>
  %s = lshr <16 x i32> %b, {_splat(16, 16)}
  %sign = and <16 x i32> %s, {_splat(16, 0x8000)}
  %a = and <16 x i32> %b, {_splat(16, 0x7FFFFFFF)}
  %up = lshr <16 x i32> %a, {_splat(16, 13)}
  %odd = and <16 x i32> %up, {_splat(16, 1)}
  %r0 = add <16 x i32> %a, {_splat(16, 0xFFF - 0x38000000)}
  %r1 = add <16 x i32> %r0, %odd
  %normal = lshr <16 x i32> %r1, {_splat(16, 13)}
  %af = bitcast <16 x i32> %a to <16 x float>
  %sum = fadd <16 x float> %af, <{", ".join(["float 5.0e-1"] * 16)}>
  %sb = bitcast <16 x float> %sum to <16 x i32>
  %small = sub <16 x i32> %sb, {_splat(16, 0x3F000000)}
  %is_small = icmp ult <16 x i32> %a, {_splat(16, 0x38800000)}
  %finite = select <16 x i1> %is_small, <16 x i32> %small, <16 x i32> %normal
  %is_nan = icmp ugt <16 x i32> %a, {_splat(16, 0x7F800000)}
  %special = select <16 x i1> %is_nan, <16 x i32> {_splat(16, 0x7E00)}, <16 x i32> {_splat(16, 0x7C00)}
  %is_large = icmp uge <16 x i32> %a, {_splat(16, 0x477FF000)}
  %m = select <16 x i1> %is_large, <16 x i32> %special, <16 x i32> %finite
  %w = or <16 x i32> %m, %sign
  %r = trunc <16 x i32> %w to <16 x i16>
  ret <16 x i16> %r
}}"""
)

_PAUSE = """
declare void @llvm.x86.sse2.pause()
declare void @llvm.aarch64.hint(i32)
define void @"edgellm.pause"() alwaysinline {
  PAUSE
  ret void
}"""


def _prefetch(name: str, locality: int) -> str:
    return f"""
define void @"edgellm.{name}"(i64 %address) alwaysinline {{
  %p = inttoptr i64 %address to ptr
  call void @llvm.prefetch.p0(ptr %p, i32 0, i32 {locality}, i32 1)
  ret void
}}"""


def _prefetches(locality: int, again: str) -> str:
    levels = {"fetch": locality, "fetch_first": 3, "fetch_later": 2}
    return f"""
declare void @llvm.prefetch.p0(ptr, i32, i32, i32)
{"".join(_prefetch(name, level) for name, level in levels.items())}
define void @"edgellm.fetch_weights"(i64 %far) alwaysinline {{
  call void @"edgellm.fetch"(i64 %far){again}
  ret void
}}"""


_FETCH_SECOND = _prefetches(2, "")
_FETCH_FIRST = _prefetches(
    3,
    """
  %near = sub i64 %far, 4096
  call void @"edgellm.fetch"(i64 %near)""",
)
