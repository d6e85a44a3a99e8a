"""From a model, the types it is to have and a text, to weights that are rounded for what the text shows.

``gptq`` rounds every matrix with error compensation (gptq.py), walking the text through the model while the matrices
behind it are already rounded (hessian.py). ``awq`` scales columns first (awq.py). The two go together.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np

from edgellm.formats.errors import NumericError, ParameterError
from edgellm.formats.gguf import GGUFFile, QuantizedTensor
from edgellm.formats.quant_types import QUANT_TYPES, QuantType
from edgellm.kernels.program import Program
from edgellm.machine.cores import default_threads
from edgellm.machine.progress import StageProgress
from edgellm.measure.perplexity import Chunk, cut
from edgellm.models import build_program
from edgellm.quantize import awq, gptq, hessian
from edgellm.quantize.awq import Scaling
from edgellm.quantize.grid import GRIDS
from edgellm.quantize.input_model import InputModel, InputTensor
from edgellm.quantize.pipeline import ImportanceMatrix, QuantizationPlan
from edgellm.tokenizer import Tokenizer

Method = Literal["gptq", "awq", "awq+gptq"]
F32 = QUANT_TYPES["F32"]
METHODS: tuple[Method, ...] = ("gptq", "awq", "awq+gptq")


@dataclass(frozen=True)
class CalibrationOptions:
    """How to calibrate.

    n_chunks   of ``n_ctx`` tokens; None for all of the text
    damping    of the Hessian, as a share of its mean diagonal
    """

    method: Method = "gptq"
    n_ctx: int = 512
    n_chunks: int | None = None
    damping: float = gptq.DAMPING
    n_threads: int | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ParameterError(f"method is {self.method!r}. It must be one of {', '.join(METHODS)}.")
        if not 0 < self.damping < 1:
            raise ParameterError(f"damping is {self.damping}. It must lie between 0 and 1, such as {gptq.DAMPING}.")


@dataclass
class Calibrated:
    """What came of it. For a ``with`` block: the encoded tensors lie in a temporary file.

    encoded      name -> uint8 (n_rows, row_nbytes) in the tensor's target type
    scaled       name -> what the source's weights are multiplied by before anything else
    importance   name -> float32 (n_in,), of the inputs as they are after scaling
    """

    encoded: dict[str, np.ndarray] = field(default_factory=dict)
    scaled: dict[str, Scaling] = field(default_factory=dict)
    importance: dict[str, np.ndarray] = field(default_factory=dict)
    _spool: list[tempfile.TemporaryDirectory[str]] = field(default_factory=list)

    def source(self, source: InputModel) -> InputModel:
        """The same model with scaled tensors in the place of those that are scaled."""
        tensors = {
            name: _scaled_tensor(tensor, self.scaled[name]) if name in self.scaled else tensor
            for name, tensor in source.tensors.items()
        }
        return replace(source, tensors=tensors)

    def plan(self, planned: QuantizationPlan) -> QuantizationPlan:
        """The same plan for the scaled source, with the importance of its inputs."""
        source = self.source(planned.source)
        tensors = [
            replace(tensor, source=source.tensors[tensor.name], target=tensor.target if tensor.changes else F32)
            if tensor.name in self.scaled
            else tensor
            for tensor in planned.tensors
        ]
        known = planned.importance or ImportanceMatrix({})
        columns = {**known.columns, **self.importance}
        return replace(planned, source=source, tensors=tensors, importance=replace(known, columns=columns))

    def blocks(self, tensor: InputTensor, quant: QuantType) -> np.ndarray | None:
        """The blocks of a tensor that was rounded here; the pipeline's ``encoder``."""
        return self.encoded.get(tensor.name)

    def keep(self, name: str, data: np.ndarray) -> None:
        """Store an encoded tensor."""
        if not self._spool:
            self._spool.append(tempfile.TemporaryDirectory(prefix="edgellm-calibrated-"))
        kept = np.memmap(Path(self._spool[0].name) / f"{len(self.encoded)}", np.uint8, "w+", shape=data.shape)
        kept[...] = data
        self.encoded[name] = kept

    def close(self) -> None:
        """Remove the temporary file. May be called twice."""
        self.encoded.clear()
        while self._spool:
            self._spool.pop().cleanup()

    def __enter__(self) -> Calibrated:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _scaled_tensor(tensor: InputTensor, scaling: Scaling) -> InputTensor:
    """The tensor times its scales, as float32."""

    def rows(start: int, stop: int) -> np.ndarray:
        return np.ascontiguousarray(scaling.apply(tensor.decode(start, stop), start), np.float32)

    def stored(start: int, stop: int) -> np.ndarray:
        return rows(start, stop).view(np.uint8)

    return replace(tensor, quant=F32, decode=rows, stored=stored)


