"""The one validator: proves every count, length, offset, shape and type of a model's files before anyone uses them.

``prove`` runs at every load and stops at the first error. ``findings`` is the same walk for ``edgellm verify``: it
goes on as far as it can, adds the checks that cost a look at every token, and on request reads every block scale.
All products are of Python ints, which do not wrap.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgellm.formats import bus_error
from edgellm.formats.errors import EdgeLLMError, ParameterError
from edgellm.formats.findings import PULL_AGAIN, REBUILD, Finding, Report, override_error, raise_finding, short
from edgellm.formats.gguf_header import Header, TensorRecord, read_header
from edgellm.formats.hparam_checks import check_hparams
from edgellm.formats.mapped_file import FileMap, map_file
from edgellm.formats.quant_types import QUANT_TYPES_BY_ID, QuantType
from edgellm.formats.split_files import check_parts, other_parts, refuse_piece
from edgellm.formats.vocabulary_checks import check_every_token, check_vocabulary

MAX_TENSOR_NBYTES = 1 << 47  # of one tensor and of all together; a process has no more addresses
MAX_FINDINGS = 200
SCAN_NBYTES = 1 << 24  # of a tensor checked at once

_REMOVED = {4: "Q4_2", 5: "Q4_3", **dict(enumerate(("Q4_0_4_4", "Q4_0_4_8", "Q4_0_8_8"), 31))}
_REMOVED |= {36: "IQ4_NL_4_4 or bitnet.cpp's I2_S", 37: "IQ4_NL_4_8", 38: "IQ4_NL_8_8"}
_OF_IK_LLAMA = {
    **dict(enumerate(("Q6_0", "IQ1_BN", "IQ2_BN"), 133)),
    **dict(enumerate(("IQ2_K", "IQ3_K", "IQ4_K", "IQ5_K", "IQ6_K"), 137)),
    **dict(enumerate(("IQ4_KS", "IQ2_KS", "IQ4_KSS"), 144)),
    **dict(enumerate(("IQ5_KS", "IQ2_KT", "IQ3_KT", "IQ4_KT", "IQ3_KS", "IQ2_KL", "IQ1_KT"), 152)),
}
# numbers that cannot be read, and what is known of them
OTHER_TYPES = {
    **{i: f"{name}, which ggml removed" for i, name in _REMOVED.items()},
    **{i: f"{name}, a type of ik_llama.cpp alone" for i, name in _OF_IK_LLAMA.items()},
}
OTHER_TYPE = "Take the model in another type, such as Q4_K_M."

# they say where the bytes of the file lie, which no other value can change
OF_THE_FILE = ("general.alignment", "split.no", "split.count", "split.tensors.count")
OVERRIDE_KINDS: dict[type, str] = {bool: "BOOL", int: "INT64", float: "FLOAT64", str: "STRING"}


@dataclass(frozen=True)
class Part:
    """One proved file: its header and its mapped bytes."""

    path: Path
    header: Header
    data: FileMap


def prove(path: Path, report: Report = raise_finding, overrides: Mapping[str, Any] | None = None) -> list[Part]:
    """Read and check the headers of the model at ``path``, all parts of it, the first part first.

    overrides   metadata values in place of the file's; they are checked as if they stood in the file

    Raises EdgeLLMError with a named code for what ends the reading; gives every other finding to ``report``.
    """
    refuse_piece(path)
    parts = [_read_part(path, report)]
    parts += [_read_part(other, report) for other in other_parts(path, parts[0].header)]
    headers = [part.header for part in parts]
    for header in headers:
        check_tensors(header, report)
    if len(parts) > 1:
        check_parts(headers, report)
    if overrides:
        override(headers[0], overrides)
        report = blaming_the_caller(overrides, report)
    check_hparams(headers[0], report)
    check_vocabulary(headers[0], _embedding_rows(headers), report)
    return parts


def findings(path: str | Path, check_tensors: bool = False) -> list[Finding]:
    """Everything that is wrong with the model at ``path``; with ``check_tensors`` also NaN and infinite weights.

    A file that cannot be opened at all raises; see ``map_file``.
    """
    found: list[Finding] = []

    def collect(finding: Finding) -> None:
        if len(found) >= MAX_FINDINGS:
            raise _Enough
        found.append(finding)

    try:
        parts = prove(Path(path), collect)
        check_every_token(parts[0].header, collect)
        if check_tensors and not any(finding.severity == "error" for finding in found):
            bus_error.install()
            for part in parts:
                try:
                    _check_values(part, collect)
                finally:
                    part.data.check()
    except _Enough:
        pass
    except EdgeLLMError as error:
        fatal = getattr(error, "finding", None)
        if fatal is None:
            raise
        found.append(fatal)
    return found


class _Enough(Exception):
    """The list of findings is long enough."""


def _read_part(path: Path, report: Report) -> Part:
    data = map_file(path)
    return Part(path, read_header(data, path.name, report), data)


def _embedding_rows(headers: list[Header]) -> int | None:
    records = [header.tensors["token_embd.weight"] for header in headers if "token_embd.weight" in header.tensors]
    return records[0].dims[1] if records and len(records[0].dims) == 2 else None


# -- overrides -------------------------------------------------------------------------------------------------------


def override(header: Header, overrides: Mapping[str, Any]) -> None:
    """Put the caller's values into the header. ParameterError for a value or a key that cannot stand there."""
    for key, value in overrides.items():
        if type(value) not in OVERRIDE_KINDS:
            raise ParameterError(
                f"The override of {short(key)} is {short(value)}. It must be a whole number, a number, True or False, "
                "or a text."
            )
        if key in OF_THE_FILE:
            raise ParameterError(f"{key} says how the file is laid out. It cannot be overridden: leave it out.")
        if type(value) is int and header.types.get(key) in ("FLOAT32", "FLOAT64"):
            try:
                value = float(value)
            except OverflowError:
                raise ParameterError(f"The override of {short(key)} is larger than any number of a file.") from None
        header.metadata[key] = value
        header.types[key] = OVERRIDE_KINDS[type(value)]
        header.positions.pop(key, None)


