"""How fast the chat is while it streams: python benchmarks/chat_rates.py [MODEL] [-n ROUNDS] [--tokens N] [OPTIONS]

OPTIONS go to `edgellm chat`, such as --chat-template chatml for a model without one.

Each round measures `edgellm bench`, then the application in a pseudo-terminal with the same model. Its first answer is
left alone: tokens per second from the first to the last that reached the message, by the clock on the wall, and the
time between two pictures. While the second one streams a key is pressed now and then: the time until it is drawn.
"""

from __future__ import annotations

import argparse
import fcntl
import itertools
import json
import os
import pty
import random
import re
import select
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

N_DEPTH = 64  # tokens before them, about
KEYS = "жщюфцэ"  # in no answer
KEY_EVERY_S = 0.15
PICTURE_S = 0.004  # output without a longer pause is one picture
LIMIT_S = 120.0
QUESTION = "Write a long story about a river, in Markdown with headings and lists.\r"
COLUMNS, ROWS = 100, 30


def child() -> None:
    """The application; after each answer a file says when it had how many tokens."""
    import edgellm
    from edgellm.cli import main
    from edgellm.tui import answering

    came: list[list[tuple[float, int]]] = []

    class Clocked(answering.Answering):
        def _stream(self) -> None:
            times: list[tuple[float, int]] = []
            came.append(times)
            changed = self.changed

            def noted() -> None:
                times.append((time.monotonic(), len(self.node.tokens)))
                changed()

            self.changed = noted
            super()._stream()
            Path(os.environ["CHAT_RATES"]).write_text(json.dumps(came))

    import edgellm.tui.chat

    edgellm.tui.chat.Answering = Clocked  # type: ignore[misc]
    sys.exit(main(sys.argv[2:]))


class Terminal:
    """A terminal that shows everything at once and knows when it came."""

    def __init__(self, arguments: list[str]) -> None:
        self.pid, self.master = pty.fork()
        if self.pid == 0:
            os.environ |= {"TERM": "xterm-256color", "COLORTERM": "truecolor"}
            os.execv(sys.executable, [sys.executable, __file__, "child", *arguments])
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
        self.seen: list[tuple[float, bytes]] = []

    def type(self, text: str) -> None:
        """Press keys."""
        os.write(self.master, text.encode())

    def read_until(self, done: Callable[[], bool], limit_s: float = LIMIT_S) -> bool:
        """Show output until ``done`` or the time is over."""
        end = time.monotonic() + limit_s
        while not done() and time.monotonic() < end:
            if select.select([self.master], [], [], 0.05)[0]:
                try:
                    self.seen.append((time.monotonic(), os.read(self.master, 65536)))
                except OSError:  # it left
                    return done()
        return done()

    def words(self, since: int = 0) -> str:
        """What was written from chunk ``since`` on, without control sequences."""
        return re.sub(rb"\x1b[^a-zA-Z]*[a-zA-Z]", b"", b"".join(text for _, text in self.seen[since:])).decode(
            errors="replace"
        )


class Round(NamedTuple):
    """One run of the application. Rates are tokens per second, times milliseconds."""

    rate: float
    rate_with_keys: float
    pictures: list[float]
    keys: list[float]


def one_round(model: str, n_tokens: int, options: list[str]) -> Round:
    """Two answers of so many tokens at most."""
    with tempfile.NamedTemporaryFile() as file:
        os.environ["CHAT_RATES"] = file.name
        terminal = Terminal(["chat", model, "-n", str(n_tokens), *options])
        try:
            terminal.read_until(lambda: "rite a message" in terminal.words())
            time.sleep(3)  # the model is there
            begun = len(terminal.seen)
            terminal.type(QUESTION)
            terminal.read_until(lambda: len(answers(file.name)) == 1)
            pictures = gaps(terminal, begun)
            terminal.read_until(lambda: False, 1.0)
            begun, keys = len(terminal.seen), []
            terminal.type(QUESTION)
            terminal.read_until(lambda: False, 1.0)
            for key in KEYS:
                terminal.read_until(lambda: False, random.uniform(0.5, 1.5) * KEY_EVERY_S)
                at, pressed = len(terminal.seen), time.monotonic()
                terminal.type(key)

                def is_shown(at: int = at, key: str = key) -> bool:
                    return key in terminal.words(at)

                if terminal.read_until(is_shown, 3):
                    keys.append(1e3 * (terminal.seen[-1][0] - pressed))
            terminal.read_until(lambda: len(answers(file.name)) == 2)
            terminal.type("\x11")
            os.waitpid(terminal.pid, 0)
        except BaseException:
            os.kill(terminal.pid, signal.SIGKILL)
            raise
        rates = [(n - m) / (last - first) for (first, m), *_, (last, n) in answers(file.name)]
    return Round(rates[0], rates[1], pictures, keys)


def answers(path: str) -> list[list[tuple[float, int]]]:
    """For each finished answer, when it was seen to have how many tokens."""
    text = Path(path).read_text()
    return json.loads(text) if text.endswith("]]") else []


def gaps(terminal: Terminal, since: int) -> list[float]:
    """Milliseconds between two pictures."""
    times = [at for at, _ in terminal.seen[since:]]
    starts = [b for a, b in itertools.pairwise(times) if b - a > PICTURE_S]
    return [1e3 * (b - a) for a, b in itertools.pairwise(starts)]


def bench(model: str, n_tokens: int) -> float:
    """Tokens per second of the executor alone."""
    command = [sys.executable, "-m", "edgellm", "bench", "-m", model, "-p", "0", "-n", str(n_tokens), "-d"]
    command += [str(N_DEPTH), "-r", "2", "--no-bandwidth", "-o", "json"]
    rows: list[dict[str, Any]] = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    return float(rows[0]["avg_ts"])


def main() -> None:
    """Print each round and the medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("-n", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=256)
    arguments, options = parser.parse_known_args()
    model, n_tokens = arguments.model, arguments.tokens
    rows, pictures, keys = [], [], []
    for number in range(arguments.n):
        alone, inside = bench(model, n_tokens), one_round(model, n_tokens, options)
        rows.append((alone, inside.rate, inside.rate_with_keys))
        pictures += inside.pictures
        keys += inside.keys
        figures = f"bench {alone:.0f} t/s, chat {inside.rate:.0f} t/s, with keys {inside.rate_with_keys:.0f}"
        print(f"{number + 1}: {figures}", flush=True)
    alone, rate, with_keys = (statistics.median(column) for column in zip(*rows, strict=True))
    share = statistics.median(inside / alone for alone, inside, _ in rows)
    print(f"median: bench {alone:.0f} t/s, chat {rate:.0f} t/s ({share:.1%} of it), with keys {with_keys:.0f} t/s")
    for name, times in (("between two pictures", pictures), ("from a key to its letter", keys)):
        times.sort()
        print(f"{name}: median {statistics.median(times):.0f} ms, 95 % {times[len(times) * 19 // 20]:.0f}, ", end="")
        print(f"longest {times[-1]:.0f} ({len(times)})")


if __name__ == "__main__":
    child() if sys.argv[1:2] == ["child"] else main()
