"""``edgellm compare``: what differs between two model files, and how far apart their answers are."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import click

from edgellm.cli.models import open_file
from edgellm.cli.options import FILE, chunk_model, chunk_options
from edgellm.cli.perplexity import compared, figure_lines
from edgellm.formats.text_file import read_text
from edgellm.machine.terminal import echo, fields, human_bytes, json_text, table


@click.command("compare")
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@click.option("-f", "--file", "text", type=FILE, help="Compare the answers over this text too; A is the base.")
@chunk_options
@click.option("--no-tensors", is_flag=True, help="Leave the table of tensors out.")
@click.option("--json", "as_json", is_flag=True, help="Write JSON.")
def command(a: str, b: str, text: Path | None, no_tensors: bool, as_json: bool, **values: Any) -> None:
    """Compare two model files.

    Metadata, tensors, types, the error of each tensor of B against A (NMSE: squared error over squared values), and
    with a text how far B's answers stand from A's.

    \b
    Examples:
      edgellm compare model-f16.gguf model-q4_k_m.gguf
      edgellm compare model-f16.gguf model-q4_k_m.gguf -f text.txt --no-tensors
    """
    from edgellm.quantize.compare import metadata_changes, tensor_differences, tensor_errors

    words = read_text(text) if text is not None else ""
    with open_file(a) as first, open_file(b) as second:
        result: dict[str, Any] = {
            "a": first.path.name,
            "b": second.path.name,
            "nbytes": [first.nbytes, second.nbytes],
            "metadata": [dict(zip(("key", "a", "b"), row, strict=True)) for row in metadata_changes(first, second)],
            "differences": [dict(zip(("name", "what"), row, strict=True)) for row in tensor_differences(first, second)],
            "tensors": [],
        }
        if not no_tensors:
            result["tensors"] = [
                {"name": one.name, "a": one.quant.name, "b": other.quant.name, "n": math.prod(one.shape)}
                | {"nmse": error.nmse, "worst": error.largest}
                for one, other, error in tensor_errors(first, second)
            ]
        paths = first.path, second.path
    if text is not None:
        result["answers"] = _answers(paths, words, values)
    echo(json_text(result, indent=None) if as_json else _as_text(result))


def _answers(paths: tuple[Path, Path], text: str, values: dict[str, Any]) -> dict[str, Any]:
    from edgellm.measure.divergence import compare_models

    with chunk_model(paths[0], values) as base, chunk_model(paths[1], values) as own:
        chunks = own.chunks(own.ids(text), values["n_chunks"])
        figures = compared(compare_models(own, base, chunks), len(chunks))
    return {"n_ctx": values["n_ctx"], "chunks": len(chunks)} | figures


def _as_text(result: dict[str, Any]) -> str:
    sizes = " -> ".join(human_bytes(n) for n in result["nbytes"])
    parts = [fields([("A", result["a"]), ("B", result["b"]), ("size", sizes)])]
    if result["metadata"]:
        parts.append(table(("key", "A", "B"), [(r["key"], r["a"], r["b"]) for r in result["metadata"]]))
    if result["differences"]:
        parts.append(table(("tensor", "difference"), [(r["name"], r["what"]) for r in result["differences"]]))
    if result["tensors"]:
        rows = [(r["name"], r["a"], r["b"], f"{r['nmse']:.3e}", f"{r['worst']:.3e}") for r in result["tensors"]]
        parts.append(table(("tensor", "A", "B", "NMSE", "worst"), rows, right=(3, 4)))
    if "answers" in result:
        parts.append(fields(figure_lines(result["answers"])))
    return "\n\n".join(parts)
