"""Replicas on a local Ray cluster, killed again and again: python benchmarks/ray_serving.py [REQUESTS] [EVERY_S]

Four nodes. A tiny model of random weights answers 32 clients, half of them with streams, while a replica is killed each
so many seconds; each text must be that of one engine. Then the replicas follow the load up and down, and the same texts
are sent with prefix routing and with Ray Serve's own, and what the caches held is compared. Last, SmolLM2 by two
replicas of one thread, by one of two, and by an engine without Ray. All on one machine: what is shown is that nothing
is lost, and not how fast several machines are.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

CLIENTS, NODES, PORT = 32, 4, 8766
URL = f"http://127.0.0.1:{PORT}"
MAX_TOKENS = 64
N_PROMPTS = 64


def post(path: str, body: dict[str, Any], timeout: float = 300) -> str:
    """The text of the reply."""
    request = urllib.request.Request(URL + path, json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=timeout) as reply:
        return str(reply.read().decode())


def completed(prompt: str, stream: bool) -> tuple[str, int]:
    """The text of an answer, and how often it ended."""
    body = {"model": "tiny", "prompt": prompt, "max_tokens": MAX_TOKENS, "temperature": 0, "stream": stream}
    text = post("/v1/completions", body)
    if not stream:
        (choice,) = json.loads(text)["choices"]
        return choice["text"], 1
    lines = [line[6:] for line in text.split("\n") if line.startswith("data: ")]
    events = [json.loads(line) for line in lines if line != "[DONE]"]
    if any("error" in event for event in events):
        return f"error: {events[-1]}", 0
    ends = sum(event["choices"][0]["finish_reason"] is not None for event in events)
    whole = lines[-1:] == ["[DONE]"] and lines.count("[DONE]") == 1
    return "".join(event["choices"][0]["text"] for event in events), ends if whole else 0


def replica_names() -> list[str]:
    """The replicas of the model, as Ray's actors are named."""
    import ray

    named = ray.util.list_named_actors(all_namespaces=True)
    return [one["name"] for one in named if "#model-0#" in one["name"]]


def deploy(model: Path, n_threads: int = 1, **options: Any) -> None:
    """Run the application in place of what ran before."""
    from ray import serve

    import edgellm.ray
    from edgellm.loading import LoadOptions
    from edgellm.server.security import Access

    how = LoadOptions(n_ctx=1024, n_parallel=4, n_threads=n_threads)
    serve.run(edgellm.ray.app(str(model), options=how, access=Access(), **options), name="edgellm")


def killed(n: int, every_s: float, expected: dict[str, str]) -> bool:
    """Ask while replicas are killed; whether all went well."""
    import ray

    rng, stop, n_killed = random.Random(), threading.Event(), 0

    def kill() -> None:
        nonlocal n_killed
        while not stop.wait(every_s):
            names = replica_names()
            if names:
                ray.kill(ray.get_actor(rng.choice(names), namespace="serve"))
                n_killed += 1

    prompts = list(expected)
    counted: Counter[str] = Counter()

    def ask(number: int) -> None:
        prompt = prompts[number % len(prompts)]
        try:
            text, ends = completed(prompt, bool(number % 2))
        except (OSError, urllib.error.URLError, ValueError) as error:
            counted[f"lost: {error}"[:100]] += 1
            return
        counted["right" if text == expected[prompt] and ends == 1 else f"WRONG, ended {ends} times: {text[:80]!r}"] += 1

    killer = threading.Thread(target=kill, daemon=True)
    started = time.monotonic()
    killer.start()
    with ThreadPoolExecutor(CLIENTS) as pool:
        list(pool.map(ask, range(n)))
    stop.set()
    killer.join()
    took = time.monotonic() - started
    print(f"{n} requests of {CLIENTS} clients, {n_killed} replicas killed, {took:.0f} s: {dict(counted)}", flush=True)
    return counted["right"] == n


def scaled(model: Path) -> bool:
    """Replicas under load, and some time after it."""
    deploy(model, replicas=(1, 3), target_requests=4, upscale_delay_s=1, downscale_delay_s=5)
    seen = [len(replica_names())]
    with ThreadPoolExecutor(CLIENTS) as pool:
        waiting = [pool.submit(completed, f"load {number}", False) for number in range(40 * CLIENTS)]
        while any(not one.done() for one in waiting) and seen[-1] < 3:
            time.sleep(1)
            seen.append(len(replica_names()))
        for one in waiting:
            one.cancel()
    deadline = time.monotonic() + 90
    while seen[-1] > 1 and time.monotonic() < deadline:
        time.sleep(1)
        seen.append(len(replica_names()))
    steps = [n for number, n in enumerate(seen) if not number or n != seen[number - 1]]
    print(f"replicas under load and after it: {steps}", flush=True)
    return max(seen) > 1 and seen[-1] == 1


