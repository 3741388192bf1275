"""A simulated learner: what a curriculum does over hundreds of steps, in seconds and without a language model.

The model. Source k has one skill s_k (logits, 0 at the start) and prompt i of it a fixed difficulty
d_i = difficulty_k + spread * normal. A rollout is right with probability p = sigmoid(s_k - d_i). Training adds to the
skill the GRPO gradient of this Bernoulli policy: the sum over kept rollouts of A * d log P(answer) / d s_k =
A * (right - p), times learning_rate over the rollouts of a full batch. So a group of G with a share q right teaches
sqrt(q (1 - q) (G - 1) / G) a rollout as it really came out, and groups all right or all wrong teach nothing; a filter
is not rewarded by a larger step for what it throws away. `transfer` of what a source learns goes to each neighbour.

What it shows: how policies react to sampling noise, to sources that are solved, hopeless, broken or not yet
learnable, to sizes, and what they cost in rollouts. What it does not: there is no forgetting, no interference, no
memorised prompt, no entropy collapse, no length, no optimizer state; and what a prompt teaches is the very quantity
that learnability bandits estimate, so this world is kind to them. It ranks policies under these assumptions only.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from megatron_dump.curriculum import streams
from megatron_dump.curriculum.curriculum import Curriculum
from megatron_dump.curriculum.scenarios import SCENARIOS, Scenario
from megatron_dump.types import Draw, Outcomes

__all__ = ["SCENARIOS", "History", "Learner", "Scenario", "samples_to_target", "simulate"]

_BLOCK = 16  # samples of a group that one random stream serves


class Learner:
    """Rolls out draws and learns from them. A function of (scenario, seed, what it was trained on)."""

    def __init__(self, scenario: Scenario, seed: int):
        self.scenario, self.seed = scenario, seed
        self._source_of_row = np.repeat(np.arange(len(scenario.names)), scenario.sizes)
        spread = scenario.spread * streams.normals(len(self._source_of_row), seed, "simulated difficulty")
        self._difficulty = np.array(scenario.difficulties, np.float64)[self._source_of_row] + spread  # [R]
        self._solvable = np.array([name not in scenario.unsolvable for name in scenario.names])
        self._broken = np.array([name in scenario.broken for name in scenario.names])
        self.skill = np.zeros(len(scenario.names))  # float64 [K], logits

    @property
    def source_of_rows(self) -> list[str]:
        """[R]: the data set, as the curriculum sees it."""
        return [name for name, size in zip(self.scenario.names, self.scenario.sizes, strict=True) for _ in range(size)]

    def pass_rates(self, rows: np.ndarray) -> np.ndarray:
        """float64 [n]: the probability that a rollout of each row (int64 [n]) is right now, whatever the verdict."""
        source = self._source_of_row[rows]
        return self._solvable[source] * sigmoid(self.skill[source] - self._difficulty[rows])

    def true_pass_rate(self) -> np.ndarray:
        """float64 [K]: mean of `pass_rates` over every source's rows."""
        rates = self.pass_rates(np.arange(len(self._difficulty)))
        return np.bincount(self._source_of_row, rates, len(self.skill)) / self.scenario.sizes

    def roll_out(self, draw: Draw) -> Outcomes:
        """What the draw's rollouts earn now: rewards 0 or 1, each a function of (seed, step, group, sample, skill)."""
        n_prompts, n = len(draw.prompt_ids), int(draw.rollouts.sum())
        index = np.repeat(np.arange(n_prompts), draw.rollouts)
        samples = np.arange(n) - np.repeat(np.cumsum(draw.rollouts) - draw.rollouts, draw.rollouts)
        groups, sources = draw.group_ids[index], draw.source_ids[index]
        right = self._uniforms("answers", draw.step, groups, samples) < self.pass_rates(draw.prompt_ids)[index]
        if self.scenario.noise:
            right ^= self._uniforms("verdicts", draw.step, groups, samples) < self.scenario.noise
        judged = right & ~self._broken[sources]
        rewards = judged.astype(np.float64)
        return Outcomes(
            step=draw.step,
            group_ids=groups,
            samples=samples,
            prompt_ids=draw.prompt_ids[index],
            source_ids=sources,
            rewards=rewards,
            advantages=group_advantages(rewards, index),
            correct=judged,
            well_formed=~self._broken[sources],
            lengths=np.ones(n, np.int64),  # every rollout costs the same
            finished=np.ones(n, bool),
            kept=np.ones(n, bool),
            ages=np.zeros(n, np.int64),
        )

    def train(self, outcomes: Outcomes) -> None:
        """One update from the kept rollouts.

        With a noisy verifier the gradient is averaged over the answers that the verdict leaves possible; p cancels
        inside a group, whose advantages add up to 0, and what remains is A times the belief that the answer is right.
        """
        used = outcomes.kept & np.isfinite(outcomes.advantages)
        rows, sources = outcomes.prompt_ids[used], outcomes.source_ids[used]
        belief = _belief(self.pass_rates(rows), outcomes.rewards[used] > 0, self.scenario.noise)
        gradient = np.bincount(sources, outcomes.advantages[used] * belief, len(self.skill)) / self.scenario.batch
        spread = self.scenario.transfer * gradient
        gradient[1:] += spread[:-1]
        gradient[:-1] += spread[1:]
        self.skill += self.scenario.learning_rate * gradient

    def _uniforms(self, what: str, step: int, groups: np.ndarray, samples: np.ndarray) -> np.ndarray:
        """float64 [N]. A stream for each 16 samples, read at the group: no other group's size changes a rollout."""
        if not groups.size:
            return np.empty(0)
        block, place = np.divmod(samples, _BLOCK)
        n = (int(groups.max()) + 1) * _BLOCK
        streams_B = [streams.uniforms(n, self.seed, "simulated " + what, step, b) for b in range(int(block.max()) + 1)]
        return np.stack(streams_B)[block, groups * _BLOCK + place]


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)), without overflow."""
    return 0.5 * (1.0 + np.tanh(0.5 * x))


def group_advantages(rewards: np.ndarray, index: np.ndarray, eps: float = 1e-6) -> np.ndarray:
    """float64 [N]: (r - mean) / (std + eps) of its group, std with ddof 1; 0 in a group of one (2402.03300, 4.1.2).

    rewards float64 [N], finite; index int64 [N], group of each rollout, 0..P-1.
    """
    sizes = np.bincount(index)
    centred = rewards - (np.bincount(index, rewards) / np.maximum(sizes, 1))[index]
    deviation = np.sqrt(np.bincount(index, centred**2) / np.maximum(sizes - 1, 1))
    return centred / (deviation[index] + eps)


def _belief(p: np.ndarray, verdict: np.ndarray, noise: float) -> np.ndarray:
    """float64 [N]: P(answer right | verdict) by Bayes; without noise the verdict. p float64 [N], verdict bool [N]."""
    if not noise:
        return verdict.astype(np.float64)
    if_right, if_wrong = np.where(verdict, 1 - noise, noise), np.where(verdict, noise, 1 - noise)
    return p * if_right / (p * if_right + (1 - p) * if_wrong)


@dataclasses.dataclass(frozen=True)
class History:
    """A simulated run of T steps."""

    scenario: Scenario
    weights: np.ndarray  # float64 [T, K], of the training round
    draws: np.ndarray  # int64 [T, K], rollouts drawn of each source, pre-rollouts and refills included
    pass_rates: np.ndarray  # float64 [T + 1, K], true ones, before the first step and after each
    rollouts: np.ndarray  # int64 [T], spent by each step

    def success(self) -> np.ndarray:
        """float64 [T + 1]: mean true pass rate over the sources that count."""
        return self.pass_rates[:, self.scenario.counted].mean(axis=1)


def simulate(config: Mapping[str, Any], scenario: Scenario, seed: int, steps: int | None = None) -> History:
    """Train a simulated learner on a curriculum; config: a `trainer.grpo.curriculum` block.

    The run ends when the rollouts of `steps` full batches (default: the scenario's) are spent, so a policy pays for
    its pre-rollouts and refills with fewer steps.
    """
    steps = scenario.steps if steps is None else steps
    learner = Learner(scenario, seed)
    prompts, samples = scenario.prompts_per_step, scenario.samples_per_prompt
    curriculum = Curriculum(
        learner.source_of_rows, prompts, samples, seed, config, f"simulated {scenario.name}", max_steps=steps
    )
    weights, draws, pass_rates, spent = [], [], [learner.true_pass_rate()], 0
    while spent < steps * scenario.batch:
        rounds = _one_step(curriculum, learner, len(draws))
        draws.append(sum(np.bincount(d.source_ids, d.rollouts, len(scenario.names)) for d in rounds))
        weights.append(next(d.weights for d in rounds if d.train))
        pass_rates.append(learner.true_pass_rate())
        spent += sum(int(d.rollouts.sum()) for d in rounds)
    drawn = np.stack(draws).astype(np.int64)
    return History(scenario, np.stack(weights), drawn, np.stack(pass_rates), drawn.sum(axis=1))


def _one_step(curriculum: Curriculum, learner: Learner, step: int) -> list[Draw]:
    """Every round of one step, as the trainer runs it: pre-rollouts, the training round, refills, one update."""
    rounds = [curriculum.draw(step)]
    while not rounds[-1].train:
        curriculum.observe(learner.roll_out(rounds[-1]))
        rounds.append(curriculum.draw(step))
    batch: list[Outcomes] = []
    draw: Draw | None = rounds.pop()
    while draw is not None:
        rounds.append(draw)
        outcomes = learner.roll_out(draw)
        rejected = curriculum.filter.rejected(outcomes)
        batch.append(dataclasses.replace(outcomes, kept=~np.isin(outcomes.group_ids, rejected)))
        draw = curriculum.refill(step, rejected) if rejected.size else None
    outcomes = Outcomes.joined(batch)
    curriculum.observe(outcomes)
    learner.train(outcomes)
    return rounds


def samples_to_target(history: History, target: float | None = None) -> float:
    """Rollouts spent, pre-rollouts and refills included, until the mean true pass rate over the sources that count
    reached `target` (default: the scenario's); infinite if it never did."""
    reached = np.flatnonzero(history.success() >= (history.scenario.target if target is None else target))
    return float(history.rollouts[: reached[0]].sum()) if reached.size else math.inf
