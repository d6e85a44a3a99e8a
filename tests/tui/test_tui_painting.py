"""While an answer grows lines are written past Textual's compositor: a terminal that keeps what it is told judges."""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from fake_chat_llm import ANSWERS, MARKDOWN, FakeChatLLM
from rich.cells import cell_len
from textual._compositor import LayoutUpdate
from textual.geometry import Region

from edgellm.sessions import SessionStore
from edgellm.tui import app as app_module
from edgellm.tui import painting
from edgellm.tui.app import ChatApp
from edgellm.tui.chat import Chat
from edgellm.tui.markdown import MarkdownDocument
from edgellm.tui.meters import Meters, timing_parts
from edgellm.tui.palette import palette_of

HANG_S = 60
_PART = re.compile(r"\x1b\[([0-9;]*)([A-Za-z])|([^\x1b]+)")
Cells = dict[tuple[int, int], tuple[str, str]]


class Screen:
    """Cells with their letters and colours, and how many times something was written."""

    def __init__(self) -> None:
        self.cells: Cells = {}
        self.updates: list[Any] = []

    def show(self, app: ChatApp, update: Any) -> None:
        if update is None:
            return
        self.updates.append(update)
        x = y = 0
        colours = ""
        for numbers, command, words in _PART.findall(update.render_segments(app.console)):
            if command == "H":
                y, x = (int(n) - 1 for n in numbers.split(";"))
            elif command == "m":
                colours = "" if numbers in ("", "0") else numbers
            for letter in words.replace("\n", ""):
                self.cells[y, x] = (letter, colours)
                for behind in range(1, cell_len(letter)):
                    self.cells[y, x + behind] = ("", colours)
                x += cell_len(letter)


