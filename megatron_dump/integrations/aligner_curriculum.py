"""The curriculum of a NeMo-Aligner run: rank 0 has it, every rank is told the draw, a file beside the checkpoints."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_dump.curriculum.sampler import MegatronCurriculumBatchSampler
from megatron_dump.distributed import DrawBroadcast, fail_together
from megatron_dump.integrations.aligner_rollouts import order_of
from megatron_dump.integrations.hosted import HostedCurriculum
from megatron_dump.integrations.raw_rows import fingerprint_of_rows
from megatron_dump.types import Draw

# What tells prompts apart, of those asked for [P] and of the rollouts that came [N]; columns [N] of those rollouts.
Gathered = tuple[Sequence[Any], Sequence[Any], dict[str, np.ndarray]]


class AlignerCurriculum:
    """Made on every rank after init_distributed, by the same arguments; only rank 0's draws and learns."""

    def __init__(
        self,
        block: Mapping[str, Any],
        dataset: Any,
        sources: Sequence[str],
        *,
        prompts_per_step: int,
        samples_per_prompt: int,
        seed: int,
        folder: str | os.PathLike[str],
        key: str = "trainer.grpo.curriculum",
        max_steps: int | None = None,
    ):
        """block: see docs/curriculum.md; dataset: the trainer's, whose items have their tokens in `text` and whose
        `data` has the raw rows; sources: of every row; prompts_per_step: num_prompts_per_grpo_step, or
        num_rollout_samples of REINFORCE and PPO; samples_per_prompt: of PPO 1; folder: for the state, as
        exp_manager.explicit_log_dir; key: where the configuration has the block.

        Raises RuntimeError on every rank, with the first error, for settings that do not fit.
        """
        self.dataset, self.folder = dataset, pathlib.Path(folder) / "curriculum"
        self.prompts_per_step, self.samples_per_prompt = prompts_per_step, samples_per_prompt
        nccl = dist.is_initialized() and dist.get_backend() == "nccl"
        self._device = torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")
        self._n_rows = len(sources)
        self._broadcast = DrawBroadcast(device=self._device, n_prompts=prompts_per_step, n_sources=len(set(sources)))
        self._hosted: HostedCurriculum | None = None
        self._sampler: MegatronCurriculumBatchSampler | None = None
        with fail_together(key, device=self._device):
            if len(sources) != len(dataset):
                raise ValueError(f"{len(sources)} sources for {len(dataset)} rows")
            if self._broadcast.is_source:
                self._hosted = HostedCurriculum(
                    dict(block),
                    list(sources),
                    prompts_per_step,
                    samples_per_prompt,
                    seed,
                    fingerprint_of_rows(dataset.data),
                    key=key,
                    max_steps=max_steps,
                )

    @property
    def draw(self) -> Draw:
        """The prompts asked for last."""
        if self._sampler is None or self._sampler.last_draw is None:
            raise RuntimeError("rollouts came, but no prompts were drawn: is the data loader the curriculum's?")
        return self._sampler.last_draw

    def sampler(self, kind: type, consumed: int, micro: int, rank: int, size: int) -> MegatronCurriculumBatchSampler:
        """One of class `kind`, a MegatronCurriculumBatchSampler, after `consumed` prompts; nothing is drawn yet."""
        curriculum = self._hosted.curriculum if self._hosted else None
        sampler = kind(
            self._n_rows,
            consumed,
            micro,
            self.prompts_per_step,
            rank,
            size,
            curriculum=curriculum,
            broadcast=self._broadcast,
        )
        self._sampler = sampler
        return sampler

    def drawn_prompts(self) -> list[tuple[int, ...]]:
        """The tokens of every prompt of the draw, as the data set gives them."""
        return [tuple(self.dataset[row]["text"].tolist()) for row in self.draw.prompt_ids.tolist()]

    def observe(self, rollouts: Callable[[], Gathered]) -> None:
        """Learn from the draw's rollouts (a collective; `rollouts` is called on rank 0 alone).

        The columns are those of HostedCurriculum.learn. RuntimeError on every rank where they do not fit the draw.
        """
        with fail_together("curriculum.observe", device=self._device):
            if self._hosted:
                asked, came, columns = rollouts()
                order = order_of(asked, came, self.samples_per_prompt)
                self._hosted.last = self.draw
                self._hosted.learn(**{name: column[order] for name, column in columns.items()})

    def metrics(self) -> dict[str, float]:
        """`curriculum/<source>/<name>` on rank 0; nothing elsewhere."""
        return self._hosted.metrics() if self._hosted else {}

    def path(self, step: int) -> pathlib.Path:
        return self.folder / f"step_{step}.json"

    def save(self, step: int) -> None:
        """Write the state of a step (a collective). It stays when the trainer removes the checkpoint: it is small."""
        with fail_together("curriculum state", device=self._device):
            if self._hosted:
                self.folder.mkdir(parents=True, exist_ok=True)
                partial = self.path(step).with_suffix(".partial")
                partial.write_text(json.dumps(self._hosted.state_dict()), encoding="utf-8")
                os.replace(partial, self.path(step))

    def load(self, step: int) -> None:
        """Continue from the state of a step (a collective). RuntimeError on every rank if there is none, or another."""
        with fail_together("curriculum state", device=self._device):
            if self._hosted:
                if not self.path(step).is_file():
                    raise ValueError(f"{self.path(step)} is missing: the checkpoint of step {step} had no curriculum")
                self._hosted.load_state_dict(json.loads(self.path(step).read_text(encoding="utf-8")))
