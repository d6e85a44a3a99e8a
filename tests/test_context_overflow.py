"""A chat longer than the context: nothing is left out silently, and there are ways on."""

from __future__ import annotations

import random
from typing import Any

import pytest
from fake_llm import FakeLLM

from edgellm.chat_template import Message
from edgellm.cli.chat import ChatLoop
from edgellm.cli.chat_commands import COMMANDS
from edgellm.cli.chat_session import ChatSession
from edgellm.context_overflow import (
    SUMMARY_REQUEST,
    ChatTooLongError,
    Room,
    fit,
    summary_prompts,
)
from edgellm.conversation import Conversation
from edgellm.formats.errors import ContextFullError, ParameterError


def count(messages: list[Any]) -> int:
    """Words, and four tokens around each message."""
    return sum(4 + len(content_of(message).split()) for message in messages)


def content_of(message: Any) -> str:
    return str(message["content"] if isinstance(message, dict) else message.content)


def chat(*n_words: int, system: str = "") -> list[dict[str, str]]:
    """Turns whose messages have so many words; the last one is the user's."""
    messages = [{"role": "system", "content": system}] if system else []
    for number, n in enumerate(n_words):
        role = "assistant" if number % 2 else "user"
        messages.append({"role": role, "content": " ".join([f"m{number}"] * n)})
    return messages


# --- leaving out ------------------------------------------------------------------------------------------------------


def test_a_chat_that_fits_is_sent_whole_and_a_short_one_is_not_even_counted() -> None:
    messages = chat(10, 10, 10, system="s")
    assert fit(messages, count, Room(200, 20)) == (messages, 0)

    def never(messages: list[Any]) -> int:
        raise AssertionError("counted")

    assert fit(messages, never, Room(8192)) == (messages, 0)


def test_a_chat_that_does_not_fit_is_told_with_all_figures() -> None:
    with pytest.raises(ChatTooLongError) as found:
        fit(chat(40, 40, 40, 40, 10), count, Room(200, 20))
    error = found.value
    assert (error.n_prompt, error.n_ctx, error.n_free, error.n_turns, error.n_kept) == (190, 200, 10, 2, 14)
    assert isinstance(error, ContextFullError) and error.code == "CONTEXT_FULL"
    for figure in ("190", "200", "10", "2 turns", "14"):
        assert figure in str(error)


@pytest.mark.parametrize("max_tokens", [None, -1, 0, 5, 100_000])
def test_what_stays_fits_with_room_for_the_answer_and_keeps_system_and_last_turn(max_tokens: int | None) -> None:
    random.seed(1)
    for _ in range(300):
        n_words = [random.randint(1, 60) for _ in range(random.randrange(1, 20, 2))]
        messages = chat(*n_words, system=random.choice(["", "be nice"]))
        room = Room(random.randint(80, 300), max_tokens)
        try:
            fitted = fit(messages, count, room, drop=True)
        except ChatTooLongError as error:
            assert (
                error.n_turns == 0
                and count([m for m in messages if m["role"] == "system"] + messages[-1:]) > room.prompt
            )
            continue
        head = 1 if messages[0]["role"] == "system" else 0
        assert fitted.messages == [*messages[:head], *messages[head + fitted.left_out :]]
        assert count(fitted.messages) <= room.prompt <= room.n_ctx
        assert fitted.messages[-1] is messages[-1] and fitted.messages[head]["role"] == "user"
        assert fitted.left_out == 0 or count(messages) > room.prompt


def test_what_was_left_out_stays_out_until_a_larger_context_takes_all_back() -> None:
    messages = chat(40, 40, 40, 40, 10)
    fitted = fit(messages, count, Room(200, 20), drop=True)
    assert fitted.left_out == 4
    messages += chat(5, 5, 5)[1:]
    again = fit(messages, count, Room(200, 20), fitted.left_out)  # no question: it was answered
    assert again.left_out == 4 and again.messages == messages[4:]
    assert fit(messages, count, Room(1000, 20), 4) == (messages, 0)
    with pytest.raises(ChatTooLongError):
        fit([*messages, *chat(150, 1, 1)], count, Room(200, 20), 4)


def test_dropping_leaves_so_much_room_that_it_is_not_done_every_turn() -> None:
    messages, left_out, n_drops = chat(20), 0, 0
    for _ in range(100):
        fitted = fit(messages, count, Room(400, 40), left_out, drop=True)
        n_drops += fitted.left_out != left_out
        left_out = fitted.left_out
        messages += chat(0, 20, 20)[1:]
    assert 0 < n_drops < 30


def test_a_message_that_is_too_long_by_itself_cannot_be_helped_by_dropping() -> None:
    for drop in (False, True):
        with pytest.raises(ChatTooLongError) as found:
            fit(chat(5, 5, 500), count, Room(200, 20), drop=drop)
        assert found.value.n_turns == 0 and found.value.n_free < 0


# --- summing up -------------------------------------------------------------------------------------------------------


def passes(messages: list[Any], n_ctx: int) -> list[Any]:
    """All prompts on the way to a summary, each answered with its number."""
    prompts, found, answer = summary_prompts(messages, count, n_ctx), [], None
    while True:
        try:
            found.append(prompts.send(answer))
        except StopIteration:
            return found
        answer = f"summary {len(found)}"


def test_a_chat_that_fits_is_summed_up_at_once() -> None:
    messages = chat(5, 5, 5, 5, system="s")
    (only,) = passes(messages, 200)
    assert only.last and only.messages[:5] == messages
    assert only.messages[5] == {"role": "user", "content": SUMMARY_REQUEST}


