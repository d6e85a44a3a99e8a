"""The KV cache against an executor that notices every paging mistake."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest
from fake_executor import N_VOCAB, PACKED, STATE, FakeExecutor, expected_logits, fake_layers, fake_pool, fake_program

from edgellm.engine.cache import KVCache, Sequence, n_blocks_of, pool_blocks
from edgellm.formats.errors import ContextFullError
from edgellm.kernels.kv import BLOCK_TOKENS, CachePool, KVLayer, pool_nbytes
from edgellm.kernels.program import Batch

PLAIN = [(0,), (0, 40), (64,), (0, 33, 128), (0, 1), (31,), (STATE,), (STATE, 0), (STATE, 0, 40), (STATE, 33)]
WINDOWS = [*PLAIN, (PACKED, 0), (PACKED, 0, 40), (PACKED, 64), (STATE, PACKED, 0)]


class Runner:
    """Feeds tokens to sequences and compares each answer with the one computed without paging."""

    def __init__(self, windows: tuple[int, ...], n_ctx: int = 512, chunk: int = 48, n_blocks=None) -> None:
        self.windows = tuple(sorted(windows))
        self.chunk = chunk
        program = fake_program(self.windows)
        self.pool = fake_pool(program, n_blocks or pool_blocks(fake_layers(self.windows), n_ctx, chunk))
        self.executor = FakeExecutor(program, self.pool)
        self.cache = KVCache(self.pool, n_ctx)

    def feed(self, sequence: Sequence, tokens: list[int], rejected: int = 0) -> np.ndarray:
        """Bring the sequence to hold ``tokens`` and check the logits after the last.

        First a step with a part of them and ``rejected`` others behind, which are not accepted.
        """
        if rejected and sequence.length + rejected < self.cache.n_ctx:
            part = tokens[sequence.length :][: min(self.chunk, self.cache.n_ctx - rejected - sequence.length)]
            self.run(sequence, [*part, *([1] * rejected)])
            self.cache.commit(sequence, part, len(part) + rejected)
        while sequence.length < len(tokens):
            part = tokens[sequence.length :][: min(self.chunk, self.cache.room(sequence))]
            logits = self.run(sequence, part)
            self.cache.commit(sequence, part)
        if rejected:
            return np.zeros(0)
        np.testing.assert_array_equal(logits[-1], expected_logits(tokens, self.windows))
        return logits[-1]

    def run(self, sequence: Sequence, part: list[int]) -> np.ndarray:
        """A step with these tokens, which is not committed; its last logits."""
        self.cache.reserve(sequence, len(part))
        n = len(part)
        positions = np.arange(sequence.length, sequence.length + n, dtype=np.int32)
        outputs = np.zeros(n, bool)
        outputs[-1] = True
        tables = tuple(t[None] for t in sequence.tables)
        return self.executor.run(Batch(np.array(part, np.int32), positions, np.zeros(n, np.int32), outputs, tables))


def tokens_of(seed: int, n: int) -> list[int]:
    return random.Random(seed).choices(range(N_VOCAB), k=n)


@pytest.mark.parametrize("windows", WINDOWS)
@pytest.mark.parametrize("n", [1, 2, 31, 32, 33, 64, 65, 200])
def test_chunked_prefill_sees_every_position(windows: tuple[int, ...], n: int) -> None:
    runner = Runner(windows, chunk=7)
    sequence = runner.cache.open(tokens_of(n, n))
    assert sequence.n_reused == 0
    runner.feed(sequence, tokens_of(n, n))
    runner.cache.check([sequence])
    runner.cache.release(sequence)
    runner.cache.check([])


@pytest.mark.parametrize("windows", WINDOWS)
@pytest.mark.parametrize("n", [1, 2, 31, 32, 33, 63, 64, 65, 66, 200, 288])
def test_a_prompt_known_from_before_leaves_one_token_to_compute(windows: tuple[int, ...], n: int) -> None:
    runner = Runner(windows)
    prompt = tokens_of(1, n)
    for _ in range(3):
        sequence = runner.cache.open(prompt)
        runner.feed(sequence, prompt)
        runner.cache.release(sequence)
    assert sequence.n_reused == n - 1


@pytest.mark.parametrize("windows", WINDOWS)
def test_the_second_turn_computes_only_what_is_new(windows: tuple[int, ...]) -> None:
    runner = Runner(windows)
    history: list[int] = []
    for turn in range(6):
        known = len(history)
        history = history + tokens_of(turn, 37)
        sequence = runner.cache.open(history)
        assert sequence.n_reused == known
        runner.feed(sequence, history)
        runner.cache.mark(sequence)
        reply = tokens_of(100 + turn, 29)
        for i in range(len(reply)):
            runner.feed(sequence, history + reply[: i + 1])
        history = history + reply
        runner.cache.release(sequence)
        runner.cache.check([])


@pytest.mark.parametrize("windows", [(0, 40), (64,), (0, 33, 128), (STATE, 0), (PACKED, 0), (STATE, PACKED, 0)])
def test_another_reply_to_the_same_prompt_reuses_the_prompt(windows: tuple[int, ...]) -> None:
    runner = Runner(windows, n_ctx=1024, n_blocks=pool_blocks(fake_layers(windows), 1024, 48))
    prompt = tokens_of(3, 300)
    for attempt in range(3):
        sequence = runner.cache.open(prompt)
        assert sequence.n_reused == (0 if attempt == 0 else len(prompt) - 1)
        runner.feed(sequence, prompt)
        runner.cache.mark(sequence)
        runner.feed(sequence, prompt + tokens_of(10 + attempt, 300))
        runner.cache.release(sequence)


def test_window_groups_keep_only_their_window() -> None:
    runner = Runner((0, 40), n_ctx=512, chunk=16, n_blocks=(16, 4))
    sequence = runner.cache.open([1])
    runner.feed(sequence, tokens_of(5, 500))
    assert runner.cache.n_used()[0] == 16
    assert runner.cache.n_used()[1] <= 3
    runner.cache.check([sequence])


def test_a_text_that_parts_from_a_known_one_shares_whole_runs_of_what_is_packed() -> None:
    """Only the end of the known one has its newest run in 16 bits."""
    runner = Runner((PACKED, 0), n_blocks=(64, 64))
    prompt = tokens_of(7, 400)
    sequence = runner.cache.open(prompt)
    runner.feed(sequence, prompt)
    runner.cache.release(sequence)
    group = next(group for group in runner.pool.groups if group.kind == "newest")
    for edit in [0, 31, 100, 127, 128, 130, 300, 383, 384, 390, 399]:
        edited = [*prompt[:edit], *tokens_of(edit, 3)]
        sequence = runner.cache.open(edited)
        assert edit // group.window * group.window <= sequence.n_reused <= edit
        runner.feed(sequence, edited)
        runner.cache.release(sequence)
        runner.cache.check([])


def test_an_edited_message_reuses_what_stands_before_it() -> None:
    runner = Runner((0,), n_blocks=(64,))
    prompt = tokens_of(7, 150)
    sequence = runner.cache.open(prompt)
    runner.feed(sequence, prompt)
    runner.cache.release(sequence)
    for edit in [0, 1, 31, 32, 33, 95, 96, 97, 148, 149]:
        edited = list(prompt)
        edited[edit] = (edited[edit] + 1) % N_VOCAB
        sequence = runner.cache.open(edited)
        assert sequence.n_reused == edit
        runner.feed(sequence, edited)
        runner.cache.release(sequence)
        runner.cache.check([])


@pytest.mark.parametrize("windows", WINDOWS)
def test_interleaved_sequences_do_not_disturb_each_other(windows: tuple[int, ...]) -> None:
    n_blocks = tuple(3 * n for n in pool_blocks(fake_layers(sorted(windows)), 256, 48))
    runner = Runner(windows, n_ctx=256, n_blocks=n_blocks)
    texts = [tokens_of(1, 50) + tokens_of(s, 150) for s in (2, 3, 4)]
    sequences = [runner.cache.open(text[:50]) for text in texts]
    for end in range(50, 200, 3):
        for text, sequence in zip(texts, sequences, strict=True):
            runner.feed(sequence, text[:end])
        runner.cache.check(sequences)
    for sequence in sequences:
        runner.cache.release(sequence)
    runner.cache.check([])


@pytest.mark.parametrize("n_unwanted", [1, 5, 40])
@pytest.mark.parametrize("windows", WINDOWS)
def test_a_step_that_is_accepted_in_part_leaves_no_trace(windows: tuple[int, ...], n_unwanted: int) -> None:
    runner = Runner(windows)
    text = tokens_of(1, 100)
    sequence = runner.cache.open(text)
    for end in (20, 40, 64, 65, 99):
        accepted, rest = text[sequence.length : end], tokens_of(end, n_unwanted)
        runner.run(sequence, accepted + rest)
        runner.cache.commit(sequence, accepted, len(accepted + rest))
        assert STATE in windows or sequence.length == end
        runner.feed(sequence, text[: end + 1])
        runner.cache.check([sequence])
    runner.cache.release(sequence)
    sequence = runner.cache.open([*text, 1])
    assert sequence.n_reused == 100
    runner.feed(sequence, [*text, 1])


@pytest.mark.parametrize("windows", [(STATE,), (STATE, 0), (STATE, PACKED, 0)])
def test_a_prompt_that_leaves_a_known_one_gets_a_snapshot_there(windows: tuple[int, ...]) -> None:
    runner = Runner(windows, n_ctx=1024)
    common = tokens_of(1, 210)
    reused = []
    for seed in (2, 3, 4):
        text = [*common, seed, *tokens_of(seed, 50)]
        sequence = runner.cache.open(text)
        reused.append(sequence.n_reused)
        runner.feed(sequence, text)
        runner.cache.release(sequence)
        runner.cache.check([])
    assert reused == [0, 0, 210]


def test_a_long_text_keeps_a_state_now_and_then() -> None:
    runner = Runner((STATE, 0), n_ctx=4096, chunk=100)
    text = tokens_of(1, 3000)
    sequence = runner.cache.open(text)
    runner.feed(sequence, text)
    runner.cache.release(sequence)
    edited = [*text[:1800], text[1800] + 1]
    sequence = runner.cache.open(edited)
    assert 1800 - 512 <= sequence.n_reused <= 1800
    runner.feed(sequence, edited)


def test_two_that_go_on_from_one_snapshot_do_not_disturb_each_other_when_the_tree_forgets_it() -> None:
    runner = Runner((STATE, 0), n_blocks=(64, 10))
    prompt = tokens_of(1, 70)
    first = runner.cache.open(prompt)
    runner.feed(first, prompt)
    runner.cache.release(first)
    one, other = (runner.cache.open([*prompt, end]) for end in (1, 2))
    assert one.n_reused == other.n_reused == 70
    runner.cache.release(runner.cache.open([*prompt, 3]), keep=False)
    runner.feed(one, [*prompt, 1, 5, 6])
    runner.feed(other, [*prompt, 2, 5, 6])


@pytest.mark.parametrize("windows", [(0,), (0, 40), (STATE, 0), (STATE, 0, 40), (PACKED, 0), (STATE, PACKED, 0)])
def test_a_copy_that_fails_midway_holds_nothing(windows: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    text = tokens_of(1, 50)
    for n_good in range(len(set(windows) - {STATE})):
        runner = Runner(windows)
        sequence = runner.cache.open(text)
        runner.feed(sequence, text)
        runner.cache.release(sequence)
        copies = iter([runner.pool.copy_block] * n_good)
        with monkeypatch.context() as patch:
            patch.setattr(runner.pool, "copy_block", lambda *place, copies=copies: next(copies)(*place))
            with pytest.raises(StopIteration):
                runner.cache.open([*text, 1])
        runner.cache.check([])
        assert not any(runner.cache.n_used())
        sequence = runner.cache.open([*text, 1])
        assert sequence.n_reused == 50
        runner.feed(sequence, [*text, 1])


@pytest.mark.parametrize("windows", [(0,), (0, 40), (STATE, 0), (STATE,), (PACKED, 0), (STATE, PACKED, 0)])
def test_what_is_put_back_in_part_is_found_as_far_as_it_is_whole(windows: tuple[int, ...]) -> None:
    text, source = tokens_of(1, 100), Runner(windows)
    sequence = source.cache.open(text)
    source.feed(sequence, text)
    first, tables = list(sequence.first), [table.tolist() for table in sequence.tables]
    n_calls = sum(len(blocks) for blocks in source.cache.blocks(sequence))
    for n_good in range(n_calls):
        runner, good = Runner(windows), iter(range(n_good))

        def fill(group: int, block: int, target: int, runner: Runner = runner, good: Iterator[int] = good) -> None:
            next(good)
            runner.pool.write_block(group, target, source.pool.read_block(group, tables[group][block]))

        with pytest.raises(StopIteration):
            runner.cache.put_back(text, first, fill)
        runner.cache.check([])
        assert not any(runner.cache.n_used())
        again = runner.cache.open([*text, 1])
        assert again.n_reused <= n_good * BLOCK_TOKENS
        runner.feed(again, [*text, 1])


def test_what_one_variant_has_computed_another_does_not_find() -> None:
    runner = Runner((STATE, 0))
    prompt = tokens_of(1, 100)
    for variant, known in (("", 0), ("adapter", 0), ("", 99), ("adapter", 99)):
        sequence = runner.cache.open(prompt, variant=variant)
        assert sequence.n_reused == known
        runner.feed(sequence, prompt)
        runner.cache.release(sequence)
        runner.cache.check([])


def test_an_unshared_sequence_leaves_nothing_behind() -> None:
    runner = Runner((0, 40))
    prompt = tokens_of(9, 100)
    sequence = runner.cache.open(prompt, shared=False)
    runner.feed(sequence, prompt)
    runner.cache.release(sequence)
    runner.cache.release(sequence)
    assert runner.cache.open(prompt).n_reused == 0
    assert runner.cache.n_used() == (0, 0)


def test_what_was_left_alone_longest_goes_first() -> None:
    runner = Runner((0,), n_ctx=320, n_blocks=(10,))
    old, recent, new = tokens_of(1, 128), tokens_of(2, 128), tokens_of(3, 200)
    for prompt in (old, recent, new):
        sequence = runner.cache.open(prompt)
        runner.feed(sequence, prompt)
        runner.cache.release(sequence)
        runner.cache.check([])
    assert runner.cache.open([*old, 1]).n_reused == 0
    runner.cache.check([])
    assert runner.cache.open([*new, 1]).n_reused == 200


def test_a_full_pool_is_a_named_error_and_changes_nothing() -> None:
    runner = Runner((0, 40), n_ctx=320, n_blocks=(4, 9))
    sequence = runner.cache.open([1])
    runner.feed(sequence, tokens_of(1, 100))
    with pytest.raises(ContextFullError) as error:
        runner.cache.reserve(sequence, 64)
    assert error.value.code == "CACHE_FULL"
    runner.cache.check([sequence])
    runner.feed(sequence, tokens_of(1, 100) + tokens_of(2, 28))


def test_the_end_of_the_context_is_a_named_error_with_both_counts() -> None:
    runner = Runner((0,), n_ctx=100)
    sequence = runner.cache.open([1])
    runner.feed(sequence, tokens_of(1, 100))
    with pytest.raises(ContextFullError, match=r"100 \+ 1 tokens, it has room for 100"):
        runner.cache.reserve(sequence, 1)


@pytest.mark.parametrize("windows", WINDOWS)
@pytest.mark.parametrize("seed", range(4))
def test_random_histories_in_a_small_pool(windows: tuple[int, ...], seed: int) -> None:
    """Branches, edits, extensions and abandoned sequences: every answer is the cold one and no block is lost."""
    rng = random.Random(seed)
    n_ctx, chunk = rng.choice([64, 160, 300]), rng.choice([1, 7, 32, 50])
    scale = rng.choice([1, 1, 2])
    n_blocks = tuple(scale * n for n in pool_blocks(fake_layers(sorted(windows)), n_ctx, chunk))
    if STATE in windows:
        n_blocks = (*n_blocks[:-1], rng.choice([8, 10, 13]))
    runner = Runner(windows, n_ctx=n_ctx, chunk=chunk, n_blocks=n_blocks)
    histories: list[list[int]] = [[]]
    live: list[tuple[Sequence, list[int]]] = []
    for _ in range(60):
        action = rng.random()
        if action < 0.5 or not live:
            history = list(rng.choice(histories))
            if rng.random() < 0.5:
                history = history[: rng.randint(0, len(history))]
            history = (history + rng.choices(range(3), k=rng.randint(1, 70)))[: n_ctx - rng.randint(0, 9)]
            live.append((runner.cache.open(history, shared=rng.random() < 0.9), history))
        elif action < 0.8:
            sequence, history = rng.choice(live)
            target = (history + rng.choices(range(3), k=rng.randint(1, 40)))[:n_ctx]
            if len(target) > sequence.length:
                history[:] = target
        sequence, history = rng.choice(live)
        try:
            if sequence.length < len(history):
                runner.feed(sequence, history, rejected=rng.choice([0, 0, 0, 1, 4]))
            if rng.random() < 0.2:
                runner.cache.mark(sequence)
        except ContextFullError:
            live, gone = [(s, h) for s, h in live if s is not sequence], sequence
            runner.cache.release(gone)
        while live and (len(live) > 3 or rng.random() < 0.3):
            sequence, history = live.pop(rng.randrange(len(live)))
            histories.append(history[: sequence.length])
            runner.cache.release(sequence)
        runner.cache.check([s for s, _ in live])
    for sequence, _ in live:
        runner.cache.release(sequence)
    runner.cache.check([])
    assert runner.cache.n_used() == (0,) * len(set(windows))


@pytest.mark.parametrize("windows", [(0,), (0, 40), (64,), (0, 512, 4096), (PACKED, 0)])
@pytest.mark.parametrize("n_ctx", [1, 32, 33, 500])
def test_the_pool_size_is_enough_for_one_whole_context(windows: tuple[int, ...], n_ctx: int) -> None:
    runner = Runner(windows, n_ctx=n_ctx, chunk=48)
    for seed in range(3):
        text = tokens_of(seed, n_ctx)
        sequence = runner.cache.open(text)
        runner.feed(sequence, text)
        runner.cache.release(sequence)
        sequence = runner.cache.open(text)
        runner.feed(sequence, text)
        runner.cache.release(sequence)


def test_the_memory_estimate_is_what_the_pool_takes() -> None:
    layers = [KVLayer(3, 64, 64), KVLayer(1, 256, 128, 512), KVLayer(1, 256, 128, 512)]
    n_blocks = pool_blocks(layers, 8192, 512)
    assert n_blocks[0] == 8192 // BLOCK_TOKENS + 1
    assert n_blocks_of(512) < n_blocks[1] < n_blocks[0]
    for dtype in ("float16", "float32"):
        assert pool_nbytes(layers, n_blocks, dtype) == CachePool(layers, n_blocks, dtype).nbytes
