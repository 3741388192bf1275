"""The curriculum in NeMo-Aligner. LEGACY: NeMo-Aligner is unmaintained since May 2025; NeMo-RL is its successor.

For the GRPO trainer of the branch llama-nemotron-dev (8c319267), which was never released, and for REINFORCE and PPO of
v0.7.0 (0d72d282). Nothing of NeMo is imported: a data loader's builder and a mixin in front of the trainer are all.
docs/integrations/nemo_aligner.md has the lines that a training script needs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch.utils.data

from megatron_dump.curriculum.sampler import MegatronCurriculumBatchSampler
from megatron_dump.integrations.aligner_curriculum import AlignerCurriculum, Gathered
from megatron_dump.integrations.aligner_rollouts import ended_advantages, prompts_of, same_prompts

Builder = Callable[[int], torch.utils.data.DataLoader]


class ParallelState(Protocol):
    """nemo_aligner.utils.parallel_state, which knows of TensorRT-LLM's resharding."""

    def get_data_parallel_rank(self) -> int: ...

    def get_data_parallel_world_size(self) -> int: ...


def grpo_dataloader_builder(curriculum: AlignerCurriculum, random_sampler: type = object) -> Builder:
    """For GRPOTrainer's `train_dataloader_builder`: every rank is given all prompts of the step, in one list.

    Its batch iterator repeats them and gives each rank its rollouts. random_sampler: NeMo's
    MegatronPretrainingRandomSampler, of which the trainer wants a subclass where max_epochs > 1.
    """

    def build(consumed_samples: int) -> torch.utils.data.DataLoader:
        return _loader(curriculum, random_sampler, consumed_samples, curriculum.prompts_per_step, 0, 1)

    return build


def rollout_dataloader_builder(
    curriculum: AlignerCurriculum, micro_batch_size: int, parallel_state: ParallelState, random_sampler: type = object
) -> Builder:
    """For the builder of ReinforceTrainer and PPOTrainer: every rank is given its own micro-batches.

    Of each block of micro_batch_size * data_parallel_size prompts rank r takes the r-th micro-batch. These trainers
    count rollouts as consumed samples, not prompts. micro_batch_size: model.{reinforce,ppo}.rollout_micro_batch_size.
    """

    def build(consumed_samples: int) -> torch.utils.data.DataLoader:
        rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        prompts, rest = divmod(consumed_samples, curriculum.samples_per_prompt)
        if rest:
            raise ValueError(
                f"consumed_samples {consumed_samples} is not a multiple of num_rollouts_per_prompt "
                f"{curriculum.samples_per_prompt}: it counts rollouts"
            )
        return _loader(curriculum, random_sampler, prompts, micro_batch_size, rank, size)

    return build


def _loader(
    curriculum: AlignerCurriculum, random_sampler: type, consumed: int, micro: int, rank: int, size: int
) -> torch.utils.data.DataLoader:
    kind = type("CurriculumBatchSampler", (MegatronCurriculumBatchSampler, random_sampler), {})
    sampler = curriculum.sampler(kind, consumed, micro, rank, size)
    return torch.utils.data.DataLoader(curriculum.dataset, batch_sampler=sampler)  # only its sampler and data are used


class _Trainer:
    """What the mixins have in common: the state goes where the trainer's goes, beside its checkpoints."""

    step: int
    logger: Any
    cfg: Any

    def __init__(self, *args: Any, curriculum: AlignerCurriculum, **kwargs: Any):
        """curriculum, and what the trainer takes."""
        self.curriculum = curriculum
        super().__init__(*args, **kwargs)

    def save(self, *args: Any, **kwargs: Any) -> None:
        self.curriculum.save(self.step)  # first: a checkpoint without it could not be continued
        super().save(*args, **kwargs)  # type: ignore[misc]

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        super().load_state_dict(state_dict)  # type: ignore[misc]
        self.curriculum.load(self.step)

    def _learn(self, rollouts: Callable[[], Gathered]) -> None:
        self.curriculum.observe(rollouts)
        if metrics := self.curriculum.metrics():
            self.logger.log_metrics(metrics, step=self.step, prefix="train_rollouts/")


