"""How shaders write and read what keys and values are kept as (``kernels/cache_types.py`` has the layouts)."""

from __future__ import annotations

import functools

from edgellm.formats.levels import (
    IQ4,
    KIVI2_FAR_STEP,
    KIVI2_KEYS,
    KIVI2_KNEE,
    KIVI2_REACH,
    KIVI2_VALUES,
    PackedLevels,
)
from edgellm.kernels.cache_types import IQ4_MIDDLES, PACKED, QUANTIZED
from edgellm.kernels.gpu import sources
from edgellm.kernels.gpu.sources import source
from edgellm.kernels.kv import BLOCK_TOKENS, NEWEST_BLOCKS, KVLayer

_WRITES = {  # the number x at place e
    "f16": ("half_bits(x)", True),
    "bf16": ("bfloat_bits(x)", True),
    "f32": ("bitcast<u32>(x)", False),
}
_SIGNED = """let d = largest / -{half}.0;
  let by = reciprocal(d);"""
_AFFINE = """let d = (high - low) / {highest}.0;
  let by = reciprocal(d);
  m = low;"""
_FITS: dict[str, tuple[str, str]] = {  # of each type: the scale of a group, then the code of v
    "q8_0": ("let d = magnitude / 127.0;\n  let by = reciprocal(d);", "nearest(v * by)"),
    **{
        f"q{bits}_0": (
            _SIGNED.format(half=1 << (bits - 1)),
            f"min(u32(apart(v * by) + {(1 << (bits - 1)) + 0.5}), {(1 << bits) - 1}u)",
        )
        for bits in (4, 5)
    },
    **{
        f"q{bits}_1": (
            _AFFINE.format(highest=(1 << bits) - 1),
            f"min(u32(apart((v - low) * by) + 0.5), {(1 << bits) - 1}u)",
        )
        for bits in (4, 5)
    },
    "iq4_nl": (
        """let by = reciprocal(largest / LOWEST);
  var d = 0.0;
  var squares = 0.0;
  for (var i = 0u; i < 32u; i++) {
    let v = x[start + i];
    let level = f32(level(nearest_level(v * by)));
    d = fma(v * v * level, v, d);
    squares = fma(v * v * level, level, squares);
  }
  d = select(0.0, d / squares, squares > 0.0);""",
        "nearest_level(v * by)",
    ),
}
TYPES = (*_WRITES, *_FITS)
"""What shaders keep keys and values as."""

_LEVELS = {
    "q8_0": "vec2<f32>(vec2<i32>(c << vec2<u32>(24u)) >> vec2<u32>(24u))",
    "q4_0": "vec2<f32>(c) - 8.0",
    "q4_1": "vec2<f32>(c)",
    "q5_0": "vec2<f32>(c) - 16.0",
    "q5_1": "vec2<f32>(c)",
    "iq4_nl": "vec2<f32>(f32(level(c.x)), f32(level(c.y)))",
}


@functools.cache
def store_floats(name: str, *, by_row: bool) -> str:
    """Keys, or numbers row by row, as a float type."""
    bits, is_half = _WRITES[name]
    words = {"HALF_BITS": sources.text("half_bits")} if name == "f16" else {"HALF_BITS": ""}
    place = "((head * 32u + o) * p.dim + d)" if by_row else "((head * p.dim + d) * 32u + o)"
    write = f"""let shift = 16u * (e & 1u);
  atomicAnd(&kept[e / 2u], ~(0xffffu << shift));
  atomicOr(&kept[e / 2u], {bits} << shift);""" if is_half else f"atomicStore(&kept[e], {bits});"  # fmt: skip
    return source("store_floats", PLACE=place, WRITE=write, **words)


@functools.cache
def store_codes(name: str, dim: int, *, values: bool) -> str:
    """A group of 32 numbers as codes, with its scale and its minimum."""
    kind, (fit, code) = QUANTIZED[name], _FITS[name]
    lanes, fifth, scales, words = _layout(name, dim, values=values)
    put = f"""let at = (dot / 2u) * {lanes * 2}u + lane * 2u + dot % 2u;
    put(base, at, 0xffu, code);""" if kind.bits == 8 else f"""let at = (dot / 4u) * {lanes * 2}u + lane * 2u + dot % 2u;
    put_nibble(base, at, (dot / 2u) % 2u, code & 15u);"""  # fmt: skip
    if kind.bits == 5:
        put += f"""
    let word = base + {fifth}u + ((dot / 4u) * {lanes // 16}u + lane / 16u) * 2u + (dot / 2u) % 2u;
    let bit = 2u * (lane % 16u) + dot % 2u;
    atomicAnd(&kept[word], ~(1u << bit));
    atomicOr(&kept[word], (code >> 4u) << bit);"""
    minimum = f"put_half(base + {scales + dim // 2}u, i % (p.dim / 32u) * 32u + o, half_bits(m));"
    return source(
        "store_codes", LEVELS=_level_text() if name == "iq4_nl" else "", HALF_BITS=sources.text("half_bits"),
        WORDS=words, FIT=fit, CODE=code, DOT="o" if values else "d", LANE="d" if values else "o", PUT=put,
        SCALES=scales,
        MINIMUM=minimum if kind.has_minimum else "", NEAREST=_nearest_text() if name == "iq4_nl" else "",
    )  # fmt: skip


