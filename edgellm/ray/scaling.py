"""How many replicas a model needs: by the requests that it has, and by the keys and values that these take.

Ray Serve asks this policy in its controller, which has no need of edgellm: it gets the class itself.
"""

from __future__ import annotations

from typing import Any

KV = "kv_wanted"
"""What replicas report: the share of their cache that requests hold and will hold of their texts."""


class QueueAndCache:
    """The larger of two numbers of replicas; Ray Serve keeps it within its bounds, and waits before it follows it.

    target_kv   share of a replica's cache that shall be in use at most
    """

    def __init__(self, target_kv: float) -> None:
        self.target_kv = target_kv

    def __call__(self, context: Any) -> tuple[float, dict[str, Any]]:
        """See ``ray.serve.config.AutoscalingContext``."""
        if not context.current_num_replicas:
            return context.target_num_replicas, {}
        by_requests = context.total_num_requests / context.config.get_target_ongoing_requests()
        by_cache = sum((context.aggregated_metrics or {}).get(KV, {}).values()) / self.target_kv
        return max(by_requests, by_cache), {}
