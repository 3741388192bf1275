"""The schema of the YAML. Keys follow NeMo-Aligner's gpt_grpo.yaml; ours are in `trainer.grpo.curriculum`.

examples/conf/gpt_grpo.yaml documents every key. Unknown keys are errors.
"""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

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
class InferenceBackendConfig:
    type: str = "megatron"
    reshard: bool = False
    path: str | None = None
    record: str | None = None


@dataclasses.dataclass
class GRPOConfig:
    max_steps: int = 100
    num_prompts_per_grpo_step: int = 16
    samples_per_prompt: int = 8
    val_check_interval: int = 0
    val_samples_per_prompt: int = 4
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
    precision: str = "32"
    collective_timeout_s: float = 600.0
    grpo: GRPOConfig = dataclasses.field(default_factory=GRPOConfig)


@dataclasses.dataclass
class SamplingParams:
    use_greedy: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


@dataclasses.dataclass
class LengthParams:
    max_length: int = 128


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
class ExpManager:
    explicit_log_dir: str = MISSING
    resume_if_exists: bool = True
    resume_from_checkpoint: str | None = None
    checkpoint_callback_params: CheckpointCallbackParams = dataclasses.field(default_factory=CheckpointCallbackParams)
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


def load(raw: DictConfig) -> Config:
    """Check `raw` against the schema and return it typed. ConfigError for anything that cannot run."""
    schema = OmegaConf.structured(Config)
    try:
        config = OmegaConf.to_object(OmegaConf.merge(schema, raw))
    except ConfigKeyError as error:
        raise ConfigError(unknown_key(str(error.full_key))) from None
    except MissingMandatoryValue as error:
        raise ConfigError(f"{error.full_key}: no value; set it in the YAML or as {error.full_key}=…") from None
    except OmegaConfBaseException as error:
        hint = "; give a list: [file.parquet]" if "ListConfig" in str(error) else ""
        raise ConfigError(f"{error.full_key}: {str(error).splitlines()[0]}{hint}") from None
    assert isinstance(config, Config)
    validate(config)
    return config


_FREE_ON_RESUME = (  # how far, how fast and where a run goes; not what it computes
    "trainer.num_nodes trainer.devices trainer.collective_timeout_s trainer.grpo.max_steps "
    "trainer.grpo.val_check_interval trainer.grpo.val_samples_per_prompt trainer.grpo.save_interval "
    "trainer.grpo.run_validation_step_0 trainer.grpo.inference_backend trainer.grpo.curriculum "
    "model.tensor_model_parallel_size model.pipeline_model_parallel_size model.virtual_pipeline_model_parallel_size "
    "model.context_parallel_size model.expert_model_parallel_size model.expert_tensor_parallel_size "
    "model.sequence_parallel model.transformer_impl model.recompute_granularity model.recompute_method "
    "model.recompute_num_layers model.overlap_grad_reduce model.micro_batch_size "
    "model.make_vocab_size_divisible_by model.dynamic_batching model.grpo.logprob_chunk_size "
    "model.grpo.forward_micro_batch_size model.grpo.offload_adam_states model.grpo.generation_rollout_mbs "
    "model.data.train_files "
    "model.data.validation_files model.data.max_prompt_length model.data.reward_workers exp_manager"
).split()


def lasting(config: Config) -> dict[str, Any]:
    """{dotted key: value} of everything a resumed run must share with the run it continues.

    Files are compared by what is in them (the curriculum's fingerprint), not by name; the curriculum compares its own
    settings, all defaults filled in.
    """
    flat: dict[str, Any] = {}

    def walk(node: Any, prefix: str) -> None:
        for name, value in node.items():
            key = f"{prefix}{name}"
            if key in _FREE_ON_RESUME:
                continue
            if isinstance(value, dict):
                walk(value, f"{key}.")
            else:
                flat[key] = value

    walk(dataclasses.asdict(config), "")
    return flat