@functools.cache
def pack(most: int) -> str:
    """A full block in 3 and 2 bits, of heads of up to so many dimensions."""
    return source(
        "pack_kv", HALF_BITS=sources.text("half_bits"), PER_REACH=str(1 / KIVI2_REACH), MOST=most,
        KNEE=f"{KIVI2_KNEE}.0", PER_FAR_STEP=str(1 / KIVI2_FAR_STEP), MINIMUM_OF=_MINIMUM_OF,
        SCALE_OF_BYTE=_SCALE_OF_BYTE,
        PACK_KEYS=_pack_rows("keys", KIVI2_KEYS), PACK_VALUES=_pack_rows("values", KIVI2_VALUES),
    )  # fmt: skip


def _pack_rows(array: str, levels: PackedLevels) -> str:
    (whole, between), (narrow, at) = levels.within
    highest = levels.highest
    words = {2: _TWO_BITS, 3: _THREE_BITS}[levels.bits].replace("$ARRAY", array)
    return source(
        "pack_rows", ARRAY=array, WHOLE=str(whole / highest), BETWEEN=str(between), NARROW=str(narrow / highest),
        AT=str(at), HIGHEST=f"{highest}.0", PER_SCALE=f"{levels.per_scale}.0", BITS=levels.bits,
        DOTS={2: 8, 3: 16}[levels.bits], WORDS=words,
    )  # fmt: skip


_TWO_BITS = """var word = 0u;
    for (var i = 0u; i < 4u; i++) {
      word |= codes_of_$ARRAY(source, lanes, dot + i % 2u, 2u * at + i / 2u) << (8u * i);
    }
    $ARRAY[out + item] = word;"""
_THREE_BITS = """var words = vec3<u32>(0u);
    for (var i = 0u; i < 4u; i++) {
      let first = codes_of_$ARRAY(source, lanes, dot + i % 2u, 2u * at + i / 2u);
      let second = codes_of_$ARRAY(source, lanes, dot + 8u + i % 2u, 2u * at + i / 2u);
      words |= vec3<u32>(first & 255u, second & 255u, (first >> 8u) | ((second >> 8u) << 4u)) << vec3<u32>(8u * i);
    }
    for (var i = 0u; i < 3u; i++) { $ARRAY[out + (item / line * 3u + i) * line + at] = words[i]; }"""


def readers(layer: KVLayer, rows: int, newest: int = 0) -> dict[str, str]:
    """What attention.wgsl reads keys and values by: functions, the loop over dimensions, and the expression of two
    values.

    newest   of a packed layer: the group of the blocks that are not
    """
    if layer.type_k in PACKED:
        return _packed_readers(layer, rows, newest)
    texts, names = list[str](), (layer.type_k, layer.type_v)
    if "iq4_nl" in names:
        texts.append(_level_text())
    if layer.latent:
        scores = _LATENT
        texts.append(_half_pair("value", layer.head_dim_k))
    else:
        expression = {
            "f16": "unpack2x16float(keys[(head * $DIM_K + d) * 16u + o / 2u])",
            "bf16": "bfloats(keys[(head * $DIM_K + d) * 16u + o / 2u])",
            "f32": "vec2<f32>(bitcast<f32>(keys[(head * $DIM_K + d) * 32u + o]), "
            "bitcast<f32>(keys[(head * $DIM_K + d) * 32u + o + 1u]))",
        }.get(layer.type_k, "key_pair(head, o, d)")
        scores = _SCORES.replace("$KEY", expression)
        if layer.type_k in QUANTIZED:
            texts.append(_codes("keys", layer.type_k, layer.head_dim_k, values=False))
        if layer.type_v in QUANTIZED:
            texts.append(_codes("values", layer.type_v, layer.head_dim_v, values=True))
        else:
            pair = {"f16": _half_pair, "bf16": _bfloat_pair, "f32": _float_pair}[layer.type_v]
            texts.append(pair("value", layer.head_dim_v))
        if "bf16" in names:
            texts.append(_BFLOATS)
    return _UNPACKED | {
        "READERS": "\n".join(texts),
        "SCORES": _sized(scores, layer, rows),
        "VALUE": "value_pair(head, i % 32u, d)",
    }


_UNPACKED = {"NEWEST": "", "SAME_RUN": "", "RUN": "", "GROUP": "p.group"}


