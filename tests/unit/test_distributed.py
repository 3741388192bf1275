"""What ranks tell each other, on real gloo ranks."""

from __future__ import annotations

import dataclasses
import time
from itertools import chain

import numpy as np
import pytest
import torch.distributed as dist

from megatron_dump.curriculum import MegatronCurriculumBatchSampler
from megatron_dump.distributed import DrawBroadcast, agree, broadcast_array, fail_together
from megatron_dump.gather import gather_completions, gather_outcomes
from megatron_dump.types import Completion, Draw, Outcomes
from tests.distributed.launch import RankFailed, run_ranks
from tests.unit.curricula import ROWS, answer, make

DRAW = Draw(
    step=3,
    prompt_ids=np.array([5, 2**40, 7]),
    source_ids=np.array([1, 0, 1]),
    rollouts=np.array([4, 2, 4]),
    weights=np.array([0.1, 1.0 - 0.1]),
    first_group=8,
    train=False,
)


def same(left, right) -> bool:
    """Every field equal bit for bit, NaN included, and of the same type."""
    pairs = [(getattr(left, f.name), getattr(right, f.name)) for f in dataclasses.fields(left)]
    return all(np.asarray(a).dtype == np.asarray(b).dtype and np.array_equiv(a, b) for a, b in pairs)


def raised(fn) -> str:
    """The message fn fails with on this rank."""
    with pytest.raises((RuntimeError, ValueError)) as error:
        fn()
    return str(error.value)


def rollouts(keys, step=3) -> Outcomes:
    """Outcomes of the (group_id, sample) pairs `keys`, all values a function of the pair."""
    group_ids, samples = np.array(keys, np.int64).reshape(-1, 2).T
    value = 10.0 * group_ids + samples
    flag = (group_ids + samples) % 2 == 0
    lengths = value.astype(np.int64)
    rows, ages = group_ids * 2**40, samples + 1
    return Outcomes(
        step, group_ids, samples, rows, group_ids % 2, value / 3, -value / 7, flag, ~flag, lengths, flag, ~flag, ages
    )


KEYS = [(g, s) for g in range(4) for s in range(3)]


def test_a_draw_arrives_bit_for_bit():
    def fn():
        broadcast = DrawBroadcast(n_prompts=5, n_sources=2)  # room for more than this round has
        assert broadcast.is_source == (dist.get_rank() == 0)
        return broadcast.draw(DRAW if broadcast.is_source else None)

    assert all(same(draw, DRAW) for draw in run_ranks(fn, 3))


def test_a_source_without_a_draw_fails_every_rank():
    def fn():
        broadcast = DrawBroadcast(n_prompts=2, n_sources=2)
        other_size = raised(lambda: broadcast.draw(DRAW if broadcast.is_source else None))
        return other_size, raised(lambda: broadcast.draw(None))

    assert run_ranks(fn, 2) == [("no draw of at most 2 prompts and 2 sources came from the curriculum's rank",) * 2] * 2


def test_the_sampler_gives_ranks_their_parts_of_one_draw():
    """Only rank 0 has a curriculum; a refused draw is an error on both ranks, and nobody waits."""

    def fn():
        rank, curriculum = dist.get_rank(), make(n_prompts=16) if dist.get_rank() == 0 else None
        broadcast = DrawBroadcast(n_prompts=16, n_sources=3)
        sampler = MegatronCurriculumBatchSampler(
            len(ROWS), 0, 4, 16, rank, 2, curriculum=curriculum, broadcast=broadcast
        )
        steps = []
        for _ in range(2):
            steps.append(([*chain.from_iterable(sampler)], sampler.last_draw))
            if curriculum:
                curriculum.observe(answer(sampler.last_draw))
        sampler.next_draw()
        return steps, raised(sampler.next_draw)

    (first, first_error), (second, second_error) = run_ranks(fn, 2)
    for (rows, draw), (other_rows, other_draw) in zip(first, second, strict=True):
        assert same(draw, other_draw)
        assert [*rows[:4], *other_rows[:4], *rows[4:], *other_rows[4:]] == draw.prompt_ids.tolist()
    assert "stale" in first_error and "no draw" in second_error


def test_arrays_arrive_bit_for_bit():
    arrays = [
        np.array([[np.nan, -0.0, np.pi]]),
        np.arange(5, dtype=np.float32),
        np.array([True, False, True]),
        np.array(2**60),
        np.empty((0, 3), np.int16),
    ]

    def fn():
        own = [a if dist.get_rank() == 1 else None for a in arrays]
        received = [broadcast_array(o, a.shape, a.dtype, src=1) for o, a in zip(own, arrays, strict=True)]
        return received, raised(lambda: broadcast_array(np.zeros(2), [3], float))

    for received, error in run_ranks(fn, 2):
        for got, sent in zip(received, arrays, strict=True):
            assert got.dtype == sent.dtype and got.shape == sent.shape and got.tobytes() == sent.tobytes()
        assert error == "broadcast_array: rank 0 has no float64[3] to send; this rank has float64[2]"


