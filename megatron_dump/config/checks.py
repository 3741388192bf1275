"""What a configuration must satisfy before anything starts."""

from __future__ import annotations

from megatron_dump.config.checkpoint_checks import check_checkpoints, check_early_stopping
from megatron_dump.config.durations import seconds_of
from megatron_dump.config.rollout_checks import check_backend
from megatron_dump.config.schedule_checks import check_length
from megatron_dump.config.schema import (
    ADVANTAGE_ESTIMATORS,
    KL_PENALTY_TYPES,
    LOSS_AGG_MODES,
    LOSS_MODES,
    Config,
    ConfigError,
    ModelConfig,
)


def validate(config: Config) -> None:
    """Checks that need no other rank and no file. ConfigError names key, value and remedy."""
    grpo, model = config.trainer.grpo, config.model
    positive = {
        "trainer.grpo.num_prompts_per_grpo_step": grpo.num_prompts_per_grpo_step,
        "trainer.grpo.val_samples_per_prompt": grpo.val_samples_per_prompt,
        "trainer.grpo.val_num_prompts_per_grpo_step": grpo.val_num_prompts_per_grpo_step,
        "model.micro_batch_size": model.micro_batch_size,
        "model.global_batch_size": model.global_batch_size,
        "model.dynamic_batching.train_mb_tokens": model.dynamic_batching.train_mb_tokens,
        "model.dynamic_batching.logprob_mb_tokens": model.dynamic_batching.logprob_mb_tokens,
        "model.dynamic_batching.sequence_length_round": model.dynamic_batching.sequence_length_round,
        "model.grpo.logprob_chunk_size": model.grpo.logprob_chunk_size,
        "model.tensor_model_parallel_size": model.tensor_model_parallel_size,
        "model.pipeline_model_parallel_size": model.pipeline_model_parallel_size,
        "model.virtual_pipeline_model_parallel_size": model.virtual_pipeline_model_parallel_size,
        "model.context_parallel_size": model.context_parallel_size,
        "model.expert_model_parallel_size": model.expert_model_parallel_size,
        "model.expert_tensor_parallel_size": model.expert_tensor_parallel_size,
        "model.recompute_num_layers": model.recompute_num_layers,
        "model.grpo.length_params.max_length": model.grpo.length_params.max_length,
        "model.grpo.sampling_params.temperature": model.grpo.sampling_params.temperature,
        "model.grpo.sampling_params.top_p": model.grpo.sampling_params.top_p,
        "model.grpo.generation_rollout_mbs": model.grpo.generation_rollout_mbs,
        "model.make_vocab_size_divisible_by": model.make_vocab_size_divisible_by,
        "trainer.collective_timeout_s": config.trainer.collective_timeout_s,
    }
    for key, value in positive.items():
        if value is not None and value <= 0:
            raise ConfigError(f"{key}={value}: must be above 0")
    _check_ranges(config)
    _check_loss(config)
    if grpo.samples_per_prompt < 2:
        raise ConfigError(
            f"trainer.grpo.samples_per_prompt={grpo.samples_per_prompt}: a group needs at least 2 to have a baseline"
        )
    for key, value, known in (
        ("model.grpo.loss_agg_mode", model.grpo.loss_agg_mode, LOSS_AGG_MODES),
        ("model.grpo.loss_mode", model.grpo.loss_mode, LOSS_MODES),
        ("trainer.grpo.advantage_estimator", grpo.advantage_estimator, ADVANTAGE_ESTIMATORS),
        ("trainer.grpo.kl_penalty_type", grpo.kl_penalty_type, KL_PENALTY_TYPES),
        ("trainer.grpo.curriculum.resume_changed", grpo.curriculum.resume_changed, ("refuse", "allow")),
        ("trainer.accelerator", config.trainer.accelerator, ("auto", "gpu", "cpu")),
        ("model.transformer_impl", model.transformer_impl, ("auto", "local", "transformer_engine")),
        ("model.recompute_granularity", model.recompute_granularity or "null", ("null", "full", "selective")),
        ("model.recompute_method", model.recompute_method or "null", ("null", "uniform", "block")),
        ("model.moe_router_dtype", model.moe_router_dtype or "null", ("null", "fp32", "fp64")),
    ):
        if value not in known:
            raise ConfigError(f"{key}={value}: known are {', '.join(known)}")
    _check_recompute(model)
    if config.trainer.precision not in ("32", "bf16"):
        raise ConfigError(f"trainer.precision={config.trainer.precision}: must be 32 or bf16")
    check_backend(config)
    if model.optim.name != "distributed_fused_adam":
        raise ConfigError(f"model.optim.name={model.optim.name}: only distributed_fused_adam is known")
    if model.optim.sched.name not in ("constant", "cosine", "linear"):
        raise ConfigError(f"model.optim.sched.name={model.optim.sched.name}: known are constant, cosine and linear")
    if not model.data.train_files:
        raise ConfigError("model.data.train_files=[]: name at least one parquet file")
    _check_batches(config)
    check_length(config)
    if grpo.greedy_on_validation and grpo.val_samples_per_prompt > 1:
        raise ConfigError(
            f"trainer.grpo.val_samples_per_prompt={grpo.val_samples_per_prompt}: greedily decoded, a prompt's samples "
            "are all the same; set it to 1, or trainer.grpo.greedy_on_validation=false"
        )
    check_checkpoints(config)
    check_early_stopping(config)
    seconds_of("exp_manager.max_time_per_run", config.exp_manager.max_time_per_run)


