"""A model that says what it is told to: a real LLM (tokenizer, template, scheduler, reader) over scripted logits.

``scripted_llm(["<tool_call>...", "It is 3 degrees."])`` answers the first request with the first text, and so on. The
executor keeps tokens in the paged cache and reads them back, as ``fake_executor`` does, so paging is judged, too. A
constraint may choose other tokens than the script's: the script then goes on behind the place that agrees best with
what was said last, and tokens that end a JSON text come before all others.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from conftest import real_model
from fake_executor import FakeExecutor, fake_layers

from edgellm.engine.cache import KVCache, pool_blocks
from edgellm.engine.engine import Engine
from edgellm.formats.gguf import GGUFFile
from edgellm.kernels.kv import CachePool
from edgellm.kernels.program import Program
from edgellm.llm import LLM
from edgellm.loading import Model
from edgellm.memory import MemoryNeed
from edgellm.sampling import SamplingParams
from edgellm.tokenizer import Tokenizer
from edgellm.tokenizer.vocabulary import TokenType

Answer = str | Sequence[int]
"""Text, behind which comes the end-of-generation token, or all ids of an answer."""

SCRIPTED, ENDING = 60.0, 40.0  # logits: the script's token, then what ends a text under a constraint
ENDINGS = ("}", "]", '"', '"}', "}}", '"}}', "</")


@dataclass
class Begun:
    """A request and its answer; ``started`` once its first token is said."""

    prompt: list[int]
    answer: list[int]
    started: bool = False

    def agreement(self, said: list[int]) -> int:
        """How many of the tokens said are the answer's."""
        same = [a == b for a, b in zip(said, self.answer, strict=False)]
        return same.index(False) if False in same else len(same)

    def place_behind(self, said: list[int]) -> int:
        """Where the answer goes on: behind the longest end of what was said that stands in it."""
        for n in range(min(len(said), 16), 0, -1):
            for at in range(len(self.answer) - n, -1, -1):
                if self.answer[at : at + n] == said[len(said) - n :]:
                    return at + n
        return len(said)


class Script:
    """The answers that are still to be given, and those that are being given, by their prompts."""

    def __init__(self, answers: Sequence[Answer] | Callable[[str], Answer], tokenizer: Tokenizer) -> None:
        self.answers = answers if callable(answers) else list(answers)
        self.tokenizer = tokenizer
        self.prompts: list[list[int]] = []  # of all requests so far
        self.begun: list[Begun] = []  # the youngest last
        self.lock = threading.Lock()

    def begin(self, prompt: Sequence[int]) -> None:
        """A request comes in."""
        with self.lock:
            self.prompts.append(list(prompt))
            if callable(self.answers):
                answer = self.answers(self.tokenizer.decode(prompt, special=True))
            else:
                assert self.answers, "the script has no answer left"
                answer = self.answers.pop(0)
            self.begun.append(Begun(list(prompt), self._ids(answer)))

    def _ids(self, answer: Answer) -> list[int]:
        if not isinstance(answer, str):
            return list(answer)
        assert self.tokenizer.eos_id is not None
        return [*self.tokenizer.encode(answer, False, parse_special=True), self.tokenizer.eos_id]

    def next_token(self, history: list[int]) -> int:
        """What follows ``history``: of the answers to its longest prompt the one that agrees best with it."""
        with self.lock:
            fitting = [row for row in self.begun if history[: len(row.prompt)] == row.prompt]
            assert fitting, "nobody asked for this"
            longest = max(len(row.prompt) for row in fitting)
            fitting = [row for row in fitting if len(row.prompt) == longest]
            said = history[longest:]
            new = [row for row in fitting if not row.started]
            row = new[0] if new and not said else max(reversed(fitting), key=lambda row: row.agreement(said))
            row.started = True
        assert self.tokenizer.eos_id is not None
        place = len(said) if row.agreement(said) == len(said) else row.place_behind(said)
        return row.answer[place] if place < len(row.answer) else self.tokenizer.eos_id