@pytest.mark.parametrize("split", [(slice(0, 1), slice(1, 5), slice(5, 12)), (slice(0, 0), slice(0, 12), slice(0, 0))])
def test_outcomes_are_gathered_in_global_order_whatever_the_split(split):
    """Three ranks with unequal, shuffled or no rollouts get what one rank with all of them gets."""
    shuffled = [KEYS[i] for i in np.random.default_rng(0).permutation(len(KEYS))]

    def fn():
        return gather_outcomes(rollouts(shuffled[split[dist.get_rank()]]))

    expected = rollouts(KEYS)
    assert all(same(outcomes, expected) for outcomes in run_ranks(fn, 3))
    assert same(gather_outcomes(rollouts(shuffled)), expected)


def test_nan_and_empty_outcomes_survive_the_gather():
    gathered = gather_outcomes(dataclasses.replace(rollouts([(0, 0)]), rewards=np.array([np.nan])))
    assert np.isnan(gathered.rewards[0])
    assert gather_outcomes(rollouts([])).group_ids.shape == (0,)


@pytest.mark.parametrize("split", [(slice(0, 1), slice(1, 5), slice(5, 12)), (slice(0, 0), slice(0, 12), slice(0, 0))])
def test_completions_are_gathered_whole_whatever_the_split(split):
    rng = np.random.default_rng(0)
    sampled = [
        Completion(
            g,
            s,
            rng.integers(0, 2**40, n := rng.integers(1, 9)),
            rng.normal(size=n).astype(np.float32),
            bool(s % 2),
            g + 2,
        )
        for g, s in KEYS
    ]
    shuffled = [sampled[i] for i in rng.permutation(len(KEYS))]

    def fn():
        return gather_completions(shuffled[split[dist.get_rank()]])

    for gathered in run_ranks(fn, 3):
        assert all(same(ours, theirs) for ours, theirs in zip(gathered, sampled, strict=True))
    assert gather_completions([]) == []


def test_gathering_twice_the_same_or_other_steps_is_refused_everywhere():
    def fn():
        twice = raised(lambda: gather_outcomes(rollouts([(1, 2)])))
        return twice, raised(lambda: gather_outcomes(rollouts([(dist.get_rank(), 0)], step=dist.get_rank())))

    expected = (
        "gather_outcomes: sample 2 of group 1 came from two ranks",
        "gather_outcomes: the ranks are at different steps: [0, 1]",
    )
    assert run_ranks(fn, 2) == [expected] * 2


def test_groups_count_their_own_ranks():
    """In the group of global ranks 1 and 2 the source is rank 1, and errors name global ranks."""

    def fn():
        group, rank = dist.new_group([1, 2]), dist.get_rank()
        if rank == 0:
            return raised(lambda: broadcast_array(np.ones(1), [1], float, group=group))
        broadcast = DrawBroadcast(group, n_prompts=3, n_sources=2)
        draw = broadcast.draw(DRAW if rank == 1 else None)
        return same(draw, DRAW), raised(lambda: agree("state", f"{rank:064x}", group))

    outside, *members = run_ranks(fn, 3)
    assert "not a member of the group" in outside
    assert members == [(True, "ranks disagree on state: rank 1 has 000000000000, not so ranks 2 (000000000000)")] * 2


def test_agree_raises_on_every_rank_and_names_who_differs():
    def fn():
        agree("fingerprint", "ab" * 32)
        return raised(lambda: agree("curriculum state", ("ab" if dist.get_rank() != 1 else "cd") * 32))

    message = "ranks disagree on curriculum state: rank 0 has abababababab, not so ranks 1 (cdcdcdcdcdcd)"
    assert run_ranks(fn, 3) == [message] * 3


def test_failures_are_shared():
    def fn():
        with fail_together("load"):
            pass

        def scoring():
            with fail_together("score"):
                if dist.get_rank() > 0:
                    raise KeyError("ümlaut " + "x" * 5000)

        return raised(scoring)

    messages = run_ranks(fn, 3)
    assert len(set(messages)) == 1 and messages[0].startswith("score: rank 1 failed: KeyError: 'ümlaut xxx")


def test_one_process_needs_no_process_group():
    assert same(DrawBroadcast(n_prompts=3, n_sources=2).draw(DRAW), DRAW)
    assert broadcast_array(np.arange(3), [3], np.int64).tolist() == [0, 1, 2]
    agree("state", "ab" * 32)
    with pytest.raises(RuntimeError, match="load: rank 0 failed: ValueError: boom") as error, fail_together("load"):
        raise ValueError("boom")
    assert isinstance(error.value.__cause__, ValueError)
    with pytest.raises(KeyboardInterrupt), fail_together("load"):
        raise KeyboardInterrupt


def test_the_launcher_reports_the_first_failure_and_the_dead():
    def fails():
        if dist.get_rank() == 1:
            raise ValueError("boom")
        dist.barrier()

    with pytest.raises(RankFailed, match=r"(?s)rank 1 of 2 failed:.*ValueError: boom"):
        run_ranks(fails, 2)

    def waits():
        if dist.get_rank() == 0:
            time.sleep(30)

    with pytest.raises(TimeoutError, match="did not finish in time"):
        run_ranks(waits, 2, timeout_s=1.0)
