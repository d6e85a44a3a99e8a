"""One answer on its way to the screen: streaming, Ctrl-C, progress of a long prompt, and what it cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgellm.cli.interrupt import StopOnInterrupt
from edgellm.cli.progress import ProgressBar
from edgellm.machine.terminal import echo

if TYPE_CHECKING:
    from edgellm.engine.requests import Timings
    from edgellm.generation import GenerationChunk


@dataclass(frozen=True)
class Answer:
    """What came of it: the text so far, why it ended, counts and times (None when it was stopped before any)."""

    text: str
    finish_reason: str | None
    timings: Timings | None
    stopped: bool


def stream_answer(start: Callable[..., Iterable[GenerationChunk]], write: Callable[[str], None]) -> Answer:
    """Give every piece of the answer to ``write``; the first Ctrl-C ends it and keeps what was said.

    ``start(cancel=, progress=)`` gives the chunks, as ``LLM.stream`` does.
    """
    pieces: list[str] = []
    finish_reason = timings = None
    with ProgressBar() as progress, StopOnInterrupt() as interrupt:
        for chunk in start(cancel=interrupt.flag, progress=progress.of("prefill")):
            if chunk.text:
                progress.finish()
                pieces.append(chunk.text)
                write(chunk.text)
            finish_reason = chunk.finish_reason or finish_reason
            timings = chunk.timings or timings
    return Answer("".join(pieces), finish_reason, timings, interrupt.stopped)


def say_notices(llm: Any) -> None:
    """Write on standard error what has happened to a model meanwhile."""
    for notice in getattr(llm, "take_notices", list)():
        echo(notice, err=True)


def timing_block(answer: Answer, n_ctx: int | None = None, runs_on: str = "") -> str:
    """The counts and times of an answer in a few lines."""
    from edgellm.machine.memory import peak_rss
    from edgellm.machine.terminal import fields, human_bytes

    t = answer.timings
    if t is None or not t.generation_n:
        return "no timings: it ended before the first token"
    used = t.prompt_n + t.generation_n
    return fields(
        (
            ("prompt", f"{t.prompt_n} tokens, {t.reused_n} reused, {t.prompt_tps:.1f} t/s, {t.prompt_ms / 1e3:.2f} s"),
            ("answer", f"{t.generation_n} tokens, {t.generation_tps:.1f} t/s, {t.generation_ms / 1e3:.2f} s"),
            *((("drafted", _drafted(t)),) if t.drafted_n else ()),
            ("first token", f"after {t.time_to_first_token_ms / 1e3:.2f} s"),
            ("context", f"{used} of {n_ctx} tokens" if n_ctx else f"{used} tokens"),
            ("ended by", str(answer.finish_reason)),
            *((("computed by", runs_on),) if runs_on else ()),
            ("peak memory", human_bytes(peak_rss())),
        )
    )


def _drafted(timings: Timings) -> str:
    gained = f", {timings.gained_n:+.1f} gained" if timings.gained_n else ""
    return f"{timings.drafted_n} tokens, {timings.accepted_n} accepted{gained}"
