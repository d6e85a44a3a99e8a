"""The reference executor: each op against its definition, and a batch never changes a sequence's logits."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_encoders import DECODERS
from tiny_models import write_tiny_model

from edgellm.formats.errors import NumericError, ParameterError
from edgellm.formats.gguf import GGUFFile
from edgellm.kernels.kv import BLOCK_TOKENS, CacheGroup, KVLayer
from edgellm.kernels.ops import (
    Add,
    ApplyRope,
    Attention,
    Embed,
    GatedUnit,
    Matmul,
    Op,
    RMSNorm,
    Route,
    SelectOutputs,
    StoreKV,
    elementwise,
)
from edgellm.kernels.program import Batch, Buffer, Program
from edgellm.kernels.reference import ReferenceExecutor
from edgellm.kernels.rope import Rope, frequencies, linear_scaling, yarn_magnitude, yarn_scaling
from edgellm.models import build_program

SIZES: dict[str, Any] = {"n_embd": 64, "n_ff": 96, "n_head": 4, "n_head_kv": 2, "head_dim": 32}
Reader = Callable[[str], np.ndarray]
ROUNDING = 1e-11  # NMSE between two orders of the same float32 sums


def nmse(x: np.ndarray, judge: np.ndarray) -> float:
    """Squared error over the judge's squared values."""
    difference = x.astype(np.float64) - judge
    return float((difference**2).sum() / (judge.astype(np.float64) ** 2).sum())


@pytest.fixture(params=DECODERS)
def program(request: pytest.FixtureRequest, tmp_path: Path) -> Program:
    """A tiny random model of each architecture; gemma3's window is shorter than the tests' sequences."""
    gguf = GGUFFile.open(write_tiny_model(tmp_path / "tiny.gguf", request.param, sliding_window=40, **SIZES))
    request.addfinalizer(gguf.close)
    return build_program(gguf)


def tokens_of(program: Program, n: int, seed: int = 0) -> np.ndarray:
    """n random tokens."""
    return np.random.default_rng(seed).integers(0, program.n_vocab, n).astype(np.int32)


def in_chunks(executor: ReferenceExecutor, tokens: np.ndarray, size: int) -> np.ndarray:
    """Logits of all tokens of one sequence, computed ``size`` tokens at a time."""
    parts = [
        executor.run(Batch.single(executor.program, tokens[i : i + size], start=i)).copy()
        for i in range(0, len(tokens), size)
    ]
    return np.concatenate(parts)


@pytest.mark.parametrize("size", [1, 7, 32, 64])
def test_chunks_equal_the_whole(program: Program, size: int) -> None:
    tokens = tokens_of(program, 130)
    whole = ReferenceExecutor(program).run(Batch.single(program, tokens))
    assert nmse(in_chunks(ReferenceExecutor(program), tokens, size), whole) <= ROUNDING


def test_mixed_batch_equals_each_sequence_alone(program: Program) -> None:
    """Four sequences in one batch, at different depths, with blocks scattered over the pool."""
    lengths, chunk_sizes = [70, 33, 100, 1], [5, 33, 64, 1]
    sequences = [tokens_of(program, n, seed) for seed, n in enumerate(lengths)]
    alone = [ReferenceExecutor(program).run(Batch.single(program, s)) for s in sequences]
    max_blocks = 4
    shuffled = np.random.default_rng(5).permutation(len(sequences) * max_blocks).astype(np.int32)
    tables = tuple(np.roll(shuffled, 3 * g).reshape(len(sequences), max_blocks) for g in range(len(program.groups)))
    executor = ReferenceExecutor(program, int(shuffled.size))
    got: list[list[np.ndarray]] = [[] for _ in sequences]
    done = [0] * len(sequences)
    while any(d < n for d, n in zip(done, lengths, strict=True)):
        order = [i for i in (2, 0, 3, 1) if done[i] < lengths[i]]
        parts = [(i, range(done[i], min(done[i] + chunk_sizes[i], lengths[i]))) for i in order]
        slots = np.array([[i if n else -1, i] for i, n in enumerate(done)])  # of a state that goes on in its place
        kinds = zip(program.groups, tables, strict=True)
        logits = executor.run(
            Batch(
                tokens=np.concatenate([sequences[i][p.start : p.stop] for i, p in parts]),
                positions=np.concatenate([np.asarray(p, np.int32) for _, p in parts]),
                sequences=np.concatenate([np.full(len(p), i, np.int32) for i, p in parts]),
                outputs=np.ones(sum(len(p) for _, p in parts), bool),
                tables=tuple(slots if group.kind == "state" else table for group, table in kinds),
            )
        )
        for i, positions in parts:
            got[i].append(logits[: len(positions)].copy())
            logits = logits[len(positions) :]
            done[i] = positions.stop
    for parts_of_one, expected in zip(got, alone, strict=True):
        assert nmse(np.concatenate(parts_of_one), expected) <= ROUNDING


