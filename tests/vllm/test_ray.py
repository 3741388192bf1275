"""Real Ray, two nodes on this machine: engines in actors, and what becomes of a batch when some are lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_dump.engine_options import PoolOptions
from megatron_dump.rollout.engine import EngineDied, EngineRefused
from megatron_dump.rollout.pool import EnginePool
from megatron_dump.rollout.ray_pool import ray_engines
from megatron_dump.weight_sync import WeightSync, WeightSyncOptions
from tests.transformers_engine import TransformersEngine
from tests.vllm.models import STOPS, Weights, requests, worst_difference, write_model
from tests.vllm.waiting import wait_for

pytestmark = pytest.mark.vllm

REPO = Path(__file__).resolve().parents[2]
ENGINE, LIGHT = "tests.transformers_engine:TransformersEngine", "tests.vllm.light_engine:LightEngine"
QUICK = {"call_timeout_s": 60.0, "start_timeout_s": 120.0, "health_interval_s": 0.2, "min_chunk_tokens": 1}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    return str(folder), write_model(folder)


@pytest.fixture(scope="module")
def options(model):
    return {"path": model[0], "max_length": 12, "stop_ids": list(STOPS)}


def plain(answers):
    return [[(o.token_ids.tolist(), o.finished) for o in group] for group in answers]


def test_engines_on_two_nodes_lose_nothing_and_get_weights(cluster, model, options):
    _, trained = model
    local = TransformersEngine(**options)
    asked = requests(n_prompts=12, length=20)
    engines = ray_engines(cluster, 2, ENGINE, options)
    first, second = engines
    assert first.place["node"] != second.place["node"]
    pool = EnginePool(engines, PoolOptions(**QUICK), expected_tokens=12)
    sync = WeightSync(
        Weights(trained),
        pool.engines,
        WeightSyncOptions(transport="broadcast"),
        hosts=[engine.place["host"] for engine in engines],
    )
    try:
        assert plain(pool.generate(asked).result(60)) == plain(local.generate(asked))
        sync.push(1)
        dead, future = first.place["pid"], pool.generate(asked * 4)
        time.sleep(0.02)
        os.kill(dead, signal.SIGKILL)
        assert plain(future.result(60)) == plain(local.generate(asked)) * 4
        wait_for(lambda: first.place["pid"] != dead)
        wait_for(first.alive)
        assert not pool.engines[0].alive()  # up, but without weights
        assert plain(pool.generate(asked).result(60)) == plain(local.generate(asked))
        trained.lm_head.weight.data.mul_(1.5)
        trained.model.layers[1].mlp.up_proj.weight.data.neg_()
        sync.push(2)
        answers = pool.generate(asked).result(60)
        assert {o.policy_version for group in answers for o in group} == {2}
        assert worst_difference(trained, asked, answers) < 1e-4
        assert pool.restarts == {"engine 0": 1, "engine 1": 0}
    finally:
        sync.close()
        pool.close()
    with pytest.raises(EngineDied, match="it is closed"):
        first.generate(asked).result(5)


def test_an_engine_that_cannot_be_built(cluster):
    with pytest.raises(EngineDied, match=r"the engine failed: TypeError: .*unexpected keyword argument 'colour'"):
        ray_engines(cluster, 1, LIGHT, {"colour": "red"})
    with pytest.raises(EngineRefused, match="max_model_len=1: no"):
        ray_engines(cluster, 1, "tests.vllm.light_engine:Refusing", {})


def test_a_stopped_engine_is_killed_and_replaced(cluster):
    asked = requests(n_prompts=12, length=20)
    engines = ray_engines(cluster, 2, LIGHT, {})
    with EnginePool(engines, PoolOptions(**{**QUICK, "call_timeout_s": 3.0}), expected_tokens=12) as pool:
        expected = plain(pool.generate(asked).result(60))
        stopped = engines[1].place["pid"]
        os.kill(stopped, signal.SIGSTOP)
        assert plain(pool.generate(asked).result(60)) == expected
        wait_for(lambda: engines[1].place["pid"] != stopped and pool.engines[1].alive())
        wait_for(lambda: not psutil.pid_exists(stopped), 30)
        assert plain(pool.generate(asked).result(60)) == expected
        assert pool.restarts == {"engine 0": 0, "engine 1": 1}


def test_more_than_the_cluster_has(cluster):
    with pytest.raises(RuntimeError, match=r"2 engines: Ray cannot .* too much for the cluster: GPU 2 of 0"):
        cluster.reserve([{"GPU": 1.0}] * 2, "SPREAD", "2 engines")


def test_no_cluster_at_the_address():
    code = "from megatron_dump.ray_cluster import *; Cluster(RayOptions(address='127.0.0.1:1'))"
    ran = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, timeout=60)
    assert "RuntimeError: ray.address=127.0.0.1:1: nothing answers there: " in ran.stderr.splitlines()[-1], ran.stderr


def test_vllm_in_an_actor(cluster, tmp_path):
    from megatron_dump.rollout.vllm_options import engine_environment

    model = write_model(tmp_path, 3)
    sampling = {"max_length": 12, "stop_ids": STOPS}
    options = {"model": str(tmp_path), "sampling": sampling, "llm": {"dtype": "float32", "max_num_seqs": 32}}
    factory = "megatron_dump.rollout.vllm_engine:VllmEngine"
    engines = ray_engines(cluster, 1, factory, options, engine_environment(on_cpu=True))
    with EnginePool(engines, PoolOptions(**QUICK), expected_tokens=12) as pool:
        sync = WeightSync(Weights(model), pool.engines, hosts=[engines[0].place["host"]])
        sync.push(4)
        asked = requests(n_prompts=4, length=20)
        answers = pool.generate(asked).result(60)
        assert worst_difference(model, asked, answers) < 1e-4
        assert {o.policy_version for group in answers for o in group} == {4}
        sync.close()


def test_a_lost_node_is_made_up_for_by_another(machines, cluster):
    import ray

    asked = requests(n_prompts=6, length=20)
    engines = ray_engines(cluster, 2, LIGHT, {})
    with EnginePool(engines, PoolOptions(**QUICK), expected_tokens=12) as pool:
        expected = plain(pool.generate(asked).result(60))
        lost = machines.worker_nodes.copy().pop()
        node = {n["NodeID"] for n in ray.nodes() if n["NodeManagerPort"] == lost.node_manager_port}
        (away,) = [engine for engine in engines if engine.place["node"] in node]
        machines.remove_node(lost)
        assert plain(pool.generate(asked).result(60)) == expected
        machines.add_node(num_cpus=8, object_store_memory=100 << 20)
        wait_for(lambda: all(engine.alive() for engine in pool.engines) and away.place["node"] not in node, 100)
        assert plain(pool.generate(asked).result(60)) == expected
        assert max(pool.restarts.values()) == 1
