"""The full-screen chat with a model that answers by heart: talking, and the tree of what was said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from chat_talk import HANG_S, Talk

from edgellm.formats.errors import ContextFullError
from edgellm.sessions import SessionStore
from edgellm.tui.token_screen import TokenScreen
from edgellm.tui.token_text import TokenText

# --- talking ----------------------------------------------------------------------------------------------------------


def test_a_message_is_answered_shown_and_saved(run: Any, tmp_path: Path) -> None:
    async def steps(talk: Talk) -> None:
        await talk.pilot.press(*"hello")
        await talk.pilot.press("enter")
        await talk.settled()
        assert talk.said == [("user", "hello"), ("assistant", "echo: hello")]
        assert "❯ hello" in talk.screen_text() and "echo: hello" in talk.screen_text()

    talk = run(steps)
    store = SessionStore(tmp_path / "sessions.db")
    again = store.load(store.last_id() or 0)
    assert [node.text for node in again.tree.path] == ["hello", "echo: hello"]
    assert len(again.tree.path[-1].tokens) == 2 and store.prompts() == ["hello"]
    assert talk.llm.closed
    store.close()


def test_markdown_is_drawn_and_code_blocks_are_copied_by_number(run: Any) -> None:
    async def steps(talk: Talk) -> None:
        await talk.ask("code")
        text = talk.screen_text()
        assert "copy 1" in text and "copy 2" in text and "```" not in text
        await talk.write("/copy 2")
        assert talk.app.clipboard == "second"
        await talk.write("/copy 3")
        assert "no code block 3" in talk.told()
        await talk.pilot.press("ctrl+y")
        assert talk.app.clipboard.startswith("```\nfirst")
        await talk.pilot.press("alt+up", "1")
        assert talk.app.clipboard == "first"

    run(steps)


def test_nothing_that_a_model_says_steers_the_terminal(run: Any) -> None:
    async def steps(talk: Talk) -> None:
        await talk.ask("evil")
        text = talk.screen_text()
        assert "\x1b" not in text and "\x07" not in text and "\u202e" not in text
        assert "\\x1b[31mred" in text and "[bold]markup[/bold]" in text
        await talk.pilot.press("ctrl+t")
        await talk.pilot.pause()
        assert "\x1b" not in talk.screen_text()
        await talk.pilot.press("escape")
        await talk.write("/rename [red]x[/red] \x1b[2J")
        await talk.pilot.press("ctrl+o")
        await talk.pilot.pause()
        assert "[red]x[/red]" in talk.screen_text() and "\x1b" not in talk.screen_text()

    run(steps)


def test_escape_stops_the_answer_and_keeps_what_was_said(run: Any) -> None:
    async def steps(talk: Talk) -> None:
        await talk.write("forever")
        await talk.until(lambda: len(talk.chat.session.tree.path[-1].tokens) > 20)
        await talk.pilot.press(*"next")  # the input is usable meanwhile
        assert talk.app.prompt.text == "next"
        await talk.pilot.press("escape")
        await talk.settled()
        node = talk.chat.session.tree.leaf
        assert node is not None and node.finish_reason == "cancelled" and node.text.startswith("on and")
        assert "stopped" in talk.screen_text() and talk.app.prompt.text == "next"
        await talk.pilot.press("enter")
        await talk.settled()
        assert talk.said[-1] == ("assistant", "echo: next")

    run(steps)


def test_an_answer_that_ends_while_the_screens_are_taken_down_is_not_drawn(run: Any) -> None:
    async def steps(talk: Talk) -> None:
        await talk.write("forever")
        await talk.until(lambda: talk.chat.answering)
        take_down, answering = talk.app._close_all, talk.chat.answering

        async def take_down_and_beat() -> None:
            await take_down()
            talk.chat.stop()
            assert answering is not None and answering.finished.wait(HANG_S)
            talk.app.tick()

        talk.app._close_all = take_down_and_beat  # type: ignore[method-assign]

    run(steps)


def test_the_view_follows_the_end_only_while_the_reader_is_there(run: Any) -> None:
    async def steps(talk: Talk) -> None:
        transcript = talk.app.transcript
        await talk.write("forever")
        await talk.until(lambda: transcript.max_scroll_y > 10)
        assert transcript.at_end
        transcript.scroll_to(y=0, animate=False)
        before = transcript.virtual_size.height
        await talk.until(lambda: transcript.virtual_size.height > before + 5)
        assert transcript.scroll_offset.y == 0
        transcript.scroll_end(animate=False)
        await talk.pilot.pause()
        before = transcript.virtual_size.height
        await talk.until(lambda: transcript.virtual_size.height > before + 5)
        assert transcript.at_end
        await talk.pilot.resize_terminal(50, 20)  # while it streams
        before = transcript.virtual_size.height
        await talk.until(lambda: transcript.virtual_size.height > before + 5)
        await talk.pilot.press("escape")

    run(steps)


def test_thoughts_fold(run: Any) -> None:
    async def steps(talk: Talk) -> None:
        await talk.ask("think")
        assert "▸ thought · 10 words" in talk.screen_text() and "asks for" not in talk.screen_text()
        await talk.pilot.press("alt+up", "space")
        assert "▾ thought" in talk.screen_text() and "asks for a river" in talk.screen_text()
        await talk.pilot.press("c")
        assert talk.app.clipboard == "The **Danube**."
        await talk.pilot.press("escape")
        await talk.ask("river")
        assert talk.llm.requests[-1][0][1] == {
            "role": "assistant",
            "content": "The **Danube**.",
            "reasoning_content": "The user asks for a river.\nThe Danube is one.",
        }

    run(steps)


def test_an_error_is_told_and_the_words_come_back(run: Any) -> None:
    async def steps(talk: Talk) -> None:
        talk.llm.fail = ContextFullError("The prompt has 99 tokens, the context has room for 64.")
        await talk.ask("too long")
        assert "room for 64" in talk.told() and talk.app.prompt.text == "too long"
        await talk.pilot.press("enter")
        await talk.settled()
        assert talk.said == [("user", "too long"), ("assistant", "echo: too long")]

    run(steps)


@pytest.mark.parametrize("size", [(80, 24), (40, 12)])
def test_notes_leave_the_input_in_sight_and_go_with_the_next_message(run: Any, size: tuple[int, int]) -> None:
    async def steps(talk: Talk) -> None:
        await talk.write("/nothing")
        await talk.until(lambda: "no command" in talk.screen_text())
        await talk.write("/set foo 3")
        await talk.until(lambda: "Known: temperature" in talk.screen_text())
        assert "no command" not in talk.screen_text()
        assert "PARAMETER" not in talk.screen_text()
        await talk.pilot.pause(0.1)
        top, words, bottom, keys = talk.screen_text().split("\n")[-4:]
        assert top.endswith("─╮") and "essage, / commands" in words and bottom.endswith("─╯") and "Stop" in keys

    run(steps, size, toasts=True)


# --- branches ---------------------------------------------------------------------------------------------------------


def test_regenerate_edit_and_switch_branches(run: Any) -> None:
    async def steps(talk: Talk) -> None:
        await talk.ask("one")
        await talk.pilot.press("ctrl+r")
        await talk.settled()
        assert "‹ 2/2 ›" in talk.screen_text()
        await talk.pilot.press("alt+up", "up", "e")
        assert talk.app.prompt.text == "one"
        await talk.ask("two")
        assert talk.said == [("user", "two"), ("assistant", "echo: two")]
        assert len(talk.chat.session.tree) == 5
        await talk.pilot.press("alt+left")
        assert talk.said == [("user", "one"), ("assistant", "echo: one")]
        await talk.write("/branch")
        assert talk.said[0] == ("user", "one")  # the last place with branches: the answers
        await talk.pilot.press("alt+up", "up", "right_square_bracket")
        assert talk.said == [("user", "two"), ("assistant", "echo: two")]

    run(steps)


def test_a_draft_comes_back_after_editing_an_earlier_message(run: Any) -> None:
    async def steps(talk: Talk) -> None:
        await talk.ask("one")
        for way_out in ("escape", "enter"):
            talk.app.prompt.put("half a thought")
            await talk.pilot.press("alt+up", "up", "e")
            assert talk.app.prompt.text == "one"
            await talk.pilot.press(way_out)
            await talk.settled()
            assert talk.app.prompt.text == "half a thought" and talk.app.editing is None
        assert len(talk.said) == 2  # the second time sent it

    run(steps)


def test_escape_leaves_editing(run: Any) -> None:
    async def steps(talk: Talk) -> None:
        await talk.ask("one")
        await talk.write("/edit")
        await talk.pilot.pause()
        assert talk.app.editing is not None and "editing" in talk.screen_text()
        await talk.pilot.press("escape")
        assert talk.app.editing is None and talk.app.prompt.text == ""
        await talk.ask("two")
        assert len(talk.said) == 4

    run(steps)


def test_a_cut_answer_goes_on_where_it_ended(run: Any) -> None:
    async def steps(talk: Talk) -> None:
        await talk.write("/set n 3")
        await talk.ask("river")
        assert talk.said[-1][1] == "The Danube flows" and "cut off" in talk.screen_text()
        await talk.write("/set n 100")
        await talk.write("/continue")
        await talk.settled()
        assert talk.said[-1][1] == "The Danube flows and so it went on."
        prompt = talk.llm.requests[-1][0]
        assert talk.llm.tokenizer.decode(prompt) == "<prompt>riverThe Danube flows"
        assert len(talk.chat.session.tree.path[-1].tokens) == 8

    run(steps)


def test_the_token_view_shows_alternatives_and_branches_from_one(run: Any) -> None:
    async def steps(talk: Talk) -> None:
        await talk.ask("river")
        await talk.pilot.press("ctrl+t")
        await talk.pilot.pause()
        assert isinstance(talk.app.screen, TokenScreen)
        await talk.pilot.press("right", "right")
        await talk.pilot.pause()
        text = talk.screen_text()
        assert "token 3 of 11" in text and "crosses" in text and "min_p" in text and "cut by the samplers" in text
        await talk.pilot.press("left", "down", "enter")
        await talk.settled()
        assert talk.said[-1][1] == "The Rhine and so it went on."
        assert len(talk.chat.session.tree.roots[0].children) == 2
        node = talk.chat.session.tree.leaf
        assert node is not None and [t.text for t in node.tokens[:2]] == ["The", " Rhine"]
        await talk.write("/branch")
        assert talk.said[-1][1].startswith("The Danube flows")

    run(steps)


def test_the_token_cursor_moves_by_rows_surprises_and_the_mouse(run: Any) -> None:
    async def steps(talk: Talk) -> None:
        await talk.ask("sort")
        await talk.pilot.press("ctrl+t")
        await talk.pilot.pause()
        view = talk.app.screen.query_one(TokenText)
        await talk.pilot.press("pagedown", "pagedown")
        assert view.row_of[view.position] > 0
        await talk.pilot.press("home", "n")
        token = view.tokens[view.position]
        assert token.top[0].token != token.token
        await talk.pilot.press("end")
        assert view.position == len(view.tokens) - 1
        await talk.pilot.click(TokenText, offset=(3, 1))
        assert view.position == 0
        await talk.pilot.resize_terminal(60, 20)
        await talk.pilot.pause()
        assert view.position == 0 and "token 1 of" in talk.screen_text()

    run(steps)
