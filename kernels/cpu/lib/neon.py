"""The Arm forms of the integer primitives: widening multiply-accumulate, and products of bytes where a CPU has them.

NEON has no pmaddwd. The portable pattern costs it four instructions for eight products (smull, smull2, addp, add); here
the operands are split first, and each product is added as it is made, two instructions for eight. In a panel product
one operand is a pair in every lane, so its split dissolves into ``smlal v.4s, v.4h, v.h[0]``, and the split of the
panel serves all tokens.

Products of bytes are for four rows at a time (byte_strips.py): 16 weights of each row are four registers, and
activations are two signed bytes each, x = 256 hi + lo, 16 of them 32 bytes.

    neon_dotprod   a register has 4 bytes of 4 rows:  sdot by element, 16 hi | 16 lo, sums (4 rows hi | 4 rows lo)
    neon_i8mm      a register has 8 bytes of 2 rows:  smmla, 8 hi | 8 lo | 8 hi | 8 lo, sums (row hi, row lo, ...)
"""

from __future__ import annotations


def _lanes(*lanes: int) -> str:
    return "<" + ", ".join(f"i32 {lane}" for lane in lanes) + ">"


def _madd(name: str, first: list[int], second: list[int]) -> str:
    """acc + a[first] b[first] + a[second] b[second], lane by lane."""
    n = len(first)
    narrow, wide, both = f"<{n} x i16>", f"<{n} x i32>", f"<{2 * n} x i16>"
    one, other = _lanes(*first), _lanes(*second)
    return f"""
define {wide} @"edgellm.{name}"({wide} %acc, {both} %a, {both} %b) alwaysinline {{
  %a0 = shufflevector {both} %a, {both} poison, {wide} {one}
  %a1 = shufflevector {both} %a, {both} poison, {wide} {other}
  %b0 = shufflevector {both} %b, {both} poison, {wide} {one}
  %b1 = shufflevector {both} %b, {both} poison, {wide} {other}
  %x0 = sext {narrow} %a0 to {wide}
  %x1 = sext {narrow} %a1 to {wide}
  %y0 = sext {narrow} %b0 to {wide}
  %y1 = sext {narrow} %b1 to {wide}
  %m0 = mul nsw {wide} %x0, %y0
  %m1 = mul nsw {wide} %x1, %y1
  %s0 = add {wide} %acc, %m0
  %r = add {wide} %s0, %m1
  ret {wide} %r
}}"""


MADD = _madd("madd", list(range(0, 32, 2)), list(range(1, 32, 2))) + _madd(
    "madd8", [0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]
)
"""``madd8`` may add a product to any lane of its own half: a low quarter and a high one need no shuffle at all."""


# ---- products of bytes -----------------------------------------------------------------------------------------------

_REGISTERS = """
  %a = shufflevector <64 x i8> %bytes, <64 x i8> poison, <16 x i32> {}
  %b = shufflevector <64 x i8> %bytes, <64 x i8> poison, <16 x i32> {}
  %c = shufflevector <64 x i8> %bytes, <64 x i8> poison, <16 x i32> {}
  %d = shufflevector <64 x i8> %bytes, <64 x i8> poison, <16 x i32> {}""".format(
    *(_lanes(*range(first, first + 16)) for first in range(0, 64, 16))
)
_JOIN = f"""
  %ab = shufflevector <16 x i8> %r0, <16 x i8> %r1, <32 x i32> {_lanes(*range(32))}
  %cd = shufflevector <16 x i8> %r2, <16 x i8> %r3, <32 x i32> {_lanes(*range(32))}
  %r = shufflevector <32 x i8> %ab, <32 x i8> %cd, <64 x i32> {_lanes(*range(64))}
  ret <64 x i8> %r
}}"""


