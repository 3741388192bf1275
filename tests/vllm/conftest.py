"""A Ray cluster for the tests that want one."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(scope="session")
def machines():
    """A Ray cluster of two nodes."""
    from ray.cluster_utils import Cluster as Machines

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ |= {"RAY_prestart_worker_first_driver": "0"}  # 16 processes that nobody wants
    node = {"num_cpus": 8, "object_store_memory": 100 << 20, "include_dashboard": False}
    machines = Machines()
    _add_node(machines, **node)
    _add_node(machines, num_cpus=8, object_store_memory=100 << 20)
    yield machines
    machines.shutdown()


@pytest.fixture(scope="session")
def cluster(machines):
    from megatron_dump.engine_options import RayOptions
    from megatron_dump.ray_cluster import Cluster

    options = RayOptions(address=machines.address, strategy="STRICT_SPREAD", start_timeout_s=120.0)
    with Cluster(options) as cluster:
        yield cluster


def _add_node(machines, **node):
    """Ray waits half a minute for a node, which is short on a machine that does other things too."""
    for attempt in range(3):
        try:
            return machines.add_node(**node)
        except Exception:  # what Ray raises
            if attempt == 2:
                raise