def unknown_key(key: str) -> str:
    """One line for a key the schema does not have, naming the nearest it has."""
    known = _keys(OmegaConf.structured(Config))
    if key.lstrip("+") in known:
        return f"{key}: the key is there already; write it without +"
    leaf_matches = [k for k in known if k.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
    near = leaf_matches or difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"unknown key {key}{hint} (examples/conf/gpt_grpo.yaml lists every key)"


def _keys(node: DictConfig, prefix: str = "") -> list[str]:
    keys = []
    for name in node:
        full = f"{prefix}{name}"
        keys.append(full)
        value = None if OmegaConf.is_missing(node, name) else node[name]
        if isinstance(value, DictConfig):
            keys += _keys(value, full + ".")
    return keys


def validate(config: Config) -> None:
    """Checks that need no other rank and no file. ConfigError names key, value and remedy."""
    grpo, model = config.trainer.grpo, config.model
    positive = {
        "trainer.grpo.max_steps": grpo.max_steps,
        "trainer.grpo.num_prompts_per_grpo_step": grpo.num_prompts_per_grpo_step,
        "trainer.grpo.val_samples_per_prompt": grpo.val_samples_per_prompt,
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
    if grpo.inference_backend.type not in ("megatron", "recorded"):
        raise ConfigError(
            f"trainer.grpo.inference_backend.type={grpo.inference_backend.type}: known are megatron and recorded"
        )
    if grpo.inference_backend.type == "recorded" and not grpo.inference_backend.path:
        raise ConfigError("trainer.grpo.inference_backend.path: no value; name the folder of recorded completions")
    if model.optim.name != "distributed_fused_adam":
        raise ConfigError(f"model.optim.name={model.optim.name}: only distributed_fused_adam is known")
    if model.optim.sched.name not in ("constant", "cosine", "linear"):
        raise ConfigError(f"model.optim.sched.name={model.optim.sched.name}: known are constant, cosine and linear")
    if not model.data.train_files:
        raise ConfigError("model.data.train_files=[]: name at least one parquet file")
    _check_batches(config)
    _check_checkpoints(config)


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
        "trainer.grpo.initial_policy_kl_penalty": grpo.initial_policy_kl_penalty,
        "trainer.grpo.gradient_clip_val": grpo.gradient_clip_val,
        "trainer.grpo.val_check_interval": grpo.val_check_interval,
        "trainer.grpo.save_interval": grpo.save_interval,
        "model.moe_aux_loss_coeff": model.moe_aux_loss_coeff,
        "model.moe_z_loss_coeff": model.moe_z_loss_coeff or 0.0,
        "model.optim.lr": optim.lr,
        "model.optim.sched.warmup_steps": optim.sched.warmup_steps,
    }
    for key, value in not_negative.items():
        if value < 0:
            raise ConfigError(f"{key}={value}: must not be negative")
    if model.grpo.sampling_params.top_p > 1:
        raise ConfigError(f"model.grpo.sampling_params.top_p={model.grpo.sampling_params.top_p}: must be at most 1")
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


def _check_checkpoints(config: Config) -> None:
    manager, grpo, prefix = config.exp_manager, config.trainer.grpo, "exp_manager.checkpoint_callback_params"
    params = manager.checkpoint_callback_params
    if params.save_top_k < -1 or params.save_top_k == 0:
        raise ConfigError(
            f"{prefix}.save_top_k={params.save_top_k}: must be at least 1, or -1 to keep every checkpoint "
            "(trainer.grpo.save_interval=0 writes none)"
        )
    if params.mode not in ("max", "min"):
        raise ConfigError(f"{prefix}.mode={params.mode}: known are max and min")
    if manager.resume_from_checkpoint and not manager.resume_if_exists:
        raise ConfigError(
            f"exp_manager.resume_from_checkpoint={manager.resume_from_checkpoint}: exp_manager.resume_if_exists=false "
            "forbids it; set it to true"
        )
    if params.monitor is None or grpo.save_interval == 0:
        return
    if not config.model.data.validation_files:
        raise ConfigError(f"{prefix}.monitor={params.monitor}: name model.data.validation_files to measure it on")
    if grpo.val_check_interval == 0 or grpo.save_interval % grpo.val_check_interval:
        raise ConfigError(
            f"{prefix}.monitor={params.monitor}: trainer.grpo.save_interval={grpo.save_interval} must be a multiple "
            f"of trainer.grpo.val_check_interval={grpo.val_check_interval}, so that every checkpoint has been validated"
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
