"""One primitive, in LLVM IR: 32 bytes, each replaced by that of 16 levels which it names."""

from __future__ import annotations


def _neon() -> str:
    """Two lookups of 16 bytes."""
    low, high = (", ".join(f"i32 {lane}" for lane in range(first, first + 16)) for first in (0, 16))
    return f"""
declare <16 x i8> @llvm.aarch64.neon.tbl1.v16i8(<16 x i8>, <16 x i8>)
define <32 x i8> @"edgellm.lookup"(<16 x i8> %levels, <32 x i8> %names) alwaysinline {{
  %low = shufflevector <32 x i8> %names, <32 x i8> poison, <16 x i32> <{low}>
  %high = shufflevector <32 x i8> %names, <32 x i8> poison, <16 x i32> <{high}>
  %a = call <16 x i8> @llvm.aarch64.neon.tbl1.v16i8(<16 x i8> %levels, <16 x i8> %low)
  %b = call <16 x i8> @llvm.aarch64.neon.tbl1.v16i8(<16 x i8> %levels, <16 x i8> %high)
  %r = shufflevector <16 x i8> %a, <16 x i8> %b, <32 x i32> <{low}, {high}>
  ret <32 x i8> %r
}}"""


def _bytes(value: int) -> str:
    return "<" + ", ".join([f"i8 {value}"] * 32) + ">"


def _selects() -> str:
    """Level 0, then level i where the name is i, for each i."""
    lines = []
    for i in range(16):
        lane = ", ".join([f"i32 {i}"] * 32)
        lines.append(f"  %v{i} = shufflevector <16 x i8> %levels, <16 x i8> poison, <32 x i32> <{lane}>")
        if i:
            lines.append(f"  %c{i} = icmp eq <32 x i8> %names, {_bytes(i)}")
            last = f"%s{i - 1}" if i > 1 else "%v0"
            lines.append(f"  %s{i} = select <32 x i1> %c{i}, <32 x i8> %v{i}, <32 x i8> {last}")
    body = "\n".join(lines)
    return f"""
define <32 x i8> @"edgellm.lookup"(<16 x i8> %levels, <32 x i8> %names) alwaysinline {{
{body}
  ret <32 x i8> %s15
}}"""


_TWICE = ", ".join(f"i32 {lane % 16}" for lane in range(32))
_AVX2 = f"""
declare <32 x i8> @llvm.x86.avx2.pshuf.b(<32 x i8>, <32 x i8>)
define <32 x i8> @"edgellm.lookup"(<16 x i8> %levels, <32 x i8> %names) alwaysinline {{
  %twice = shufflevector <16 x i8> %levels, <16 x i8> poison, <32 x i32> <{_TWICE}>
  %r = call <32 x i8> @llvm.x86.avx2.pshuf.b(<32 x i8> %twice, <32 x i8> %names)
  ret <32 x i8> %r
}}"""


def primitive(form: str) -> str:
    """The definition for a form of the kernels."""
    return {"portable": _selects(), "neon": _neon()}.get(form, _AVX2)
