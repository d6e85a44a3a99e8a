"""Models that write by denoising: their logits beside transformers and llama.cpp, their answers beside a plain loop."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from answers_together import begun_together
from cpu_programs import cpu_executor, single_sequence
from denoising_models import MASK, MODELS, both_ways, save_row
from test_models import nmse
from tiny_models import write_tiny_model

import edgellm
from edgellm.cli import main
from edgellm.engine.scheduler import Scheduler
from edgellm.formats.errors import EdgeLLMError, FormatError, UnsupportedError
from edgellm.formats.gguf import GGUFFile
from edgellm.kernels.program import Batch, Denoising
from edgellm.kernels.reference import ReferenceExecutor
from edgellm.loading import LoadOptions, choose_context
from edgellm.models import build_program
from edgellm.quantize.convert import convert
from edgellm.quantize.inputs import open_input
from edgellm.sampling.options import parse_setting
from edgellm.tokenizer import Tokenizer

TOKENS = np.random.default_rng(0).integers(0, 270, 60).tolist()
PROMPT = TOKENS[:9]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Path]]:
    """rows(name): transformers' model of a row of MODELS, and the converted file."""
    made: dict[str, tuple[Any, Path]] = {}

    def of(name: str) -> tuple[Any, Path]:
        if name not in made:
            folder = tmp_path_factory.mktemp("row")
            model = save_row(folder / "hf", name)
            with open_input(folder / "hf") as source:
                (path,) = convert(source, folder / "out.gguf", "f32")
            made[name] = model, path
        return made[name]

    return of


# -- the forward -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_those_of_transformers_whose_tokens_see_both_ways(
    name: str, rows: Callable[[str], tuple[Any, Path]]
) -> None:
    model, path = rows(name)
    with GGUFFile.open(path) as gguf:
        program = build_program(gguf)
        assert gguf.architecture == name.split()[0].rstrip(",")
        logits = ReferenceExecutor(program).run(Batch.single(program, TOKENS))
    assert nmse(logits, both_ways(model, TOKENS)) <= 1e-10
    expected = Denoising(MASK, True, "entropy", 0) if name == "dream" else Denoising(MASK, False, "confidence", 32)
    assert program.denoising == expected and not program.cache_layers and not program.is_encoder


PROGRAM = """
import json, sys, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.embedding, params.warmup = sys.argv[1], True, False
params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
params.n_ctx, params.n_batch, params.n_ubatch, params.n_parallel = 256, 256, 256, 1
server = xllamacpp.Server(params)
told = server.handle_embeddings({"input": sys.argv[2], "model": "x"})
print("VECTOR", json.dumps(told["data"][0]["embedding"]))
"""


@pytest.mark.parametrize("name", ["llada", "llada-moe", "dream"])
def test_llama_cpp_has_the_same_rows_before_the_head(name: str, rows: Callable[[str], tuple[Any, Path]]) -> None:
    """Its server gives no logits of such models, but vectors: the mean of what the head reads."""
    pytest.importorskip("xllamacpp", reason="llama.cpp is the judge")
    path, text = rows(name)[1], "the license of any work and the end"
    done = subprocess.run([sys.executable, "-c", PROGRAM, path, text], capture_output=True, text=True, timeout=120)
    lines = [line for line in done.stdout.splitlines() if line.startswith("VECTOR ")]
    assert lines, done.stderr[-2000:]
    judge = np.array(json.loads(lines[0].removeprefix("VECTOR ")))
    with edgellm.load(path, executor="reference", n_ctx=96) as opened:
        vector = opened.embed([text], pooling="mean")[0]
    assert nmse(vector, judge / np.linalg.norm(judge)) <= 1e-6


@pytest.mark.parametrize("name", ["llada-moe", "dream"])
def test_the_cpu_is_near_the_reference(name: str, rows: Callable[[str], tuple[Any, Path]]) -> None:
    with GGUFFile.open(rows(name)[1]) as gguf:
        program = build_program(gguf)
        batch = single_sequence(program, 50)
        with closing(cpu_executor(program, 2)) as executor:
            assert nmse(executor.run(batch), ReferenceExecutor(program).run(batch)) <= 1e-6