def _sized(text: str, layer: KVLayer, rows: int) -> str:
    return text.replace("$DIM_K", f"{layer.head_dim_k}u").replace("$ROWS", f"{rows}u")


def _packed_readers(layer: KVLayer, rows: int, newest: int) -> dict[str, str]:
    """The same, of blocks of 3 and 2 bits; of float16 the first, and from the run of a token's own position on."""
    run = NEWEST_BLOCKS * BLOCK_TOKENS
    halves = _SCORES.replace("$KEY", "unpack2x16float(newest_keys[(head * $DIM_K + d) * 16u + o / 2u])")
    of_halves = _half_pair("newest_value", layer.head_dim_v)
    return {
        "NEWEST": """@group(0) @binding(3) var<storage, read> newest_keys: array<u32>;
@group(0) @binding(4) var<storage, read> newest_values: array<u32>;""",
        "SAME_RUN": f" && position_of(token + n) / {run}u == position_of(token) / {run}u",
        "RUN": f"let run = position_of(token) / {run}u * {run}u;",
        "GROUP": f"select({newest}u, p.group, i >= 32u && i < run)",
        "READERS": _PACKED_READERS.replace("$DIM_V", f"{layer.head_dim_v}u") + of_halves,
        "SCORES": _sized(f"if (i >= 32u && i < run) {{ {_PACKED_SCORES} }} else {{ {halves} }}", layer, rows),
        "VALUE": "value_of(i >= 32u && i < run, head, i % 32u, d)",
    }


_MINIMUM_OF = f"""fn minimum_of(byte: u32) -> f32 {{  // in steps
  let steps = f32(byte & 0xffu) - 128.0;
  return steps + (steps - clamp(steps, -{KIVI2_KNEE}.0, {KIVI2_KNEE}.0)) * {KIVI2_FAR_STEP - 1}.0;
}}
"""
_SCALE_OF_BYTE = """fn scale_of_byte(byte: u32) -> f32 {  // upper bits of a float16; drivers may read small ones as 0
  let b = byte & 0xffu;
  let bits = (b << 20u) + select(0x38000000u, 0x70000000u, b >= 0xf8u);
  return select(bitcast<f32>(bits), f32(b) * 0x1p-17, b < 8u);
}
"""
_PACKED_READERS = (
    _MINIMUM_OF
    + _SCALE_OF_BYTE
    + f"""fn value_of(is_packed: bool, head: u32, o: u32, d: u32) -> vec2<f32> {{
  if (!is_packed) {{ return newest_value_pair(head, o, d); }}
  let base = head * $DIM_V * 5u / 2u;
  let w = values[base + o / 8u * ($DIM_V / 2u) + d / 2u] >> (8u * (o & 1u) + (o & 6u));
  let at = base + $DIM_V * 2u + (d / 32u) * 8u + o / 4u;
  let shift = 8u * (o & 3u);
  let least = minimum_of(values[at + $DIM_V / 4u] >> shift) * {1 / KIVI2_VALUES.per_scale};
  return (vec2<f32>(f32(w & 3u), f32((w >> 16u) & 3u)) + least) * scale_of_byte(values[at] >> shift);
}}
"""
)
_PACKED_SCORES = f"""let k0 = head * $DIM_K * 7u / 2u;
      for (var d = 0u; d < $DIM_K; d += 16u) {{
        let line = k0 + d * 3u + o / 2u;
        let words = vec2<u32>(keys[line], keys[line + 16u]);
        let upper = keys[line + 32u];
        for (var quad = 0u; quad < 4u; quad++) {{
          let at = k0 + $DIM_K * 3u + d / 4u + quad;
          let scales = keys[at];
          let minima = keys[at + $DIM_K / 4u];
          for (var j = 0u; j < 4u; j++) {{
            let byte = 8u * (j & 1u);
            let w = words[quad / 2u] >> byte;
            let u = (upper >> (byte + 4u * (quad / 2u))) << 8u;
            let both = vec2<u32>((w & 0xffu) | (u & 0xf00u), ((w >> 16u) & 0xffu) | ((u >> 16u) & 0xf00u));
            let c = both >> vec2<u32>(3u * (2u * (quad & 1u) + j / 2u));
            let least = minimum_of(minima >> (8u * j)) * {1 / KIVI2_KEYS.per_scale};
            let k = (vec2<f32>(c & vec2<u32>(7u)) + least) * scale_of_byte(scales >> (8u * j));
            for (var r = 0u; r < $ROWS; r++) {{ s[r] = fma(vec2<f32>(qs[r * $DIM_K + d + 4u * quad + j]), k, s[r]); }}
          }}
        }}
      }}"""