def calibrate(
    gguf: GGUFFile,
    types: Mapping[str, str],
    text: str,
    options: CalibrationOptions,
    importance: Mapping[str, np.ndarray] | None = None,
    progress: StageProgress | None = None,
) -> Calibrated:
    """Calibrate an open model for the type of each tensor that changes, by name.

    ``importance`` is that of an imatrix file; without one AWQ measures it over the same text. Tensors of types that no
    grid is known for (GRIDS), the embedding and the output matrix are left to the type's own quantizer.
    """
    report: StageProgress = progress or (lambda stage, done, total, name: None)
    result = Calibrated()
    try:
        tokenizer = Tokenizer.from_gguf(gguf.metadata, proved=True)
        ids = tokenizer.encode(text, add_special=True)
        chunks = cut(ids, list(tokenizer.special.prefix[:1]), options.n_ctx, options.n_chunks)
        n_threads = options.n_threads or default_threads()
        _Calibration(build_program(gguf), types, importance, options, report, result, n_threads).run(chunks)
        gguf.check()
    except BaseException:
        result.close()
        raise
    return result


@dataclass
class _Calibration:
    """One run: the model, the types it is to have, and what has been found so far."""

    program: Program
    types: Mapping[str, str]
    given: Mapping[str, np.ndarray] | None
    options: CalibrationOptions
    report: StageProgress
    result: Calibrated
    n_threads: int

    def run(self, chunks: Sequence[Chunk]) -> None:
        """Scale, round, and say what importance the rest has."""
        given = self.given
        if "awq" in self.options.method:
            given = self._measure(chunks) if given is None else given
            self.report("searching scales", 0, 1, "")
            self.result.scaled = awq.scalings(self.program, self.types, given, self.source, self.encode)
        for name, means in (given or {}).items():
            columns = self.result.scaled.get(name, Scaling()).columns
            self.result.importance[name] = means if columns is None else (means / columns**2).astype(np.float32)
        if "gptq" in self.options.method:
            self._round(chunks)

    def _measure(self, chunks: Sequence[Chunk]) -> dict[str, np.ndarray]:
        """The mean squares of the inputs of every matrix, in the source model."""
        means: dict[str, np.ndarray] = {}
        found = hessian.groups(self.program)
        walk = hessian.Walk(self.program, chunks, self.source, self.source_rows)
        for done, group in enumerate(found):
            self.report("measuring the importance of inputs", done, len(found), "")
            walk.advance(group.start)
            squares = [np.einsum("ij,ij->j", x, x, dtype=np.float64) for x in walk.inputs(group.x)]
            n_rows = sum(len(batch) for batch in walk.batches)
            means |= dict.fromkeys(group.weights, (np.sum(squares, axis=0) / n_rows).astype(np.float32))
        return means

    def tensor(self, name: str) -> QuantizedTensor:
        """A tensor of the source."""
        return self.program.tensors[name]

    def source(self, name: str) -> np.ndarray:
        """The source's weights, float32 in their shape; NumericError when they are not finite."""
        weights = self.tensor(name).dequantize().reshape(self.tensor(name).shape)
        if not np.isfinite(weights).all():
            raise NumericError(f"{name} has NaN or infinity. Take another copy of the model.", code="QUANTIZE_NAN")
        return weights

    def encode(self, quant: str, rows: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
        """A type's own quantizer."""
        from edgellm.kernels.cpu.encode import encode  # numba: 400 ms

        return encode(quant, np.ascontiguousarray(rows, np.float32), importance, self.n_threads)

    def weight(self, name: str) -> np.ndarray:
        """What the model will compute with: the rounded weights where there are some, the source's elsewhere."""
        if name not in self.result.encoded:
            return self.source(name)
        tensor = self.tensor(name)
        rounded = QUANT_TYPES[self.types[name]].dequantize(self.result.encoded[name]).reshape(tensor.shape)
        return self.result.scaled.get(name, Scaling()).undo(rounded)

    def source_rows(self, name: str, tokens: np.ndarray) -> np.ndarray:
        """Rows of a table of the source."""
        return self.tensor(name).dequantize(np.asarray(tokens))

    def rows(self, name: str, tokens: np.ndarray) -> np.ndarray:
        """Rows of a table as the file will have them."""
        rows, quant = self.source_rows(name, tokens), self.types.get(name)
        return rows if quant is None else QUANT_TYPES[quant].dequantize(self.encode(quant, rows))

    def _round(self, chunks: Sequence[Chunk]) -> None:
        found = hessian.groups(self.program)
        walk = hessian.Walk(self.program, chunks, self.weight, self.rows)
        for done, group in enumerate(found):
            self.report("rounding with error compensation", done, len(found), "")
            wanted = [name for name in group.weights if self.types.get(name) in GRIDS]
            if not wanted:
                continue
            walk.advance(group.start)
            h = hessian.gram(walk.inputs(group.x), self.program.buffers[group.x].width)
            if not np.isfinite(h).all():
                raise NumericError(f"The inputs of {wanted[0]} are not finite. Check the model with `edgellm verify`.")
            columns = self.result.scaled.get(wanted[0], Scaling()).columns
            curvature = gptq.Curvature(h if columns is None else h / np.outer(columns, columns), self.options.damping)
            for name in wanted:
                weights = self.result.scaled.get(name, Scaling()).apply(self.source(name))
                grid = GRIDS[self.types[name]]
                self.result.keep(name, gptq.compensate(weights, curvature, grid, self.encode))
        self.report("rounding with error compensation", len(found), len(found), "")
