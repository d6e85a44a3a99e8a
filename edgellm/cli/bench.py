"""``edgellm bench``: tokens per second, with the flags, columns and JSON names of llama-bench."""

from __future__ import annotations

import csv
import functools
import io
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from edgellm.arguments import MAX_CONTEXT, MAX_THREADS, MAX_TOKENS_PER_STEP
from edgellm.cli.adapter_options import adapter_options, adapter_values
from edgellm.cli.models import fetched
from edgellm.cli.options import (
    WholeNumber,
    cache_type_options,
    cache_type_values,
    device_options,
    device_values,
    draft_option,
    override_option,
)
from edgellm.cli.progress import ProgressBar
from edgellm.machine.terminal import echo, human_bytes, human_count, json_text

if TYPE_CHECKING:
    from edgellm.kernels.program import Executor, Program
    from edgellm.measure.bench import BenchResult, BenchTest
    from edgellm.measure.model_card import ModelCard

COLUMNS = ("model", "size", "params", "backend", "threads", "test", "t/s", "bandwidth")
_RANGE = re.compile(r"(\d{1,9})(?:-(\d{1,9})(?:([+*])(\d{1,9}))?)?", re.ASCII)
MAX_VALUES = 1000


def parse_list(text: str, most: int = MAX_CONTEXT) -> list[int]:
    """``512``, ``128,256`` or llama-bench's ranges ``1-4``, ``64-256+64`` and ``64-512*2``; numbers up to ``most``."""
    values: list[int] = []
    for part in text.split(","):
        found = _RANGE.fullmatch(part.strip())
        if found is None:
            raise click.UsageError(f"{text!r} is not a list of numbers; write 512 or 128,256 or 64-512*2.")
        first, last, operator, step = int(found[1]), int(found[2] or found[1]), found[3] or "+", int(found[4] or 1)
        if step < 1 or (operator == "*" and (step < 2 or first < 1)):
            raise click.UsageError(f"{text!r} never ends; a range needs a step that grows.")
        if first > last:
            raise click.UsageError(f"{text!r} has a range that goes down; write the smaller number first.")
        while first <= last:
            values.append(first)
            if len(values) > MAX_VALUES:
                raise click.UsageError(f"{text!r} has more than {MAX_VALUES} values. Take a larger step.")
            first = first + step if operator == "+" else first * step
    if max(values, default=0) > most:
        raise click.UsageError(f"{text!r} has the number {max(values)}; up to {most} was expected.")
    return values


def _parse_pairs(texts: tuple[str, ...]) -> list[tuple[int, int]]:
    pairs = []
    for text in texts:
        found = re.fullmatch(r"(\d{1,9}),(\d{1,9})", text, re.ASCII)
        if found is None or max(int(found[1]), int(found[2])) > MAX_CONTEXT:
            raise click.UsageError(f"-pg is {text!r}; expected two numbers such as 512,128.")
        pairs.append((int(found[1]), int(found[2])))
    return pairs