def blaming_the_caller(overrides: Mapping[str, Any], report: Report) -> Report:
    """``report`` for a file with these overrides: a ParameterError for what is wrong with one of them."""

    def blamed(finding: Finding) -> None:
        if finding.name is not None and finding.name in overrides:
            raise override_error(finding.name, finding.message, finding.code)
        report(finding)

    return blamed


# -- tensors ---------------------------------------------------------------------------------------------------------


def check_tensors(header: Header, report: Report) -> None:
    """Every tensor of one file has a known type, a shape of whole blocks, and bytes of its own inside the file."""
    spans: list[tuple[int, int, TensorRecord]] = []
    for record in header.tensors.values():
        finding = _check_record(header, record)
        if finding is None:
            spans.append((record.offset, record.offset + tensor_nbytes(record), record))
        else:
            report(finding)
    total = sum(end - start for start, end, _ in spans)
    if total > MAX_TENSOR_NBYTES:
        message = f"the tensors have {total:,} bytes together: no machine can map that many"
        report(Finding("GGUF_TENSOR_SIZE", message, file=header.file, offset=spans[0][2].position))
    spans.sort(key=lambda span: span[:2])
    _check_overlap(header, spans, report)
    _check_end(header, spans, report)


def tensor_nbytes(record: TensorRecord) -> int:
    """Bytes of a tensor of a known type and whole blocks; a Python int, which cannot wrap."""
    quant = QUANT_TYPES_BY_ID[record.type_id]
    return math.prod(record.dims) // quant.block_size * quant.block_nbytes


def _check_record(header: Header, record: TensorRecord) -> Finding | None:
    """What is wrong with one record alone."""

    def found(code: str, message: str, advice: str = REBUILD, unsupported: bool = False) -> Finding:
        return Finding(code, message, advice, header.file, record.position, record.name, unsupported=unsupported)

    shape = " x ".join(f"{n:,}" for n in record.dims)
    if not all(1 <= n < 1 << 63 for n in record.dims):
        return found("GGUF_DIMS", f"has the shape {shape}, expected dimensions of 1 and more")
    quant = QUANT_TYPES_BY_ID.get(record.type_id)
    if quant is None:
        found_type = OTHER_TYPES.get(record.type_id, f"type {record.type_id}, which is unknown")
        known = ", ".join(quant.name for quant in QUANT_TYPES_BY_ID.values() if quant.unpack)
        message = f"is {found_type}; supported: {known}"
        return found("GGUF_TENSOR_TYPE", message, OTHER_TYPE, unsupported=True)
    if record.dims[0] % quant.block_size:
        message = f"has rows of {record.dims[0]:,} weights, expected a multiple of {quant.block_size} for {quant.name}"
        return found("GGUF_TENSOR_TYPE", message)
    if tensor_nbytes(record) > MAX_TENSOR_NBYTES or math.prod(record.dims) >= 1 << 63:
        return found("GGUF_TENSOR_SIZE", f"has the shape {shape}: no machine can map that many bytes")
    if record.offset % header.alignment:
        message = f"starts at offset {record.offset:,}, expected a multiple of the alignment {header.alignment}"
        return found("GGUF_TENSOR_BOUNDS", message)
    if record.offset >= 1 << 63:
        return found("GGUF_TENSOR_BOUNDS", f"starts at offset {record.offset:,}, outside any file")
    return None