_SCORES = """for (var d = 0u; d < $DIM_K; d++) {
        let k = $KEY;
        for (var r = 0u; r < $ROWS; r++) { s[r] = fma(vec2<f32>(qs[r * $DIM_K + d]), k, s[r]); }
      }"""
_LATENT = """let k0 = (head * 32u + o) * ($DIM_K / 2u);
      for (var d = 0u; d < $DIM_K; d += 2u) {
        let u = unpack2x16float(keys[k0 + d / 2u]);
        let v = unpack2x16float(keys[k0 + $DIM_K / 2u + d / 2u]);
        for (var r = 0u; r < $ROWS; r++) {
          s[r] = fma(vec2<f32>(qs[r * $DIM_K + d]), vec2<f32>(u.x, v.x), s[r]);
          s[r] = fma(vec2<f32>(qs[r * $DIM_K + d + 1u]), vec2<f32>(u.y, v.y), s[r]);
        }
      }"""


_BFLOATS = """fn bfloats(w: u32) -> vec2<f32> {
  return vec2<f32>(bitcast<f32>(w << 16u), bitcast<f32>(w & 0xffff0000u));
}"""


def _half_pair(name: str, dim: int) -> str:
    """Two neighbours of a row of float16, which may begin in the middle of a word."""
    if dim % 2 == 0:
        body = f"return unpack2x16float({name}s[((head * 32u + o) * {dim}u + d) / 2u]);"
    else:
        body = f"""let e = (head * 32u + o) * {dim}u + d;
  if (e % 2u == 0u) {{ return unpack2x16float({name}s[e / 2u]); }}
  return vec2<f32>(unpack2x16float({name}s[e / 2u]).y, unpack2x16float({name}s[e / 2u + 1u]).x);"""
    return f"fn {name}_pair(head: u32, o: u32, d: u32) -> vec2<f32> {{\n  {body}\n}}"


def _bfloat_pair(name: str, dim: int) -> str:
    return _half_pair(name, dim).replace("unpack2x16float", "bfloats")


def _float_pair(name: str, dim: int) -> str:
    at = f"{name}s[(head * 32u + o) * {dim}u + d"
    return f"""fn {name}_pair(head: u32, o: u32, d: u32) -> vec2<f32> {{
  return vec2<f32>(bitcast<f32>({at}]), bitcast<f32>({at} + 1u]));
}}"""


def _layout(name: str, dim: int, *, values: bool) -> tuple[int, int, int, int]:
    """Lanes, and in words of a block of one head: where fifth bits begin, where scales do, and its size."""
    kind = QUANTIZED[name]
    return dim if values else 32, dim * 4, dim * kind.bits, kind.head_nbytes(dim) // 4


def _codes(array: str, name: str, dim: int, *, values: bool) -> str:
    """The numbers of two neighbouring lanes: of keys two positions, of values two dimensions."""
    kind, (lanes, fifth, scales, words) = QUANTIZED[name], _layout(name, dim, values=values)
    per, mask = (2, "0xffu") if kind.bits == 8 else (4, "15u")
    shift = "8u * (dot & 1u)" if kind.bits == 8 else "8u * (dot & 1u) + 4u * ((dot >> 1u) & 1u)"
    dot, lane = ("o", "d") if values else ("d", "o")
    more = ""
    if kind.bits == 5:
        more = f"""
  let f = {array}[base + {fifth}u + ((dot / 4u) * {lanes // 16}u + lane / 16u) * 2u + ((dot >> 1u) & 1u)];
  let bit = 2u * (lane & 15u) + (dot & 1u);
  c |= vec2<u32>(((f >> bit) & 1u) << 4u, ((f >> (bit + 2u)) & 1u) << 4u);"""
    half, pick = "(d / 32u) * 16u + o / 2u", "" if not values else "[o & 1u]"
    minimum = f" + unpack2x16float({array}[base + {scales + dim // 2}u + {half}]){pick}" if kind.has_minimum else ""
    return f"""fn {array[:-1]}_pair(head: u32, o: u32, d: u32) -> vec2<f32> {{
  let base = head * {words}u;
  let dot = {dot};
  let lane = {lane};
  let w = {array}[base + (dot / {per}u) * {lanes // 2}u + lane / 2u] >> ({shift});
  var c = vec2<u32>(w & {mask}, (w >> 16u) & {mask});{more}
  let scale = unpack2x16float({array}[base + {scales}u + {half}]){pick};
  return ({_LEVELS[name]}) * scale{minimum};
}}"""


def _level_text() -> str:
    return sources.levels_of("iq4_nl")


def _nearest_text() -> str:
    """The level nearest to a number, by the middles between levels."""
    count = " + ".join(f"select(0u, 1u, v >= {float(middle)})" for middle in IQ4_MIDDLES)
    return f"const LOWEST = {float(IQ4[0])};\nfn nearest_level(v: f32) -> u32 {{ return {count}; }}"
