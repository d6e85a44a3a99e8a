"""``general.file_type``: the mixes of tensor types as llama.cpp numbers and names them, and what stands in a file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

QUANTIZATION_VERSION = 2  # of ggml's block layouts


class FileType(NamedTuple):
    """One mix.

    label   llama.cpp's words
    name    as an option of llama-quantize, "" for one that edgellm does not write
    quant   the tensor type of most matrices
    """

    number: int
    label: str
    name: str = ""
    quant: str = ""


FILE_TYPES = (
    FileType(0, "all F32", "F32", "F32"),
    FileType(1, "F16", "F16", "F16"),
    FileType(32, "BF16", "BF16", "BF16"),
    FileType(7, "Q8_0", "Q8_0", "Q8_0"),
    FileType(18, "Q6_K", "Q6_K", "Q6_K"),
    FileType(17, "Q5_K - Medium", "Q5_K_M", "Q5_K"),
    FileType(16, "Q5_K - Small", "Q5_K_S", "Q5_K"),
    FileType(9, "Q5_1", "Q5_1", "Q5_1"),
    FileType(8, "Q5_0", "Q5_0", "Q5_0"),
    FileType(15, "Q4_K - Medium", "Q4_K_M", "Q4_K"),
    FileType(14, "Q4_K - Small", "Q4_K_S", "Q4_K"),
    FileType(3, "Q4_1", "Q4_1", "Q4_1"),
    FileType(2, "Q4_0", "Q4_0", "Q4_0"),
    FileType(25, "IQ4_NL - 4.5 bpw", "IQ4_NL", "IQ4_NL"),
    FileType(30, "IQ4_XS - 4.25 bpw", "IQ4_XS", "IQ4_XS"),
    FileType(38, "MXFP4 MoE", "MXFP4_MOE", "MXFP4"),
    FileType(13, "Q3_K - Large", "Q3_K_L", "Q3_K"),
    FileType(12, "Q3_K - Medium", "Q3_K_M", "Q3_K"),
    FileType(11, "Q3_K - Small", "Q3_K_S", "Q3_K"),
    FileType(10, "Q2_K - Medium", "Q2_K", "Q2_K"),
    FileType(21, "Q2_K - Small", "Q2_K_S", "Q2_K"),
    FileType(37, "TQ2_0 - 2.06 bpw ternary", "TQ2_0", "TQ2_0"),
    FileType(36, "TQ1_0 - 1.69 bpw ternary", "TQ1_0", "TQ1_0"),
    FileType(19, "IQ2_XXS - 2.0625 bpw"),
    FileType(20, "IQ2_XS - 2.3125 bpw"),
    FileType(22, "IQ3_XS - 3.3 bpw"),
    FileType(23, "IQ3_XXS - 3.0625 bpw"),
    FileType(24, "IQ1_S - 1.5625 bpw"),
    FileType(26, "IQ3_S - 3.4375 bpw"),
    FileType(27, "IQ3_S mix - 3.66 bpw"),
    FileType(28, "IQ2_S - 2.5 bpw"),
    FileType(29, "IQ2_M - 2.7 bpw"),
    FileType(31, "IQ1_M - 1.75 bpw"),
    FileType(39, "NVFP4"),
    FileType(40, "Q1_0"),
    FileType(41, "Q2_0"),
)
LABELS = {row.number: row.label for row in FILE_TYPES}
WRITTEN = {row.name: row for row in FILE_TYPES if row.name}


def size_label(n_params: int) -> str:
    """Two significant digits and a unit, such as ``1.2B``, ``270M``."""
    units = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K"))
    scale, unit = next((row for row in units if n_params >= row[0]), units[-1])
    n = n_params / scale
    return f"{n:.{max(0, 2 - len(str(round(n))))}f}{unit}"


def type_counts(tensors: Iterable[tuple[str, int]]) -> dict[str, tuple[int, int]]:
    """type -> (tensors, bytes), the largest first, of (type, bytes) of each tensor."""
    counts: Counter[str] = Counter()
    nbytes: Counter[str] = Counter()
    for name, n in tensors:
        counts[name] += 1
        nbytes[name] += n
    return {name: (counts[name], total) for name, total in nbytes.most_common()}
