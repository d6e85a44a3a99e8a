"""The full-screen chat when it becomes longer than the context: it asks, and nothing is left out or lost silently."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from chat_talk import Talk

from edgellm.sessions.tree import prompt_messages
from edgellm.tui.kept_state import tokens_of
from edgellm.tui.long_chat_dialog import LongChatDialog
from edgellm.tui.message_view import OUT_OF_CONTEXT

WORDS = "so many words " * 5


async def long_talk(talk: Talk, n_turns: int = 4) -> None:
    """A chat that the next message makes too long."""
    for number in range(n_turns):
        await talk.ask(f"q{number} {WORDS}")
    talk.llm.n_ctx = 150
    await talk.write("What now?")
    await talk.settled()


def sent(talk: Talk) -> list[str]:
    """The messages of the last request, shortened."""
    return [message["content"].removeprefix("echo: ")[:2] for message in talk.llm.requests[-1][0]]


def test_a_message_that_does_not_fit_is_asked_about_with_the_figures(run: Any) -> None:
    async def steps(talk: Talk) -> None:
        await long_talk(talk)
        assert isinstance(talk.app.screen, LongChatDialog)
        shown = " ".join(talk.screen_text().split())
        assert "context of 150" in shown and "oldest 3 turns" in shown and "summary" in shown
        n_requests = len(talk.llm.requests)
        await talk.pilot.press("escape")
        await talk.settled()
        assert len(talk.llm.requests) == n_requests  # nothing was sent
        assert talk.app.prompt.text == "What now?" and talk.said[-1] == ("user", "What now?")
        await talk.pilot.press("enter")  # the same once more is no second message
        await talk.settled()
        assert isinstance(talk.app.screen, LongChatDialog)
        assert [role for role, _ in talk.said].count("user") == 5

    run(steps)


def test_the_oldest_turns_are_left_out_of_the_prompt_shown_as_such_and_kept(run: Any) -> None:
    async def steps(talk: Talk) -> None:
        await long_talk(talk)
        await talk.pilot.press("d")
        await talk.settled()
        assert sent(talk) == ["q3", "q3", "Wh"]
        assert len(talk.said) == 10 and talk.said[-1] == ("assistant", "echo: What now?")
        talk.app.transcript.scroll_home(animate=False)
        await talk.pilot.pause()
        assert talk.screen_text().count(OUT_OF_CONTEXT) >= 3
        last = talk.app.transcript.views[-1]
        assert OUT_OF_CONTEXT not in "\n".join(line.plain for line in last.lines)
        await talk.ask("And then?")  # still fits: no question
        assert sent(talk) == ["q3", "q3", "Wh", "Wh", "An"]
        chat = talk.chat
        chat.writer.flush()
        again = chat.store.load(chat.session.id)
        assert len(again.tree.path) == 12 and again.tree.leaf is not None
        assert again.tree.leaf.timings["left_out_n"] == 6
        told = prompt_messages("", again.tree.path[:-1], 6)
        assert tokens_of(talk.llm, again)[: len(talk.llm.prompt_ids(told))] == talk.llm.prompt_ids(told)
        talk.llm.n_ctx = 4096
        await talk.ask("Do you remember?")  # there is room again for all of it
        assert sent(talk)[0] == "q0" and OUT_OF_CONTEXT not in talk.screen_text()

    run(steps, size=(100, 60))


def test_a_chat_may_leave_out_from_then_on_without_asking(run: Any) -> None:
    async def steps(talk: Talk) -> None:
        await long_talk(talk)
        await talk.pilot.press("a")
        await talk.settled()
        assert talk.chat.session.settings == {"context_overflow": "drop_oldest"}
        for number in range(6):
            await talk.ask(f"r{number} {WORDS}")
            assert not isinstance(talk.app.screen, LongChatDialog)
        assert sent(talk)[0] in ("r3", "r4", "r5")
        assert "context_overflow" not in talk.llm.requests[-1][1]

    run(steps)


def test_a_summary_begins_a_new_chat_and_the_old_one_stays(run: Any) -> None:
    async def steps(talk: Talk) -> None:
        await long_talk(talk)
        old = talk.chat.session
        talk.chat.set("temperature", 0.5)
        await talk.pilot.press("s")
        await talk.until(lambda: len(talk.said) == 4 and not talk.chat.busy)
        await talk.settled()
        session = talk.chat.session
        assert session is not old and session.title.endswith("(continued)") and session.settings == {"temperature": 0.5}
        roles = [role for role, _ in talk.said]
        assert roles == ["user", "assistant"] * 2 and talk.said[0][1].startswith("Sum up")
        assert talk.said[2:] == [("user", "What now?"), ("assistant", "echo: What now?")]
        assert len(sent(talk)) == 3  # the old turns are in the summary alone
        talk.chat.writer.flush()
        assert len(talk.chat.store.summaries()) == 2
        assert len(talk.chat.store.load(session.id).tree.path) == 4
        assert [node.text[:2] for node in talk.chat.store.load(old.id).tree.path][::2] == ["q0", "q1", "q2", "q3", "Wh"]

    run(steps)


@pytest.mark.parametrize("n_tokens", [0, 3, 100])  # before the first part, in it, behind it
def test_a_summary_that_is_stopped_brings_the_old_chat_back(run: Any, n_tokens: int) -> None:
    async def steps(talk: Talk) -> None:
        await long_talk(talk)
        old = talk.chat.session
        talk.llm.pace = threading.Semaphore(n_tokens)
        n_requests = len(talk.llm.requests)
        await talk.pilot.press("s")
        await talk.until(lambda: len(talk.llm.requests) > n_requests)
        await talk.pilot.pause(0.2)
        await talk.pilot.press("escape")
        await talk.settled()
        assert talk.chat.session is old and talk.app.prompt.text == "What now?"
        talk.chat.writer.flush()
        await talk.until(lambda: [summary.id for summary in talk.chat.store.summaries()] == [old.id])
        assert talk.app.editing is None  # what is sent next goes on with the old chat
        talk.llm.pace, talk.llm.n_ctx = None, 4096
        n_turns = len(old.tree.path)
        await talk.pilot.press("enter")
        await talk.settled()
        assert talk.chat.session is old and len(old.tree.path) >= n_turns and talk.said[-1][1] == "echo: What now?"

    run(steps)


def test_a_chat_that_is_left_during_a_summary_leaves_nothing_behind(run: Any) -> None:
    async def steps(talk: Talk) -> None:
        await long_talk(talk)
        old = talk.chat.session
        talk.llm.pace = threading.Semaphore(3)
        n_requests = len(talk.llm.requests)
        await talk.pilot.press("s")
        await talk.until(lambda: len(talk.llm.requests) > n_requests)
        await talk.pilot.press("ctrl+r")  # there is nothing to answer again yet
        assert talk.chat.summing_up is not None and "summary is on its way" in talk.told()
        await talk.pilot.press("ctrl+n")
        await talk.settled()
        talk.llm.pace, talk.llm.n_ctx = None, 4096
        assert talk.chat.summing_up is None and talk.chat.given_back == "" and talk.said == []
        talk.chat.writer.flush()
        await talk.until(lambda: [summary.id for summary in talk.chat.store.summaries()] == [old.id])

    run(steps)


def test_stop_is_an_error_with_the_figures_and_send_uses_the_room_that_is_left(run: Any) -> None:
    async def steps(talk: Talk) -> None:
        await long_talk(talk)
        await talk.pilot.press("escape")
        await talk.write("/set context_overflow stop")
        talk.llm.n_ctx = 120
        talk.app.prompt.put("What now?")
        await talk.pilot.press("enter")
        await talk.settled()
        assert not isinstance(talk.app.screen, LongChatDialog) and "context of 120" in talk.told()
        assert talk.app.prompt.text == "What now?"
        await talk.write("/set context_overflow ask")
        talk.llm.n_ctx = len(talk.llm.prompt_ids(prompt_messages("", talk.chat.session.tree.path))) + 3
        talk.app.prompt.put("What now?")
        await talk.pilot.press("enter")
        await talk.settled()
        assert "3 tokens are left" in " ".join(talk.screen_text().split())
        await talk.pilot.press("w")
        await talk.settled()
        assert len(talk.llm.requests[-1][0]) == 9

    run(steps)


def test_an_answer_that_the_context_cut_off_says_so_and_can_go_on_without_the_oldest_turns(run: Any) -> None:
    async def steps(talk: Talk) -> None:
        for number in range(4):
            await talk.ask(f"q{number} {WORDS}")
        node = talk.chat.session.tree.leaf
        assert node is not None
        node.finish_reason = "context_full"
        talk.app.redraw()
        await talk.pilot.pause()
        assert "the context is full" in talk.screen_text()
        talk.llm.n_ctx = 130
        await talk.write("/continue")
        await talk.settled()
        assert isinstance(talk.app.screen, LongChatDialog) and node.finish_reason == "context_full"
        assert "summary" not in " ".join(talk.screen_text().split())
        await talk.pilot.press("d")
        await talk.settled()
        assert node.text.endswith("and so it went on.") and node.timings["left_out_n"] == 6
        assert len(talk.llm.requests[-1][0]) < 130

    run(steps)


@pytest.mark.parametrize("size", [(100, 30), (44, 16)])
def test_the_question_fits_into_a_small_terminal(run: Any, size: tuple[int, int]) -> None:
    async def steps(talk: Talk) -> None:
        await long_talk(talk)
        assert "summary" in " ".join(talk.screen_text().split())

    run(steps, size=size)
