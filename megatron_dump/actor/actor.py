"""The policy on megatron-core: forward and backward through Megatron's schedules, one optimizer step a call."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_dump import grpo
from megatron_dump.actor import batching, context, convert, memory
from megatron_dump.actor.architecture import read_architecture
from megatron_dump.actor.batching import MicroBatch
from megatron_dump.actor.forward import LossOf, run_schedule
from megatron_dump.actor.logprobs import vocab_parallel_logprobs
from megatron_dump.actor.loss_options import loss_options
from megatron_dump.actor.model import build_model, transformer_config
from megatron_dump.actor.offload import offloaded
from megatron_dump.actor.optimizer import build_optimizer, data_parallel
from megatron_dump.actor.parallel import Parallel
from megatron_dump.actor.reference import ReferenceWeights
from megatron_dump.config import Config
from megatron_dump.types import Completion, TrainBatch


class MegatronGPTGRPOActor:
    """The trained policy and, kept on CPU, its frozen reference.

    Every method is a collective: all ranks call it with their data-parallel share, the ranks of one replica (tensor,
    pipeline and context parallel) with the same arguments.
    """

    def __init__(self, config: Config, parallel: Parallel) -> None:
        model, trainer = config.model, config.trainer
        self.parallel, self.options = parallel, model
        self.micro_batch_size = model.micro_batch_size
        self.forward_micro_batch_size = model.grpo.forward_micro_batch_size or model.micro_batch_size
        self.temperature = model.grpo.sampling_params.temperature
        self.loss = loss_options(config)
        self.offload_adam_states = model.grpo.offload_adam_states
        path = config.pretrained_checkpoint.restore_from_path
        self.arch = read_architecture(path, model.make_vocab_size_divisible_by, parallel.tensor_size)
        self.transformer_config = transformer_config(self.arch, parallel, trainer.precision, model)
        chunks = range(parallel.layout.virtual_pipeline or 1)
        self.modules = [build_model(self.arch, self.transformer_config, parallel, chunk=chunk) for chunk in chunks]
        convert.load_hf(self.modules, self.arch, parallel, path)
        self.reference = ReferenceWeights(self.modules) if trainer.grpo.initial_policy_kl_penalty > 0 else None
        self.models = data_parallel(self.modules, self.transformer_config, model)
        self.optimizer, self.scheduler = build_optimizer(config, self.models)
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

        The batch is filled up to at least `n_rows` rows, and to whole micro-batches.
        """
        layout = self.parallel.layout
        unit = math.lcm(self.micro_batch_size, self.forward_micro_batch_size) * layout.micro_batch_unit
        rows = -(-max(len(completions), n_rows or 1) // unit) * unit
        pad_to = math.lcm(batching.PAD_TO, layout.length_unit)
        return batching.pad_rollouts(prompts, completions, advantages, global_tokens, weights, rows, pad_to)

    def train_step(self, batch: TrainBatch) -> dict[str, float]:
        """One optimizer step on this rank's share of a global mini-batch; metrics equal on all ranks.

        Those of the loss (`LossOptions.metrics`) and `actor/entropy` are means over the sampled tokens of the global
        mini-batch.
        """
        for model in self.models:
            model.train()
            model.zero_grad_buffer()
        self.optimizer.zero_grad()
        n_micro = len(batch.tokens) // self.micro_batch_size
        # The schedule divides by the number of micro-batches and DDP averages over ranks: undo both, so that the sum
        # over all ranks and micro-batches is the loss over the global mini-batch.
        scale = n_micro * self.parallel.data_size

        def loss_of(logits: Tensor, micro: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
            logprobs, entropy = self._logprobs(logits, micro.tokens)
            old = logprobs.detach() if micro.old_logprobs is None else micro.old_logprobs
            loss, sums = grpo.policy_loss(
                logprobs, old, micro.advantages, micro.mask, batch.global_tokens, self.loss, weights=micro.weights,
                ref_logprobs=micro.ref_logprobs, rollout_logprobs=micro.rollout_logprobs, entropy=entropy,
            )  # fmt: skip
            difference = (old - micro.rollout_logprobs).abs() * micro.mask  # generator against trainer, same weights
            sums["actor/entropy"] = (entropy.detach() * micro.mask).sum()
            sums["actor/logprobs"] = (logprobs.detach() * micro.mask).sum()
            sums["rollout/logprob_diff_mean"] = difference.sum()
            return loss * scale, {**sums, "rollout/logprob_diff_max": difference.max()}

        outputs = self._run(batch, self.micro_batch_size, loss_of, forward_only=False)
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
        """Log-probabilities of `batch.tokens` under the policy or its reference: float32 [N, T], column 0 is 0.

        On the last pipeline stage; None on the others, which have no use for it.
        """
        for model in self.models:
            model.eval()
        if reference and self.reference is None:
            raise ValueError("trainer.grpo.initial_policy_kl_penalty=0: no reference policy is kept")
        with self.reference.loaded() if reference and self.reference else contextlib.nullcontext():
            outputs = self._run(
                batch, self.forward_micro_batch_size,
                lambda logits, micro: (logits.new_zeros(()),
                                       {"rows": micro.rows, "logprobs": self._logprobs(logits, micro.tokens)[0]}),
                forward_only=True,
            )  # fmt: skip
        if not self.parallel.is_last_stage:
            return None
        logprobs = np.zeros(batch.tokens.shape, np.float32)
        for output in outputs:
            values = output["logprobs"].cpu().numpy()
            logprobs[output["rows"], : values.shape[1]] = values
        return logprobs

    def generating(self) -> contextlib.AbstractContextManager[None]:
        """Inside the block completions are generated and nothing is trained."""
        return offloaded(self.optimizer, self.models) if self.offload_adam_states else contextlib.nullcontext()

    def memory_usage(self) -> dict[str, float]:
        """`perf/memory_…`: the largest of all ranks."""
        return memory.usage(self.parallel.device)

    def memory_report(self) -> list[str]:
        """What parameters, gradients, optimizer and reference take on each rank, in lines."""
        return memory.report(memory.held(self.models, self.optimizer, self.reference), self.parallel.device)

    def save_hf(self, path: str) -> None:
        """Write the policy as a Hugging Face folder."""
        convert.save_hf(self.modules, self.arch, self.parallel, path)

    def _logprobs(self, logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probability of each token given those before it, and the entropy there: [B, T], column 0 is 0.

        logits [B, T / context-parallel size, V / tensor-parallel size] of this rank's positions.
        """
        place, length = self.parallel, tokens.size(1)
        held = context.positions(length, place.context_group, tokens.device)
        both = vocab_parallel_logprobs(
            logits, tokens.roll(-1, 1)[:, held], place.tensor_group, place.tensor_rank,
            self.arch.vocab_size, self.temperature,
        )  # fmt: skip
        # The last position has no next token.
        rows = (F.pad(context.spread(values, length, place.context_group)[:, :-1], (1, 0)) for values in both)
        logprobs, entropy = rows
        return logprobs, entropy

    def _run(
        self, batch: TrainBatch, micro_batch_size: int, loss_of: LossOf, forward_only: bool
    ) -> list[dict[str, Any]]:
        """All micro-batches of a batch through the schedule; what `loss_of` reported of each, on the last stage."""
        layout = self.parallel.layout
        # The interleaved schedule wants one length.
        pad_to = batch.tokens.shape[1] if layout.virtual_pipeline else math.lcm(batching.PAD_TO, layout.length_unit)
        micros = batching.micro_batches(batch, micro_batch_size, self.parallel.device, pad_to)
        return run_schedule(self.models, self.parallel, micros, loss_of, forward_only)

    def _reduce(self, outputs: list[dict[str, Tensor]]) -> dict[str, float]:
        """Sum over micro-batches and data-parallel ranks (a maximum for `*_max`), known to every rank."""
        names = self.loss.metrics + _METRICS
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


_METRICS = ("actor/entropy", "actor/logprobs", "rollout/logprob_diff_mean")