def test_only_asked_rows_come_back(program: Program) -> None:
    tokens = tokens_of(program, 20)
    batch = Batch.single(program, tokens)
    whole = ReferenceExecutor(program).run(batch)
    wanted = np.zeros(20, bool)
    wanted[[0, 7, 19]] = True
    some = ReferenceExecutor(program).run(dataclasses.replace(batch, outputs=wanted))
    assert nmse(some, whole[wanted]) <= ROUNDING
    none = ReferenceExecutor(program).run(dataclasses.replace(batch, outputs=np.zeros(20, bool)))
    assert none.shape == (0, program.n_vocab)
    last = ReferenceExecutor(program).run(Batch.single(program, tokens, outputs="last"))
    assert nmse(last, whole[-1:]) <= ROUNDING


def test_window_layers_need_only_the_blocks_of_their_window(tmp_path: Path) -> None:
    with GGUFFile.open(write_tiny_model(tmp_path / "g.gguf", "gemma3", sliding_window=40, **SIZES)) as gguf:
        program = build_program(gguf)
        tokens = tokens_of(program, 140)
        executor = ReferenceExecutor(program)
        whole = executor.run(Batch.single(program, tokens))
        in_chunks(executor, tokens[:130], 65)
        batch = Batch.single(program, tokens[130:], start=130)
        group = program.groups.index(CacheGroup("window", 40))
        first_seen = (130 - 40 + 1) // BLOCK_TOKENS
        tables = [table.copy() for table in batch.tables]
        tables[group][0, :first_seen] = -1
        logits = executor.run(dataclasses.replace(batch, tables=tuple(tables)))
        assert nmse(logits, whole[130:]) <= ROUNDING


def test_float16_cache_rounds_and_no_more(program: Program) -> None:
    batch = Batch.single(program, tokens_of(program, 64))
    half, whole = ReferenceExecutor(program, 2, kv_dtype="float16"), ReferenceExecutor(program)
    # two experts that are as good as each other may change places: judged before the first that do
    differ = np.flatnonzero((chosen(half, batch) != chosen(whole, batch)).any(axis=1))
    n = int(min(differ, default=64))
    error = nmse(half.run(batch)[:n], whole.run(batch)[:n])
    has_keys = any(isinstance(layer, KVLayer) for layer in program.cache_layers)
    assert n > 1 and (error > 0) == has_keys
    assert error <= 1e-5  # 11 bits of keys and values: 2^-22 before the layers amplify it


def chosen(executor: ReferenceExecutor, batch: Batch) -> np.ndarray:
    """The experts of every token, in all layers side by side; a column of zeros before them."""
    found = [np.zeros((len(batch), 1), np.int32)]

    def look(index: int, op: Op, buffer: Reader) -> None:
        if isinstance(op, Route):
            found.append(np.sort(buffer(op.ids)))

    executor.run(batch, look)
    return np.concatenate(found, axis=1)


def test_hook_sees_and_changes_buffers(program: Program) -> None:
    tokens = tokens_of(program, 5)
    executor = ReferenceExecutor(program)
    plain = executor.run(Batch.single(program, tokens)).copy()
    seen: list[tuple[int, Op]] = []

    def look(index: int, op: Op, buffer: Reader) -> None:
        seen.append((index, op))
        if isinstance(op, SelectOutputs):
            assert buffer(op.x).shape == (5, program.n_embd)

    assert (executor.run(Batch.single(program, tokens), look) == plain).all()
    assert seen == list(enumerate(program.ops))

    def silence(index: int, op: Op, buffer: Reader) -> None:
        if isinstance(op, Embed):
            buffer(op.out)[...] = 0

    assert np.abs(executor.run(Batch.single(program, tokens), silence) - plain).max() > 1e-3


def test_nan_is_an_error_and_never_logits(program: Program) -> None:
    def spoil(index: int, op: Op, buffer: Reader) -> None:
        if isinstance(op, Embed):
            buffer(op.out)[-1, 0] = np.nan

    executor = ReferenceExecutor(program)
    batch = Batch.single(program, tokens_of(program, 4))
    with pytest.raises(NumericError, match="NaN"):
        executor.run(batch, spoil)
    assert np.isfinite(executor.run(batch)).all()


def test_too_large_a_batch_is_refused_with_both_numbers(program: Program) -> None:
    with pytest.raises(ParameterError, match=r"9 tokens.* 8"):
        ReferenceExecutor(program, max_tokens=8).run(Batch.single(program, tokens_of(program, 9)))


def test_close_lets_go_of_the_weights_and_may_be_called_twice(program: Program) -> None:
    executor = ReferenceExecutor(program)
    executor.run(Batch.single(program, tokens_of(program, 1)))
    assert executor._weights
    for _ in range(2):
        executor.close()
        assert not executor._weights


