"""Quantize a model: a source, a recipe and perhaps an importance matrix become one GGUF file.

Tensors go through one after another, a few megabytes at a time: threads take runs of rows, decode, check and encode
them, and the writer gets the blocks in order. So the memory needed does not depend on the model, and a target is
there whole or not at all (formats/gguf_writer.py).
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from edgellm import arguments
from edgellm.formats.errors import NumericError, ParameterError, UnsupportedError
from edgellm.formats.file_types import QUANTIZATION_VERSION, WRITTEN
from edgellm.formats.gguf_header import TypedMetadata
from edgellm.formats.gguf_writer import TensorPlan, file_nbytes, write_gguf
from edgellm.formats.quant_types import QUANT_TYPES, QuantType
from edgellm.kernels.cpu.encode import RowEncoder, compile_encoders
from edgellm.machine.cores import default_threads
from edgellm.machine.progress import Progress
from edgellm.quantize.deviation import Deviation
from edgellm.quantize.input_model import InputModel, InputTensor
from edgellm.quantize.mixes import COPY, PlannedTensor, Recipe, plan

CHUNK_NBYTES = 4 << 20  # of float32 that a thread works on at a time
WITHOUT_IMPORTANCE = "Q3_K"  # in place of a type that needs an importance which a text did not show
SAFE_LARGEST = 60000.0  # nothing overflows in float16 below

Encoder = Callable[[InputTensor, QuantType], np.ndarray | None]
"""Blocks made elsewhere: uint8 (n_rows, row_nbytes) of a tensor in the type, or None to leave it to ``encode``."""


@dataclass(frozen=True)
class ImportanceMatrix:
    """How much each column of a matrix matters: tensor name -> float32 (n_matrices * n_in,), and where it came from.

    unmet   tensor name -> its experts of which the calibration text knows nothing: their columns weigh the same
    """

    columns: Mapping[str, np.ndarray]
    file: str = ""
    dataset: str = ""
    n_chunks: int = 0
    unmet: Mapping[str, Sequence[int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Quantized:
    """What ``quantize`` wrote: the files, every tensor's type, and with a report every encoded tensor's error."""

    paths: list[Path]
    tensors: list[PlannedTensor]
    errors: dict[str, Deviation]
    without_importance: list[str]  # tensors that the importance matrix does not have


@dataclass(frozen=True)
class QuantizationPlan:
    """Everything decided, nothing read: the tensors with their types, the metadata, the bytes of the file."""

    source: InputModel
    tensors: list[PlannedTensor]
    metadata: TypedMetadata
    nbytes: int
    importance: ImportanceMatrix | None = None
    part_sizes: tuple[int, ...] = ()  # tensors of each part; () for one file


def plan_quantization(
    source: InputModel,
    recipe: Recipe,
    *,
    importance: ImportanceMatrix | None = None,
    allow_requantize: bool = False,
    keep_split: bool = False,
) -> QuantizationPlan:
    """Decide every tensor's type and prove that the source allows it.

    UnsupportedError ``QUANTIZE_REQUANTIZE`` for weights of a GGUF file that were quantized before, unless allowed;
    ParameterError for an importance matrix of another model, or none where the type needs one.
    """
    tensors = plan(source, recipe, with_importance=importance is not None, keep_order=keep_split)
    tensors = [_safe(tensor, importance) for tensor in tensors]
    for tensor in tensors:
        if tensor.changes and tensor.source.quantized and source.kind == "gguf" and not allow_requantize:
            raise UnsupportedError(
                f"{tensor.name} is {tensor.source.quant.name}: it was quantized before, and doing so again costs "
                "quality. Use the F16, BF16 or F32 file of the model, or --allow-requantize.",
                code="QUANTIZE_REQUANTIZE",
            )
        _check_importance(tensor, importance)
    metadata = _metadata(source, recipe, importance)
    nbytes = file_nbytes(metadata, [TensorPlan(t.name, t.source.shape, t.target, tuple) for t in tensors])
    part_sizes = tuple(source.part_sizes) if keep_split and len(source.part_sizes) > 1 else ()
    return QuantizationPlan(source, tensors, metadata, nbytes, importance, part_sizes)


def quantize(
    planned: QuantizationPlan,
    target: str | os.PathLike[str],
    *,
    encoder: Encoder | None = None,
    n_threads: int | None = None,
    report: bool = False,
    progress: Progress | None = None,
    on_compile: Progress | None = None,
) -> Quantized:
    """Write the planned file and give what it is made of.

    encoder    is asked first for the blocks of each tensor that changes
    progress   called with bytes written, bytes in all, the tensor's name; on_compile while kernels are compiled
    NumericError ``TENSOR_NAN`` for a weight that is not finite, ``QUANTIZE_RANGE`` for one too large for its type; the
    writer's errors for the disk. Whatever happens, what stood at ``target`` stands there until the new file is whole.
    """
    refuse_own_source(planned.source, Path(target))
    changed = [tensor for tensor in planned.tensors if tensor.changes]
    weighted = {tensor.name for tensor in changed if _column(tensor, planned.importance, 0) is not None}
    compile_encoders(((tensor.target.name, tensor.name in weighted) for tensor in changed), on_compile)
    errors: dict[str, Deviation] = {}
    n_threads = arguments.whole_number("n_threads", n_threads or default_threads(), 1, arguments.MAX_THREADS)
    with ThreadPoolExecutor(n_threads, "edgellm-quantize") as threads:
        pool = _Pool(threads, 2 * n_threads)
        try:
            writes = [
                TensorPlan(
                    t.name, t.source.shape, t.target, _Chunks(t, planned.importance, encoder, pool, report, errors)
                )
                for t in planned.tensors
            ]
            paths = write_gguf(
                target, planned.metadata, writes, part_sizes=planned.part_sizes or None, progress=progress
            )
        except BaseException:
            threads.shutdown(wait=True, cancel_futures=True)
            raise
    missing = [tensor.name for tensor in changed if planned.importance and tensor.name not in weighted]
    return Quantized(paths, planned.tensors, errors, missing)


def default_target(source: InputModel, file_type: str) -> str:
    """``NAME-Q4_K_M.gguf``: the name of the source without its own type and the number of a part."""
    stem = source.path.resolve().name.removesuffix(".gguf")
    head, _, part = stem.rpartition("-of-")
    if head and part.isdigit():
        stem = head.rpartition("-")[0]
    base, dash, last = stem.rpartition("-")
    if not dash:
        base, dash, last = stem.rpartition(".")
    if dash and last.upper() in (*WRITTEN, "FP16", "FP32"):
        stem = base
    return f"{stem}-{file_type}.gguf"


def refuse_own_source(source: InputModel, target: Path) -> None:
    """ParameterError when the target is the file that the weights come from."""
    try:
        same = os.path.samefile(source.path, target)
    except OSError:
        same = False
    if same:
        raise ParameterError(f"{target} is the source itself. Give the new file another name.", code="QUANTIZE_TARGET")


# ---- metadata --------------------------------------------------------------------------------------------------------


def _metadata(source: InputModel, recipe: Recipe, importance: ImportanceMatrix | None) -> TypedMetadata:
    """The source's keys; what llama-quantize sets stands at the end, as it writes it."""
    kept = {key: typed for key, typed in source.metadata.items() if not key.startswith("split.")}
    before = kept.pop("general.file_type", (0, "UINT32"))
    kept.pop("general.quantization_version", None)
    kept["general.quantization_version"] = (QUANTIZATION_VERSION, "UINT32")
    kept["general.file_type"] = before if recipe.file_type == COPY else (WRITTEN[recipe.file_type].number, "UINT32")
    if importance is None:
        return kept
    added = {
        "quantize.imatrix.file": (importance.file.encode()[:127].decode(errors="ignore"), "STRING"),
        "quantize.imatrix.dataset": (importance.dataset.encode()[:127].decode(errors="ignore"), "STRING"),
        "quantize.imatrix.entries_count": (len(importance.columns), "UINT32"),
        "quantize.imatrix.chunks_count": (importance.n_chunks, "UINT32"),
    }
    for key, typed in added.items():
        kept.pop(key, None)
        if typed[0]:
            kept[key] = typed
    return kept