def _check_recompute(model: ModelConfig) -> None:
    granularity = model.recompute_granularity
    for key, value in (("method", model.recompute_method), ("num_layers", model.recompute_num_layers)):
        if granularity == "full" and value is None:
            raise ConfigError(
                f"model.recompute_granularity=full needs model.recompute_{key}: uniform with recompute_num_layers=1 "
                "keeps the least, block recomputes that many layers of a stage and keeps the others"
            )
        if granularity != "full" and value is not None:
            raise ConfigError(
                f"model.recompute_{key}={value} belongs to model.recompute_granularity=full, which is "
                f"{granularity or 'null'}: set it to full, or recompute_{key} to null"
            )


def _check_ranges(config: Config) -> None:
    grpo, model, optim = config.trainer.grpo, config.model, config.model.optim
    not_negative = {
        "model.seed": model.seed,
        "model.grpo.sampling_params.top_k": model.grpo.sampling_params.top_k,
        "model.grpo.length_params.min_length": model.grpo.length_params.min_length,
        "trainer.grpo.initial_policy_kl_penalty": grpo.initial_policy_kl_penalty,
        "trainer.grpo.gradient_clip_val": grpo.gradient_clip_val,
        "trainer.grpo.max_staleness": grpo.max_staleness,
        "trainer.grpo.val_check_interval": grpo.val_check_interval,
        "trainer.grpo.save_interval": grpo.save_interval,
        "model.moe_aux_loss_coeff": model.moe_aux_loss_coeff,
        "model.moe_z_loss_coeff": model.moe_z_loss_coeff or 0.0,
        "model.optim.lr": optim.lr,
        "model.optim.sched.warmup_steps": optim.sched.warmup_steps,
        "model.optim.sched.constant_steps": optim.sched.constant_steps,
        "exp_manager.time_reserve_s": config.exp_manager.time_reserve_s,
    }
    for key, value in not_negative.items():
        if value < 0:
            raise ConfigError(f"{key}={value}: must not be negative")
    if model.grpo.sampling_params.top_p > 1:
        raise ConfigError(f"model.grpo.sampling_params.top_p={model.grpo.sampling_params.top_p}: must be at most 1")
    lengths = model.grpo.length_params
    if lengths.min_length > lengths.max_length:
        raise ConfigError(
            f"model.grpo.length_params.min_length={lengths.min_length}: must be at most max_length={lengths.max_length}"
        )
    if len(optim.betas) != 2 or not all(0 <= beta < 1 for beta in optim.betas):
        raise ConfigError(f"model.optim.betas={optim.betas}: must be two numbers in [0, 1)")
    if not 0 <= optim.sched.min_lr <= optim.lr:
        raise ConfigError(f"model.optim.sched.min_lr={optim.sched.min_lr}: must be in [0, model.optim.lr={optim.lr}]")


