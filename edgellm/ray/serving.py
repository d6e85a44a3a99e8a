"""The Ray Serve application: a front that speaks every protocol of the server, and replicas of each model behind it."""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import ray.exceptions
from ray import serve
from ray.serve.config import AutoscalingPolicy
from ray.serve.exceptions import BackPressureError
from ray.util import metrics

from edgellm import loading
from edgellm.formats.errors import FormatError, ParameterError
from edgellm.machine.terminal import echo
from edgellm.ray.same_file import Made, check_same, files_hash, on_cpu, proved
from edgellm.ray.scaling import KV, QueueAndCache
from edgellm.server.errors import ServerError
from edgellm.server.front import Front
from edgellm.server.metrics import cache_wanted
from edgellm.server.models import Models, named
from edgellm.server.prefix_keys import PrefixMemory
from edgellm.server.protocols.llama_state import metric_rows
from edgellm.server.rate_limit import RateLimit
from edgellm.server.relay import Ended, Failed, Part, RelayedCall, Whole, parts
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
LOOK_S = 0.5  # between one look whether a replica that is to end has answers under way, and the next
FRONT_DRAIN_S = 3600.0  # for a front's answers to end, which have nowhere else to go on


class Replica:
    """One model in one process, asked by fronts. Made by Ray Serve, which waits until the model is loaded."""

    async def __init__(self, model: str, options: loading.LoadOptions, n_keys: int, version: str) -> None:  # type: ignore[misc]
        entries = await asyncio.to_thread(named, [model], catalogue.fetched)
        self.server = Server(Models(entries, options), max_requests=1 << 30)  # requests are limited by Ray
        self._routes = {(row.route.method, row.route.path): row.route for row in all_routes()}
        self._read = PrefixMemory(n_keys)
        async with self.server.models.lease(None, kinds=()) as entry:
            self._path = entry.path
            self._made = Made(version, await asyncio.to_thread(files_hash, entry.leased.gguf, options))
        self._gauges: dict[str, Any] = {}
        self._tending = [asyncio.create_task(self.server.tend()), asyncio.create_task(self._tell())]

    async def answer(
        self, call: RelayedCall, prefix: Sequence[int] = (), front: Made | None = None
    ) -> AsyncGenerator[Part, None]:
        """The parts of the reply to a call of a front."""
        if front is not None and not self._made.answers(front, call.begun):
            yield Failed.of(self._refused(front))
            return
        self._read.note(prefix)
        async with aclosing(parts(self.server, self._routes[call.method, call.path], call)) as source:
            async for part in source:
                # one of another version answers while an update goes on: a front keeps no reply of it for later
                old = front is not None and front.version != self._made.version
                yield part._replace(draws=True) if old and isinstance(part, Whole | Ended) else part

    def _refused(self, front: Made) -> ServerError:
        if self._made.version != front.version:
            return ServerError("overloaded", "The model was replaced in the midst of this answer. Send it again.")
        try:
            check_same(self._path, self._made.files, front.files, "the front")
        except FormatError as error:
            echo(f"edgellm: {error}", err=True)  # where the file is, is nothing for clients
        return ServerError("server_error", "A server has other files of the model than the front; its log says where.")

    async def record_replica_metadata(self) -> dict[str, Any]:
        """What routers know of a replica from its first request on."""
        return self._made._asdict()

    async def check_health(self) -> None:
        """Ray Serve's question, again and again: a replica whose engine hangs is replaced."""
        if stuck := self.server.watchdog.stuck():
            raise RuntimeError(f"the engine of {', '.join(stuck)} hangs")

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What the number of replicas follows, beside the requests that Ray Serve counts by itself."""
        loaded = self.server.models.loaded()
        return {KV: sum(cache_wanted(entry.llm.engine) for entry in loaded if entry.llm is not None)}

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
        version: str,
        *replicas: Any,
    ) -> None:
        entries = named(models, catalogue.fetched)
        handles = {
            entry.name: (handle, Made(version, proved(entry.path, options)))
            for entry, handle in zip(entries, replicas, strict=True)
        }
        self._front = Front(
            Server(Models(entries, on_cpu(options)), access, max_requests),
            partial(_send, handles),
            GONE,
            None if limit is None else RateLimit(*limit),
            ResponseCache(cache_nbytes) if cache_nbytes else None,
        )

    def __serve_build_asgi_app__(self) -> Front:
        """What Ray Serve hands requests to."""
        return self._front


async def _send(
    handles: dict[str, tuple[Any, Made]], model: str, call: RelayedCall, prefix: Sequence[int]
) -> AsyncGenerator[Part, None]:
    handle, front = handles[model]
    response = handle.options(stream=True).answer.remote(call, prefix=prefix, front=front)
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
    target_kv               share of a replica's keys and values in use or waited for, where there shall be another one
    upscale_delay_s, downscale_delay_s   how long that must have been so
    drain_s                 that a replica has to end its answers before it is closed; what is left goes on elsewhere
    surge_percent           of the replicas that an update starts beside the old ones, on CPUs that must be free; with 0
                            an old one ends first, and where it is the only one, requests wait for the new one
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
    target_kv: float = 0.8
    upscale_delay_s: float = 10.0
    downscale_delay_s: float = 300.0
    drain_s: float = 120.0
    surge_percent: int = 0
    fronts: int = 1
    max_requests: int = 1024
    rate_limit: tuple[float, int] | None = None
    response_cache_nbytes: int = 0
    prefix_routing: bool = True
    resources: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 < self.least <= self.most:
            raise ParameterError(f"replicas is {self.replicas!r}. It must be a number from 1 on, or (least, most).")
        if not 0 < self.target_kv <= 1:
            raise ParameterError(f"target_kv is {self.target_kv!r}. It must be a share, above 0 and up to 1.")

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
            "graceful_shutdown_wait_loop_s": LOOK_S,
            "max_surge_percent": self.surge_percent,
            "health_check_period_s": 5,
            "health_check_timeout_s": 60,
        }
        told["request_router_config"] = {
            "request_router_class": "edgellm.ray.prefix_router.PrefixRouter",
            "request_router_kwargs": {"n_keys": n_keys, "by_prefix": self.prefix_routing},
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
            "policy": AutoscalingPolicy(policy_function=QueueAndCache, policy_kwargs={"target_kv": self.target_kv}),
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
    told, version = how.deployment(options, n_keys), secrets.token_hex(8)
    deployment: Any = serve.deployment
    bound = [
        deployment(Replica, name=name, **told).bind(model, options, n_keys, version)
        for name, model in zip(_deployments(models), models, strict=True)
    ]
    gate = deployment(
        Gate,
        name="front",
        num_replicas=how.fronts,
        # the front itself says that it is full, and answers questions after its health beside the others
        max_ongoing_requests=how.max_requests + BESIDE,
        max_queued_requests=BESIDE,
        ray_actor_options={"num_cpus": 0},
        max_surge_percent=100,  # it takes no CPU: a new one is there before an old one goes
        graceful_shutdown_timeout_s=FRONT_DRAIN_S,
        graceful_shutdown_wait_loop_s=LOOK_S,
    )
    limits = (how.access, how.max_requests, how.rate_limit, how.response_cache_nbytes)
    return gate.bind(list(models), options, *limits, version, *bound)


def _deployments(models: Sequence[str]) -> list[str]:
    """What the replicas of each are called: while an update goes on, a name must not mean another model."""
    names: list[str] = []
    for model in models:
        name = re.sub(r"[^A-Za-z0-9.-]+", "-", re.split(r"[/\\\\]", model)[-1].removesuffix(".gguf"))
        same = sum(one == name or one.startswith(f"{name}.") for one in names)
        names.append(f"{name}.{same}" if same else name)
    return [f"model-{name}" for name in names]
