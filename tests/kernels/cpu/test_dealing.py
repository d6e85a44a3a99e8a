"""How the rows of a product are dealt out: which go together, and that who is slow keeps nobody waiting for more."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from cpu_programs import FORMS, kernel_cache

from edgellm.kernels.cpu.compile import isa
from edgellm.kernels.cpu.compile.jit import KERNEL, CodeMemory
from edgellm.kernels.cpu.compile.kernel_cache import KernelCache
from edgellm.kernels.cpu.lib import layout
from edgellm.kernels.cpu.run.threads import aligned_zeros

N_OUT, N_IN, ROW_NBYTES = 4096, 256, 144  # one block of Q4_K a row
MOST_OWN = 256  # rows of a part (CHUNK_ROWS in quantized_matmul.py)


class Product:
    """A product of one token with its op row; a row of ``out`` is NaN until somebody has made it."""

    def __init__(self, n_out: int = N_OUT, cache: KernelCache | None = None) -> None:
        rng = np.random.default_rng(1)
        self._code, objects = CodeMemory(), (cache or kernel_cache(FORMS[0])).objects(["matmul_q4_k"])
        self._kernel = KERNEL(self._code.load("matmul_q4_k", objects["matmul_q4_k"]))
        self._w = rng.integers(0, 128, (n_out, ROW_NBYTES), np.uint8)
        self._w[:, :4] = np.array([0.01, 0.02], np.float16).view(np.uint8)
        x_row = layout.activation_row_nbytes(N_IN)
        self._x = aligned_zeros(x_row)
        self._x[: 2 * N_IN] = rng.integers(-900, 900, N_IN).astype(np.int16).view(np.uint8)
        self._x[2 * N_IN : 2 * N_IN + 32] = np.full(8, 0.5, np.float32).view(np.uint8)
        self.out = aligned_zeros(4 * n_out).view(np.float32)
        self._scratch = aligned_zeros(4 * layout.matmul_scratch_nbytes(1, N_IN))
        self._step = np.zeros(layout.STEP_FIELDS, np.int64)
        self._op = np.zeros(layout.OP_FIELDS, np.int64)
        self._step[layout.N_TOKENS // 8] = 1
        self._step[layout.SCRATCH // 8] = self._scratch.ctypes.data
        self._step[layout.SCRATCH_NBYTES // 8] = layout.matmul_scratch_nbytes(1, N_IN)
        addresses = {"x": self._x.ctypes.data, "w": self._w.ctypes.data, "out": self.out.ctypes.data}
        arguments = layout.MATMUL(
            **addresses, x_row=x_row, w_row=ROW_NBYTES, n_out=n_out, n_in=N_IN, out_row=self.out.nbytes, bias=0,
            row_kind=layout.N_TOKENS, following=0,
        )  # fmt: skip
        first = layout.ARGUMENTS // 8
        self._op[first : first + len(arguments)] = arguments

    def run(self, threads: list[int], n_threads: int) -> list[int]:
        """Each of these threads' part, one after the other; how many rows were left after each."""
        self.out[:] = np.nan
        self._op[layout.COUNTER // 8] = 0
        left = []
        for thread in threads:
            self._kernel(self._op.ctypes.data, self._step.ctypes.data, thread, n_threads)
            left.append(int(np.isnan(self.out).sum()))
        return left


@pytest.mark.parametrize("n_threads", [2, 3, 4])
def test_whoever_comes_first_leaves_the_others_one_part_each(n_threads: int) -> None:
    product = Product()
    assert product.run([0], 1) == [0]
    whole = product.out.copy()
    for first in range(n_threads):
        late = [thread for thread in range(n_threads) if thread != first]
        left = product.run([first, *late], n_threads)
        assert left[0] <= MOST_OWN * len(late)
        assert left == sorted(left, reverse=True)
        assert left[-1] == 0
        assert product.out.tobytes() == whole.tobytes(), "who does what changes no bit"


def rows_apart(apart: bool) -> KernelCache:
    """The AVX-512 form whose rows that go together are far apart, or neighbours."""
    form = isa.detect("avx512_vnni")
    found, wanted = (isa._constant("rows_apart", value) for value in (not apart, apart))
    return KernelCache(dataclasses.replace(form, primitives=form.primitives.replace(found, wanted)), None)


@pytest.mark.skipif("avx512_vnni" not in FORMS, reason="the form with rows apart is that of AVX-512")
def test_rows_that_go_together_may_be_apart() -> None:
    """Parts that are whole eights and parts that are not, in one part and in many."""
    caches = [rows_apart(apart) for apart in (False, True)]
    for n_out in (8, 64, 100, 520, 4096):
        near, apart = (Product(n_out, cache) for cache in caches)
        assert near.run([0], 1) == [0]
        for n_threads in (1, 2, 3):
            assert apart.run([*range(n_threads)], n_threads)[-1] == 0
            assert apart.out.tobytes() == near.out.tobytes()
