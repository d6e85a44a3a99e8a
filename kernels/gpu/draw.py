"""Tokens drawn from the few logits that the device has found: the chain and the draw are the CPU's kernel.

The device draws, too, in float32 by the same numbers, to go on without the host (shaders/advance.wgsl). What it draws
counts where the kernel draws the same.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np

from edgellm.kernels.cpu.compile import jit, kernel_table
from edgellm.kernels.cpu.compile.verified_kernels import verified_kernels
from edgellm.kernels.cpu.lib import draw_layout
from edgellm.kernels.cpu.run.draw import CPUDraw
from edgellm.kernels.cpu.run.executor import CPUExecutor
from edgellm.kernels.draw import Drawn, DrawSpec
from edgellm.kernels.gpu.top_k import AHEAD, CHAIN_WORDS, MAX_K, MAX_LINKS, Found
from edgellm.machine.progress import Progress


def open_draw(on_compile: Progress | None = None) -> GPUDraw:
    """The ``Draw`` of a GPU executor, its kernel read or compiled."""
    names = [kernel_table.TOP_K]
    _, objects = verified_kernels(names, None, on_compile, cast(Any, CPUExecutor))
    code = jit.CodeMemory()
    return GPUDraw(code.load(names[0], objects[names[0]]), code)


class GPUDraw(CPUDraw):
    """The CPU's, but for the tokens that ``GPUExecutor.decode`` draws."""

    max_k = MAX_K
    bans = False  # its kernel sees values without their ids

    def open(self, spec: DrawSpec, rng: np.random.Generator) -> GPUTokenDraw:  # type: ignore[override]
        """See ``Draw``."""
        return GPUTokenDraw(self, spec, rng)


class GPUTokenDraw:
    """The ``TokenDraw`` of a GPU executor; ``k`` logits are reported of each token.

    goes_ahead   whether the device can draw by it
    """

    def __init__(self, draw: CPUDraw, spec: DrawSpec, rng: np.random.Generator) -> None:
        self.k = spec.k
        self.goes_ahead, self._spec = len(spec.links) <= MAX_LINKS, spec
        self._draw = CPUDraw.open(draw, spec, rng)
        self._rows: list[Drawn] = []

    def begin(self) -> None:
        """The next token is the first."""
        self._rows.clear()

    def chain(self) -> np.ndarray:
        """The chain and the next uniform numbers, as the device reads them, float32."""
        words, links = np.zeros(CHAIN_WORDS, np.float32), self._spec.links
        words[:2] = self._spec.n_candidates, len(links)
        words[3 : 3 + AHEAD] = self._draw.uniforms(AHEAD)
        numbers = [(draw_layout.LINKS_BY_NAME[link.name], link.amount, link.min_keep) for link in links]
        words[3 + AHEAD :][: 3 * len(links)] = np.ravel(numbers)
        return words

    def take(self, found: Found) -> int:
        """Draw a token from what the device has found, k logits or more."""
        found = found._replace(positions=found.positions[: self.k], values=found.values[: self.k])
        is_finite = self._draw.draw(found.values)
        assert is_finite, "the device says so"
        drawn, positions = self._draw.drawn(1)[0], found.positions.tolist()
        self._rows.append(drawn._replace(token=positions[drawn.place], positions=positions, sum=found.sum))
        return self._rows[-1].token

    def take_all(self, logits: np.ndarray) -> int:
        """Draw a token from all logits (n_vocab,); -1 where one of them is not finite."""
        if not self._draw.draw(logits):
            return -1
        self._rows.append(self._draw.drawn(1)[0])
        return self._rows[-1].token

    def draw(self, logits: np.ndarray) -> bool:
        """See ``TokenDraw``."""
        self.begin()
        return self.take_all(logits) >= 0

    def tokens(self, n: int) -> list[int]:
        """See ``TokenDraw``."""
        return [drawn.token for drawn in self._rows[:n]]

    def drawn(self, n: int) -> list[Drawn]:
        """See ``TokenDraw``."""
        return self._rows[:n]
