"""Whole processes that use Ray: training ranks of which one drives the engines, and a cluster of a run's own."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.vllm.models import write_model
from tests.vllm.waiting import wait_for

pytestmark = pytest.mark.vllm

REPO = Path(__file__).resolve().parents[2]

RANKS = """
import os, signal, sys
import torch, torch.distributed as dist
from transformers import Qwen2ForCausalLM
from megatron_dump.distributed import Replica
from megatron_dump.engine_options import RayOptions
from megatron_dump.ray_cluster import Cluster
from megatron_dump.rollout import Request
from megatron_dump.rollout.engine import EngineRequest
from megatron_dump.rollout.pool import EnginePool
from megatron_dump.rollout.ray_pool import ray_engines
from megatron_dump.rollout.sampling import request_seed
from megatron_dump.rollout.shared import SharedGenerator
from megatron_dump.rollout.engine_generator import EngineGenerator
from megatron_dump.types import Prompt
from megatron_dump.weight_sync import WeightSync, WeightSyncOptions
from tests.transformers_engine import TransformersEngine
from tests.vllm.models import STOPS, Weights, requests

address, path = sys.argv[1:]
dist.init_process_group("gloo")
rank, cpu = dist.get_rank(), torch.device("cpu")
options = {"path": path, "max_length": 12, "stop_ids": list(STOPS)}
cluster = Cluster(RayOptions(address=address)) if rank == 0 else None
engines = ray_engines(cluster, 2, "tests.transformers_engine:TransformersEngine", options) if cluster else []
pool = EnginePool(engines, expected_tokens=12) if cluster else None
sync = WeightSync(
    Weights(Qwen2ForCausalLM.from_pretrained(path)), pool.engines if pool else [],
    WeightSyncOptions(transport="broadcast"), hosts=[engine.place["host"] for engine in engines], replica=rank,
)
everyone = Replica(0, 1, None, cpu, dist.group.WORLD)
inner = EngineGenerator(pool, everyone, 7, None, lambda: sync.push(1))
generator = SharedGenerator(inner, Replica(rank, 2, None, cpu), lambda completion: completion)
sync.push(1)
prompts = [Prompt(g, "s", r.prompt, "") for g, r in enumerate(requests(n_prompts=5, length=20))]
mine = [Request(g, prompts[g], 3) for g in range(rank, 5, 2)]
asked = [EngineRequest(r.prompt.token_ids, tuple(request_seed(7, 3, r.group_id, s) for s in r.samples)) for r in mine]
expected = [o.token_ids.tolist() for group in TransformersEngine(**options).generate(asked) for o in group]
for kill in (False, True, False):
    pending = generator.submit(3, mine)
    for engine in engines if kill else ():
        os.kill(engine.place["pid"], signal.SIGKILL)
    got = pending.result()
    assert [c.token_ids.tolist() for c in got] == expected
    assert [(c.group_id, c.sample) for c in got] == [(r.group_id, s) for r in mine for s in r.samples]
assert pool is None or pool.restarts == {"engine 0": 1, "engine 1": 1}
sync.close()
if cluster:
    pool.close()
    cluster.close()
assert rank == 0 or "ray" not in sys.modules
print("rank", rank, "agrees")
"""


def test_replicas_share_engines_that_rank_0_drives(machines, tmp_path):
    write_model(tmp_path)
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", str(script)]
    command += [machines.address, str(tmp_path)]
    env = {**os.environ, "PYTHONPATH": str(REPO)}
    ran = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)
    assert ran.returncode == 0, ran.stderr
    assert sorted(line for line in ran.stdout.splitlines() if "agrees" in line) == ["rank 0 agrees", "rank 1 agrees"]


LOCAL = """
import sys, time
from megatron_dump.engine_options import RayOptions
from megatron_dump.ray_cluster import Cluster
from megatron_dump.rollout.ray_pool import ray_engines
with Cluster(RayOptions(num_cpus=1, temp_dir=sys.argv[1])) as cluster:
    print("up", ray_engines(cluster, 1, "tests.vllm.light_engine:LightEngine", {})[0].place["pid"], flush=True)
    if sys.argv[2] == "wait":
        time.sleep(600)
"""


@pytest.mark.parametrize("how", ["leave", "wait"])
def test_nothing_is_left_of_a_cluster_of_ones_own(tmp_path_factory, how):
    folder = Path("/tmp") / f"r{os.getpid()}{how[0]}"  # Ray's sockets have long names already
    driver = subprocess.Popen(
        [sys.executable, "-c", LOCAL, str(folder), how],
        cwd=REPO,
        stdout=subprocess.PIPE,
        env={k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"},
        text=True,
    )
    assert driver.stdout is not None
    line = ""
    while not line.startswith("up"):
        line = driver.stdout.readline()
        assert line or driver.poll() is None
    engine = int(line.split()[1])
    assert how == "leave" or psutil.pid_exists(engine)
    if how == "wait":
        driver.kill()
    assert driver.wait(60) == (0 if how == "leave" else -signal.SIGKILL)

    def left():
        return [p for p in psutil.process_iter(["cmdline"]) if str(folder) in " ".join(p.info["cmdline"] or [])]

    wait_for(lambda: not psutil.pid_exists(engine) and not left(), 30)
    shutil.rmtree(folder)
