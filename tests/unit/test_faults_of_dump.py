"""What DUMP's reference implementation gets wrong, a test each, named after the fault; here it must not happen.

Most tests show the fault first, in a few lines that behave as the faulty code does, and then what happens here.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.utils.data

from megatron_dump import evaluate, events
from megatron_dump.curriculum import Curriculum, MegatronCurriculumBatchSampler
from megatron_dump.curriculum.simulator import Learner, Scenario, group_advantages
from megatron_dump.curriculum.sources import SourceSetting, make_source_policy
from megatron_dump.data import DataError, PromptDataset
from megatron_dump.gather import gather_outcomes
from tests.unit.curricula import ROWS, answer, make, outcomes, run, softmax
from tests.unit.guessing import Store, crashing, logged, observed, read, trainer
from tests.unit.test_data import encode, row, write

REPO = Path(__file__).resolve().parents[2]
ALIKE = Scenario(
    "alike",
    "twelve sources of mean pass rate 1/2 that never change",
    names=tuple("abcdefghijkl"),
    sizes=(3000,) * 12,
    difficulties=(0.0,) * 12,
    spread=1.4,
    learning_rate=0.0,
    prompts_per_step=128,
    samples_per_prompt=16,
    target=2.0,
)


def taught(world: Scenario, policy: str, steps: int, seed: int = 0, **options) -> tuple[Curriculum, np.ndarray]:
    """A curriculum after `steps` steps in the loop, each drawn with the weights learned before; float64 [steps, K]."""
    learner = Learner(world, seed)
    sizes = {"n_prompts": world.prompts_per_step, "group": world.samples_per_prompt}
    curriculum = make(policy, rows=learner.source_of_rows, seed=seed, **sizes, **options)
    return curriculum, np.stack([draw.weights for draw in run(curriculum, steps, learner.roll_out)])


def test_resume_freezes_the_curriculum(tmp_path):
    """Fault: a resume restores the loader, while the controller that hears the outcomes is a fresh one."""
    whole = trainer(tmp_path / "whole", 8)
    whole.fit()
    store = Store()
    trainer(tmp_path / "parts", 4, store=store, settings={"save_interval": 4}).fit()
    resumed = trainer(tmp_path / "parts", 8, store=store)
    assert resumed.step == 4
    resumed.fit()
    weights = logged(tmp_path / "parts", "weight")
    assert np.array_equal(weights, logged(tmp_path / "whole", "weight"))
    assert len(np.unique(weights, axis=0)) == 8  # every step draws with weights of its own, those after the resume too
    assert resumed.curriculum.digest() == whole.curriculum.digest()


def test_validation_rewards_are_pushed_into_the_estimator(tmp_path):
    """Fault: greedy rewards on the test set count as training rewards, so the curriculum learns from the test set."""
    plain, checked = trainer(tmp_path / "plain"), trainer(tmp_path / "checked", settings={"val_check_interval": 1})
    for each in (plain, checked):
        each.fit()
    assert [r["step"] for r in read(tmp_path / "checked", "validation.jsonl")] == [1, 2, 3, 4]
    assert checked.curriculum.digest() == plain.curriculum.digest()
    draw = checked.collector.sampler.next_draw()  # validate while a draw waits for its outcomes
    before = checked.curriculum.digest()
    checked.validate()
    assert checked.curriculum.digest() == before
    with pytest.raises(RuntimeError, match="observe got outcomes of step 4294967295, but the draw that is out is"):
        checked.curriculum.observe(dataclasses.replace(answer(draw), step=evaluate.STREAM))


def test_list_of_a_set_makes_draws_depend_on_the_hash_seed():
    """Fault: the order of arms is that of list(set(sources)), so every draw depends on PYTHONHASHSEED."""
    script = (
        "from tests.unit.curricula import *\n"
        "rows = [f'source {i % 9}' for i in range(90)]\n"
        "c = make('dump_ucb', rows=rows)\n"
        "print(list(set(rows)))\n"
        "print(c.sources, [d.prompt_ids.tolist() for d in run(c, 3)], c.weights.tolist(), c.digest())"
    )

    def lines(hash_seed: str) -> list[str]:
        env = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(REPO)}
        return subprocess.check_output([sys.executable, "-c", script], env=env, text=True).splitlines()

    (set_1, ours_1), (set_2, ours_2) = lines("1"), lines("2")
    assert set_1 != set_2 and ours_1 == ours_2


@pytest.mark.parametrize("name", ["sec", "dump_ucb", "dump_ucb_robust"])
def test_one_nan_advantage_makes_all_weights_nan_then_uniform(name):
    """Fault: one NaN advantage makes every weight NaN for good, and the sampler silently falls back to uniform."""
    setting = SourceSetting(("a", "b", "c"), (50, 50, 50))
    policy, clean = (make_source_policy({"name": name}, setting) for _ in range(2))
    n = 40
    sources, groups = np.repeat([0, 1, 2], n), np.arange(3 * n) // 4
    rewards = np.where(sources == 2, 1, np.arange(3 * n) % 2).astype(float)
    rewards[5] = np.nan
    advantages = np.where(sources == 2, 0.0, np.where(rewards == 1, 1.0, -1.0)) + 0 * rewards
    scores = np.array([np.abs(advantages[sources == k]).mean() for k in range(3)])
    assert np.isnan(softmax(scores, 0.1)).all()

    told = outcomes(0, sources, advantages, rewards, groups)
    kept = np.arange(3 * n) != 5
    for each, part in ((policy, slice(None)), (clean, kept)):
        each.drawn(np.array([0, 1, 2]), np.full(3, n))
        each.observe(outcomes(0, sources[part], advantages[part], rewards[part], groups[part]))
    weights = policy.weights(1)
    assert np.array_equal(weights, clean.weights(1))  # as if the rollout had not been there
    assert np.isfinite(weights).all() and abs(weights.sum() - 1) < 1e-12
    assert weights[2] < 0.9 * weights[0]  # not uniform
    assert policy.metrics()["n_dropped"].tolist() == [1, 0, 0]
    (event,) = events.dropped(1, told, ["a", "b", "c"])  # not silent
    assert event["source"] == "a" and event["message"].startswith("1 rollouts without a finite reward")


def test_a_window_of_300_responses_is_19_prompts():
    """Fault: 300 responses are 18.75 prompts at G = 16, so noise alone makes alike sources' weights differ 6-fold."""
    rng = np.random.Generator(np.random.Philox(3))

    def ratio(window: int) -> float:
        """Median max / min of softmax(L / 0.1) over 12 sources, L from `window` responses of each."""
        ratios = []
        for _ in range(100):
            n = -(-window // 16)
            p = 1 / (1 + np.exp(-1.4 * rng.standard_normal((12 * n, 1))))  # prompts of a source are not all alike
            rewards = (rng.random((12 * n, 16)) < p).astype(float).ravel()
            advantages = np.abs(group_advantages(rewards, np.arange(rewards.size) // 16)).reshape(12, -1)
            weights = softmax(advantages[:, -window:].mean(axis=1), 0.1)
            ratios.append(weights.max() / weights.min())
        return float(np.median(ratios))

    assert ratio(300) == pytest.approx(6.1, abs=0.8) and ratio(3000) == pytest.approx(1.8, abs=0.15)

    def in_the_loop(name: str, **options) -> float:
        runs = [taught(ALIKE, name, 16, seed, **options)[1][8:] for seed in range(6)]
        return float(np.median([w.max(axis=1) / w.min(axis=1) for w in runs]))

    paper, robust = in_the_loop("dump_ucb"), in_the_loop("dump_ucb_robust")
    assert paper > 5 and robust < 3.5  # the paper's constants are the paper's; ours hears less noise
    assert in_the_loop("dump_ucb", window=3000) < 2.2


def test_cumulative_counts_end_exploration():
    """Fault: counts only grow, so the bonus falls to 0.30, 0.11, 0.038 at steps 1, 10, 100 against tau = 0.1."""
    setting = SourceSetting(tuple("abcdefghijkl"), (100,) * 12)
    discounted = {"name": "dump_ucb_robust", "discount": 0.9}
    paper, robust = (make_source_policy(block, setting) for block in ({"name": "dump_ucb"}, discounted))
    bonus = {}
    for step in range(1, 301):
        for policy in (paper, robust):
            policy.drawn((np.arange(128) + 8 * step) % 12, np.full(128, 16))  # 2048 rollouts, evenly in the long run
            policy.observe(outcomes(step, [0], [0.0]))
        bonus[step] = paper.metrics()["bonus"].mean(), robust.metrics()["bonus"].mean()
    for step, value in ((1, 0.298), (10, 0.108), (100, 0.0379)):
        n = 2048 * step
        assert math.sqrt(2 * math.log(n + 1) / (n / 12 + 1)) == pytest.approx(value, abs=5e-4)
        assert bonus[step][0] == pytest.approx(value, rel=0.02)
    assert bonus[300][0] < 0.025
    assert bonus[300][1] == pytest.approx(bonus[100][1], rel=1e-3) and bonus[300][1] > 2 * bonus[300][0]

    for step in range(301, 331):  # nobody draws the first source any more
        for policy in (paper, robust):
            policy.drawn(1 + np.arange(128) % 11, np.full(128, 16))
            policy.observe(outcomes(step, [1], [0.0]))
    assert paper.metrics()["bonus"][0] < 0.025 and robust.metrics()["bonus"][0] > 4 * bonus[300][1]  # looks again


def test_starved_sources_get_no_floor():
    """Fault: no weight floor, a source that looks dull is left with some 0.2 % of the draws."""
    world = dataclasses.replace(ALIKE, unsolvable=("a",))
    _, paper = taught(world, "dump_ucb", 40)
    assert paper[10:, 0].max() < 0.005
    for name, floor, options in (
        ("dump_ucb", 0.1, {"floor": 0.1}),
        ("sec", 0.1, {"floor": 0.1}),
        ("dump_ucb_robust", 0.1, {"epsilon": 0.1}),
    ):
        _, weights = taught(world, name, 20, **options)
        assert weights.min() >= floor / 12 - 1e-15
    assert taught(world, "dump_ucb_robust", 20)[1].min() > 0.004  # as it comes, too
    probed, _ = taught(world, "dump_ucb", 12, blocks={"audit": {"every": 4, "prompts": 8}})
    drawn = np.zeros(12)
    for draw in run(probed, 4, Learner(world, 0).roll_out):
        drawn += np.bincount(draw.source_ids, minlength=12)
    assert drawn.min() >= 8  # the paper's weights, and yet a look at every source


@pytest.mark.parametrize(("name", "score"), [("dump_ucb", "mean_abs_adv"), ("dump_ucb_robust", "learnability")])
def test_a_dominant_source_is_judged_on_the_tail_of_a_reordered_batch(name, score):
    """Fault: the batch is put in order of length for training, and 300 of up to 2048 values at its end are kept."""
    sizes = {"rows": ["a"] * 300, "n_prompts": 128, "group": 16}
    direct, gathered, everything = make(name, **sizes), make(name, **sizes), make(name, window=2048, **sizes)
    draw = direct.draw(0)
    right = np.random.Generator(np.random.Philox(1)).random(2048) < 0.5
    hard = np.repeat(draw.prompt_ids % 2, 16) == 1  # never solved, and their answers are long
    whole = answer(draw, (right & ~hard).astype(float), lengths=np.where(hard, 900, 100) + np.arange(2048) % 16)
    magnitudes = np.abs(whole.advantages)
    by_length = np.argsort(whole.lengths, kind="stable")
    assert magnitudes[by_length][-300:].mean() == 0 and magnitudes.mean() > 0.4

    reordered = gather_outcomes(whole.take(by_length))
    for curriculum, told in ((direct, whole), (gathered, reordered), (everything, reordered)):
        if curriculum is not direct:
            curriculum.draw(0)
        curriculum.observe(told)
    assert gathered.digest() == direct.digest()  # whatever order the ranks have them in
    found, over_all = (each.metrics()[f"curriculum/a/{score}"] for each in (direct, everything))
    assert found == pytest.approx(over_all, abs=0.15)  # the order drawn knows nothing of how a prompt turns out
    if name == "dump_ucb":
        assert found == pytest.approx(magnitudes[-300:].mean(), rel=1e-12)
        assert over_all == pytest.approx(magnitudes.mean(), rel=1e-12)


@pytest.mark.parametrize("prompts", ["epoch", "cures", "thompson"])
def test_prompts_are_drawn_with_replacement(prompts):
    """Fault: at 90 % on one source of 900 items, 6.7 of them come more than once in a batch of 128."""
    q = 0.9 / 900
    assert 900 * (1 - (1 - q) ** 128 - 128 * q * (1 - q) ** 127) == pytest.approx(6.7, abs=0.05)
    rows = ["big"] * 900 + ["small"] * 100
    curriculum = make("static", rows=rows, n_prompts=128, group=2, prompts=prompts, weights={"big": 9, "small": 1})
    draws = run(curriculum, 5)
    for draw in draws:
        assert len(set(draw.prompt_ids.tolist())) == 128 and np.sum(draw.source_ids == 0) > 100
    if prompts == "epoch":  # nor does one come again before all others of its source have come
        big = np.concatenate([draw.prompt_ids[draw.source_ids == 0] for draw in draws])
        assert len(set(big.tolist())) == len(big) > 500


@pytest.mark.parametrize(("micro", "ranks"), [(1, 1), (4, 1), (2, 4), (16, 1)])
def test_len_and_iter_disagree(micro, ranks):
    """Fault: __len__ counts samples and __iter__ yields batches, or the other way round: a factor of batch_size."""
    curriculum = make(n_prompts=16)
    sampler = MegatronCurriculumBatchSampler(len(ROWS), 0, micro, 16, 0, ranks, curriculum=curriculum)
    loader = torch.utils.data.DataLoader(range(len(ROWS)), batch_sampler=sampler, collate_fn=list)
    batches = list(loader)
    assert len(batches) == len(sampler) == len(loader) == 16 // (micro * ranks)
    assert {len(batch) for batch in batches} == {micro}


def test_items_that_raise_are_dropped_in_silence(tmp_path):
    """Fault: an item that cannot be tokenised or judged is skipped without a word: batches shrink, sources fade."""

    def fragile(messages: list[dict[str, str]]) -> list[int]:
        if messages[-1]["content"] == "medium 7":
            raise ValueError("cannot encode medium 7")
        return encode(messages)

    run_of = trainer(tmp_path / "tokens", 20, encode=fragile)
    data = run_of.dataset
    assert len(data) == 36
    place = next(i for i in range(36) if i % 3 == data.source_of_rows.index("medium") and i // 3 == 7)
    everything = torch.utils.data.DataLoader(data, batch_sampler=[list(range(36))], collate_fn=list)
    for look in (lambda: data[place], data.check_lengths, lambda: list(everything), run_of.fit):
        with pytest.raises(ValueError, match="cannot encode medium 7"):
            look()

    trainer(tmp_path / "rewards", judge=crashing).fit()
    told = read(tmp_path / "rewards", "events.jsonl")
    for step, seen in enumerate(observed(tmp_path / "rewards"), start=1):
        assert len(seen.rewards) == 32  # every rollout is still there, and none that was not judged counts as wrong
        lost = np.bincount(seen.source_ids[np.isnan(seen.rewards)], minlength=3)
        assert 0 < lost.sum() < 32
        assert logged(tmp_path / "rewards", "n_dropped")[step - 1].tolist() == lost.tolist()
        for source, count in zip(("easy", "hard", "medium"), lost.tolist(), strict=True):
            named = [e for e in told if (e["step"], e["kind"], e["source"]) == (step, "dropped", source)]
            assert [e["message"].split()[0] for e in named] == [str(count)] * (count > 0)
    with pytest.raises(DataError, match="row 1: column 'reward_model.ground_truth' is null"):
        PromptDataset(write(tmp_path / "x.parquet", row(), row(answer=None)), encode=encode)
    data = PromptDataset(write(tmp_path / "x.parquet", row(), row("9" * 50)), encode=encode, max_prompt_length=20)
    with pytest.raises(DataError, match=r"the prompt of row 1 \(sums\) has 59 tokens"):
        data.check_lengths()  # too long: refused, not filtered out


def test_every_item_is_tokenised_twice_at_start_up(tmp_path):
    """Fault: all items are tokenised once to filter and once to find their sources, before the first step."""
    counts: collections.Counter[str] = collections.Counter()

    def counting(messages: list[dict[str, str]]) -> list[int]:
        counts[messages[-1]["content"]] += 1
        return encode(messages)

    run_of = trainer(tmp_path, encode=counting)  # finds the sources, builds the curriculum
    assert not counts
    run_of.fit()
    assert 8 <= len(counts) <= 32 and set(counts.values()) == {1}  # what was drawn, once
    run_of.dataset.check_lengths()
    run_of.dataset.check_lengths()
    assert len(counts) == len(run_of.dataset) and set(counts.values()) == {1}


def test_loader_workers_serve_stale_weights():
    """Fault: W workers of a loader over an endless sampler hold 2 W batches that were drawn with stale weights."""

    class Endless:
        version, drawn_with = 0, []

        def __iter__(self):
            while True:
                self.drawn_with.append(self.version)
                yield [0]

    endless, options = Endless(), {"num_workers": 2, "collate_fn": list}
    served = iter(torch.utils.data.DataLoader([0], batch_sampler=endless, **options))
    for _ in range(8):
        next(served)
        endless.version += 1  # the weights change after every batch
    del served
    assert [step - version for step, version in enumerate(endless.drawn_with[:8])] == [0, 1, 2, 3, 4, 4, 4, 4]

    curriculum = make(n_prompts=8)
    sampler = MegatronCurriculumBatchSampler(len(ROWS), 0, 1, 8, 0, 1, curriculum=curriculum)
    loader = torch.utils.data.DataLoader(
        range(len(ROWS)), batch_sampler=sampler, persistent_workers=True, prefetch_factor=8, **options
    )
    weights = []
    for step in range(4):
        weights.append(curriculum.weights)
        assert list(itertools.chain(*loader)) == sampler.last_draw.prompt_ids.tolist()
        assert sampler.last_draw.step == step and np.array_equal(sampler.last_draw.weights, weights[-1])
        with pytest.raises(RuntimeError, match="its weights would be stale"):
            next(iter(sampler))
        curriculum.observe(answer(sampler.last_draw))
    assert len(np.unique(weights, axis=0)) == 4


def test_logged_sampling_weights_are_always_0(tmp_path):
    """Fault: the sampling weights in the log are 0 whatever was drawn with."""
    trainer(tmp_path, 6).fit()
    weights, ucb = logged(tmp_path, "weight"), logged(tmp_path, "ucb")
    np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-12)
    np.testing.assert_allclose(weights[0], 1 / 3)
    for step in range(5):  # the log explains itself: a step's weights follow from the scores of the step before
        np.testing.assert_allclose(weights[step + 1], softmax(ucb[step], 0.1), rtol=1e-12)
    draws = [e["draw"] for e in read(tmp_path, "curriculum.jsonl") if e["event"] == "draw"]
    assert [draw["weights"] for draw in draws] == weights.tolist()
    prompts = [np.bincount(draw["source_ids"], minlength=3).tolist() for draw in draws]
    assert prompts == logged(tmp_path, "n_prompts").tolist()


def test_the_logged_trend_is_identically_0(tmp_path):
    """Fault: the trend of a source's learnability in the log is 0 by construction, however it changes."""
    trainer(tmp_path, 6).fit()
    windows: list[list[float]] = [[], [], []]
    expected = []
    for told in observed(tmp_path):
        for source, advantage in zip(told.source_ids.tolist(), told.advantages.tolist(), strict=True):
            windows[source].append(abs(advantage))
        expected.append([math.fsum(w[-300:]) / max(len(w[-300:]), 1) for w in windows])
    learnability = logged(tmp_path, "mean_abs_adv")
    np.testing.assert_allclose(learnability, expected, rtol=1e-12)
    for name in ("mean_abs_adv", "ucb", "bonus", "pass_rate", "weight"):
        assert np.all(np.ptp(logged(tmp_path, name), axis=0) > 0)  # every source's curve moves


def test_a_broken_verifier_starves_its_source_unnoticed():
    """Fault of every learnability bandit: a source whose verifier scores all answers 0 looks dull and is starved."""
    easiest = (-1.0,) + (0.0,) * 11
    world = dataclasses.replace(ALIKE, difficulties=easiest, broken=("a",), unsolvable=("l",))
    _, paper = taught(world, "dump_ucb", 30)
    assert paper[10:, 0].max() < 0.009  # where the source, judged rightly, would be one to learn from
    blocks = {"audit": {"every": 5, "prompts": 10}}
    for name in ("dump_ucb", "dump_ucb_robust"):
        curriculum, weights = taught(world, name, 30, blocks=blocks)
        drawn = sum(np.bincount(d.source_ids, minlength=12) for d in run(curriculum, 5, Learner(world, 0).roll_out))
        assert drawn.min() >= 10
        assert name == "dump_ucb" or weights.min() > 0.004
        assert list(curriculum.alarms()) == ["a"]  # not "l": its answers can be read, it is only hard
        assert "verifier or prompt format broken?" in curriculum.alarms()["a"]
        repaired = run(curriculum, 45, Learner(dataclasses.replace(world, broken=()), 0).roll_out)
        assert curriculum.alarms() == {} and repaired[-1].weights[0] > 3 * repaired[0].weights[0]  # found again