def _check_overlap(header: Header, spans: list[tuple[int, int, TensorRecord]], report: Report) -> None:
    """No byte belongs to two tensors; ``spans`` are sorted by their start."""
    furthest = 0
    owner = None
    for start, end, record in spans:
        if owner is not None and start < furthest:
            message = f"shares {min(end, furthest) - start:,} bytes with {short(owner.name)}"
            offset = header.data_start + start
            report(Finding("GGUF_TENSOR_OVERLAP", message, file=header.file, offset=offset, name=record.name))
        if end > furthest:
            furthest, owner = end, record


def _check_end(header: Header, spans: list[tuple[int, int, TensorRecord]], report: Report) -> None:
    """Every tensor ends inside the file.

    Tensors that follow one another without a gap, as writers lay them, and then run past the end are a file with a
    missing tail. Anything else that points outside is damage.
    """
    available = header.nbytes - header.data_start
    if not spans or (spans[-1][1] <= available and max(end for _, end, _ in spans) <= available):
        return
    ends = (-(-end // header.alignment) * header.alignment for _, end, _ in spans)
    contiguous = all(
        start == expected for (start, _, _), expected in zip(spans, itertools.chain((0,), ends), strict=False)
    )
    if contiguous and len(spans) == len(header.tensors):
        missing = spans[-1][1] - available
        message = f"{missing:,} bytes are missing at the end of the file: it has {header.nbytes:,}"
        message += f" and its tensors end at {header.nbytes + missing:,}"
        report(Finding("MODEL_TRUNCATED", message, PULL_AGAIN, file=header.file, offset=header.nbytes))
        return
    for start, end, record in spans:
        if end > available:
            message = f"lies at bytes {header.data_start + start:,} to {header.data_start + end:,}"
            message += f", outside the file of {header.nbytes:,} bytes"
            report(Finding("GGUF_TENSOR_BOUNDS", message, PULL_AGAIN, header.file, record.position, record.name))


# -- weights ---------------------------------------------------------------------------------------------------------


def _check_values(part: Part, report: Report) -> None:
    """NaN and infinite scales or weights in proved tensors, and matrices of nothing but zeros."""
    file = np.frombuffer(part.data, np.uint8)
    for record in part.header.tensors.values():
        quant = QUANT_TYPES_BY_ID[record.type_id]
        start = part.header.data_start + record.offset
        data = file[start : start + tensor_nbytes(record)]
        bad, n_bad = _non_finite_blocks(quant, data)
        if n_bad:
            n_blocks = len(data) // quant.block_nbytes
            message = f"block {bad:,} of {n_blocks:,} holds NaN or infinity, {n_bad:,} blocks in all"
            offset = start + bad * quant.block_nbytes
            report(Finding("TENSOR_NAN", message, PULL_AGAIN, file=part.header.file, offset=offset, name=record.name))
        elif len(record.dims) > 1 and not data.any():
            message = "all weights are zero"
            report(Finding("TENSOR_ZERO", message, REBUILD, part.header.file, start, record.name, "warning"))


def _non_finite_blocks(quant: QuantType, data: np.ndarray) -> tuple[int, int]:
    """Index of the first block with a NaN or an infinity, and their number."""
    first, count = 0, 0
    step = max(1, SCAN_NBYTES // quant.block_nbytes) * quant.block_nbytes
    for i in range(0, len(data), step):
        bad = np.flatnonzero(~quant.finite(data[i : i + step]))
        if len(bad) and not count:
            first = i // quant.block_nbytes + int(bad[0])
        count += len(bad)
    return first, count
