"""Kill the chat while it streams and see what was lost: python benchmarks/chat_kills.py [KILLS]

Each round starts the real application in a terminal of its own, with a model that says the time 200 times a second,
kills it with SIGKILL at a random moment and reads the session from the file: the last time in it is what was kept.
"""

from __future__ import annotations

import os
import pty
import random
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

PERIOD_S = 0.005
START_S = 120.0


def child() -> None:
    """The application over a model that tells the time."""
    import fake_chat_llm

    import edgellm
    from edgellm.cli import main

    class Clock(fake_chat_llm.FakeChatLLM):
        def _chunks(self, prompt: Any, cancel: Any, progress: Any, limit: int) -> Any:
            while not cancel.is_set():
                time.sleep(PERIOD_S)
                token = self.tokenizer.id_of(f"{time.time():.3f} ".encode())
                text = self.tokenizer.words[token].decode()
                yield fake_chat_llm.GenerationChunk(text, token, self.told(token, 1), None, fake_chat_llm.times(1))

    edgellm.load = lambda name, progress=None, **options: Clock(name)
    sys.exit(main(["chat", "-p", "What time is it?"]))


def drain(master: int) -> None:
    """A terminal that shows everything at once."""
    try:
        while os.read(master, 65536):
            pass
    except OSError:
        pass


def one_round(folder: Path, delay_s: float) -> tuple[float, int]:
    """(seconds of text that were lost, words that were kept)."""
    from edgellm.sessions import open_store

    os.environ["EDGELLM_HOME"], os.environ["TERM"] = str(folder), "xterm-256color"
    pid, master = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, __file__, "child"])
    threading.Thread(target=drain, args=(master,), daemon=True).start()
    end = time.monotonic() + START_S
    words: list[str] = []
    while not words and time.monotonic() < end:  # until it streams and writes
        time.sleep(0.1)
        if (folder / "sessions" / "sessions.db").exists():
            store, _ = open_store(folder / "sessions")
            last = store.last_id()
            words = store.load(last).tree.path[-1].text.split() if last else []
            words = words if words and words[-1][:1].isdigit() else []
            store._db.close()
    time.sleep(delay_s)
    killed = time.time()
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    store, note = open_store(folder / "sessions")
    assert note is None, note
    words = store.load(store.last_id() or 0).tree.path[-1].text.split()
    store._db.close()
    return killed - float(words[-1]), len(words)


def main() -> None:
    """Print the losses."""
    if sys.argv[1:] == ["child"]:
        child()
    generator, losses = random.Random(7), []
    for number in range(int(sys.argv[1]) if len(sys.argv) > 1 else 20):
        with tempfile.TemporaryDirectory() as folder:
            lost_s, n_words = one_round(Path(folder), generator.uniform(0.2, 2.0))
        losses.append(lost_s)
        print(f"kill {number + 1}: {n_words} words kept, {lost_s:.2f} s lost", flush=True)
    losses.sort()
    print(f"median {losses[len(losses) // 2]:.2f} s, most {losses[-1]:.2f} s")


if __name__ == "__main__":
    main()
