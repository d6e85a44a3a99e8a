"""Whole models with one thing wrong each, and a worker that loads and runs them.

    python hostile_models.py FOLDER FIRST LAST     one line for each mutant: number, what came of it, what was done

A mutant is made from its number alone, so a line of the report is enough to make it again.
"""

from __future__ import annotations

import faulthandler
import random
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import decoder_models
import numpy as np
import raw_gguf as raw
import tiny_models

from edgellm.formats.quant_types import QUANT_TYPES, QUANT_TYPES_BY_ID

ARCHITECTURES = (
    *("llama", "qwen2", "qwen3", "qwen3moe", "gemma3", "lfm2"),
    *("qwen2moe", "olmoe", "granite", "granitemoe", "gemma", "gemma2", "gpt-oss", "qwen35", "qwen35moe"),
    *("qwen3next", "gemma4"),
    *decoder_models.TINY,
    *("mamba2", "granitehybrid", "falcon-h1", "nemotron_h", "nemotron_h_moe"),
)
QUANTS = ("Q8_0", "Q4_K", "Q4_1", "F16", "Q6_K", "IQ4_XS")
WHOLE = [0, 1, 2, 3, 4, 5, 7, 8, 16, 31, 33, 63, 65, 100, 255, 257, 512, 513, 4095, 4096, 65_535, 1 << 20, 1 << 24]
WHOLE += [(1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 33, (1 << 63) - 1, (1 << 64) - 1]
REAL = [0.0, -1.0, 1e-45, 1e-12, 1e-6, 0.1, 0.5, 1.0, 1.00011, 2.0, 1e3, 1e6, 1e15, 3e38, float("inf"), float("nan")]
OPTIONAL = {
    "rope.dimension_count": raw.U32,
    "rope.scaling.factor": raw.F32,
    "rope.scaling.attn_factor": raw.F32,
    "rope.scaling.original_context_length": raw.U32,
    "rope.scaling.yarn_beta_fast": raw.F32,
    "rope.scaling.yarn_ext_factor": raw.F32,
    "rope.freq_base_swa": raw.F32,
    "rope.scaling.yarn_log_multiplier": raw.F32,
    "rope.dimension_sections": raw.U32,
    "attention.temperature_scale": raw.F32,
    "nextn_predict_layers": raw.U32,
    "rope.scale_linear": raw.F32,
    "attention.sliding_window": raw.U32,
    "attention.sliding_window_pattern": raw.U32,
    "final_logit_softcapping": raw.F32,
    "attn_logit_softcapping": raw.F32,
    "attention.scale": raw.F32,
    "residual_scale": raw.F32,
    "logit_scale": raw.F32,
    "expert_count": raw.U32,
    "expert_used_count": raw.U32,
    "expert_feed_forward_length": raw.U32,
    "expert_shared_feed_forward_length": raw.U32,
}
IDS = ("bos", "eos", "unknown", "padding", "eot", "separator", "eom")
TEXTS = [b"", b"\x00", b"<0x-1>", b"<0x0A>", b"<0xFF>", b"\xff\xfe", b"a" * 5000, "\ufeff".encode(), b"<|im_end|>"]
TEXTS += [b" ", b"\xed\xa0\x80", "Ġ".encode(), b"the", b"\n"]


@dataclass
class Model:
    """A GGUF file taken apart: keys with type and value, tensors as [name, dims, type, bytes, shift of the offset]."""

    kvs: list[list[Any]]
    tensors: list[list[Any]]

    def get(self, key: str) -> list[Any]:
        """The entry of a key."""
        return next(entry for entry in self.kvs if entry[0] == key)

    def put(self, key: str, kind: int, value: Any) -> None:
        """Set a key, or add it."""
        self.kvs = [entry for entry in self.kvs if entry[0] != key] + [[key, kind, value]]

    def bytes(self) -> bytes:
        """The file."""
        kvs = [raw.kv_array(k, t[1], v) if isinstance(t, tuple) else raw.kv(k, t, v) for k, t, v in self.kvs]
        records, data = [], bytearray()
        for name, dims, kind, content, shift in self.tensors:
            records.append(raw.tensor(name, dims, kind, (len(data) + shift) % (1 << 64)))
            data += content + bytes(-len(content) % 32)
        return raw.gguf_bytes(kvs, records, bytes(data))


def take_apart(data: bytes) -> Model:
    """Read a sound file, without the reader under test."""
    at = 8

    def take(form: str) -> Any:
        nonlocal at
        (value,) = struct.unpack_from("<" + form, data, at)
        at += struct.calcsize(form)
        return value

    def text() -> bytes:
        nonlocal at
        n = take("Q")
        at += n
        return data[at - n : at]

    def value(kind: int) -> Any:
        return text() if kind == raw.STRING else take(raw._FORMS[kind])

    n_tensors, n_kv = take("Q"), take("Q")
    kvs, records = [], []
    for _ in range(n_kv):
        key, kind = text().decode(), take("I")
        if kind == raw.ARRAY:
            inner, n = take("I"), take("Q")
            kvs.append([key, (kind, inner), [value(inner) for _ in range(n)]])
        else:
            kvs.append([key, kind, value(kind)])
    for _ in range(n_tensors):
        name = text().decode()
        records.append((name, [take("Q") for _ in range(take("I"))], take("I"), take("Q")))
    start = -(-at // 32) * 32
    tensors = [[n, d, t, data[start + o : start + o + nbytes(d, t)], 0] for n, d, t, o in records]
    return Model(kvs, tensors)


def nbytes(dims: list[int], kind: int) -> int:
    """What a tensor takes in a file; 0 where it cannot be said."""
    quant = QUANT_TYPES_BY_ID.get(kind)
    n = int(np.prod([min(d, 1 << 16) for d in dims], dtype=object))
    return n // quant.block_size * quant.block_nbytes if quant and 0 <= n < 1 << 22 else 0


@cache
def seed(folder: Path, number: int) -> bytes:
    """One of the sound models: architectures, types, tied and not, and head sizes that are not powers of two."""
    rng = random.Random(number)
    architecture = ARCHITECTURES[number % len(ARCHITECTURES)]
    quant = QUANTS[number // len(ARCHITECTURES) % len(QUANTS)]
    n_head_kv = rng.choice([1, 2, 3])
    path = folder / f"seed-{number}.gguf"
    tiny_models.write_tiny_model(
        path,
        architecture,
        quant,
        quants={"attn_output.weight": "Q8_0", "ffn_down.weight": rng.choice(["Q8_0", quant])},
        n_layer=rng.choice([1, 2]),
        n_head=n_head_kv * rng.choice([1, 2, 3]),
        n_head_kv=n_head_kv,
        head_dim=rng.choice([32, 64, 96, 160, 256]),
        sliding_window=rng.choice([1, 7, 32, 33]),
        tied=rng.random() < 0.5,
        seed=number,
    )
    data = path.read_bytes()
    path.unlink()
    return data


def numbers(model: Model, rng: random.Random) -> str:
    """Another value for one of the numbers, or a key that was not there."""
    architecture = next((e[0].split(".")[0] for e in model.kvs if e[0].endswith(".block_count")), "llama")
    own = [e for e in model.kvs if isinstance(e[1], int) and e[1] not in (raw.STRING, raw.BOOL)]
    if rng.random() < 0.3:
        key, kind = rng.choice(list(OPTIONAL.items()))
        key = f"{architecture}.{key}"
        old = 2
        if rng.random() < 0.5:
            model.put(f"{architecture}.rope.scaling.type", raw.STRING, rng.choice(["yarn", "linear", "none", "x"]))
    else:
        key, kind, old = rng.choice(own)
    if kind == raw.F32:
        value = rng.choice([*REAL, old / 2, old * 2])
    else:
        value = rng.choice([*WHOLE, old + 1, max(0, old - 1), old * 2, old // 2, *range(1, 9)]) % (1 << 32)
    if rng.random() < 0.1:
        kind, value = (raw.ARRAY, kind), [value] * rng.choice([0, 1, 2, 3, 1000])
    elif rng.random() < 0.1:
        kind = rng.choice([raw.U64, raw.F64, raw.BOOL, raw.STRING])
        value = {raw.BOOL: 1, raw.STRING: "3"}.get(kind, value if kind == raw.F64 else int(np.nan_to_num(value, nan=3)))
        value = min(value, (1 << 64) - 1) if kind == raw.U64 and value >= 0 else value if kind != raw.U64 else 1
    model.put(key, kind, value)
    return f"{key} = {value!r:.40} ({kind})"


def keys(model: Model, rng: random.Random) -> str:
    """A key left out, doubled, or with the value of another."""
    entry = rng.choice(model.kvs)
    other = rng.choice(model.kvs)
    kind = rng.randrange(3)
    if kind == 0:
        model.kvs.remove(entry)
    elif kind == 1:
        model.kvs.append(entry)
    else:
        model.put(entry[0], other[1], other[2])
    return f"{('without', 'double', 'exchanged')[kind]} {entry[0]} {other[0]}"


def types(model: Model, rng: random.Random) -> str:
    """Another type for one tensor or for all of a name, with as many bytes as it then takes, or with the old ones."""
    tensor = rng.choice(model.tensors)
    kind = rng.choice(list(QUANT_TYPES.values())).id if rng.random() < 0.9 else rng.choice([4, 5, 31, 99, 1 << 31])
    suffix = tensor[0].rsplit(".", 2)[-2]
    for same in [t for t in model.tensors if t is tensor or (rng.random() < 0.5 and suffix in t[0])]:
        same[2] = kind
        if rng.random() < 0.9:
            same[3] = np.random.default_rng(rng.randrange(1 << 30)).bytes(nbytes(same[1], kind))
    return f"{tensor[0]} is {kind}"


def shapes(model: Model, rng: random.Random) -> str:
    """Other dims for one tensor, with as many bytes as they take, or with the old ones."""
    tensor = rng.choice(model.tensors)
    dims = list(tensor[1])
    way = rng.randrange(5)
    if way == 0:
        dims.reverse()
    elif way == 1:
        dims[rng.randrange(len(dims))] += rng.choice([-32, -1, 1, 32, 256])
    elif way == 2:
        dims.append(rng.choice([1, 1, 2]))
    elif way == 3:
        dims[rng.randrange(len(dims))] = rng.choice(WHOLE)
    else:
        dims = [int(np.prod(dims))]
    tensor[1] = dims
    if rng.random() < 0.7:
        tensor[3] = (tensor[3] * 3)[: nbytes(dims, tensor[2])]
    return f"{tensor[0]} {dims}"


def places(model: Model, rng: random.Random) -> str:
    """A tensor at another place, under another name, left out, doubled."""
    tensor, other = rng.choice(model.tensors), rng.choice(model.tensors)
    way = rng.randrange(6)
    if way == 0:
        tensor[4] = rng.choice([-32, 32, 1, -1, 64, 1 << 20, -(1 << 20), 1 << 63])
    elif way == 1:
        model.tensors.remove(tensor)
    elif way == 2:
        model.tensors.append(list(tensor))
    elif way == 3:
        tensor[0], other[0] = other[0], tensor[0]
    elif way == 4:
        rng.shuffle(model.tensors)
    else:
        tensor[0] = rng.choice(["output.weight", "rope_freqs.weight", "blk.0.attn_q.bias", "blk.9.attn_q.weight", "x"])
    return f"{way} {tensor[0]} {other[0]}"


def weights(model: Model, rng: random.Random) -> str:
    """Random bytes, NaN, infinity or zeros in one tensor or in all: scales are among them."""
    way = rng.randrange(5)
    chosen = model.tensors if rng.random() < 0.3 else [rng.choice(model.tensors)]
    for tensor in chosen:
        n = len(tensor[3])
        if way == 0:
            tensor[3] = np.random.default_rng(rng.randrange(1 << 30)).bytes(n)
        elif way == 1:
            tensor[3] = bytes([rng.choice([0, 0xFF, 0x7F, 0x80])]) * n
        elif tensor[2] in QUANT_TYPES_BY_ID and n >= QUANT_TYPES_BY_ID[tensor[2]].block_nbytes:
            pattern = struct.pack(
                "<f" if tensor[2] == 0 else "<e", rng.choice([float("nan"), float("inf"), -1e-7, 6e4])
            )
            content = bytearray(tensor[3])
            quant = QUANT_TYPES_BY_ID[tensor[2]]
            at = rng.randrange(n // quant.block_nbytes) * quant.block_nbytes
            at += rng.choice([0, quant.block_nbytes - len(pattern)])
            content[at : at + len(pattern)] = pattern
            tensor[3] = bytes(content)
    return f"{way} {chosen[0][0]} of {len(chosen)}"


def vocabulary(model: Model, rng: random.Random) -> str:
    """Tokens, types, scores, merges, ids and the kind of the tokenizer."""
    way = rng.randrange(8)
    tokens = model.get("tokenizer.ggml.tokens")[2]
    if way == 0:
        tokens[rng.randrange(len(tokens))] = rng.choice([*TEXTS, rng.choice(tokens)])
    elif way == 1:
        kinds = model.get("tokenizer.ggml.token_type")[2]
        for _ in range(rng.choice([1, 10, len(kinds)])):
            kinds[rng.randrange(len(kinds))] = rng.choice([0, 1, 2, 3, 4, 5, 6, 7, -1, (1 << 31) - 1])
    elif way == 2:
        merges = model.get("tokenizer.ggml.merges")[2]
        merges[rng.randrange(len(merges))] = rng.choice(
            [b"", b" ", b"a", b"a b c", b"zz qq", "é é".encode(), b"\xff a"]
        )
    elif way == 3:
        entry = rng.choice([e for e in model.kvs if isinstance(e[1], tuple)])
        entry[2] = rng.choice([[], entry[2][:-1], entry[2] + entry[2][:1], entry[2][:1]])
    elif way == 4:
        model.put(f"tokenizer.ggml.{rng.choice(IDS)}_token_id", raw.U32, rng.choice(WHOLE) % (1 << 32))
    elif way == 5:
        model.put("tokenizer.ggml.model", raw.STRING, rng.choice(["llama", "bert", "t5", "gpt2", "rwkv", "", "x"]))
        scores = [rng.choice([0.0, -1.0, float("nan"), float("inf"), -1e30]) for _ in tokens]
        model.put("tokenizer.ggml.scores", (raw.ARRAY, raw.F32), scores)
    elif way == 6:
        model.put(
            "tokenizer.ggml.pre", raw.STRING, rng.choice(["llama-bpe", "qwen2", "deepseek-llm", "gpt-2", "", "x"])
        )
    else:
        for flag in ("add_bos_token", "add_eos_token", "add_sep_token", "add_space_prefix", "remove_extra_whitespaces"):
            model.put(f"tokenizer.ggml.{flag}", raw.BOOL, rng.choice([0, 1, 1, 255]))
    return f"way {way}"


WAYS: tuple[Callable[[Model, random.Random], str], ...] = (
    numbers, numbers, keys, types, types, shapes, places, weights, weights, vocabulary, vocabulary,
)  # fmt: skip


def mutant(folder: Path, number: int) -> tuple[bytes, str]:
    """The file of a number, and what was done to it; one in twelve also has a flipped bit somewhere."""
    rng = random.Random(number)
    model = take_apart(seed(folder, rng.randrange(4 * len(ARCHITECTURES))))
    done = []
    for _ in range(rng.choice([1, 1, 1, 2])):
        way = rng.choice(WAYS)
        try:
            done.append(f"{way.__name__}: {way(model, rng)}")
        except (StopIteration, ValueError, IndexError, TypeError):  # what it changes is not there any more
            done.append(f"{way.__name__}: nothing to change")
    data = bytearray(model.bytes())
    if rng.random() < 1 / 12:
        data[rng.randrange(8, 12_000)] ^= 1 << rng.randrange(8)
        done.append("bit")
    return bytes(data), "; ".join(done)


def load_and_run(path: Path, seed: int) -> str:
    """Read 40 tokens and write four; what came of it in a few words. Anything but an EdgeLLMError gets out."""
    import edgellm
    from edgellm.formats.errors import EdgeLLMError

    loaded = False
    try:
        with edgellm.load(path, n_ctx=64, n_threads=1 + seed % 2, max_tokens_per_step=64) as llm:
            loaded = True
            ids = llm.tokenize("The <|im_start|> 12 \ufeffhello\n\n wörld \x00🙂", parse_special=bool(seed % 3))
            llm.detokenize(ids)
            ids = (ids * 40)[:20] + [(seed + 7 * i) % llm.program.n_vocab for i in range(20)]
            answer = llm.generate(
                ids[-40:], max_tokens=4, temperature=0.0 if seed % 2 else 0.9, seed=seed, special=True
            )
            return "ran" if len(answer.tokens) <= 4 else "too long"
    except EdgeLLMError as error:
        if error.code in ("ERROR", "") or not str(error):
            raise
        return ("stopped" if loaded else "refused") + " " + error.code


def main(folder: Path, first: int, last: int) -> None:
    """Run the mutants of a range; a crash leaves the number of the next one unsaid."""
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    for number in range(first, last):
        faulthandler.dump_traceback_later(60, exit=True)
        data, done = mutant(folder, number)
        path = folder / f"mutant-{first}.gguf"
        path.write_bytes(data)
        try:
            outcome = load_and_run(path, number)
        except BaseException as error:
            outcome = f"raised {type(error).__name__}: {error!s:.200}"
        print(number, outcome, "|", done, flush=True)
        path.unlink()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
