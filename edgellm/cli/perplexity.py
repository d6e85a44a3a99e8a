"""``edgellm perplexity``: how well a model predicts a text, and how far its answers stand from a base's."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from edgellm.cli.models import fetched
from edgellm.cli.options import FILE, TypedPath, cache_type_values, chunk_model, chunk_options, device_values
from edgellm.cli.progress import ProgressBar
from edgellm.formats.text_file import read_text
from edgellm.machine.terminal import echo, fields, json_text

if TYPE_CHECKING:
    from edgellm.measure.divergence import Comparison
    from edgellm.measure.perplexity import Chunk, ChunkModel

T = TypeVar("T")


@click.command("perplexity")
@click.argument("model", metavar="MODEL")
@click.option("-f", "--file", "text", type=FILE, help="The text, UTF-8.")
@chunk_options
@click.option("--save-logits", type=TypedPath(), metavar="FILE", help="Keep the answers as a base for others.")
@click.option("--kl-divergence", "diverge", is_flag=True, help="Compare with the base of --kl-divergence-base.")
@click.option(
    "--kl-divergence-base",
    "base",
    type=TypedPath(),
    metavar="FILE",
    help="A file of --save-logits, llama-perplexity's format. Without --kl-divergence it is written.",
)
@click.option("--against", metavar="MODEL", help="Compare with this model, run beside with f16 keys and values.")
@click.option("--json", "as_json", is_flag=True, help="Write one line of JSON.")
def command(model: str, text: Path | None, as_json: bool, **values: Any) -> None:
    """Measure how well a model predicts a text.

    llama-perplexity's procedure: chunks start from nothing, the tokens of the second half of each are scored. With
    --kl-divergence or --against it also shows how far the answers stand from those of a base.

    \b
    Examples:
      edgellm perplexity model.gguf -f text.txt
      edgellm perplexity big-f16.gguf -f text.txt --save-logits base.kld
      edgellm perplexity small-q4.gguf --kl-divergence-base base.kld --kl-divergence
      edgellm perplexity small-q4.gguf -f text.txt --against big-f16.gguf
    """
    diverge, base, against = values["diverge"], values["base"], values["against"]
    written = values["save_logits"] or (None if diverge else base)
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

            saved = Base(base)
            with chunk_model(path, values, saved.n_ctx) as own:
                result = _against_base(own, saved, values["n_chunks"])
        else:
            with chunk_model(path, values) as own:
                ids = own.ids(words)
                chunks = own.chunks(ids, values["n_chunks"])
                if against:
                    with chunk_model(fetched(against, progress), values, is_base=True) as other:
                        result = _against_model(own, other, chunks)
                else:
                    result = _alone(own, ids, chunks, written)
    figures = {
        "model": path.name,
        "text": text.name if text else None,
        **device_values(values),
        **cache_type_values(values),
        **result,
    }
    echo(json_text(figures, indent=None) if as_json else fields(figure_lines(result)))


def _alone(model: ChunkModel, ids: Sequence[int], chunks: Sequence[Chunk], written: Path | None) -> dict[str, Any]:
    """Perplexity alone, the answers kept when a file is named."""
    import numpy as np

    from edgellm.measure.divergence import base_writer
    from edgellm.measure.perplexity import Perplexity, negative_log_likelihoods

    losses: list[np.ndarray] = []
    n_ctx, n = model.n_ctx, len(chunks)

    def so_far() -> str:
        value = Perplexity.of(np.concatenate(losses))
        return f"perplexity {value.value:.4f} ± {value.error:.4f}  "

    if written is None:
        for loss in counted(model.losses(chunks), n, n_ctx, so_far):
            losses.append(loss)
    else:
        with base_writer(written, ids, n_ctx, n, model.program.n_vocab) as write:
            for chunk, logits in counted(((c, model.logits(c)) for c in chunks), n, n_ctx, so_far):
                losses.append(negative_log_likelihoods(logits, chunk.targets))
                write(logits)
    result = Perplexity.of(np.concatenate(losses))
    return {
        "n_ctx": n_ctx,
        "chunks": n,
        "scored": result.n_scored,
        "perplexity": result.value,
        "perplexity_error": result.error,
    }


def counted(steps: Iterable[T], n: int, n_ctx: int, so_far: Callable[[], str] = str) -> Iterator[T]:
    """The steps, with the figures ``so_far``, the rate and the time left on standard error."""
    start = time.perf_counter()
    for done, step in enumerate(steps, 1):
        yield step
        seconds = time.perf_counter() - start
        rate, left = done * n_ctx / seconds, seconds / done * (n - done)
        echo(f"chunk {done}/{n}  {so_far()}{rate:.0f} tokens/s  {left:.0f} s left", err=True)


def _against_base(model: ChunkModel, base: Any, n_chunks: int | None) -> dict[str, Any]:
    from edgellm.measure.divergence import compare_with_base

    n = min(base.n_chunks, n_chunks or base.n_chunks)
    known = {"n_ctx": base.n_ctx, "chunks": n, "base": base.path.name}
    return known | compared(compare_with_base(model, base, n), n)


def _against_model(model: ChunkModel, base: ChunkModel, chunks: Sequence[Chunk]) -> dict[str, Any]:
    from edgellm.measure.divergence import compare_models

    known = {"n_ctx": model.n_ctx, "chunks": len(chunks), "base": base.gguf.path.name}
    return known | compared(compare_models(model, base, chunks), len(chunks))


def compared(steps: Iterable[Comparison], n: int) -> dict[str, Any]:
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


FIGURES = (  # what people call it, its name, digits behind the point, unit
    ("perplexity", "perplexity", 4, ""),
    ("of the base", "base_perplexity", 4, ""),
    ("ln(ratio)", "ln_perplexity_ratio", 6, ""),
    ("KL mean", "mean_kl", 6, ""),
    ("KL median", "median_kl", 6, ""),
    ("KL 90 %", "p90_kl", 6, ""),
    ("KL 99 %", "p99_kl", 6, ""),
    ("KL max", "max_kl", 6, ""),
    ("same top", "same_top", 3, " %"),
    ("RMS change of p", "rms_change", 3, " %"),
    ("mean change of p", "mean_change", 3, " %"),
)


def figure_lines(result: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The figures as people read them, each with its error where it has one."""
    yield "chunks", f"{result['chunks']} of {result['n_ctx']} tokens, {result['scored']} tokens scored"
    for heading, name, digits, unit in FIGURES:
        if name in result:
            numbers = [number for number in (result[name], result.get(f"{name}_error")) if number is not None]
            yield heading, " ± ".join(f"{100 * n if unit else n:.{digits}f}" for n in numbers) + unit