class ScriptedExecutor(FakeExecutor):
    """Logits of the script; ``fail``, ``poison`` and ``pause_s`` as in ``FakeExecutor``."""

    backend, kv_dtype = "scripted", "float32"

    def __init__(self, program: Program, pool: CachePool, script: Script, max_tokens: int) -> None:
        super().__init__(program, pool, max_tokens)
        self.script = script
        row = np.zeros(program.n_vocab, np.float32)
        for place, text in enumerate(ENDINGS):
            if (token := script.tokenizer.token_id(text)) is not None:
                row[token] = ENDING - 2 - place
        row[script.tokenizer.eos_id] = ENDING
        self._row = row

    def _logits(self, seen: list[list[tuple[int, int]]]) -> np.ndarray:
        row = self._row.copy()
        row[self.script.next_token([token for _, token in seen[0]])] = SCRIPTED
        return row


class ScriptedEngine(Engine):
    """Tells the script of each request."""

    def _generation(self, prompt: Sequence[int], *args: Any, **options: Any) -> Any:
        request = super()._generation(prompt, *args, **options)
        assert isinstance(self.executor, ScriptedExecutor)
        self.executor.script.begin(prompt)
        return request


@lru_cache
def tokenizer_metadata() -> dict[str, Any]:
    """What SmolLM2's file says of its tokens; skips without the file."""
    with GGUFFile.open(real_model("smollm2", "smollm2.gguf")) as file:
        return {key: value for key, value in file.metadata.items() if key.startswith("tokenizer.")}


@lru_cache
def tokenizer_with(control: tuple[str, ...] = ()) -> tuple[dict[str, Any], Tokenizer]:
    """SmolLM2's metadata and tokenizer, with further control tokens."""
    metadata = dict(tokenizer_metadata())
    new = [text for text in control if text not in metadata["tokenizer.ggml.tokens"]]
    types = [*np.asarray(metadata["tokenizer.ggml.token_type"]).tolist(), *[int(TokenType.CONTROL)] * len(new)]
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], *new]
    metadata["tokenizer.ggml.token_type"] = np.array(types, np.int32)
    return metadata, Tokenizer.from_gguf(metadata)


def scripted_llm(
    answers: Sequence[Answer] | Callable[[str], Answer],
    template: str | None = None,
    *,
    control: Sequence[str] = (),
    n_ctx: int = 8192,
    max_tokens_per_step: int = 512,
    n_parallel: int = 4,
) -> LLM:
    """An LLM with SmolLM2's tokenizer that gives these answers, one for each request in turn.

    answers    or a function from the text of a prompt to its answer
    template   Jinja text or a known name; None is SmolLM2's own
    control    texts that shall be control tokens of the vocabulary

    ``llm.executor`` is the ``ScriptedExecutor``: ``.script.prompts`` has the ids of each request, ``.pause_s`` makes a
    step last, ``.fail`` makes one fail.
    """
    metadata, tokenizer = tokenizer_with(tuple(control))
    program = Program("scripted", (), {}, {}, fake_layers((0,)), {}, tokenizer.n_vocab, n_ctx, 8)
    blocks = pool_blocks(program.cache_layers, n_ctx, max_tokens_per_step, n_parallel)
    script = Script(answers, tokenizer)
    executor = ScriptedExecutor(
        program, CachePool(program.cache_layers, blocks, "float32"), script, max_tokens_per_step
    )
    engine = ScriptedEngine(executor, KVCache(executor.pool, n_ctx), tokenizer.eog_ids)  # type: ignore[arg-type]
    path = Path("scripted.gguf")
    gguf: Any = SimpleNamespace(
        metadata={"general.architecture": "scripted", "general.name": "Scripted", **metadata},
        path=path,
        nbytes=0,
        overrides={},
        tensors={},
        close=lambda: None,
    )
    return LLM(
        Model(path, gguf, program, tokenizer, engine, 1, SamplingParams(), MemoryNeed(0, 0, 0, 0), "cpu", template)
    )
