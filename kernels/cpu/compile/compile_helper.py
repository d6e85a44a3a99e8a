"""A process of compile_crew.py: ``python -m edgellm.kernels.cpu.compile.compile_helper FORM FOLDER CLAIMS NAME...``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from edgellm.kernels.cpu.compile import isa
from edgellm.kernels.cpu.compile.compile_crew import claim
from edgellm.kernels.cpu.compile.kernel_cache import KernelCache


def compile_unclaimed(form: str, folder: Path, claims: Path, names: Sequence[str]) -> None:
    """Compile the kernels that nobody has taken into the cache, until none is left or the crew has gone."""
    cache = KernelCache(isa.detect(form), folder)
    for name in names:
        if not claims.is_dir():
            return
        if claim(claims, name):
            cache.objects([name])


if __name__ == "__main__":
    compile_unclaimed(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
