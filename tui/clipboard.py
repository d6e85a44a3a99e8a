"""Copy inside tmux, which drops OSC 52 unless it is told otherwise; elsewhere OSC 52 copies, through ssh too."""

from __future__ import annotations

import os
import shutil
import subprocess

TIMEOUT_S = 3.0


def in_tmux() -> bool:
    """Whether tmux stands between this program and the terminal."""
    return bool(os.environ.get("TMUX")) and shutil.which("tmux") is not None


def into_tmux(text: str) -> bool:
    """Give a text to tmux and, through it, to the terminal around it; False where OSC 52 still has to."""
    for arguments in (["-w", "-"], ["-"]):  # before tmux 3.2 there is no -w, and the text stays inside
        try:
            done = subprocess.run(
                ["tmux", "load-buffer", *arguments], input=text.encode(), capture_output=True, timeout=TIMEOUT_S
            )
        except (OSError, subprocess.SubprocessError):
            return False
        if done.returncode == 0:
            return "-w" in arguments
    return False
