"""The library's face on tiny random models, and on the real ones where they are."""

from __future__ import annotations

import asyncio
import copy
import gc
import itertools
import pickle
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
from speculation_trials import free_drafts, guess

import edgellm
from edgellm import loading
from edgellm.kernels.ops import Embed, Op
from edgellm.machine.memory import SystemMemory

HANG_S = 120.0
TALK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say a word."}]


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        name: tiny_models.write_tiny_model(folder / f"{name}.gguf", name, quant="Q8_0") for name in ("llama", "gemma3")
    }


@pytest.fixture(scope="module")
def llm(paths: dict[str, Path]) -> Iterator[edgellm.LLM]:
    with edgellm.load(paths["llama"], executor="reference") as loaded:
        yield loaded


def wait_until_idle(llm: edgellm.LLM) -> None:
    end = time.monotonic() + HANG_S
    while llm.engine._thread is not None:
        assert time.monotonic() < end, "the engine does not come to rest"
        time.sleep(0.002)


def greedy(llm: edgellm.LLM, prompt: object, n: int = 24, **options: object) -> edgellm.Generation:
    return llm.generate(prompt, temperature=0, max_tokens=n, **options)  # type: ignore[arg-type]


def test_importing_the_library_is_light() -> None:
    code = "import sys, edgellm; print([m for m in ('numpy', 'numba', 'jinja2', 'asyncio') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
    assert all(hasattr(edgellm, name) for name in edgellm.__all__)
    with pytest.raises(AttributeError, match="no_such_name"):
        edgellm.no_such_name  # noqa: B018


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
@pytest.mark.parametrize("executor", ["reference", "cpu"])
def test_a_second_turn_computes_only_what_is_new_and_says_the_same(
    paths: dict[str, Path], architecture: str, executor: str
) -> None:
    with edgellm.load(paths[architecture], executor=executor) as warm:
        history = list(TALK)
        known = 0
        for turn in range(3):
            prompt_n = len(warm.prompt_ids(history))
            reply = greedy(warm, history, 12, ignore_eos=True)
            assert reply.timings.prompt_n == prompt_n
            # all of the last prompt, at least; the reply's text may tokenize otherwise
            assert reply.timings.reused_n >= known
            with edgellm.load(paths[architecture], executor=executor) as cold:
                assert greedy(cold, history, 12, ignore_eos=True).tokens == reply.tokens
            known = prompt_n
            history += [{"role": "assistant", "content": reply.text}, {"role": "user", "content": f"And {turn}?"}]
            wait_until_idle(warm)


@pytest.mark.parametrize("max_tokens_per_step", [1, 7, 64])
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_chunked_prefill_equals_one_prefill(
    paths: dict[str, Path], architecture: str, max_tokens_per_step: int
) -> None:
    text = "the other thing and the word " * 5
    answers = []
    for size in (512, max_tokens_per_step):
        with edgellm.load(paths[architecture], executor="reference", max_tokens_per_step=size) as llm:
            answers.append(greedy(llm, text, 16, ignore_eos=True).tokens)
    assert answers[0] == answers[1] and len(answers[0]) == 16


