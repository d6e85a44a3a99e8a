"""AWQ: make the columns that matter larger before they are rounded, and their inputs smaller by as much.

With x the inputs of W, (W s) (x / s) = W x for any positive s (n_in,); rounding hurts a column less the larger it
stands in its block. As in Lin et al. (https://arxiv.org/abs/2306.00978) s is a power of the activations' size, the
power found by trying. What divides x is folded into what makes x: the weight of the norm before, the rows of ffn_up
before ffn_down, the rows of attn_v before attn_output. The file stays a plain model of its architecture.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from edgellm.formats.quant_types import QUANT_TYPES
from edgellm.kernels.ops import Attention, GatedUnit, Matmul, RMSNorm, StoreKV
from edgellm.kernels.program import Program
from edgellm.quantize.gptq import Encode
from edgellm.quantize.hessian import Group, groups

POWERS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.75)  # of the root mean square of an input
SAMPLE_ROWS = 512  # of each weight, to try the powers on
LARGEST = 16.0  # how far s may go from 1 either way: scales of blocks are float16


@dataclass(frozen=True)
class Scaling:
    """W becomes rows[:, None] * W * columns[None, :], float32; a norm's weight has columns alone. None is 1."""

    rows: np.ndarray | None = None
    columns: np.ndarray | None = None

    def apply(self, weights: np.ndarray, start: int = 0) -> np.ndarray:
        """Rows from ``start`` on of a weight (n, n_in), or a norm's weight, scaled."""
        if self.rows is not None:
            weights = weights * self.rows[start : start + len(weights), None]
        return weights if self.columns is None else weights * self.columns

    def undo(self, weights: np.ndarray) -> np.ndarray:
        """A whole scaled weight as it was."""
        if self.rows is not None:
            weights = weights / self.rows[:, None]
        return weights if self.columns is None else weights / self.columns


@dataclass(frozen=True)
class Fold:
    """Weights that read one buffer, and the tensor that takes up the inverse: a norm, or rows of a matrix.

    copies   input columns that share a row of ``target``: query heads of one v head; columns stand head by head
    """

    group: Group
    target: str
    into_rows: bool
    head_dim: int = 1
    copies: int = 1


def folds(program: Program) -> list[Fold]:
    """Every group whose input can be made smaller by what comes before it."""
    uses = Counter(name for op in program.ops for name in op.weight_names())
    found = []
    for group in groups(program):
        fold = _fold(program, group)
        names = (*group.weights, fold.target) if fold else ()
        if fold and all(uses[name] == 1 for name in names):
            found.append(fold)
    return found


def _fold(program: Program, group: Group) -> Fold | None:
    ops, maker = program.ops, last_writer(program, group.x, group.start)
    if maker is None or not set(readers(program, group.x, maker)) <= set(range(group.start, group.stop)):
        return None
    op = ops[maker]
    if isinstance(op, RMSNorm) and program.tensors[op.weight].shape[-1] == program.buffers[group.x].width:
        return Fold(group, op.weight, into_rows=False)
    if isinstance(op, GatedUnit):
        up = _plain_matmul(program, op.up, maker)
        return Fold(group, up, into_rows=True) if up else None
    if isinstance(op, Attention):
        of_layer = [i for i, o in enumerate(ops) if op.layer in (*o.read_layers(), *o.written_layers())]
        store = ops[of_layer[0]]
        if not isinstance(store, StoreKV) or store.v is None or len(of_layer) != 2:
            return None
        v = _plain_matmul(program, store.v, of_layer[0])
        layer = program.kv_layer(op.layer)
        copies = op.n_heads // layer.n_kv_heads
        return Fold(group, v, into_rows=True, head_dim=layer.head_dim_v, copies=copies) if v else None
    return None


def last_writer(program: Program, buffer: str, before: int) -> int | None:
    """The index of the last op before another one that writes to a buffer; None when it writes other columns, too."""
    for index in range(before - 1, -1, -1):
        written = program.ops[index].written_buffers()
        if program.root(buffer) in map(program.root, written):
            return index if buffer in written else None
    return None


def readers(program: Program, buffer: str, maker: int) -> list[int]:
    """The indices of the ops that read what ``maker`` wrote to a buffer, once for each time that they name it."""
    found: list[int] = []
    for index, op in enumerate(program.ops[maker + 1 :], maker + 1):
        found += [index] * [program.root(name) for name in op.read_buffers()].count(program.root(buffer))
        if {buffer, program.root(buffer)} & set(op.written_buffers()):
            break
    return found


def _plain_matmul(program: Program, buffer: str, reader: int) -> str | None:
    """The weight that makes what ``reader`` alone reads in a buffer, and once, when no bias is added."""
    maker = last_writer(program, buffer, reader)
    op = None if maker is None else program.ops[maker]
    if maker is None or not isinstance(op, Matmul) or op.bias is not None:
        return None
    return op.weight if readers(program, buffer, maker) == [reader] else None


def search(weights: Sequence[tuple[np.ndarray, str]], importance: np.ndarray, fold: Fold, encode: Encode) -> np.ndarray:
    """s (n_in,) float32 for weights (n_out, n_in) of the types named, by the weighted error of their rounding."""
    size = np.sqrt(np.maximum(_shared(importance, fold), 1e-12))
    samples = [(w[:: max(1, len(w) // SAMPLE_ROWS)], quant) for w, quant in weights]
    best, least = np.ones(len(importance), np.float32), np.inf
    for power in POWERS:
        s = size**power
        s = np.clip(s / np.exp(np.log(s).mean()), 1 / LARGEST, LARGEST).astype(np.float32)
        error = 0.0
        for w, quant in samples:
            rounded = QUANT_TYPES[quant].dequantize(encode(quant, w * s, (importance / s**2).astype(np.float32)))
            error += float((np.square(rounded / s - w) @ importance).sum(dtype=np.float64))
        if error < least:
            best, least = s, error
    return best


def _shared(values: np.ndarray, fold: Fold) -> np.ndarray:
    """The mean over the columns that must have one s, in the place of each."""
    if fold.copies == 1:
        return values
    heads = values.reshape(-1, fold.copies, fold.head_dim)
    return np.broadcast_to(heads.mean(axis=1, keepdims=True), heads.shape).reshape(-1)


def scalings(
    program: Program,
    types: Mapping[str, str],
    importance: Mapping[str, np.ndarray],
    weight_of: Callable[[str], np.ndarray],
    encode: Encode,
) -> dict[str, Scaling]:
    """What every tensor is multiplied by: columns of the weights that read, and the inverse where it is folded in."""
    rows: dict[str, np.ndarray] = {}
    columns: dict[str, np.ndarray] = {}
    for fold in folds(program):
        names = fold.group.weights
        rounded = [name for name in names if name in types and QUANT_TYPES[types[name]].block_size > 1]
        kept = [name for name in (*names, *([fold.target] if fold.into_rows else [])) if name not in types]
        if not rounded or kept or names[0] not in importance:
            continue  # what stays as it is stored cannot be scaled
        s = search([(weight_of(name), types[name]) for name in rounded], importance[names[0]], fold, encode)
        columns |= dict.fromkeys(names, s)
        if fold.into_rows:
            heads = s.reshape(-1, fold.copies, fold.head_dim)
            rows[fold.target] = (1 / heads[:, 0].reshape(-1)).astype(np.float32)
        else:
            columns[fold.target] = (1 / s).astype(np.float32)
    return {name: Scaling(rows.get(name), columns.get(name)) for name in {*rows, *columns}}
