"""The shaders as text: files of ``shaders/`` with a few words in them replaced.

WGSL has no preprocessor, so ``$NAME`` in a file stands for what a program needs there: a number, a block of bindings,
the functions that read one type of weights. A buffer that an op reads and writes can be bound once only, so
``bindings`` writes them, and gives two roles one name where they share a buffer.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

from edgellm.formats import levels

FOLDER = Path(__file__).parent / "shaders"
LANES, SLICES = 16, 16  # rows, and slices of a row, of a product with few columns; they fix the order of additions
MOST_COLUMNS = 8  # of a product whose threads own rows; more go in tiles

WORDS_PER_ROW_PIECE = {"F32": 32, "F16": 16, "BF16": 16}
"""Words of 32 weights; rows of these types are filled up with zeros to whole pieces."""

_CODES = {"iq4_nl": levels.IQ4, "iq4_xs": levels.IQ4, "mxfp4": levels.E2M1_DOUBLED}
TYPES = tuple(sorted(path.stem.upper() for path in (FOLDER / "weights").glob("*.wgsl")))
"""GGUF types that shaders read as they stand in the file."""


@functools.cache
def text(name: str) -> str:
    """A file as it stands."""
    return (FOLDER / f"{name}.wgsl").read_text("utf-8")


@functools.cache
def _filled(name: str, values: tuple[tuple[str, str], ...]) -> str:
    return Template(text(name)).substitute(dict(values))


def source(name: str, **values: str | int) -> str:
    """A shader with its words filled in; whole numbers become u32."""
    words = {"STEP": text("step")} | _trees() | {k: f"{v}u" if isinstance(v, int) else v for k, v in values.items()}
    return _filled(name, tuple(words.items()))


def joined(term: str, step: int, how: str) -> str:
    """The expression that joins eight terms, ``step`` apart, in the order of a tree: the first with the fifth ..."""
    terms = [term.format(i * step) for i in range(8)]
    while len(terms) > 1:
        half = len(terms) // 2
        terms = [how.format(one, other) for one, other in zip(terms[:half], terms[half:], strict=True)]
    return terms[0]


@functools.cache
def _trees() -> dict[str, str]:
    """Functions that join a number of each of 64 threads, by the words that shaders call them by."""
    kinds = (("total", "f32", "({} + {})"), ("totals", "vec2<f32>", "({} + {})"), ("largest_of", "f32", "max({}, {})"),
             ("first_of", "vec2<u32>", "earlier({}, {})"))  # fmt: skip
    found = {}
    for name, kind, how in kinds:
        upper, lower = (joined(f"{name}_of_{n}[{at}{{}}u]", step, how) for n, at, step in ((64, "t + ", 8), (8, "", 1)))
        found[name.upper()] = _filled("tree", (("NAME", name), ("TYPE", kind), ("UPPER", upper), ("LOWER", lower)))
    return found


@functools.cache
def weights(quant: str) -> str:
    """The functions that read a type: ``head(r, j)`` of 32 weights of a row, and ``quad(r, head, i)``, four of them."""
    name = quant.lower()
    if name not in _CODES:
        return text("words") + text(f"weights/{name}")
    return text("words") + source(f"weights/{name}", LEVELS=levels_of(name))


def levels_of(name: str) -> str:
    """The functions that give what the codes of a type stand for."""
    codes = [code & 0xFF for code in _CODES[name]]
    words = [int.from_bytes(bytes(codes[at : at + 4]), "little") for at in range(0, 16, 4)]
    return source("levels", **{f"L{i}": f"0x{word:08x}u" for i, word in enumerate(words)})


def _store(epilogue: str) -> str:
    return {
        "set": "y[to] = sum;",
        "add": "y[to] = y[to] + sum;",
        "bias": "y[to] = sum + bias[p.bias_at + row];",
    }[epilogue]


_BIAS = "@group(0) @binding(3) var<storage, read> bias: array<f32>;"
_UNPACK = "\n    ".join(f"ws[t * 9u + {i}u] = quad(r, h, {i}u);" for i in range(8))


@functools.cache
def matmul(quant: str, columns: int, epilogue: str) -> str:
    """A product for 1, 2, 4 or 8 columns. ``epilogue``: "set", "add" to what stands there, or add a "bias"."""
    start, products, keep = _products(columns, "p.x_at + min({c}u, p.m - 1u) * p.x_row")
    return source(
        "matmul", WEIGHTS=weights(quant), LANES=LANES, SLICES=SLICES, COLS=columns, START=start, PRODUCTS=products,
        KEEP=keep, STORE=_store(epilogue), BIAS=_BIAS if epilogue == "bias" else "",
    )  # fmt: skip


@functools.cache
def matmul_gated(quant: str, columns: int, activation: str) -> str:
    """Two products of one input for 1, 2 or 4 columns, and activation(first) * second of them."""
    start, products, keep = [], [], []
    for c in range(columns):
        start.append(f"var a{c} = 0.0; var b{c} = 0.0; let x{c} = p.x_at + min({c}u, p.m - 1u) * p.x_row;")
        keep.append(f"part[({c}u * {SLICES}u + slice) * {LANES}u + lane] = vec2<f32>(a{c}, b{c});")
    for i, (sums, row, head) in itertools.product(range(8), (("a", "r", "h"), ("b", "up", "k"))):
        products.append(f"let {sums}q{i} = quad({row}, {head}, {i}u);")
        products += [f"{sums}{c} = mac({sums}{c}, {sums}q{i}, x[x{c} + j * 8u + {i}u]);" for c in range(columns)]
    return source(
        "matmul_gated", WEIGHTS=weights(quant), FUNCTIONS=text("activations"), LANES=LANES, SLICES=SLICES, COLS=columns,
        ACTIVATION=activation, START="\n  ".join(start), PRODUCTS="\n    ".join(products), KEEP="\n  ".join(keep),
    )  # fmt: skip


@functools.cache
def matmul_tiles(quant: str, epilogue: str) -> str:
    """The same product for many columns."""
    return source(
        "matmul_tiles", WEIGHTS=weights(quant), SLICES=SLICES, UNPACK=_UNPACK, STORE=_store(epilogue),
        BIAS=_BIAS if epilogue == "bias" else "",
    )  # fmt: skip


@functools.cache
def expert_matmul(quant: str, *, has_bias: bool, of_heads: bool) -> str:
    """A product whose rows are those of the expert that a token was sent to, or of a head."""
    start, products, keep = _products(1, "input")
    return source(
        "expert_matmul", WEIGHTS=weights(quant), LANES=LANES, SLICES=SLICES, START=start, PRODUCTS=products, KEEP=keep,
        EXPERT="slot" if of_heads else "ids[p.ids_at + token * p.ids_row + slot]",
        MORE=_more("" if of_heads else "ids", has_bias), SUM="sum + bias[p.first + row]" if has_bias else "sum",
    )  # fmt: skip


@functools.cache
def expert_tiles(quant: str, *, has_bias: bool, of_heads: bool) -> str:
    """The same for many tokens."""
    tile, pair = (
        """if (g.z >= groups[0]) { return; }
  let expert = groups[1u + 3u * g.z];
  let begin = groups[2u + 3u * g.z];
  let n_columns = groups[3u + 3u * g.z];""",
        """let pair = groups[begin + c];
    let token = pair / p.n_used;
    let slot = pair % p.n_used;""",
    )
    if of_heads:
        tile, pair = (
            """let per_head = (p.m + 31u) / 32u;
  let expert = g.z / per_head;
  let begin = g.z % per_head * 32u;
  let n_columns = min(p.m - begin, 32u);""",
            """let token = begin + c;
    let slot = expert;""",
        )
    return source(
        "expert_tiles", WEIGHTS=weights(quant), SLICES=SLICES, UNPACK=_UNPACK, TILE=tile, PAIR=pair,
        MORE=_more("" if of_heads else "groups", has_bias),
        SUM="sum + bias[of_expert + p.first + out]" if has_bias else "sum",
    )  # fmt: skip


def _more(numbers: str, has_bias: bool) -> str:
    """Bindings behind those of a weight, an input and an output: whole numbers of this name, and a bias."""
    found = [f"@group(0) @binding(3) var<storage, read> {numbers}: array<u32>;"] if numbers else []
    return "\n".join([*found, *([vector(3 + len(found), "bias")] if has_bias else [])])


def vector(binding: int, name: str) -> str:
    """The binding of an array of float32."""
    return f"\n@group(0) @binding({binding}) var<storage, read> {name}: array<f32>;"


def _products(columns: int, x: str) -> tuple[str, str, str]:
    """What is written out for each column, and for each four weights of 32: few of them are alive at a time."""
    start = [f"var a{c} = 0.0; let x{c} = {x.format(c=c)};" for c in range(columns)]
    products = []
    for i in range(8):
        products.append(f"let q{i} = quad(r, h, {i}u);")
        products += [f"a{c} = mac(a{c}, q{i}, x[x{c} + j * 8u + {i}u]);" for c in range(columns)]
    keep = [f"part[({c}u * {SLICES}u + slice) * {LANES}u + lane] = a{c};" for c in range(columns)]
    return "\n  ".join(start), "\n    ".join(products), "\n  ".join(keep)


class Bound(NamedTuple):
    """Declarations, the name of each role's variable, and the buffers with what is done to them."""

    text: str
    names: dict[str, str]
    kinds: str
    buffers: list[Any]


def bindings(first: int, roles: Sequence[tuple[str, Any, str]]) -> Bound:
    """Bindings from ``first`` on for roles (name, buffer, "r" or "w") over float32; each buffer is bound once."""
    by_buffer: dict[int, list[tuple[str, Any, str]]] = {}
    for role in roles:
        by_buffer.setdefault(id(role[1]), []).append(role)
    lines, names, kinds, buffers = list[str](), dict[str, str](), "", list[Any]()
    for binding, sharing in zip(itertools.count(first), by_buffer.values(), strict=False):
        variable = f"buffer{binding}"
        kind = "w" if any(role[2] == "w" for role in sharing) else "r"
        access = "read_write" if kind == "w" else "read"
        lines.append(f"@group(0) @binding({binding}) var<storage, {access}> {variable}: array<f32>;")
        names |= {role[0]: variable for role in sharing}
        kinds += kind
        buffers.append(sharing[0][1])
    return Bound("\n".join(lines), names, kinds, buffers)