def cached(model: Path, prefix_routing: bool) -> float:
    """The share of prompt tokens that the caches held, over conversations of eight turns."""
    deploy(model, replicas=3, prefix_routing=prefix_routing)
    rng = random.Random(1)
    words = ["the", "rain", "and", "wind", "in", "her", "house", "at", "sea", "when", "all", "is", "well"]
    texts = [" ".join(rng.choices(words, k=40)) for _ in range(18)]
    n_read = n_cached = 0
    for _ in range(8):
        rng.shuffle(texts)
        with ThreadPoolExecutor(6) as pool:
            bodies = [{"model": "tiny", "prompt": text, "max_tokens": 4, "temperature": 0} for text in texts]
            replies = list(pool.map(lambda body: json.loads(post("/v1/completions", body)), bodies))
        for number, reply in enumerate(replies):
            n_read += reply["usage"]["prompt_tokens"]
            n_cached += reply["usage"]["prompt_tokens_details"]["cached_tokens"]
            texts[number] += " " + " ".join(rng.choices(words, k=8))
    return n_cached / n_read


def rates() -> None:
    """Tokens per second of eight clients, three ways on two cores."""
    import edgellm
    from edgellm.store.catalogue import fetched

    path, n, texts = fetched("smollm2"), 48, [f"Rivers of the number {number}" for number in range(32)]
    body = {"max_tokens": n, "temperature": 0, "ignore_eos": True}

    def rate(ask: Callable[[str], Any]) -> float:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(ask, texts[:8]))
            started = time.monotonic()
            list(pool.map(ask, texts))
        return n * len(texts) / (time.monotonic() - started)

    for replicas, n_threads in ((2, 1), (1, 2)):
        deploy(path, n_threads, replicas=replicas)
        found = rate(lambda text: post("/v1/completions", {**body, "prompt": text}))
        print(f"{replicas} replicas with {n_threads} threads: {found:.0f} t/s", flush=True)
    with edgellm.load(path, n_ctx=1024, n_threads=2, n_parallel=4) as llm:
        print(f"one engine with 2 threads, without Ray: {rate(lambda text: llm.generate(text, **body)):.0f} t/s")


def main(n: int, every_s: float) -> int:
    """The exit status."""
    import ray
    from ray import serve
    from ray.cluster_utils import Cluster
    from tiny_models import write_tiny_model

    import edgellm

    with tempfile.TemporaryDirectory() as name:
        model = write_tiny_model(
            Path(name) / "tiny.gguf", n_embd=64, n_ff=64, n_head=1, n_head_kv=1, context_length=1024
        )
        with edgellm.load(model, n_ctx=1024, n_threads=1) as llm:
            prompts = [f"the {number} rains in the house" for number in range(N_PROMPTS)]
            options = {"max_tokens": MAX_TOKENS, "temperature": 0}
            expected = {text: str(llm.generate(llm.tokenize(text, True, True), **options)) for text in prompts}
        node = {"num_cpus": 2, "object_store_memory": 80 << 20}
        cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
        try:
            for _ in range(NODES - 1):
                cluster.add_node(**node)
            ray.init(address=cluster.address, log_to_driver=False)
            print(f"{len(ray.nodes())} nodes", flush=True)
            serve.start(http_options={"host": "127.0.0.1", "port": PORT})
            deploy(model, replicas=3)
            right = killed(n, every_s, expected)
            right = scaled(model) and right
            by_prefix, by_load = (cached(model, routing) for routing in (True, False))
            print(f"prompt tokens from caches: {by_prefix:.0%} by prefix, {by_load:.0%} by load", flush=True)
            rates()
            return 0 if right and by_prefix > by_load else 1
        finally:
            serve.shutdown()
            ray.shutdown()
            cluster.shutdown()


if __name__ == "__main__":
    sys.exit(main(int((sys.argv[1:] or [2000])[0]), float((sys.argv[2:] or [20])[0])))
