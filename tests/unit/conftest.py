"""Fixtures that several files share."""

import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from megatron_dump.engine_options import PoolOptions
from megatron_dump.rollout.pool import EnginePool
from tests.unit.pools import QUICK
from tests.unit.toy_engine import ToyHandle

# A busy machine is no failure: examples have no deadline.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


@pytest.fixture
def make_pool(tmp_path):
    """A pool of toy engines, and at the end a look that none of their processes is left."""
    pools, handles = [], []

    def pool_of(n, delay_s=0.0, reload=None, **options):
        mine = [ToyHandle(tmp_path / f"{len(pools)}.{i}", delay_s, i) for i in range(n)]
        handles.extend(mine)
        pools.append(EnginePool(mine, PoolOptions(**{**QUICK, **options}), expected_tokens=6, reload=reload))
        return pools[-1], mine

    yield pool_of
    for pool in pools:
        pool.close()
    assert not [pid for handle in handles for pid in handle.pids if Path(f"/proc/{pid}").exists()]
    assert not [t.name for t in threading.enumerate() if t.name.startswith("engine ")]