def _check_loss(config: Config) -> None:
    """What grpo.LossOptions asks for, and that a KL in the reward has a reference to come from."""
    grpo, loss = config.trainer.grpo, config.model.grpo
    clip_c, cap = loss.ratio_clip_c, loss.importance_sampling_cap
    for key, value, right, remedy in (
        ("ratio_eps_low", loss.ratio_eps_low, 0 <= loss.ratio_eps_low <= 1, "must be in [0, 1]"),
        ("ratio_eps_high", loss.ratio_eps_high, loss.ratio_eps_high >= 0, "must not be negative"),
        ("ratio_clip_c", clip_c, clip_c is None or clip_c > 1, "must be above 1, or null for no such bound"),
        ("ratio_clip_c", clip_c, clip_c is None or loss.loss_mode != "cispo", "cispo knows no dual clip: set it null"),
        ("entropy_bonus", loss.entropy_bonus, loss.entropy_bonus >= 0, "must not be negative"),
        ("importance_sampling_cap", cap, cap is None or cap > 0, "must be above 0, or null for no correction"),
    ):
        if not right:
            raise ConfigError(f"model.grpo.{key}={value}: {remedy}")
    if grpo.max_staleness > 0 and cap is None:
        raise ConfigError(
            f"trainer.grpo.max_staleness={grpo.max_staleness}: rollouts of older weights need "
            "model.grpo.importance_sampling_cap; set it (2.0 is usual), or max_staleness to 0"
        )
    if grpo.kl_in_reward and grpo.initial_policy_kl_penalty == 0:
        raise ConfigError(
            "trainer.grpo.kl_in_reward=true: trainer.grpo.initial_policy_kl_penalty=0 leaves nothing to subtract; "
            "raise it, or set kl_in_reward=false"
        )


def _check_batches(config: Config) -> None:
    grpo, model = config.trainer.grpo, config.model
    n_rollouts = grpo.num_prompts_per_grpo_step * grpo.samples_per_prompt
    if n_rollouts % model.global_batch_size:
        raise ConfigError(
            f"model.global_batch_size={model.global_batch_size} does not divide the {n_rollouts} rollouts of a step "
            f"(trainer.grpo.num_prompts_per_grpo_step={grpo.num_prompts_per_grpo_step} × "
            f"samples_per_prompt={grpo.samples_per_prompt}): choose a divisor"
        )


def check_world(config: Config, world_size: int, data_parallel_size: int) -> None:
    """The ranks started must be those configured, and each replica must get whole micro-batches.

    Dynamic micro-batches take any number of rollouts. ConfigError otherwise.
    """
    model, trainer = config.model, config.trainer
    if trainer.num_nodes * trainer.devices != world_size:
        raise ConfigError(
            f"trainer.num_nodes={trainer.num_nodes} × trainer.devices={trainer.devices} = "
            f"{trainer.num_nodes * trainer.devices} ranks, but {world_size} were started: make them agree"
        )
    if model.dynamic_batching.enabled:
        return
    if model.global_batch_size % data_parallel_size:
        raise ConfigError(
            f"model.global_batch_size={model.global_batch_size} rollouts cannot be shared evenly by "
            f"{data_parallel_size} data-parallel ranks: make it a multiple of {data_parallel_size}"
        )
    share = model.global_batch_size // data_parallel_size
    for key, size in (
        ("model.micro_batch_size", model.micro_batch_size),
        ("model.grpo.forward_micro_batch_size", model.grpo.forward_micro_batch_size or 1),
    ):
        if share % size:
            raise ConfigError(
                f"{key}={size} does not divide the {share} rollouts of a data-parallel rank "
                f"(model.global_batch_size={model.global_batch_size} / {data_parallel_size}): choose a divisor"
            )


def check_budget(config: Config, longest_prompt: int) -> None:
    """Any rollout must fit into a dynamic micro-batch; the longest prompt in tokens. ConfigError otherwise."""
    dynamic, limit = config.model.dynamic_batching, config.model.grpo.length_params.max_length
    padded = -(-(longest_prompt + limit) // dynamic.sequence_length_round) * dynamic.sequence_length_round
    for key, budget in (("train", dynamic.train_mb_tokens), ("logprob", dynamic.logprob_mb_tokens)):
        if dynamic.enabled and budget is not None and padded > budget:
            raise ConfigError(
                f"model.dynamic_batching.{key}_mb_tokens={budget}: the longest prompt, {longest_prompt} tokens, with "
                f"model.grpo.length_params.max_length={limit} makes a rollout of {padded} tokens, padded: raise it to "
                "at least that"
            )
