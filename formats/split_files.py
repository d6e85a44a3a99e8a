"""The parts of a split model: ``name-00001-of-00003.gguf`` and on, opened from the first.

Every part is a GGUF file with tensors of its own. ``split.no`` counts from 0, ``split.count`` is the number of parts,
``split.tensors.count`` the number of tensors in all. Only the first part has the metadata of the model.
"""

from __future__ import annotations

import re
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from edgellm.formats.findings import PULL_AGAIN, Finding, Report
from edgellm.formats.gguf_header import Header

# how people cut a file into pieces of bytes, which are no GGUF files: name.gguf.part1of2, name.gguf-split-a ...
_PIECE = re.compile(
    r"(?P<name>.*\.gguf)[.-](?:part(?P<no>\d+)of(?P<count>\d+)|split-?(?P<letter>[a-z]{1,2})|part-?\w{1,3})", re.DOTALL
)
PART = re.compile(r"(?P<name>.*)-(?P<no>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


def part_name(name: str, no: int, count: int) -> str:
    """The file of part ``no``, from 1, of the model ``name``."""
    return f"{name}-{no:05}-of-{count:05}.gguf"


def refuse_piece(path: Path) -> None:
    """FormatError ``MODEL_SPLIT`` for a piece of a file that was cut anywhere, by its name."""
    match = _PIECE.fullmatch(path.name)
    if match is None or not path.is_file():
        return
    which = f"piece {int(match['no'])} of {int(match['count'])}" if match["no"] else "one piece"
    raise Finding(
        "MODEL_SPLIT",
        f"is {which} of a file that was cut to be uploaded",
        f"Get all pieces, join them in their order (cat '{match['name']}'* > joined.gguf), and give the result.",
        file=path.name,
    ).error()


def other_parts(path: Path, header: Header) -> list[Path]:
    """The files that belong to the first part at ``path``; empty for a model of one file.

    Raises FormatError ``MODEL_SPLIT`` when ``path`` is not the first part, is misnamed, or parts are missing.
    """
    count, no = header.metadata.get("split.count", 1), header.metadata.get("split.no", 0)
    for key, value in (("split.count", count), ("split.no", no)):
        if type(value) is not int or value < 0:
            advice = "Take the files as they were published."
            raise header.finding("MODEL_SPLIT", f"is {value!r}, expected a whole number", key, advice).error()
    if count <= 1:
        return []
    match = PART.fullmatch(path.name)
    first = part_name(match["name"] if match else path.stem, 1, count)
    if no != 0:
        advice = f"Give the path of the first part, {first}."
        raise header.finding("MODEL_SPLIT", f"is part {no + 1} of {count}", "split.no", advice).error()
    if match is None or int(match["count"]) != count or int(match["no"]) != 1:
        message = f"is the first of {count} parts and is not named so"
        advice = f"Give the parts their published names; the first is {first}."
        raise header.finding("MODEL_SPLIT", message, "split.count", advice).error()
    paths = [path.with_name(part_name(match["name"], i, count)) for i in range(2, count + 1)]
    missing = list(islice((part.name for part in paths if not part.exists()), 5))  # a lie of 65,535 parts ends here
    if missing:
        message = f"is the first of {count} parts, and some are missing: {', '.join(missing)}"
        advice = "Put all parts into one folder, or pull the model again."
        raise header.finding("MODEL_SPLIT", message, "split.count", advice).error()
    return paths


def check_parts(headers: list[Header], report: Report) -> None:
    """All parts belong to one model, each is there once, and no tensor is missing."""
    first = headers[0].metadata
    seen: dict[str, str] = {}
    for i, header in enumerate(headers):
        metadata = header.metadata
        no = metadata.get("split.no")
        if no != i or metadata.get("split.count") != len(headers):
            message = f"says it is part {no + 1 if type(no) is int else no} of {metadata.get('split.count')}"
            message += f", expected part {i + 1} of {len(headers)}"
            report(header.finding("MODEL_SPLIT", message, "split.no", PULL_AGAIN))
        for key, value in metadata.items():
            if key != "split.no" and key in first and not same_value(value, first[key]):
                message = "differs from the first part's value: the parts are of two models"
                report(header.finding("MODEL_SPLIT", message, key, PULL_AGAIN))
        for name, record in header.tensors.items():
            if name in seen:
                message = f"the tensor is in {seen[name]} too"
                report(Finding("MODEL_SPLIT", message, PULL_AGAIN, file=header.file, offset=record.position, name=name))
            seen[name] = header.file
    expected = first.get("split.tensors.count", len(seen))
    n_tensors = sum(len(header.tensors) for header in headers)
    if expected != n_tensors:
        message = f"is {expected}, and the {len(headers)} parts have {n_tensors:,} tensors"
        report(headers[0].finding("MODEL_SPLIT", message, "split.tensors.count", PULL_AGAIN))


def same_value(a: Any, b: Any) -> bool:
    """Whether two metadata values are equal, and of one type."""
    return type(a) is type(b) and (np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b)