@click.command("bench")
@click.argument("models", nargs=-1, metavar="[MODEL]...")
@click.option("-m", "--model", "more_models", multiple=True, help="A model; may be given more than once.")
@click.option("-p", "--n-prompt", "n_prompt", default="512", show_default=True, metavar="LIST", help="Prompt tokens.")
@click.option("-n", "--n-gen", "n_gen", default="128", show_default=True, metavar="LIST", help="Tokens to make.")
@click.option("-pg", "pairs", multiple=True, metavar="PP,TG", help="Read PP tokens and make TG in one test.")
@click.option("-d", "--n-depth", "n_depth", default="0", show_default=True, metavar="LIST", help="Tokens in the cache.")
@click.option("-np", "--parallel", default="1", show_default=True, metavar="LIST", help="Texts that grow together.")
@click.option("-r", "--repetitions", type=WholeNumber(1), default=5, show_default=True, help="Times for each test.")
@click.option("-t", "--threads", default=None, metavar="LIST", help="Threads.  [default: physical cores]")
@click.option(
    "-ub",
    "--ubatch-size",
    "n_ubatch",
    type=WholeNumber(1, MAX_TOKENS_PER_STEP),
    default=512,
    show_default=True,
    help="Step size.",
)
@click.option("-o", "--output", type=click.Choice(["md", "json", "jsonl", "csv"]), default="md", help="Form.")
@device_options
@adapter_options
@draft_option
@cache_type_options
@click.option("--no-warmup", is_flag=True, help="Count the first, colder run too.")
@override_option
@click.option("--no-bandwidth", is_flag=True, help="Do not measure how fast this machine reads memory.")
def command(models: tuple[str, ...], more_models: tuple[str, ...], output: str, **options: Any) -> None:
    """Measure tokens per second, as llama-bench does.

    pp512 reads a prompt of 512 tokens, tg128 makes 128 tokens, "@ d512" does it behind 512 tokens in the cache, "x 16"
    for 16 texts together. A LIST is numbers with commas between, or a range such as 64-512*2. The warm-up is not
    counted. The last line of output is JSON under llama-bench's names. The column "bandwidth" is the share of this
    machine's memory bandwidth that decoding reaches: the bytes a token must read, against the best order to read them,
    on a GPU against a plain copy of its memory. With "1 of 2" threads decoding was faster with one.
    With --draft, answers to a text are measured too ("tg128 drafted").

    \b
    Examples:
      edgellm bench -m smollm2
      edgellm bench -m model.gguf -p 512 -n 64 -d 0,4096 -t 1,2 -r 3
      edgellm bench -m model.gguf -p 0 -n 64 -np 1,4,16
    """
    from edgellm.kernels import executors
    from edgellm.store import DEFAULT_MODEL

    executors.check_split(**device_values(options))
    options["executor"] = executors.resolved(options["executor"])
    records: list[dict[str, Any]] = []

    def report(result: BenchResult, card: ModelCard) -> None:
        records.append(result.record(card, options["n_ubatch"], options["executor"], options["gpu_layers"]))
        if output == "md" and len(records) == 1:  # not before: there may be none
            _print_row(COLUMNS)
            _print_row(["---", "---:", "---:", "---", "---:", "---:", "---:", "---:"])
        if output == "md":
            _print_row(_cells(result, card, records[-1]["backends"]))
        elif output == "jsonl":
            echo(json_text(records[-1], indent=None))

    for name in (*models, *more_models) or (DEFAULT_MODEL,):
        _bench_model(name, options, report)
    if output == "csv":
        _print_csv(records)
    elif output != "jsonl":
        echo(json_text(records, indent=None))


def _bench_model(name: str, options: dict[str, Any], report: Callable[[BenchResult, ModelCard], None]) -> None:
    from edgellm.formats.gguf import GGUFFile
    from edgellm.kernels import executors
    from edgellm.kernels.chosen_blocks import read_throughout, with_kept_keys
    from edgellm.kernels.executors import open_executor
    from edgellm.kernels.typed_cache import with_cache_types
    from edgellm.measure.bench import bench_tests, longest, run_tests, tests_of
    from edgellm.measure.model_card import model_card
    from edgellm.models import build_program

    together, n_ubatch = parse_list(options["parallel"]), options["n_ubatch"]
    if not all(1 <= n <= n_ubatch for n in together):
        raise click.UsageError(
            f"-np is {options['parallel']}; a step of {n_ubatch} tokens makes 1 to {n_ubatch} texts grow."
        )
    n_prompt, n_gen, n_depth = (parse_list(options[name]) for name in ("n_prompt", "n_gen", "n_depth"))
    tests = bench_tests(n_prompt, n_gen, n_depth, _parse_pairs(options["pairs"]), together)
    if not tests:
        raise click.UsageError("there is nothing to measure: -p and -n are both 0. Give one of them.")
    counts = _thread_counts(options["threads"])
    with ProgressBar() as progress:
        make = functools.partial(
            open_executor, options["executor"], max_tokens=n_ubatch, on_compile=progress.of("compile"),
            gpu_layers=options["gpu_layers"], cpu_moe=options["cpu_moe"],
        )  # fmt: skip
        with GGUFFile.open(fetched(name, progress), options["overrides"]) as gguf:
            program, card = build_program(gguf), model_card(gguf)
            if adapters := adapter_values(options):
                program, make = _with_adapters(program, make, {**device_values(options), **adapters})
            program = with_cache_types(program, options["cache_type_k"], options["cache_type_v"])
            keep = read_throughout("--kv-keep", options["kv_keep"])
            program = with_kept_keys(program, keep, longest(tests))
            tests = tests_of(program, tests, n_ubatch)
            for n_threads in counts:
                bandwidth = None
                if not options["no_bandwidth"] and options["gpu_layers"] == "auto" and not options["cpu_moe"]:
                    progress.note("measuring how fast the memory is read")
                    bandwidth = executors.bandwidth(options["executor"], n_threads)

                def started(test: BenchTest, n_threads: int = n_threads) -> None:
                    progress.note(f"measuring {test.name} with {n_threads} threads")

                for result in run_tests(
                    program,
                    tests,
                    functools.partial(make, program, n_threads=n_threads),
                    n_threads=n_threads,
                    repetitions=options["repetitions"],
                    n_ubatch=n_ubatch,
                    warmup=not options["no_warmup"],
                    read_bandwidth=bandwidth,
                    on_start=started,
                ):
                    progress.finish()
                    report(result, card)
                if result.large_page_share is not None:
                    progress.note(f"{result.large_page_share:.0%} of the file is mapped by large pages")
    if options["draft"] is not None:
        _bench_drafted(name, n_gen, counts, options, lambda result: report(result, card))