class GRPOCurriculumMixin(_Trainer):
    """class Trainer(GRPOCurriculumMixin, GRPOTrainer): of the branch llama-nemotron-dev.

    Advantages are those of the trainer (use_leave_one_out_baseline, normalize_rewards), before length penalties.
    """

    def create_grpo_training_data_from_inferences(self, rollout_batch: Mapping[str, Any]) -> Any:
        """The step's rollouts of all ranks come here on every rank, whatever rank generated them and in any order."""

        def rollouts() -> Gathered:
            rows = [int(row) for row in rollout_batch["idx"]]
            asked = self.curriculum.draw.prompt_ids.tolist()
            return (
                asked,
                rows,
                _columns(rollout_batch, rows, self.cfg.use_leave_one_out_baseline, self.cfg.normalize_rewards),
            )

        self._learn(rollouts)
        return super().create_grpo_training_data_from_inferences(rollout_batch)  # type: ignore[misc]


class _RolloutTrainer(_Trainer):
    """REINFORCE and PPO show the rollouts of all ranks to compute_rollout_metrics, those of a validation too."""

    _training = False

    def _run_inference(self, dataloader_builder: Any, consumed_samples: int, is_validation: bool) -> Any:
        self._training = not is_validation
        return super()._run_inference(dataloader_builder, consumed_samples, is_validation)  # type: ignore[misc]

    def compute_rollout_metrics(self, rollout_batch: Mapping[str, Any]) -> Any:
        if self._training:
            self._learn(lambda: self._rollouts(rollout_batch))
        return super().compute_rollout_metrics(rollout_batch)  # type: ignore[misc]

    def _rollouts(self, batch: Mapping[str, Any]) -> Gathered:
        """Rollouts carry no row, and come in the order of ranks: their prompts' tokens tell which they answer."""
        prompts = prompts_of(batch["response_tokens"], batch["prompt_lengths"])
        return self.curriculum.drawn_prompts(), prompts, self._columns(batch, prompts)

    def _columns(self, batch: Mapping[str, Any], prompts: Sequence[Any]) -> dict[str, np.ndarray]:
        raise NotImplementedError


class ReinforceCurriculumMixin(_RolloutTrainer):
    """class Trainer(ReinforceCurriculumMixin, ReinforceTrainer): of v0.7.0.

    Advantages are the trainer's, against the mean of a prompt's other rollouts that ended, without the KL penalty.
    """

    def _columns(self, batch: Mapping[str, Any], prompts: Sequence[Any]) -> dict[str, np.ndarray]:
        return _columns(batch, prompts, True, False)


class PPOCurriculumMixin(_RolloutTrainer):
    """class Trainer(PPOCurriculumMixin, PPOTrainer): of v0.7.0, one rollout a prompt.

    The advantage is reward - V(prompt): what generalised advantage estimation (1506.02438, eq. 18) gives the first
    token with gamma = lambda = 1.
    """

    def __init__(self, *args: Any, curriculum: AlignerCurriculum, **kwargs: Any):
        super().__init__(*args, curriculum=curriculum, **kwargs)
        if warmup := self.cfg.get("critic_warmup_steps", 0):
            raise ValueError(
                f"trainer.ppo.critic_warmup_steps={warmup}: the trainer forgets the prompts it takes for that, and the "
                "curriculum would not; set it to 0"
            )
        if curriculum.samples_per_prompt != 1:
            raise ValueError(f"samples_per_prompt {curriculum.samples_per_prompt}: PPO has one rollout a prompt")

    def _columns(self, batch: Mapping[str, Any], prompts: Sequence[Any]) -> dict[str, np.ndarray]:
        rewards, ended = _vector(batch["rewards"]), _vector(batch["is_end"]) > 0
        first = _vector(batch["prompt_lengths"]).astype(np.int64) - 1  # the value after the prompt's last token
        values = _array(batch["values"])[np.arange(len(first)), first]
        return {"rewards": rewards, "advantages": (rewards - values) * ended, "finished": ended}


def _columns(
    batch: Mapping[str, Any], prompts: Sequence[Any], leave_one_out: bool, normalize: bool
) -> dict[str, np.ndarray]:
    rewards, ended = _vector(batch["rewards"]), _vector(batch["is_end"]) > 0
    advantages = ended_advantages(rewards, ended, same_prompts(prompts), leave_one_out, normalize)
    lengths = _vector(batch["response_lengths"]) - _vector(batch["prompt_lengths"])
    return {"rewards": rewards, "advantages": advantages, "finished": ended, "lengths": lengths}


def _vector(tensor: Any) -> np.ndarray:
    """float64 [N], of a tensor [N] or [N, 1]."""
    return _array(tensor).reshape(-1)


def _array(tensor: Any) -> np.ndarray:
    """float64, of a tensor on any device."""
    return tensor.detach().double().cpu().numpy()
