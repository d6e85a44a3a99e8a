"""``edgellm imatrix``: which inputs of a model's weights matter, measured over a text."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgellm.cli.models import fetched
from edgellm.cli.options import FILE, TypedPath, WholeNumber, chunk_model, chunk_options
from edgellm.cli.perplexity import counted
from edgellm.cli.progress import ProgressBar
from edgellm.formats.errors import ParameterError
from edgellm.formats.text_file import read_text
from edgellm.machine.terminal import echo, table

if TYPE_CHECKING:
    from edgellm.quantize.importance import Imatrix


@click.command("imatrix")
@click.argument("model", required=False, metavar="[MODEL]")
@click.option("-f", "--file", "text", type=FILE, help="The calibration text, UTF-8.")
@click.option("-o", "--output", type=TypedPath(), default=Path("imatrix.gguf"), show_default=True, help="The file.")
@click.option("--output-format", type=click.Choice(["gguf", "dat"]), help="[default: dat for a name that ends so]")
@click.option("--in-file", "in_files", type=FILE, multiple=True, metavar="FILE", help="Add this one; repeatable.")
@chunk_options
@click.option("--chunk", "first", type=WholeNumber(0), default=0, help="Leave out so many first.")
@click.option("--process-output", is_flag=True, help="The output matrix too.")
@click.option("--show-statistics", is_flag=True, help="Print what the result says of each weight.")
def command(model: str | None, text: Path | None, output: Path, in_files: tuple[Path, ...], **values: Any) -> None:
    """Measure which inputs matter to a model's weights.

    The squares of the inputs of every matrix, summed over a calibration text: what `edgellm quantize --imatrix` and
    llama-quantize weigh errors with. With --in-file sums of earlier runs are added; without MODEL they are only
    merged, or shown.

    \b
    Examples:
      edgellm imatrix model-f16.gguf -f calibration.txt -o model.imatrix.gguf
      edgellm imatrix --in-file a.gguf --in-file b.gguf -o both.gguf
      edgellm imatrix --in-file model.imatrix.gguf --show-statistics
    """
    from edgellm.quantize.importance import Imatrix, read_imatrix, statistics, unmet_text, write_imatrix

    if (model is None) != (text is None):
        raise click.UsageError("MODEL and -f FILE go together.")
    if model is None and not in_files:
        raise click.UsageError("Give MODEL and -f FILE, or files of earlier runs with --in-file.")
    form = values["output_format"] or ("dat" if output.suffix == ".dat" else "gguf")
    known = [read_imatrix(path) for path in in_files]
    total = Imatrix(chunk_size=known[0].chunk_size if known else values["n_ctx"])
    for part in known:
        total.merge(part)
    if model is not None and text is not None:
        total.merge(_collect(model, text, values))
    if model is not None or not values["show_statistics"] or len(in_files) > 1:
        write_imatrix(output, total, form)
        echo(f"{output}: {len(total.squares)} weights, {total.n_chunks} chunks of {total.chunk_size}")
        if unmet := total.unmet:
            echo(f"experts that the text never met: {unmet_text(unmet)}. A longer or more varied one may.", err=True)
    if values["show_statistics"]:
        headings = ("weight", "sum of x^2", "min", "max", "mean", "sigma", "active", "n", "entropy", "of max", "ZD")
        rows = [
            (
                row.name, f"{row.total:.2f}", f"{row.least:.4f}", f"{row.most:.4f}", f"{row.mean:.4f}",
                f"{row.sigma:.4f}", f"{row.active:.2%}", str(row.n), f"{row.entropy:.4f}",
                f"{row.normal_entropy:.2%}", f"{row.zd:.2%}", f"{row.cosine:.4f}",
            )
            for row in statistics(total)
        ]  # fmt: skip
        echo(table((*headings, "cosine"), rows, right=range(1, 12)))


def _collect(model: str, text: Path, values: dict[str, Any]) -> Imatrix:
    """Run the text through the model, with the rate and the time left on standard error."""
    from edgellm.quantize.importance import collect

    words, first = read_text(text), values["first"]
    with ProgressBar() as progress:
        path = fetched(model, progress)
    with chunk_model(path, values) as own:
        chunks = own.chunks(own.ids(words))
        if first >= len(chunks):
            raise ParameterError(f"--chunk is {first}, the text has {len(chunks)} chunks. Leave out fewer.")
        chunks = chunks[first:][: values["n_chunks"]]
        steps = collect(own, chunks, text.name, values["process_output"])
        return deque(counted(steps, len(chunks), own.n_ctx), maxlen=1).pop()  # each has all before it
