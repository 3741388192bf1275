"""Megatron's optimizer of the policy, its gradient buffers and its learning-rate schedule."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from megatron_dump.config import Config, ModelConfig


def data_parallel(
    modules: Sequence[nn.Module], config: TransformerConfig, model: ModelConfig
) -> list[DistributedDataParallel]:
    """The model chunks with buffers in which gradients are summed over data-parallel (and context-parallel) ranks."""
    options = DistributedDataParallelConfig(
        use_distributed_optimizer=model.use_distributed_optimizer,
        overlap_grad_reduce=model.overlap_grad_reduce,
        grad_reduce_in_fp32=True,
    )
    # Chunks behind the first have their reduction hidden by its computation already: no need to cut it into buckets.
    models = [
        DistributedDataParallel(config, options, module, disable_bucketing=chunk > 0)
        for chunk, module in enumerate(modules)
    ]
    config.finalize_model_grads_func = finalize_model_grads
    if model.overlap_grad_reduce:  # until the last micro-batch
        no_sync = [m.no_sync for m in models]
        config.no_sync_func = no_sync if len(models) > 1 else no_sync[0]
    return models


def build_optimizer(
    config: Config, models: Sequence[DistributedDataParallel]
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """Adam over all chunks (sharded over data-parallel ranks with use_distributed_optimizer), and its schedule."""
    optimizer = get_megatron_optimizer(_optimizer_config(config), list(models))
    models[0].config.grad_scale_func = optimizer.scale_loss
    return optimizer, _scheduler(config, optimizer)


def _optimizer_config(config: Config) -> OptimizerConfig:
    optim, bf16 = config.model.optim, config.trainer.precision == "bf16"
    return OptimizerConfig(
        optimizer="adam",
        lr=optim.lr,
        min_lr=optim.sched.min_lr,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.betas[0],
        adam_beta2=optim.betas[1],
        clip_grad=config.trainer.grpo.gradient_clip_val,
        use_distributed_optimizer=config.model.use_distributed_optimizer,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
    )


def _scheduler(config: Config, optimizer: object) -> OptimizerParamScheduler:
    optim, grpo_config = config.model.optim, config.trainer.grpo
    updates = grpo_config.num_prompts_per_grpo_step * grpo_config.samples_per_prompt // config.model.global_batch_size
    steps = grpo_config.max_steps * updates
    return OptimizerParamScheduler(
        optimizer,
        # Warm-up begins above zero so that the first update is not lost.
        init_lr=optim.lr / (optim.sched.warmup_steps + 1) if optim.sched.warmup_steps else optim.lr,
        max_lr=optim.lr,
        min_lr=optim.sched.min_lr,
        lr_warmup_steps=optim.sched.warmup_steps,
        # The last constant_steps are at min_lr: behind the decay Megatron stays there.
        lr_decay_steps=max(steps - optim.sched.constant_steps, optim.sched.warmup_steps + 1),
        lr_decay_style=optim.sched.name,
        start_wd=optim.weight_decay,
        end_wd=optim.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,  # a longer max_steps stretches the schedule of a resumed run
    )
