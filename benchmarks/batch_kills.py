"""Kill a batch again and again and count its answers: python benchmarks/batch_kills.py [LINES] [KILLS]

A tiny model of random weights answers short lines; the process is killed with SIGKILL at random moments and started
again with the same two files. In the end each line must be answered once, and no run but the last may have ended.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

SPREAD_S = 3.0  # a kill comes so long after the first new answer at most


def main(n: int, kills: int) -> int:
    """The exit status: 0 when each line is answered once."""
    from tiny_models import write_tiny_model

    rng = random.Random()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = write_tiny_model(folder / "tiny.gguf", n_embd=64, n_ff=64, n_head=1, n_head_kv=1)
        requests, out = folder / "in.jsonl", folder / "out.jsonl"
        with requests.open("w", encoding="utf-8") as file:
            for number in range(n):
                body = {"model": "tiny", "prompt": f"line {number}", "max_tokens": 8, "temperature": 0}
                row = {"custom_id": f"r{number}", "method": "POST", "url": "/v1/completions", "body": body}
                file.write(json.dumps(row) + "\n")
        command = [sys.executable, "-m", "edgellm", "batch", str(requests), str(out), "-m", str(model), "-c", "128"]
        started = time.monotonic()
        for kill in range(kills):
            before = out.stat().st_size if out.exists() else 0
            child = subprocess.Popen(command, stderr=subprocess.DEVNULL)
            while child.poll() is None and (not out.exists() or out.stat().st_size == before):
                time.sleep(0.01)
            time.sleep(SPREAD_S * rng.random())
            ended = child.poll() is not None
            child.kill()
            child.wait()
            data = out.read_bytes()
            torn = len(data) - (data.rfind(b"\n") + 1)
            print(f"kill {kill + 1}: {data.count(10)} lines, {torn} bytes torn{', it was done' if ended else ''}")
        subprocess.run(command, check=True)
        found = Counter(json.loads(line)["custom_id"] for line in out.read_text("utf-8").splitlines())
        right = found == Counter(f"r{number}" for number in range(n))
        print(f"{len(found)} of {n} answered, {sum(found.values()) - len(found)} twice, {kills} kills, "
              f"{time.monotonic() - started:.0f} s: {'right' if right else 'WRONG'}")  # fmt: skip
        return 0 if right else 1


if __name__ == "__main__":
    numbers = [int(argument) for argument in sys.argv[1:]]
    sys.exit(main(*(numbers + [10_000, 10][len(numbers) :])))