# -- the loop, as its makers have published it -------------------------------------------------------------------------

Sure = Callable[[np.ndarray, int], float]
SURE: dict[str, Sure] = {
    "confidence": lambda p, token: float(p[token]),
    "margin": lambda p, _: float(np.sort(p)[-1] - np.sort(p)[-2]),
    "entropy": lambda p, _: float((p * np.log(p + 1e-10)).sum()),
}
NUMBERS = {"entropy": 1, "margin": 2, "confidence": 4}


class Plain:
    """A plain loop over the reference executor; greedy."""

    def __init__(self, path: Path, *, shifted: bool, scale: float = 0.0) -> None:
        self.file = GGUFFile.open(path)
        program = build_program(self.file)
        self.run = lambda text: ReferenceExecutor(program).run(Batch.single(program, text))
        self.shifted, self.scale = shifted, scale

    def logits(self, text: list[int], n_prompt: int) -> np.ndarray:
        logits = self.run(text)
        if self.scale:
            bare = self.run([MASK] * n_prompt + text[n_prompt:])
            logits = bare + (self.scale + 1) * (logits - bare)
        if self.shifted:
            logits = np.concatenate([logits[:1], logits[:-1]])
        logits[:, MASK] = -np.inf
        return logits

    def reveal(self, text: list[int], n_prompt: int, places: list[int], n: int, sure: Sure) -> None:
        logits = self.logits(text, n_prompt).astype(np.float64)
        p = np.exp(logits - logits.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        tokens = {place: int(logits[place].argmax()) for place in places}
        by_sure = sorted(places, key=lambda place: -sure(p[place], tokens[place]))
        for place in by_sure[:n]:
            text[place] = tokens[place]


def in_blocks(plain: Plain, prompt: list[int], n: int, block: int, steps: int, sure: Sure) -> list[int]:
    """LLaDA's: blocks one after the other, in each step as many tokens."""
    text = [*prompt, *[MASK] * n]
    for first in range(len(prompt), len(text), block):
        each = steps // (n // block)
        for step in range(each):
            places = [i for i in range(first, first + block) if text[i] == MASK]
            plain.reveal(text, len(prompt), places, block // each + (step < block % each), sure)
    return text[len(prompt) :]


def over_time(plain: Plain, prompt: list[int], n: int, steps: int, sure: Sure, eps: float = 1e-3) -> list[int]:
    """Dream's: all places, in each step a share of those that are left."""
    text = [*prompt, *[MASK] * n]
    times = np.linspace(1, eps, steps + 1)
    for i in range(steps):
        places = [place for place, token in enumerate(text) if token == MASK]
        share = 1 - times[i + 1] / times[i] if i < steps - 1 else 1
        plain.reveal(text, len(prompt), places, int(len(places) * share), sure)
    return text[len(prompt) :]


GREEDY: dict[str, Any] = {"temperature": 0, "ignore_eos": False, "special": True}


def answer(path: Path, n: int, **options: Any) -> list[int]:
    with edgellm.load(path, executor="reference", n_ctx=96) as llm:
        stopless = {"logit_bias": dict.fromkeys(llm.tokenizer.eog_ids, False)}
        return list(llm.generate(PROMPT, max_tokens=n, **stopless, **GREEDY | options).tokens)


def without_ends(path: Path, plain: Plain) -> Plain:
    """The same where no token ends the answer."""
    inner = plain.logits

    def logits(text: list[int], n_prompt: int) -> np.ndarray:
        found = inner(text, n_prompt)
        found[:, sorted(Tokenizer.from_gguf(plain.file.metadata).eog_ids)] = -np.inf
        return found

    plain.logits = logits  # type: ignore[method-assign]
    return plain


@pytest.mark.parametrize("algorithm", SURE)
@pytest.mark.parametrize(("block", "steps"), [(8, 24), (8, 9), (24, 5)])
def test_blocks_are_denoised_as_a_plain_loop_denoises_them(
    algorithm: str, block: int, steps: int, rows: Callable[[str], tuple[Any, Path]]
) -> None:
    path = rows("llada")[1]
    plain = without_ends(path, Plain(path, shifted=False))
    expected = in_blocks(plain, PROMPT, 24, block, steps, SURE[algorithm])
    options = {"diffusion_block_length": block, "diffusion_steps": steps, "diffusion_algorithm": NUMBERS[algorithm]}
    assert answer(path, 24, **options) == expected
    plain.file.close()


@pytest.mark.parametrize(("algorithm", "steps"), [("entropy", 20), ("confidence", 7), ("margin", 40)])
def test_time_runs_as_in_a_plain_loop(algorithm: str, steps: int, rows: Callable[[str], tuple[Any, Path]]) -> None:
    path = rows("dream")[1]
    plain = without_ends(path, Plain(path, shifted=True))
    expected = over_time(plain, PROMPT, 20, steps, SURE[algorithm])
    assert answer(path, 20, diffusion_steps=steps, diffusion_algorithm=NUMBERS[algorithm]) == expected
    plain.file.close()


def test_guidance_weighs_what_the_prompt_changes(rows: Callable[[str], tuple[Any, Path]]) -> None:
    path = rows("llada")[1]
    plain = without_ends(path, Plain(path, shifted=False, scale=1.5))
    expected = in_blocks(plain, PROMPT, 16, 8, 8, SURE["confidence"])
    options = {"diffusion_block_length": 8, "diffusion_steps": 8}
    assert answer(path, 16, diffusion_cfg_scale=1.5, **options) == expected != answer(path, 16, **options)
    plain.file.close()


# -- answers ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llm(rows: Callable[[str], tuple[Any, Path]]) -> Any:
    with edgellm.load(rows("llada")[1], n_ctx=96, n_threads=2) as opened:
        yield opened


@pytest.mark.parametrize("algorithm", range(5))
def test_a_seed_makes_the_same_answer_alone_and_beside_others(algorithm: int, llm: Any) -> None:
    options: dict[str, Any] = {"max_tokens": 20, "temperature": 1.0, "diffusion_algorithm": algorithm}
    options |= {"diffusion_steps": 6, "diffusion_block_length": 8, "diffusion_alg_temp": 0.5, "special": True}
    alone = [list(llm.generate(PROMPT, seed=seed, **options).tokens) for seed in (1, 2)]
    assert alone[0] != alone[1] and all(MASK not in tokens for tokens in alone)
    found: dict[int, list[int]] = {}

    def ask(seed: int) -> None:
        found[seed] = list(llm.generate(PROMPT, seed=seed, **options).tokens)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[1], found[2]] == alone


@pytest.mark.parametrize("fields", [{}, {"diffusion_algorithm": 0}, {"diffusion_alg_temp": 0.5}, {"temperature": 0.5}])
def test_it_is_known_whether_chance_has_a_part_in_an_answer_and_in_its_events(fields: dict[str, Any], llm: Any) -> None:
    options = {"temperature": 0.0, "diffusion_algorithm": 1} | fields
    with closing(llm.stream(PROMPT, **options)) as chunks, closing(llm.events("Hi", **options)) as events:
        assert chunks.draws == events.draws == bool(fields)


def test_an_answer_ends_by_its_token_by_its_length_or_by_the_context(llm: Any) -> None:
    greedy: dict[str, Any] = {"temperature": 0, "diffusion_steps": 4, "diffusion_length": 16}
    ends = dict.fromkeys(llm.tokenizer.eog_ids, False)
    short = llm.generate(PROMPT, max_tokens=5, logit_bias=ends, **greedy)
    assert (len(short.tokens), short.finish_reason) == (5, "length")
    assert llm.generate(PROMPT, max_tokens=0, **greedy).finish_reason == "length"
    full = llm.generate(PROMPT, logit_bias=ends, **greedy)
    assert (len(full.tokens), full.finish_reason) == (96 - len(PROMPT), "context_full")
    stopped = llm.generate(PROMPT, logit_bias={next(iter(ends)): 1e4}, **greedy)
    assert (stopped.finish_reason, len(stopped.tokens)) == ("stop", 0)
    chunks = list(llm.stream(PROMPT, max_tokens=24, logit_bias=ends, **greedy))
    assert [chunk.token for chunk in chunks[:-1]] == list(
        llm.generate(PROMPT, max_tokens=24, logit_bias=ends, **greedy).tokens
    )


def test_a_caller_may_leave(llm: Any) -> None:
    flag = threading.Event()
    flag.set()
    assert llm.generate(PROMPT, cancel=flag).finish_reason == "cancelled"
    stream = llm.stream(PROMPT, max_tokens=40)
    next(stream)
    stream.close()
    assert llm.generate(PROMPT, max_tokens=3).finish_reason in ("stop", "length")


REFUSED: dict[str, dict[str, Any]] = {
    "a grammar": {"regex": "a+"},
    "logprobs": {"logprobs": 2},
    "penalties": {"repeat_penalty": 1.2},
    "DRY": {"dry_multiplier": 0.8},
    "mirostat": {"mirostat": 2},
    "adaptive-p": {"adaptive_target": 0.3},
    "processors": {"processors": (lambda _, logits: logits,)},
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_needs_one_token_after_the_other_is_refused_by_name(what: str, llm: Any) -> None:
    if what == "a grammar":
        pytest.importorskip("llguidance", reason="answers of a form need it")
    with pytest.raises(UnsupportedError, match=what) as caught:
        llm.generate(PROMPT, max_tokens=4, **REFUSED[what])
    assert caught.value.code == "DENOISING"


def test_scores_beams_and_drafts_are_refused_by_name(llm: Any, rows: Callable[[str], tuple[Any, Path]]) -> None:
    for ask in (
        lambda: llm.logprobs("the and"),
        lambda: llm.loglikelihood("the", " and"),
        lambda: llm.perplexity("the and in on " * 20, n_ctx=32),
        lambda: llm.generate("the", num_beams=2),
        lambda: edgellm.load(rows("llada")[1], draft=rows("dream")[1]).close(),
    ):
        try:
            ask()
        except UnsupportedError as error:
            assert error.code in ("DENOISING", "DRAFT_MODEL")
        else:
            assert ask.__code__.co_names[0] == "edgellm"  # drafts are left out, as for models that make vectors


def test_the_command_for_perplexity_refuses_it_too(
    rows: Callable[[str], tuple[Any, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("the and in on " * 60)
    assert main(["perplexity", str(rows("llada")[1]), "-f", str(tmp_path / "text.txt"), "-c", "32"]) == 1
    assert "denois" in capsys.readouterr().err


def test_answers_have_their_steps_in_turn_where_only_one_fits(
    rows: Callable[[str], tuple[Any, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Scheduler, "_timely_tokens", lambda self: 1)
    monkeypatch.setattr("edgellm.engine.scheduler.LEAST_PROMPT_TOKENS", 1)
    options = {"max_tokens": 16, "temperature": 0, "diffusion_steps": 8, "diffusion_length": 16, "ignore_eos": True}
    with edgellm.load(rows("llada")[1], n_ctx=96, n_threads=1, n_parallel=2) as opened:
        opened.engine.scheduler.interactive = True
        sizes, run = list[int](), opened.engine.executor.run

        def seen(batch: Batch, *more: Any) -> Any:
            sizes.append(len(batch))
            return run(batch, *more)

        monkeypatch.setattr(opened.engine.executor, "run", seen)
        begun_together(opened, [TOKENS[:30], TOKENS[:5]], options)
    assert [n == sizes[0] for n in sizes[:6]] == [True, False] * 3


def test_an_answer_of_which_every_token_is_banned_ends_with_an_error(llm: Any) -> None:
    bans = dict.fromkeys(range(llm.program.n_vocab), False)
    for temperature in (0, 1):
        with pytest.raises(edgellm.EdgeLLMError):
            llm.generate(PROMPT, max_tokens=4, temperature=temperature, logit_bias=bans)


def test_its_rows_can_be_embedded(llm: Any) -> None:
    vectors = llm.embed(["the and in", "on the"])
    assert vectors.shape == (2, 64) and np.array_equal(llm.embed(["on the"])[0], vectors[1])


def test_a_user_is_told_in_a_word_how_it_writes(rows: Callable[[str], tuple[Any, Path]]) -> None:
    with edgellm.load(rows("dream")[1], n_ctx=32) as opened:
        (notice,) = opened.take_notices()
    assert "denoising" in notice and "--diffusion-steps" in notice
    assert parse_setting("diffusion-steps", "9") == ("diffusion_steps", 9)


def test_the_context_is_short_where_nobody_says_how_long(rows: Callable[[str], tuple[Any, Path]]) -> None:
    with GGUFFile.open(rows("dream")[1], {"dream.context_length": 131072}) as gguf:
        program = build_program(gguf)
    assert choose_context(program, LoadOptions()) == 2048
    assert choose_context(program, LoadOptions(n_ctx=4096)) == 4096


def test_run_and_the_server_answer_by_denoising(
    rows: Callable[[str], tuple[Any, Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    server_client = pytest.importorskip("server_client")
    from edgellm.cli import main
    from edgellm.server.models import ModelEntry, Models
    from edgellm.server.server import Server

    path, question = rows("llada")[1], [{"role": "user", "content": "the and"}]
    with edgellm.load(path, n_ctx=96) as opened:
        expected = opened.generate(question, max_tokens=8, temperature=0, diffusion_steps=4).text
    flags = ["--no-stdin", "-c", "96", "-n", "8", "--temp", "0", "--diffusion-steps", "4"]
    assert main(["run", str(path), "the and", *flags]) == 0
    assert capsys.readouterr().out.rstrip("\n") == expected.rstrip("\n")
    server = Server(Models([ModelEntry(("denoiser",), path)], LoadOptions(n_ctx=96)))
    with server_client.client_of(server) as client:
        body = {"messages": question, "max_tokens": 128, "temperature": 0, "logit_bias": {"65": 100}}
        whole = client.post("/v1/chat/completions", json=body).json()["choices"][0]
        chunks = server_client.events(client.post("/v1/chat/completions", json=body | {"stream": True}).text)
        text = "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks[:-1] if c["choices"])
        assert whole["message"]["content"] == text and text and whole["finish_reason"] == "length"
        refused = client.post("/v1/chat/completions", json=body | {"logprobs": True})
        assert refused.status_code == 400 and "denoising" in refused.text


BAD = {
    "tokenizer.ggml.mask_token_id": [None, -1, 276, 1 << 40, "0", 1.0],
    "diffusion.shift_logits": ["true", 1],
    "llada.attention.causal": [True],
}


@pytest.mark.parametrize("key", BAD)
def test_a_key_that_cannot_be_is_a_named_error(key: str, tmp_path: Path) -> None:
    for value in BAD[key]:
        keys = {"tokenizer.ggml.mask_token_id": 0, "llada.attention.causal": False} | {key: value}
        sizes: dict[str, Any] = {"n_embd": 64, "n_ff": 64, "n_head": 4, "n_head_kv": 2, "head_dim": 16}
        bad = write_tiny_model(tmp_path / "bad.gguf", "llada", "F32", metadata=keys, **sizes)
        with pytest.raises(EdgeLLMError) as caught, GGUFFile.open(bad) as gguf:
            build_program(gguf)
        assert isinstance(caught.value, FormatError) and "bad.gguf" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llada", {"alibi": True}), ("llada", {"block_type": "sequential"}), ("llada", {"include_qkv_bias": True}),
        ("llada", {"activation_type": "gelu"}), ("llada", {"mask_token_id": 280}), ("llada", {"rope": False}),
        ("llada-moe", {"qk_layernorm": False}), ("llada-moe", {"norm_topk_prob": True}),
        ("llada-moe", {"moe_layer_freq": [0, 1]}), ("dream", {"use_mrope": True}), ("dream", {"new_key": 1}),
        ("dream", {"use_sliding_window": True, "sliding_window": None}),
        ("dream", {"layer_types": ["full_attention", "sliding_attention"]}),
    ],
)  # fmt: skip
def test_settings_that_no_program_computes_are_refused_by_name(
    name: str, changes: dict[str, Any], rows: Callable[[str], tuple[Any, Path]]
) -> None:
    file = rows(name)[1].parent / "hf" / "config.json"
    written = file.read_text("utf-8")
    file.write_text(json.dumps(json.loads(written) | changes), "utf-8")
    try:
        with pytest.raises(EdgeLLMError, match=next(iter(changes))):
            open_input(file.parent)
    finally:
        file.write_text(written, "utf-8")
