"""The batch sampler: a partition of each step over ranks, and never a draw with stale weights."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
import torch.utils.data

from megatron_dump.curriculum import Curriculum, MegatronCurriculumBatchSampler
from tests.unit.curricula import ROWS, answer, assert_same, make, run


def sampler(curriculum: Curriculum | None, rank=0, ranks=1, micro=2, prompts=16, consumed=0, **options):
    return MegatronCurriculumBatchSampler(
        len(ROWS), consumed, micro, prompts, rank, ranks, curriculum=curriculum, **options
    )


class Replay:
    """Stands in for the broadcast on a rank that does not draw."""

    is_source = False

    def __init__(self, *draws):
        self._draws = iter(draws)

    def draw(self, draw):
        assert draw is None
        return next(self._draws)


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_ranks_partition_every_block(micro):
    draw = make(n_prompts=16).draw(0)
    for ranks in (1, 2, 4):
        shares = [sampler(None, r, ranks, micro, broadcast=Replay()).share(draw) for r in range(ranks)]
        parts = np.stack([share.reshape(-1, micro) for share in shares], axis=1)
        assert np.array_equal(parts.reshape(-1), np.arange(16))  # rank r has the r-th micro-batch of each block


def test_default_blocks_follow_megatron():
    draw = make(n_prompts=16).draw(0)
    assert sampler(None, 1, 2, broadcast=Replay()).share(draw).tolist() == [2, 3, 6, 7, 10, 11, 14, 15]


def test_a_changed_data_parallel_size_draws_the_same():
    steps = []
    for ranks in (1, 2, 4):
        curriculum, draws = make(n_prompts=16), []
        for step in range(4):
            source = sampler(curriculum, 0, ranks, consumed=16 * step)
            draws.append(source.next_draw())
            assert source.consumed_samples == 16 * (step + 1)
            curriculum.observe(answer(draws[-1]))
        steps.append(draws)
    assert_same(steps[0], steps[1])
    assert_same(steps[0], steps[2])


def test_one_iteration_is_one_step():
    source = sampler(make(n_prompts=16), ranks=2)
    batches = list(source)
    assert len(batches) == len(source) == 4 and source.step == 1 and source.drop_last
    assert [*chain.from_iterable(batches)] == source.last_draw.prompt_ids[source.share(source.last_draw)].tolist()
    with pytest.raises(RuntimeError, match="stale"):
        next(iter(source))
    assert source.step == 1  # a refused draw consumes nothing


@pytest.mark.parametrize("persistent", [False, True])
def test_a_prefetching_loader_gets_fresh_weights(persistent):
    """The weights a step was drawn with are those after the step before it, with two workers prefetching ahead."""
    curriculum, reference = make(n_prompts=16), make(n_prompts=16)
    source = sampler(curriculum)
    loader = torch.utils.data.DataLoader(
        list(range(len(ROWS))),
        batch_sampler=source,
        num_workers=2,
        prefetch_factor=4,
        persistent_workers=persistent,
        collate_fn=list,
    )
    for step in range(3):
        fresh = curriculum.weights
        rows = [*chain.from_iterable(loader)]
        assert np.array_equal(source.last_draw.weights, fresh) and source.last_draw.step == step
        assert rows == source.last_draw.prompt_ids.tolist()
        assert_same([source.last_draw], run(reference, 1))
        curriculum.observe(answer(source.last_draw))
        assert not np.array_equal(curriculum.weights, fresh)


def test_other_ranks_take_the_draw_they_are_given():
    draws = run(make(n_prompts=16), 2)
    source = sampler(None, 1, 2, broadcast=Replay(*draws))
    for draw in draws:
        assert [*chain.from_iterable(source)] == draw.prompt_ids[source.share(draw)].tolist()
    late = sampler(None, 1, 2, consumed=16, broadcast=Replay(draws[0]))
    with pytest.raises(RuntimeError, match="expects the draw of step 1, not 0"):
        late.next_draw()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": 10, "ranks": 2}, r"num_prompts_per_grpo_step 10 .* 2 \* data_parallel_size 2 = 4: 10 mod 4 = 2"),
        ({"rank": 2, "ranks": 2}, r"data_parallel_rank 2 is not in 0\.\.1"),
        ({"consumed": 5}, "consumed_samples 5 is not a multiple of num_prompts_per_grpo_step 16: 5 mod 16 = 5"),
        ({"micro": 0}, "micro_batch_size: 0 must be at least 1"),
        ({"seed": 3}, "seed is 3, but the curriculum's is 7"),
        ({"prompts": 8}, "num_prompts_per_grpo_step is 8, but the curriculum draws 16 prompts a step"),
    ],
)
def test_errors_do_the_sum(options, message):
    with pytest.raises(ValueError, match=message) as error:
        sampler(make(n_prompts=16), **options)
    assert "\n" not in str(error.value)
