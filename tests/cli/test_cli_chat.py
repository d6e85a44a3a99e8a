"""``edgellm chat``: turns, commands, messages of several lines, and Ctrl-C in a real terminal."""

from __future__ import annotations

import io
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import fake_llm
import pytest
from fake_llm import FakeLLM

import edgellm
from edgellm.cli import main
from edgellm.cli.chat_commands import COMMANDS, AnswerAgain, LeaveChat
from edgellm.cli.chat_session import ChatSession
from edgellm.cli.line_input import LineInput
from edgellm.formats.errors import ContextFullError, FormatError, ParameterError

HANG_S = 60


@pytest.fixture
def llm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeLLM:
    fake = FakeLLM()
    monkeypatch.setattr(edgellm, "load", lambda name, progress=None, **options: fake, raising=False)
    monkeypatch.setenv("EDGELLM_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("EDGELLM_DEBUG", raising=False)
    return fake


@pytest.fixture
def session(llm: FakeLLM) -> ChatSession:
    return ChatSession("smollm2", llm.conversation(None, max_tokens=-1, stop=(), template_kwargs={}))


def said(session: ChatSession) -> list[tuple[str, Any]]:
    return [(message.role, message.content) for message in session.conversation.messages]


def quiet(text: str) -> None:
    pass


def typed(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


def test_a_chat_from_a_pipe_answers_every_line_and_ends_with_it(
    llm: FakeLLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed(monkeypatch, "hello", "", "how are you")
    assert main(["chat", "-sys", "Be nice.", "--temp", "0.5", "-n", "50"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "echo: hello\necho: how are you\n"
    messages, options = llm.requests[-1]
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user"]
    assert options == {"max_tokens": 50, "stop": (), "template_kwargs": {}, "temperature": 0.5}
    assert llm.closed


@pytest.mark.parametrize("word", ["/exit", "/bye", "/quit", "  /exit".strip()])
def test_exit_leaves(llm: FakeLLM, monkeypatch: pytest.MonkeyPatch, word: str) -> None:
    typed(monkeypatch, word, "never said")
    assert main(["chat"]) == 0
    assert llm.requests == []


def test_the_first_message_may_come_with_the_command(llm: FakeLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    typed(monkeypatch)
    assert main(["chat", "-p", "hello"]) == 0
    assert llm.requests[0][0][-1]["content"] == "hello"


def test_the_model_may_not_be_given_twice(llm: FakeLLM) -> None:
    assert main(["chat", "one", "-m", "two"]) == 2


def test_an_error_is_shown_and_the_chat_goes_on_without_the_message(
    llm: FakeLLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed(monkeypatch, "too long", "/frobnicate", "/read /no/such/file", "/save ~nosuchuser/x", "hello")
    llm.fail = ContextFullError("The prompt has 99 tokens, the context has room for 64.")
    assert main(["chat"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "echo: hello\n"
    assert "[CONTEXT_FULL]" in captured.err and "/frobnicate" in captured.err and "No such file" in captured.err
    assert "no user 'nosuchuser'" in captured.err
    assert [message["content"] for message in llm.requests[-1][0]] == ["hello"]


def test_an_answer_that_was_cut_off_says_so(
    llm: FakeLLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed(monkeypatch, "a long story please")
    assert main(["chat", "-n", "2"]) == 0
    assert "cut off" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["plain"], "plain"),
        (["one \\", "two\\", "three"], "one \ntwo\nthree"),
        (['"""one', 'two"""'], "one\ntwo"),
        (['"""', "one", "", "two \\", '"""'], "one\n\ntwo \\"),
        (['"""one line"""'], "one line"),
        (['""""""'], ""),
        (['"""', "never closed"], "never closed"),
        (["ends with a backslash\\"], "ends with a backslash\n"),
    ],
)
def test_a_message_may_have_several_lines(monkeypatch: pytest.MonkeyPatch, lines: list[str], message: str) -> None:
    typed(monkeypatch, *lines)
    assert LineInput(None).read() == message


def test_the_end_of_the_input_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    typed(monkeypatch)
    assert LineInput(None).read() is None


# ---- commands --------------------------------------------------------------------------------------------------------


def test_help_names_every_command(session: ChatSession) -> None:
    text = COMMANDS.run(session, "/help")
    for name in COMMANDS:
        assert f"/{name}" in text
    assert set(COMMANDS.aliases.values()) <= set(COMMANDS)
    assert COMMANDS.run(session, "/?") == text


def test_an_unknown_command_is_an_error_and_not_a_message(session: ChatSession) -> None:
    with pytest.raises(ParameterError, match="/help"):
        COMMANDS.run(session, "/frobnicate now")


def test_exit_and_regen_are_signals(session: ChatSession) -> None:
    with pytest.raises(LeaveChat):
        COMMANDS.run(session, "/exit")
    with pytest.raises(AnswerAgain):
        COMMANDS.run(session, "/regen")


def test_clear_keeps_the_system_message(session: ChatSession) -> None:
    session.system = "Be nice."
    session.ask("hello", quiet)
    COMMANDS.run(session, "/clear")
    assert said(session) == [("system", "Be nice.")]


def test_system_shows_and_changes_the_system_message(session: ChatSession) -> None:
    assert COMMANDS.run(session, "/system") == "System message: none"
    session.ask("hello", quiet)
    COMMANDS.run(session, "/system Answer in one word.")
    assert said(session)[0] == ("system", "Answer in one word.")
    assert len(said(session)) == 3
    COMMANDS.run(session, "/system Another one.")
    assert [role for role, _ in said(session)].count("system") == 1


@pytest.mark.parametrize(
    ("line", "field", "value"),
    [
        ("/set temp 0.2", "temperature", 0.2),
        ("/set temperature 0.3", "temperature", 0.3),
        ("/set top_k 5", "top_k", 5),
        ("/set --top-p 0.5", "top_p", 0.5),
        ("/set seed 7", "seed", 7),
        ("/set repeat_last_n 3", "penalty_last_n", 3),
        ("/set n 12", "max_tokens", 12),
        ("/set n_predict -1", "max_tokens", -1),
    ],
)
def test_set_changes_the_next_answer(session: ChatSession, llm: FakeLLM, line: str, field: str, value: Any) -> None:
    COMMANDS.run(session, line)
    session.ask("x", quiet)
    assert llm.requests[-1][1][field] == value


@pytest.mark.parametrize("line", ["/set temp hot", "/set frob 1", "/set temp", "/set n many", "/set temp -1"])
def test_a_wrong_setting_changes_nothing(session: ChatSession, line: str) -> None:
    before = dict(session.conversation.options)
    with pytest.raises(ParameterError):
        COMMANDS.run(session, line)
    assert session.conversation.options == before


def test_set_and_show_tell_what_is_set(session: ChatSession) -> None:
    assert "temperature" in COMMANDS.run(session, "/set")
    COMMANDS.run(session, "/set temp 0.2")
    assert COMMANDS.run(session, "/set") == "temperature = 0.2"
    shown = COMMANDS.run(session, "/show")
    assert "smollm2" in shown and "64 tokens" in shown and "temperature = 0.2" in shown


def test_read_sends_a_file_with_the_next_message_once(session: ChatSession, llm: FakeLLM, tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("rivers: Rhône", "utf-8")
    assert "13 characters" in COMMANDS.run(session, f"/read {file}")
    session.ask("Sum up.", quiet)
    assert llm.requests[-1][0][-1]["content"] == "notes.txt:\n```\nrivers: Rhône\n```\n\nSum up."
    session.ask("More.", quiet)
    assert llm.requests[-1][0][-1]["content"] == "More."


def test_a_file_stays_attached_when_the_answer_failed(session: ChatSession, llm: FakeLLM, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("text")
    COMMANDS.run(session, f"/read {tmp_path / 'notes.txt'}")
    llm.fail = ContextFullError("too long")
    with pytest.raises(ContextFullError):
        session.ask("Sum up.", quiet)
    assert session.attachments and said(session) == []


def test_regen_answers_the_same_message_with_the_next_seed(session: ChatSession, llm: FakeLLM) -> None:
    with pytest.raises(ParameterError):
        session.regenerate(quiet)
    COMMANDS.run(session, "/set seed 7")
    session.ask("hello", quiet)
    session.regenerate(quiet)
    session.regenerate(quiet)
    assert [options["seed"] for _, options in llm.requests] == [7, 8, 9]
    assert said(session) == [("user", "hello"), ("assistant", "echo: hello")]
    session.ask("next", quiet)
    assert llm.requests[-1][1]["seed"] == 7


def test_a_failed_regen_keeps_the_answer(session: ChatSession, llm: FakeLLM) -> None:
    session.ask("hello", quiet)
    llm.fail = ContextFullError("too long")
    with pytest.raises(ContextFullError):
        session.regenerate(quiet)
    assert said(session) == [("user", "hello"), ("assistant", "echo: hello")]


def test_stats_shows_the_last_answer(session: ChatSession) -> None:
    assert COMMANDS.run(session, "/stats") == "There is no answer yet."
    session.ask("hello", quiet)
    assert "t/s" in COMMANDS.run(session, "/stats")


def test_save_and_load_bring_the_conversation_back(session: ChatSession, llm: FakeLLM, tmp_path: Path) -> None:
    session.system = "Be nice."
    session.ask('hello "世界"', quiet)
    before, file = said(session), tmp_path / "chat.json"
    assert "3 messages" in COMMANDS.run(session, f"/save {file}")
    COMMANDS.run(session, "/clear")
    COMMANDS.run(session, f"/load {file}")
    assert said(session) == before
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["chat.json"]
    session.ask("next", quiet)
    assert len(llm.requests[-1][0]) == 4


def test_save_that_fails_leaves_the_old_file_whole(
    session: ChatSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "chat.json"
    session.ask("hello", quiet)
    session.save(file)
    before = file.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    session.ask("more", quiet)
    with pytest.raises(OSError, match="No space"):
        session.save(file)
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["chat.json"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00" * 64,
        b"{",
        b"[]",
        b'{"format": "edgellm-chat"}',
        b'{"format": "edgellm-chat", "messages": [{"role": "user"}]}',
        b'{"format": "edgellm-chat", "messages": [{"role": "robot", "content": "x"}]}',
        b'{"format": "edgellm-chat", "messages": [{"role": "user", "content": null}]}',
        b'{"format": "other", "messages": []}',
    ],
)
def test_load_refuses_any_other_file_and_keeps_the_conversation(
    session: ChatSession, tmp_path: Path, content: bytes
) -> None:
    session.ask("hello", quiet)
    before = said(session)
    (tmp_path / "chat.json").write_bytes(content)
    with pytest.raises(FormatError):
        COMMANDS.run(session, f"/load {tmp_path / 'chat.json'}")
    assert said(session) == before


@pytest.mark.parametrize("line", ["/save", "/load", "/read"])
def test_commands_that_need_a_file_say_so(session: ChatSession, line: str) -> None:
    with pytest.raises(ParameterError, match="which file"):
        COMMANDS.run(session, line)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.skipif(os.name != "posix", reason="sends a signal to itself")
def test_stopping_keeps_what_was_said_and_nothing_when_nothing_was_said(session: ChatSession, llm: FakeLLM) -> None:
    llm.on_chunk = lambda i: os.kill(os.getpid(), signal.SIGINT) if i == 2 else None
    answer = session.ask("talk forever", quiet)
    assert answer.stopped and said(session)[-1] == ("assistant", "echo: talk")
    llm.on_chunk = lambda i: os.kill(os.getpid(), signal.SIGINT) if i == 0 else None
    assert session.ask("talk forever", quiet).stopped
    assert len(said(session)) == 2


@pytest.mark.usefixtures("interruptible")
@pytest.mark.skipif(os.name != "posix", reason="sends a signal to itself")
def test_stopped_before_a_word_the_answer_that_was_there_and_files_to_send_stay(
    session: ChatSession, llm: FakeLLM, tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("text")
    session.ask("hello", quiet)
    before = said(session)
    COMMANDS.run(session, f"/read {tmp_path / 'notes.txt'}")
    llm.on_chunk = lambda i: os.kill(os.getpid(), signal.SIGINT)
    for ask in (session.regenerate, lambda write: session.ask("Sum up.", write)):
        assert ask(quiet).stopped and said(session) == before
    llm.on_chunk = lambda i: None
    session.ask("Sum up.", quiet)
    assert llm.requests[-1][0][-1]["content"].startswith("notes.txt:")
    assert session.attachments == []


# ---- in a terminal ---------------------------------------------------------------------------------------------------

pty = pytest.importorskip("pty", reason="there are no terminals of this kind here")
termios = pytest.importorskip("termios", reason="there are no terminals of this kind here")


class Terminal:
    """A program in a terminal of its own: what it writes is collected, keys are sent as a keyboard sends them."""

    def __init__(self, *arguments: str, home: Path) -> None:
        self.master, slave = pty.openpty()
        self.before = termios.tcgetattr(slave)
        self.slave = slave
        environment = {**os.environ, "EDGELLM_HOME": str(home), "TERM": "xterm", "COLUMNS": "100"}
        self.process = subprocess.Popen(
            [sys.executable, fake_llm.__file__, *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=environment,
            preexec_fn=_own_terminal,
        )
        self.text = ""

    def wait_for(self, pattern: str) -> str:
        """Read until the pattern shows in what was not looked at yet; the text up to its end."""
        end = time.monotonic() + HANG_S
        while time.monotonic() < end:
            found = re.search(pattern, self.text, re.DOTALL)
            if found:
                seen, self.text = self.text[: found.end()], self.text[found.end() :]
                return seen
            if select.select([self.master], [], [], 0.1)[0]:
                try:
                    self.text += os.read(self.master, 65536).decode("utf-8", "replace")
                except OSError:
                    break
            elif self.process.poll() is not None:
                break
        raise AssertionError(f"waited for {pattern!r}, saw {self.text!r}")

    def send(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def send_at_prompt(self, keys: str) -> None:
        """Keys once the program waits for them: it shows its prompt a moment before it reads, and Python's readline
        sleeps through a Ctrl-C that falls in between."""
        time.sleep(0.3)
        self.send(keys)

    def close(self) -> int:
        """The exit status; the terminal must be as it was."""
        status = self.process.wait(HANG_S)
        assert termios.tcgetattr(self.slave)[:4] == self.before[:4], "the terminal was not given back as it was"
        return status


def _own_terminal() -> None:
    import fcntl

    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


CTRL_C, CTRL_D = "\x03", "\x04"


@pytest.fixture
def terminal(tmp_path: Path, interruptible: None) -> Any:
    started: list[Terminal] = []

    def start(*arguments: str) -> Terminal:
        started.append(Terminal(*arguments, home=tmp_path / "home"))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        one.process.wait()
        os.close(one.master)
        os.close(one.slave)


def test_ctrl_c_stops_the_answer_and_the_chat_goes_on(terminal: Any) -> None:
    chat = terminal("chat", "--plain")
    chat.wait_for(">>> ")
    chat.send("talk forever\r")
    chat.wait_for("on on on")
    chat.send(CTRL_C)
    chat.wait_for(r"\(stopped\).*>>> ")
    chat.send("hello\r")
    chat.wait_for("echo: hello.*>>> ")
    chat.send("/exit\r")
    assert chat.close() == 0


def test_a_second_ctrl_c_leaves_with_130(terminal: Any) -> None:
    chat = terminal("chat", "--plain")
    chat.wait_for(">>> ")
    chat.send("talk forever\r")
    chat.wait_for("on on on")
    chat.send(CTRL_C)
    chat.wait_for(r"\(stopped\).*>>> ")
    chat.send_at_prompt(CTRL_C)
    assert chat.close() == 130


def test_ctrl_c_at_the_prompt_warns_once(terminal: Any) -> None:
    chat = terminal("chat", "--plain")
    chat.wait_for(">>> ")
    chat.send_at_prompt("half a line" + CTRL_C)
    chat.wait_for("once more.*>>> ")
    chat.send("hello\r")
    chat.wait_for("echo: hello.*>>> ")
    chat.send_at_prompt(CTRL_C)
    chat.wait_for("once more.*>>> ")
    chat.send_at_prompt(CTRL_C)
    assert chat.close() == 130


@pytest.mark.parametrize("paste", ["one\rtwo\r\rthree\r", "\x1b[200~one\ntwo\n\nthree\x1b[201~\r"])
def test_lines_that_are_pasted_are_one_message(terminal: Any, paste: str) -> None:
    chat = terminal("chat", "--plain")
    chat.wait_for(">>> ")
    chat.send_at_prompt(paste)
    chat.wait_for("echo: one\r\ntwo\r\n\r\nthree\r\n.*>>> ")
    chat.send_at_prompt("/exit\r")
    assert chat.close() == 0


def test_lines_that_were_typed_ahead_are_messages_of_their_own(terminal: Any) -> None:
    chat = terminal("chat", "--plain", "-p", "talk forever", "-n", "20")
    chat.wait_for("on on on")
    chat.send("one\rtwo\r")
    chat.wait_for("echo: one\r\n.*echo: two\r\n.*>>> ")
    chat.send_at_prompt("/exit\r")
    assert chat.close() == 0


def test_a_line_that_was_typed_before_a_question_is_no_answer_to_it(terminal: Any) -> None:
    chat = terminal("chat", "--plain", "-p", "talk forever", "-n", "60")
    chat.wait_for("on on on")
    chat.send("one\rdoes it rain\r")  # the first does not fit any more; the second begins with a letter of a choice
    chat.wait_for("d/s, or Enter.*not sent.*d/s, or Enter")
    chat.send("d\r")
    chat.wait_for("echo: does it rain.*>>> ")
    chat.send("/exit\r")
    assert chat.close() == 0


def test_a_first_message_may_be_a_command(terminal: Any) -> None:
    chat = terminal("chat", "--plain", "-p", "/exit")
    assert chat.close() == 0 and "Traceback" not in chat.text


def test_ctrl_d_leaves(terminal: Any) -> None:
    chat = terminal("chat", "--plain")
    chat.wait_for(">>> ")
    chat.send(CTRL_D)
    assert chat.close() == 0


def test_run_in_a_terminal_stops_with_130_and_shows_what_was_said(terminal: Any) -> None:
    run = terminal("run", "-p", "talk forever")
    run.wait_for("on on on")
    run.send(CTRL_C)
    assert run.close() == 130


def test_lines_are_remembered_for_the_next_chat(terminal: Any, tmp_path: Path) -> None:
    pytest.importorskip("readline", reason="this Python edits lines without it")
    chat = terminal("chat", "--plain")
    chat.wait_for(">>> ")
    chat.send("remember me\r")
    chat.wait_for("echo: remember me.*>>> ")
    chat.send("/exit\r")
    assert chat.close() == 0
    history = tmp_path / "home" / "config" / "history"
    assert history.stat().st_mode & 0o077 == 0
    again = terminal("chat", "--plain")
    again.wait_for(">>> ")
    again.send("\x1b[A\x1b[A\r")
    again.wait_for("echo: remember me.*>>> ")
    again.send(CTRL_D)
    assert again.close() == 0


def test_a_saved_chat_is_plain_json(session: ChatSession, tmp_path: Path) -> None:
    session.ask("hello", quiet)
    session.save(tmp_path / "chat.json")
    record = json.loads((tmp_path / "chat.json").read_text("utf-8"))
    assert record["messages"] == [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "echo: hello"},
    ]


def test_a_terminated_program_gives_the_terminal_back(terminal: Any) -> None:
    chat = terminal("chat", "--plain")
    chat.wait_for(">>> ")
    chat.send("talk forever\r")
    chat.wait_for("on on on")
    chat.process.terminate()
    assert chat.close() == 143
