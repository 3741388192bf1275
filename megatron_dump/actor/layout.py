"""How one replica of the model is split, read from the configuration, and what does not go together."""

from __future__ import annotations

import dataclasses

import torch

from megatron_dump.actor.architecture import Architecture, read_architecture
from megatron_dump.actor.transformer_engine import transformer_engine_runs
from megatron_dump.config import Config, ConfigError, ModelConfig, check_world


@dataclasses.dataclass(frozen=True)
class Layout:
    """How one replica of the model is split, in Megatron's terms."""

    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int | None = None  # model chunks on each pipeline stage (interleaved schedule)
    context: int = 1
    expert: int = 1
    expert_tensor: int = 1  # ranks that share one expert
    sequence: bool = False  # activations between tensor-parallel regions are split along the sequence

    @property
    def sizes(self) -> dict[str, int | None]:
        """The same by megatron-core's names, for TransformerConfig and initialize_model_parallel."""
        return {
            "tensor_model_parallel_size": self.tensor,
            "pipeline_model_parallel_size": self.pipeline,
            "virtual_pipeline_model_parallel_size": self.virtual_pipeline,
            "context_parallel_size": self.context,
            "expert_model_parallel_size": self.expert,
            "expert_tensor_parallel_size": self.expert_tensor,
        }

    @property
    def replica_size(self) -> int:
        """Ranks that together hold one copy of the model and work on the same rollouts."""
        return self.tensor * self.pipeline * self.context

    @property
    def length_unit(self) -> int:
        """What the length of a padded sequence must be a multiple of: equal shares, and two chunks a context rank."""
        return (self.tensor if self.sequence else 1) * (2 * self.context if self.context > 1 else 1)

    @property
    def micro_batch_unit(self) -> int:
        """What the number of micro-batches must be a multiple of: the interleaved schedule goes round the stages."""
        return self.pipeline if self.virtual_pipeline else 1


def layout_of(model: ModelConfig) -> Layout:
    """The layout of `model:`. ConfigError for what goes with no model on any number of ranks here."""
    tensor, pipeline, virtual = (
        model.tensor_model_parallel_size,
        model.pipeline_model_parallel_size,
        model.virtual_pipeline_model_parallel_size,
    )
    layout = Layout(
        tensor=tensor,
        pipeline=pipeline,
        virtual_pipeline=virtual,
        context=model.context_parallel_size,
        expert=model.expert_model_parallel_size,
        expert_tensor=model.expert_tensor_parallel_size or tensor,  # Megatron's default
        sequence=model.sequence_parallel,
    )
    if virtual is not None and pipeline == 1:
        raise ConfigError(
            f"model.virtual_pipeline_model_parallel_size={virtual}: an interleaved pipeline needs "
            "model.pipeline_model_parallel_size of at least 2; set it, or virtual_pipeline_model_parallel_size to null"
        )
    if virtual == 1:
        raise ConfigError(
            "model.virtual_pipeline_model_parallel_size=1: one chunk a stage is the plain pipeline; set it to null"
        )
    if layout.sequence and tensor == 1:
        raise ConfigError(
            "model.sequence_parallel=true: it splits the sequence over tensor ranks, and "
            "model.tensor_model_parallel_size=1; set it to false"
        )
    if layout.expert > 1 and layout.expert_tensor > 1 and not torch.cuda.is_available():
        raise ConfigError(
            f"model.expert_tensor_parallel_size={layout.expert_tensor}: gloo, the CPU's backend, cannot exchange "
            f"tokens between split experts at model.expert_model_parallel_size={layout.expert}; set it to 1"
        )
    return layout


def check_layout(layout: Layout, world_size: int) -> int:
    """The data-parallel size of a layout; ValueError with the sum when it does not work out."""
    factors = {"tensor_model_parallel_size": layout.tensor, "pipeline_model_parallel_size": layout.pipeline}
    if layout.context > 1:
        factors["context_parallel_size"] = layout.context
    ranks = layout.replica_size
    if world_size % ranks:
        lower, upper = world_size // ranks * ranks, -(-world_size // ranks) * ranks
        fits = " or ".join(str(n) for n in (lower, upper) if n)
        product = " × ".join(f"model.{key}={size}" for key, size in factors.items())
        raise ValueError(
            f"{product} = {ranks} ranks a replica, which does not divide the world size {world_size}: start {fits} "
            "ranks (trainer.num_nodes × trainer.devices, torchrun --nproc-per-node) or change the layout"
        )
    stage, experts = world_size // layout.pipeline, layout.expert * layout.expert_tensor
    if layout.expert > 1 and stage % experts:
        raise ValueError(
            f"model.expert_model_parallel_size={layout.expert} × model.expert_tensor_parallel_size="
            f"{layout.expert_tensor} = {experts} does not divide the {stage} ranks of a pipeline stage (world size "
            f"{world_size} / model.pipeline_model_parallel_size={layout.pipeline}): choose a divisor"
        )
    return world_size // ranks


