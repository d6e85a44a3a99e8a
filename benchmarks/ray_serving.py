"""Replicas on a local Ray cluster, killed and replaced: python benchmarks/ray_serving.py [PART ...]

Four nodes, and these parts, all of them by default:

kills     a tiny model of random weights answers 32 clients, half of them with streams, 2,000 requests and 5 minutes at
          least, while a replica is killed each 20 s; each text must be that of one engine
scaling   the replicas follow the requests up and down, then the keys and values that a few long texts take
updates   the model is replaced three times, by another one and back, while 16 clients ask; each text must be that of
          one of the two
draining  a replica is told to end while it writes long answers: it is there until these are over
prefixes  the same texts with prefix routing and by load alone, and what the caches held
rates     SmolLM2 by two replicas of one thread, by one of two, and by an engine without Ray

All on one machine: what is shown is that nothing is lost, and not how fast several machines are.
"""

from __future__ import annotations

import json
import os
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
N_REQUESTS, LEAST_S, KILL_S = 2000, 300, 20
LONG_TOKENS = 900


def post(path: str, body: dict[str, Any], timeout: float = 300) -> str:
    """The text of the reply."""
    request = urllib.request.Request(URL + path, json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=timeout) as reply:
        return str(reply.read().decode())


def completed(prompt: str, stream: bool, **more: Any) -> tuple[str, int]:
    """The text of an answer, and how often it ended."""
    body = {"model": "tiny", "prompt": prompt, "max_tokens": MAX_TOKENS, "temperature": 0, "stream": stream, **more}
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
    return [one["name"] for one in named if "#model-tiny#" in one["name"]]


def deploy(model: Path, n_threads: int = 1, **options: Any) -> None:
    """Run the application in place of what ran before."""
    from ray import serve

    import edgellm.ray
    from edgellm.loading import LoadOptions
    from edgellm.server.security import Access

    how = LoadOptions(n_ctx=1024, n_parallel=4, n_threads=n_threads)
    serve.run(edgellm.ray.app(str(model), options=how, access=Access(), **options), name="edgellm")


def texts_of(model: Path) -> dict[str, str]:
    """What one engine answers to each prompt."""
    import edgellm

    prompts = [f"the {number} rains in the house" for number in range(N_PROMPTS)]
    with edgellm.load(model, n_ctx=1024, n_threads=1, n_parallel=16) as llm, ThreadPoolExecutor(16) as pool:
        options = {"max_tokens": MAX_TOKENS, "temperature": 0}
        answers = pool.map(lambda text: str(llm.generate(llm.tokenize(text, True, True), **options)), prompts)
        return dict(zip(prompts, answers, strict=True))


class Asked:
    """Clients that ask on, and whether each text is one that may come."""

    def __init__(self, may: dict[str, set[str]]) -> None:
        self.may, self.prompts, self.counted = may, list(may), Counter[str]()

    def ask(self, number: int) -> None:
        """One request, each other one as a stream."""
        prompt = self.prompts[number % len(self.prompts)]
        try:
            text, ends = completed(prompt, bool(number % 2))
        except (OSError, urllib.error.URLError, ValueError) as error:
            self.counted[f"lost: {error}"[:100]] += 1
            return
        right = text in self.may[prompt] and ends == 1
        self.counted["right" if right else f"WRONG, ended {ends} times: {text[:80]!r}"] += 1

    def all_right(self) -> bool:
        """Whether none was lost or wrong."""
        return set(self.counted) == {"right"}


def killed(model: Path) -> bool:
    """Ask while replicas are killed; whether all went well."""
    import ray

    deploy(model, replicas=3)
    rng, stop, n_killed = random.Random(), threading.Event(), 0

    def kill() -> None:
        nonlocal n_killed
        while not stop.wait(KILL_S):
            names = replica_names()
            if names:
                ray.kill(ray.get_actor(rng.choice(names), namespace="serve"))
                n_killed += 1

    asked = Asked({prompt: {text} for prompt, text in texts_of(model).items()})
    killer = threading.Thread(target=kill, daemon=True)
    started, n = time.monotonic(), 0
    killer.start()
    with ThreadPoolExecutor(CLIENTS) as pool:
        while n < N_REQUESTS or time.monotonic() - started < LEAST_S:
            list(pool.map(asked.ask, range(n, n + 500)))
            n += 500
    stop.set()
    killer.join()
    took = time.monotonic() - started
    print(
        f"{n} requests of {CLIENTS} clients, {n_killed} replicas killed, {took:.0f} s: {dict(asked.counted)}",
        flush=True,
    )
    return asked.all_right() and n_killed >= LEAST_S // KILL_S - 1


def followed(what: str, ask: Callable[[int], Any], n_clients: int) -> bool:
    """Replicas under a load, and some time after it."""
    seen = [len(replica_names())]
    is_over, deadline = threading.Event(), time.monotonic() + 120

    def ask_on(client: int) -> None:
        number = client
        while not is_over.is_set():
            ask(number)
            number += n_clients

    with ThreadPoolExecutor(n_clients) as pool:
        waiting = [pool.submit(ask_on, client) for client in range(n_clients)]
        while seen[-1] < 3 and time.monotonic() < deadline:
            time.sleep(1)
            seen.append(len(replica_names()))
        is_over.set()
        for one in waiting:
            one.result()
    deadline = time.monotonic() + 120
    while seen[-1] > 1 and time.monotonic() < deadline:
        time.sleep(1)
        seen.append(len(replica_names()))
    steps = [n for number, n in enumerate(seen) if not number or n != seen[number - 1]]
    print(f"replicas by {what}, under load and after it: {steps}", flush=True)
    return max(seen) == 3 and seen[-1] == 1


