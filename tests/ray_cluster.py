"""A Ray cluster of two nodes in this machine, for the tests of one process; small, and gone at its end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("ray.serve", reason="Ray is an extra: pip install edgellm[ray]")

import edgellm.ray  # before Ray: it says that nothing is told to its makers

STORE_NBYTES = 80 << 20  # the least that Ray takes is 75 MiB


@pytest.fixture(scope="session")
def cluster() -> Iterator[Any]:
    """The cluster, this process connected to it."""
    assert edgellm.ray.app is not None
    import ray
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 2, "object_store_memory": STORE_NBYTES}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    try:
        cluster.add_node(**node)
        ray.init(address=cluster.address, log_to_driver=False)
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()
