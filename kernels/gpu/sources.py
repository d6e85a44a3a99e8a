"""The shaders as text: files of ``shaders/`` with a few words in them replaced.

WGSL has no preprocessor, so ``$NAME`` in a file stands for what a program needs there: a number, a block of bindings,
the functions that read one type of weights. A buffer that an op reads and writes can be bound once only, so
``bindings`` writes them, and gives two roles one name where they share a buffer.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Mapping, Sequence
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
    levels_text = levels_of(name) if name in _CODES else ""
    return text("words") + source(f"weights/{name}", LEVELS=levels_text, SCALES=text("k_scales"))


def puts(*arrays: str) -> str:
    """Functions that put a float32 as float16 into arrays of words."""
    return text("half_bits") + "".join(source("put_half", ARRAY=array) for array in arrays)


def levels_of(name: str) -> str:
    """The functions that give what the codes of a type stand for."""
    codes = [code & 0xFF for code in _CODES[name]]
    words = [int.from_bytes(bytes(codes[at : at + 4]), "little") for at in range(0, 16, 4)]
    return source("levels", **{f"L{i}": f"0x{word:08x}u" for i, word in enumerate(words)})


UNITS = ("silu", "gelu", "gelu_erf", "clamped_swiglu")
CURVES = ("gelu", "gelu_erf", "relu_squared")


def curved(curve: str, value: str) -> str:
    """An activation of one number."""
    return f"{curve}({value}{', 1.0' * (curve in UNITS)})" if curve else value


def _store(epilogue: str, curve: str, through: str = "", column: str = "c") -> str:
    is_added, has_bias = "add" in epilogue, "bias" in epilogue
    value = curved(curve, "sum + bias[bias_at + row]" if has_bias else "sum")
    if through:
        value = f"{through}({value}, up[p.up_at + {column} * p.up_row + row])"
    return f"y[to] = fma(p.amount, {value}, y[to]);" if is_added else f"y[to] = {value};"


_VALUE = "x[x{c} + j * 8u + {i}u]"  # four numbers of column c


def _tile_sums(x: str) -> str:
    """The sums of a tile; ``x`` is where column c of it begins."""
    unpack = "\n  ".join(f"ws[t * 9u + {i}u] = quad(r, h, {i}u);" for i in range(8))
    return source("tile_sums", SLICES=SLICES, UNPACK=unpack, INPUT=x).replace("\n", "\n  ").rstrip()


class Other(NamedTuple):
    """Rows of another matrix in the dispatch of a product, of this type and with so many words and pieces of a row.

    x_row   of an input of its own, in groups of four; ``y_row``: of an output of its own
    """

    quant: str
    words: int
    pieces: int
    x_row: int | None = None
    y_row: int | None = None


@functools.cache
def matmul(
    quant: str, columns: int, epilogue: str = "set", activation: str = "", *, norms: bool = False,
    others: tuple[Other, ...] = (), curve: str = "", conv: tuple[int, bool] | None = None, convolved: int = 0,
    through: str = "",
) -> str:  # fmt: skip
    """A product for 1, 2, 4 or 8 columns, or with an activation two of them: activation(first) * second.

    others     matrices behind the first one
    curve      an activation of what it makes
    through    an activation by which it lets numbers through that are there
    conv       taps of a convolution of what it makes, and whether that has a bias; ``convolved``: of which matrix
    norms      x is normed first, and what comes of it is written down
    epilogue   "set"; "add" a multiple of it to what stands there; with a "bias" before: "bias", "bias add"
    """
    store, made = "y[to] = gated(sum);" if activation else _store(epilogue, curve, through), dict[str, str]()
    made |= _products(columns, _X_AT, activation, value=_NORMED if norms else _VALUE)
    words = dict.fromkeys(("NORM", "NORMED", "FIELDS", "CONV", "OTHERS"), "")
    words |= {"SUMS": made.pop("SUMS"), "ROWS": _ROWS}
    if norms:
        _norm(words, columns)
    first = 3 + 2 * norms
    if others:
        first, store = _put_others(
            words,
            first,
            others,
            columns,
            [store + _CONVOLVE * (conv is not None and i == convolved) for i in range(1 + len(others))],
        )
    elif conv is not None:
        store += _CONVOLVE
    if curve or through or conv is not None:
        made["FUNCTIONS"] = text("activations")
    bias = vector(first, "bias") if "bias" in epilogue else ""
    if through:
        bias, words["FIELDS"] = bias + vector(first + bool(bias), "up"), words["FIELDS"] + _THROUGH
    if conv is not None:
        _convolve(words, first + bool(bias), conv)
    return source(
        "matmul", WEIGHTS=weights(quant), LANES=LANES, SLICES=SLICES, COLS=columns, STORE=store, BIAS=bias, **words,
        **made,
    )  # fmt: skip


_X_AT = "p.x_at + min({c}u, p.m - 1u) * p.x_row"
_THROUGH = ", up_at: u32, up_row: u32"
_ROWS = f"""let row = p.begin + group * {LANES}u + lane;
  let end = p.end;
  let y_at = p.y_at;
  let bias_at = p.bias_at;"""
_NORMED = "normed(x{c}, j * 8u + {i}u, f{c})"


def _norm(words: dict[str, str], columns: int) -> None:
    """Have x normed first."""
    upper, lower = joined("squares[at + {}u]", 8, "({} + {})"), joined("sums[at + {}u]", 1, "({} + {})")
    words["NORM"] = source("normed_columns", COLS=columns, UPPER=upper, LOWER=lower)
    factors = " ".join(f"let f{c} = factor_of({c}u);" for c in range(columns))
    words["NORMED"] = f"norm_columns(t);\n  {factors}\n  if (g.x + g.y == 0u) {{ keep_normed(t); }}"
    words["FIELDS"] += ", h_at: u32, h_row: u32, eps: f32"


def _put_others(
    words: dict[str, str], binding: int, others: Sequence[Other], columns: int, stores: Sequence[str]
) -> tuple[int, str]:  # fmt: skip
    """Have rows of other matrices behind the first one's, bound from ``binding`` on; the next binding, and what is done
    with a sum."""
    sums, rows, targets = [words["SUMS"]], ["let is_0 = true;"], [stores[0]]
    for i, other in enumerate(others, 1):
        name = f"of{i}"
        words["FIELDS"] += (
            f", split_{name}: u32, begin_{name}: u32, end_{name}: u32, y_at_{name}: u32, bias_at_{name}: u32"
        )
        array, functions = weights_of(other.quant, binding, name, other.words)
        words["OTHERS"] += f"{array}\n{functions}\n"
        binding += 1
        own, inputs, x_at = _of_another(other.quant, words["SUMS"], suffix=name), "", ""
        if other.x_row is not None:
            words["FIELDS"] += f", x_at_{name}: u32"
            words["OTHERS"] += f"@group(0) @binding({binding}) var<storage, read> x_{name}: array<vec4<f32>>;\n"
            binding += 1
            x_at = f"p.x_at_{name} + min({{c}}u, p.m - 1u) * {other.x_row}u"
            inputs = "\n".join(f"let x{c} = {x_at.format(c=c)};" for c in range(columns))
            own = re.sub(r"\bx\[", f"x_{name}[", own)
        inputs += f"\nlet per = {-(-other.pieces // SLICES)}u;"
        sums.append(f"{inputs}\n{own}".replace("p.pieces", f"{other.pieces}u"))
        to = stores[i]
        if other.y_row is not None:
            words["OTHERS"] += f"@group(0) @binding({binding}) var<storage, read_write> y_{name}: array<f32>;\n"
            binding += 1
            own_store = re.sub(r"\by\[", f"y_{name}[", f"let to = y_at + c * p.y_row + row;\n{to}")
            to = own_store.replace("p.y_row", f"{other.y_row}u")
        targets.append(to)
        rows.append(f"""let is_{i} = group >= p.split_{name};
  if (is_{i}) {{
    row = p.begin_{name} + (group - p.split_{name}) * {LANES}u + lane;
    end = p.end_{name};
    y_at = p.y_at_{name};
    bias_at = p.bias_at_{name};
  }}""")
    words["ROWS"] = "\n  ".join([_ROWS.replace("let ", "var "), *rows])
    words["SUMS"] = _chosen(sums)
    return binding, targets[0] if len(set(targets)) == 1 else _chosen(targets)


def _chosen(texts: Sequence[str]) -> str:
    """Which of these is done: the last one whose rows these are."""
    order = [f"if (is_{i}) {{\n  {one}\n  }}" for i, one in reversed(list(enumerate(texts)))]
    return " else ".join(order)


_CONVOLVE = """
      let channel = to - c * p.y_row - p.conv_at;
      if (channel < p.conv_n) { convolve(c, channel, y[to]); }"""


def _convolve(words: dict[str, str], first: int, conv: tuple[int, bool]) -> None:
    """Have a convolution behind, whose bindings are from ``first`` on."""
    n_taps, has_bias = conv
    kinds = (("read", "b", "u32"), ("read", "taps", "f32"), ("read_write", "states", "f32"),
             ("read_write", "convolved", "f32"))  # fmt: skip
    words["CONV"] = _arrays(first, kinds) + (vector(first + 4, "conv_bias") if has_bias else "") + "\n"
    words["CONV"] += source("conv_behind", TAPS=n_taps, BIASED=" + conv_bias[channel]" if has_bias else "")
    words["FIELDS"] += ", conv_at: u32, conv_n: u32, conv_group: u32, conv_y_at: u32, conv_y_row: u32"


def _arrays(first: int, kinds: Sequence[tuple[str, str, str]]) -> str:
    """Bindings from ``first`` on: access, name, and type of the numbers."""
    return "\n".join(
        f"@group(0) @binding({first + i}) var<storage, {access}> {name}: array<{kind}>;"
        for i, (access, name, kind) in enumerate(kinds)
    )


_NAMES = re.compile(r"^(?:fn|struct) (\w+)", re.MULTILINE)


def _of_another(quant: str, text: str, arrays: Sequence[str] = "w", suffix: str = "b") -> str:
    """Text about a weight, for a second one of this type: its functions, ``arrays``, and the numbers of it in ``p``."""
    names = "|".join(sorted({*_NAMES.findall(weights(quant)), *arrays}))
    text = re.sub(rf"(?<![\w.])({names})\b", rf"\1_{suffix}", text)
    return re.sub(r"\bp\.(words|pieces)\b" if len(arrays) > 1 else r"\bp\.(words)\b", r"p.\1_b", text)


def weights_of(quant: str, binding: int, suffix: str, words: int) -> tuple[str, str]:
    """The binding of a weight, and the functions that read it: all their names have this behind them."""
    array = f"@group(0) @binding({binding}) var<storage, read> w_{suffix}: array<u32>;"
    return array, _of_another(quant, weights(quant).replace("p.words", f"{words}u"), suffix=suffix)


def row_product(quant: str, suffix: str, pieces: int, x: str) -> dict[str, str]:
    """Words of shaders/rows/matmul.wgsl for numbers x that are bound one by one."""
    four = ", ".join(f"{x}[x0 + j * 32u + {{i}}u * 4u + {k}u]" for k in range(4))
    made = _products(1, "x", value=f"vec4<f32>({four})")
    sums = _of_another(quant, made["SUMS"], suffix=suffix).replace("p.pieces", f"{pieces}u")
    lanes = {"LANES": f"{LANES}u", "SLICES": f"{SLICES}u"}
    return lanes | {"START": made["START"], "SUMS": sums, "KEEP": made["KEEP"], "PIECES": f"{pieces}u"}


def row_op(name: str, words: Mapping[str, str]) -> str:
    """An op of shaders/rows with its words filled in; words may have others in them."""
    found = text(f"rows/{name}")
    while "$" in found:
        found = Template(found).substitute(words)
    return found


@functools.cache
def matmul_tiles(quant: str, epilogue: str, curve: str = "", through: str = "") -> str:
    """The same product for many columns."""
    up = vector(3 + ("bias" in epilogue), "up") if through else ""
    return source(
        "matmul_tiles", WEIGHTS=weights(quant), STORE=_store(epilogue, curve, through, "column"),
        FUNCTIONS=text("activations") if curve or through else "", FIELDS=_THROUGH if through else "",
        TILE_SUMS=_tile_sums("p.x_at + min(c0 + c, p.m - 1u) * p.x_row"),
        BIAS=(vector(3, "bias") if "bias" in epilogue else "") + up,
    )  # fmt: skip


Routing = tuple[tuple[tuple[str, str | int], ...], tuple[str, ...]]
"""The words of shaders/routing.wgsl, and the vectors in them."""
_ROUTING_FIELDS = (
    ", n_used: u32, groups: u32, groups_used: u32, best: u32, over_all: u32, logits_at: u32, logits_row: u32, "
    "probs_at: u32, probs_row: u32, factor: f32"
)


def _routing(routing: Routing, first: int, threads: int) -> tuple[str, str]:
    """Bindings from ``first`` on, and the function ``routed``."""
    arrays = ("read", "logits", "f32"), ("read_write", "ids", "u32"), ("read_write", "probs", "f32")
    declared = [_arrays(first, arrays)]
    declared += [vector(first + 3 + i, name) for i, name in enumerate(routing[1])]
    return "\n".join(declared), source("routing", KEYS=text("keys"), THREADS=threads, **dict(routing[0]))


@functools.cache
def route(*routing: Any) -> str:
    """A choice of experts by itself."""
    declared, function = _routing(routing, 0, 64)
    return source("route", BINDINGS=declared, ROUTING=function, FIELDS=_ROUTING_FIELDS)


@functools.cache
def expert_matmul(
    quant: str, *, has_bias: bool, of_heads: bool, activation: str = "", routing: Routing | None = None,
    shared: str = "", curve: str = "",
) -> str:  # fmt: skip
    """A product whose rows are those of the expert that a token was sent to, or of a head; see ``matmul``.

    routing   how the expert is chosen, which is done here
    shared    with it and an activation: the type of another matrix that all tokens share
    """
    at = "p.first + row - p.begin"
    value = f"sum + bias[{at}]" if has_bias else "sum"
    if activation:
        biases = f" + vec2<f32>(bias[{at}], bias[{at} + p.apart])" if has_bias else ""
        value = f"gated(sum{biases})"
    made, value = _products(1, "input", activation), curved(curve, value)
    if curve:
        made["FUNCTIONS"] = text("activations")
    words = {"SHARED": "", "EXPERT": "slot" if of_heads else "ids[p.ids_at + token * p.ids_row + slot]", "FIELDS": "",
             "ROUTING": "", "MORE": _more("" if of_heads else "ids", has_bias)}  # fmt: skip
    if routing is not None:
        declared, words["ROUTING"] = _routing(routing, 3, SLICES * LANES)
        words["MORE"] = declared + (vector(6 + len(routing[1]), "bias") if has_bias else "")
        words |= {"EXPERT": "routed(token, slot, g.x == 0u && slot == 0u, t)", "FIELDS": _ROUTING_FIELDS}
    if routing is not None and shared:
        sums, first = _of_another(shared, made["SUMS"]), 6 + len(routing[1]) + has_bias
        words["MORE"] += f"""
