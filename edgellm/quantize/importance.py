"""The importance of the inputs of every weight: mean squares over a calibration text, in llama.cpp's files.

A matmul out = x W^T hurts where x is large: the quantizers weigh the error of column j by the mean of x_j^2. An
``Imatrix`` keeps the sums of squares and how many rows were summed. Two forms of file hold it:

    GGUF   tensors NAME.in_sum2 (n_matrices, n_in) and NAME.counts (n_matrices, 1), F32; general.type "imatrix",
           imatrix.datasets, imatrix.chunk_count, imatrix.chunk_size
    .dat   n i32, then n times: length i32 | name | calls i32 | n_values i32 | f32 values (mean squares * calls);
           at the end the chunks i32 and the data set, length i32 | name
"""

from __future__ import annotations

import functools
import math
import re
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from edgellm.formats.errors import FormatError, NumericError, ParameterError
from edgellm.formats.gguf import GGUFFile
from edgellm.formats.gguf_header import TypedMetadata
from edgellm.formats.gguf_writer import TensorPlan, write_gguf
from edgellm.formats.quant_types import QUANT_TYPES
from edgellm.formats.regular_file import open_regular
from edgellm.kernels.ops import ExpertMatmul, HeadMatmul, Matmul, Op
from edgellm.kernels.program import Program
from edgellm.machine.atomic import whole_file
from edgellm.measure.perplexity import Chunk, ChunkModel

SUMS, COUNTS = ".in_sum2", ".counts"
MAX_NAME = 1024  # bytes of a tensor's name in a .dat file
MAX_COUNT = (1 << 31) - 1  # a .dat file has 32 bits for it
MAX_TOLD = 12  # layers with experts that were not met
DAT_CHUNK = 512  # rows of a call, where a .dat file does not say


@dataclass(frozen=True)
class InputSquares:
    """Of one weight: ``sums`` (n_matrices, n_in) of squared inputs, ``counts`` (n_matrices,) rows summed; float32.

    A matrix more than one is an expert's.
    """

    sums: np.ndarray
    counts: np.ndarray

    @property
    def mean(self) -> np.ndarray:
        """(n_matrices * n_in,) mean squares; 1 for an expert that no token reached."""
        counts = self.counts[:, None]
        return np.where(counts > 0, self.sums / np.maximum(counts, 1), 1).astype(np.float32).reshape(-1)

    @property
    def unmet(self) -> list[int]:
        """The experts that no token reached, where there are several."""
        return np.flatnonzero(self.counts == 0).tolist() if len(self.counts) > 1 else []

    def __add__(self, other: InputSquares) -> InputSquares:
        return InputSquares(self.sums + other.sums, self.counts + other.counts)


