"""The chat in a real terminal with a real model: type, stream, stop, edit, branch, leave, come back."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

HANG_S = 240.0

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is not here"),
]


class Terminal:
    """A tmux server of its own with one window."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.n_started = 0
        kernels = os.environ.get("EDGELLM_KERNEL_CACHE")
        self.environment = {**os.environ, "EDGELLM_HOME": str(folder / "home"), "TMUX_TMPDIR": str(folder)}
        for name in ("COLUMNS", "LINES"):  # of the terminal of the tests, which several processes pass on
            self.environment.pop(name, None)
        if kernels is None:  # those of the user are compiled already
            from edgellm.machine.paths import cache_dir

            self.environment["EDGELLM_KERNEL_CACHE"] = str(cache_dir() / "kernels")

    def tmux(self, *arguments: str) -> str:
        done = subprocess.run(
            ["tmux", "-L", "edgellm-test", *arguments], env=self.environment, capture_output=True, text=True
        )
        return done.stdout

    def start(self, *arguments: str) -> None:
        self.n_started += 1
        command = f"{sys.executable} -m edgellm {' '.join(arguments)}; echo LEFT{self.n_started} $?; stty -a"
        if self.n_started == 1:
            self.tmux("-f", "/dev/null", "new-session", "-d", "-x", "100", "-y", "30", "sh")
        self.type(command)

    def type(self, text: str, *keys: str) -> None:
        self.tmux("send-keys", "-l", text)
        self.tmux("send-keys", *(keys or ("Enter",)))

    def press(self, *keys: str) -> None:
        self.tmux("send-keys", *keys)

    def screen(self) -> str:
        return self.tmux("capture-pane", "-p")

    def wait_for(self, pattern: str) -> str:
        end = time.monotonic() + HANG_S
        while time.monotonic() < end:
            if re.search(pattern, screen := self.screen(), re.DOTALL):
                return screen
            time.sleep(0.2)
        raise AssertionError(f"waited for {pattern!r}, saw:\n{self.screen()}")

    def context_used(self) -> int:
        """Tokens that the line of figures says are in the context."""
        found = re.search(r"([\d,]+)/8,192", self.screen())
        return int(found[1].replace(",", "")) if found else 0

    def wait_for_context(self, n_tokens: int) -> None:
        """Until so many are: what stood on the screen before may have scrolled away by then."""
        end = time.monotonic() + HANG_S
        while self.context_used() < n_tokens:
            assert time.monotonic() < end, f"waited for {n_tokens} tokens, saw:\n{self.screen()}"
            time.sleep(0.2)


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    one = Terminal(tmp_path)
    yield one
    one.tmux("kill-server")


def test_a_day_with_the_chat(terminal: Terminal, smollm2_path: Path) -> None:
    terminal.start("chat", str(smollm2_path), "-n", "60", "--temp", "0")
    terminal.wait_for(r"0/8,192")
    terminal.type("Name three rivers.")
    terminal.wait_for(r"\d+ tokens · \d+ t/s")

    terminal.press("C-r")  # another answer
    terminal.wait_for(r"‹ 2/2 ›")
    terminal.type("/set n 2000", "Enter")
    n_before = terminal.context_used()
    terminal.type("Write a very long story about a river, in twenty chapters.")
    terminal.wait_for_context(n_before + 60)  # the question is 20
    terminal.press("Escape")
    terminal.wait_for(r"stopped|\d+ tokens")

    terminal.press("C-t")  # the token view, and a branch from its second alternative
    terminal.wait_for(r"token 1 of \d+")
    terminal.press("Right")
    terminal.wait_for(r"token 2 of \d+")
    terminal.press("Down", "Enter")
    terminal.wait_for(r"Write a message")
    terminal.press("Escape")
    terminal.wait_for(r"(stopped|t/s) +‹ 2/2 ›[^‹]*Write a message")
    time.sleep(1)  # an Escape right before another key would be taken for Alt

    terminal.press("M-Up", "Up", "e")  # edit the last question
    terminal.wait_for(r"editing")
    terminal.press("C-u")
    terminal.type("Say the word Danube.")
    terminal.wait_for(r"❯ Say the word Danube.*\d+ tokens · \d+ t/s")
    terminal.press("C-q")
    terminal.wait_for(r"LEFT1 0")
    assert re.search(r"(?<!-)echo ", terminal.wait_for(r"speed \d+ baud.*echo "))

    terminal.start("chat", "--continue")
    screen = terminal.wait_for(r"❯ Say the word Danube.*/8,192")
    assert "smollm2" in screen.lower()
    terminal.type("And another word?")
    screen = terminal.wait_for(r"another word.*\d+ tokens · \d+ t/s")
    reused = re.search(r"(\d+) reused", screen)
    assert reused is not None and int(reused[1]) > 20  # what was read before was kept in a file
    terminal.press("C-d")
    terminal.wait_for(r"LEFT2 0")
    terminal.start("sessions")
    terminal.wait_for(r"Name three rivers")
