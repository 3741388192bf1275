"""What `exp_manager` must satisfy: which checkpoints are kept, and when a run stops early."""

from __future__ import annotations

from megatron_dump.config.schema import Config, ConfigError


def check_checkpoints(config: Config) -> None:
    """ConfigError names key, value and remedy."""
    manager, grpo, prefix = config.exp_manager, config.trainer.grpo, "exp_manager.checkpoint_callback_params"
    params = manager.checkpoint_callback_params
    if params.save_top_k < -1 or params.save_top_k == 0:
        raise ConfigError(
            f"{prefix}.save_top_k={params.save_top_k}: must be at least 1, or -1 to keep every checkpoint "
            "(trainer.grpo.save_interval=0 writes none)"
        )
    _check_mode(prefix, params.mode)
    if manager.resume_from_checkpoint and not manager.resume_if_exists:
        raise ConfigError(
            f"exp_manager.resume_from_checkpoint={manager.resume_from_checkpoint}: exp_manager.resume_if_exists=false "
            "forbids it; set it to true"
        )
    if params.monitor is None or grpo.save_interval == 0:
        return
    _check_measured(config, prefix, params.monitor)
    is_validated = grpo.val_check_interval > 0 and grpo.save_interval % grpo.val_check_interval == 0
    if params.monitor.startswith("val/") and not is_validated:
        raise ConfigError(
            f"{prefix}.monitor={params.monitor}: trainer.grpo.save_interval={grpo.save_interval} must be a multiple "
            f"of trainer.grpo.val_check_interval={grpo.val_check_interval}, so that every checkpoint has been validated"
        )


def check_early_stopping(config: Config) -> None:
    """ConfigError for parameters that say nothing, and for a metric that nothing measures."""
    params, prefix = config.exp_manager.early_stopping_callback_params, "exp_manager.early_stopping_callback_params"
    _check_mode(prefix, params.mode)
    if params.patience < 1:
        raise ConfigError(f"{prefix}.patience={params.patience}: must be at least 1")
    if not params.min_delta >= 0:
        raise ConfigError(f"{prefix}.min_delta={params.min_delta}: must not be negative")
    if not config.exp_manager.create_early_stopping_callback:
        return
    _check_measured(config, prefix, params.monitor)
    if params.monitor.startswith("val/") and config.trainer.grpo.val_check_interval == 0:
        raise ConfigError(
            f"{prefix}.monitor={params.monitor}: trainer.grpo.val_check_interval=0 measures it never; set it"
        )


def _check_mode(prefix: str, mode: str) -> None:
    if mode not in ("max", "min"):
        raise ConfigError(f"{prefix}.mode={mode}: known are max and min")


def _check_measured(config: Config, prefix: str, monitor: str) -> None:
    if monitor.startswith("val/") and not config.model.data.validation_files:
        raise ConfigError(f"{prefix}.monitor={monitor}: name model.data.validation_files to measure it on")
