"""What public reference code of this kind gets wrong, a test each, named after the fault; here it must not happen.

Most tests show the fault first, in a few lines that behave as the faulty code does, and then what happens here.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.utils.data

from megatron_dump import evaluate, events, grpo
from megatron_dump.batches import share_of_draw
from megatron_dump.collect import Collector, with_advantages
from megatron_dump.config import GRPOConfig
from megatron_dump.curriculum import Curriculum, MegatronCurriculumBatchSampler, streams
from megatron_dump.curriculum.budget import make_budget
from megatron_dump.curriculum.codec import outcomes_from_json
from megatron_dump.curriculum.cures import Cures
from megatron_dump.curriculum.pass_rates import PromptPassRates
from megatron_dump.curriculum.rows import SourceRows
from megatron_dump.curriculum.simulator import Learner, Scenario, group_advantages
from megatron_dump.curriculum.sources import SourceSetting, make_source_policy
from megatron_dump.data import DataError, PromptDataset
from megatron_dump.distributed import Replica, gather_outcomes
from megatron_dump.monitor import Monitor
from megatron_dump.rollout import Request
from megatron_dump.scoring import Scorer
from megatron_dump.trainer import GRPOTrainer
from megatron_dump.types import Completion, Outcomes, Score
from tests.unit import test_pass_rates
from tests.unit.curricula import ROWS, answer, config, make, outcomes, run
from tests.unit.test_data import encode, row, write

REPO = Path(__file__).resolve().parents[2]
ALIKE = Scenario(
    "alike", "twelve sources of mean pass rate 1/2 that never change", names=tuple("abcdefghijkl"), sizes=(3000,) * 12,
    difficulties=(0.0,) * 12, spread=1.4, learning_rate=0.0, prompts_per_step=128, samples_per_prompt=16, target=2.0,
)  # fmt: skip


def taught(world: Scenario, policy: str, steps: int, seed: int = 0, **options) -> tuple[Curriculum, np.ndarray]:
    """A curriculum after `steps` steps in the loop, each drawn with the weights learned before; float64 [steps, K]."""
    learner = Learner(world, seed)
    sizes = {"n_prompts": world.prompts_per_step, "group": world.samples_per_prompt}
    curriculum = make(policy, rows=learner.source_of_rows, seed=seed, **sizes, **options)
    return curriculum, np.stack([draw.weights for draw in run(curriculum, steps, learner.roll_out)])


def softmax(scores: np.ndarray, temperature: float) -> np.ndarray:
    scaled = np.exp(np.asarray(scores) / temperature)
    return scaled / scaled.sum()


# ----------------------------------------------------------------------- a whole loop around a policy that only guesses
def verdict(text: str, ground_truth: str) -> Score:
    return Score(float(text == "right"), text == "right", True)


def crashing(text: str, ground_truth: str) -> Score:
    if text == "right":
        raise ValueError("this verifier has a bug")
    return verdict(text, ground_truth)


class Guesser:
    """A policy that is trained and sampled from: right with a chance per source, which rises with every update."""

    def __init__(self, chances: dict[str, float]):
        self.chances, self.version = chances, 0

    def generate(self, step: int, requests: Sequence[Request]) -> list[Completion]:
        return [self._complete(step, request, sample) for request in requests for sample in request.samples]

    def _complete(self, step: int, request: Request, sample: int) -> Completion:
        chance = self.chances[request.prompt.source]
        chance = 1 - (1 - chance) * 0.9**self.version if chance else 0.0
        right = streams.uniforms(sample + 1, "guess", step, request.group_id)[-1] < chance
        tokens = np.zeros(2 if right else 5, np.int64)
        text = "right" if right else "wrong"
        return Completion(request.group_id, sample, tokens, tokens.astype(np.float32), True, self.version, text)

    def make_batch(self, prompts, completions, advantages, *others: Any) -> Any:
        return advantages

    def compute_logprobs(self, batch: Any, reference: bool = False) -> None:
        return None

    def train_step(self, batch: Any) -> dict[str, float]:
        self.version += 1
        return {}

    def generating(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def memory_usage(self) -> dict[str, float]:
        return {}

    def memory_report(self) -> list[str]:
        return []


class Store:
    """Checkpoints in memory, as JSON."""

    def __init__(self):
        self.saved: dict[int, str] = {}
        self.actor: Guesser | None = None  # that `load` restores

    def latest(self) -> int | None:
        return max(self.saved, default=None)

    def save(self, step: int, state: dict[str, Any]) -> None:
        self.saved[step] = json.dumps({**state, "version": self.actor.version})

    def poll(self) -> bool:
        return True

    def wait(self) -> None: ...

    def state(self, step: int) -> dict[str, Any]:
        return json.loads(self.saved[step])

    def load(self, step: int) -> dict[str, Any]:
        self.actor.version = self.state(step)["version"]
        return {}


def trainer(
    folder: Path,
    steps: int = 4,
    *,
    store: Store | None = None,
    chances: dict[str, float] | None = None,
    encode: Callable[[list[dict[str, str]]], list[int]] = encode,
    judge: Callable[[str, str], Score] = verdict,
    settings: dict[str, Any] | None = None,
    size: int = 12,
    **curriculum: Any,
) -> GRPOTrainer:
    """A run of 8 prompts x 4 rollouts a step over `size` rows of each source, resumed if the store holds a checkpoint.

    chances: the policy's, by source; settings: of GRPOConfig; the rest is tests.unit.curricula.config's.
    """
    chances = chances or {"easy": 0.7, "hard": 0.1, "medium": 0.4}
    folder.mkdir(exist_ok=True)
    rows = [row(f"{source} {i}", source=source) for i in range(size) for source in chances]
    data = PromptDataset(write(folder / "train.parquet", *rows), encode=encode)
    held_out = PromptDataset(write(folder / "val.parquet", *rows[:6]), encode=encode)
    counts = {"num_prompts_per_grpo_step": 8, "samples_per_prompt": 4, "run_validation_step_0": False}
    grpo_config = GRPOConfig(**{**counts, "max_steps": steps, **(settings or {})})
    chosen = Curriculum(data.source_of_rows, 8, 4, 7, config(**curriculum), data.fingerprint, max_steps=steps)
    sampler = MegatronCurriculumBatchSampler(len(data), 0, 1, 8, 0, 1, curriculum=chosen)
    actor, store = Guesser(chances), store or Store()
    store.actor = actor
    replica = Replica(0, 1, None, torch.device("cpu"))
    scorer = Scorer({"*": f"{__name__}:{judge.__name__}"}, data.sources)
    collector = Collector(actor, scorer, data, sampler, chosen.filter, replica, 1, True, lambda completion: 0)
    monitor = Monitor(folder, data.sources, steps, 0, {})
    made = GRPOTrainer(
        grpo_config, {}, 1, 5, "token-mean", False, True, actor, collector, actor, data, held_out, chosen, replica,
        store, monitor,
    )  # fmt: skip
    made.resume()
    return made


def read(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def logged(folder: Path, name: str) -> np.ndarray:
    """float64 [steps, K]: `curriculum/<source>/<name>` of every step, out of metrics.jsonl."""
    steps = [r for r in read(folder) if "train/accuracy" in r]
    sources = sorted({key.split("/")[1] for key in steps[0] if key.startswith("curriculum/")})
    return np.array([[step[f"curriculum/{source}/{name}"] for source in sources] for step in steps])


def observed(folder: Path) -> list[Outcomes]:
    """What the curriculum was told, call by call, out of curriculum.jsonl."""
    return [outcomes_from_json(e["outcomes"]) for e in read(folder, "curriculum.jsonl") if e["event"] == "observe"]


# ------------------------------------------------------------------------------------- DUMP's reference implementation
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

    fields = [f.name for f in dataclasses.fields(Outcomes) if f.name != "step"]
    reordered = gather_outcomes(Outcomes(step=0, **{f: getattr(whole, f)[by_length] for f in fields}))
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


# ------------------------------------------------------------------------------------- CurES's reference implementation
def cures_of(right: dict[int, int], n: int, n_rows: int, **options) -> tuple[Cures, PromptPassRates, SourceRows]:
    """CurES on one source with its own posterior, after `right` of n rollouts of rows were right."""
    rows = SourceRows(["x"] * n_rows)
    rates = PromptPassRates(rows, discount=1.0, prior="flat")
    policy = Cures(rows, 5, rates, **options)
    told = [(i, sample < k) for i, k in right.items() for sample in range(n)]
    rates.observe(test_pass_rates.outcomes(0, told, rows))
    return policy, rates, rows


def test_a_temperature_of_hundreds_makes_sampling_uniform():
    """Fault: the temperature is (accepted + 1) / 1e-2, so that rho differs from uniform by less than 0.3 %."""
    for accepted in (0, 1, 8):
        rho = softmax(np.repeat([0.0, 0.5], 50), (accepted + 1) / 1e-2)  # the widest gap there is
        assert np.abs(100 * rho - 1).max() < 0.003
    policy, *_ = cures_of({i: 4 * (i % 2) for i in range(40)}, 8, 40)  # p = 1/10 or 5/10
    ids, rho = policy.distribution(1, 0)
    assert rho[ids % 2 == 1].min() / rho[ids % 2 == 0].max() == pytest.approx(math.exp((0.5 - 0.3) / 0.1), rel=1e-9)
    drawn = [policy.draw(step, 0, np.zeros(8, np.int64), np.empty(0, np.int64)) for step in range(1, 30)]
    assert np.mean(np.concatenate(drawn) % 2) > 0.8


def test_the_posterior_never_updates_inside_an_iteration():
    """Fault: alpha and beta stay those of the pre-rollouts for all M steps of an iteration."""
    policy, rates, rows = cures_of({}, 0, 12, subsets=2, steps_per_subset=10, pre_rollouts=4)
    subset, n = policy.pre_rollouts(0)
    counts = {i: [1, 1] for i in subset.tolist()}

    def observe(step: int, told: list[tuple[int, bool]]) -> None:
        rates.observe(test_pass_rates.outcomes(step, told, rows))
        for i, right in told:
            counts[i][not right] += 1

    def rho() -> dict[int, float]:
        p = {i: a / (a + b) for i, (a, b) in counts.items()}
        weights = softmax(np.array([math.sqrt(x * (1 - x)) for x in p.values()]), 0.1)
        return dict(zip(p, weights.tolist(), strict=True))

    observe(0, [(int(i), (i + sample) % 2 == 0) for i in subset for sample in range(n)])
    policy.prepared(0)
    seen = []
    for step in range(10):
        assert policy.pre_rollouts(step) is None
        ids, found = policy.distribution(step, 0)
        np.testing.assert_allclose(found, [rho().get(i, 0.0) for i in ids.tolist()], atol=1e-12)
        seen.append(found)
        drawn = policy.draw(step, 0, np.zeros(2, np.int64), np.empty(0, np.int64))
        observe(step, [(i, True) for i in drawn.tolist() for _ in range(8)])
    assert np.all(np.abs(np.diff(seen, axis=0)).max(axis=1) > 1e-3)  # a new one in every step


@pytest.mark.parametrize("name", ["neyman", "knapsack"])
def test_prompts_with_none_or_all_of_the_pre_rollouts_right_get_no_rollouts(name):
    """Fault: k in {0, N'} has sigma = 0 and so n_i = 0: a hard filter on the evidence of four rollouts."""
    k = np.arange(40) % 5  # of N' = 4
    sigma = np.sqrt(k / 4 * (1 - k / 4))
    assert np.all(np.floor(320 * sigma / sigma.sum())[k % 4 == 0] == 0)
    _, rates, rows = cures_of(dict(enumerate(k.tolist())), 4, 40)
    budget = make_budget({"name": name}, 8)
    for p in (rates.mean(np.arange(len(rows))), k / 4):  # the posterior's mean is never 0 or 1; nor would that matter
        n = budget.allot(p, 320)
        assert n.min() >= 2 and n.sum() == 320
        assert n[k == 2].min() > n[k == 4].max()


@pytest.mark.parametrize("name", ["neyman", "knapsack"])
def test_ragged_allocation_normalised_per_rank_overspends(name):
    """Fault: each rank shares out the whole budget among its own prompts: 27,000 rollouts are spent instead of 8192."""
    p = np.random.Generator(np.random.Philox(2)).beta(1, 2, 1024)
    sigma = np.sqrt(p * (1 - p))
    of_ranks = [np.floor(8192 * own / own.sum()) for own in np.split(sigma, 4)]
    assert np.sum(of_ranks) > 3 * 8192

    curriculum = make("uniform", rows=["x"] * 1100, n_prompts=1024, group=8, budget=name, prompts="cures")
    run(curriculum, 1, lambda draw: answer(draw, lambda rows, samples: samples < rows % 9))
    draw = curriculum.draw(1)
    assert draw.rollouts.sum() == 8192 and len(set(draw.rollouts.tolist())) > 3
    for ranks in (1, 4, 8):
        shares = [share_of_draw(draw, 2, ranks, rank) for rank in range(ranks)]
        spent = collections.Counter()
        for place, first, n in itertools.chain(*shares):
            spent.update((place, sample) for sample in range(first, first + n))
        assert spent.total() == len(spent) == 8192  # every sample once, however many ranks there are


@pytest.mark.parametrize("normalize", [True, False])
def test_a_group_of_one_has_its_reward_as_advantage(normalize):
    """Fault: a group of one gets mean 0 and std 1, so A = r: the reward without a baseline."""
    faulty = (3.0 - 0.0) / (1.0 + 1e-6)
    assert faulty == pytest.approx(3.0)
    rewards = np.array([3.0, 3.0, np.nan, -1.0, 1.0])  # the second is left alone by a missing one
    told = with_advantages(outcomes(0, [0] * 5, np.zeros(5), rewards, [0, 1, 1, 2, 2]), normalize)
    assert told.advantages[:2].tolist() == [0.0, 0.0] and np.isnan(told.advantages[2])
    assert told.advantages[3] < 0 < told.advantages[4]
    alone = grpo.group_advantages(torch.tensor([3.0, -3.0]), torch.tensor([4, 9]), normalize)
    assert alone.tolist() == [0.0, 0.0]


def test_pre_rollouts_are_not_counted(tmp_path):
    """Fault of the comparison: what the pre-rollouts generate is left out of the budget."""
    prompts = {"name": "cures", "subsets": 3, "steps_per_subset": 2, "pre_rollouts": 4}
    trainer(tmp_path, 4, prompts=prompts).fit()
    tokens: collections.Counter[int] = collections.Counter()
    for told in observed(tmp_path):
        tokens[told.step] += int(told.lengths.sum())
    steps = read(tmp_path)
    assert [step["perf/generated_tokens"] for step in steps] == [tokens[step] for step in range(4)]
    pre = logged(tmp_path, "n_pre_rollouts").sum(axis=1)
    assert pre.tolist() == [12 * 4, 0, 12 * 4, 0]
    assert tokens[0] > 2 * tokens[1]


# ---------------------------------------------------------------------------------------------- DAPO's dynamic sampling
@pytest.mark.parametrize("chances", [{"a": 0.0, "b": 0.0}, {"a": 0.0, "b": 0.5}])
def test_dynamic_sampling_aborts_at_the_cap(tmp_path, chances):
    """Fault: if too few groups vary after the last refill, the run is aborted instead of training on what it has."""
    blocks = {"filter": {"name": "zero_variance", "max_refills": 2}}
    run_of = trainer(tmp_path, 3, chances=chances, size=60, name="uniform", blocks=blocks)
    run_of.fit()
    assert run_of.step == 3
    short = [e for e in read(tmp_path, "events.jsonl") if e["kind"] == "short_batch"]
    assert [e["step"] for e in short] == [1, 2, 3]  # and it says so
    for step, event, told in zip(read(tmp_path), short, observed(tmp_path), strict=True):
        _, first, index = np.unique(told.group_ids, return_index=True, return_inverse=True)
        right = np.bincount(index, told.rewards)
        varies = (right > 0) & (right < 4)
        assert step["train/n_kept"] == 4 * varies.sum() < 32
        assert event["message"].startswith(f"trains on {4 * varies.sum()} of 32 rollouts after 2 refills")
        sources = told.source_ids[first]
        assert not varies[sources == 0].any()
        assert np.sum(sources == 0) == 3 * np.sum(sources[:8] == 0)  # refilled from its own source each time
        assert step["curriculum/a/n_rollouts"] == 4 * np.sum(sources == 0)  # what was rejected is observed
    assert run_of.actor.version == (3 if chances["b"] else 0)  # a step with nothing to learn from makes no update
