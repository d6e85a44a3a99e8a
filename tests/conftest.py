"""Fixtures that many tests share: the two real models, when they are on this machine, and the chat."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from chat_talk import Talk


def real_model(name: str, file: str) -> Path:
    """The model ``name`` of the catalogue in the product's store, else $EDGELLM_TEST_MODELS/<file>; skips without."""
    from edgellm.formats.errors import ModelNotFoundError
    from edgellm.store.catalogue import installed

    folder = os.environ.get("EDGELLM_TEST_MODELS")
    with contextlib.suppress(ModelNotFoundError):
        return installed(name)
    if folder and (Path(folder) / file).is_file():
        return Path(folder) / file
    pytest.skip(f"the model is not here: run 'edgellm pull {name}', or set EDGELLM_TEST_MODELS to a folder with {file}")


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """SmolLM2-135M-Instruct Q4_1."""
    return real_model("smollm2", "smollm2.gguf")


@pytest.fixture(scope="session")
def gemma_path() -> Path:
    """Gemma 3 270M Q4_K_M."""
    return real_model("gemma3-270m", "gemma.gguf")


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C works here and in every child, also where the tests run in the background of a shell that ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(params=[False, True], ids=["plain", "drafted"])
def drafts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether tokens are guessed, at any time and as if it cost nothing: tests/speculation_trials.py."""
    if request.param:
        from speculation_trials import free_drafts

        free_drafts(monkeypatch)
    return bool(request.param)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs ``steps(talk)`` in a chat of a given size: tests/chat_talk.py."""
    from chat_talk import Talk  # imports Textual, which most tests do without

    monkeypatch.setenv("EDGELLM_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TMUX", raising=False)

    def start(
        steps: Callable[[Talk], Awaitable[None]],
        size: tuple[int, int] = (100, 30),
        toasts: bool = False,
        **options: Any,
    ) -> Talk:
        talk = Talk(tmp_path, **options)

        async def all_of_it() -> None:
            async with talk.app.run_test(size=size, notifications=toasts) as talk.pilot:
                await talk.pilot.pause()
                await talk.settled()
                await steps(talk)

        try:
            asyncio.run(all_of_it())
        finally:
            talk.chat.close()
        return talk

    return start
