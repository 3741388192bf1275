"""All parts of a run, from its configuration to a trainer."""

from __future__ import annotations

import pathlib
import time

from megatron_dump import config as schema
from megatron_dump.actor import parallel
from megatron_dump.actor.actor import MegatronGPTGRPOActor
from megatron_dump.actor.checkpoint import Checkpoints
from megatron_dump.collect import Collector
from megatron_dump.config import Config
from megatron_dump.course import Course
from megatron_dump.curriculum.curriculum import Curriculum
from megatron_dump.curriculum.sampler import MegatronCurriculumBatchSampler
from megatron_dump.distributed import DrawBroadcast, Replica, fail_together
from megatron_dump.early_stopping import EarlyStopping
from megatron_dump.engines import connect
from megatron_dump.generators import make_generators
from megatron_dump.inputs import TrainingInputs, checked_layout, monitored, read_training_inputs
from megatron_dump.kl_reward import KLInReward
from megatron_dump.monitor import Monitor
from megatron_dump.ray_cluster import Cluster
from megatron_dump.rewards.ray_workers import RayRewardPool
from megatron_dump.scoring import Scorer
from megatron_dump.shared_scoring import SharedScorer
from megatron_dump.stopping import Stopping, StopSignal, run_end
from megatron_dump.trainer import GRPOTrainer


def join(config: Config) -> parallel.Parallel:
    """Meet the other ranks, before anything is loaded. ValueError for a layout that cannot run."""
    return parallel.initialize(checked_layout(config), config.model.seed, config.trainer.collective_timeout_s)


def make_stopping(config: Config, rank: int, stop_signal: StopSignal | None = None) -> Stopping:
    """What may end the run before its last step. stop_signal: made when the process began; None: no signal ends it."""
    manager = config.exp_manager
    limit_s = schema.seconds_of("exp_manager.max_time_per_run", manager.max_time_per_run)
    end = run_end(time.time() if stop_signal is None else stop_signal.since, limit_s)
    folder, early = (pathlib.Path(manager.explicit_log_dir), _early_stopping(config)) if rank == 0 else (None, None)
    return Stopping(stop_signal, folder, end, manager.time_reserve_s, early)


def _early_stopping(config: Config) -> EarlyStopping | None:
    manager = config.exp_manager
    wanted = manager.create_early_stopping_callback
    return EarlyStopping(**vars(manager.early_stopping_callback_params)) if wanted else None


def build_trainer(
    config: Config,
    inputs: TrainingInputs | None = None,
    grid: parallel.Parallel | None = None,
    stopping: Stopping | None = None,
) -> GRPOTrainer:
    """Load the model, connect the parts.

    inputs, grid: of `read_training_inputs` and `join`; by default read and joined now. ValueError or FileNotFoundError,
    each one clear line, for input that cannot be used: before any collective where every rank can tell on its own.
    """
    grpo, model = config.trainer.grpo, config.model
    inputs = inputs or read_training_inputs(config)
    train, sources, curriculum = inputs.train, inputs.sources, inputs.curriculum
    grid = grid or join(config)
    actor = MegatronGPTGRPOActor(config, grid)
    log_dir, manager = pathlib.Path(config.exp_manager.explicit_log_dir), config.exp_manager
    longest = inputs.check_lengths(model.grpo.length_params.max_length)
    schema.check_budget(config, longest["train"])
    replica = grid.replica
    cluster = connect(config, grid.rank, grid.device)
    generators = make_generators(config, actor, inputs.tokenizer, replica, cluster)
    updates = grpo.num_prompts_per_grpo_step * grpo.samples_per_prompt // model.global_batch_size
    advantages = {"normalize_rewards": grpo.normalize_rewards, "advantage_estimator": grpo.advantage_estimator}
    reward_kl = KLInReward(grpo.initial_policy_kl_penalty, grpo.kl_penalty_type, **advantages)
    monitor = Monitor(log_dir, curriculum.sources, grpo.max_steps, grid.rank, vars(manager), grpo.max_generated_tokens)
    return GRPOTrainer(
        config=grpo,
        settings=schema.lasting(config),
        updates=updates,
        max_length=model.grpo.length_params.max_length,
        loss_agg_mode=model.grpo.loss_agg_mode,
        balance_tokens=model.dynamic_batching.enabled,
        use_reference=grpo.initial_policy_kl_penalty > 0,
        owns_curriculum=grid.rank == 0,
        actor=actor,
        engines=generators.engines,
        collector=Collector(
            generator=generators.training,
            scorer=make_scorer(config, sources, replica, cluster),
            dataset=train,
            sampler=make_sampler(config, curriculum, grid),
            filter=curriculum.filter,
            replica=replica,
            updates=updates,
            **advantages,
            # A recording may come from a run that took more updates: what it holds is as fresh as can be.
            age=lambda completion: max(actor.version - completion.policy_version, 0) // updates,
        ),
        validator=generators.validation,
        dataset=train,
        validation=inputs.validation,
        curriculum=curriculum,
        replica=replica,
        course=Course(
            Checkpoints(
                log_dir / "checkpoints", actor, manager.checkpoint_callback_params, manager.resume_from_checkpoint
            ),
            monitor,
            grid.device,
            grpo.max_steps,
            grpo.save_interval,
            stopping or make_stopping(config, grid.rank),
            grpo.max_generated_tokens,
            *monitored(config),
            leads=grid.rank == 0,
        ),
        monitor=monitor,
        reward_kl=reward_kl if grpo.kl_in_reward else None,
        notice=generators.notice,
        cluster=cluster,
    )


def make_scorer(config: Config, sources: list[str], replica: Replica, cluster: Cluster | None) -> Scorer | SharedScorer:
    """Reward processes of each replica or, with `model.data.reward_workers.ray_actors`, of all on Ray. A collective."""
    options = dict(vars(config.model.data.reward_workers))
    actors = options.pop("ray_actors")
    if not actors:
        return Scorer(config.model.data.rewards, sources, replica, **options)
    judges = None
    with fail_together("model.data.reward_workers", device=replica.device):
        if cluster is not None:
            judges = RayRewardPool(cluster, config.model.data.rewards, sources, actors=actors, **options)
    return SharedScorer(judges, sources, replica)


def make_sampler(config: Config, curriculum: Curriculum, grid: parallel.Parallel) -> MegatronCurriculumBatchSampler:
    """Draws for all ranks. The trainer deals the rollouts out itself: no prompts are handed out by the sampler."""
    prompts = config.trainer.grpo.num_prompts_per_grpo_step
    return MegatronCurriculumBatchSampler(
        total_samples=curriculum.n_rows,
        consumed_samples=0,
        micro_batch_size=1,
        global_batch_size=prompts,
        data_parallel_rank=0,
        data_parallel_size=1,
        seed=config.model.seed,
        curriculum=curriculum,
        broadcast=DrawBroadcast(device=grid.device, n_prompts=prompts, n_sources=len(curriculum.sources)),
    )