@pytest.fixture(scope="module")
def drafts(paths: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What drafts: n-grams, the same weights in fewer bits, another vocabulary."""
    folder = tmp_path_factory.mktemp("drafts")
    tokens, types, _ = tiny_models.tiny_vocabulary()
    turned = [*tokens[:3], *reversed(tokens[3:])]
    written = {
        "near": {"quant": "Q4_0"},
        "other": {"metadata": {"tokenizer.ggml.tokens": turned, "tokenizer.ggml.token_type": types}},
    }
    found: list[dict[str, Any]] = [{"speculate": "ngram"}]
    for name, options in written.items():
        found.append({"draft": tiny_models.write_tiny_model(folder / f"{name}.gguf", "llama", **options)})
    return found


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
@pytest.mark.parametrize("options", [{"temperature": 0}, {"seed": 4, "repeat_penalty": 1.1}], ids=str)
def test_speculation_changes_neither_tokens_nor_logprobs_nor_text(
    paths: dict[str, Path],
    architecture: str,
    options: dict[str, Any],
    drafts: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    free_drafts(monkeypatch)
    text = "the other thing and the word " * 9
    answers = []
    for speculation in ({}, *drafts):
        with edgellm.load(paths[architecture], n_threads=1, **speculation) as llm:
            turns = [llm.generate(text, max_tokens=60, ignore_eos=True, logprobs=3, **options)]
            turns.append(llm.generate([*llm.tokenize(text), *turns[0].tokens[:40], 5], max_tokens=20, **options))
            answers.append([(turn.text, turn.tokens, turn.logprobs, turn.finish_reason) for turn in turns])
            assert bool(turns[0].timings.drafted_n) == bool(speculation)
            assert bool(llm.memory_estimate.draft) == ("draft" in speculation)
    assert all(answer == answers[0] for answer in answers[1:])


@pytest.mark.parametrize("right", [0.6, 1.0])
def test_a_stop_string_inside_a_draft_ends_the_answer_where_it_ends_a_plain_one(
    paths: dict[str, Path], right: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what stands behind it in the draft is no part of what is known of the text."""
    free_drafts(monkeypatch)
    ask = {"temperature": 0, "max_tokens": 40, "ignore_eos": True, "logprobs": 2}
    with edgellm.load(paths["llama"], n_threads=1) as plain, edgellm.load(paths["llama"], n_threads=1) as drafting:
        whole = plain.generate("the", **ask)  # type: ignore[arg-type]
        texts = [[*plain.tokenize("the"), *whole.tokens]]
        oracle = guess(drafting, texts, right)
        for n in (3, 11, len(str(whole)) - 4):
            stop = str(whole)[n : n + 3]
            expected = plain.generate("the", stop=stop, **ask)  # type: ignore[arg-type]
            said = drafting.generate("the", stop=stop, **ask)  # type: ignore[arg-type]
            assert (said.text, said.tokens, said.logprobs) == (expected.text, expected.tokens, expected.logprobs)
            assert (said.finish_reason, said.stop) == (expected.finish_reason, expected.stop) == ("stop", stop)
            wait_until_idle(drafting)
            drafting.engine.call(lambda cache, executor: cache.check([]))
            turn = [*texts[0][: len(texts[0]) - 30], 5]
            assert greedy(drafting, turn).tokens == greedy(plain, turn).tokens
        assert oracle.n_drafted > 10


def test_a_draft_model_that_cannot_be_one_is_refused_by_name(paths: dict[str, Path], tmp_path: Path) -> None:
    recurrent = tiny_models.write_tiny_model(tmp_path / "recurrent.gguf", "mamba2")
    with pytest.raises(edgellm.UnsupportedError, match="recurrent layers"):
        edgellm.load(paths["llama"], draft=recurrent)
    with pytest.raises(edgellm.ParameterError, match="Give one of them"):
        edgellm.load(paths["llama"], draft=paths["llama"], speculate="ngram")
    with pytest.raises(edgellm.ModelNotFoundError):
        edgellm.load(paths["llama"], draft=tmp_path / "missing.gguf")


def test_stream_generate_and_chat_say_the_same(llm: edgellm.LLM) -> None:
    chunks = list(llm.stream(TALK, temperature=0, max_tokens=24))
    whole = greedy(llm, TALK)
    assert "".join(chunk.text for chunk in chunks) == whole
    assert [chunk.token for chunk in chunks[:-1]] == list(whole.tokens)
    assert [chunk.finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + [whole.finish_reason]
    assert llm.chat(TALK, temperature=0, max_tokens=24) == edgellm.Message("assistant", whole)
    assert llm.chat("Say a word.", temperature=0, max_tokens=9).role == "assistant"
    assert isinstance(whole, str) and type(whole.text) is str


def test_a_prompt_may_be_text_messages_or_ids(llm: edgellm.LLM) -> None:
    ids = llm.prompt_ids(TALK)
    text = llm.apply_template(TALK)
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>")
    assert llm.tokenize(text, parse_special=True) == ids == llm.prompt_ids([edgellm.Message(**m) for m in TALK])
    assert greedy(llm, ids) == greedy(llm, TALK) == greedy(llm, text, parse_special=True)
    assert llm.prompt_ids("<|im_end|>") != [2]
    assert llm.detokenize(llm.tokenize("the word äé語🙂")) == "the word äé語🙂"
    assert greedy(llm, np.array(ids)) == greedy(llm, ids)


def test_a_bos_that_the_vocabulary_wants_is_added_once(paths: dict[str, Path], tmp_path: Path) -> None:
    path = tiny_models.write_tiny_model(
        tmp_path / "bos.gguf", metadata={"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    )
    with edgellm.load(path, executor="reference") as llm:
        assert llm.prompt_ids("a")[0] == 0 and llm.prompt_ids("a")[1] != 0
        assert llm.prompt_ids("<|endoftext|>a", parse_special=True) == llm.prompt_ids("a")
        assert 2 not in llm.prompt_ids("a")[1:]
        assert llm.prompt_ids(TALK)[0] == 0


@pytest.mark.parametrize("n", range(1, 20, 3))
def test_stop_strings_cut_the_answer_and_nothing_of_them_is_shown(llm: edgellm.LLM, n: int) -> None:
    whole = greedy(llm, "the", 40, ignore_eos=True)
    stop = str(whole)[n : n + 3]
    chunks = list(llm.stream("the", temperature=0, max_tokens=40, ignore_eos=True, stop=["never there", stop]))
    assert "".join(chunk.text for chunk in chunks) == whole[: whole.index(stop)]
    assert (chunks[-1].finish_reason, chunks[-1].stop) == ("stop", stop)
    again = greedy(llm, "the", 40, ignore_eos=True, stop=stop)
    assert again == whole[: whole.index(stop)] and again.stop == stop


def test_text_held_for_a_stop_string_comes_at_the_end(llm: edgellm.LLM) -> None:
    whole = greedy(llm, "the", 12, ignore_eos=True)
    held = greedy(llm, "the", 12, ignore_eos=True, stop=str(whole)[-2:] + "\x00")
    assert held == whole and held.finish_reason == "length"


def test_end_of_generation_ends_the_answer_unseen(llm: edgellm.LLM) -> None:
    bias = {2: 1e4}
    answer = greedy(llm, "the", logit_bias=bias)
    assert (answer, answer.tokens, answer.finish_reason, answer.stop) == ("", (), "stop", 2)
    assert greedy(llm, "the", logit_bias=bias, special=True) == "<|im_end|>"


def test_seeds_reproduce_and_sampling_fields_override(llm: edgellm.LLM) -> None:
    def sample(**options: object) -> str:
        return llm.generate("the", max_tokens=20, ignore_eos=True, **options)  # type: ignore[arg-type]

    assert sample(seed=7, temperature=2.0) == sample(seed=7, temperature=2.0)
    assert len({sample(seed=seed, temperature=2.0) for seed in range(6)}) > 1
    params = edgellm.SamplingParams(temperature=2.0, seed=3)
    assert sample(params=params) == sample(temperature=2.0, seed=3)
    assert sample(params=params, temperature=0) == sample(temperature=0)
    with pytest.raises(edgellm.ParameterError, match=r"temprature.*Did you mean temperature"):
        sample(temprature=1.0)
    with pytest.raises(edgellm.ParameterError, match="top_p"):
        sample(top_p=float("nan"))


def test_the_file_recommends_sampling_and_the_caller_overrides(tmp_path: Path) -> None:
    metadata = {"general.sampling.temp": 0.25, "general.sampling.top_k": 5}
    path = tiny_models.write_tiny_model(tmp_path / "sampling.gguf", metadata=metadata)
    with edgellm.load(path, executor="reference", kv_overrides={"general.sampling.top_k": 6}) as llm:
        assert (llm.default_params.temperature, llm.default_params.top_k, llm.default_params.min_p) == (0.25, 6, 0.05)
        assert llm.params(temperature=1).top_k == 6


@pytest.mark.filterwarnings("ignore:.*counts as missing")
def test_a_file_with_wrong_ids_that_nothing_needs_answers_as_without_them(tmp_path: Path) -> None:
    ids = {f"tokenizer.ggml.{name}_token_id": (1 << 32) - 1 for name in ("padding", "unknown", "eot", "bos")}
    path = tiny_models.write_tiny_model(tmp_path / "ids.gguf", metadata=ids)
    sound = tiny_models.write_tiny_model(tmp_path / "sound.gguf", leave_out=tuple(ids))
    with pytest.warns(RuntimeWarning, match="padding_token_id"):
        llm = edgellm.load(path, executor="reference")
    with llm, edgellm.load(sound, executor="reference") as expected:
        assert greedy(llm, "the word", 4).tokens == greedy(expected, "the word", 4).tokens
        assert llm.tokenizer.special == expected.tokenizer.special


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llama.context_length", 0),
        ("llama.attention.head_count", "four"),
        ("llama.attention.layer_norm_rms_epsilon", 0.5),
        ("llama.rope.dimension_count", 3),
        ("general.architecture", True),
        ("tokenizer.ggml.eos_token_id", 276),
    ],
)
def test_an_override_out_of_range_is_the_callers_fault(paths: dict[str, Path], key: str, value: Any) -> None:
    with pytest.raises(edgellm.ParameterError, match=f"override of {key}"):
        edgellm.load(paths["llama"], executor="reference", kv_overrides={key: value})


def test_logprobs_of_an_answer_and_of_a_text_agree(llm: edgellm.LLM) -> None:
    answer = greedy(llm, "the word", 8, ignore_eos=True, logprobs=3)
    assert [entry.token for entry in answer.logprobs] == list(answer.tokens)
    assert all(len(entry.top) == 3 and entry.top[0].token == entry.token for entry in answer.logprobs)
    ids = llm.prompt_ids("the word")
    rows = llm.logprobs(ids + list(answer.tokens), top=3)
    assert rows[0].logprob is None and len(rows) == len(ids) + 8
    for row, entry in zip(rows[len(ids) :], answer.logprobs, strict=True):
        assert (row.token, row.bytes, row.text) == (entry.token, entry.bytes, entry.text)
        assert row.logprob == pytest.approx(entry.logprob, abs=2e-3)
        assert [t.token for t in row.top] == [t.token for t in entry.top]
    score = llm.loglikelihood("the word", " and")
    assert score.logprob == pytest.approx(
        sum(row.logprob for row in llm.logprobs("the word and")[len(ids) :]), abs=1e-4
    )
    assert llm.logprobs("") == []


def test_perplexity_is_that_of_the_second_halves(llm: edgellm.LLM) -> None:
    ids = llm.tokenize("the other word and the thing, " * 20)[:128]
    assert len(ids) == 128
    logprobs = [r.logprob for start in (0, 64) for r in llm.logprobs(ids[start : start + 64])[33:]]
    assert llm.perplexity(ids, 64) == pytest.approx(np.exp(-np.mean(logprobs)), rel=1e-5)


def test_eight_threads_get_what_each_would_get_alone(paths: dict[str, Path]) -> None:
    with edgellm.load(paths["gemma3"], executor="cpu") as llm:
        prompts = [f"the word {i} and " * (i + 1) for i in range(8)]
        alone = [greedy(llm, prompt, ignore_eos=True) for prompt in prompts]
        together: dict[int, str] = {}

        def work(i: int) -> None:
            together[i] = greedy(llm, prompts[i], ignore_eos=True)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(HANG_S)
        assert [together[i] for i in range(8)] == alone
        wait_until_idle(llm)
        llm.engine.cache.check([])


def test_async_answers_are_the_same(llm: edgellm.LLM) -> None:
    async def main() -> None:
        whole = greedy(llm, TALK)
        assert "".join([chunk.text async for chunk in llm.astream(TALK, temperature=0, max_tokens=24)]) == whole
        assert "".join([chunk.text async for chunk in llm.stream(TALK, temperature=0, max_tokens=24)]) == whole
        answers = await asyncio.gather(*(llm.agenerate(TALK, temperature=0, max_tokens=24) for _ in range(5)))
        assert answers == [whole] * 5
        assert (await llm.achat(TALK, temperature=0, max_tokens=24)).content == whole

    asyncio.run(main())


def test_an_async_answer_ends_when_its_task_is_cancelled_or_its_iterator_closed(llm: edgellm.LLM) -> None:
    async def main() -> None:
        started = asyncio.Event()

        async def consume() -> None:
            async for _ in llm.astream("the", ignore_eos=True):
                started.set()

        task = asyncio.create_task(consume())
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        stream = llm.astream("the", ignore_eos=True)
        await anext(stream)
        await stream.aclose()

    asyncio.run(main())
    wait_until_idle(llm)
    assert not any(llm.engine.cache.n_used())


def test_leaving_a_loop_ends_the_work(llm: edgellm.LLM) -> None:
    for _ in llm.stream("the", ignore_eos=True):
        break
    wait_until_idle(llm)
    with pytest.raises(KeyboardInterrupt):
        for _ in llm.stream("the", ignore_eos=True):
            raise KeyboardInterrupt
    gc.collect()
    wait_until_idle(llm)
    chunks = llm.stream("the", ignore_eos=True)
    next(chunks)
    chunks.close()
    chunks.close()
    assert list(chunks) == []
    wait_until_idle(llm)
    assert not any(llm.engine.cache.n_used())


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_while_waiting_leaves_the_model_usable(llm: edgellm.LLM) -> None:
    import signal

    whole = greedy(llm, "the word")
    inside = threading.Event()
    hook_calls = []

    def slow(index: int, op: object, view: object) -> None:
        hook_calls.append(index)
        inside.set()
        time.sleep(0.02)

    def interrupt() -> None:
        inside.wait(HANG_S)
        signal.raise_signal(signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        llm.generate("another prompt", max_tokens=100, ignore_eos=True, hook=slow)
    thread.join()
    assert greedy(llm, "the word") == whole
    wait_until_idle(llm)
    llm.engine.cache.check([])


def test_a_cancel_flag_ends_the_answer(llm: edgellm.LLM) -> None:
    cancel = threading.Event()
    seen = []
    for chunk in llm.stream("the", cancel=cancel, ignore_eos=True):
        seen.append(chunk.finish_reason)
        if len(seen) == 3:
            cancel.set()
    assert seen == [None, None, None, "cancelled"]


@pytest.mark.parametrize(("n", "answer"), [(255, 2), (256, 1)])
def test_the_answer_ends_with_the_context(llm: edgellm.LLM, n: int, answer: int) -> None:
    reply = llm.generate([5] * n, ignore_eos=True)
    assert (len(reply.tokens), reply.finish_reason) == (answer, "context_full")


@pytest.mark.parametrize("n", [257, 2560])
def test_a_prompt_longer_than_the_context_is_an_error_with_both_counts(llm: edgellm.LLM, n: int) -> None:
    for ask in (llm.generate, llm.logprobs):
        with pytest.raises(edgellm.ContextFullError, match=rf"{n} tokens.* 256"):
            ask([5] * n)


def test_a_hook_that_closes_its_model_is_refused_and_the_model_goes_on(llm: edgellm.LLM) -> None:
    with pytest.raises(edgellm.ParameterError, match="closed its own model"):
        greedy(llm, "the", 3, hook=lambda index, op, read: llm.close())
    assert len(greedy(llm, "the", 3).tokens) == 3


@pytest.mark.parametrize("copier", [pickle.dumps, copy.copy, copy.deepcopy])
def test_a_model_says_why_it_cannot_be_copied(llm: edgellm.LLM, copier: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError, match="Load it again"):
        copier(llm)


def test_a_hook_changes_what_the_model_computes(llm: edgellm.LLM) -> None:
    def steer(index: int, op: object, view: object) -> None:
        if index == len(llm.program.ops) - 1:
            view("logits")[:, 100] = 1e3  # type: ignore[operator]

    assert greedy(llm, "the", 3, hook=steer).tokens == (100, 100, 100)


def test_a_hook_sees_the_whole_prompt_and_what_it_changed_is_never_found_again(llm: edgellm.LLM) -> None:
    n_seen: list[int] = []

    def distort(index: int, op: Op, read: Callable[[str], np.ndarray]) -> None:
        if isinstance(op, Embed):
            n_seen.append(len(read(op.out)))
            read(op.out)[:] += 1

    known, other = [7, 9, 11] * 25, [8, 9, 11] * 25
    greedy(llm, known, 3)
    hooked = greedy(llm, known, 3, hook=distort)
    assert hooked.timings.reused_n == 0 and n_seen[0] == len(known)
    greedy(llm, other, 3, hook=distort)
    assert greedy(llm, other, 3).timings.reused_n == 0
    assert greedy(llm, known, 3).timings.reused_n > 0


def test_a_conversation_remembers_and_keeps_a_broken_off_reply(llm: edgellm.LLM) -> None:
    talk = llm.conversation("Be brief.", temperature=0, max_tokens=6, ignore_eos=True)
    first = talk.send("Say a word.")
    assert first == greedy(llm, TALK, 6, ignore_eos=True)
    assert talk.last is not None and talk.last.timings.generation_n == 6
    stream = talk.stream("Another?")
    next(stream)
    stream.close()
    assert [m.role for m in talk.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert talk.last.finish_reason == "cancelled" and len(talk.last.tokens) == 1
    assert talk.undo() == edgellm.Message("user", "Another?")
    assert [m.role for m in talk.messages] == ["system", "user", "assistant"]
    with pytest.raises(edgellm.ContextFullError):
        talk.send("word " * 500)
    assert len(talk.messages) == 3
    talk.clear()
    assert [m.role for m in talk.messages] == ["system"]
    assert talk.undo() is None


def test_close_frees_everything_and_later_use_is_a_named_error(paths: dict[str, Path]) -> None:
    llm = edgellm.load(paths["llama"], executor="cpu")
    greedy(llm, "the")
    chunks = llm.stream("the", ignore_eos=True)
    next(chunks)
    pool = weakref.ref(llm.engine.cache.pool.arrays[0][0])
    llm.close()
    llm.close()
    with pytest.raises(edgellm.ClosedError):
        list(chunks)
    del chunks
    gc.collect()
    assert pool() is None
    for use in (lambda: llm.generate("the"), lambda: llm.logprobs("the"), lambda: llm.engine, lambda: llm.gguf):
        with pytest.raises(edgellm.ClosedError, match=r"llama\.gguf is closed"):
            use()
    assert "closed" in repr(llm)


def test_loading_and_closing_again_and_again_keeps_no_thread(paths: dict[str, Path]) -> None:
    before = threading.active_count()
    for _ in range(5):
        with edgellm.load(paths["llama"], executor="cpu", n_threads=2) as llm:
            greedy(llm, "the", 2)
    assert threading.active_count() == before


def test_models_in_one_process_answer_as_each_does_alone(paths: dict[str, Path]) -> None:
    options = [{"seed": 3}, {"seed": 3, "n_probs": 3, "logprobs": True}, {"seed": 5, "repeat_penalty": 1.3}]
    pairs = [("llama", "cpu"), ("gemma3", "cpu"), ("llama", "reference")]

    def told(chunks: Any) -> list[Any]:
        return [(chunk.token, chunk.logprobs) for chunk in chunks]

    def opened(pair: tuple[str, str]) -> edgellm.LLM:
        return edgellm.load(paths[pair[0]], executor=pair[1], n_threads=2)

    def asked(llm: edgellm.LLM, option: dict[str, Any]) -> Any:
        return llm.stream("the end", max_tokens=20, **option)

    alone = []
    for pair in pairs:
        with opened(pair) as llm:
            alone.append([told(asked(llm, option)) for option in options])
    models = [opened(pair) for pair in pairs]
    for i, option in enumerate(options):
        streams = [asked(llm, option) for llm in models]
        chunks: list[list[Any]] = [[] for _ in models]
        for turn in itertools.zip_longest(*streams):  # all of them at once
            for found, chunk in zip(chunks, turn, strict=True):
                found += [chunk] if chunk is not None else []
        assert [told(found) for found in chunks] == [answers[i] for answers in alone]
    while models:
        models.pop(0).close()
        for llm, answers in zip(models, alone[len(alone) - len(models) :], strict=True):
            assert told(asked(llm, options[1])) == answers[1], "closing another has changed it"


@pytest.mark.parametrize("executor", ["reference", "cpu"])
def test_a_model_that_nobody_holds_is_freed_without_close(paths: dict[str, Path], executor: str) -> None:
    before = threading.active_count()
    llm = edgellm.load(paths["llama"], executor=executor, n_threads=2)
    greedy(llm, "the", 2)
    wait_until_idle(llm)
    gone = weakref.ref(llm.engine), weakref.ref(llm.executor), weakref.ref(llm.engine.cache.pool.arrays[0][0])
    del llm
    gc.collect()
    end = time.monotonic() + HANG_S
    while threading.active_count() > before or any(reference() is not None for reference in gone):
        assert time.monotonic() < end, "something stays behind"
        time.sleep(0.01)
        gc.collect()


def test_the_default_context_is_bounded_by_the_memory(
    paths: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_models.write_tiny_model(tmp_path / "long.gguf", context_length=1 << 20)
    free = 64 << 20
    monkeypatch.setattr(loading, "system_memory", lambda: SystemMemory(free, free))
    with edgellm.load(path, executor="reference", force=True) as llm:
        assert loading.LEAST_CONTEXT < llm.n_ctx < 1 << 20 and llm.n_ctx % 32 == 0
        assert free // 5 < llm.memory_estimate.kv <= free // 4
    with edgellm.load(paths["llama"], executor="reference", force=True) as llm:
        assert llm.n_ctx == 256
    with edgellm.load(path, executor="reference", n_ctx=100, force=True) as llm:
        assert llm.n_ctx == 100


def test_a_model_that_does_not_fit_is_refused_unless_forced(
    paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "system_memory", lambda: SystemMemory(1 << 20, 1 << 20))
    with pytest.raises(edgellm.MemoryWouldExceedError):
        edgellm.load(paths["llama"], executor="reference")
    edgellm.load(paths["llama"], executor="reference", force=True).close()


@pytest.mark.parametrize(
    "options",
    [
        {"n_ctx": -1},
        {"n_ctx": 1.5},
        {"n_threads": 0},
        {"executor": "abacus"},
        {"max_tokens_per_step": 0},
        {"speculate": "luck"},
    ],
)
def test_senseless_options_of_load_are_refused(paths: dict[str, Path], options: dict) -> None:
    with pytest.raises(edgellm.ParameterError, match=next(iter(options))):
        edgellm.load(paths["llama"], **options)


def test_a_model_that_is_not_there_is_a_named_error(tmp_path: Path) -> None:
    with pytest.raises(edgellm.ModelNotFoundError):
        edgellm.load(tmp_path / "nothing.gguf")


def test_progress_is_told_while_loading_and_reading(paths: dict[str, Path]) -> None:
    stages: list[tuple[str, int, int | None, str]] = []
    read: list[tuple[int, int]] = []
    with edgellm.load(
        paths["llama"], executor="reference", max_tokens_per_step=16, progress=lambda *p: stages.append(p)
    ) as llm:
        llm.generate([5] * 40, max_tokens=1, progress=lambda *p: read.append(p))
    assert stages[0] == ("load", 0, 2, "llama.gguf")
    assert read == [(16, 40), (32, 40), (40, 40)]


def test_a_model_without_a_template_still_goes_on_with_text(tmp_path: Path) -> None:
    path = tiny_models.write_tiny_model(tmp_path / "plain.gguf", leave_out=("tokenizer.chat_template",))
    with edgellm.load(path, executor="reference") as llm:
        assert greedy(llm, "the", 2).timings.generation_n == 2
        with pytest.raises(edgellm.TemplateError):
            llm.generate(TALK)
    with edgellm.load(path, executor="reference", chat_template=tiny_models.CHATML) as llm:
        assert llm.apply_template(TALK).endswith("<|im_start|>assistant\n")


def test_smollm2_answers_the_same_warm_and_cold(smollm2_path: Path) -> None:
    question = [{"role": "user", "content": "What is the capital of France?"}]
    with edgellm.load(smollm2_path) as llm:
        cold = greedy(llm, question, 32)
        assert "Paris" in cold and cold.finish_reason == "stop"
        wait_until_idle(llm)
        warm = greedy(llm, question, 32)
        assert warm == cold and warm.timings.computed_n == 1


def test_gemma_reuses_a_prompt_longer_than_its_window(gemma_path: Path) -> None:
    text = "The library has a great many books about the sea and the ships that sailed on it. " * 45
    with edgellm.load(gemma_path, n_ctx=2048) as llm:
        cold = greedy(llm, text, 8, ignore_eos=True)
        assert cold.timings.prompt_n > 512 + 256
        wait_until_idle(llm)
        warm = greedy(llm, text, 8, ignore_eos=True)
        assert warm.tokens == cold.tokens and warm.timings.computed_n == 1