def _zip(result: str, one: str, other: str, bits: int, high: bool) -> str:
    """One zip1 or zip2 of two registers, named in IR."""
    n = 128 // bits
    first = n // 2 if high else 0
    lanes = _lanes(*(lane for i in range(first, first + n // 2) for lane in (i, n + i)))
    kind, temporary = f"<{n} x i{bits}>", result.lstrip("%")
    return f"""
  %x.{temporary} = bitcast <16 x i8> {one} to {kind}
  %y.{temporary} = bitcast <16 x i8> {other} to {kind}
  %z.{temporary} = shufflevector {kind} %x.{temporary}, {kind} %y.{temporary}, <{n} x i32> {lanes}
  {result} = bitcast {kind} %z.{temporary} to <16 x i8>"""


def _strip(*zips: str) -> str:
    head = '\ndefine <64 x i8> @"edgellm.strip"(<64 x i8> %bytes) alwaysinline {'
    return head + _REGISTERS + "".join(zips) + _JOIN


def _halves(name: str, n: int, kind: str) -> str:
    """%name.0 and %name.1 of a vector of 2 n lanes."""
    low, high = _lanes(*range(n)), _lanes(*range(n, 2 * n))
    whole = f"<{2 * n} x {kind}> %{name}, <{2 * n} x {kind}> poison, <{n} x i32>"
    return f"\n  %{name}.0 = shufflevector {whole} {low}\n  %{name}.1 = shufflevector {whole} {high}"


_DOT_HEAD = (
    '\ndefine <8 x i32> @"edgellm.dot_strip"(<8 x i32> %acc, <64 x i8> %bytes, <32 x i8> %x) alwaysinline {'
    + _REGISTERS
    + _halves("acc", 4, "i32")
    + _halves("x", 16, "i8")
)
_JOIN_SUMS = f"  %r = shufflevector <4 x i32> %s, <4 x i32> %t, <8 x i32> {_lanes(*range(8))}\n  ret <8 x i32> %r\n}}"


def _product(instruction: str, result: str, acc: str, w: str, x: str) -> str:
    function = f"@llvm.aarch64.neon.{instruction}.v4i32.v16i8"
    return f"\n  {result} = call <4 x i32> {function}(<4 x i32> {acc}, <16 x i8> {w}, <16 x i8> {x})"


def _dot_by_element() -> str:
    text = "\n  %e.0 = bitcast <16 x i8> %x.0 to <4 x i32>\n  %e.1 = bitcast <16 x i8> %x.1 to <4 x i32>"
    for half, last in ((0, "s"), (1, "t")):
        acc = f"%acc.{half}"
        for k, w in enumerate("abcd"):
            element, result = f"%e.{half}.{k}", f"%{last}" if k == 3 else f"%{last}.{k}"
            splat = f"shufflevector <4 x i32> %e.{half}, <4 x i32> poison, <4 x i32> {_lanes(k, k, k, k)}"
            text += f"\n  {element}.s = {splat}\n  {element} = bitcast <4 x i32> {element}.s to <16 x i8>"
            text += _product("sdot", result, acc, f"%{w}", element)
            acc = result
    return text + "\n"


_DECLARE_PRODUCT = "\ndeclare <4 x i32> @llvm.aarch64.neon.{}.v4i32.v16i8(<4 x i32>, <16 x i8>, <16 x i8>)"


def _join_lanes(high: str, low: str) -> str:
    return f"""
define <4 x i32> @"edgellm.sum_strip"(<8 x i32> %acc) alwaysinline {{
  %high = shufflevector <8 x i32> %acc, <8 x i32> poison, <4 x i32> {high}
  %low = shufflevector <8 x i32> %acc, <8 x i32> poison, <4 x i32> {low}
  %shifted = shl <4 x i32> %high, <i32 8, i32 8, i32 8, i32 8>
  %r = add <4 x i32> %shifted, %low
  ret <4 x i32> %r
}}"""


def _split(*lanes: int) -> str:
    return f"""
define <32 x i8> @"edgellm.strip_of_activations"(<32 x i8> %x) alwaysinline {{
  %r = shufflevector <32 x i8> %x, <32 x i8> poison, <32 x i32> {_lanes(*lanes)}
  ret <32 x i8> %r
}}"""


_DOTPROD = (
    _DECLARE_PRODUCT.format("sdot")
    + _strip(
        _zip("%p", "%a", "%b", 32, False), _zip("%q", "%a", "%b", 32, True),
        _zip("%u", "%c", "%d", 32, False), _zip("%v", "%c", "%d", 32, True),
        _zip("%r0", "%p", "%u", 64, False), _zip("%r1", "%p", "%u", 64, True),
        _zip("%r2", "%q", "%v", 64, False), _zip("%r3", "%q", "%v", 64, True),
    )
    + _DOT_HEAD + _dot_by_element() + _JOIN_SUMS
    + _join_lanes(_lanes(0, 1, 2, 3), _lanes(4, 5, 6, 7))
    + _split(*range(32))
)  # fmt: skip
_I8MM = (
    _DECLARE_PRODUCT.format("smmla")
    + _strip(
        _zip("%r0", "%a", "%b", 64, False), _zip("%r1", "%c", "%d", 64, False),
        _zip("%r2", "%a", "%b", 64, True), _zip("%r3", "%c", "%d", 64, True),
    )
    + _DOT_HEAD
    + _product("smmla", "%s.0", "%acc.0", "%a", "%x.0") + _product("smmla", "%s", "%s.0", "%c", "%x.1")
    + _product("smmla", "%t.0", "%acc.1", "%b", "%x.0") + _product("smmla", "%t", "%t.0", "%d", "%x.1") + "\n"
    + _JOIN_SUMS
    + _join_lanes(_lanes(0, 2, 4, 6), _lanes(1, 3, 5, 7))
    + _split(*range(8), *range(16, 24), *range(8, 16), *range(24, 32))
)  # fmt: skip

BYTE_PRODUCTS = {"neon_dotprod": _DOTPROD, "neon_i8mm": _I8MM}
"""The forms that multiply bytes."""


def byte_products(form: str) -> str:
    """LLVM IR of a form's products of bytes. Without them activations stay int16, and LLVM drops what splits them."""
    head = '\ndefine i64 @"edgellm.splits_activations"() alwaysinline {{\n  ret i64 {0}\n}}'
    return head.format(int(form in BYTE_PRODUCTS)) + BYTE_PRODUCTS.get(form, _split(*range(32)))
