"""tools/benchmark_multinode.py: the pipeline's bubble, memory, what a simulation must not get wrong."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import pathlib
import sys

import numpy as np
import pytest

sys.path.append(str(pathlib.Path(__file__).resolve().parents[2] / "tools"))

from multinode_bench import generation, memory, predict, simulate, steps
from multinode_bench.constants import read_constants
from multinode_bench.network import Link
from multinode_bench.shape import Shape
from multinode_bench.workload import Lengths

from megatron_dump.actor.architecture import read_architecture
from megatron_dump.actor.layout import Layout

REPO = pathlib.Path(__file__).resolve().parents[2]
KK_TINY = REPO / "examples/models/kk-tiny"
H100 = REPO / "tools/multinode_bench/h100_sxm.json"
LENGTHS = Lengths(40.0, 30.0, 90.0)


# ---- the pipeline
def one_f_one_b(stages: int, micros: int) -> int:
    """Ticks of 1F1B, forward and backward one each, event by event: a stage runs what is ready in its order."""
    orders = []
    for stage in range(stages):
        warm_up = min(stages - stage - 1, micros)
        order = [("F", i) for i in range(warm_up)]
        for i in range(micros - warm_up):
            order += [("F", warm_up + i), ("B", i)]
        orders.append(order + [("B", i) for i in range(micros - warm_up, micros)])
    done: dict[tuple[int, str, int], int] = {}
    tick = 0
    while any(orders):
        ready = []
        for stage, order in enumerate(orders):
            if order:
                kind, micro = order[0]
                before = (stage - 1, "F", micro) if kind == "F" else (stage + 1, "B", micro)
                own = kind == "F" or (stage, "F", micro) in done
                if own and (not 0 <= before[0] < stages or done.get(before, tick + 1) <= tick):
                    ready.append((stage, kind, micro))
        tick += 1
        for key in ready:
            orders[key[0]].pop(0)
            done[key] = tick
    return tick


@pytest.mark.parametrize(("stages", "micros"), [(1, 4), (2, 1), (2, 4), (4, 4), (4, 16), (8, 3)])
def test_the_bubble_is_that_of_the_schedule(stages, micros):
    ideal = 2 * micros
    assert one_f_one_b(stages, micros) / ideal - 1 == pytest.approx(predict.pipeline_bubble(stages, micros))


def test_chunks_divide_the_bubble():
    assert predict.pipeline_bubble(4, 8, 2) == predict.pipeline_bubble(4, 8) / 2 == 3 / 16


# ---- steps
read_arguments = functools.cache(steps.read_arguments)  # a second each


def run_of(ranks: int, *overrides: str, machine=None, prompts: int = 16) -> predict.Run:
    own = [
        f"pretrained_checkpoint.restore_from_path={KK_TINY}",
        f"trainer.devices={ranks}",
        "model.tensor_model_parallel_size=1",
        "model.pipeline_model_parallel_size=1",
    ]
    config = read_arguments(("--config-name=kk_cpu", *own, *overrides))
    return simulate.make_run(config, ranks, prompts, LENGTHS, machine or read_constants(H100))


def test_one_rank_neither_talks_nor_waits():
    for cost in simulate.phases(run_of(1)).values():
        assert cost.communication == cost.bubble == 0


def test_splitting_the_work_divides_the_computation():
    """Data parallel ranks have equal shares of whole micro-batches; overheads and memory's speed aside."""
    free = dataclasses.replace(
        read_constants(H100), decode_layer_s=0.0, memory_bytes_per_s=float("inf"), host_bytes_per_s=float("inf")
    )
    one, four = (simulate.phases(run_of(n, machine=free)) for n in (1, 4))
    for phase in ("gen", "reward", "ref", "update_actor"):
        assert one[phase].compute / four[phase].compute == pytest.approx(4), phase
    assert four["update_actor"].communication > 0


