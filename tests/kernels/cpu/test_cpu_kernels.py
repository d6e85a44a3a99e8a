"""Every CPU kernel in every form that this CPU runs, against the numpy reference, in odd shapes."""

from __future__ import annotations

import subprocess
import sys

import cpu_programs
import numpy as np
import pytest
from cpu_programs import FORMS, READABLE_TYPES, any_tensor, cpu_executor, part, single_sequence

from edgellm.formats.errors import UnsupportedError
from edgellm.kernels.cpu.compile import kernel_table, selftest, trials
from edgellm.kernels.cpu.compile.trials import FLOAT_LIMIT, LIMITS, fill_randomly, nmse, outputs_of_ops
from edgellm.kernels.cpu.weights import FLOAT, QUANTIZED
from edgellm.kernels.kv import KVLayer
from edgellm.kernels.ops import Add, ApplyRope, Attention, Embed, GatedUnit, Matmul, RMSNorm, SelectOutputs
from edgellm.kernels.ops.sketch import N_VOCAB, Sketch
from edgellm.kernels.program import Batch, Buffer, Program
from edgellm.kernels.reference import ReferenceExecutor
from edgellm.kernels.rope import Rope, frequencies

N_BLOCKS = 30

# Without a fused multiply-add (portable form on x86) a product rounds twice, so bits differ between forms there;
# within a form they must not differ.


def sketch(seed: int = 0, max_tokens: int = 64) -> Sketch:
    return trials.sketch(seed, max_tokens)


def worst_nmse(s: Sketch, batches: list, form: str, n_threads: int = 2) -> float:
    """Worst error of any op of the sketched program, over the batches."""
    program = s.program()
    reference = ReferenceExecutor(program, N_BLOCKS, s.max_tokens, "float16")
    executor = cpu_executor(program, N_BLOCKS, n_threads, s.max_tokens, form)
    for one in (reference, executor):
        fill_randomly(one.pool)
    worst = 0.0
    for batch in batches:
        expected = outputs_of_ops(reference, batch, s.inputs)
        for one, other in zip(outputs_of_ops(executor, batch, s.inputs), expected, strict=True):
            worst = max(worst, nmse(one, other))
    executor.close()
    return worst


# ---- the tables ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_every_kernel_passes_the_self_test(form: str) -> None:
    results = list(selftest.run(form=form))
    assert [r.kernel for r in results] == list(kernel_table.KERNELS)
    assert not [r for r in results if not r.ok]
    assert {r.form for r in results} == {form}


