"""The curriculum in TRL's GRPOTrainer (written for TRL 1.16):

    class Trainer(CurriculumMixin, GRPOTrainer): ...
    Trainer(model, reward, args, train_dataset, curriculum={"sources": {"name": "dump_ucb"}}).train()

The trainer's sampler cannot draw: transformers takes a whole gradient accumulation from the loader before it trains,
accelerate one batch more, and a resume runs the sampler over all batches it skips. So the loader's rows are
placeholders, and the rows of a step are drawn where the step generates: never before the feedback of the step before,
and skipping batches draws nothing. Every process has its own curriculum; all learn from the same gathered rewards, so
they draw the same.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_dump.integrations.columns import fingerprint_of, sources_of
from megatron_dump.integrations.hosted import HostedCurriculum
from megatron_dump.integrations.probe import require_signatures
from megatron_dump.types import Draw

STATE_FILE = "curriculum.json"  # in every checkpoint folder
_SIGNATURES = {
    "train": "resume_from_checkpoint trial ignore_keys_for_eval",
    "_generate_and_score_completions": "inputs",
    "_calculate_rewards": "inputs prompts completions completion_ids_list",
    "_prepare_inputs": "generation_batch",
    "_save_checkpoint": "model trial",
    "_get_output_dir": "trial",
}
_ATTRIBUTES = (
    "_step",
    "_buffered_inputs",
    "_metrics",
    "num_generations",
    "num_iterations",
    "reward_weights",
    "eos_token_ids",
)

_Base: Any = object
if TYPE_CHECKING:
    _Base = Any


class CurriculumMixin(_Base):
    """Put before GRPOTrainer (or a subclass of it) in the bases of a class."""

    def __init__(self, *args: Any, curriculum: Mapping[str, Any], **kwargs: Any):
        """curriculum: the block of HostedCurriculum; the other arguments are the trainer's.

        ValueError for a data set without the source column, or without rows to index; RuntimeError for another TRL.
        """
        self._check_trainer()
        super().__init__(*args, **kwargs)
        if missing := [name for name in _ATTRIBUTES if not hasattr(self, name)]:
            raise RuntimeError(f"TRL differs from what the curriculum knows: no attribute {', '.join(missing)}")
        table = self.train_dataset
        if not hasattr(table, "select_columns") or not hasattr(table, "__len__"):
            raise ValueError(f"train_dataset: {type(table).__name__} has no rows to index; give a datasets.Dataset")
        source_key = curriculum.get("source_key", "data_source")
        self.curriculum = HostedCurriculum(
            curriculum,
            sources_of(table, source_key, "curriculum.source_key"),
            self.args.generation_batch_size // self.num_generations,
            self.num_generations,
            self.args.seed,
            fingerprint_of(table, ["prompt", source_key]),
            max_steps=self.args.max_steps if self.args.max_steps > 0 else None,
        )
        self._scored: tuple[Any, list[list[int]]]  # latest: rewards [N, functions] of all processes; tokens of this one
        self._unfinished: Draw | None = None  # drawn and learned from before a checkpoint that training still needs

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As the trainer's; a resume continues with the draws that an uninterrupted run would make."""
        folder = resume_from_checkpoint
        if folder is True:
            from transformers.trainer_utils import get_last_checkpoint

            folder = get_last_checkpoint(self.args.output_dir)
        if folder:
            self._load_curriculum(os.fspath(folder))
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if not self.model.training:
            return super()._generate_and_score_completions(inputs)
        again, self._unfinished = self._unfinished, None
        draw = again or self.curriculum.next_draw()
        output = super()._generate_and_score_completions(self._share(draw, len(inputs)))
        if again is None:
            self.curriculum.learn(*self._feedback(output))
            for name, value in self.curriculum.metrics().items():
                self._metrics["train"][name].append(value)
        return output

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Any:
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self._scored = rewards, completion_ids_list
        return rewards

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """The curriculum's file comes first: a checkpoint that is complete has it."""
        if self.args.should_save:
            folder = os.path.join(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")
            os.makedirs(folder, exist_ok=True)
            state = {"curriculum": self.curriculum.state_dict(), "micro_step": self._step, "rows": None}
            if self._step % self._generate_every() and self.curriculum.last is not None:
                state["rows"] = self.curriculum.last.prompt_ids.tolist()
            path = os.path.join(folder, STATE_FILE)
            with open(f"{path}.partial", "w") as file:
                json.dump(state, file)
            os.replace(f"{path}.partial", path)
        super()._save_checkpoint(model, trial)

    def _load_curriculum(self, folder: str) -> None:
        path = os.path.join(folder, STATE_FILE)
        if not os.path.isfile(path):
            raise ValueError(f"resume_from_checkpoint={folder}: it has no {STATE_FILE}: saved without a curriculum")
        with open(path) as file:
            state = json.load(file)
        self.curriculum.load_state_dict(state["curriculum"])
        # Completions that several optimizer steps share are not in a checkpoint: TRL generates them again. The same
        # prompts, then, and in step with the run that was interrupted; what they earn has been learned.
        self._step, self._buffered_inputs = state["micro_step"], None
        if state["rows"] is not None:
            rows = np.array(state["rows"], np.int64)
            sizes = np.full(len(rows), self.num_generations)
            self._unfinished = Draw(self.curriculum.curriculum.step - 1, rows, rows * 0, sizes, np.empty(0))

    def _generate_every(self) -> int:
        return self.args.steps_per_generation * self.num_iterations

    def _share(self, draw: Draw, n: int) -> list[dict[str, Any]]:
        """This process's n rows of the draw, each prompt `num_generations` times, in the order of TRL's sampler."""
        rows = np.repeat(draw.prompt_ids, draw.rollouts)
        if len(rows) != n * self.accelerator.num_processes:
            raise RuntimeError(f"{n} rows on each of {self.accelerator.num_processes} processes, drawn {len(rows)}")
        first = n * self.accelerator.process_index
        return [dict(self.train_dataset[int(row)]) for row in rows[first : first + n]]

    def _feedback(self, output: Mapping[str, Any]) -> tuple[np.ndarray, ...]:
        """Rewards, advantages, lengths and finished of all processes, each [N] in the order of the draw."""
        import torch

        per_func, completions = self._scored
        lengths = [len(tokens) for tokens in completions]
        finished = [bool(tokens) and tokens[-1] in self.eos_token_ids for tokens in completions]
        local = torch.tensor([output["advantages"].tolist(), lengths, finished], dtype=torch.float64).T
        columns = self.accelerator.gather(local.to(per_func.device).contiguous()).T.cpu().numpy()
        per_func = per_func.double().cpu().numpy()
        weights = self.reward_weights.double().cpu().numpy()
        rewards = np.where(np.isnan(per_func).all(axis=1), np.nan, np.nansum(per_func * weights, axis=1))
        return rewards, columns[0], columns[1], columns[2] > 0

    def _check_trainer(self) -> None:
        parent = super()
        found = {f"GRPOTrainer.{name}": getattr(parent, name, None) for name in _SIGNATURES}
        require_signatures("trl", found, {f"GRPOTrainer.{name}": value for name, value in _SIGNATURES.items()})
