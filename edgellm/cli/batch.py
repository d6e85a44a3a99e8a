"""``edgellm batch``: a file of requests, answered line by line into another."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgellm.cli.options import FILE, TypedPath, WholeNumber
from edgellm.cli.progress import ProgressBar
from edgellm.cli.serving_options import begin_ray, load_options, model_options, models_of, needs_extra
from edgellm.machine.terminal import echo

if TYPE_CHECKING:
    from edgellm.server.batch import Answering


@click.command("batch")
@click.argument("requests", type=FILE, metavar="IN.jsonl")
@click.argument("answers", type=TypedPath(), metavar="OUT.jsonl")
@click.option(
    "-m",
    "--model",
    "models",
    multiple=True,
    metavar="MODEL",
    help="What lines may ask for, more than once; a line without a model means the first.  [default: all]",
)
@click.option(
    "--at-once",
    type=WholeNumber(1, 4096),
    default=64,
    show_default=True,
    metavar="N",
    help="Lines under way at once, of each worker.",
)
@click.option("--ray", is_flag=True, help="Answer by workers on the machines of a Ray cluster.")
@click.option("--ray-address", metavar="ADDRESS", help="One that runs; auto is this machine's.  [default: start one]")
@click.option(
    "--workers",
    type=WholeNumber(1, 4096),
    default=None,
    metavar="N",
    help="With --ray: processes that have the models, each with --threads threads.  [default: 1]",
)
@model_options  # fmt: skip
def command(requests: Path, answers: Path, models: tuple[str, ...], at_once: int, **values: Any) -> int:
    """Answer a file of requests, a line for each.

    The form is that of OpenAI's batches: a line of IN.jsonl has custom_id, method, url and body, a line of OUT.jsonl
    has the custom_id and a response or an error, in the order in which they were done. Whatever stops it, the same
    command goes on where it was: each line is answered once. The exit status is 1 when lines have an error or are left.

    \b
    Examples:
      edgellm batch requests.jsonl answers.jsonl
      edgellm batch requests.jsonl answers.jsonl -m model.gguf -c 4096 --parallel 16
      edgellm batch requests.jsonl answers.jsonl -m smollm2 --ray-address auto --workers 8 -t 4
    """
    try:
        from edgellm.server.batch import answer_batch
        from edgellm.server.batch_file import Answers, Requests, check_apart
    except ImportError as error:
        raise needs_extra("batch", error) from error
    check_apart(requests, answers)
    started = time.monotonic()
    answering = _by_ray if values["ray"] or values["ray_address"] else _here
    with Requests(requests) as given, Answers(answers, {place.id for place in given.places}) as done, \
            ProgressBar() as progress, answering(models, values, progress) as by:  # fmt: skip

        async def run() -> Any:
            try:
                n = at_once * (values["workers"] or 1)
                return await answer_batch(by, given, done, progress.of("batch", requests.name), n)
            finally:
                await by.close()

        try:
            outcome = asyncio.run(run())
        except KeyboardInterrupt:
            progress.finish()
            echo(f"{len(done.done)} of {len(given.places)} lines are answered; the same command goes on.", err=True)
            raise
    n_new = outcome.n_lines - outcome.n_before - outcome.n_left
    wrong = f", {outcome.n_wrong} of them with an error" if outcome.n_wrong else ""
    before = f" ({outcome.n_before} were there)" if outcome.n_before else ""
    echo(f"{n_new} lines answered in {time.monotonic() - started:.1f} s{wrong}{before}: {answers}", err=True)
    if outcome.n_left:
        echo(f"{outcome.n_left} lines are left; the same command tries them again. {outcome.reason}", err=True)
    return 1 if outcome.n_left or outcome.n_wrong or done.n_wrong else 0


@contextmanager
def _here(models: tuple[str, ...], values: dict[str, Any], progress: ProgressBar) -> Iterator[Answering]:
    from edgellm.server.batch import Here
    from edgellm.server.server import Server

    if values["workers"] is not None:
        raise click.UsageError("--workers goes with --ray.")
    yield Here(Server(models_of(models, values, progress, interactive=False), max_requests=1 << 30))


@contextmanager
def _by_ray(models: tuple[str, ...], values: dict[str, Any], progress: ProgressBar) -> Iterator[Answering]:
    begin_ray(models, values)
    try:
        from edgellm.ray.batch import Workers
        from edgellm.ray.cluster import connected, from_anywhere
    except ImportError as error:
        raise needs_extra("batch --ray", error, "ray") from error
    names, options = from_anywhere(models, load_options(values, len(models)))
    with connected(values["ray_address"]):
        yield Workers(names, options, values["workers"] or 1)
