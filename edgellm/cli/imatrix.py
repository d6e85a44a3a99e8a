"""``edgellm imatrix``: which inputs of a model's weights matter, measured over a text."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgellm.cli.models import fetched
from edgellm.cli.path_type import TypedPath
from edgellm.cli.perplexity import TEXT_FILE
from edgellm.cli.progress import ProgressBar
from edgellm.formats.errors import ParameterError
from edgellm.formats.text_file import read_text
from edgellm.machine.terminal import echo, table

if TYPE_CHECKING:
    from edgellm.quantize.importance import Imatrix


@click.command("imatrix")
@click.argument("model", required=False, metavar="[MODEL]")
@click.option("-f", "--file", "text", type=TEXT_FILE, help="The calibration text, UTF-8.")
@click.option("-o", "--output", type=TypedPath(), default=Path("imatrix.gguf"), show_default=True, help="The file.")
@click.option("--output-format", type=click.Choice(["gguf", "dat"]), help="[default: dat for a name that ends so]")
@click.option("--in-file", "in_files", type=TEXT_FILE, multiple=True, metavar="FILE", help="Add this one; repeatable.")
@click.option(
    "-c", "--ctx-size", "n_ctx", type=click.IntRange(4), default=512, show_default=True, help="Tokens of a chunk."
)
@click.option("--chunks", "n_chunks", type=click.IntRange(1), default=None, help="Stop after so many.  [default: all]")
@click.option("--chunk", "first", type=click.IntRange(0), default=0, help="Leave out so many first.")
@click.option("--process-output", is_flag=True, help="The output matrix too.")
@click.option("--show-statistics", is_flag=True, help="Print what the result says of each weight.")
@click.option("-t", "--threads", "n_threads", type=click.IntRange(1), default=None, help="[default: physical cores]")
@click.option("--executor", type=click.Choice(["cpu", "reference"]), default="cpu", help="What computes.")
def command(
    model: str | None,
    text: Path | None,
    output: Path,
    output_format: str | None,
    in_files: tuple[Path, ...],
    n_ctx: int,
    n_chunks: int | None,
    first: int,
    process_output: bool,
    show_statistics: bool,
    n_threads: int | None,
    executor: str,
) -> None:
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
    from edgellm.quantize.importance import Imatrix, read_imatrix, statistics, write_imatrix

    if (model is None) != (text is None):
        raise click.UsageError("MODEL and -f FILE go together.")
    if model is None and not in_files:
        raise click.UsageError("Give MODEL and -f FILE, or files of earlier runs with --in-file.")
    form = output_format or ("dat" if output.suffix == ".dat" else "gguf")
    known = [read_imatrix(path) for path in in_files]
    total = Imatrix(chunk_size=known[0].chunk_size if known else n_ctx)
    for part in known:
        total.merge(part)
    if model is not None and text is not None:
        own = _collect(model, text, n_ctx, n_chunks, first, process_output, n_threads, executor)
        total.merge(own)
    if model is not None or not show_statistics or len(in_files) > 1:
        write_imatrix(output, total, form)
        echo(f"{output}: {len(total.squares)} weights, {total.n_chunks} chunks of {total.chunk_size}")
    if show_statistics:
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


def _collect(
    model: str,
    text: Path,
    n_ctx: int,
    n_chunks: int | None,
    first: int,
    outputs: bool,
    n_threads: int | None,
    executor: str,
) -> Imatrix:
    """Run the text through the model, with the rate and the time left on standard error."""
    from edgellm.measure.perplexity import ChunkModel
    from edgellm.quantize.importance import collect

    words = read_text(text)
    with ProgressBar() as progress:
        path = fetched(model, progress)
    with ChunkModel(path, n_ctx, executor=executor, n_threads=n_threads) as own:
        chunks = own.chunks(own.ids(words))
        if first >= len(chunks):
            raise ParameterError(f"--chunk is {first}, the text has {len(chunks)} chunks. Leave out fewer.")
        chunks = chunks[first:][:n_chunks]
        start = time.perf_counter()
        result: Imatrix | None = None
        for done, so_far in enumerate(collect(own, chunks, text.name, outputs), 1):
            result = so_far
            seconds = time.perf_counter() - start
            echo(
                f"chunk {done}/{len(chunks)}  {done * n_ctx / seconds:.0f} tokens/s  "
                f"{seconds / done * (len(chunks) - done):.0f} s left",
                err=True,
            )
    assert result is not None, "there is at least one chunk"
    return result
