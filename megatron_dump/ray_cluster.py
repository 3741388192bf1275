"""A run's connection to Ray: an existing cluster or one of its own, what it reserves there, and a clean end."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from megatron_dump.engine_options import RayOptions

_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


class Cluster:
    """One rank of a run connects; there is one connection a process.

    Actors and placement groups belong to this process's job: Ray removes them when it ends, however it ends. A cluster
    of the run's own ends with it too. A cluster is trusted: what its actors answer is unpickled.
    """

    def __init__(self, options: RayOptions) -> None:
        """RuntimeError when there is no Ray, or no cluster at the address."""
        ray = import_ray()
        if ray.is_initialized():
            raise RuntimeError("Ray is connected already: share that Cluster")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        address = options.address or os.environ.get("RAY_ADDRESS")
        own: dict[str, Any] = {
            "address": "local",
            "num_cpus": options.num_cpus,
            "object_store_memory": options.object_store_memory_mb << 20,
            "include_dashboard": False,
        }
        if options.temp_dir:
            own["_temp_dir"] = options.temp_dir
        _check_address(address)
        try:
            ray.init(**({"address": address} if address else own), log_to_driver=False)
        except Exception as error:  # Ray raises that, too, when a node does not start
            where = f"ray.address={address}" if address else "ray.address: starting a local cluster"
            raise RuntimeError(f"{where}: {one_line(error)}") from error
        self.options = options
        self._placements: list[Any] = []

    def reserve(self, bundles: Sequence[Mapping[str, float]], strategy: str, what: str) -> Any:
        """A placement group, ready. RuntimeError when the cluster has not enough, or not within start_timeout_s.

        bundles: resources, each on one node.
        """
        import ray
        from ray.util.placement_group import placement_group

        group = placement_group([dict(bundle) for bundle in bundles], strategy=strategy)
        self._placements.append(group)
        end = time.monotonic() + self.options.start_timeout_s
        ready = group.ready()
        while not ray.wait([ready], timeout=1.0)[0]:
            total = ray.cluster_resources()
            needed = {key: sum(bundle.get(key, 0) for bundle in bundles) for bundle in bundles for key in bundle}
            short = [f"{key} {n:g} of {total.get(key, 0):g}" for key, n in needed.items() if n > total.get(key, 0)]
            if short or time.monotonic() > end:
                self.release(group)
                raise RuntimeError(
                    f"{what}: Ray cannot reserve {len(bundles)} × {dict(bundles[0])} ({strategy}); "
                    + (
                        f"too much for the cluster: {', '.join(short)}"
                        if short
                        else f"others use the cluster, or a bundle fits no node; free: {_free(needed)}"
                    )
                )
        return group

    def release(self, group: Any) -> None:
        """Give a reservation back; Ray ends what still runs in it."""
        import ray
        from ray.util.placement_group import remove_placement_group

        if group in self._placements and ray.is_initialized():
            remove_placement_group(group)
            self._placements.remove(group)

    def close(self) -> None:
        """Remove what was reserved, with the actors in it, and disconnect."""
        import ray

        for group in self._placements.copy():
            self.release(group)
        ray.shutdown()
        self._placements.clear()

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _free(resources: Iterable[str]) -> str:
    import ray

    available = ray.available_resources()
    return ", ".join(f"{key} {available.get(key, 0):g}" for key in resources)


def _check_address(address: str | None) -> None:
    """Ray itself knocks for minutes."""
    host, _, port = (address or "").rpartition(":")
    if host and port.isdecimal():
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        except OSError as error:
            raise RuntimeError(f"ray.address={address}: nothing answers there: {error}") from None


def import_ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise RuntimeError(f"Ray is needed: {error}; install the extra `ray`") from None
    return ray


def actor_options(group: Any, bundle: int, resources: Mapping[str, float], env: Mapping[str, str]) -> dict[str, Any]:
    """Of an actor in that bundle: it finds our packages where this process does, if they are there on its node."""
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    return {
        "num_cpus": resources.get("CPU", 0),
        "num_gpus": resources.get("GPU", 0),
        "scheduling_strategy": PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle),
        "runtime_env": {"env_vars": {"PYTHONPATH": path, **env}},
    }


def forget_launcher() -> None:
    """In an actor of a cluster that a rank started: it is no rank itself."""
    for name in [*os.environ]:
        if name in _LAUNCHER or name.startswith("TORCHELASTIC_"):
            del os.environ[name]


def one_line(error: BaseException) -> str:
    """What Ray says happened, without its advice, which goes on for pages."""
    words = " ".join(str(error).split()).partition(" Some common causes")[0]
    return words if len(words) <= 600 else f"{words[:200]} … {words[-400:]}"
