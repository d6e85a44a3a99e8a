"""What a pipeline of stages costs and takes: python benchmarks/ray_pipeline.py [MODEL] [ROUNDS] [TOKENS]

A local Ray cluster with a node for each stage, one thread in each stage. Tokens must be those of one process; told are
the milliseconds a token beside one process with one thread (medians of alternating rounds), the memory of each stage,
and the tokens per second of four answers at once over one lane and over as many lanes as stages.
"""

from __future__ import annotations

import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter
from typing import Any

QUESTION = "Rivers flow to the sea because"
AT_ONCE = 4


def token_ms(model: Any, n: int) -> tuple[float, tuple[int, ...]]:
    """Milliseconds for each token after the first, and the tokens."""
    answer = model.generate(QUESTION, max_tokens=n, temperature=0, ignore_eos=True)
    return 1e3 / answer.timings.generation_tps, answer.tokens


def together(model: Any, n: int) -> float:
    """Tokens per second of several answers at once."""
    texts = [f"{QUESTION} of the number {number}" for number in range(AT_ONCE)]
    for _ in range(2):  # the first time warms up
        started = perf_counter()
        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(lambda one: model.generate(one, max_tokens=n, temperature=0, ignore_eos=True), texts))
    return AT_ONCE * n / (perf_counter() - started)


def main(name: str, rounds: int, n: int) -> int:
    """The exit status: 0 where the tokens are the same."""
    import edgellm.ray  # isort: skip
    import ray
    from ray.cluster_utils import Cluster

    from edgellm.loading import LoadOptions
    from edgellm.ray.pipeline import pipeline
    from edgellm.store.catalogue import fetched

    path, right = str(fetched(name)), True
    options = LoadOptions(n_ctx=1024, n_threads=1, n_parallel=AT_ONCE)
    node = {"num_cpus": 2, "object_store_memory": 80 << 20}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    try:
        for _ in range(2):
            cluster.add_node(**node)
        ray.init(address=cluster.address, log_to_driver=False)
        with edgellm.load(path, n_ctx=1024, n_threads=1, n_parallel=AT_ONCE) as alone:
            for n_stages in (1, 2, 3):
                with pipeline(path, n_stages, options=options) as model:
                    pairs = [(token_ms(alone, n), token_ms(model, n)) for _ in range(rounds + 1)][1:]
                    right = right and all(one[1] == other[1] for one, other in pairs)
                    mine, theirs = (statistics.median(pair[side][0] for pair in pairs) for side in (1, 0))
                    print(f"{n_stages} stages: {mine:.1f} ms a token, one process {theirs:.1f}, "
                          f"{'the same tokens' if right else 'OTHER TOKENS'}", flush=True)  # fmt: skip
                    for stage in model.facts():
                        weights, process = stage.weights_nbytes / 1e6, stage.resident_nbytes / 1e6
                        print(f"    layers {stage.layers}: weights {weights:.0f} MB, process {process:.0f} MB")
                    lanes = together(model, n)
                with pipeline(path, n_stages, options=options, lanes=1) as model:
                    print(
                        f"    {AT_ONCE} at once: {together(model, n):.0f} t/s over 1 lane, {lanes:.0f} over {n_stages}"
                    )
            print(f"one process, {AT_ONCE} at once: {together(alone, n):.0f} t/s")
    finally:
        ray.shutdown()
        cluster.shutdown()
    return 0 if right else 1


if __name__ == "__main__":
    given = [*sys.argv[1:], *["smollm2", "3", "48"][len(sys.argv) - 1 :]]
    sys.exit(main(given[0], int(given[1]), int(given[2])))
