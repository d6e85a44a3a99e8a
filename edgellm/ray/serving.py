"""The Ray Serve application: a front that speaks every protocol of the server, and replicas of each model behind it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import ray.exceptions
from ray import serve
from ray.serve.exceptions import BackPressureError
from ray.util import metrics

from edgellm import loading
from edgellm.formats.errors import FormatError, ParameterError
from edgellm.machine.terminal import echo
from edgellm.ray.same_file import check_same, file_hash, hash_of
from edgellm.server.errors import ServerError
from edgellm.server.front import Front
from edgellm.server.models import Models, named
from edgellm.server.prefix_keys import PrefixMemory
from edgellm.server.protocols.llama_state import metric_rows
from edgellm.server.rate_limit import RateLimit
from edgellm.server.relay import Failed, Part, RelayedCall, parts
from edgellm.server.response_cache import ResponseCache
from edgellm.server.routes import all_routes
from edgellm.server.security import Access
from edgellm.server.server import Server
from edgellm.store import catalogue

GONE = (
    ray.exceptions.RayActorError,
    ray.exceptions.ObjectLostError,
    ray.exceptions.WorkerCrashedError,
    ray.exceptions.NodeDiedError,
    ray.exceptions.LocalRayletDiedError,
    ray.exceptions.RpcError,
)
"""What Ray raises when a replica, its process or its machine is no more."""

BESIDE = 256  # requests that a front takes beyond its limit, to refuse them or to answer them by itself
PAUSE_S = 0.2  # until a lost replica is known to be lost
LOOK_BACK_S = 11.0  # over which load is averaged at least: it is counted each 10 s
TOLD_KEYS = 4096  # of prefixes, from a replica to the routers
TOLD_S = 5.0  # between one time and the next


class Replica:
    """One model in one process, asked by fronts. Made by Ray Serve, which waits until the model is loaded."""

    async def __init__(self, model: str, options: loading.LoadOptions, n_keys: int) -> None:  # type: ignore[misc]
        entries = await asyncio.to_thread(named, [model], catalogue.fetched)
        self.server = Server(Models(entries, options), max_requests=1 << 30)  # requests are limited by Ray
        self._routes = {(row.route.method, row.route.path): row.route for row in all_routes()}
        self._read = PrefixMemory(n_keys)
        async with self.server.models.lease(None, kinds=()) as entry:
            assert entry.llm is not None, "a lease is of a loaded model"
            self._path, self._hash = entry.path, await asyncio.to_thread(file_hash, entry.llm.gguf)
        self._gauges: dict[str, Any] = {}
        self._tending = [asyncio.create_task(self.server.tend()), asyncio.create_task(self._tell())]

    async def answer(
        self, call: RelayedCall, prefix: Sequence[int] = (), expected: str | None = None
    ) -> AsyncGenerator[Part, None]:
        """The parts of the reply to a call, of a front whose file of the model has the hash ``expected``."""
        try:
            if expected is not None:
                check_same(self._path, self._hash, expected, "the front")
        except FormatError as error:
            echo(f"edgellm: {error}", err=True)  # where the file is, is nothing for clients
            told = ServerError(
                "server_error", "A server has another file of the model than the front; its log says where."
            )
            yield Failed.of(told)
            return
        self._read.note(prefix)
        async with aclosing(parts(self.server, self._routes[call.method, call.path], call)) as source:
            async for part in source:
                yield part

    async def check_health(self) -> None:
        """Ray Serve's question, again and again: a replica whose engine hangs is replaced."""
        if stuck := self.server.watchdog.stuck():
            raise RuntimeError(f"the engine of {', '.join(stuck)} hangs")

    async def record_routing_stats(self) -> dict[str, Any]:
        """What routers shall know: the prefixes that were read last."""
        return {"prefixes": self._read.latest(TOLD_KEYS)}

    async def _tell(self) -> None:
        """The server's counters as Ray's metrics, which the cluster exports."""
        name = self.server.models.names()[0]
        while True:
            for _, metric, text, value in metric_rows(self.server):
                if metric not in self._gauges:
                    gauge = metrics.Gauge(f"edgellm_{metric}", description=text, tag_keys=("model",))
                    self._gauges[metric] = gauge
                self._gauges[metric].set(value, tags={"model": name})
            await asyncio.sleep(TOLD_S)


@serve.ingress()
class Gate:
    """The front in a process of its own. Made by Ray Serve."""

    def __init__(
        self,
        models: Sequence[str],
        options: loading.LoadOptions,
        access: Access,
        max_requests: int,
        limit: tuple[float, int] | None,
        cache_nbytes: int,
        *replicas: Any,
    ) -> None:
        entries = named(models, catalogue.fetched)
        handles = {
            entry.name: (handle, hash_of(entry.path, options.kv_overrides))
            for entry, handle in zip(entries, replicas, strict=True)
        }
        self._front = Front(
            Server(Models(entries, options), access, max_requests),
            partial(_send, handles),
            GONE,
            None if limit is None else RateLimit(*limit),
            ResponseCache(cache_nbytes) if cache_nbytes else None,
        )

    def __serve_build_asgi_app__(self) -> Front:
        """What Ray Serve hands requests to."""
        return self._front