def test_empty_batch_has_no_logits(program: Program) -> None:
    assert ReferenceExecutor(program).run(Batch.single(program, [])).shape == (0, program.n_vocab)


# one op at a time: a program of that op, with a hook that fills its inputs


class Weight:
    """Stands for a QuantizedTensor that is float32 already."""

    def __init__(self, values: np.ndarray) -> None:
        self.values = values.astype(np.float32)
        self.shape = values.shape

    def dequantize(self, rows: np.ndarray | None = None) -> np.ndarray:
        values = self.values.reshape(-1, self.shape[-1])
        return values if rows is None else values[rows]


def run_ops(
    ops: list[Op],
    inputs: dict[str, np.ndarray],
    widths: dict[str, int],
    result: str,
    *,
    weights: dict[str, np.ndarray] | None = None,
    layers: tuple[KVLayer, ...] = (),
    ropes: dict[str, Rope] | None = None,
    start: int = 0,
) -> np.ndarray:
    """What ``result`` holds after the ops, given the input buffers."""
    n = len(next(iter(inputs.values())))
    buffers = {name: Buffer(name, width) for name, width in widths.items()}
    program = Program(
        architecture="test",
        ops=(Embed("w0", "logits"), *ops),
        buffers=buffers | {"logits": Buffer("logits", 1)},
        tensors={name: Weight(w) for name, w in ({"w0": np.zeros((8, 1))} | (weights or {})).items()},  # type: ignore[misc]
        cache_layers=layers,
        ropes=ropes or {},
        n_vocab=1,
        context_length=256,
        n_embd=1,
    )
    results = []

    def hook(index: int, op: Op, buffer: Reader) -> None:
        if index == 0:
            for name, values in inputs.items():
                buffer(name)[...] = values
        if index == len(ops):
            results.append(buffer(result).copy())

    ReferenceExecutor(program).run(Batch.single(program, np.zeros(n, np.int32), start=start), hook)
    return results[0]


RNG = np.random.default_rng(7)


def test_embed_looks_up_and_scales(tmp_path: Path) -> None:
    out = run_ops(
        [Embed("e", "out", 2.0)],
        {"out": np.zeros((3, 4))},
        {"out": 4},
        "out",
        weights={"e": np.arange(32).reshape(8, 4)},
    )
    assert (out == np.array([[0, 2, 4, 6]] * 3)).all()


