"""How long a run is, and what must fit into it."""

from __future__ import annotations

from megatron_dump.config.schema import Config, ConfigError


def check_length(config: Config) -> None:
    """ConfigError for steps and epochs that say nothing, or too little for the learning rate's schedule."""
    grpo = config.trainer.grpo
    if grpo.max_epochs is not None and grpo.max_epochs <= 0:
        raise ConfigError(f"trainer.grpo.max_epochs={grpo.max_epochs}: must be above 0, or null for no bound")
    if grpo.max_generated_tokens is not None and grpo.max_generated_tokens <= 0:
        raise ConfigError(
            f"trainer.grpo.max_generated_tokens={grpo.max_generated_tokens}: must be above 0, or null for no bound"
        )
    if grpo.max_steps == -1 and grpo.max_epochs is None:
        raise ConfigError("trainer.grpo.max_steps=-1: all of trainer.grpo.max_epochs, which is null; set one of them")
    if grpo.max_steps != -1:
        if grpo.max_steps <= 0:
            raise ConfigError(f"trainer.grpo.max_steps={grpo.max_steps}: must be above 0, or -1 for all of max_epochs")
        _check_schedule(config)


def bound_steps(config: Config, n_rows: int) -> None:
    """Set `trainer.grpo.max_steps` to what `max_epochs` leaves of it: an epoch draws as many prompts as there are rows.

    ConfigError where that is nothing.
    """
    grpo = config.trainer.grpo
    if grpo.max_epochs is None:
        return
    steps = grpo.max_epochs * n_rows // grpo.num_prompts_per_grpo_step
    if steps == 0:
        raise ConfigError(
            f"trainer.grpo.max_epochs={grpo.max_epochs}: {n_rows} rows of model.data.train_files are less than a step's"
            f" trainer.grpo.num_prompts_per_grpo_step={grpo.num_prompts_per_grpo_step}; lower that, or raise max_epochs"
        )
    grpo.max_steps = steps if grpo.max_steps == -1 else min(grpo.max_steps, steps)
    _check_schedule(config)


def _check_schedule(config: Config) -> None:
    """The steps at the lowest rate come after the warm-up, and both are optimizer steps."""
    grpo, sched = config.trainer.grpo, config.model.optim.sched
    updates = grpo.num_prompts_per_grpo_step * grpo.samples_per_prompt // config.model.global_batch_size
    total = grpo.max_steps * updates
    if sched.constant_steps and sched.warmup_steps + sched.constant_steps >= total:
        raise ConfigError(
            f"model.optim.sched.constant_steps={sched.constant_steps}: with warmup_steps={sched.warmup_steps} nothing "
            f"of the run's {total} optimizer steps is left between them; lower it"
        )
