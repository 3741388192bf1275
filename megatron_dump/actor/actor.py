"""The policy on megatron-core: forward and backward through Megatron's schedules, one optimizer step a call."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dump import grpo
from megatron_dump.actor import batching, context, convert, memory
from megatron_dump.actor.architecture import read_architecture
from megatron_dump.actor.batching import MicroBatch
from megatron_dump.actor.forward import run_schedule
from megatron_dump.actor.logprobs import hidden_logprobs, output_weight
from megatron_dump.actor.loss_options import loss_options
from megatron_dump.actor.model import build_model, transformer_config
from megatron_dump.actor.offload import offloaded
from megatron_dump.actor.optimizer import build_optimizer, data_parallel
from megatron_dump.actor.parallel import Parallel
from megatron_dump.actor.reference import ReferenceWeights
from megatron_dump.config import Config
from megatron_dump.distributed import all_gather_array, fail_together
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
        self.dynamic = model.dynamic_batching
        length_unit = self.dynamic.sequence_length_round if self.dynamic.enabled else batching.PAD_TO
        self.pad_to = math.lcm(length_unit, parallel.layout.length_unit)
        self.share_prompts = model.share_prompts
        self.temperature = model.grpo.sampling_params.temperature
        self.loss = loss_options(config)
        self.offload_adam_states = model.grpo.offload_adam_states
        self.logprob_chunk_size = model.grpo.logprob_chunk_size
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

        The batch is filled up to at least `n_rows` rows, and to whole micro-batches; dynamic ones need no filling.
        """
        unit = math.lcm(self.micro_batch_size, self.forward_micro_batch_size) * self.parallel.layout.micro_batch_unit
        rows = -(-max(len(completions), n_rows or 1) // unit) * unit
        rows = max(len(completions), 1) if self.dynamic.enabled else rows
        return batching.pad_rollouts(prompts, completions, advantages, global_tokens, weights, rows, self.pad_to)

    def train_step(self, batch: TrainBatch) -> dict[str, float]:
        """One optimizer step on this rank's share of a global mini-batch; metrics equal on all ranks.

        Those of the loss (`LossOptions.metrics`) and `actor/entropy` are means over the sampled tokens of the global
        mini-batch.
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
                logprobs,
                old,
                micro.advantages,
                micro.mask,
                batch.global_tokens,
                self.loss,
                weights=micro.weights,
                ref_logprobs=micro.ref_logprobs,
                rollout_logprobs=micro.rollout_logprobs,
                entropy=entropy,
            )
            difference = (old - micro.rollout_logprobs).abs() * micro.mask  # generator against trainer, same weights
            sums["actor/entropy"] = (entropy.detach() * micro.mask).sum()
            sums["actor/logprobs"] = (logprobs.detach() * micro.mask).sum()
            sums["rollout/logprob_diff_mean"] = difference.sum()
            return loss * scale, {**sums, "rollout/logprob_diff_max": difference.max()}

        outputs = run_schedule(self.models, self.parallel, micros, loss_of, forward_only=False)
        updated, grad_norm, _ = self.optimizer.step()
        if not updated or not math.isfinite(grad_norm):
            raise FloatingPointError(
                f"actor/grad_norm={grad_norm} at optimizer step {self.version}: the weights are no longer valid; "
                "continue from the latest checkpoint with a lower model.optim.lr"
            )
        metrics = {
            k: v / batch.global_tokens if k != "rollout/logprob_diff_max" else v
            for k, v in self._reduce(outputs).items()
        }
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
        if reference and self.reference is None:
            raise ValueError("trainer.grpo.initial_policy_kl_penalty=0: no reference policy is kept")
        budget = self.dynamic.logprob_mb_tokens or self.dynamic.train_mb_tokens
        micros = self._micro_batches(batch, self.forward_micro_batch_size, budget)
        with self.reference.loaded() if reference and self.reference else contextlib.nullcontext():
            outputs = run_schedule(
                self.models,
                self.parallel,
                micros,
                lambda hidden, micro: (
                    hidden.new_zeros(()),
                    {"rows": micro.rows, "logprobs": self._logprobs(hidden, micro)[0]},
                ),
                forward_only=True,
            )
        if not self.parallel.is_last_stage:
            return None
        logprobs = np.zeros(batch.tokens.shape, np.float32)
        for output in outputs:
            rows, values = output["rows"], output["logprobs"].cpu().numpy()
            logprobs[rows, : values.shape[1]] = values[: len(rows)]  # behind them: rows that fill up
        return logprobs

    def generating(self) -> contextlib.AbstractContextManager[None]:
        """Inside the block completions are generated and nothing is trained."""
        return offloaded(self.optimizer, self.models) if self.offload_adam_states else contextlib.nullcontext()

    def memory_usage(self) -> dict[str, float]:
        """`perf/memory_…`: the largest of all ranks."""
        return memory.usage(self.parallel.device)

    def memory_report(self) -> str:
        """What parameters, gradients, optimizer and reference take on each rank, in a line."""
        reference = self.reference.weights if self.reference else None
        return memory.report(memory.held(self.models, self.optimizer, reference), self.parallel.device)

    def _logprobs(self, hidden: Tensor, micro: MicroBatch) -> tuple[Tensor, Tensor]:
        """Log-probability of each sampled token given those before it, and the entropy there: [B, T], 0 elsewhere.

        hidden [S, B, H] of the positions this rank holds: only those in front of a sampled token meet the output layer.
        """
        place, (n_rows, length) = self.parallel, micro.tokens.shape
        if micro.shared is not None:
            sampled, before = micro.sampled, micro.shared.before
        else:
            before = context.places(length, place.context_group, hidden.device)[micro.sampled % length - 1]
            sampled, before = micro.sampled[before >= 0], before[before >= 0]
            before = before * n_rows + sampled // length
        both = hidden_logprobs(
            hidden.flatten(0, 1).index_select(0, before),
            output_weight(self.modules[-1]),
            micro.tokens.flatten()[sampled],
            place.tensor_group,
            place.tensor_rank,
            self.arch.vocab_size,
            self.temperature,
            self.logprob_chunk_size,
            reduce_hidden_grad=not place.layout.sequence,
        )
        logprobs, entropy = (
            context.total(
                values.new_zeros(n_rows * length).index_copy(0, sampled, values).view(n_rows, length),
                place.context_group,
            )
            for values in both
        )
        return logprobs, entropy

    def _micro_batches(self, batch: TrainBatch, size: int, budget: int) -> list[MicroBatch]:
        """Of `size` rows, or under a `budget` of tokens and then as many on every data-parallel rank."""
        if self.dynamic.enabled:
            group, device = self.parallel.data_group, self.parallel.device
            with fail_together("model.dynamic_batching", group, device):
                parts, shared = batching.divide(batch, size, budget, self.pad_to, self.share_prompts)
            n = int(all_gather_array(np.array([len(parts)]), group, device).max())
            parts = batching.split_into(parts, batching.used_lengths(batch), n)
        else:
            parts, shared = batching.divide(batch, size, None, self.pad_to, self.share_prompts)
        # The interleaved schedule wants one length.
        pad_to = batch.tokens.shape[1] if self.parallel.layout.virtual_pipeline else self.pad_to
        return [batching.cut(batch, rows, self.parallel.device, pad_to, shared) for rows in parts]

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
