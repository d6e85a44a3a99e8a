"""Answers that are asked for at once, each by a caller of its own."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import edgellm


def answers_together(llm: edgellm.LLM, prompts: Sequence[list[int]], options: dict[str, Any]) -> list[list[int]]:
    """The tokens of each, in the order of the prompts."""
    with ThreadPoolExecutor(len(prompts)) as callers:
        return list(callers.map(lambda prompt: list(llm.generate(prompt, **options).tokens), prompts))