@pytest.mark.parametrize("groups", [1, 3])
def test_rms_norm(groups: int) -> None:
    x, weight = RNG.standard_normal((5, 21)), RNG.standard_normal(21 // groups)
    out = run_ops([RMSNorm("x", "w", "y", 1e-5)], {"x": x}, {"x": 21, "y": 21}, "y", weights={"w": weight})
    heads = x.reshape(5, groups, -1)
    expected = heads / np.sqrt((heads**2).mean(-1, keepdims=True) + 1e-5) * weight
    assert nmse(out, expected.reshape(5, 21)) <= 1e-13


@pytest.mark.parametrize("has_bias", [False, True])
def test_matmul(has_bias: bool) -> None:
    x, weight, bias = RNG.standard_normal((5, 33)), RNG.standard_normal((7, 33)), RNG.standard_normal(7)
    ops: list[Op] = [Matmul("x", "w", "y", "b" if has_bias else None)]
    out = run_ops(ops, {"x": x}, {"x": 33, "y": 7}, "y", weights={"w": weight, "b": bias})
    assert nmse(out, x @ weight.T + bias * has_bias) <= 1e-13


@pytest.mark.parametrize("adjacent", [False, True])
@pytest.mark.parametrize("n_dims", [8, 6])
def test_rope_turns_pairs_and_leaves_the_rest(adjacent: bool, n_dims: int) -> None:
    x = RNG.standard_normal((9, 16))  # two heads of 8
    rope = Rope(adjacent, frequencies(n_dims, 100.0), magnitude=1.25)
    ops: list[Op] = [ApplyRope("x", 8, "r")]
    out = run_ops(ops, {"x": x}, {"x": 16}, "x", ropes={"r": rope}, start=40)
    pairs = [(2 * i, 2 * i + 1) if adjacent else (i, i + n_dims // 2) for i in range(n_dims // 2)]
    expected = x.copy()
    for t in range(9):
        for head in (0, 8):
            for i, (a, b) in enumerate(pairs):
                z = complex(x[t, head + a], x[t, head + b]) * 1.25
                z *= np.exp(1j * (40 + t) * 100.0 ** (-2 * i / n_dims))
                expected[t, head + a], expected[t, head + b] = z.real, z.imag
    assert nmse(out, expected) <= 1e-11  # the angle is a float32 product


@pytest.mark.parametrize("window", [0, 1, 5, 40])
@pytest.mark.parametrize(("n_heads", "n_kv_heads"), [(4, 4), (6, 2), (3, 1)])
def test_attention_equals_its_definition(window: int, n_heads: int, n_kv_heads: int) -> None:
    n, dim_k, dim_v, scale = 70, 8, 12, 0.3
    q = RNG.standard_normal((n, n_heads, dim_k))
    k = RNG.standard_normal((n, n_kv_heads, dim_k))
    v = RNG.standard_normal((n, n_kv_heads, dim_v))
    out = run_ops(
        [StoreKV("k", "v", 0), Attention("q", "y", 0, n_heads, scale)],
        {"q": q.reshape(n, -1), "k": k.reshape(n, -1), "v": v.reshape(n, -1)},
        {"q": n_heads * dim_k, "k": n_kv_heads * dim_k, "v": n_kv_heads * dim_v, "y": n_heads * dim_v},
        "y",
        layers=(KVLayer(n_kv_heads, dim_k, dim_v, window),),
    )
    expected = np.zeros((n, n_heads, dim_v))
    for t in range(n):
        first = max(0, t - window + 1) if window else 0
        for head in range(n_heads):
            kv = head * n_kv_heads // n_heads
            weights = np.exp(scale * k[first : t + 1, kv] @ q[t, head])
            expected[t, head] = weights @ v[first : t + 1, kv] / weights.sum()
    assert nmse(out, expected.reshape(n, -1)) <= 1e-12


@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_gated_unit(activation: str) -> None:
    gate = np.concatenate([RNG.standard_normal((4, 8)) * 3, [[0, -0.0, 1e-30, 80, -80, 1e4, -1e4, 1]]])
    up = RNG.standard_normal((5, 8))
    ops: list[Op] = [GatedUnit("g", "u", "y", activation)]  # type: ignore[arg-type]
    out = run_ops(ops, {"g": gate, "u": up}, {"g": 8, "u": 8, "y": 8}, "y")
    silu = gate * 0.5 * (1 + np.tanh(gate / 2))
    gelu = gate * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
    assert nmse(out, {"silu": silu, "gelu": gelu}[activation] * up) <= 1e-12


@pytest.mark.parametrize("function", [elementwise.sigmoid, elementwise.silu, elementwise.gelu])
def test_values_near_zero_keep_their_digits(function: Callable[[np.ndarray], np.ndarray]) -> None:
    x = np.linspace(-80, 20, 1001)
    cubic = 2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    exact = {
        "sigmoid": 1 / (1 + np.exp(-x)),
        "silu": x / (1 + np.exp(-x)),
        "gelu": x * np.exp(-np.logaddexp(0, -cubic)),
    }
    expected = exact[function.__name__]
    counts = np.abs(expected) > np.finfo(np.float32).tiny
    found = function(x.astype(np.float32))
    assert found.dtype == np.float32
    assert np.allclose(found[counts], expected[counts], rtol=1e-4, atol=0)


def test_add_in_place() -> None:
    x, y = RNG.standard_normal((2, 3, 4))
    assert nmse(run_ops([Add("x", "y", "x")], {"x": x, "y": y}, {"x": 4, "y": 4}, "x"), x + y) <= 1e-14


# rotations against transformers' own functions


@pytest.mark.parametrize("n_dims", [64, 80, 128])
@pytest.mark.parametrize("kind", ["linear", "yarn", "yarn betas"])
def test_scaled_frequencies_equal_transformers(kind: str, n_dims: int) -> None:
    pytest.importorskip("torch", reason="the judge of rotations is transformers on torch")
    transformers = pytest.importorskip("transformers", reason="the judge of rotations is transformers")
    rope_utils = pytest.importorskip("transformers.modeling_rope_utils", reason="the judge of rotations")
    rope: dict[str, Any] = {"rope_type": kind.split()[0], "rope_theta": 5e5, "factor": 8.0}
    if kind != "linear":
        rope["original_max_position_embeddings"] = 4096
    if kind == "yarn betas":
        rope |= {"beta_fast": 16.0, "beta_slow": 2.0}
    config = transformers.LlamaConfig(head_dim=n_dims, max_position_embeddings=32768, rope_parameters=rope)
    judge, magnitude = rope_utils.ROPE_INIT_FUNCTIONS[rope["rope_type"]](config)
    plain = frequencies(n_dims, 5e5)
    if kind == "linear":
        ours = linear_scaling(plain, 8.0)
    else:
        ours = yarn_scaling(plain, 5e5, 8.0, 4096, rope.get("beta_fast", 32.0), rope.get("beta_slow", 1.0))
        assert yarn_magnitude(8.0) == pytest.approx(magnitude)
    np.testing.assert_allclose(ours, judge.numpy(), rtol=3e-7)
