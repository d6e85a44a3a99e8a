"""float32 rows to blocks of any type that has an encoder: the public way to the kernels of ``encoders/``.

An encoder is compiled at its first use and kept like every other kernel (``kernel_cache.py``). Its bytes are the same
on every CPU, so what was just compiled is checked against a digest of what it must write; a form that writes anything
else is not used.
"""

from __future__ import annotations

import ctypes
import threading
import warnings
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from edgellm.formats.errors import NumericError, ParameterError, UnsupportedError
from edgellm.formats.quant_types import QUANT_TYPES, QuantType
from edgellm.kernels.cpu.compile import isa, jit
from edgellm.kernels.cpu.compile.kernel_cache import KernelCache, default_folder
from edgellm.kernels.cpu.encoders import ENCODED, common, kernel_name
from edgellm.kernels.cpu.encoders.digests import DIGESTS
from edgellm.machine.progress import Progress

CHUNK_NBYTES = 1 << 20  # of float32 that a thread takes at a time

_KERNEL = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)
_Function = Callable[[int, int, int, int], None]


class RowEncoder:
    """Turns float32 rows into blocks of one type. May be used from several threads at once.

    ``importance`` is one float32 for each column (or None): how much its error matters. Types without a use for it
    ignore it. Raises UnsupportedError for a type without an encoder.
    """

    def __init__(self, quant: str, n_in: int, importance: np.ndarray | None = None):
        if quant not in ENCODED:
            raise UnsupportedError(
                f"edgellm cannot write {quant}. It writes {', '.join(ENCODED)}.", code="QUANTIZE_TYPE"
            )
        self.quant: QuantType = QUANT_TYPES[quant]
        self.n_in = n_in
        if n_in % self.quant.block_size:
            raise ParameterError(
                f"a row of {n_in} weights is no whole number of {quant} blocks of {self.quant.block_size}; "
                "choose a type with smaller blocks.",
                code="QUANTIZE_ROW",
            )
        self._importance = None if importance is None else _checked_importance(importance, n_in)
        self._function = None if quant == "F32" else _kernels.function(kernel_name(quant, importance is not None))

    def __call__(self, rows: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """uint8 (n, row_nbytes) of float32 (n, n_in); the caller makes sure that all numbers are finite."""
        assert rows.dtype == np.float32 and rows.ndim == 2 and rows.shape[1] == self.n_in, (rows.dtype, rows.shape)
        rows = np.ascontiguousarray(rows)
        if out is None:
            out = np.empty((len(rows), self.quant.row_nbytes(self.n_in)), np.uint8)
        assert out.flags.c_contiguous and out.shape == (len(rows), self.quant.row_nbytes(self.n_in))
        if self._function is None:
            out[...] = rows.view(np.uint8)
        else:
            _call(self._function, rows, out, self._importance)
        return out


def compile_encoders(types: Iterable[tuple[str, bool]], on_compile: Progress | None = None) -> None:
    """Have the kernels ready: of which types, with an importance or without."""
    for quant, weighted in dict.fromkeys(types):
        if quant != "F32":
            _kernels.function(kernel_name(quant, weighted), on_compile)


def encode(quant: str, rows: np.ndarray, importance: np.ndarray | None = None, n_threads: int = 1) -> np.ndarray:
    """uint8 (n, row_nbytes): float32 rows (n, n_in) as blocks of a type, byte for byte as ggml's reference writes them.

    ``importance`` (n_in,) float32 is the importance matrix's row for this tensor. All numbers must be finite.
    """
    encoder = RowEncoder(quant, rows.shape[1], importance)
    rows = np.ascontiguousarray(rows, np.float32)
    out = np.empty((len(rows), encoder.quant.row_nbytes(encoder.n_in)), np.uint8)
    step = max(1, CHUNK_NBYTES // (4 * max(encoder.n_in, 1)))
    starts = range(0, len(rows), step)
    if n_threads <= 1 or len(starts) <= 1:
        return encoder(rows, out)
    with ThreadPoolExecutor(n_threads, "edgellm-encode") as pool:
        list(pool.map(lambda start: encoder(rows[start : start + step], out[start : start + step]), starts))
    return out


def _checked_importance(importance: np.ndarray, n_in: int) -> np.ndarray:
    if importance.shape != (n_in,):
        raise ParameterError(
            f"the importance has shape {importance.shape} where {n_in} columns were expected; is it of another model?",
            code="IMPORTANCE_SHAPE",
        )
    importance = np.ascontiguousarray(importance, np.float32)
    if not np.isfinite(importance).all() or (importance < 0).any():
        raise NumericError(
            "the importance matrix has numbers that are negative or not finite; make it again.", code="IMPORTANCE_NAN"
        )
    return importance


def _call(function: _Function, rows: np.ndarray, out: np.ndarray, importance: np.ndarray | None) -> None:
    """Run an encoder; ctypes gives up the interpreter lock meanwhile."""
    scratch = np.zeros(common.SCRATCH_NBYTES, np.uint8)
    address = 0 if importance is None else importance.ctypes.data
    record = np.array([rows.ctypes.data, *rows.shape, out.ctypes.data, address, scratch.ctypes.data], np.int64)
    function(record.ctypes.data, 0, 0, 1)


# ---- kernels ---------------------------------------------------------------------------------------------------------


class _Kernels:
    """The encoders of this process, loaded once each. Guarded by a lock."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._memory: jit.CodeMemory | None = None
        self._functions: dict[str, _Function] = {}

    def function(self, name: str, on_compile: Progress | None = None) -> _Function:
        with self._lock:
            if name not in self._functions:
                self._functions[name] = self._load(name, on_compile)
            return self._functions[name]

    def _load(self, name: str, on_compile: Progress | None) -> _Function:
        """The best form of an encoder that writes the right bytes on this CPU."""
        forms = isa.available_forms()
        for form in forms:
            cache = KernelCache(isa.detect(form), default_folder())
            code = cache.objects([name], on_compile)[name]
            memory = jit.CodeMemory()  # one for each: all forms of a kernel have the same symbol
            function = _KERNEL(memory.load(name, code))
            function._code = memory  # type: ignore[attr-defined]  # the code lives as long as the function
            if cache.is_verified(name):
                return function
            if digest(name, function) == DIGESTS[name]:
                cache.mark_verified(name)
                return function
            warnings.warn(
                f"The {form} form of {name} writes wrong bytes on this CPU, so another one is used. "
                "Please report the output of `edgellm doctor`.",
                RuntimeWarning,
                stacklevel=4,
            )
        raise UnsupportedError(
            f"No form of {name} writes the right bytes on this CPU. Please report the output of `edgellm doctor`.",
            code="KERNEL_SELFTEST",
        )


_kernels = _Kernels()


# ---- the test of a kernel that was just compiled ---------------------------------------------------------------------

_TRIAL_ROWS, _TRIAL_COLUMNS = 9, 1280


def trial_rows() -> tuple[np.ndarray, np.ndarray]:
    """Rows of many sizes and an importance, the same on every machine: made of integers and exact operations."""
    n = _TRIAL_ROWS * _TRIAL_COLUMNS
    mixed = np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
    parts = [(mixed >> np.uint64(shift)).astype(np.int64) & 0xFFFF for shift in (8, 24, 40)]
    values = (parts[0] + parts[1] + parts[2] - 98304).astype(np.float32).reshape(
        _TRIAL_ROWS, _TRIAL_COLUMNS
    ) / np.float32(1 << 20)
    values[1] *= np.float32(2.0**-60)  # small
    values[2] = np.abs(values[2]) + np.float32(0.25)  # of one sign
    values[3, ::37] *= np.float32(4096)  # outliers
    values[4] = np.float32(-0.375)  # constant
    values[5] = 0
    values[6] *= np.float32(2.0**20)  # large
    values[7] *= np.float32(2.0**-126)  # subnormal
    values[8, : _TRIAL_COLUMNS // 2] = 0  # zero blocks
    importance = parts[0][:_TRIAL_COLUMNS].astype(np.float32) / np.float32(4096)
    importance[::13] = 0
    return values, importance


def digest(name: str, function: _Function) -> int:
    """CRC-32 of what an encoder writes for the trial rows."""
    rows, importance = trial_rows()
    quant = QUANT_TYPES[name.removeprefix("encode_").removesuffix("_weighted").upper()]
    out = np.zeros((len(rows), quant.row_nbytes(rows.shape[1])), np.uint8)
    _call(function, rows, out, importance if name.endswith("_weighted") else None)
    return zlib.crc32(out)