class Talk:
    """An application whose pictures go to a ``Screen``, and a model that says a word when it may."""

    def __init__(self, folder: Path) -> None:
        self.pace = threading.Semaphore(0)
        load = lambda name, **options: FakeChatLLM(name, self.pace)  # noqa: E731
        self.chat = Chat(SessionStore(folder / "sessions.db"), load, "fake")
        self.app = ChatApp(self.chat)
        self.screen = Screen()
        self.app._display = lambda screen, update: self.screen.show(self.app, update)  # type: ignore[method-assign]
        self.pilot: Any = None

    async def until(self, condition: Callable[[], object]) -> None:
        end = time.monotonic() + HANG_S
        while not condition():
            assert time.monotonic() < end
            await self.pilot.pause(0.01)

    async def ask(self, text: str) -> Any:
        """Send a message; the answer that has no word yet."""
        self.app.prompt.put(text)
        await self.pilot.press("enter")
        await self.until(lambda: self.chat.answering)
        assert self.chat.answering is not None
        return self.chat.answering.node

    async def words(self, node: Any, n: int) -> None:
        """Let the model say ``n`` words, and draw them."""
        n_tokens = len(node.tokens) + n
        for _ in range(n):
            self.pace.release()
        await self.until(lambda: len(node.tokens) >= n_tokens or node.finish_reason)
        self.app.tick()
        await self.pilot.pause()

    async def finish(self) -> None:
        self.pace.release(400)
        await self.until(lambda: not self.chat.busy)
        while self.pace.acquire(blocking=False):
            pass
        await self.pilot.pause()

    def expected(self) -> Cells:
        """What Textual would draw now."""
        truth = Screen()
        strips = self.app.screen._compositor.render_strips(self.app.size)
        truth.show(self.app, LayoutUpdate([[strip] for strip in strips], self.app.size.region))
        return truth.cells

    async def check(self, rows: range) -> None:
        """The terminal comes to show in ``rows`` what Textual would draw there, and no more words are needed for it."""
        end = time.monotonic() + HANG_S
        while wrong := self.wrong(rows):
            assert time.monotonic() < end, wrong
            await self.pilot.pause(0.02)

    def wrong(self, rows: range) -> list[tuple[int, str, str]]:
        """Rows that show something else: number, what they show, what they should."""
        expected, wrong = self.expected(), []
        for y in rows:
            shown, wanted = (
                [cells.get((y, x), ("", "")) for x in range(self.app.size.width - 1)]  # the scrollbar comes after
                for cells in (self.screen.cells, expected)
            )
            if shown != wanted:
                wrong.append((y, "".join(c for c, _ in shown), "".join(c for c, _ in wanted)))
        return wrong

    @property
    def transcript_rows(self) -> range:
        region = self.app.transcript.region
        return range(region.y, region.bottom)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs ``steps(talk)`` in an application of a given size that draws as often as its clock beats."""
    monkeypatch.setenv("EDGELLM_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(app_module, "SHARE", 0)

    def start(steps: Callable[[Talk], Awaitable[None]], size: tuple[int, int] = (80, 24)) -> None:
        talk = Talk(tmp_path)

        async def all_of_it() -> None:
            async with talk.app.run_test(size=size) as talk.pilot:
                await talk.until(lambda: talk.chat.loading is None)
                await talk.pilot.pause()
                await steps(talk)

        try:
            asyncio.run(all_of_it())
        finally:
            talk.chat.close()

    return start


@pytest.mark.parametrize("size", [(100, 40), (80, 24), (40, 14)])
@pytest.mark.parametrize("question", ["sort", "think", "evil", "日本の川 😀 **wide** letters " * 9])
def test_a_growing_answer_stands_on_the_terminal_as_textual_would_draw_it(
    run: Any, question: str, size: tuple[int, int]
) -> None:
    async def steps(talk: Talk) -> None:
        for _ in range(2):  # the second scrolls
            node = await talk.ask(question)
            while not node.finish_reason:
                await talk.words(node, 3)
                await talk.check(talk.transcript_rows)
            await talk.finish()
            await talk.check(range(talk.app.size.height))

    run(steps, size)


def test_without_the_private_way_textual_draws_it_all(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(painting, "CAN_PAINT", False)

    async def steps(talk: Talk) -> None:
        node = await talk.ask("sort")
        await talk.words(node, 20)
        await talk.check(talk.transcript_rows)
        await talk.finish()
        await talk.check(range(talk.app.size.height))

    run(steps)


def test_what_lies_over_the_conversation_is_not_written_over(run: Any) -> None:
    async def steps(talk: Talk) -> None:
        node = await talk.ask(ANSWERS["sort"] * 2)
        await talk.words(node, 20)
        talk.app.say("a notification")
        await talk.pilot.pause()
        await talk.words(node, 20)
        await talk.pilot.pause()
        await talk.check(talk.transcript_rows)
        talk.app.clear_notifications()
        await talk.pilot.press("f1")
        await talk.pilot.pause()
        await talk.words(node, 20)
        await talk.pilot.pause()
        await talk.check(range(talk.app.size.height))
        await talk.pilot.press("escape")
        await talk.pilot.pause()
        await talk.words(node, 1)
        await talk.check(talk.transcript_rows)

    run(steps)


def test_only_lines_that_differ_are_written_and_none_that_is_out_of_sight(run: Any) -> None:
    async def steps(talk: Talk) -> None:
        node = await talk.ask("one two three four five six seven")
        await talk.words(node, 2)
        talk.screen.updates.clear()
        talk.app.transcript.grow()
        assert not talk.screen.updates
        await talk.words(node, 1)
        (lines,) = [u.strips for u in talk.screen.updates if getattr(u, "y", -1) in talk.transcript_rows]
        assert "echo: one two" in lines[0].text and not any(line.text.strip() for line in lines[1:])
        await talk.finish()
        node = await talk.ask("forever")
        await talk.words(node, 500)
        talk.app.transcript.scroll_home(animate=False)
        await talk.pilot.pause()
        talk.screen.updates.clear()
        await talk.words(node, 100)
        assert not [u for u in talk.screen.updates if getattr(u, "y", 99) in talk.transcript_rows]
        await talk.check(talk.transcript_rows)
        talk.app.action_stop()
        await talk.finish()

    run(steps)


def test_the_figures_and_the_scrollbar_are_true_when_the_answer_has_ended(run: Any) -> None:
    async def steps(talk: Talk) -> None:
        node = await talk.ask(ANSWERS["sort"] * 2)
        while not node.finish_reason:
            await talk.words(node, 5)
        await talk.finish()
        timings = node.timings
        used = int(timings["prompt_n"] + timings["generation_n"])
        shown = "".join(talk.screen.cells[talk.app.query_one(Meters).region.y, x][0] for x in range(80))
        assert f" {used}/4,096 " in shown and f"{timings['generation_tps']:.0f} t/s" in shown
        transcript = talk.app.transcript
        bar = transcript.vertical_scrollbar
        assert bar.window_virtual_size == transcript.virtual_size.height > transcript.size.height
        assert bar.position == transcript.scroll_y == transcript.max_scroll_y
        column = [(y, 79) for y in talk.transcript_rows]
        await talk.until(lambda: all(talk.screen.cells[at] == talk.expected()[at] for at in column))

    run(steps)


def test_the_figures_move_while_the_answer_grows(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app_module, "FIGURES_S", 0)

    async def steps(talk: Talk) -> None:
        node = await talk.ask("one two three four five six seven")
        y = talk.app.query_one(Meters).region.y
        line = lambda: "".join(talk.screen.cells[y, x][0] for x in range(80))  # noqa: E731
        for _ in range(3):
            before = line()
            await talk.pilot.pause(0.05)  # so that the next word is waited for
            await talk.words(node, 1)
            await talk.until(lambda before=before: line() != before)
        await talk.check(range(y, y + 1))
        await talk.finish()

    run(steps)


def test_nothing_is_drawn_at_rest(run: Any) -> None:
    async def steps(talk: Talk) -> None:
        await talk.ask("hello")
        await talk.finish()
        await talk.pilot.pause(0.3)
        talk.screen.updates.clear()
        await talk.pilot.pause(1.2)  # a cursor that blinks would have twice
        assert not talk.screen.updates

    run(steps)


def test_text_that_is_selected_while_the_answer_grows_stays_marked(run: Any) -> None:
    async def steps(talk: Talk) -> None:
        node = await talk.ask("one two three four five six seven")
        await talk.words(node, 4)
        transcript = talk.app.transcript
        row = next(y for y in talk.transcript_rows if "echo" in "".join(talk.screen.cells[y, x][0] for x in range(79)))
        await talk.pilot.mouse_down(offset=(2, row))
        await talk.pilot.hover(offset=(7, row))
        await talk.pilot.mouse_up(offset=(7, row))
        await talk.pilot.pause()
        assert transcript.text_selection is not None and talk.app.screen.get_selected_text() == "echo:"
        await talk.words(node, 3)
        await talk.check(talk.transcript_rows)
        await talk.finish()

    run(steps)


def test_a_part_of_the_conversation_is_given_as_it_is_asked_for(run: Any) -> None:
    async def steps(talk: Talk) -> None:
        await talk.ask("sort")
        await talk.finish()
        transcript = talk.app.transcript
        width, height = transcript.scrollable_content_region.width, transcript.size.height
        whole = [strip.text for strip in transcript.render_lines(Region(0, 0, width, height))]
        assert [s.text for s in transcript.render_lines(Region(3, 2, 20, 4))] == [line[3:23] for line in whole[2:6]]

    run(steps)


def test_the_parser_is_imported_when_the_model_is_there(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared: list[Any] = []
    monkeypatch.setattr(app_module, "prepare", prepared.append)

    async def steps(talk: Talk) -> None:
        await talk.until(lambda: prepared)
        assert prepared == [talk.app.palette] and talk.chat.llm is not None

    run(steps)


def test_drafts_are_metered_beside_the_rate() -> None:
    timings = {"generation_tps": 41.2, "drafted_n": 30, "accepted_n": 21}
    assert [part.plain for part in timing_parts(palette_of({}, True), timings, 0)] == ["41 t/s", "21 of 30 drafted"]


def test_a_growing_document_is_drawn_as_the_whole_text_would_be() -> None:
    palette = palette_of({}, True)
    text = MARKDOWN * 2 + "\n> quoted\n\n- a\n\n- b\n\nlast"
    growing = MarkdownDocument(palette, 40)
    for end in range(0, len(text) + 1, 7):
        growing.update(text[:end])
        whole = MarkdownDocument(palette, 40)
        whole.update(text[:end])
        assert [line.markup for line in growing.lines] == [line.markup for line in whole.lines]
        assert [(c.code, c.line) for c in growing.codes] == [(c.code, c.line) for c in whole.codes]