@group(0) @binding({first}) var<storage, read> w_b: array<u32>;
@group(0) @binding({first + 1}) var<storage, read_write> y_b: array<f32>;
""" + _of_another(shared, weights(shared))
        words["FIELDS"] += ", words_b: u32, begin_b: u32, apart_b: u32, n_b: u32, y_at_b: u32, y_row_b: u32"
        words["SHARED"] = f"""if (slot >= p.n_used) {{
    let row = (slot - p.n_used) * p.n_out + out;
    let own = p.begin_b + min(row, p.n_b - 1u);
    let per = (p.pieces + {SLICES - 1}u) / {SLICES}u;
    let input = p.x_at + token * p.x_row;
    {made["START"]}
    {sums.replace("p.apart", "p.apart_b")}
    {made["KEEP"]}
    workgroupBarrier();
    if (slice == 0u && row < p.n_b) {{
      var sum = {made["TYPE"]}();
      for (var i = 0u; i < {SLICES}u; i++) {{ sum += part[i * {LANES}u + lane]; }}
      y_b[p.y_at_b + token * p.y_row_b + row] = gated(sum);
    }}
    return;
  }}"""
    return source(
        "expert_matmul", WEIGHTS=weights(quant), LANES=LANES, SLICES=SLICES, SUM=value, **words, **made,
    )  # fmt: skip


@functools.cache
def expert_down(
    quant: str, n_used: int, *, has_bias: bool, adds: bool, shared: str = "", has_gate: bool = False
) -> str:
    """The product of all experts of a token, and the sum of what they make; ``adds``: a multiple of it, to y.

    shared, has_gate   the type of the matrix of one that all tokens share, and whether that goes through a gate
    """
    words = {"SUM": "sum + bias[ids[chosen + slice] * p.of_one + row]" if has_bias else "sum", "SHARED": "", "ADD": "",
             "FIELDS": "", "MORE": vector(5, "bias") if has_bias else ""}  # fmt: skip
    if shared:
        last = _products(1, "input", column=f"{n_used}u")
        sums = _of_another(shared, last["SUMS"], ("w", "x"))
        words["SHARED"] = f"""{{
    let own = p.begin_b + row;
    let per = (p.pieces_b + {SLICES - 1}u) / {SLICES}u;
    let input = p.x_at_b + token * p.x_row_b;
    {last["START"]}
    {sums}
    {last["KEEP"]}
  }}"""
        apart = "bitcast<f32>(bitcast<u32>(sum) ^ p.nothing)"  # 0 that a driver does not know: no fma is made of both
        words["ADD"] = f"sum = {apart} + part[{n_used * SLICES * LANES}u + lane];"
        words["FIELDS"] = ", nothing: u32, words_b: u32, pieces_b: u32, begin_b: u32, x_at_b: u32, x_row_b: u32"
        words["MORE"] = """
