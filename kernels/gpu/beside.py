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
FOLDED = MAIN.replace(", @b", ", @builtin(num_workgroups) ng: vec3<u32>, @b")  # of a grid that has one dimension
_BINDING = re.compile(r"^@group\(0\) @binding\((\d+)\) var<storage, (\w+)> (\w+): ([^;]+);[^\n]*\n?", re.MULTILINE)
_NAMED = re.compile(r"^(?:fn|struct|const|var<workgroup>) (\w+)", re.MULTILINE)
_FIELDS = re.compile(r"^struct P \{ ([^}]*) \}\n", re.MULTILINE)
_SIZE = re.compile(r"^@compute @workgroup_size\(([^)]*)\)\n", re.MULTILINE)
_SHARED = re.compile(r"^var<workgroup> \w+: (?:array<)?((?:atomic|vec\d)?<?\w+>?)(?:, ([^>]+)>)?;", re.MULTILINE)
_CAPITAL = re.compile("[A-Z]")
_CONSTANT = re.compile(r"^const (\w+) = ([^;]+);", re.MULTILINE)
_STRUCT = re.compile(r"^struct (\w+) \{ ([^}]*) \}", re.MULTILINE)
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
    numbers, structs = dict(_CONSTANT.findall(text)), dict(_STRUCT.findall(text))
    declared, n = _SHARED.findall(text), text.count("var<workgroup>")
    assert len(declared) == n, "a form of declaration that is not known here"

    def value(size: str) -> int:
        return math.prod(value(numbers[one]) if one in numbers else int(one.rstrip("u")) for one in size.split(" * "))

    def nbytes(kind: str) -> int:
        fields = structs[kind].split(",") if kind in structs else []
        return sum(_NBYTES[field.split(": ")[1]] for field in fields) if fields else _NBYTES[kind]

    return sum(nbytes(kind) * value(size or "1") for kind, size in declared)


def both(one: Emitted, other: Emitted, device: Device, *, is_fixed: bool = False) -> Emitted | None:
    """Two dispatches as one; None where no shader of the device can have so many buffers and numbers, or a workgroup so
    much memory, or they are of other forms.

    is_fixed   the second one's numbers never change, and threads that it has none for may stand by
    """
    calls = _called(one, "first", "at.x"), _called(other, "second", "i")
    if calls[0] is None or calls[1] is None:
        return None
    n, of_other, fits = math.prod(one.grid), math.prod(other.grid), len(one.immediates) < MOST_NUMBERS
    numbers = (*one.immediates, *other.immediates, n)
    fields, text = _beside(other)
    if len(numbers) > MOST_NUMBERS:
        numbers, fields, text, fits = (*one.immediates, n), "", _with_constants(other), fits and is_fixed
    alike = _memory(one.text) & _memory(text)
    for line in alike:
        text = text.replace(line, "")
    text = _renamed(text, "|".join(sorted(_NAMED.findall(text))), r"\1_beside")
    first, buffers, kinds, lines = one.text, list(one.buffers), one.kinds, ""
    declared = {id(buffer): found for buffer, found in zip(one.buffers, _bound(one.text), strict=True)}
    for i, (buffer, (access, name, kind)) in enumerate(zip(other.buffers, _bound(text), strict=True)):
        there = declared.get(id(buffer))
        if there is not None and there[2] == kind:
            common, at = f"common{i}", [id(one) for one in buffers].index(id(buffer))
            text, first = _renamed(text, name, common), _renamed(first, there[1], common)
            if access == "read_write":
                first = first.replace(f"<storage, read> {common}:", f"<storage, read_write> {common}:")
                kinds = f"{kinds[:at]}w{kinds[at + 1 :]}"
            continue
        fits = fits and (there is None or "read_write" not in (access, there[0]))
        lines += f"@group(0) @binding({len(buffers)}) var<storage, {access}> {name}_beside: {kind};\n"
        text = _renamed(text, name, f"{name}_beside")
        buffers, kinds = [*buffers, buffer], kinds + other.kinds[i]
    threads = _threads(one), _threads(other)
    fits = fits and len(buffers) <= device.most_buffers and n + of_other <= MAX_GROUPS
    fits = fits and (threads[0] == threads[1] or (is_fixed and threads == (256, 64)))
    fits = fits and workgroup_nbytes(one.text) + workgroup_nbytes(text) <= device.workgroup_nbytes
    if not fits:
        return None
    body = _as_function(_BINDING.sub("", text).replace("fn main_beside(", "fn main("), "second")
    whole = _as_function(_FIELDS.sub(rf"struct P {{ \1{fields}, split: u32 }}\n{lines}", first, count=1), "first")
    few = "t" if threads[0] == threads[1] else "select(0xffff0000u, t, t < 64u)"
    whole += f"""{body}
@compute @workgroup_size({threads[0]})
fn main(@builtin(workgroup_id) at: vec3<u32>, @builtin(local_invocation_index) t: u32) {{
  if (at.x < p.split) {{
    {calls[0]}t);
  }} else {{
    let i = at.x - p.split;
    {calls[1]}{few});
  }}
}}
"""
    return Emitted(whole, buffers, kinds, (n + of_other, 1, 1), numbers, one.flops + other.flops)


def _memory(text: str) -> set[str]:
    """The declarations of what the threads of a workgroup share, but for sizes that have a name. A workgroup does one
    of both, so where these are alike it has one place."""
    return {found[0] for found in _SHARED.finditer(text) if not _CAPITAL.search(found[0])}


def _threads(one: Emitted) -> int:
    (size,) = _SIZE.findall(one.text)
    return math.prod(int(n.rstrip("u")) for n in size.split(" * "))


def _called(one: Emitted, name: str, number: str) -> str | None:
    """A call of a dispatch as a function for the workgroup of a number, but for its thread; None: of another form.

    y, which may be the tokens of a step, is in the text only if it must.
    """
    x, y, z = one.grid
    if FOLDED in one.text:
        return f"{name}(vec3<u32>({number}, 0u, 0u), vec3<u32>(), " if (y, z) == (1, 1) else None
    if z == 1:
        place = f"vec3<u32>({number} % {x}u, {number} / {x}u, 0u)"
    else:
        place = f"vec3<u32>({number} % {x}u, {number} / {x}u % {y}u, {number} / {x * y}u)"
    return f"{name}({place}, " if MAIN in one.text else None


def _as_function(text: str, name: str) -> str:
    text = _SIZE.sub("", text).replace(MAIN, f"fn {name}(g: vec3<u32>, t: u32) {{")
    return text.replace(FOLDED, f"fn {name}(g: vec3<u32>, ng: vec3<u32>, t: u32) {{")


def _renamed(text: str, name: str, to: str) -> str:
    return re.sub(rf"(?<![\w.])({name})\b", to, text)


def _bound(text: str) -> Sequence[tuple[str, str, str]]:
    """Access, name and type of what is bound, in the order of the bindings."""
    return [found[1:] for found in sorted(_BINDING.findall(text), key=lambda found: int(found[0]))]


def _beside(one: Emitted) -> tuple[str, str]:
    """The fields of its numbers behind those of another one, and the text that reads them there."""
    (fields,) = _FIELDS.findall(one.text)
    text = _FIELDS.sub("", one.text).replace("var<immediate> p: P;\n", "")
    return re.sub(r"(\w+):", r", \1_beside:", fields.replace(",", "")), re.sub(
        r"(?<![\w.])p\.(\w+)", r"p.\1_beside", text
    )


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
