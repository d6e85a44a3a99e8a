"""Which replica gets a request: one that has read the longest beginning of it, unless it has much more to do.

Ray Serve asks this router in the process of each front. It remembers what it sent where, and learns from the replicas
what others sent them. A prefix that nobody has read goes to the idler one of two, chosen by chance. While an update
replaces a front and its replicas, a request goes to a replica that may answer it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from edgellm.ray.same_file import Made
from edgellm.server.prefix_keys import PrefixMemory

SLACK = 4  # requests that a replica may have more than the idlest, and is still asked for the prefix that it has
N_KEYS = 1 << 16


class PrefixRouter(RequestRouter):
    """The router of a model's replicas; a request's keys are its argument ``prefix``, and ``front`` is who sends it."""

    def initialize_state(self, **settings: int) -> None:
        """``n_keys`` is about what the cache of a replica holds, in blocks of a prefix; ``slack`` as SLACK.

        With ``by_prefix`` 0 it looks at no prefix.
        """
        self.n_keys, self.slack = settings.get("n_keys", N_KEYS), settings.get("slack", SLACK)
        self.by_prefix = bool(settings.get("by_prefix", True))
        self._read: dict[ReplicaID, PrefixMemory] = {}
        self._told: dict[ReplicaID, Any] = {}

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Forget those that are gone."""
        super().update_replicas(replicas)
        alive = {replica.replica_id for replica in replicas}
        self._read = {name: memory for name, memory in self._read.items() if name in alive}
        self._told = {name: told for name, told in self._told.items() if name in alive}

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """First those with the longest prefix, where they are not too busy; then two of all, chosen by chance."""
        if pending_request is not None:  # when they all are full, it waits before it asks again
            pending_request.routing_context.should_backoff = True
            candidate_replicas = _fitting(candidate_replicas, pending_request)
        some = random.sample(candidate_replicas, min(2, len(candidate_replicas)))
        keys = _keys(pending_request)
        if not keys or not self.by_prefix or len(candidate_replicas) < 2:
            return [some]
        known = {one.replica_id: self._memory(one).n_known(keys) for one in candidate_replicas}
        most = max(known.values())
        loads = {one.replica_id: self._replica_queue_len_cache.get(one.replica_id) or 0 for one in candidate_replicas}
        least = min(loads.values())
        having = [
            one
            for one in candidate_replicas
            if known[one.replica_id] == most and loads[one.replica_id] <= least + self.slack
        ]
        return [having, some] if most and having else [some]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """It will have read it: the next one with this prefix, which may come at once, goes there too."""
        self._read.setdefault(replica_id, PrefixMemory(self.n_keys)).note(_keys(pending_request))

    def _memory(self, replica: RunningReplica) -> PrefixMemory:
        memory = self._read.setdefault(replica.replica_id, PrefixMemory(self.n_keys))
        told = replica.routing_stats.get("prefixes") or ()
        if told is not self._told.get(replica.replica_id):
            self._told[replica.replica_id] = told
            memory.note(told[::-1])  # the one that was read last is noted last
        return memory


def _fitting(replicas: list[RunningReplica], request: PendingRequest) -> list[RunningReplica]:
    """Those that may answer, the old ones too while an update goes on; else all, who say why they do not."""
    front = request.kwargs.get("front")
    if front is None:
        return replicas
    told = ((one, one.replica_metadata) for one in replicas)
    made = [(one, Made(its.get("version", ""), its.get("files", ""))) for one, its in told]
    begun = request.args[0].begun
    return [one for one, its in made if its.answers(front, begun)] or replicas


def _keys(request: PendingRequest | None) -> Sequence[int]:
    return () if request is None else request.kwargs.get("prefix") or ()
