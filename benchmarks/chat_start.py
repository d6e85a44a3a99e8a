"""How soon the chat can be used: python benchmarks/chat_start.py [MODEL] [-n STARTS]

Starts `edgellm chat` in a pseudo-terminal, types as soon as the input is drawn, and waits until the letters stand
there. Times are from the start of the process; CPU seconds are of all its threads, that of the loading model too.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import pty
import re
import select
import signal
import statistics
import struct
import sys
import termios
import time
from pathlib import Path

LETTERS = "qzj"
PLACEHOLDER = b"rite a message"  # its first letter is under the cursor
LIMIT_S = 30.0


def cpu_seconds(pid: int) -> float:
    """User and system time of a process up to now."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def start(model: str | None) -> tuple[float, float, float]:
    """One start: seconds until the picture, until typed letters are drawn, and the CPU seconds of that."""
    began = time.monotonic()
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ |= {"TERM": "xterm-256color", "COLORTERM": "truecolor"}
        os.execv(sys.executable, [sys.executable, "-m", "edgellm", "chat", *([model] if model else [])])
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
    output, shown_s = b"", 0.0
    try:
        while time.monotonic() - began < LIMIT_S:
            if select.select([terminal], [], [], 0.02)[0]:
                output += os.read(terminal, 65536)
            now = time.monotonic() - began
            if not shown_s and PLACEHOLDER in output:
                shown_s, output = now, b""
                os.write(terminal, LETTERS.encode())
            elif shown_s and all(
                letter in re.sub(rb"\x1b[^a-zA-Z]*[a-zA-Z]", b"", output) for letter in LETTERS.encode()
            ):
                return shown_s, now, cpu_seconds(pid)
        raise SystemExit(f"No usable input within {LIMIT_S:.0f} s.")
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(terminal)


def main() -> None:
    """Print each start and the medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?")
    parser.add_argument("-n", type=int, default=5)
    arguments = parser.parse_args()
    rows = [start(arguments.model) for _ in range(arguments.n)]
    for name, row in [
        *((str(i + 1), row) for i, row in enumerate(rows)),
        ("median", map(statistics.median, zip(*rows, strict=True))),
    ]:
        print("{:>6}: picture {:.2f} s, typed letters {:.2f} s, CPU {:.2f} s".format(name, *row))


if __name__ == "__main__":
    main()