@dataclass
class Imatrix:
    """What a file holds: tensor name -> ``InputSquares``, and where it came from."""

    squares: dict[str, InputSquares] = field(default_factory=dict)
    datasets: list[str] = field(default_factory=list)
    chunk_size: int = 512

    @property
    def n_chunks(self) -> int:
        """Chunks of ``chunk_size`` rows in the largest sum."""
        rows = max((float(s.counts.max()) for s in self.squares.values()), default=0.0)
        return int(rows // self.chunk_size)

    @property
    def means(self) -> dict[str, np.ndarray]:
        """What a quantizer weighs columns with: tensor name -> float32 (n_matrices * n_in,)."""
        return {name: squares.mean for name, squares in self.squares.items()}

    @property
    def unmet(self) -> dict[str, list[int]]:
        """Tensor name -> its experts that the text never met; a .dat file does not know them."""
        return {name: squares.unmet for name, squares in self.squares.items() if squares.unmet}

    def merge(self, other: Imatrix) -> None:
        """Add the sums of another one of the same model."""
        for name, squares in other.squares.items():
            known = self.squares.get(name)
            if known is not None and known.sums.shape != squares.sums.shape:
                raise ParameterError(
                    f"{name}: sums of the shape {squares.sums.shape} cannot be added to {known.sums.shape}. "
                    "Merge files of one model only."
                )
            self.squares[name] = squares if known is None else known + squares
        self.datasets += [name for name in other.datasets if name not in self.datasets]


# ---- collecting ------------------------------------------------------------------------------------------------------


class Collector:
    """Adds up squares of inputs chunk by chunk; weights that read the same buffer share the sum.

    outputs   count the input of the output matrix too, which llama.cpp leaves out by default
    """

    def __init__(self, program: Program, outputs: bool = False) -> None:
        self.program, self.outputs = program, outputs
        self.sums: dict[str, np.ndarray] = {}
        self.counts: dict[str, np.ndarray] = {}
        self._shared: dict[str, np.ndarray] = {}  # of buffers not written since

    def hook(self, index: int, op: Op, read: Callable[[str], np.ndarray]) -> None:
        """See ``edgellm.kernels.program.Hook``."""
        if isinstance(op, Matmul) and (self.outputs or op.out != self.program.output):
            x = read(op.x)
            if op.x not in self._shared:
                self._shared[op.x] = np.einsum("ij,ij->j", x, x, dtype=np.float64)
            self._add(op.weight, self._shared[op.x][None], np.array([len(x)]))
        elif isinstance(op, ExpertMatmul):
            n_expert, _, n_in = self.program.tensors[op.weight].shape
            ids, x = read(op.ids), read(op.x).reshape(len(read(op.ids)), -1, n_in)
            sums = np.zeros((n_expert, n_in))
            for expert in np.unique(ids):
                token, slot = np.nonzero(ids == expert)
                rows = x[token, slot % x.shape[1]]
                sums[expert] = np.einsum("ij,ij->j", rows, rows, dtype=np.float64)
            self._add(op.weight, sums, np.bincount(ids.reshape(-1), minlength=n_expert))
        elif isinstance(op, HeadMatmul) and op.rows is None:
            x = read(op.x).reshape(len(read(op.x)), op.n_heads, -1)
            self._add(op.weight, np.einsum("ijk,ijk->jk", x, x, dtype=np.float64), np.full(op.n_heads, len(x)))
        written = set(map(self.program.root, op.written_buffers()))
        self._shared = {name: x for name, x in self._shared.items() if self.program.root(name) not in written}

    def _add(self, weight: str, sums: np.ndarray, counts: np.ndarray) -> None:
        """Go on with the sums (n_matrices, n_in) and the rows (n_matrices,) of a weight."""
        self.sums[weight] = self.sums.get(weight, 0) + sums
        self.counts[weight] = self.counts.get(weight, 0) + counts

    def result(self, dataset: str, chunk_size: int) -> Imatrix:
        """All that was seen. NumericError when it is not finite."""
        squares = {}
        for name, sums in self.sums.items():
            if not np.isfinite(sums).all():
                raise NumericError(
                    f"The inputs of {name} are not finite numbers. Check the model with `edgellm verify`."
                )
            squares[name] = InputSquares(sums.astype(np.float32), self.counts[name].astype(np.float32))
        return Imatrix(squares, [dataset], chunk_size)


def collect(model: ChunkModel, chunks: Sequence[Chunk], dataset: str, outputs: bool = False) -> Iterator[Imatrix]:
    """Run the chunks; what has been seen so far, after each."""
    collector = Collector(model.program, outputs)
    for chunk in chunks:
        model.watch(chunk, collector.hook, outputs)
        yield collector.result(dataset, model.n_ctx)


def unmet_text(unmet: Mapping[str, Sequence[int]]) -> str:
    """``blk.3: 5, 7; blk.4: 1``: by layer, whose matrices are asked together."""
    layers: dict[str, set[int]] = {}
    for name, experts in unmet.items():
        layer = re.match(r"blk\.\d+", name)
        layers.setdefault(layer[0] if layer else name, set()).update(experts)
    told = [f"{layer}: {', '.join(map(str, sorted(layers[layer])))}" for layer in list(layers)[:MAX_TOLD]]
    more = f"; and in {len(layers) - MAX_TOLD} more layers" if len(layers) > MAX_TOLD else ""
    return "; ".join(told) + more


# ---- files -----------------------------------------------------------------------------------------------------------


def write_imatrix(path: Path, imatrix: Imatrix, form: str = "gguf") -> None:
    """Write one of the two forms, whole or not at all."""
    if form == "gguf":
        _write_gguf(path, imatrix)
        return
    with whole_file(path) as file:
        file.write(dat_bytes(imatrix))


def _write_gguf(path: Path, imatrix: Imatrix) -> None:
    metadata: TypedMetadata = {
        "general.type": ("imatrix", "STRING"),
        "imatrix.datasets": (list(imatrix.datasets), "ARRAY[STRING]"),
        "imatrix.chunk_count": (imatrix.n_chunks, "UINT32"),
        "imatrix.chunk_size": (imatrix.chunk_size, "UINT32"),
    }
    plans = []
    for name, squares in sorted(imatrix.squares.items()):
        for suffix, array in ((SUMS, squares.sums), (COUNTS, squares.counts[:, None])):
            data = np.ascontiguousarray(array, "<f4")
            chunks: Callable[[], list[np.ndarray]] = functools.partial(list, (data.reshape(-1),))
            plans.append(TensorPlan(f"{name}{suffix}", data.shape, QUANT_TYPES["F32"], chunks))
    write_gguf(path, metadata, plans)


def dat_bytes(imatrix: Imatrix) -> bytes:
    """The older form, which keeps means and loses the counts of single experts."""
    parts = [struct.pack("<i", len(imatrix.squares))]
    for name, squares in sorted(imatrix.squares.items()):
        calls = math.ceil(float(squares.counts.max()) / imatrix.chunk_size)
        values = squares.mean * np.float32(calls)
        raw = name.encode()
        parts += [struct.pack("<i", len(raw)), raw, struct.pack("<ii", calls, len(values)), values.tobytes()]
    dataset = (imatrix.datasets[-1] if imatrix.datasets else "").encode()
    parts += [struct.pack("<ii", imatrix.n_chunks, len(dataset)), dataset]
    return b"".join(parts)


def read_imatrix(path: Path) -> Imatrix:
    """A file of either form. FormatError when it is neither, or not whole."""
    with open_regular(path) as file:
        if file.read(4) != b"GGUF":
            file.seek(0)
            return _read_dat(path, file.read())
    return _read_gguf(path)


def _error(path: Path, found: str, expected: str) -> FormatError:
    return FormatError(
        f"{path.name} {found}; expected {expected}. Make it again with `edgellm imatrix`.", code="IMATRIX_FILE"
    )


def _read_gguf(path: Path) -> Imatrix:
    with GGUFFile.open(path) as gguf:
        kind = gguf.get("general.type", str, "")
        if kind != "imatrix":
            raise _error(path, f"is of the type {kind or 'model'!r}", "a file of llama-imatrix or `edgellm imatrix`")
        squares = {}
        for tensor_name, tensor in gguf.tensors.items():
            name = tensor_name.removesuffix(SUMS)
            if name == tensor_name:
                continue
            if f"{name}{COUNTS}" not in gguf.tensors:
                raise _error(path, f"has no {name}{COUNTS}", "a count beside every sum")
            sums = tensor.dequantize().copy()
            counts = gguf.tensors[f"{name}{COUNTS}"].dequantize().reshape(-1).copy()
            squares[name] = _checked(path, name, sums.reshape(-1, tensor.shape[-1]), counts)
        datasets = list(gguf.get("imatrix.datasets", list, []))
        chunk_size = gguf.get("imatrix.chunk_size", int, 512)
        if chunk_size > MAX_COUNT:
            raise _error(path, f"has chunks of {chunk_size} rows", f"up to {MAX_COUNT}")
    if not squares:
        raise _error(path, "has no sums", "at least one")
    return Imatrix(squares, datasets, max(1, chunk_size))


def _checked(path: Path, name: str, sums: np.ndarray, counts: np.ndarray) -> InputSquares:
    if len(sums) != len(counts):
        raise _error(path, f"has {len(counts)} counts for {len(sums)} sums of {name}", "one for each")
    if not (np.isfinite(sums).all() and np.isfinite(counts).all() and (sums >= 0).all() and (counts >= 0).all()):
        raise _error(path, f"has negative or infinite numbers for {name}", "sums of squares")
    if (counts > MAX_COUNT).any():
        raise _error(path, f"counts {counts.max():.3g} rows for {name}", f"up to {MAX_COUNT}")
    return InputSquares(sums, counts)


def _read_dat(path: Path, data: bytes) -> Imatrix:
    at = 0

    def take(nbytes: int, what: str) -> bytes:
        nonlocal at
        if nbytes < 0 or at + nbytes > len(data):
            raise _error(path, f"ends in {what} at byte {at}", f"{nbytes} more bytes")
        at += nbytes
        return data[at - nbytes : at]

    def number(what: str, most: int) -> int:
        value: int = struct.unpack("<i", take(4, what))[0]
        if not 0 <= value <= most:
            raise _error(path, f"has {value} as {what}", f"a number from 0 to {most}")
        return value

    squares = {}
    for _ in range(number("the number of tensors", len(data) // 12)):
        name = take(number("the length of a name", MAX_NAME), "a name").decode("utf-8", "replace")
        calls = number("the number of calls", 1 << 30)
        values = np.frombuffer(take(4 * number("the number of values", len(data) // 4), "values"), "<f4")
        mean = values / max(1, calls)
        rows = float(max(1, calls) * DAT_CHUNK)
        squares[name] = _checked(path, name, (mean * np.float32(rows))[None], np.array([rows], np.float32))
    if not squares:
        raise _error(path, "has no sums", "at least one")
    datasets = []
    if at < len(data):
        take(4, "the number of chunks")
        datasets = [take(number("the length of a name", len(data)), "a name").decode("utf-8", "replace")]
    return Imatrix(squares, datasets, DAT_CHUNK)


# ---- statistics ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Statistics:
    """Of the mean squares of one weight's inputs, as llama-imatrix --show-statistics names them.

    active    share of inputs that are ever more than 1e-5;  entropy   bits, of the shares of the sum
    zd        share of inputs more than one sigma above the mean (Layer-wise Quantization, arXiv 2406.17415)
    cosine    with the same weight of the layer before; NaN for the first
    """

    name: str
    total: float
    least: float
    most: float
    mean: float
    sigma: float
    active: float
    n: int
    entropy: float
    zd: float
    cosine: float

    @property
    def normal_entropy(self) -> float:
        """Entropy as a share of what equal inputs would have."""
        return self.entropy / math.log2(self.n) if self.n > 1 else 0.0


def statistics(imatrix: Imatrix) -> list[Statistics]:
    """One row for each weight, the largest sum first."""
    means = {name: squares.mean.astype(np.float64) for name, squares in imatrix.squares.items()}
    rows = []
    for name, values in means.items():
        shares = values[values > 0] / values.sum() if values.any() else np.zeros(0)
        sigma = float(values.std())
        above = (values - values.mean()) / sigma > 1 if sigma else np.zeros(len(values), bool)
        before = means.get(_layer_before(name))
        rows.append(
            Statistics(
                name,
                total=float(values.sum()),
                least=float(values.min()),
                most=float(values.max()),
                mean=float(values.mean()),
                sigma=sigma,
                active=float((values > 1e-5).mean()),
                n=len(values),
                entropy=float(-(shares * np.log2(shares)).sum()),
                zd=float(above.mean()),
                cosine=_cosine(values, before),
            )
        )
    return sorted(rows, key=lambda row: -row.total)


def _layer_before(name: str) -> str:
    return re.sub(r"^blk\.(\d+)\.", lambda found: f"blk.{int(found[1]) - 1}.", name) if name.startswith("blk.") else ""


def _cosine(values: np.ndarray, before: np.ndarray | None) -> float:
    if before is None or len(before) != len(values):
        return math.nan
    norm = float(np.linalg.norm(values) * np.linalg.norm(before))
    return float(values @ before) / norm if norm else math.nan
