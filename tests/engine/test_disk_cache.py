"""Prefixes on the disk: another process goes on as this one would have; a file does no more harm than a missing one."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from fake_executor import PACKED, STATE, FakeExecutor, expected_tokens, fake_layers, fake_pool, fake_program
from speculation_trials import guess
from test_engine import Greedy, prompt_of, run, run_together, until, wait_until_idle

import edgellm
from edgellm.arguments import CACHE_TYPES
from edgellm.engine import cache_file, disk_cache
from edgellm.engine.cache import KVCache, pool_blocks
from edgellm.engine.disk_cache import DiskCache
from edgellm.engine.engine import Engine
from edgellm.engine.prefix_files import PrefixFiles
from edgellm.formats.errors import DeviceLostError, EdgeLLMError, NumericError
from edgellm.kernels.kv import BLOCK_TOKENS, NEWEST_BLOCKS

WINDOWS = [(0,), (0, 40), (STATE, 0), (STATE,), (PACKED, 0), (STATE, PACKED, 0)]
Start = Callable[..., Engine]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    made: list[Engine] = []

    def engine(windows: tuple[int, ...] = (0,), key: str = "a" * 64, limit: int = 1 << 30, **options: Any) -> Engine:
        windows, n_ctx, chunk = tuple(sorted(windows)), 2048, options.get("chunk", 64)
        program = fake_program(windows)
        n_blocks = options.get("n_blocks") or pool_blocks(fake_layers(windows), n_ctx, chunk, options.get("n", 4))
        pool = fake_pool(program, n_blocks)
        cache = KVCache(pool, n_ctx)
        made.append(Engine(FakeExecutor(program, pool, chunk), cache))
        made[-1].scheduler.disk = DiskCache.open(tmp_path / "cache", key, cache, limit)
        return made[-1]

    yield engine
    for one in made:
        one.close()
        one.cache.check([])


def whole_blocks(n: int, windows: tuple[int, ...]) -> int:
    """The tokens of a beginning of n whose blocks are enough to go on from."""
    size = NEWEST_BLOCKS * BLOCK_TOKENS if PACKED in windows else BLOCK_TOKENS
    return n // size * size


def files(tmp_path: Path) -> list[Path]:
    return sorted(path for path in (tmp_path / "cache" / "prefixes").rglob("*") if path.is_file())


def nbytes(paths: Iterable[Path]) -> int:
    """Of those that are still there."""
    total = 0
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


def reused(engine: Engine, prompt: list[int], n: int = 8, windows: tuple[int, ...] = (0,)) -> int:
    """How many tokens were known; the answer must be right."""
    tokens = list(engine.generate(prompt, Greedy(), max_tokens=n))
    assert [one.token for one in tokens] == expected_tokens(prompt, n, tuple(sorted(windows)))
    return tokens[-1].timings.reused_n


@pytest.mark.parametrize("windows", WINDOWS)
def test_a_long_prefix_costs_only_its_tail_after_a_restart(start: Start, windows: tuple[int, ...]) -> None:
    prompt, first = prompt_of(1, 1500), start(windows)
    assert reused(first, prompt, windows=windows) == 0
    first.close()
    second = start(windows)
    n_reused = reused(second, prompt, windows=windows)
    assert n_reused >= (1499 if STATE in windows else whole_blocks(1500, windows))
    assert sum(second.executor.batches) == 1500 - n_reused + 7
    other = [*prompt[:1100], *prompt_of(2, 100)]
    third = start(windows)
    # of states one is kept each 512 tokens
    assert reused(third, other, windows=windows) == (1024 if STATE in windows else whole_blocks(1100, windows))


@pytest.mark.parametrize("windows", WINDOWS)
@pytest.mark.parametrize("n", [1, 31, 32, 33, 63, 64, 65, 300])
def test_a_talk_goes_on_after_a_restart(start: Start, windows: tuple[int, ...], n: int) -> None:
    prompt = prompt_of(3, n)
    for _ in range(4):
        engine = start(windows)
        known = reused(engine, prompt, 20, windows)
        assert known >= (whole_blocks(len(prompt) - 23, windows) if len(prompt) > n else 0)
        prompt = [*prompt, *expected_tokens(prompt, 20, tuple(sorted(windows))), 5, 6, 7]
        engine.close()


@pytest.mark.parametrize("windows", WINDOWS)
def test_what_the_tree_has_lost_comes_back_from_the_disk(start: Start, windows: tuple[int, ...]) -> None:
    engine = start(windows, n=1)
    prompts = [prompt_of(seed, 1400) for seed in range(4)]
    for _ in range(2):
        for prompt in prompts:
            reused(engine, prompt, windows=windows)
            disk = engine.scheduler.disk
            until(lambda disk=disk: not disk._work)  # a busy machine may be slow to write
    known = whole_blocks(1399, windows)
    assert reused(engine, prompts[0], windows=windows) >= known
    assert sum(engine.executor.batches) < 4 * 1400 + 9 * (1400 - known + 8)


@pytest.mark.parametrize("windows", WINDOWS)
def test_many_at_once_are_each_as_if_alone_and_one_reads_for_all(start: Start, windows: tuple[int, ...]) -> None:
    shared, dice = prompt_of(1, 700), random.Random(4)
    prompts = [[*shared[: dice.randrange(100, 700)], *prompt_of(seed, 50)] for seed in range(12)]
    first = start(windows)
    run(first, shared, 2)
    first.close()
    for n_blocks in (None, (60,) * len(windows)):  # and where they push each other out
        engine = start(windows, n_blocks=n_blocks)
        expected = [expected_tokens(prompt, 10, tuple(sorted(windows))) for prompt in prompts]
        assert run_together(engine, prompts, 10) == expected
        wait_until_idle(engine)
        engine.cache.check([])


def test_the_files_are_for_this_user_alone(start: Start, tmp_path: Path) -> None:
    (tmp_path / "cache" / "prefixes").mkdir(parents=True, mode=0o755)
    engine = start()
    run(engine, prompt_of(1, 100), 2)
    engine.close()
    assert len(files(tmp_path)) == 3
    for path in [*files(tmp_path), tmp_path / "cache" / "prefixes"]:
        assert os.name != "posix" or path.stat().st_mode & 0o077 == 0, path


def damaged(content: bytes, dice: random.Random) -> Iterator[bytes]:
    yield from (b"", content[:10], content[: len(content) // 2], content[:-1], content + b"\0", b"\0" * len(content))
    for _ in range(10):
        changed = bytearray(content)
        changed[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
        yield bytes(changed)


@pytest.mark.filterwarnings("ignore:A file of the prefix cache")
@pytest.mark.parametrize("windows", [(0,), (STATE, 0)])
def test_a_damaged_file_is_as_none_and_is_written_anew(start: Start, tmp_path: Path, windows: tuple[int, ...]) -> None:
    prompt, dice, first = prompt_of(1, 200), random.Random(5), start(windows)
    run(first, prompt, 2)
    first.close()
    whole = {path: path.read_bytes() for path in files(tmp_path)}
    for path, content in list(whole.items())[:4]:
        for wrong in damaged(content, dice):
            path.write_bytes(wrong)
            engine = start(windows)
            assert reused(engine, prompt, 2, windows) < 200
            engine.close()
            assert path.read_bytes() == content or STATE in windows  # a state may not be wanted again


@pytest.mark.filterwarnings("ignore:A file of the prefix cache", "ignore:Prefixes are not kept")
def test_a_file_of_another_text_or_model_or_kind_is_not_taken(start: Start, tmp_path: Path) -> None:
    first, prompt, other = start(), prompt_of(1, 100), prompt_of(2, 100)
    run(first, prompt, 2)
    first.close()
    mine = files(tmp_path)
    second = start()
    run(second, other, 2)
    second.close()
    theirs = [path for path in files(tmp_path) if path not in mine]
    for target, source in zip(mine, theirs, strict=True):  # whole files under wrong names
        target.write_bytes(source.read_bytes())
    engine = start()
    assert reused(engine, prompt) == 0
    engine.close()
    assert reused(start(key="b" * 64), prompt) == 0  # another model finds nothing
    for place, path in enumerate(mine):
        path.unlink()
        if place == 0:
            path.mkdir()
        elif hasattr(os, "mkfifo"):
            os.mkfifo(path)
    assert reused(start(), prompt) == 0


def test_a_link_or_a_strangers_folder_is_refused(start: Start, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "prefixes").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(EdgeLLMError) as found:
        start()
    assert found.value.code == "CACHE_DIR"


def test_a_folder_stays_within_its_bytes_and_the_oldest_go_first(start: Start, tmp_path: Path) -> None:
    (tmp_path / "cache" / "prefixes" / "ab").mkdir(parents=True)
    strange = [tmp_path / "cache" / "mine.txt", tmp_path / "cache" / "prefixes" / "ab" / "notes.kv"]
    for path in strange:
        path.write_text("mine")
    engine, limit = start(limit=60_000), 60_000
    kept = prompt_of(0, 200)
    for seed in range(1, 30):
        run(engine, kept, 1)
        run(engine, prompt_of(seed, 200), 1)
        assert nbytes(path for path in files(tmp_path) if path not in strange) <= limit
    engine.close()
    assert [path.read_text() for path in strange] == ["mine", "mine"]
    assert reused(start(limit=limit), kept) == 192
    assert reused(start(limit=limit), prompt_of(1, 200)) == 0


def test_a_full_disk_is_told_once_and_answers_go_on(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache_file, "write", full)
    engine = start()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert reused(engine, prompt_of(1, 400)) == 0
        engine.close()
    assert len(told) == 1 and "No space left" in str(told[0].message)
    assert files(tmp_path) == []


def test_two_programs_share_a_folder(start: Start, tmp_path: Path) -> None:
    prompts = [prompt_of(seed, 300) for seed in range(8)]
    engines = [start(limit=200_000) for _ in range(2)]
    threads = [
        threading.Thread(target=lambda engine=engine: [reused(engine, prompt) for prompt in prompts * 2])
        for engine in engines
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for engine in engines:
        engine.close()
    assert reused(start(), prompts[-1]) == 288
    for path in files(tmp_path):  # gone under the eyes of one that knows them
        path.unlink()
    assert [reused(engine, [9, *prompts[0]]) for engine in [start(), start()]] == [0, 0]


def test_a_folder_that_somebody_removes_is_made_anew(start: Start, tmp_path: Path) -> None:
    engine = start()
    shutil.rmtree(tmp_path / "cache")
    for seed in (1, 2):
        run(engine, prompt_of(seed, 100), 1)
    engine.close()
    assert files(tmp_path)


def test_a_file_that_is_gone_meanwhile_is_computed(start: Start, tmp_path: Path) -> None:
    first, prompt = start(), prompt_of(1, 400)
    run(first, prompt, 1)
    first.close()
    engine = start()
    for path in files(tmp_path)[::2]:
        path.unlink()
    assert reused(engine, prompt) < 384


def test_what_gave_nan_is_forgotten_on_the_disk_too(start: Start, tmp_path: Path) -> None:
    engine = start()
    run(engine, prompt_of(1, 300), 1)
    engine.executor.poison = True
    with pytest.raises(NumericError):
        run(engine, [*prompt_of(1, 300), 1], 1)
    engine.close()
    assert files(tmp_path) == []


def test_a_slow_disk_holds_back_nobody_and_a_caller_may_leave(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    first, prompt = start(), prompt_of(1, 1500)
    run(first, prompt, 1)
    first.close()
    engine, opened, read = start(), threading.Event(), PrefixFiles.read

    def slow(*arguments: Any, **options: Any) -> Any:
        opened.wait(60)
        return read(*arguments, **options)

    monkeypatch.setattr(PrefixFiles, "read", slow)
    flag = threading.Event()
    waiting = threading.Thread(target=lambda: list(engine.generate(prompt, Greedy(), max_tokens=2, cancel=flag)))
    waiting.start()
    until(lambda: bool(engine.scheduler.requests))
    assert run(engine, prompt_of(2, 50), 5) == expected_tokens(prompt_of(2, 50), 5)
    flag.set()
    waiting.join(60)
    opened.set()
    wait_until_idle(engine)
    engine.cache.check([])
    assert reused(engine, prompt) == 1472


def test_what_cannot_be_written_in_time_is_not_held_in_memory(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_cache, "WAITING_NBYTES", 1)
    engine, written, write = start(), threading.Event(), PrefixFiles.write

    def slow(*arguments: Any) -> None:
        written.wait(60)
        write(*arguments)

    monkeypatch.setattr(PrefixFiles, "write", slow)
    assert run(engine, prompt_of(1, 1000), 2) == expected_tokens(prompt_of(1, 1000), 2)
    assert engine.scheduler.disk is not None and len(engine.scheduler.disk._work) <= 2
    written.set()


# -- real models -------------------------------------------------------------------------------------------------------


KINDS = [
    *((name, executor, "f16") for name in ("llama", "gemma3", "qwen35") for executor in ("cpu", "reference")),
    *(("gemma3", "cpu", kept) for kept in CACHE_TYPES[1:]),
    *(("qwen35", "cpu", kept) for kept in ("q4_0", "kivi2")),
]


@pytest.mark.parametrize(("name", "executor", "kept"), KINDS)
def test_an_answer_has_the_same_bits_with_and_without(
    tmp_path: Path, name: str, executor: str, kept: str, drafts: bool
) -> None:
    path, prompt = tiny_models.write_tiny_model(tmp_path / "tiny.gguf", name), list(range(3, 203))
    told: list[Any] = []
    for folder in (None, tmp_path / "cache", tmp_path / "cache"):
        types = {"cache_type_k": kept, "cache_type_v": kept}
        with edgellm.load(path, executor=executor, n_ctx=256, cache_dir=folder, max_tokens_per_step=32, **types) as llm:
            if drafts and told:
                guess(llm, [[*prompt, *told[0][0]]])
            said = llm.generate(prompt, temperature=0, max_tokens=20, logprobs=3, ignore_eos=True)
            told.append((said.tokens, [one.logprob for one in said.logprobs]))
    if drafts and executor == "reference":  # numpy sums other batches in another order
        told = [tokens for tokens, _ in told]
    assert told[0] == told[1] == told[2]
    assert said.timings.reused_n >= (128 if (name, kept) == ("gemma3", "kivi2") else 192)
    assert (said.timings.drafted_n > 0) == drafts


def test_of_packed_blocks_only_the_first_is_written_in_16_bits_too(tmp_path: Path) -> None:
    path = tiny_models.write_tiny_model(tmp_path / "tiny.gguf", "llama")
    types = {"cache_type_k": "kivi2", "cache_type_v": "kivi2"}
    with edgellm.load(path, executor="reference", n_ctx=256, cache_dir=tmp_path / "cache", **types) as llm:
        llm.generate(list(range(3, 203)), temperature=0, max_tokens=1)
        pool = llm.engine.executor.pool
        whole = pool.block_nbytes([group.kind for group in pool.groups].index("newest"))
    *others, largest = sorted(file.stat().st_size for file in (tmp_path / "cache").rglob("*.kv"))
    assert len(others) == 5 and set(others) == {largest - whole}


def test_another_model_or_cache_in_one_folder_takes_nothing_of_the_first(tmp_path: Path) -> None:
    paths = [tiny_models.write_tiny_model(tmp_path / f"{seed}.gguf", "llama", seed=seed) for seed in (0, 1)]
    ways: list[dict[str, Any]] = [{}, {"executor": "reference"}, {"kv_overrides": {"llama.rope.freq_base": 500.0}}]
    ways.append({"cache_type_k": "q8_0"})
    for path in paths:
        for way in ways:
            for known in (0, 96):
                with edgellm.load(path, n_ctx=256, cache_dir=tmp_path / "cache", **way) as llm:
                    said = llm.generate(list(range(3, 103)), temperature=0, max_tokens=1)
                    assert said.timings.reused_n == known


def test_a_folder_that_cannot_be_is_told_and_the_model_is_closed(tmp_path: Path) -> None:
    path = tiny_models.write_tiny_model(tmp_path / "tiny.gguf", "llama")
    with pytest.raises(EdgeLLMError) as found:
        edgellm.load(path, executor="reference", cache_dir=path)
    assert found.value.code == "CACHE_DIR"
    path.unlink()


@pytest.mark.parametrize("windows", WINDOWS)
def test_a_short_prompt_does_not_hide_what_was_written_behind_it(start: Start, windows: tuple[int, ...]) -> None:
    prompt = prompt_of(7, 25)
    for n in (8, 200):
        engine = start(windows)
        reused(engine, prompt, n, windows)
        engine.close()
    longer = prompt + expected_tokens(prompt, 200, tuple(sorted(windows)))
    assert reused(start(windows), longer, 8, windows) >= (192 if STATE in windows else whole_blocks(192, windows))


def test_answers_that_part_in_their_first_block_have_states_of_their_own(start: Start) -> None:
    engine, prompt = start((STATE,)), prompt_of(7, 25)
    trails = [engine.scheduler.disk.follow(prompt + more) for more in ([1, 2, 3], [4, 5, 6])]  # type: ignore[union-attr]
    assert trails[0].text(1) != trails[1].text(1)
    for trail in trails:
        trail.tokens.extend(range(10))
    whole = [engine.scheduler.disk.follow(list(trail.tokens)) for trail in trails]  # type: ignore[union-attr]
    assert [trail.text(1) for trail in trails] == [trail.text(1) for trail in whole]


def test_a_device_that_is_lost_while_it_is_copied_from_costs_nothing_that_is_done(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start()

    def lost(*_: Any) -> bytes:
        raise DeviceLostError("the GPU is gone")

    monkeypatch.setattr(engine.cache.pool, "read_block", lost)
    assert reused(engine, prompt_of(7, 100)) == 0
    engine.close()
    assert not files(tmp_path)


def test_nobody_waits_while_what_an_answer_leaves_is_copied_and_nobody_finds_it_half(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows = (STATE, 0)
    engine, prompt = start(windows), prompt_of(7, 50)
    copying, may_go_on, pool = threading.Event(), threading.Event(), engine.cache.pool
    read = pool.read_block

    def slow(group: int, block: int) -> bytes:
        if any(request.n_computed > len(prompt) for request in engine.scheduler.requests):  # the end of an answer
            copying.set()
            assert may_go_on.wait(60)
        return read(group, block)

    monkeypatch.setattr(pool, "read_block", slow)
    answers: list[list[Any]] = [[], []]

    def ask(i: int) -> None:
        answers[i] = [one.token for one in engine.generate(prompt, Greedy(), max_tokens=4)]

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(2)]
    threads[0].start()
    assert copying.wait(60)
    threads[1].start()
    until(lambda: len(engine.scheduler.requests) == 2)  # it comes in, and what there is is taken
    may_go_on.set()
    for thread in threads:
        thread.join(60)
    assert answers == [expected_tokens(prompt, 4, tuple(sorted(windows)))] * 2
    wait_until_idle(engine)


def test_no_thread_for_the_disk_costs_no_answer(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = prompt_of(7, 300)
    first = start()
    reused(first, prompt)
    first.close()
    engine, begin = start(), threading.Thread.start

    def none_left(thread: threading.Thread) -> None:
        if thread.name == "edgellm-disk":
            raise RuntimeError("can't start new thread")
        begin(thread)

    monkeypatch.setattr(threading.Thread, "start", none_left)
    assert reused(engine, prompt) == 0


def test_a_disk_that_hangs_is_waited_for_some_seconds_only(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = prompt_of(7, 300)
    first = start()
    reused(first, prompt)
    first.close()
    goes_on = threading.Event()
    monkeypatch.setattr(disk_cache, "HANGS_S", 0.2)
    monkeypatch.setattr(PrefixFiles, "read", lambda *_, **options: goes_on.wait(60) and None)
    try:
        assert reused(start(), prompt) == 0
    finally:
        goes_on.set()


def test_a_folder_in_one_that_everybody_writes_is_refused(start: Start, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    with pytest.raises(EdgeLLMError, match="everybody"):
        start()
    (tmp_path / "cache").chmod(0o1777)
    start()