# ---- importance ------------------------------------------------------------------------------------------------------


def _n_matrices(tensor: InputTensor) -> int:
    """Matrices in a tensor: the experts of a mixture have one each."""
    return tensor.shape[0] if len(tensor.shape) == 3 else 1


def _check_importance(tensor: PlannedTensor, importance: ImportanceMatrix | None) -> None:
    found = None if importance is None else importance.columns.get(tensor.name)
    if found is None:
        if tensor.needs_importance:
            raise ParameterError(
                f"{tensor.name} becomes {tensor.target.name}, which is of no use without an importance matrix. Make "
                "one with `edgellm imatrix`, or choose Q2_K.",
                code="QUANTIZE_IMPORTANCE",
            )
        return
    n = _n_matrices(tensor.source) * tensor.source.n_in
    if tensor.changes and found.size != n and tensor.name != "token_embd.weight":
        raise ParameterError(
            f"{tensor.name}: the importance matrix has {found.size} columns where {n} were expected. It was made for "
            "another model.",
            code="IMPORTANCE_SHAPE",
        )


def _safe(tensor: PlannedTensor, importance: ImportanceMatrix | None) -> PlannedTensor:
    """A type that needs no importance, for a tensor whose experts the text did not all meet."""
    if importance is None or not tensor.needs_importance or not importance.unmet.get(tensor.name):
        return tensor
    note = f"{tensor.target.name} is of no use for experts that the calibration text never met"
    return PlannedTensor(tensor.source, QUANT_TYPES[WITHOUT_IMPORTANCE], note)


