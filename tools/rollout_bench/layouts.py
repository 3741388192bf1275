"""Generation on the trained split beside copies that are less split: what `reshard: auto` goes by.

torchrun --nproc-per-node=N tools/rollout_bench/layouts.py MODEL WORK LAYOUT REPEATS    # JSON; a line of JSON
"""

from __future__ import annotations

import json
import logging
import pathlib
import statistics
import subprocess
import sys
import time
import warnings
from typing import Any

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {  # ranks, keys of `model:`
    "TP2": (2, {"tensor_model_parallel_size": 2}),
    "PP2": (2, {"pipeline_model_parallel_size": 2}),
    "TP2xPP2": (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
    "EP2": (2, {"expert_model_parallel_size": 2}),
}


def run(layout: str, model: pathlib.Path, work: dict[str, int], repeats: int) -> dict[str, float]:
    """Seconds of a generation, gathering included, by what generates; medians."""
    world, keys = LAYOUTS[layout]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={world}",
            __file__,
            str(model),
            json.dumps(work),
            json.dumps(keys),
            str(repeats),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{layout}: {done.stderr[-2000:]}")
    return json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1])


def _main() -> None:
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
    import torch
    import torch.distributed as dist

    from megatron_dump.rollout import reshard
    from megatron_dump.rollout.megatron import MegatronGenerator
    from rollout_bench import problem

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    model, work, keys, repeats = (sys.argv[1], *map(json.loads, sys.argv[2:]))
    actor, work = problem.make_actor(pathlib.Path(model), **keys), problem.Work(**work)
    copies = [reshard.SPLIT, reshard.WHOLE]
    if {"tensor_model_parallel_size", "pipeline_model_parallel_size"} <= keys.keys():
        copies.append(reshard.PIPELINE)
    sides = {
        copy: reshard.policy_generator(
            actor,
            reshard.Choice(copy, ""),
            "32",
            lambda policy: MegatronGenerator(policy, work.options, 0, 512, lambda ids: ""),
        )
        for copy in copies
    }
    place = actor.parallel
    requests = work.requests()[place.data_rank :: place.data_size]
    seconds: dict[str, list[float]] = {copy: [] for copy in copies}
    for _ in range(repeats + 1):  # one to warm up
        actor.version += 1  # as if trained: copies are gathered anew
        for copy, generator in sides.items():
            dist.barrier()
            start = time.perf_counter()
            generator.generate(0, requests)
            dist.barrier()
            seconds[copy].append(time.perf_counter() - start)
    if place.rank == 0:
        print(json.dumps({copy: statistics.median(values[1:]) for copy, values in seconds.items()}), flush=True)


if __name__ == "__main__":
    _main()