def test_self_test_imports_no_numba_once_compiled() -> None:
    list(selftest.run(kernels=["add", "matmul_q8_0"]))
    code = (
        "import sys; from edgellm.kernels.cpu.compile import selftest;"
        "assert all(r.ok for r in selftest.run(kernels=['add', 'matmul_q8_0'])); print('numba' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "False", done.stderr


# types without a kernel are dequantized to F32 at load: one form will do
TYPES_AND_FORMS = [(q, f) for q in READABLE_TYPES for f in FORMS if f == FORMS[0] or q in (*QUANTIZED, *FLOAT)]


@pytest.mark.parametrize(("quant", "form"), TYPES_AND_FORMS)
def test_product_and_embedding_of_every_type_in_odd_shapes(quant: str, form: str) -> None:
    s = sketch(max_tokens=25)
    block = cpu_programs.QUANT_TYPES[quant].block_size
    for i, n_out in enumerate((1, 7, 17, 33, 100)):
        n_in = (1, 3, 2, 17, 5)[i] * (block if block < 64 else 256) + (i * 7 if block == 1 else 0)
        weight, bias = f"weight {i}", s.tensor("F32", (n_out,)) if i % 2 else None
        s.tensors[weight] = any_tensor(s.rng, weight, quant, (n_out, n_in))
        s.emit(weight, Matmul(s.input(n_in), weight, s.buffer(n_out), bias))
    s.tensors["embedding"] = any_tensor(s.rng, "embedding", quant, (N_VOCAB, 3 * max(block, 7)))
    s.emit("embedding", Embed("embedding", s.buffer(3 * max(block, 7)), 2.5))
    program = s.program()
    batches = [single_sequence(program, n) for n in (1, 2, 3, 4, 5, 7, 17, 25)]
    assert worst_nmse(s, batches, form) <= LIMITS.get(f"matmul_{quant.lower()}", FLOAT_LIMIT)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("quant", QUANTIZED)
def test_heavy_tailed_activations_stay_within_the_limit(quant: str, form: str) -> None:
    s = sketch(3)
    x = s.input(512)
    s.inputs[x][:] = s.rng.standard_t(1.5, s.inputs[x].shape) * np.exp(s.rng.normal(0, 3, (s.max_tokens, 1)))
    s.inputs[x][0] = 0
    s.emit("", Matmul(x, s.tensor(quant, (70, 512)), s.buffer(70)))
    batches = [single_sequence(s.program(), n) for n in (1, 6, 64)]
    assert worst_nmse(s, batches, form) <= LIMITS[f"matmul_{quant.lower()}"]


@pytest.mark.parametrize("form", FORMS)
def test_products_of_all_types_may_share_their_activations(form: str) -> None:
    s = sketch()
    x = s.input(512)
    for quant in QUANTIZED:
        s.emit(quant, Matmul(x, s.tensor(quant, (40, 512)), s.buffer(40)))
    batches = [single_sequence(s.program(), n, seed=n) for n in (1, 5, 9, 20, 25)]
    assert worst_nmse(s, batches, form) <= trials.SUPERBLOCK_LIMIT


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("quant", QUANTIZED)
@pytest.mark.parametrize("byte", [0x00, 0x7F, 0x80, 0xFF])
def test_largest_integers_do_not_overflow(quant: str, byte: int, form: str) -> None:
    """Activations of 16383 with the largest weights: a sum comes near 2^31. So do those with the largest low bytes."""
    s = sketch(4)
    x = s.input(1024)
    for row, integer in enumerate((16256, 16383, 16255)):  # 64 * 256 - 128, 64 * 256 - 1, 63 * 256 + 127
        s.inputs[x][row::3] = 3.0 * integer / 16383
    s.inputs[x][:, ::32] = 3.0
    weight = s.tensor(quant, (20, 1024))
    blocks = s.tensors[weight].data.reshape(-1).view(s.tensors[weight].quant.layout)
    for name in ("qs", "qh", "ql", "hmask", "scales", "scales_l", "scales_h"):
        if name in blocks.dtype.names:
            blocks[name] = np.full(2, byte, np.uint8).view(blocks[name].dtype)[0]
    if quant == "Q6_K":
        blocks["scales"] = -128 if byte in (0x00, 0x80) else 127
    s.emit("", Matmul(x, weight, s.buffer(20)))
    assert worst_nmse(s, [single_sequence(s.program(), n) for n in (1, 6)], form) <= LIMITS[f"matmul_{quant.lower()}"]


@pytest.mark.parametrize("form", FORMS)
def test_small_kernels_in_odd_shapes(form: str) -> None:
    s = sketch(5)
    for heads, width in ((1, 1), (1, 15), (5, 17), (3, 80), (9, 64), (4, 100)):
        out = s.buffer(heads * width)
        s.emit("norm", RMSNorm(s.input(heads * width), s.tensor("F32", (width,)), out, 1e-6))
    for heads, head_dim, n_dims in ((1, 2, 2), (3, 64, 64), (5, 80, 80), (2, 128, 32), (4, 18, 6)):
        for adjacent in (False, True):
            rope = s.rope(Rope(adjacent, frequencies(n_dims, 1e6), 1.25))
            s.emit("rope", ApplyRope(s.input(heads * head_dim), head_dim, rope))
    for width in (1, 15, 16, 31, 300):
        for activation in ("silu", "gelu"):
            gate = s.input(width)
            s.inputs[gate][:4] = np.array([0, -100, 100, -30], np.float32)[:, None]
            s.emit("gate", GatedUnit(gate, s.input(width), s.buffer(width), activation))
    program = s.program()
    batches = [single_sequence(program, n, start) for n, start in ((1, 0), (7, 31), (64, 5000))]
    assert worst_nmse(s, batches, form) <= FLOAT_LIMIT


# ---- attention -------------------------------------------------------------------------------------------------------

GROUPS = {1: (64, 64), 3: (40, 24), 4: (80, 80), 8: (17, 33)}  # query heads to a key head: dimensions of key and value
WINDOWS = (0, 1, 5, 32, 33, 100, 512)


def attention_sketch(windows: tuple[int, ...] = WINDOWS) -> Sketch:
    s = sketch(6)
    for window in windows:
        for group, (dim_k, dim_v) in GROUPS.items():
            layer = s.layer(KVLayer(2, dim_k, dim_v, window))
            q, out = s.input(2 * group * dim_k), s.buffer(2 * group * dim_v)
            s.emit(f"{group} {window}", Attention(q, out, layer, 2 * group, dim_k**-0.5))
    return s


@pytest.mark.parametrize("form", FORMS)
def test_attention_sees_what_it_should(form: str) -> None:
    """Causal, grouped queries, windows; contexts beyond one and two cuts of 256; few tokens and many."""
    s = attention_sketch()
    program = s.program()
    shapes = ((1, 0), (1, 31), (1, 700), (8, 640), (9, 250), (40, 0), (64, 230), (33, 600), (2, 255))
    batches = [single_sequence(program, n, start, N_BLOCKS, seed=n) for n, start in shapes]
    assert worst_nmse(s, batches, form) <= FLOAT_LIMIT


SEQUENCES = ((3, 0), (5, 610), (1, 100), (20, 30), (7, 255))  # tokens and first position of each
NEXT_TOKENS = ((1, 2), (1, 614), (1, 100), (1, 49), (1, 261))  # decoding: few tokens, so long contexts are split


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("spans", [SEQUENCES, NEXT_TOKENS])
def test_attention_of_several_sequences_with_passed_blocks_given_back(
    spans: tuple[tuple[int, int], ...], form: str
) -> None:
    """Blocks lie in any order, and -1 stands where a window has passed."""
    s = attention_sketch()
    program = s.program()
    rng = np.random.default_rng(7)
    tables = []
    for window in (group.window for group in program.groups):
        blocks = rng.permutation(N_BLOCKS)
        table = np.full((len(spans), 20), -1, np.int32)
        for row, (n, start) in enumerate(spans):
            first = max(0, start - window + 1) // 32 if window else 0
            last = (start + n - 1) // 32
            # full attention needs more blocks than there are: let sequences share, as a prefix tree does
            table[row, first : last + 1] = blocks[np.arange(row * 3, row * 3 + last + 1 - first) % N_BLOCKS]
        tables.append(table)
    n_tokens = [n for n, _ in spans]
    batch = Batch(
        np.zeros(sum(n_tokens), np.int32),
        np.concatenate([np.arange(start, start + n) for n, start in spans]).astype(np.int32),
        np.repeat(np.arange(len(spans)), n_tokens).astype(np.int32),
        np.ones(sum(n_tokens), bool),
        tuple(tables),
    )
    assert worst_nmse(s, [batch], form) <= FLOAT_LIMIT


# ---- the same bits ---------------------------------------------------------------------------------------------------


def every_kernel_sketch() -> Sketch:
    s = attention_sketch((0, 33))
    for quant in (*QUANTIZED, *FLOAT):
        x = s.input(768)
        for n_out in (5, 40):
            s.emit(quant, Matmul(x, s.tensor(quant, (n_out, 768)), s.buffer(n_out), s.tensor("F32", (n_out,))))
        s.emit(quant, Embed(s.tensor(quant, (N_VOCAB, 256)), s.buffer(256)))
    for kernel in ("rms_norm", "rope", "gated_silu", "gated_gelu", "add"):
        trials.add_trial(s, kernel)
    return s


def outputs_in_chunks(s: Sketch, program: Program, form: str, n_threads: int, chunk: int) -> list[np.ndarray]:
    """What every op wrote for 40 tokens from position 580 on, given in chunks."""
    executor = cpu_executor(program, N_BLOCKS, n_threads, 40, form)
    fill_randomly(executor.pool)
    batch = single_sequence(program, 40, 580, N_BLOCKS, seed=1)
    parts = [
        outputs_of_ops(executor, part(batch, start, min(start + chunk, 40)), s.inputs, start)
        for start in range(0, 40, chunk)
    ]
    executor.close()
    return [np.concatenate(arrays) for arrays in zip(*parts, strict=True)]


@pytest.mark.parametrize("form", FORMS)
def test_a_token_gets_the_same_bits_in_any_company_on_any_number_of_threads(form: str) -> None:
    """Alone (split over the cuts of a long context), in chunks, all at once; on 1, 2 and 3 threads."""
    s = every_kernel_sketch()
    program = s.program()
    expected = outputs_in_chunks(s, program, form, 1, 40)
    for n_threads, chunk in ((1, 1), (2, 1), (1, 7), (3, 7), (2, 10), (2, 40), (3, 40)):
        found = outputs_in_chunks(s, program, form, n_threads, chunk)
        for shape, one, other in zip(s.shapes, found, expected, strict=True):
            assert np.array_equal(one.view(np.uint32), other.view(np.uint32)), (shape, n_threads, chunk)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("quant", ["Q4_K", "Q8_0"])
def test_a_token_gets_the_same_bits_among_more_than_a_second_level_holds(quant: str, form: str) -> None:
    """Activations of 806 KB go through several panels at once; the last rows are no whole panel, nor are the tokens."""
    s = sketch(6, max_tokens=601)
    x, bias = s.input(512), s.tensor("F32", (213,))
    s.emit("", Matmul(x, s.tensor(quant, (213, 512)), s.buffer(213), bias))
    program = s.program()
    executor = cpu_executor(program, 0, 2, 601, form)
    many = outputs_of_ops(executor, single_sequence(program, 601), s.inputs)[-1]
    for first, n in ((0, 1), (0, 10), (300, 7), (594, 7)):
        few = outputs_of_ops(executor, single_sequence(program, n), s.inputs, first)[-1]
        assert np.array_equal(few.view(np.uint32), many[first : first + n].view(np.uint32)), (first, n)
    executor.close()


@pytest.mark.skipif("avx512_vnni" not in FORMS, reason="this CPU has no AVX-512 VNNI")
def test_forms_with_a_fused_multiply_add_give_the_same_bits() -> None:
    s = every_kernel_sketch()
    program = s.program()
    forms = [form for form in ("avx512_vnni", "avx_vnni", "avx2") if form in FORMS]
    one, *others = (outputs_in_chunks(s, program, form, 2, 7) for form in forms)
    for other in others:
        assert all(np.array_equal(a.view(np.uint32), b.view(np.uint32)) for a, b in zip(one, other, strict=True))


# ---- numbers that are none -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("quant", (*QUANTIZED, *FLOAT))
def test_nan_and_infinity_in_weights_and_activations_reach_the_output(quant: str, value: float, form: str) -> None:
    s = sketch(8)
    good, bad_x = s.input(512), s.input(512)
    s.inputs[bad_x][:, 300] = value
    weight, bad_weight = s.tensor(quant, (20, 512)), s.tensor(quant, (20, 512))
    tensor = s.tensors[bad_weight]
    blocks = tensor.data.reshape(20, -1).view(tensor.quant.layout)
    for name in ("d", "m", "dmin"):
        if blocks.dtype.names and name in blocks.dtype.names:
            blocks[name][11, -1] = value
    if quant == "BF16":
        blocks[11, -1] = np.array([value], np.float32).view(np.uint32)[0] >> 16
    elif quant in FLOAT:
        blocks[11, -1] = value
    s.emit("bad x", Matmul(bad_x, weight, s.buffer(20)))
    s.emit("bad weight", Matmul(good, bad_weight, s.buffer(20)))
    s.emit("bad embedding", Embed(bad_weight, s.buffer(512)))
    s.tensors[bad_weight] = tensor
    program = s.program()
    executor = cpu_executor(program, 0, 2, 64, form)
    for n in (1, 2, 5):
        batch = single_sequence(program, n, max_id=20)
        batch.tokens[:] = 11
        _, with_bad_x, with_bad_weight, embedded = outputs_of_ops(executor, batch, s.inputs)
        assert not np.isfinite(with_bad_x).any()
        assert np.isfinite(with_bad_weight[:, :11]).all() and np.isfinite(with_bad_weight[:, 12:]).all()
        if quant != "MXFP4":  # its scale is a power of two and always finite
            assert not np.isfinite(with_bad_weight[:, 11]).any()
            assert not np.isfinite(embedded).all(axis=1).any()
    executor.close()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_pass_through_the_small_kernels(value: float, form: str) -> None:
    s = sketch(9)
    for kernel in ("rms_norm", "rope", "gated_silu", "gated_gelu", "add"):
        trials.add_trial(s, kernel)
    for values in s.inputs.values():
        values[:, 0] = value
    program = s.program()
    executor = cpu_executor(program, 0, 2, 64, form)
    for shape, values in zip(
        s.shapes[1:], outputs_of_ops(executor, single_sequence(program, 3), s.inputs)[1:], strict=True
    ):
        assert not np.isfinite(values).all(axis=1).any(), shape
    executor.close()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("where", ["q", "k", "v", "all k"])
def test_nan_in_queries_keys_and_values_reaches_the_output(where: str, form: str) -> None:
    s = attention_sketch((0, 100))
    program = s.program()
    executor = cpu_executor(program, N_BLOCKS, 2, 64, form)
    pool = executor.pool
    fill_randomly(pool)
    for array in [arrays["k" not in where] for arrays in pool.arrays] if "k" in where or where == "v" else []:
        array[:, :, 3, :] = np.nan  # dimension 3 of every key, or every value at slot 3 of a block
    if where == "k":
        for array, _ in pool.arrays:
            array[:, :, :, :3] = array[:, :, :, 4:] = 1
    if where == "q":
        for values in s.inputs.values():
            values[:, ::5] = np.nan
    for n, start in ((1, 40), (1, 600), (20, 40), (40, 280)):
        for values in outputs_of_ops(executor, single_sequence(program, n, start, N_BLOCKS), s.inputs)[1:]:
            assert not np.isfinite(values).all(axis=1).any(), (n, start)
    executor.close()


# ---- columns of a buffer ---------------------------------------------------------------------------------------------


def program_of_parts(quant: str) -> Program:
    """Products that read and write columns of one buffer, and all of it, before and after they change."""
    s = sketch()
    s.buffers["whole"] = Buffer("whole", 1024)
    for name, first, width in (("left", 0, 512), ("right", 512, 256), ("rest", 768, 256)):
        s.buffers[name] = Buffer(name, width, of="whole", first=first)
    x, y, z = s.buffer(256), s.buffer(256), s.buffer(trials.N_VOCAB)
    s.ropes["rope"] = Rope(False, frequencies(64, 10000.0), 1.0)
    for op in (
        Embed(s.tensor("Q8_0", (trials.N_VOCAB, 1024)), "whole", 30.0),
        Matmul("right", s.tensor(quant, (256, 256)), x),
        Matmul("left", s.tensor(quant, (256, 512)), "right"),
        Matmul("right", s.tensor(quant, (256, 256)), "rest"),
        ApplyRope("rest", 64, "rope"),
        Matmul("whole", s.tensor(quant, (256, 1024)), y),
        RMSNorm("right", s.tensor("F32", (64,)), "rest", 1e-5),
        Add("whole", "whole", "whole"),
        GatedUnit("rest", y, "right", "silu"),
        Add("right", x, y),
        Matmul("whole", s.tensor(quant, (trials.N_VOCAB, 1024)), z),
        SelectOutputs(z, "logits"),
    ):
        s.emit(op.name, op)
    return s.program()


@pytest.mark.parametrize("quant", ["F16", "Q8_0", "Q4_K"])
def test_an_operand_may_be_columns_of_a_buffer(quant: str) -> None:
    program = program_of_parts(quant)
    reference = ReferenceExecutor(program, 1, kv_dtype="float16")
    executor = cpu_executor(program, 1, 3, 64)
    for n in (1, 5, 20):
        batch = Batch.single(program, np.arange(n) % trials.N_VOCAB)
        for one, other in zip(outputs_of_ops(executor, batch, {}), outputs_of_ops(reference, batch, {}), strict=True):
            assert nmse(one, other) < trials.SUPERBLOCK_LIMIT
        expected = reference.run(batch)
        for _ in range(20):
            assert nmse(executor.run(batch), expected) < trials.SUPERBLOCK_LIMIT
    executor.close()


@pytest.mark.parametrize(("first", "width"), [(8, 16), (0, 40), (1008, 32)])
def test_columns_that_vectors_cannot_keep_to_are_refused_by_name(first: int, width: int) -> None:
    program = program_of_parts("F16")
    program.buffers["odd"] = Buffer("odd", width, of="whole", first=first)
    with pytest.raises(UnsupportedError, match="buffer odd: columns"):
        cpu_executor(program, 1)