@group(0) @binding(5) var<storage, read> w_b: array<u32>;
@group(0) @binding(6) var<storage, read> x_b: array<vec4<f32>>;
""" + _of_another(shared, weights(shared))
        if has_gate:
            words["FIELDS"] += ", gate_at: u32, gate_row: u32"
            words["MORE"] += vector(7, "gate") + "\n" + text("activations")
            gated = "sum * sigmoid(gate[p.gate_at + token * p.gate_row])"
            words["SUM"] = f"select(sum, {gated}, slice == {n_used}u)"
    return source(
        "expert_down", WEIGHTS=weights(quant), LANES=LANES, SLICES=SLICES, N_USED=n_used,
        N_SLOTS=n_used + bool(shared), STORE=ADDED.format(y="y") if adds else "sum", **words,
        **_products(1, "input", column="slot"),
    )  # fmt: skip


ADDED = "fma(p.amount, sum, {y}[to])"


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
        "expert_tiles", WEIGHTS=weights(quant), TILE_SUMS=_tile_sums("inputs[c]"), TILE=tile, PAIR=pair,
        MORE=_more("" if of_heads else "groups", has_bias),
        SUM="sum + bias[of_expert + p.first - p.begin + out]" if has_bias else "sum",
    )  # fmt: skip


def _more(numbers: str, has_bias: bool) -> str:
    """Bindings behind those of a weight, an input and an output: whole numbers of this name, and a bias."""
    found = [f"@group(0) @binding(3) var<storage, read> {numbers}: array<u32>;"] if numbers else []
    return "\n".join([*found, *([vector(3 + len(found), "bias")] if has_bias else [])])


def vector(binding: int, name: str) -> str:
    """The binding of an array of float32."""
    return f"\n@group(0) @binding({binding}) var<storage, read> {name}: array<f32>;"


_SUMS = Template("""let r = row_base(own);
  $UP
  for (var j = slice * per; j < min((slice + 1u) * per, p.pieces); j++) {
    $HEADS
    $PRODUCTS
  }""")  # of a thread


def _products(columns: int, x: str, activation: str = "", column: str = "{c}u", value: str = _VALUE) -> dict[str, str]:
    """What is written out for each column, and for each four weights of 32: few of them are alive at a time.

    With an activation a thread has two rows, and ``gated(sum)`` makes one number of both sums. ``column``: where the
    sums of column c are kept; ``value``: what of a column is multiplied.
    """
    rows = (("a", "r", "h"), ("b", "up", "k"))[: 2 if activation else 1]
    start, products, keep = list[str](), list[str](), list[str]()
    for c in range(columns):
        sums = [f"{name}{c}" for name, _, _ in rows]
        start.append("".join(f"var {one} = 0.0; " for one in sums) + f"let x{c} = {x.format(c=c)};")
        both = f"vec2<f32>({', '.join(sums)})" if activation else sums[0]
        keep.append(f"part[({column.format(c=c)} * {SLICES}u + slice) * {LANES}u + lane] = {both};")
    for i, (sums_of, row, head) in itertools.product(range(8), rows):
        products.append(f"let {sums_of}q{i} = quad({row}, {head}, {i}u);")
        for c in range(columns):
            products.append(f"{sums_of}{c} = mac({sums_of}{c}, {sums_of}q{i}, {value.format(c=c, i=i)});")
    gated = f"fn gated(v: vec2<f32>) -> f32 {{ return {activation}(v.x, v.y); }}"
    sums_of_thread = _SUMS.substitute(
        UP="let up = row_base(own + p.apart);" if activation else "", PRODUCTS="\n    ".join(products),
        HEADS="\n    ".join(f"let {head} = head({row}, j);" for _, row, head in rows),
    )  # fmt: skip
    return {
        "START": "\n  ".join(start), "SUMS": sums_of_thread, "KEEP": "\n  ".join(keep),
        "TYPE": "vec2<f32>" if activation else "f32", "APART": ", apart: u32" if activation else "",
        "FUNCTIONS": f"{text('activations')}\n{gated}" if activation else "",
    }  # fmt: skip


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
