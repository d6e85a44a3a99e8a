"""The CPU executor: numba-written kernels in a table, walked by a team of threads."""

from edgellm.kernels.cpu.run.executor import CPUExecutor

__all__ = ["CPUExecutor"]
