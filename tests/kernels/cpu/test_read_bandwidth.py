"""The yardstick of decoding; that its kernel reads every byte is part of the self-test."""

from __future__ import annotations

from edgellm.kernels.cpu.run.read_bandwidth import read_bandwidth


def test_bandwidth_is_measured_in_bytes_per_second() -> None:
    assert read_bandwidth(2, nbytes=1 << 20, passes=2) > 1e6