async def _send(
    handles: dict[str, tuple[Any, str]], model: str, call: RelayedCall, prefix: Sequence[int]
) -> AsyncGenerator[Part, None]:
    handle, expected = handles[model]
    response = handle.options(stream=True).answer.remote(call, prefix=prefix, expected=expected)
    is_over = False
    try:
        async for part in response:
            yield part
        is_over = True
    except GONE:
        is_over = True
        await asyncio.sleep(PAUSE_S)
        raise
    except BackPressureError:
        is_over = True
        said = f"The replicas of {model} have as many requests as they take. Come back."
        yield Failed.of(ServerError("overloaded", said))
    finally:
        if not is_over:
            with suppress(Exception):  # nobody waits for it any more
                response.cancel()


@dataclass(frozen=True, kw_only=True)
class Serving:
    """How models are served.

    access                  who is let in, as for a server on one machine; it must be said, as Serve may listen anywhere
    replicas                of each model, or (least, most) for as many as its requests need
    target_requests         under way in a replica, where there shall be another one; its whole contexts when None
    upscale_delay_s, downscale_delay_s   how long that must have been so
    drain_s                 that a replica has to end its answers before it is closed; what is left goes on elsewhere
    fronts                  processes that speak to clients; limits and caches are for each of them
    max_requests            under way in a front; one more is told to come back
    rate_limit              (requests a minute, at once) of one client
    response_cache_nbytes   of replies that would be the same again; 0 keeps none
    prefix_routing          send a request where its beginning has been read, else to the idler one of two
    resources               further ``ray_actor_options`` of a replica, such as {"num_gpus": 1}
    """

    access: Access
    replicas: int | tuple[int, int] = 1
    target_requests: float | None = None
    upscale_delay_s: float = 10.0
    downscale_delay_s: float = 300.0
    drain_s: float = 120.0
    fronts: int = 1
    max_requests: int = 1024
    rate_limit: tuple[float, int] | None = None
    response_cache_nbytes: int = 0
    prefix_routing: bool = True
    resources: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 < self.least <= self.most:
            raise ParameterError(f"replicas is {self.replicas!r}. It must be a number from 1 on, or (least, most).")

    @property
    def least(self) -> int:
        """Replicas of a model that are always there."""
        return self.replicas if isinstance(self.replicas, int) else self.replicas[0]

    @property
    def most(self) -> int:
        """And as many as there may be."""
        return self.replicas if isinstance(self.replicas, int) else self.replicas[1]

    def deployment(self, options: loading.LoadOptions, n_keys: int) -> dict[str, Any]:
        """What Ray Serve is told of a model's replicas."""
        told: dict[str, Any] = {
            "ray_actor_options": {"num_cpus": options.n_threads, **self.resources},
            "max_ongoing_requests": max(64, 4 * options.n_parallel),
            "max_queued_requests": self.max_requests,
            "graceful_shutdown_timeout_s": self.drain_s,
            "health_check_period_s": 5,
            "health_check_timeout_s": 60,
        }
        if self.prefix_routing:
            told["request_router_config"] = {
                "request_router_class": "edgellm.ray.prefix_router.PrefixRouter",
                "request_router_kwargs": {"n_keys": n_keys},
                "request_routing_stats_period_s": TOLD_S,
            }
        if self.least == self.most:
            return {**told, "num_replicas": self.least}
        told["autoscaling_config"] = {
            "min_replicas": self.least,
            "max_replicas": self.most,
            "target_ongoing_requests": self.target_requests or options.n_parallel,
            "upscale_delay_s": self.upscale_delay_s,
            "downscale_delay_s": self.downscale_delay_s,
            "look_back_period_s": max(LOOK_BACK_S, min(30.0, self.upscale_delay_s)),
        }
        return told


def app(*models: str, options: loading.LoadOptions | None = None, **serving: Any) -> Any:
    """The Ray Serve application that serves ``models``: names, references, or paths that every machine has.

    options   how each replica loads its model; ``n_threads`` are also the CPUs that Ray keeps for it
    serving   the fields of ``Serving``; ``access`` is one that must be given

    ParameterError for what cannot be meant.
    """
    if not models:
        raise ParameterError("There is no model to serve. Name one, such as 'smollm2'.")
    if "access" not in serving:
        raise ParameterError(
            "access is missing. It is Access() where Serve listens to this machine alone, Access(host, keys) elsewhere."
        )
    how = Serving(**serving)
    options = loading.LoadOptions(n_parallel=4) if options is None else options
    options = replace(options, n_threads=options.n_threads or 1)
    n_keys = options.n_parallel * (options.n_ctx or 1 << 15) // 32
    told = how.deployment(options, n_keys)
    deployment: Any = serve.deployment
    bound = [
        deployment(Replica, name=f"model-{number}", **told).bind(model, options, n_keys)
        for number, model in enumerate(models)
    ]
    gate = deployment(
        Gate,
        name="front",
        num_replicas=how.fronts,
        # the front itself says that it is full, and answers questions after its health beside the others
        max_ongoing_requests=how.max_requests + BESIDE,
        max_queued_requests=BESIDE,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=how.drain_s,
    )
    limits = (how.access, how.max_requests, how.rate_limit, how.response_cache_nbytes)
    return gate.bind(list(models), options, *limits, *bound)
