"""``edgellm bench``: the tests that flags ask for, what is counted, and llama-bench's columns and JSON names."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgellm
from edgellm.cli import main
from edgellm.cli.bench import COLUMNS, parse_list
from edgellm.formats.gguf import GGUFFile
from edgellm.kernels.executors import EXECUTORS
from edgellm.kernels.program import Batch, Program
from edgellm.kernels.reference import ReferenceExecutor
from edgellm.measure import bench
from edgellm.measure.bench import BenchResult, BenchTest, bench_tests, bytes_per_token, run_drafted, run_tests
from edgellm.measure.model_card import model_card
from edgellm.models import build_program

tiny_models = pytest.importorskip("tiny_models", reason="writing model files needs the package gguf")

# the fields of llama-bench's own JSON that describe a test and its result
LLAMA_BENCH_FIELDS = {
    *("build_commit", "build_number", "cpu_info", "gpu_info", "backends", "model_filename", "model_type"),
    *("model_size", "model_n_params", "n_batch", "n_ubatch", "n_threads", "type_k", "type_v", "n_gpu_layers"),
    *("use_mmap", "n_prompt", "n_gen", "n_depth", "test_time", "avg_ns", "stddev_ns", "avg_ts", "stddev_ts"),
    *("samples_ns", "samples_ts"),
}


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def model_path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("models") / f"{request.param}.gguf"
    tiny_models.write_tiny_model(path, request.param)
    return path


class RecordingExecutor(ReferenceExecutor):
    """Keeps what it was asked to run: (first position, tokens, logits wanted)."""

    batches: list[tuple[int, int, int]]

    def run(self, batch: Batch, hook: Any = None) -> Any:
        self.batches.append((int(batch.positions[0]), len(batch), int(batch.outputs.sum())))
        return super().run(batch, hook)


def recorded(program: Program, tests: list[BenchTest], **options: Any) -> tuple[list[BenchResult], list[Any]]:
    batches: list[Any] = []

    def make(n_blocks: Sequence[int]) -> RecordingExecutor:
        executor = RecordingExecutor(program, n_blocks)
        executor.batches = batches
        return executor

    return list(run_tests(program, tests, make, n_threads=1, **options)), batches


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("512", [512]),
        ("0", [0]),
        ("1,2, 4", [1, 2, 4]),
        ("1-4", [1, 2, 3, 4]),
        ("64-256+64", [64, 128, 192, 256]),
        ("64-512*2", [64, 128, 256, 512]),
        ("1,16-32+8", [1, 16, 24, 32]),
    ],
)
def test_lists_are_read_as_llama_bench_reads_them(text: str, values: list[int]) -> None:
    assert parse_list(text) == values


@pytest.mark.parametrize("text", ["", "a", "1,,2", "-1", "1-4*1", "0-8*2", "1-4+0", "1.5", "1-999999999"])
def test_a_list_that_is_none_or_never_ends_is_wrong_usage(text: str) -> None:
    assert main(["bench", "-m", "no-such-model", "-p", text]) == 2


def test_tests_have_llama_benchs_names_and_order() -> None:
    tests = bench_tests([512, 0], [128], [0, 512], [(64, 16)])
    assert [test.name for test in tests] == [
        "pp512",
        "tg128",
        "pp64+tg16",
        "pp512 @ d512",
        "tg128 @ d512",
        "pp64+tg16 @ d512",
    ]
    assert bench_tests([0], [0], [0]) == []
    assert [test.name for test in bench_tests([8], [4], [0], parallel=[1, 16])] == ["pp8", "tg4", "tg4 x 16"]


def test_a_result_is_mean_and_sample_deviation_of_the_rates() -> None:
    result = BenchResult(BenchTest(0, 10), 2, (1.0, 2.0, 4.0), 1000, 20_000.0)
    rates = (10.0, 5.0, 2.5)
    assert result.rates == rates
    assert result.mean == pytest.approx(sum(rates) / 3)
    assert result.deviation == pytest.approx(math.sqrt(sum((rate - result.mean) ** 2 for rate in rates) / 2))
    assert result.bandwidth_share == pytest.approx(result.mean * 1000 / 20_000)
    assert BenchResult(BenchTest(10, 0), 2, (1.0,), 1000, 20_000.0).bandwidth_share is None
    assert BenchResult(BenchTest(0, 10), 2, (1.0,), 1000, None).bandwidth_share is None


def test_what_is_measured_is_the_prompt_in_steps_then_one_token_at_a_time(model_path: Path) -> None:
    with GGUFFile.open(model_path) as gguf:
        results, batches = recorded(build_program(gguf), [BenchTest(5, 2, 3)], repetitions=2, n_ubatch=2, warmup=False)
    once = [(3, 2, 1), (5, 2, 1), (7, 1, 1), (8, 1, 1), (9, 1, 1)]
    assert batches == [(0, 2, 1), (2, 1, 1), *once, *once]
    assert len(results) == 1 and len(results[0].seconds) == 2


def test_texts_that_grow_together_give_a_token_each_in_every_step(model_path: Path) -> None:
    with GGUFFile.open(model_path) as gguf:
        program = build_program(gguf)
        test = BenchTest(0, 3, 33, n_parallel=4)
        seen: list[Batch] = []

        class Noting(ReferenceExecutor):
            def run(self, batch: Batch, hook: Any = None) -> Any:
                seen.append(batch)
                return super().run(batch, hook)

        list(
            run_tests(
                program, [test], lambda n_blocks: Noting(program, n_blocks), n_threads=1, repetitions=1, warmup=False
            )
        )
    assert [len(batch) for batch in seen] == [33, 33, 33, 33, 4, 4, 4]
    assert all((batch.positions == 33 + i).all() and batch.outputs.all() for i, batch in enumerate(seen[4:]))
    # a text's own blocks, the ones that its tokens before were written to
    assert [seen[4].tables[0][i, 0] for i in range(4)] == [batch.tables[0][0, 0] for batch in seen[:4]]
    assert len(np.unique(seen[4].tables[0])) == 8
    assert test.name == "tg3 x 4 @ d33" and test.n_tokens == 12


@pytest.mark.parametrize("architecture", ["qwen35", "lfm2", "mamba2"])
def test_a_state_is_a_slot_for_each_text_and_goes_on_there(architecture: str, tmp_path: Path) -> None:
    tiny_models.write_tiny_model(tmp_path / "m.gguf", architecture)
    tests = bench_tests([4], [6], [0, 33], [(40, 2)], parallel=[1, 3])
    with GGUFFile.open(tmp_path / "m.gguf") as gguf:
        program = build_program(gguf)
        pools = []

        def make(n_blocks: Sequence[int]) -> ReferenceExecutor:
            pools.append(dict(zip((group.kind for group in program.groups), n_blocks, strict=True)))
            return ReferenceExecutor(program, n_blocks)

        found = list(run_tests(program, tests, make, n_threads=1, repetitions=2, n_ubatch=16))
    assert [result.test for result in found] == tests
    assert [pool["state"] for pool in pools] == [3]


def test_the_warm_up_is_run_and_not_counted(model_path: Path) -> None:
    with GGUFFile.open(model_path) as gguf:
        results, batches = recorded(build_program(gguf), bench_tests([4], [6], [0]), repetitions=1)
    assert [len(result.seconds) for result in results] == [1, 1]
    assert len(batches) == 2 + 4 + 6  # pp4 twice, tg6 behind a warm-up of 4 tokens


def test_the_warm_up_goes_on_until_the_executor_has_settled(model_path: Path) -> None:
    class Settling(RecordingExecutor):
        @property
        def settled(self) -> bool:
            return len(self.batches) >= 30

    batches: list[Any] = []

    def make(n_blocks: Sequence[int]) -> Settling:
        executor = Settling(program, n_blocks)
        executor.batches = batches
        return executor

    with GGUFFile.open(model_path) as gguf:
        program = build_program(gguf)
        list(run_tests(program, bench_tests([], [6], [0]), make, n_threads=1, repetitions=2))
    assert len(batches) == 32 + 2 * 6
    assert {tokens for _, tokens, _ in batches} == {1}
    batches.clear()
    with GGUFFile.open(model_path) as gguf:
        program = build_program(gguf)
        list(run_tests(program, bench_tests([], [6], [0], parallel=[2]), make, n_threads=1, repetitions=2))
    assert len(batches) == 32 + 2 * 6
    assert {tokens for _, tokens, _ in batches} == {2}


def test_a_token_reads_every_weight_once_and_what_the_window_shows_of_the_cache(model_path: Path) -> None:
    with GGUFFile.open(model_path) as gguf:
        program = build_program(gguf)
        embedding = gguf.tensors["token_embd.weight"]
        everything = sum(tensor.nbytes for tensor in gguf.tensors.values())
        read = bytes_per_token(program, 0)
        tied = "output.weight" not in gguf.tensors
        expected = everything + embedding.data.shape[1] - (0 if tied else embedding.nbytes)
        assert read == expected
        per_position = sum(
            layer.n_kv_heads * (layer.head_dim_k + layer.head_dim_v) * 2 for layer in program.cache_layers
        )
        assert bytes_per_token(program, 1) - read == per_position
        windowed = [min(10_000, layer.window or 10_000) for layer in program.cache_layers]
        sizes = [layer.n_kv_heads * (layer.head_dim_k + layer.head_dim_v) * 2 for layer in program.cache_layers]
        assert bytes_per_token(program, 10_000) - read == sum(n * s for n, s in zip(windowed, sizes, strict=True))
        again = replace(program, ops=(*program.ops, *program.ops[1:]))  # every reader counts, and one row of Embed
        assert bytes_per_token(again, 10) == 2 * bytes_per_token(program, 10) - embedding.data.shape[1]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The numpy executor in place of compiled kernels, and a memory that needs no measuring."""
    monkeypatch.setitem(EXECUTORS, "cpu", EXECUTORS["reference"])
    monkeypatch.setattr("edgellm.kernels.cpu.run.read_bandwidth.read_bandwidth", lambda n_threads: 1e9)


