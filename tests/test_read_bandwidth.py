"""The yardstick of decoding: it reads what it says that it reads."""

from __future__ import annotations

import numpy as np
import pytest
from cpu_programs import FORMS, kernel_cache

from edgellm.kernels.cpu import jit
from edgellm.kernels.cpu.read_bandwidth import SIDE_BY_SIDE, read_bandwidth
from edgellm.kernels.cpu.stream import ROW_NBYTES, ROWS
from edgellm.kernels.cpu.threads import aligned_zeros


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("side_by_side", SIDE_BY_SIDE)
def test_every_byte_of_whole_strips_is_read_once(side_by_side: int, form: str) -> None:
    strip = ROWS * ROW_NBYTES
    memory = np.random.default_rng(0).integers(-(2**31), 2**31, (3 * strip + 640) // 4, dtype=np.int32)
    code, out = jit.CodeMemory(), aligned_zeros(64).view(np.int32)
    stream = jit.KERNEL(code.load("stream", kernel_cache(form).objects(["stream"])["stream"]))
    stream(memory.ctypes.data, memory.nbytes, side_by_side, out.ctypes.data)
    assert out.sum(dtype=np.int32) == memory[: 3 * strip // 4].sum(dtype=np.int32)


def test_bandwidth_is_measured_in_bytes_per_second() -> None:
    assert read_bandwidth(2, nbytes=1 << 20, passes=2) > 1e6