def _column(tensor: PlannedTensor, importance: ImportanceMatrix | None, matrix: int) -> np.ndarray | None:
    """The importance of the columns of one matrix of a tensor."""
    found = None if importance is None else importance.columns.get(tensor.name)
    n_in = tensor.source.n_in
    if found is None or found.size != _n_matrices(tensor.source) * n_in:
        return None
    return found.reshape(-1, n_in)[matrix]


# ---- tensors ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Pool:
    """Threads, and how many runs of rows may be under way."""

    threads: ThreadPoolExecutor
    n_ahead: int


@dataclass
class _Chunks:
    """The bytes of a tensor, piece by piece: ``TensorPlan.chunks``."""

    tensor: PlannedTensor
    importance: ImportanceMatrix | None
    encoder: Encoder | None
    pool: _Pool
    report: bool
    errors: dict[str, Deviation]
    _encoders: dict[int, RowEncoder] = field(default_factory=dict)

    def __call__(self) -> Iterator[np.ndarray]:
        source = self.tensor.source
        yield from self._blocks() if self.tensor.changes else source.stored_chunks()
        source.release()  # a mapped file's pages count as ours while they stay

    def _blocks(self) -> Iterator[np.ndarray]:
        source, target = self.tensor.source, self.tensor.target
        blocks = self.encoder(source, target) if self.encoder else None
        if blocks is not None:
            assert blocks.shape == (source.n_rows, target.row_nbytes(source.n_in)), (source.name, blocks.shape)
        if self.report:
            self.errors[source.name] = Deviation()
        waiting: deque[Future[tuple[np.ndarray, Deviation | None]]] = deque()
        for matrix, start, stop in self._runs():
            waiting.append(self.pool.threads.submit(self._encoded, matrix, start, stop, blocks))
            if len(waiting) > self.pool.n_ahead:
                yield self._next(waiting)
        while waiting:
            yield self._next(waiting)

    def _runs(self) -> Iterator[tuple[int, int, int]]:
        """Runs of rows that one call takes, none across two matrices: (matrix, start, stop)."""
        source = self.tensor.source
        n_rows = source.n_rows // _n_matrices(source)
        step = max(1, CHUNK_NBYTES // (4 * source.n_in))
        for matrix in range(_n_matrices(source)):
            for start in range(0, n_rows, step):
                first = matrix * n_rows + start
                yield matrix, first, min(first + step, (matrix + 1) * n_rows)

    def _next(self, waiting: deque[Future[tuple[np.ndarray, Deviation | None]]]) -> np.ndarray:
        encoded, sums = waiting.popleft().result()
        if sums is not None:
            self.errors[self.tensor.name].merge(sums)
        return encoded.reshape(-1)

    def _encoded(
        self, matrix: int, start: int, stop: int, blocks: np.ndarray | None
    ) -> tuple[np.ndarray, Deviation | None]:
        source, target = self.tensor.source, self.tensor.target
        if blocks is not None and not self.report:
            return np.ascontiguousarray(blocks[start:stop]), None
        rows = source.rows(start, stop)
        largest = _largest_magnitude(source, rows, start)
        encoded = self._row_encoder(matrix)(rows) if blocks is None else np.ascontiguousarray(blocks[start:stop])
        if largest > SAFE_LARGEST and not target.finite(encoded.reshape(-1)).all():
            raise NumericError(
                f"{source.name}: a weight of {largest:g} is too large for {target.name}. Nothing was written; keep "
                f"this tensor in another type with --tensor-type '{source.name}=f32'.",
                code="QUANTIZE_RANGE",
            )
        if not self.report:
            return encoded, None
        sums = Deviation()
        sums.add(rows, target.dequantize(encoded))
        return encoded, sums

    def _row_encoder(self, matrix: int) -> RowEncoder:
        if matrix not in self._encoders:
            column = _column(self.tensor, self.importance, matrix)
            self._encoders[matrix] = RowEncoder(self.tensor.target.name, self.tensor.source.n_in, column)
        return self._encoders[matrix]


def _largest_magnitude(source: InputTensor, rows: np.ndarray, start: int) -> float:
    """The largest magnitude of some rows; NumericError when one is not finite."""
    low, high = float(rows.min(initial=0)), float(rows.max(initial=0))  # a NaN comes through both
    if np.isfinite(low) and np.isfinite(high):
        return max(-low, high)
    row, column = np.argwhere(~np.isfinite(rows))[0]
    raise NumericError(
        f"{source.name}: weight {column} of row {start + row} is {rows[row, column]}, and all must be finite. Nothing "
        "was written; the source is damaged: fetch or convert it again.",
        code="TENSOR_NAN",
    )


def error_table(errors: Mapping[str, Deviation], tensors: Sequence[PlannedTensor]) -> list[tuple[str, str, Deviation]]:
    """Rows of a report: name, type, error, in the order of the file."""
    return [(t.name, t.target.name, errors[t.name]) for t in tensors if t.name in errors]
