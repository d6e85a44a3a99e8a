"""Two dispatches that have nothing to do with each other as one: some workgroups do the first, the others the second.

The second one's numbers become constants, since 128 bytes are not enough for those of both; so they are to be such as
do not change from step to step. Its functions and variables get names of their own, and a buffer that both write has
one binding. Where the first has 256 threads and the second 64, the others of these find nothing to do.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

from edgellm.kernels.gpu.device import MAX_GROUPS, MOST_NUMBERS, Device

MAIN = "fn main(@builtin(workgroup_id) g: vec3<u32>, @builtin(local_invocation_index) t: u32) {"
_BINDING = re.compile(r"^@group\(0\) @binding\((\d+)\) var<storage, (\w+)> (\w+): ([^;]+);[^\n]*\n?", re.MULTILINE)
_NAMED = re.compile(r"^(?:fn|struct|const|var<workgroup>) (\w+)", re.MULTILINE)
_FIELDS = re.compile(r"^struct P \{ ([^}]*) \}\n", re.MULTILINE)
_SIZE = re.compile(r"^@compute @workgroup_size\(([^)]*)\)\n", re.MULTILINE)
_SHARED = re.compile(r"^var<workgroup> \w+: (?:array<)?((?:atomic|vec\d)?<?\w+>?)(?:, ([^>]+)>)?;", re.MULTILINE)
_CONSTANT = re.compile(r"^const (\w+) = ([^;]+);", re.MULTILINE)
_NBYTES = {"f32": 4, "u32": 4, "atomic<u32>": 4, "vec2<f32>": 8, "vec2<u32>": 8, "vec4<f32>": 16}


class Emitted(NamedTuple):
    """A dispatch as it was asked for; see ``Device.dispatch``."""

    text: str
    buffers: list[Any]
    kinds: str
    grid: tuple[int, int, int]
    immediates: tuple[float, ...]
    flops: int


def are_apart(one: Emitted, other: Emitted) -> bool:
    """Whether neither of two dispatches touches what the other writes."""
    written = {id(b) for it in (one, other) for b, kind in zip(it.buffers, it.kinds, strict=True) if kind == "w"}
    return not written & {id(buffer) for buffer in one.buffers} & {id(buffer) for buffer in other.buffers}


def workgroup_nbytes(text: str) -> int:
    """Bytes of the memory that the threads of a workgroup share."""
    numbers, declared, n = dict(_CONSTANT.findall(text)), _SHARED.findall(text), text.count("var<workgroup>")
    assert len(declared) == n, "a form of declaration that is not known here"

    def value(size: str) -> int:
        return math.prod(value(numbers[one]) if one in numbers else int(one.rstrip("u")) for one in size.split(" * "))

    return sum(_NBYTES[kind] * value(size or "1") for kind, size in declared)


def both(one: Emitted, other: Emitted, device: Device) -> Emitted | None:
    """Two dispatches as one; None where no shader of the device can have so many buffers and numbers, or a workgroup so
    much memory, or they are of other forms."""
    if MAIN not in one.text or MAIN not in other.text or len(one.immediates) >= MOST_NUMBERS:
        return None
    names = _NAMED.findall(other.text)
    text = _renamed(_with_constants(other), "|".join(sorted(names)), r"\1_beside")
    first = one.text
    declared = {id(buffer): found for buffer, found in zip(one.buffers, _bound(one.text), strict=True)}
    buffers, kinds, lines = list(one.buffers), one.kinds, ""
    for i, (buffer, (access, name, kind)) in enumerate(zip(other.buffers, _bound(text), strict=True)):
        there = declared.get(id(buffer))
        if there is not None and there[2] == kind:
            common, at = f"common{i}", [id(one) for one in buffers].index(id(buffer))
            text, first = _renamed(text, name, common), _renamed(first, there[1], common)
            if access == "read_write":
                first = first.replace(f"<storage, read> {common}:", f"<storage, read_write> {common}:")
                kinds = f"{kinds[:at]}w{kinds[at + 1 :]}"
            continue
        if there is not None and "read_write" in (access, there[0]):
            return None
        lines += f"@group(0) @binding({len(buffers)}) var<storage, {access}> {name}_beside: {kind};\n"
        text = _renamed(text, name, f"{name}_beside")
        buffers, kinds = [*buffers, buffer], kinds + other.kinds[i]
    (x, y, z), (x2, y2, z2) = one.grid, other.grid
    if len(buffers) > device.most_buffers or x * y * z + x2 * y2 * z2 > MAX_GROUPS:
        return None
    if workgroup_nbytes(one.text) + workgroup_nbytes(other.text) > device.workgroup_nbytes:
        return None
    body = _BINDING.sub("", _SIZE.sub("", text)).replace(MAIN.replace("main", "main_beside"), _function("second"))
    whole = _FIELDS.sub(r"struct P { \1, split: u32 }" + "\n" + lines, first, count=1)
    (size,) = _SIZE.findall(first)
    whole = _SIZE.sub("", whole).replace(MAIN, _function("first"))
    whole += f"""{body}
@compute @workgroup_size({size})
fn main(@builtin(workgroup_id) at: vec3<u32>, @builtin(local_invocation_index) t: u32) {{
  if (at.x < p.split) {{
    first({_place("at.x", one.grid)}, t);
  }} else {{
    let i = at.x - p.split;
    second({_place("i", other.grid)}, select(0xffff0000u, t, t < 64u));
  }}
}}
"""
    n = x * y * z
    return Emitted(whole, buffers, kinds, (n + x2 * y2 * z2, 1, 1), (*one.immediates, n), one.flops + other.flops)


def _place(number: str, grid: tuple[int, int, int]) -> str:
    """The place of a workgroup by its number; y, which may be the tokens of a step, is in the text only if it must."""
    x, y, z = grid
    if z == 1:
        return f"vec3<u32>({number} % {x}u, {number} / {x}u, 0u)"
    return f"vec3<u32>({number} % {x}u, {number} / {x}u % {y}u, {number} / {x * y}u)"


def _renamed(text: str, name: str, to: str) -> str:
    return re.sub(rf"(?<![\w.])({name})\b", to, text)


def _bound(text: str) -> Sequence[tuple[str, str, str]]:
    """Access, name and type of what is bound, in the order of the bindings."""
    return [found[1:] for found in sorted(_BINDING.findall(text), key=lambda found: int(found[0]))]


def _function(name: str) -> str:
    return f"fn {name}(g: vec3<u32>, t: u32) {{"


def _with_constants(one: Emitted) -> str:
    """The text with its numbers in it."""
    (fields,) = _FIELDS.findall(one.text)
    text = _FIELDS.sub("", one.text).replace("var<immediate> p: P;\n", "")
    values = dict(zip((field.partition(":")[0].strip() for field in fields.split(",")), one.immediates, strict=True))
    return re.sub(r"(?<![\w.])p\.(\w+)", lambda found: _constant(values[found[1]]), text)


def _constant(value: float) -> str:
    if isinstance(value, float):
        (bits,) = struct.unpack("<I", struct.pack("<f", value))
        return f"bitcast<f32>(0x{bits:08x}u)"
    return f"{value & 0xFFFFFFFF}u"
