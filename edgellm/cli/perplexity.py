"""``edgellm perplexity``: how well a model foretells a text, and how far its answers stand from a base's."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from edgellm.cli.models import fetched
from edgellm.cli.path_type import TypedPath
from edgellm.cli.progress import ProgressBar
from edgellm.formats.text_file import read_text
from edgellm.machine.terminal import echo, fields, json_text

if TYPE_CHECKING:
    from edgellm.measure.divergence import Comparison
    from edgellm.measure.perplexity import Chunk, ChunkModel

T = TypeVar("T")

TEXT_FILE = TypedPath(exists=True)


@click.command("perplexity")
@click.argument("model", metavar="MODEL")
@click.option("-f", "--file", "text", type=TEXT_FILE, help="The text, UTF-8.")
@click.option(
    "-c", "--ctx-size", "n_ctx", type=click.IntRange(4), default=512, show_default=True, help="Tokens of a chunk."
)
@click.option("--chunks", "n_chunks", type=click.IntRange(1), default=None, help="Stop after so many.  [default: all]")
@click.option("-t", "--threads", "n_threads", type=click.IntRange(1), default=None, help="[default: physical cores]")
@click.option("--executor", type=click.Choice(["cpu", "reference"]), default="cpu", help="What computes.")
@click.option("--save-logits", type=TypedPath(), metavar="FILE", help="Keep the answers as a base for others.")
@click.option("--kl-divergence", "diverge", is_flag=True, help="Compare with the base of --kl-divergence-base.")
@click.option(
    "--kl-divergence-base",
    "base",
    type=TypedPath(),
    metavar="FILE",
    help="A file of --save-logits, llama-perplexity's format. Without --kl-divergence it is written.",
)
@click.option("--against", metavar="MODEL", help="Compare with this model, run beside.")
@click.option("--json", "as_json", is_flag=True, help="Write one line of JSON.")
def command(
    model: str,
    text: Path | None,
    n_ctx: int,
    n_chunks: int | None,
    n_threads: int | None,
    executor: str,
    save_logits: Path | None,
    diverge: bool,
    base: Path | None,
    against: str | None,
    as_json: bool,
) -> None:
    """Measure how well a model foretells a text.

    llama-perplexity's procedure: chunks start from nothing, the tokens of the second half of each are scored. With
    --kl-divergence or --against it also shows how far the answers stand from those of a base.

    \b
    Examples:
      edgellm perplexity model.gguf -f text.txt
      edgellm perplexity big-f16.gguf -f text.txt --save-logits base.kld
      edgellm perplexity small-q4.gguf --kl-divergence-base base.kld --kl-divergence
      edgellm perplexity small-q4.gguf -f text.txt --against big-f16.gguf
    """
    from edgellm.measure.perplexity import ChunkModel

    written = save_logits or (None if diverge else base)
    if diverge and (base is None or against):
        raise click.UsageError("--kl-divergence needs --kl-divergence-base FILE, and goes without --against.")
    if text is None and not diverge:
        raise click.UsageError("Give the text with -f FILE.")
    if written and (diverge or against):
        raise click.UsageError("A base is written in a run of its own: leave --kl-divergence and --against out.")
    words = read_text(text) if text is not None and not diverge else ""
    with ProgressBar() as progress:
        path = fetched(model, progress)
        if diverge:
            from edgellm.measure.divergence import Base

            assert base is not None, "checked above"
            saved = Base(base)
            with ChunkModel(path, saved.n_ctx, executor=executor, n_threads=n_threads) as own:
                result = _against_base(own, saved, n_chunks)
        else:
            with ChunkModel(path, n_ctx, executor=executor, n_threads=n_threads) as own:
                ids = own.ids(words)
                chunks = own.chunks(ids, n_chunks)
                if against:
                    with ChunkModel(fetched(against, progress), n_ctx, executor=executor, n_threads=n_threads) as other:
                        result = _against_model(own, other, chunks)
                else:
                    result = _alone(own, ids, chunks, written)
    figures = {"model": path.name, "text": text.name if text else None, "executor": executor, **result}
    echo(json_text(figures, indent=None) if as_json else fields(figure_lines(result)))


def _alone(model: ChunkModel, ids: Sequence[int], chunks: Sequence[Chunk], written: Path | None) -> dict[str, Any]:
    """Perplexity alone, the answers kept when a file is named."""
    import numpy as np

    from edgellm.measure.divergence import base_writer
    from edgellm.measure.perplexity import Perplexity, negative_log_likelihoods

    losses: list[np.ndarray] = []
    n_ctx = model.n_ctx
    if written is None:
        for loss in _told(model.losses(chunks), losses, len(chunks), n_ctx):
            losses.append(loss)
    else:
        with base_writer(written, ids, n_ctx, len(chunks), model.program.n_vocab) as write:
            for chunk, logits in _told(((c, model.logits(c)) for c in chunks), losses, len(chunks), n_ctx):
                losses.append(negative_log_likelihoods(logits, chunk.targets))
                write(logits)
    result = Perplexity.of(np.concatenate(losses))
    return {
        "n_ctx": n_ctx,
        "chunks": len(chunks),
        "scored": result.n_scored,
        "perplexity": result.value,
        "perplexity_error": result.error,
    }


def _told(steps: Iterable[T], losses: list[Any], n: int, n_ctx: int) -> Iterator[T]:
    """The steps, with the running value of ``losses``, the rate and the time left on standard error."""
    import numpy as np

    from edgellm.measure.perplexity import Perplexity

    start = time.perf_counter()
    for done, step in enumerate(steps, 1):
        yield step
        seconds = time.perf_counter() - start
        so_far = Perplexity.of(np.concatenate(losses))
        echo(
            f"chunk {done}/{n}  perplexity {so_far.value:.4f} ± {so_far.error:.4f}  "
            f"{done * n_ctx / seconds:.0f} tokens/s  {seconds / done * (n - done):.0f} s left",
            err=True,
        )


def _against_base(model: ChunkModel, base: Any, n_chunks: int | None) -> dict[str, Any]:
    from edgellm.measure.divergence import compare_with_base

    n = min(base.n_chunks, n_chunks or base.n_chunks)
    return {"n_ctx": base.n_ctx, "chunks": n, "base": base.path.name} | told_comparison(
        compare_with_base(model, base, n), n
    )


def _against_model(model: ChunkModel, base: ChunkModel, chunks: Sequence[Chunk]) -> dict[str, Any]:
    from edgellm.measure.divergence import compare_models

    known = {"n_ctx": model.n_ctx, "chunks": len(chunks), "base": base.gguf.path.name}
    return known | told_comparison(compare_models(model, base, chunks), len(chunks))


def told_comparison(steps: Iterable[Comparison], n: int) -> dict[str, Any]:
    """The figures of a comparison, with running values on standard error."""
    from edgellm.measure.divergence import Comparison

    parts: list[Comparison] = []
    for part in steps:
        parts.append(part)
        so_far = Comparison.joined(parts).figures()
        echo(
            f"chunk {len(parts)}/{n}  perplexity {so_far['perplexity']:.4f}  KL {so_far['mean_kl']:.6f} ± "
            f"{so_far['mean_kl_error']:.6f}  same top {so_far['same_top']:.2%}",
            err=True,
        )
    return Comparison.joined(parts).figures()


def figure_lines(result: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The figures as people read them."""

    def value(name: str, form: str = ".6f", scale: float = 1.0) -> str:
        error = result.get(f"{name}_error")
        text = f"{scale * result[name]:{form}}"
        return text if error is None else f"{text} ± {scale * error:{form}}"

    yield "chunks", f"{result['chunks']} of {result['n_ctx']} tokens, {result['scored']} tokens scored"
    yield "perplexity", value("perplexity", ".4f")
    if "mean_kl" in result:
        yield from _comparison_lines(result, value)


def _comparison_lines(result: dict[str, Any], value: Any) -> Iterator[tuple[str, str]]:
    """The figures of a comparison as people read them."""
    yield "of the base", value("base_perplexity", ".4f")
    yield "ln(ratio)", value("ln_perplexity_ratio")
    yield "KL mean", value("mean_kl")
    yield "KL median", value("median_kl")
    yield "KL 90 %", value("p90_kl")
    yield "KL 99 %", value("p99_kl")
    yield "KL max", value("max_kl")
    yield "same top", value("same_top", ".3f", 100) + " %"
    yield "RMS change of p", value("rms_change", ".3f", 100) + " %"
    yield "mean change of p", value("mean_change", ".3f", 100) + " %"
