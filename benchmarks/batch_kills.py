"""Kill a batch again and again and count its answers: python benchmarks/batch_kills.py [LINES] [KILLS] [here|ray]

A tiny model of random weights answers short lines; the process is killed with SIGKILL at random moments and started
again with the same two files. In the end each line must be answered once, and no run but the last may have ended. With
``ray`` workers on a local cluster of four nodes answer, and each other time a node vanishes in place of the process.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

SPREAD_S = 3.0  # a kill comes so long after the first new answer at most
NODES = 4


@contextmanager
def cluster() -> Iterator[Any]:
    """Nodes that can vanish, with a CPU for a worker each; the head has none."""
    import edgellm.ray  # isort: skip
    from ray.cluster_utils import Cluster

    assert edgellm.ray.app is not None
    node = {"object_store_memory": 80 << 20}
    made = Cluster(initialize_head=True, head_node_args={**node, "num_cpus": 0, "include_dashboard": False})
    try:
        for _ in range(NODES):
            made.add_node(**node, num_cpus=1)
        yield made
    finally:
        made.shutdown()


def main(n: int, kills: int, by_ray: bool) -> int:
    """The exit status: 0 when each line is answered once."""
    with cluster() if by_ray else nullcontext() as made, tempfile.TemporaryDirectory() as name:
        return killed(Path(name), n, kills, made)


def killed(folder: Path, n: int, kills: int, made: Any) -> int:
    """The same in a folder, with a cluster or without."""
    from tiny_models import write_tiny_model

    rng = random.Random()
    model = write_tiny_model(folder / "tiny.gguf", n_embd=64, n_ff=64, n_head=1, n_head_kv=1)
    requests, out = folder / "in.jsonl", folder / "out.jsonl"
    with requests.open("w", encoding="utf-8") as file:
        for number in range(n):
            body = {"model": "tiny", "prompt": f"line {number}", "max_tokens": 8, "temperature": 0}
            row = {"custom_id": f"r{number}", "method": "POST", "url": "/v1/completions", "body": body}
            file.write(json.dumps(row) + "\n")
    command = [sys.executable, "-m", "edgellm", "batch", str(requests), str(out), "-m", str(model), "-c", "128"]
    if made is not None:
        command += ["--ray-address", made.address, "--workers", str(NODES - 1), "-t", "1"]
    started = time.monotonic()
    child: subprocess.Popen[bytes] | None = None
    for kill in range(kills):
        if child is None:
            child = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        before = out.stat().st_size if out.exists() else 0
        while child.poll() is None and (not out.exists() or out.stat().st_size == before):
            time.sleep(0.01)
        time.sleep(SPREAD_S * rng.random())
        ended = child.poll() is not None
        node = made is not None and kill % 2 == 1
        if node:
            made.remove_node(rng.choice([one for one in made.list_all_nodes() if one is not made.head_node]), False)
            made.add_node(num_cpus=1, object_store_memory=80 << 20)
        else:
            child.kill()
            child.wait()
            child = None
        data = out.read_bytes()
        torn = len(data) - (data.rfind(b"\n") + 1)
        print(f"{'node' if node else 'kill'} {kill + 1}: {data.count(10)} lines, {torn} bytes torn"
              f"{', it was done' if ended else ''}", flush=True)  # fmt: skip
    if child is not None:
        child.wait()
    subprocess.run(command, check=True)
    found = Counter(json.loads(line)["custom_id"] for line in out.read_text("utf-8").splitlines())
    right = found == Counter(f"r{number}" for number in range(n))
    print(f"{len(found)} of {n} answered, {sum(found.values()) - len(found)} twice, {kills} kills, "
          f"{time.monotonic() - started:.0f} s: {'right' if right else 'WRONG'}")  # fmt: skip
    return 0 if right else 1


if __name__ == "__main__":
    given = [*sys.argv[1:], *["10000", "10", "here"][len(sys.argv) - 1 :]]
    sys.exit(main(int(given[0]), int(given[1]), given[2] == "ray"))
