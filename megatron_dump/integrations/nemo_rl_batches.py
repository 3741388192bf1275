"""Batches of NeMo-RL that a curriculum chose, and what it learns from their rollouts."""

from __future__ import annotations

import itertools
import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from megatron_dump.integrations.hosted import HostedCurriculum
from megatron_dump.integrations.nemo_rl_host import Settings
from megatron_dump.integrations.raw_rows import fingerprint_of_rows

STATE_FILE = "curriculum.json"  # in a checkpoint's folder
KEY = "grpo.curriculum"


class CurriculumBatches:
    """next_batch, observe, next_batch, observe, ...: batches of NeMo-RL's own items, chosen by a curriculum.

    Every dataloader is a source. Of a dataloader only its data set and its way to collate are used: which prompts are
    drawn, and in what order, is the curriculum's, and so the dataloader's own position stays at the beginning.
    """

    def __init__(self, settings: Settings, dataloaders: Mapping[str, Any], prompts_per_batch: int):
        """dataloaders: task name -> a torch DataLoader over an AllTaskProcessedDataset."""
        self._settings = settings
        self._names = sorted(dataloaders)  # as a curriculum sorts its sources
        self._datasets = [dataloaders[name].dataset for name in self._names]
        self._collate: Callable[[list[Any]], Any] = dataloaders[self._names[0]].collate_fn
        sizes = [len(dataset) for dataset in self._datasets]
        self._starts = np.cumsum([0, *sizes[:-1]])  # of each source's rows among all
        rows = itertools.chain.from_iterable(dataset.dataset for dataset in self._datasets)
        self.hosted = HostedCurriculum(
            settings.block,
            list(np.repeat(self._names, sizes)),
            prompts_per_batch,
            settings.group_size,
            settings.seed,
            fingerprint_of_rows(rows),
            key=KEY,
            max_steps=settings.max_steps,
        )
        self.steps = 0  # training steps that have begun: with dynamic sampling a step may take several batches
        self._out: dict[str, list[Any]] | None = None  # of the batch whose outcomes have not come: task names and idx

    def next_batch(self) -> Any:
        """What the dataloaders' collate_fn makes of the next draw. RuntimeError before the last batch's outcomes."""
        draw = self.hosted.next_draw()
        rows = zip(draw.source_ids.tolist(), draw.prompt_ids.tolist(), strict=True)
        batch = self._collate([self._datasets[source][row - int(self._starts[source])] for source, row in rows])
        self._out = {name: list(batch[name]) for name in ("task_name", "idx")}
        return batch

    def observe(self, rewards: Any, baseline: Any, std: Any, batch: Mapping[str, Any], begins: bool) -> None:
        """Learn from all rollouts of the batch that is out, in its order, each prompt's together.

        rewards, baseline, std: tensors [P * G]; batch: the columns task_name, idx, truncated and unshaped_total_reward,
        where there are any. The advantage is NeMo-RL's own: reward - baseline, over std + 1e-6 where rewards are
        normalised and std > 0 (GRPOAdvantageEstimator). RuntimeError if no batch is out or these are not its rollouts.
        """
        if self._out is None:
            raise RuntimeError(f"{KEY}: rollouts came without a batch that is out; is the curriculum attached twice?")
        self._check_order(len(rewards), batch)
        values, base, spread = (np.asarray(tensor.tolist(), np.float64) for tensor in (rewards, baseline, std))
        if "unshaped_total_reward" in batch:  # from v0.7 on `std` may be that of rewards before they were shaped
            spread = self._spread(values, base)
        advantages = values - base
        if self._settings.normalize:
            np.divide(advantages, spread + 1e-6, out=advantages, where=spread > 0)
        finished = ~np.asarray(batch["truncated"], bool) if "truncated" in batch else None
        self.hosted.learn(values, advantages, finished=finished)
        self._out = None
        self.steps += begins

    def _spread(self, rewards: np.ndarray, baseline: np.ndarray) -> np.ndarray:
        """Standard deviation [P * G] of the rewards that a rollout's baseline is the mean of. Both arrays: [P * G]."""
        left_out = int(self._settings.leave_one_out)
        n = self._settings.group_size - left_out
        squares = (rewards**2).reshape(-1, self._settings.group_size)
        mean = (squares.sum(axis=1, keepdims=True) - left_out * squares).reshape(-1) / n
        return np.sqrt(np.maximum(mean - baseline**2, 0) * n / max(n - 1, 1))

    def _check_order(self, n_rollouts: int, batch: Mapping[str, Any]) -> None:
        assert self._out is not None
        group = self._settings.group_size
        for name, emitted in self._out.items():
            expected = [value for value in emitted for _ in range(group)]
            if len(expected) != n_rollouts:
                raise RuntimeError(
                    f"{KEY}: {n_rollouts} rollouts came of {len(emitted)} prompts with grpo.num_generations_per_prompt="
                    f"{group}: groups must come whole"
                )
            if name in batch and (there := list(batch[name])) != expected:
                place = next(i for i, pair in enumerate(zip(there, expected)) if pair[0] != pair[1])
                raise RuntimeError(
                    f"{KEY}: rollout {place} has {name} {there[place]!r}, the batch had {expected[place]!r} there"
                )

    def save(self, folder: os.PathLike[str] | str) -> None:
        """Write the state into a checkpoint's folder."""
        path = pathlib.Path(folder) / STATE_FILE
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps({"steps": self.steps, "curriculum": self.hosted.state_dict()}), encoding="utf-8")
        os.replace(partial, path)

    def restore(self, folder: os.PathLike[str] | str) -> None:
        """Continue from a checkpoint. ValueError if it has no curriculum, or one of other data or settings."""
        path = pathlib.Path(folder) / STATE_FILE
        if not path.is_file():
            raise ValueError(
                f"checkpointing.checkpoint_dir: {folder} was saved without a curriculum ({STATE_FILE} is missing); "
                "choose another folder"
            )
        state = json.loads(path.read_text(encoding="utf-8"))
        self.hosted.load_state_dict(state["curriculum"])
        self.steps = int(state["steps"])