def scaled(model: Path) -> bool:
    """Replicas that follow their requests, and then the keys and values that a few long texts take."""
    delays: dict[str, Any] = {"replicas": (1, 3), "upscale_delay_s": 1, "downscale_delay_s": 5}
    deploy(model, target_requests=4, **delays)
    right = followed("requests", lambda number: completed(f"load {number}", False), CLIENTS)
    # so many at once that requests alone would want one replica, each of them nearly a whole context
    deploy(model, target_requests=1000, target_kv=0.5, **delays)
    long = {"max_tokens": LONG_TOKENS, "ignore_eos": True}
    return followed("cache", lambda number: completed(f"long {number}", False, **long), 12) and right


def updated(model: Path, other: Path) -> bool:
    """Replace the model while clients ask; whether none was lost, and each answer is of one of the two."""
    one, two = texts_of(model), texts_of(other)
    asked, is_over = Asked({prompt: {one[prompt], two[prompt]} for prompt in one}), threading.Event()
    deploy(model, replicas=2)

    def ask_on(client: int) -> None:
        number = client
        while not is_over.is_set():
            asked.ask(number)
            number += CLIENTS // 2

    started = time.monotonic()
    with ThreadPoolExecutor(CLIENTS // 2) as pool:
        asking = [pool.submit(ask_on, client) for client in range(CLIENTS // 2)]
        for path in (other, model, other):
            before = set(replica_names())
            deploy(path, replicas=2)
            while before & set(replica_names()):
                time.sleep(0.2)
        is_over.set()
        for each in asking:
            each.result()
    took = time.monotonic() - started
    now = [completed(prompt, False)[0] == two[prompt] for prompt in list(two)[:8]]
    print(f"3 updates under {CLIENTS // 2} clients, {took:.0f} s: {dict(asked.counted)}; then the new one: {all(now)}")
    return asked.all_right() and all(now)


def drained() -> bool:
    """Tell a replica to end while it writes; whether it does so when its answers are over, and not before."""
    from ray import serve

    from edgellm.store.catalogue import fetched

    path, n = fetched("smollm2"), 8
    deploy(path, replicas=1)
    (old,) = replica_names()
    body = {"model": path.stem, "temperature": 0, "ignore_eos": True, "max_tokens": LONG_TOKENS, "stream": True}
    ended, begun = list[tuple[float, bool, bool]](), threading.Semaphore(0)

    def ask(number: int) -> int:
        request = urllib.request.Request(
            f"{URL}/v1/completions",
            json.dumps({**body, "prompt": f"Rivers of the number {number}"}).encode(),
            {"content-type": "application/json"},
        )
        n_tokens = 0
        with urllib.request.urlopen(request, timeout=300) as reply:
            for raw in reply:
                n_tokens += raw.startswith(b"data: {")
                if n_tokens == 1:
                    begun.release()
        states = serve.status().applications["edgellm"].deployments["model-tiny"].replica_states
        ended.append((time.monotonic(), old in replica_names(), "STOPPING" in states))
        return n_tokens

    with ThreadPoolExecutor(n) as pool:
        asking = [pool.submit(ask, number) for number in range(n)]
        for _ in range(n):
            begun.acquire()
        started = time.monotonic()
        deploy(path, replicas=1, surge_percent=100)
        counts = {one.result() for one in asking}
    deadline = time.monotonic() + 20
    while old in replica_names() and time.monotonic() < deadline:
        time.sleep(0.1)
    gone = old not in replica_names()
    there, told = sum(is_there for _, is_there, _ in ended), sum(is_told for *_, is_told in ended)
    took = max(when for when, *_ in ended) - started
    print(f"{n} streams of {counts} events, the last ended {took:.0f} s after the update began", flush=True)
    said = f"the old replica was there at the end of {there} of them, at that of {told} told to end already"
    print(f"    {said}, and is gone: {gone}", flush=True)
    return there == n and gone and told > 0


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


def routed(model: Path) -> bool:
    """Whether routing by prefixes finds more of them."""
    by_prefix, by_load = (cached(model, routing) for routing in (True, False))
    print(f"prompt tokens from caches: {by_prefix:.0%} by prefix, {by_load:.0%} by load", flush=True)
    return by_prefix > by_load


def rates() -> bool:
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
    return True


def main(parts: list[str]) -> int:
    """The exit status."""
    import edgellm.ray  # isort: skip
    import ray
    from ray import serve
    from ray.cluster_utils import Cluster
    from tiny_models import write_tiny_model

    assert edgellm.ray.app is not None
    os.environ.setdefault("RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S", "2")
    with tempfile.TemporaryDirectory() as name:
        shape = {"n_embd": 64, "n_ff": 64, "n_head": 1, "n_head_kv": 1, "context_length": 1024}
        folders = [Path(name) / one for one in ("one", "two")]
        for folder in folders:
            folder.mkdir()
        model, other = (write_tiny_model(folder / "tiny.gguf", seed=n, **shape) for n, folder in enumerate(folders))
        node = {"num_cpus": 2, "object_store_memory": 80 << 20}
        cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
        try:
            for _ in range(NODES - 1):
                cluster.add_node(**node)
            ray.init(address=cluster.address, log_to_driver=False)
            print(f"{len(ray.nodes())} nodes", flush=True)
            serve.start(http_options={"host": "127.0.0.1", "port": PORT}, logging_config={"log_level": "ERROR"})
            run: dict[str, Callable[[], bool]] = {
                "kills": lambda: killed(model),
                "scaling": lambda: scaled(model),
                "updates": lambda: updated(model, other),
                "draining": drained,
                "prefixes": lambda: routed(model),
                "rates": rates,
            }
            found = [run[part]() for part in parts or run]
            return 0 if all(found) else 1
        finally:
            serve.shutdown()
            ray.shutdown()
            cluster.shutdown()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
