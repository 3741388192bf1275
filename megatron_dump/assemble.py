"""All parts of a run, from its configuration to a trainer."""

from __future__ import annotations

import os
import pathlib
from typing import Any

from transformers import PreTrainedTokenizerFast

from megatron_dump import config as schema
from megatron_dump import evaluate
from megatron_dump.actor import parallel
from megatron_dump.actor.actor import MegatronGPTGRPOActor
from megatron_dump.actor.architecture import read_architecture
from megatron_dump.actor.checkpoint import Checkpoints
from megatron_dump.actor.layout import Layout, check_layout, check_model, check_run, layout_of
from megatron_dump.collect import Collector
from megatron_dump.config import Config, ConfigError, CurriculumConfig
from megatron_dump.curriculum.curriculum import Curriculum
from megatron_dump.curriculum.sampler import MegatronCurriculumBatchSampler
from megatron_dump.data import PromptDataset
from megatron_dump.distributed import DrawBroadcast, Replica, fail_together
from megatron_dump.engines import connect
from megatron_dump.generators import make_generators
from megatron_dump.kl_reward import KLInReward
from megatron_dump.monitor import Monitor
from megatron_dump.ray_cluster import Cluster
from megatron_dump.rewards import reward_functions
from megatron_dump.rewards.ray_workers import RayRewardPool
from megatron_dump.scoring import Scorer
from megatron_dump.shared_scoring import SharedScorer
from megatron_dump.trainer import GRPOTrainer


def build_trainer(config: Config) -> GRPOTrainer:
    """Read the data, join the process grid, load the model.

    ValueError or FileNotFoundError, each one clear line, for input that cannot be used: before any collective where
    every rank can tell on its own.
    """
    grpo, model = config.trainer.grpo, config.model
    layout = _checked_layout(config)
    tokenizer = load_tokenizer(config.pretrained_checkpoint.restore_from_path)
    train = load_data(config, tokenizer, model.data.train_files, "model.data.train_files")
    schema.bound_steps(config, len(train))
    validation = None
    if model.data.validation_files:
        validation = load_data(config, tokenizer, model.data.validation_files, "model.data.validation_files")
        _keep_prompts(validation, grpo.val_num_prompts_per_grpo_step)
        _check_monitor(config, validation)
    sources = sorted({*train.sources, *(validation.sources if validation else ())})
    reward_functions(model.data.rewards, sources)  # tells on every rank what is wrong with them
    curriculum = make_curriculum(config, train)
    grid = parallel.initialize(layout, model.seed, config.trainer.collective_timeout_s)
    actor = MegatronGPTGRPOActor(config, grid)
    log_dir, manager = pathlib.Path(config.exp_manager.explicit_log_dir), config.exp_manager
    _check_lengths(config, actor, train, validation)
    replica = Replica(grid.data_rank, grid.data_size, grid.data_group, grid.device, grid.replica_group)
    cluster = connect(config, grid.rank, grid.device)
    generators = make_generators(config, actor, tokenizer, replica, cluster)
    updates = grpo.num_prompts_per_grpo_step * grpo.samples_per_prompt // model.global_batch_size
    advantages = {"normalize_rewards": grpo.normalize_rewards, "advantage_estimator": grpo.advantage_estimator}
    reward_kl = KLInReward(grpo.initial_policy_kl_penalty, grpo.kl_penalty_type, **advantages)
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
        validation=validation,
        curriculum=curriculum,
        replica=replica,
        checkpoints=Checkpoints(
            log_dir / "checkpoints", actor, manager.checkpoint_callback_params, manager.resume_from_checkpoint
        ),
        monitor=Monitor(log_dir, curriculum.sources, grpo.max_steps, grid.rank, vars(manager)),
        reward_kl=reward_kl if grpo.kl_in_reward else None,
        notice=generators.notice,
        cluster=cluster,
    )


def _checked_layout(config: Config) -> Layout:
    """How the ranks that were started are to split the model of config.json; what does not go together is refused."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    layout = layout_of(config.model)
    replicas = check_layout(layout, world_size)
    schema.check_world(config, world_size, replicas)
    path = config.pretrained_checkpoint.restore_from_path
    arch = read_architecture(path, config.model.make_vocab_size_divisible_by, layout.tensor)
    check_model(arch, layout)
    check_run(config, layout, replicas, arch.experts is not None)
    return layout


def make_curriculum(config: Config, train: PromptDataset) -> Curriculum:
    """Over the training data's rows."""
    grpo = config.trainer.grpo
    return Curriculum(
        train.source_of_rows,
        grpo.num_prompts_per_grpo_step,
        grpo.samples_per_prompt,
        config.model.seed,
        blocks_of(grpo.curriculum),
        train.fingerprint,
        max_steps=grpo.max_steps,
        max_staleness=grpo.max_staleness,
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


def blocks_of(curriculum: CurriculumConfig) -> dict[str, Any]:
    """What the Curriculum is made of; the rest of the section concerns the data and the resume."""
    return {k: v for k, v in vars(curriculum).items() if k not in ("source_key", "resume_changed")}


def _keep_prompts(validation: PromptDataset, n: int | None) -> None:
    if n is not None:
        try:
            validation.keep(n)
        except ValueError as error:
            raise ConfigError(f"trainer.grpo.val_num_prompts_per_grpo_step={n}: {error}") from None


def _check_monitor(config: Config, validation: PromptDataset) -> None:
    """What decides which checkpoints are the best must be measured."""
    monitor = config.exp_manager.checkpoint_callback_params.monitor
    known = evaluate.metric_names(validation.sources, config.trainer.grpo.val_samples_per_prompt)
    if monitor is not None and monitor not in known:
        raise ConfigError(
            f"exp_manager.checkpoint_callback_params.monitor={monitor}: the validation measures {', '.join(known)}"
        )


def _check_lengths(
    config: Config, actor: MegatronGPTGRPOActor, train: PromptDataset, validation: PromptDataset | None
) -> None:
    """Prompt and completion must fit the model's positions, and a micro-batch. Tokenises every prompt, once."""
    trained = train.check_lengths()
    schema.check_budget(config, trained)
    longest, limit = trained, config.model.grpo.length_params.max_length
    if validation is not None:
        longest = max(longest, validation.check_lengths())
    positions = actor.arch.hf.max_position_embeddings
    if longest + limit > positions:
        raise ConfigError(
            f"model.grpo.length_params.max_length={limit}: with the longest prompt, {longest} tokens, it exceeds the "
            f"model's {positions} positions; lower it"
        )


def load_tokenizer(path: str) -> PreTrainedTokenizerFast:
    """The tokenizer as its tokenizer.json says; AutoTokenizer may rebuild another one from the model type."""
    if not (pathlib.Path(path) / "tokenizer.json").is_file():
        raise FileNotFoundError(
            f"pretrained_checkpoint.restore_from_path={path}: no tokenizer.json there; give a Hugging Face model folder"
        )
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path, local_files_only=True)
    if not tokenizer.chat_template:
        raise ValueError(
            f"pretrained_checkpoint.restore_from_path={path}: its tokenizer has no chat template; "
            "add chat_template.jinja"
        )
    return tokenizer


def load_data(config: Config, tokenizer: PreTrainedTokenizerFast, files: list[str], key: str) -> PromptDataset:
    """Parquet files as prompts, chat template applied."""

    def encode(messages: list[dict[str, str]]) -> list[int]:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    longest = config.model.data.max_prompt_length
    source_key = config.trainer.grpo.curriculum.source_key
    return PromptDataset(files, source_key, encode=encode, max_prompt_length=longest, key=key)


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