def check_model(arch: Architecture, layout: Layout) -> None:
    """ValueError, one line, when this model cannot be split this way."""
    hf, chunks = arch.hf, layout.pipeline * (layout.virtual_pipeline or 1)
    for name, size in (("attention heads", hf.num_attention_heads), ("key/value heads", hf.num_key_value_heads)):
        if size % layout.tensor:
            raise ValueError(
                f"model.tensor_model_parallel_size={layout.tensor} does not divide the model's {size} {name}: lower it"
            )
    if hf.num_hidden_layers % chunks:
        raise ValueError(
            f"model.pipeline_model_parallel_size={layout.pipeline} × model.virtual_pipeline_model_parallel_size="
            f"{layout.virtual_pipeline or 1} = {chunks} does not divide the model's {hf.num_hidden_layers} layers: "
            "choose a divisor"
        )
    if layout.expert > 1 and arch.experts is None:
        raise ValueError(
            f"model.expert_model_parallel_size={layout.expert}: {hf.model_type} has no experts; set it to 1"
        )
    if arch.experts is None:
        return
    if arch.experts.number % layout.expert:
        raise ValueError(
            f"model.expert_model_parallel_size={layout.expert} does not divide the model's {arch.experts.number} "
            "experts: choose a divisor"
        )
    if layout.tensor > 1 and not layout.sequence:
        raise ValueError(
            f"model.sequence_parallel=false: megatron-core trains experts at tensor_model_parallel_size="
            f"{layout.tensor} with sequence parallelism only; set it to true"
        )


def check_run(config: Config, layout: Layout, data_parallel_size: int, has_experts: bool) -> None:
    """What a layout asks of batches and generation, and a run of the machine. ConfigError names the remedy."""
    _check_accelerator(config.trainer.accelerator)
    model, pipeline = config.model, layout.pipeline
    if layout.virtual_pipeline and model.dynamic_batching.enabled:
        raise ConfigError(
            "model.dynamic_batching.enabled=true: an interleaved pipeline (virtual_pipeline_model_parallel_size="
            f"{layout.virtual_pipeline}) takes micro-batches of one shape; set one of them to false or null"
        )
    if model.share_prompts:
        _check_shared_prompts(model, layout, has_experts)
    share = model.global_batch_size // data_parallel_size
    for key, size in (
        ("model.micro_batch_size", model.micro_batch_size),
        ("model.grpo.forward_micro_batch_size", model.grpo.forward_micro_batch_size or model.micro_batch_size),
    ):
        if layout.virtual_pipeline and share // size % pipeline:
            raise ConfigError(
                f"{key}={size} cuts the {share} rollouts of a data-parallel rank into {share // size} micro-batches; "
                f"an interleaved pipeline (virtual_pipeline_model_parallel_size={layout.virtual_pipeline}) wants a "
                f"multiple of model.pipeline_model_parallel_size={pipeline}: change it, or model.global_batch_size"
            )
    reshard = config.trainer.grpo.inference_backend.reshard
    if reshard == "pipeline" and has_experts:
        raise ConfigError(
            "trainer.grpo.inference_backend.reshard=pipeline: the model has experts; set it to true, false or auto"
        )
    if reshard:
        return
    for key, size in (
        ("virtual_pipeline_model_parallel_size", layout.virtual_pipeline or 1),
        ("context_parallel_size", layout.context),
    ):
        if size > 1:
            raise ConfigError(
                f"model.{key}={size}: generation cannot step through this split; set "
                "trainer.grpo.inference_backend.reshard=true"
            )


def _check_accelerator(asked: str) -> None:
    there = "gpu" if torch.cuda.is_available() else "cpu"
    if asked not in ("auto", there):
        remedy = "hide the GPUs with CUDA_VISIBLE_DEVICES=" if asked == "cpu" else "none is visible"
        raise ConfigError(f"trainer.accelerator={asked}: the ranks use {there}s here; {remedy}, or set it to auto")


def _check_shared_prompts(model: ModelConfig, layout: Layout, has_experts: bool) -> None:
    """ConfigError for what needs rollouts in rows by themselves."""
    fused = model.transformer_impl != "local" and transformer_engine_runs()
    of_tokens = "it is of the tokens that the router sees, of which there would be fewer"
    for needed, key, value, without, why in (
        (layout.context > 1, "context_parallel_size", layout.context, "1", "it cuts every rollout into equal chunks"),
        (
            layout.virtual_pipeline is not None,
            "virtual_pipeline_model_parallel_size",
            layout.virtual_pipeline,
            "null",
            "an interleaved pipeline takes micro-batches of one shape",
        ),
        (has_experts and model.moe_aux_loss_coeff, "moe_aux_loss_coeff", model.moe_aux_loss_coeff, "0", of_tokens),
        (has_experts and model.moe_z_loss_coeff, "moe_z_loss_coeff", model.moe_z_loss_coeff, "null", of_tokens),
        (fused, "transformer_impl", model.transformer_impl, "local", "Transformer Engine has not been run with it"),
    ):
        if needed:
            raise ConfigError(
                f"model.share_prompts=true: not with model.{key}={value}: {why}; set it to {without}, or share_prompts "
                "to false"
            )


def check_all(config: Config, world_size: int, on_any_ranks: bool = False) -> tuple[Layout, int, Architecture]:
    """The layout of `world_size` ranks, its replicas, and the model of config.json; ConfigError for what cannot run.

    on_any_ranks: `world_size` need not be the configured one, as for an evaluation.
    """
    layout = layout_of(config.model)
    replicas = check_layout(layout, world_size)
    if not on_any_ranks:
        check_world(config, world_size, replicas)
    path = config.pretrained_checkpoint.restore_from_path
    arch = read_architecture(path, config.model.make_vocab_size_divisible_by, layout.tensor)
    check_model(arch, layout)
    check_run(config, layout, replicas, arch.experts is not None)
    return layout, replicas, arch
