"""Answers that are asked for at once, each by a caller of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import edgellm


def answers_together(llm: edgellm.LLM, prompts: Sequence[list[int]], options: dict[str, Any]) -> list[list[int]]:
    """The tokens of each, in the order of the prompts."""
    with ThreadPoolExecutor(len(prompts)) as callers:
        return list(callers.map(lambda prompt: list(llm.generate(prompt, **options).tokens), prompts))


def begun_together(llm: edgellm.LLM, prompts: Sequence[list[int]], options: dict[str, Any]) -> list[Any]:
    """The answers of as many callers, of whom nobody has a step before all are in line."""
    holds, n = threading.Event(), len(prompts)

    def hold(*_: Any) -> None:
        holds.set()
        until = time.monotonic() + 60
        while len(llm.engine.scheduler.requests) <= n and time.monotonic() < until:
            time.sleep(0.001)

    with ThreadPoolExecutor(n + 1) as callers:
        callers.submit(llm.engine.call, hold)
        assert holds.wait(60)
        return list(callers.map(lambda prompt: llm.generate(prompt, **options), prompts))
