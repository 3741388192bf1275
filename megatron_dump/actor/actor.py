"""The policy on megatron-core: forward and backward through Megatron's schedules, one optimizer step a call."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_dump import grpo
from megatron_dump.actor import batching, convert
from megatron_dump.actor.batching import MicroBatch
from megatron_dump.actor.logprobs import hidden_logprobs, hidden_states_as_output, output_weight
from megatron_dump.actor.model import build_model, read_architecture, transformer_config
from megatron_dump.actor.parallel import Parallel
from megatron_dump.config import Config
from megatron_dump.distributed import all_gather_array, fail_together
from megatron_dump.types import Completion, TrainBatch


class MegatronGPTGRPOActor:
    """The trained policy and, kept on CPU, its frozen reference.

    Every method is a collective: all ranks call it with their data-parallel share, ranks of one model replica with the
    same arguments.
    """

    def __init__(self, config: Config, parallel: Parallel) -> None:
        model, trainer = config.model, config.trainer
        self.parallel = parallel
        self.micro_batch_size = model.micro_batch_size
        self.forward_micro_batch_size = model.grpo.forward_micro_batch_size or model.micro_batch_size
        self.dynamic = model.dynamic_batching
        self.pad_to = self.dynamic.sequence_length_round if self.dynamic.enabled else batching.PAD_TO
        self.temperature = model.grpo.sampling_params.temperature
        self.logprob_chunk_size = model.grpo.logprob_chunk_size
        self.ratio_eps = (model.grpo.ratio_eps_low, model.grpo.ratio_eps_high)
        self.kl_penalty = trainer.grpo.initial_policy_kl_penalty
        path = config.pretrained_checkpoint.restore_from_path
        self.arch = read_architecture(path, model.make_vocab_size_divisible_by, parallel.tensor_size)
        self.transformer_config = transformer_config(self.arch, parallel, trainer.precision)
        self.modules = [build_model(self.arch, self.transformer_config, parallel)]  # the chunks of this stage
        convert.load_hf(self.modules, self.arch, parallel, path)
        self.reference = self._cpu_weights() if self.kl_penalty > 0 else None
        ddp = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
        self.models = [DistributedDataParallel(self.transformer_config, ddp, module) for module in self.modules]
        self.optimizer = get_megatron_optimizer(_optimizer_config(config), self.models)
        self.scheduler = _scheduler(config, self.optimizer)
        self.transformer_config.finalize_model_grads_func = finalize_model_grads
        self.transformer_config.grad_scale_func = self.optimizer.scale_loss
        self.version = 0  # optimizer steps taken: the policy_version of what is generated now

    @property
    def module(self) -> torch.nn.Module:
        """The only model chunk of this stage. ValueError when the interleaved pipeline gives it several."""
        (module,) = self.modules
        return module

    def make_batch(
        self,
        prompts: Sequence[np.ndarray],
        completions: Sequence[Completion],
        advantages: np.ndarray,
        global_tokens: float,
        weights: np.ndarray | None = None,
        n_rows: int | None = None,
    ) -> TrainBatch:
        """Rollouts as this actor wants them: prompts[i] and completions[i] make row i.

        The batch is filled up to at least `n_rows` rows, and to whole micro-batches; dynamic ones need no filling.
        """
        unit = math.lcm(self.micro_batch_size, self.forward_micro_batch_size)
        rows = -(-max(len(completions), n_rows or 1) // unit) * unit
        if self.dynamic.enabled:
            rows = max(len(completions), 1)
        return batching.pad_rollouts(prompts, completions, advantages, global_tokens, weights, rows, self.pad_to)

    def train_step(self, batch: TrainBatch) -> dict[str, float]:
        """One optimizer step on this rank's share of a global mini-batch; metrics equal on all ranks.

        `actor/pg_loss`, `actor/kl_loss`, `actor/loss`, `actor/entropy`, `actor/pg_clipfrac` are means over the sampled
        tokens of the global mini-batch.
        """
        for model in self.models:
            model.train()
            model.zero_grad_buffer()
        self.optimizer.zero_grad()
        micros = self._micro_batches(batch, self.micro_batch_size, self.dynamic.train_mb_tokens)
        # The schedule divides by the number of micro-batches and DDP averages over ranks: undo both, so that the sum
        # over all ranks and micro-batches is the loss over the global mini-batch.
        scale = len(micros) * self.parallel.data_size

        def loss_of(hidden: Tensor, micro: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
            logprobs, entropy = self._logprobs(hidden, micro)
            old = logprobs.detach() if micro.old_logprobs is None else micro.old_logprobs
            loss, sums = grpo.policy_loss(
                logprobs, old, micro.advantages, micro.mask, batch.global_tokens, *self.ratio_eps,
                ref_logprobs=micro.ref_logprobs, kl_penalty=self.kl_penalty, weights=micro.weights,
            )  # fmt: skip
            difference = (old - micro.rollout_logprobs).abs() * micro.mask  # generator against trainer, same weights
            sums["actor/entropy"] = (entropy.detach() * micro.mask).sum()
            sums["actor/logprobs"] = (logprobs.detach() * micro.mask).sum()
            sums["rollout/logprob_diff_mean"] = difference.sum()
            return loss * scale, {**sums, "rollout/logprob_diff_max": difference.max()}

        outputs = self._run(batch, micros, loss_of, forward_only=False)
        updated, grad_norm, _ = self.optimizer.step()
        if not updated or not math.isfinite(grad_norm):
            raise FloatingPointError(
                f"actor/grad_norm={grad_norm} at optimizer step {self.version}: the weights are no longer valid; "
                "continue from the latest checkpoint with a lower model.optim.lr"
            )
        metrics = {k: v / batch.global_tokens if k != "rollout/logprob_diff_max" else v
                   for k, v in self._reduce(outputs).items()}  # fmt: skip
        metrics |= {"actor/grad_norm": float(grad_norm), "actor/lr": self.optimizer.param_groups[0]["lr"]}
        self.scheduler.step(increment=1)
        self.version += 1
        return metrics

    @torch.no_grad()
    def compute_logprobs(self, batch: TrainBatch, reference: bool = False) -> np.ndarray | None:
        """Log-probabilities of the sampled tokens under the policy or its reference: float32 [N, T].

        0 outside the mask. On the last pipeline stage; None on the others, which have no use for it.
        """
        for model in self.models:
            model.eval()
        budget = self.dynamic.logprob_mb_tokens or self.dynamic.train_mb_tokens
        micros = self._micro_batches(batch, self.forward_micro_batch_size, budget)
        with self._reference_weights() if reference else contextlib.nullcontext():
            outputs = self._run(
                batch, micros,
                lambda hidden, micro: (hidden.new_zeros(()),
                                       {"rows": micro.rows, "logprobs": self._logprobs(hidden, micro)[0]}),
                forward_only=True,
            )  # fmt: skip
        if not self.parallel.is_last_stage:
            return None
        logprobs = np.zeros(batch.tokens.shape, np.float32)
        for output in outputs:
            rows, values = output["rows"], output["logprobs"].cpu().numpy()
            logprobs[rows, : values.shape[1]] = values[: len(rows)]  # behind them: rows that fill up
        return logprobs

    def save_hf(self, path: str) -> None:
        """Write the policy as a Hugging Face folder."""
        convert.save_hf(self.modules, self.arch, self.parallel, path)

    def _logprobs(self, hidden: Tensor, micro: MicroBatch) -> tuple[Tensor, Tensor]:
        """Log-probability of each sampled token given those before it, and the entropy there: [B, T], 0 elsewhere.

        hidden [S, B, H]: only those in front of a sampled token meet the output layer.
        """
        rows, places = micro.sampled // micro.tokens.size(1), micro.sampled % micro.tokens.size(1)
        both = hidden_logprobs(
            hidden.flatten(0, 1).index_select(0, (places - 1) * hidden.size(1) + rows),
            output_weight(self.modules[-1]), micro.tokens.flatten()[micro.sampled],
            self.parallel.tensor_group, self.parallel.tensor_rank, self.arch.vocab_size,
            self.temperature, self.logprob_chunk_size,
        )  # fmt: skip
        logprobs, entropy = (
            values.new_zeros(micro.tokens.numel()).index_copy(0, micro.sampled, values).view_as(micro.tokens)
            for values in both
        )
        return logprobs, entropy

    def _micro_batches(self, batch: TrainBatch, size: int, budget: int) -> list[MicroBatch]:
        """Of `size` rows, or under a `budget` of tokens and then as many on every data-parallel rank."""
        lengths = batching.used_lengths(batch)
        if self.dynamic.enabled:
            group, device = self.parallel.data_group, self.parallel.device
            with fail_together("model.dynamic_batching", group, device):
                parts = batching.under_budget(lengths, budget, self.pad_to)
            n = int(all_gather_array(np.array([len(parts)]), group, device).max())
            unit = self.parallel.pipeline_size if self.parallel.layout.virtual_pipeline else 1
            parts = batching.split_into(parts, lengths, -(-n // unit) * unit)
        else:
            parts = batching.equal_rows(lengths, size)
        return [batching.cut(batch, rows, self.parallel.device, self.pad_to) for rows in parts]

    def _run(
        self,
        batch: TrainBatch,
        micros: list[MicroBatch],
        loss_of: Callable[[Tensor, MicroBatch], tuple[Tensor, dict[str, Any]]],
        forward_only: bool,
    ) -> list[dict[str, Any]]:
        """All micro-batches through the pipeline schedule; what `loss_of` reported of each, on the last stage."""

        def forward_step(data: Iterator[MicroBatch], model: torch.nn.Module) -> tuple[Tensor, Callable]:
            micro = next(data)
            positions = torch.arange(micro.tokens.size(1), device=micro.tokens.device).expand_as(micro.tokens)
            with hidden_states_as_output(unwrap_model(model)):
                output = model(input_ids=micro.tokens, position_ids=positions, attention_mask=None)
            return output, lambda hidden: loss_of(hidden, micro)

        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(micros),
            model=self.models[0],
            num_microbatches=len(micros),
            seq_length=batch.tokens.shape[1],
            micro_batch_size=len(micros[0].tokens),
            decoder_seq_length=batch.tokens.shape[1],
            forward_only=forward_only,
        )

    def _reduce(self, outputs: list[dict[str, Tensor]]) -> dict[str, float]:
        """Sum over micro-batches and data-parallel ranks (a maximum for `*_max`), known to every rank."""
        names = _METRICS + (("actor/kl_loss",) if self.reference is not None else ())
        sums = torch.zeros(len(names), dtype=torch.float64, device=self.parallel.device)
        largest = torch.zeros(1, dtype=torch.float64, device=self.parallel.device)
        if self.parallel.is_last_stage:
            sums = torch.stack([torch.stack([o[n] for o in outputs]).double().sum() for n in names])
            largest = torch.stack([o["rollout/logprob_diff_max"] for o in outputs]).max().double()[None]
            dist.all_reduce(sums, group=self.parallel.data_group)
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.parallel.data_group)
        packed = torch.cat([sums, largest])
        dist.broadcast(packed, self.parallel.last_stage_rank, group=self.parallel.pipeline_group)
        return dict(zip((*names, "rollout/logprob_diff_max"), packed.tolist(), strict=True))

    def _cpu_weights(self) -> list[Tensor]:
        return [p.detach().to("cpu", copy=True) for module in self.modules for p in module.parameters()]

    @contextlib.contextmanager
    def _reference_weights(self) -> Iterator[None]:
        """The model holds the reference's weights inside the block."""
        if self.reference is None:
            raise ValueError("trainer.grpo.initial_policy_kl_penalty=0: no reference policy is kept")
        # Parameters are views of the distributed optimizer's buffer: their contents are swapped, not their storage.
        policy = self._cpu_weights()
        self._fill(self.reference)
        try:
            yield
        finally:
            self._fill(policy)

    @torch.no_grad()
    def _fill(self, weights: list[Tensor]) -> None:
        parameters = [p for module in self.modules for p in module.parameters()]
        for parameter, weight in zip(parameters, weights, strict=True):
            parameter.copy_(weight)


_METRICS = (
    "actor/pg_loss", "actor/loss", "actor/pg_clipfrac", "actor/entropy", "actor/logprobs", "rollout/logprob_diff_mean",
)  # fmt: skip


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
        use_distributed_optimizer=True,
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
        lr_decay_steps=max(steps, optim.sched.warmup_steps + 1),
        lr_decay_style=optim.sched.name,
        start_wd=optim.weight_decay,
        end_wd=optim.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,  # a longer max_steps stretches the schedule of a resumed run
    )
