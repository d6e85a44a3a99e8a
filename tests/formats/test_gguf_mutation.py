"""Thousands of damaged files: each is read or refused by a named error, and takes memory in proportion to its size."""

from __future__ import annotations

import random
import struct
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
import raw_gguf as raw
from gguf_files import write_gguf

from edgellm.formats.errors import EdgeLLMError
from edgellm.formats.gguf import GGUFFile
from edgellm.formats.quant_types import QUANT_TYPES
from edgellm.formats.validate import findings, prove

N_MUTANTS = 1000  # of each seed file, in each of three ways
NUMBERS = [0, 1, 2, 3, 7, 13, 31, 32, 33, 255, 256, 65_535, 1 << 20, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32]
NUMBERS += [1 << 40, 1 << 47, 1 << 61, (1 << 63) - 1, 1 << 63, (1 << 64) - 32, (1 << 64) - 1]
SEEDS = ("vocabulary", "types", "split")


def seed_file(name: str, folder: Path) -> Path:
    """A small sound file of one of three kinds."""
    metadata = {
        "general.architecture": "test",
        "general.alignment": 32,
        "test.block_count": 2,
        "test.context_length": 64,
        "test.rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "<0x0A>", "a", "b", "ab", "é", "🙂"],
        "tokenizer.ggml.scores": np.zeros(8, np.float32),
        "tokenizer.ggml.token_type": np.array([2, 3, 6, 1, 1, 1, 1, 1], np.int32),
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.add_bos_token": True,
    }
    if name == "vocabulary":
        weights = {"token_embd.weight": np.ones((8, 8), np.float32), "output_norm.weight": np.ones(8, np.float32)}
        return write_gguf(folder / "seed.gguf", metadata, weights)
    if name == "types":
        blocks = {
            f"blk.{quant.id}.weight": (np.ones((2, quant.block_nbytes), np.uint8), quant.name)
            for quant in QUANT_TYPES.values()
            if quant.block_size > 1 and quant.name in gguf.GGMLQuantizationType.__members__  # it may know fewer
        }
        return write_gguf(folder / "seed.gguf", {"general.architecture": "test", "test.u8": np.uint8(3)}, blocks)
    for no in range(2):
        kvs = [
            raw.kv("split.no", raw.U16, no),
            raw.kv("split.count", raw.U16, 2),
            raw.kv("split.tensors.count", raw.I32, 2),
        ]
        path = folder / f"seed-{no + 1:05}-of-00002.gguf"
        path.write_bytes(raw.gguf_bytes(kvs, [raw.tensor(f"t{no}", [8])], bytes(32)))
    return folder / "seed-00001-of-00002.gguf"


def bit_flips(data: bytes, n_header: int, rng: random.Random) -> Iterator[bytes]:
    """One to four flipped bits of the header."""
    for _ in range(N_MUTANTS):
        mutant = bytearray(data)
        for _ in range(rng.choice([1, 1, 1, 2, 4])):
            mutant[rng.randrange(n_header)] ^= 1 << rng.randrange(8)
        yield bytes(mutant)


def field_changes(data: bytes, n_header: int, rng: random.Random) -> Iterator[bytes]:
    """A number of four or eight bytes, anywhere in the header, replaced by one that breaks programs."""
    for _ in range(N_MUTANTS):
        at = rng.randrange(4, n_header)
        number = rng.choice(NUMBERS)
        field = struct.pack("<Q", number) if rng.random() < 0.6 else struct.pack("<I", number & 0xFFFFFFFF)
        yield data[:at] + field[: len(data) - at] + data[at + len(field) :]


def splices(data: bytes, n_header: int, rng: random.Random) -> Iterator[bytes]:
    """A piece of the file left out, doubled, or copied to another place."""
    for _ in range(N_MUTANTS):
        a, b = sorted(rng.sample(range(4, n_header + 1), 2))
        at = rng.randrange(4, n_header)
        kind = rng.randrange(3)
        if kind == 0:
            yield data[:a] + data[b:]
        elif kind == 1:
            yield data[:b] + data[a:]
        else:
            yield data[:at] + data[a:b] + data[at + b - a :]


def truncations(data: bytes, n_header: int, rng: random.Random) -> Iterator[bytes]:
    """The file cut at every byte of its header, and at some of its data."""
    for n in range(n_header):
        yield data[:n]
    for _ in range(50):
        yield data[: rng.randrange(n_header, len(data))]


def touch(gguf: GGUFFile) -> None:
    """Read every byte that the reader says is there."""
    for tensor in gguf.tensors.values():
        tensor.data.sum()
        if tensor.quant.unpack:
            tensor.dequantize()


@pytest.mark.parametrize("name", SEEDS)
@pytest.mark.parametrize("mutate", [bit_flips, field_changes, splices, truncations], ids=lambda f: f.__name__)
def test_mutants_are_read_or_refused_by_name(mutate, name: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    path = seed_file(name, tmp_path)
    data = path.read_bytes()
    n_header = prove(path)[0].header.data_start
    accepted = refused = 0
    tracemalloc.start()
    try:
        for number, mutant in enumerate(mutate(data, n_header, random.Random(20))):
            path.unlink()  # a file in use must not shrink under its map
            path.write_bytes(mutant)
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            try:
                with GGUFFile.open(path) as gguf:
                    touch(gguf)
                accepted += 1
            except EdgeLLMError as error:
                assert error.code != EdgeLLMError.code and error.code.isupper(), f"mutant {number}: {error!r}"
                refused += 1
                if number % 8 == 0:
                    assert error.code in [found.code for found in findings(path)], f"mutant {number}: {error!r}"
            except Exception as error:
                raise AssertionError(f"{mutate.__name__} of {name}, mutant {number}") from error
            peak = tracemalloc.get_traced_memory()[1] - before
            assert peak < (1 << 20) + 16 * len(mutant), f"mutant {number} took {peak:,} bytes"
    finally:
        tracemalloc.stop()
    assert refused > 100
    assert accepted or mutate is truncations
