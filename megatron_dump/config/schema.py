"""The schema of the YAML. Keys follow NeMo-Aligner's gpt_grpo.yaml; ours are in `trainer.grpo.curriculum`.

examples/conf/gpt_grpo.yaml documents every key. Unknown keys are errors.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from omegaconf import MISSING

from megatron_dump.config.rollout_schema import InferenceBackendConfig

# What grpo.py, advantages.py and kl.py know, repeated so that a YAML is checked without torch; a test compares them.
LOSS_AGG_MODES = ("token-mean", "seq-mean-token-mean", "prompt-mean", "seq-mean-token-sum-norm")
LOSS_MODES = ("vanilla", "gspo", "cispo")
ADVANTAGE_ESTIMATORS = ("grpo", "rloo")
KL_PENALTY_TYPES = ("k1", "k2", "k3")


@dataclasses.dataclass
class CurriculumConfig:
    source_key: str = "data_source"
    sources: dict[str, Any] = dataclasses.field(default_factory=lambda: {"name": "dump_ucb"})
    prompts: dict[str, Any] = dataclasses.field(default_factory=lambda: {"name": "epoch"})
    budget: dict[str, Any] = dataclasses.field(default_factory=lambda: {"name": "fixed"})
    filter: dict[str, Any] = dataclasses.field(default_factory=lambda: {"name": "none"})
    pass_rates: dict[str, Any] = dataclasses.field(default_factory=dict)
    audit: dict[str, Any] = dataclasses.field(default_factory=dict)
    alarm: dict[str, Any] = dataclasses.field(default_factory=dict)
    resume_changed: str = "refuse"


@dataclasses.dataclass
class GRPOConfig:
    max_steps: int = 100
    max_epochs: int | None = None
    max_generated_tokens: int | None = None
    num_prompts_per_grpo_step: int = 16
    samples_per_prompt: int = 8
    max_staleness: int = 0
    val_check_interval: int = 0
    val_samples_per_prompt: int = 4
    val_num_prompts_per_grpo_step: int | None = None
    greedy_on_validation: bool = False
    save_interval: int = 0
    run_validation_step_0: bool = True
    gradient_clip_val: float = 1.0
    initial_policy_kl_penalty: float = 0.001
    kl_penalty_type: str = "k3"
    kl_in_reward: bool = False
    advantage_estimator: str = "grpo"
    normalize_rewards: bool = True
    curriculum: CurriculumConfig = dataclasses.field(default_factory=CurriculumConfig)
    inference_backend: InferenceBackendConfig = dataclasses.field(default_factory=InferenceBackendConfig)


@dataclasses.dataclass
class TrainerConfig:
    num_nodes: int = 1
    devices: int = 1
    accelerator: str = "auto"
    precision: str = "32"
    collective_timeout_s: float = 600.0
    grpo: GRPOConfig = dataclasses.field(default_factory=GRPOConfig)


@dataclasses.dataclass
class SamplingParams:
    use_greedy: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    end_strings: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class LengthParams:
    max_length: int = 128
    min_length: int = 0


@dataclasses.dataclass
class ModelGRPOConfig:
    forward_micro_batch_size: int | None = None
    logprob_chunk_size: int | None = 1024
    generation_rollout_mbs: int = 256
    loss_mode: str = "vanilla"
    ratio_eps_low: float = 0.2
    ratio_eps_high: float = 0.2
    ratio_clip_c: float | None = None
    entropy_bonus: float = 0.0
    importance_sampling_cap: float | None = None
    loss_agg_mode: str = "token-mean"
    offload_adam_states: bool = False
    sampling_params: SamplingParams = dataclasses.field(default_factory=SamplingParams)
    length_params: LengthParams = dataclasses.field(default_factory=LengthParams)


@dataclasses.dataclass
class SchedConfig:
    name: str = "constant"
    warmup_steps: int = 0
    constant_steps: int = 0
    min_lr: float = 0.0


@dataclasses.dataclass
class OptimConfig:
    name: str = "distributed_fused_adam"
    lr: float = 1e-6
    weight_decay: float = 0.01
    betas: list[float] = dataclasses.field(default_factory=lambda: [0.9, 0.999])
    sched: SchedConfig = dataclasses.field(default_factory=SchedConfig)


@dataclasses.dataclass
class RewardWorkersConfig:
    workers: int = 2
    ray_actors: int = 0
    timeout_s: float = 5.0
    on_timeout: float | None = None
    on_crash: float | None = None
    memory_gb: float | None = 4.0


@dataclasses.dataclass
class DataConfig:
    train_files: list[str] = MISSING
    validation_files: list[str] = dataclasses.field(default_factory=list)
    max_prompt_length: int | None = None
    rewards: dict[str, Any] = dataclasses.field(default_factory=lambda: {"kk_logic_*": "kk"})
    reward_workers: RewardWorkersConfig = dataclasses.field(default_factory=RewardWorkersConfig)


@dataclasses.dataclass
class DynamicBatchingConfig:
    enabled: bool = False
    train_mb_tokens: int = 4096
    logprob_mb_tokens: int | None = None
    sequence_length_round: int = 8


@dataclasses.dataclass
class ModelConfig:
    micro_batch_size: int = 1
    share_prompts: bool = False
    global_batch_size: int = 128
    dynamic_batching: DynamicBatchingConfig = dataclasses.field(default_factory=DynamicBatchingConfig)
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int | None = None
    context_parallel_size: int = 1
    expert_model_parallel_size: int = 1
    expert_tensor_parallel_size: int | None = None
    sequence_parallel: bool = False
    transformer_impl: str = "auto"
    recompute_granularity: str | None = None
    recompute_method: str | None = None
    recompute_num_layers: int | None = None
    use_distributed_optimizer: bool = True
    overlap_grad_reduce: bool = False
    moe_aux_loss_coeff: float = 0.0
    moe_z_loss_coeff: float | None = None
    moe_router_dtype: str | None = None
    make_vocab_size_divisible_by: int = 128
    seed: int = 1234
    grpo: ModelGRPOConfig = dataclasses.field(default_factory=ModelGRPOConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)


@dataclasses.dataclass
class PretrainedCheckpoint:
    restore_from_path: str = MISSING


@dataclasses.dataclass
class CheckpointCallbackParams:
    async_save: bool = False
    save_top_k: int = -1
    monitor: str | None = None
    mode: str = "max"
    save_last: bool = True


@dataclasses.dataclass
class EarlyStoppingParams:
    monitor: str = "val/accuracy"
    mode: str = "max"
    min_delta: float = 0.001
    patience: int = 10
    verbose: bool = True
    strict: bool = True


@dataclasses.dataclass
class ExpManager:
    explicit_log_dir: str = MISSING
    resume_if_exists: bool = True
    resume_from_checkpoint: str | None = None
    max_time_per_run: str | None = None
    time_reserve_s: float = 120.0
    outcome_file: str | None = None
    checkpoint_callback_params: CheckpointCallbackParams = dataclasses.field(default_factory=CheckpointCallbackParams)
    create_early_stopping_callback: bool = False
    early_stopping_callback_params: EarlyStoppingParams = dataclasses.field(default_factory=EarlyStoppingParams)
    create_tensorboard_logger: bool = False
    create_wandb_logger: bool = False
    wandb_logger_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Config:
    trainer: TrainerConfig = dataclasses.field(default_factory=TrainerConfig)
    pretrained_checkpoint: PretrainedCheckpoint = dataclasses.field(default_factory=PretrainedCheckpoint)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    exp_manager: ExpManager = dataclasses.field(default_factory=ExpManager)


class ConfigError(ValueError):
    """A configuration that cannot run; the message is one line with the key, the value and the remedy."""
