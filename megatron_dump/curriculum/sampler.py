"""The curriculum as a Megatron batch sampler."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np

from megatron_dump.curriculum.curriculum import Curriculum
from megatron_dump.types import Draw

KEY = "num_prompts_per_grpo_step"


class Broadcast(Protocol):
    """Delivers rank 0's draw to every rank; `megatron_dump.distributed.DrawBroadcast` is one."""

    is_source: bool

    def draw(self, draw: Draw | None) -> Draw:
        """The source passes its draw (None: it has none, and every rank raises), the others None."""
        ...


class MegatronCurriculumBatchSampler:
    """NeMo's batch sampler signature over a Curriculum. Samples are prompts; one iteration is one step.

    A step is always exactly `global_batch_size` prompts, so there is never an incomplete batch: `drop_last` and
    `pad_samples_to_global_batch_size` are kept for callers that read them and change nothing.
    """

    def __init__(
        self,
        total_samples: int,  # rows of the data set
        consumed_samples: int,  # prompts drawn so far, all ranks together
        micro_batch_size: int,  # prompts in each list that one rank is given
        global_batch_size: int,  # prompts per step
        data_parallel_rank: int,
        data_parallel_size: int,
        drop_last: bool = True,
        seed: int = 0,  # the curriculum has the seed; another one here, other than 0, is an error
        pad_samples_to_global_batch_size: bool = False,
        *,
        curriculum: Curriculum | None,  # None on ranks that only receive draws
        broadcast: Broadcast | None = None,  # None: one process
    ):
        _check_divisible(global_batch_size, micro_batch_size, data_parallel_size)
        if not 0 <= data_parallel_rank < data_parallel_size:
            raise ValueError(f"data_parallel_rank {data_parallel_rank} is not in 0..{data_parallel_size - 1}")
        if consumed_samples < 0 or consumed_samples % global_batch_size:
            raise ValueError(
                f"consumed_samples {consumed_samples} is not a multiple of {KEY} {global_batch_size}: "
                f"{consumed_samples} mod {global_batch_size} = {consumed_samples % global_batch_size}"
            )
        self._draws = broadcast is None or broadcast.is_source
        if self._draws:
            _check_curriculum(curriculum, total_samples, global_batch_size, seed)
        self.total_samples, self.consumed_samples = total_samples, consumed_samples
        self.micro_batch_size, self.global_batch_size = micro_batch_size, global_batch_size
        self.data_parallel_rank, self.data_parallel_size = data_parallel_rank, data_parallel_size
        self.drop_last, self.pad_samples_to_global_batch_size = drop_last, pad_samples_to_global_batch_size
        self.last_draw: Draw | None = None  # the step that was iterated last
        self._curriculum, self._broadcast = curriculum, broadcast

    @property
    def step(self) -> int:
        """The step that the next draw belongs to."""
        return self.consumed_samples // self.global_batch_size

    def next_draw(self) -> Draw:
        """The next round, the same on every rank (collective). RuntimeError if its weights would be stale.

        Rounds of pre-rollouts (`train=False`) come before the round that their step trains on.
        """
        draw = self._deliver(lambda curriculum: curriculum.draw(self.step))
        self.consumed_samples += self.global_batch_size * draw.train
        self.last_draw = draw
        return draw

    def refill(self, step: int, rejected: np.ndarray) -> Draw | None:
        """Fresh prompts in place of the groups `rejected` of `step`, the same on every rank (collective), or None."""

        def refill(curriculum: Curriculum) -> Draw:
            nothing = np.empty(0, np.int64)
            no_prompts = Draw(step, nothing, nothing, nothing, np.zeros(len(curriculum.sources)))
            return curriculum.refill(step, rejected) or no_prompts

        draw = self._deliver(refill, step)
        return draw if len(draw.prompt_ids) else None

    def _deliver(self, make: Callable[[Curriculum], Draw], step: int | None = None) -> Draw:
        draw = self._own(make) if self._draws else None
        if self._broadcast is not None:
            draw = self._broadcast.draw(draw)
        expected = self.step if step is None else step
        if draw is None or draw.step != expected:
            raise RuntimeError(f"this rank expects the draw of step {expected}, not {draw and draw.step}")
        return draw

    def _own(self, make: Callable[[Curriculum], Draw]) -> Draw:
        try:
            assert self._curriculum is not None  # checked at the start for the rank that draws
            return make(self._curriculum)
        except Exception:
            if self._broadcast is not None:
                with contextlib.suppress(RuntimeError):
                    self._broadcast.draw(None)  # the other ranks are waiting: tell them, then raise our own error
            raise

    def share(self, draw: Draw) -> np.ndarray:
        """int64 [P / data_parallel_size]: this rank's positions in the draw.

        Of each block of micro_batch_size * data_parallel_size prompts rank r takes the r-th micro-batch (Megatron's
        convention).
        """
        places = np.arange(len(draw.prompt_ids), dtype=np.int64)
        blocks = places.reshape(-1, self.data_parallel_size, self.micro_batch_size)
        return blocks[:, self.data_parallel_rank].reshape(-1)

    def __iter__(self) -> Iterator[list[int]]:
        """Rows of ONE step, then stop: however far a loader prefetches, it cannot reach a step with stale weights."""
        draw = self.next_draw()
        if not draw.train:
            raise RuntimeError(
                "trainer.grpo.curriculum.prompts.pre_rollouts needs a loop that asks for its rounds by next_draw(): "
                "a loader cannot tell them from training rounds; set it to 0"
            )
        rows = draw.prompt_ids[self.share(draw)].tolist()
        for start in range(0, len(rows), self.micro_batch_size):
            yield rows[start : start + self.micro_batch_size]

    def __len__(self) -> int:
        """Micro-batches of a step on this rank: what one iteration yields."""
        return self.global_batch_size // (self.micro_batch_size * self.data_parallel_size)


def _check_divisible(prompts: int, micro: int, ranks: int) -> None:
    sizes = {KEY: prompts, "micro_batch_size": micro, "data_parallel_size": ranks}
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name}: {value!r} must be at least 1")
    if prompts % (micro * ranks):
        raise ValueError(
            f"{KEY} {prompts} is not a multiple of micro_batch_size {micro} * data_parallel_size {ranks} = "
            f"{micro * ranks}: {prompts} mod {micro * ranks} = {prompts % (micro * ranks)}"
        )


def _check_curriculum(curriculum: Curriculum | None, rows: int, prompts: int, seed: int) -> None:
    if curriculum is None:
        raise ValueError("the rank that draws needs a curriculum")
    if rows != curriculum.n_rows:
        raise ValueError(f"total_samples is {rows}, but the curriculum was made for {curriculum.n_rows} rows")
    if prompts != curriculum.prompts_per_step:
        raise ValueError(f"{KEY} is {prompts}, but the curriculum draws {curriculum.prompts_per_step} prompts a step")
    if seed not in (0, curriculum.seed):
        raise ValueError(f"seed is {seed}, but the curriculum's is {curriculum.seed}")
