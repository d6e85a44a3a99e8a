"""Float weights of encoders as their kernel reads them (kernels/float_panels.py): turned once, when a model is loaded.

The copy is as large as the weights in the file, whose own pages are not needed any more.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from edgellm.formats.gguf import QuantizedTensor
from edgellm.kernels.cpu.lib import layout
from edgellm.kernels.cpu.run.threads import aligned_zeros


def put_panels(low: Any, name: str) -> tuple[str, int, int]:
    """Kernel suffix and address of a weight that is turned; and 0, for it has no rows. ``low`` is the lowering."""
    if name not in low.matrices:
        tensor = low.program.tensors[name]
        n_panels = -(-math.prod(tensor.shape[:-1]) // layout.TEXT_PANEL_ROWS)
        nbytes = n_panels * layout.TEXT_PANEL_ROWS * tensor.quant.row_nbytes(tensor.shape[-1])
        low.matrices[name] = (tensor.quant.name, low.memory.take(nbytes, lambda: panels(tensor)).ctypes.data, 0)
    found: tuple[str, int, int] = low.matrices[name]
    return found


def panels(tensor: QuantizedTensor) -> np.ndarray:
    """The numbers of a matrix (n_rows, n_in) as (panels, n_in, 64 rows), bit by bit, with zeros behind the last row."""
    n_rows, n_in, n = math.prod(tensor.shape[:-1]), tensor.shape[-1], layout.TEXT_PANEL_ROWS
    row_nbytes = tensor.quant.row_nbytes(n_in)
    numbers = tensor.stored(0, n_rows).view(f"u{row_nbytes // n_in}")
    found = aligned_zeros(-(-n_rows // n) * n * row_nbytes).view(numbers.dtype).reshape(-1, n_in, n)
    for i, panel in enumerate(found):
        rows = numbers[i * n : (i + 1) * n]
        panel[:, : len(rows)] = rows.T
    return found