def test_the_table_ends_with_a_line_of_json_in_llama_benchs_names(
    model_path: Path, quick: None, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["-m", str(model_path), "-p", "4", "-n", "2", "-d", "0,3", "-r", "2", "-t", "1,2"]
    assert main(["bench", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[:-1]]
    assert tuple(table[0]) == COLUMNS
    tests = ["pp4", "tg2", "pp4 @ d3", "tg2 @ d3"]
    assert [row[5] for row in table[2:]] == tests * 2
    assert [row[4].split()[-1] for row in table[2:]] == ["1"] * 4 + ["2"] * 4
    records = json.loads(lines[-1])
    with GGUFFile.open(model_path) as gguf:
        card = model_card(gguf)
    for record, row in zip(records, table[2:], strict=True):
        assert set(record) >= LLAMA_BENCH_FIELDS
        assert (record["model_size"], record["model_n_params"]) == (card.nbytes, card.n_params)
        fewer = record["decode_threads"] not in (None, record["n_threads"])
        assert (row[4] == f"{record['decode_threads']} of {record['n_threads']}") == fewer
        assert record["model_type"] == row[0] == card.model_type
        assert len(record["samples_ts"]) == len(record["samples_ns"]) == 2
        assert row[6] == f"{record['avg_ts']:.2f} ± {record['stddev_ts']:.2f}"
        assert (record["bandwidth_share"] is None) == (record["n_gen"] == 0) == (row[7] == "-")


@pytest.mark.parametrize("form", ["json", "jsonl", "csv"])
def test_other_forms_hold_the_same_records(
    model_path: Path, quick: None, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", str(model_path), "-p", "2", "-n", "1", "-r", "1", "-t", "1", "-o", form]) == 0
    text = capsys.readouterr().out
    if form == "json":
        records = json.loads(text)
    elif form == "jsonl":
        records = [json.loads(line) for line in text.splitlines()]
    else:
        records = list(csv.DictReader(io.StringIO(text)))
    assert [(int(record["n_prompt"]), int(record["n_gen"])) for record in records] == [(2, 0), (0, 1)]
    assert all(float(record["avg_ts"]) > 0 for record in records)


@pytest.mark.parametrize(
    "arguments", [["-p", "0", "-n", "0"], ["-t", "0"], ["-pg", "512"], ["-r", "0"], ["-o", "xml"], ["-ub", "0"]]
)
def test_nothing_to_measure_is_wrong_usage(model_path: Path, arguments: list[str]) -> None:
    assert main(["bench", "-m", str(model_path), *arguments]) == 2


def test_the_default_ubatch_is_llama_benchs() -> None:
    assert bench.N_UBATCH == 512


def test_answers_with_drafts_are_measured_through_the_library(tmp_path: Path) -> None:
    path = tiny_models.write_tiny_model(tmp_path / "tiny.gguf", n_embd=64, n_ff=64, head_dim=16)
    with edgellm.load(path, n_threads=1, draft=path) as llm:
        (result,) = run_drafted(llm, [0, 4], n_threads=1, repetitions=2)
    assert result.test.name == "tg4 drafted" and len(result.seconds) == 2 and result.bandwidth_share is None
    assert all(seconds > 0 for seconds in result.seconds)
