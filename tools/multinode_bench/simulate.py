"""A GRPO step on N ranks: its phases, throughput and memory; and on how many more, up to as many as asked for."""

from __future__ import annotations

import dataclasses
from typing import Any

from megatron_dump.actor.architecture import read_architecture
from megatron_dump.actor.layout import check_layout, check_model, layout_of
from megatron_dump.config import Config
from multinode_bench import generation, memory, predict
from multinode_bench.constants import Constants
from multinode_bench.predict import Cost, Run
from multinode_bench.shape import Shape
from multinode_bench.workload import Lengths, Workload


def make_run(config: Config, world_size: int, prompts: int, lengths: Lengths, machine: Constants) -> Run:
    """ValueError, one line, for a layout that does not fit the model or the ranks."""
    model = config.model
    layout = layout_of(model)
    check_layout(layout, world_size)
    path = config.pretrained_checkpoint.restore_from_path
    arch = read_architecture(path, model.make_vocab_size_divisible_by, layout.tensor)
    check_model(arch, layout)
    work = Workload(prompts, config.trainer.grpo.samples_per_prompt, lengths, config)
    replicas = world_size // layout.replica_size
    if work.rollouts < replicas * work.updates:
        raise ValueError(
            f"--gpus: {world_size} ranks are {replicas} replicas, and an update has {work.rollouts // work.updates} "
            "rollouts: fewer ranks, more prompts (trainer.grpo.num_prompts_per_grpo_step), or weak scaling"
        )
    return Run(Shape(arch, layout), world_size, work, machine)


def phases(run: Run) -> dict[str, Cost]:
    """By the names of timing_s/…; a phase that the configuration has no use for costs nothing."""
    grpo, updates = run.work.config.trainer.grpo, run.work.updates
    # A rank of each replica scores the replica's completions.
    reward = run.crowding * run.machine.reward_s * run.work.rollouts / run.replicas
    return {
        "gen": generation.generation(run, generation.choose(run)),
        "reward": Cost(reward),
        "old_log_prob": predict.logprobs(run) if updates > 1 or grpo.kl_in_reward else Cost(),
        "ref": predict.reference(run) if grpo.initial_policy_kl_penalty > 0 else Cost(),
        "update_actor": predict.update(run).times(updates),
        "other": Cost(run.crowding * run.machine.other_s),
    }


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of a rank's device, of the rank that holds most, while it trains and while it generates."""

    parameters: int
    gradients: int
    optimizer: int
    activations: float
    generation: float

    @property
    def peak(self) -> float:
        return self.parameters + self.gradients + self.optimizer + max(self.activations, self.generation)


def rank_memory(run: Run) -> Memory:
    """The first or the last stage's, whichever holds more; states that rest on the host while generating count."""
    model, layout, work = run.work.config.model, run.layout, run.work
    sharing = run.replicas * layout.context
    found = [
        memory.held(
            run.shape,
            stage,
            0,
            sharing,
            work.element,
            model.use_distributed_optimizer,
            model.overlap_grad_reduce,
            reference=False,
        )
        for stage in {0, layout.pipeline - 1}
    ]
    most = max(found, key=lambda own: own.device)
    micros = work.micros(run.replicas)
    kept = memory.activations(run.shape, micros.tokens, micros.sampled, micros.count, work.element, model)
    cache = generation.cache_bytes(run, generation.choose(run))
    return Memory(most.parameters, most.gradients, most.optimizer, kept, cache)


def row(run: Run) -> dict[str, Any]:
    """What a table and a plot say of a run."""
    costs, held = phases(run), rank_memory(run)
    step = sum(cost.total for cost in costs.values())
    training = costs["update_actor"].total
    limit, machine = run.machine.memory_bytes, run.machine
    nodes = -(-run.world_size // machine.ranks_per_node)
    return {
        "ranks": run.world_size,
        "nodes": nodes,
        "prompts": run.work.prompts,
        "step_s": step,
        "phases": {name: cost.total for name, cost in costs.items()},
        "tokens_per_s_per_rank": run.work.tokens / step / run.world_size,
        "bubble_of_update": costs["update_actor"].bubble / training,
        "communication": sum(cost.communication for cost in costs.values()) / step,
        "memory": {**dataclasses.asdict(held), "peak": held.peak},
        "fits": limit is None or held.peak <= limit,
        "extrapolated": run.world_size > machine.measured_ranks or nodes > machine.measured_nodes,
    }


def scale(config: Config, counts: list[int], lengths: Lengths, machine: Constants, weak: bool) -> list[dict[str, Any]]:
    """A row for each number of ranks. Weak: prompts grow with the ranks, from the configured number of both."""
    own = config.trainer.num_nodes * config.trainer.devices
    prompts, rows = config.trainer.grpo.num_prompts_per_grpo_step, []
    batch = config.model.global_batch_size
    for ranks in counts:
        factor = ranks / own if weak else 1.0
        model = dataclasses.replace(config.model, global_batch_size=max(1, round(batch * factor)))
        scaled = dataclasses.replace(config, model=model)
        rows.append(row(make_run(scaled, ranks, max(1, round(prompts * factor)), lengths, machine)))
    return rows
