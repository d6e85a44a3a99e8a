"""The Arm form of the integer primitives: widening multiply-accumulate, ``smlal`` and ``smlal2``.

NEON has no pmaddwd. The portable pattern costs it four instructions for eight products (smull, smull2, addp, add); here
the operands are split first, and each product is added as it is made, two instructions for eight. In a panel product
one operand is a pair in every lane, so its split dissolves into ``smlal v.4s, v.4h, v.h[0]``, and the split of the
panel serves all tokens.
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