def test_a_longer_chat_is_read_in_parts_that_fit_and_nothing_is_missed() -> None:
    random.seed(2)
    for _ in range(50):
        messages = chat(*[random.randint(1, 40) for _ in range(40)], system="s")
        found = passes(messages, 250)
        assert len(found) > 1 and [p.last for p in found] == [False] * (len(found) - 1) + [True]
        for number, prompt in enumerate(found):
            assert count(prompt.messages) + prompt.max_tokens <= 250
            roles = [m["role"] for m in prompt.messages[1:]]
            assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]
            assert not number or prompt.messages[2]["content"] == f"summary {number}"
        read = " ".join(content_of(m) for p in found for m in p.messages)
        assert all(read.count(f"m{i}") >= content_of(m).count(f"m{i}") for i, m in enumerate(messages[1:]))


def test_a_message_that_no_context_holds_is_read_without_its_middle() -> None:
    found = passes(chat(5, 2000, 5, 5), 250)
    assert found[-1].last and all(count(p.messages) + p.max_tokens <= 250 for p in found)
    assert any("[…]" in content_of(m) for p in found for m in p.messages)


# --- a conversation ---------------------------------------------------------------------------------------------------


class Asked(FakeLLM):
    """Needs no cancel flag, and refuses what the engine would refuse."""

    def stream(self, prompt: Any, **options: Any) -> Any:
        if len(self.prompt_ids(prompt)) > self.n_ctx:
            raise ContextFullError("The prompt is longer than the context.")
        import threading

        return super().stream(prompt, **{"cancel": threading.Event(), "progress": lambda *_: None, **options})


def long_talk(on_overflow: str) -> Conversation:
    talk = Conversation(Asked(), "be nice", {"max_tokens": -1}, on_overflow)  # type: ignore[arg-type]
    for number in range(4):
        talk.messages += [Message("user", f"q{number} " + "x " * 5), Message("assistant", "y " * 5)]
    return talk


def test_a_conversation_refuses_by_default_and_leaves_out_when_it_is_told_to() -> None:
    talk = long_talk("error")
    with pytest.raises(ContextFullError):
        talk.send("z " * 20)
    assert len(talk.messages) == 9
    talk = long_talk("ask")
    with pytest.raises(ChatTooLongError):
        talk.send("z")
    talk = long_talk("drop_oldest")
    reply = talk.send("z")
    assert reply.text == "echo: z" and talk.left_out == 6 and len(talk.messages) == 11
    sent = talk.llm.requests[-1][0]  # type: ignore[attr-defined]
    assert [message["role"] for message in sent] == ["system", "user", "assistant", "user"]
    talk.clear()
    assert talk.left_out == 0
    with pytest.raises(ParameterError, match="on_overflow"):
        Conversation(Asked(), on_overflow="silently")  # type: ignore[arg-type]


def test_a_conversation_goes_on_from_its_summary() -> None:
    talk = long_talk("ask")
    talk.llm.n_ctx = 120
    summary = talk.summarize()
    assert summary.startswith("echo: Sum up")
    assert [message.role for message in talk.messages] == ["system", "user", "assistant"]
    assert talk.messages[2].content == summary.text
    assert talk.send("z").text == "echo: z"


# --- the line chat ----------------------------------------------------------------------------------------------------


class Lines:
    """In place of the keyboard: what is chosen, and the choices that were offered."""

    interactive = True

    def __init__(self, chosen: str) -> None:
        self.chosen, self.offered = chosen, {}

    def choose(self, choices: dict[str, str]) -> str:
        self.offered = choices
        return self.chosen


@pytest.mark.parametrize("chosen", ["d", "s", "w", ""])
def test_the_line_chat_asks_and_does_what_is_chosen(chosen: str, capsys: pytest.CaptureFixture[str]) -> None:
    talk = long_talk("ask")
    talk.llm.n_ctx = 120 if chosen == "s" else 64
    talk.messages += [Message("user", "x " * 40), Message("assistant", "y")] if chosen == "s" else []
    lines = Lines(chosen)
    loop = ChatLoop(ChatSession("m", talk), lines, False)  # type: ignore[arg-type]
    loop._turn("z")
    captured = capsys.readouterr()
    assert set(lines.offered) == {"d", "s", "w"} and "The chat with this message has" in captured.err
    assert (len(talk.messages), talk.left_out) == {"d": (11, 6), "w": (11, 0), "s": (5, 0), "": (9, 0)}[chosen]
    assert captured.out.strip().endswith("echo: z" if chosen else "") and talk.on_overflow == "ask"
    assert ("left out of the context" in captured.err) == (chosen == "d")
    assert ("not sent" in captured.err) == (not chosen)
    assert captured.out.startswith("echo: Sum up") == (chosen == "s")


def test_a_pipe_is_not_asked_and_is_told_the_option(capsys: pytest.CaptureFixture[str]) -> None:
    talk = long_talk("error")
    lines = Lines("d")
    lines.interactive = False
    ChatLoop(ChatSession("m", talk), lines, False)._turn("z " * 30)  # type: ignore[arg-type]
    assert not lines.offered and "--context-overflow drop_oldest" in capsys.readouterr().err
    assert len(talk.messages) == 9


def test_the_line_chat_chooses_beforehand() -> None:
    talk = long_talk("ask")
    session = ChatSession("m", talk)
    assert COMMANDS.run(session, "/set context_overflow drop_oldest") == "context_overflow = drop_oldest"
    session.ask("z", lambda text: None)
    assert talk.left_out == 6 and "the oldest 6 left out" in COMMANDS.run(session, "/show")
    COMMANDS.run(session, "/set context_overflow stop")
    assert talk.on_overflow == "error"
    with pytest.raises(ParameterError):
        COMMANDS.run(session, "/set context_overflow silently")