def test_more_ranks_talk_more_and_a_faster_machine_is_faster():
    rows = [simulate.row(run_of(n)) for n in (1, 2, 4, 8, 16)]
    assert all(a["communication"] < b["communication"] for a, b in itertools.pairwise(rows))
    assert all(a["memory"]["optimizer"] > b["memory"]["optimizer"] for a, b in itertools.pairwise(rows))
    base = read_constants(H100)
    for name in ("train_flops", "forward_flops", "decode_flops", "memory_bytes_per_s", "host_bytes_per_s"):
        faster = dataclasses.replace(base, **{name: 2 * getattr(base, name)})
        assert simulate.row(run_of(4, machine=faster))["step_s"] <= simulate.row(run_of(4))["step_s"], name
    slower = dataclasses.replace(
        base, links={p: {k: Link(2 * x.alpha, 2 * x.beta) for k, x in of.items()} for p, of in base.links.items()}
    )
    ours, theirs = (simulate.phases(run_of(4, machine=machine)) for machine in (base, slower))
    for name, cost in ours.items():
        assert theirs[name].communication == pytest.approx(2 * cost.communication), name


def test_stages_wait_and_the_step_ends_no_earlier_than_its_slowest_part():
    run = run_of(2, "model.pipeline_model_parallel_size=2")
    cost = predict.passes(run, run.work.micros(1), backward=True)
    stage = cost.compute + cost.communication
    assert 0 < cost.bubble < stage / 8  # 8 micro-batches on two stages; the output layer is the last one's alone
    assert generation.generation(run, generation.SPLIT).communication > 0


def test_ranks_that_share_cores_compute_slower():
    crowded = dataclasses.replace(read_constants(H100), cores_per_node=2)
    one, four = (simulate.phases(run_of(4, machine=m))["update_actor"] for m in (read_constants(H100), crowded))
    assert four.compute == pytest.approx(2 * one.compute) and four.communication == one.communication


def test_more_replicas_than_rollouts_are_refused():
    with pytest.raises(ValueError, match="--gpus: 1024 ranks are 1024 replicas"):
        run_of(1024, prompts=16)


# ---- memory
def test_activations_are_the_papers():
    """Korthikanti et al., equation 2: sbh (10 + 24/t + 5as/(ht)), minus 2 sbh of dropout masks and the scores, for
    heads as wide as the hidden states and a feed-forward of 4h without gate."""
    tokens, hidden, tensor = 1000, 256, 4
    elements = memory._layer_elements(hidden, hidden, hidden, 2 * 4 * hidden, tensor, sequence=False)
    assert 2 * tokens * elements == tokens * hidden * (10 - 2 + 24 / tensor)
    elements = memory._layer_elements(hidden, hidden, hidden, 2 * 4 * hidden, tensor, sequence=True)
    assert 2 * tokens * elements == tokens * hidden * (34 - 2) / tensor  # equation 4


def test_parameters_are_those_of_the_checkpoint():
    from safetensors import safe_open

    with safe_open(KK_TINY / "model.safetensors", "np") as file:
        stored = sum(int(np.prod(file.get_slice(name).get_shape())) for name in list(file.keys()))
    arch = read_architecture(str(KK_TINY), 1, 1)
    assert Shape(arch, Layout()).whole_numel() == stored


def test_splits_hold_the_whole():
    arch = read_architecture(str(KK_TINY), 8, 2)
    whole, norms = Shape(arch, Layout()).whole_numel(), 128 * (2 * 4 + 1)
    halves = Shape(arch, Layout(tensor=2)).numel(0)
    assert 2 * halves - norms == whole
    stages = Shape(arch, Layout(pipeline=2))
    assert stages.numel(0) + stages.numel(1) == whole + 128 * arch.padded_vocab_size  # the tied embedding, twice


def test_recomputation_keeps_less():
    run = run_of(1)
    model = run.work.config.model
    kept = {}
    for granularity, number in ((None, None), ("full", 1)):
        options = dataclasses.replace(model, recompute_granularity=granularity, recompute_num_layers=number)
        kept[granularity] = memory.activations(run.shape, 1000, 0, 8, 4, options)
    layer = memory.layer_activations(run.shape, 1000, 4)
    assert kept[None] == 4 * layer
    assert kept["full"] == 4 * 1000 * 128 * 4 + layer  # the inputs of four layers, and one layer anew