def _thread_counts(text: str | None) -> list[int]:
    """Those of ``-t``, or that of the machine."""
    from edgellm.machine.cores import default_threads

    counts = parse_list(text, MAX_THREADS) if text else [default_threads()]
    if 0 in counts:
        raise click.UsageError("-t is 0; a test needs at least one thread.")
    return counts


def _bench_drafted(
    name: str, n_gen: list[int], counts: list[int], options: dict[str, Any], report: Callable[[BenchResult], None]
) -> None:
    """The same answers' lengths with a draft model, through the library."""
    import edgellm
    from edgellm.measure.bench import run_drafted

    for n_threads in counts:
        with ProgressBar() as progress:
            llm = edgellm.load(
                name, n_threads=n_threads, draft=options["draft"], kv_overrides=options["overrides"] or None,
                n_ctx=max(n_gen) + 128, progress=progress.update, **device_values(options),
                **adapter_values(options), **cache_type_values(options),
            )  # fmt: skip
        with llm:
            given = {"repetitions": options["repetitions"], "warmup": not options["no_warmup"]}
            for result in run_drafted(llm, n_gen, n_threads=n_threads, **given):
                report(result)


def _with_adapters(program: Program, make: Callable[..., Executor], options: dict[str, Any]) -> tuple[Program, Any]:
    """The program with adapters, and what makes executors all of whose tokens have them."""
    from edgellm.adapters.constant import WithAdapters
    from edgellm.loading import LoadOptions, with_adapters

    changed, loaded = with_adapters(program, LoadOptions(**options))
    return changed, lambda *args, **more: WithAdapters(make(*args, **more), loaded.scales)


def _cells(result: BenchResult, card: ModelCard, backend: str) -> list[str]:
    share = result.bandwidth_share
    fewer = None if result.decode_threads == result.n_threads else result.decode_threads
    return [
        card.model_type,
        human_bytes(card.nbytes),
        human_count(card.n_params),
        backend,
        str(result.n_threads) if fewer is None else f"{fewer} of {result.n_threads}",
        result.test.name,
        f"{result.mean:.2f} ± {result.deviation:.2f}",
        "-" if share is None else f"{share:.0%}",
    ]


def _print_row(cells: Any) -> None:
    echo(f"| {' | '.join(cells)} |")


def _print_csv(records: list[dict[str, Any]]) -> None:
    written = io.StringIO()
    writer = csv.DictWriter(written, records[0], quoting=csv.QUOTE_ALL, lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    echo(written.getvalue(), nl=False)
