"""``edgellm batch``: a file of requests, answered line by line into another."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import click

from edgellm.cli.options import FILE, TypedPath
from edgellm.cli.progress import ProgressBar
from edgellm.cli.serving_options import model_options, models_of, needs_extra
from edgellm.machine.terminal import echo


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
    type=click.IntRange(1, 4096),
    default=64,
    show_default=True,
    metavar="N",
    help="Lines under way at once.",
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
    """
    try:
        from edgellm.server.batch import answer_batch
        from edgellm.server.batch_file import Answers, Requests, check_apart
        from edgellm.server.server import Server
    except ImportError as error:
        raise needs_extra("batch", error) from error
    check_apart(requests, answers)
    started = time.monotonic()
    with Requests(requests) as given, Answers(answers, {place.id for place in given.places}) as done, \
            ProgressBar() as progress:  # fmt: skip
        server = Server(models_of(models, values, progress, interactive=False), max_requests=1 << 30)

        async def run() -> Any:
            try:
                return await answer_batch(server, given, done, progress.of("batch", requests.name), at_once)
            finally:
                await server.models.close()

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
