"""Small curricula and made-up outcomes for tests."""

from __future__ import annotations

import numpy as np

from megatron_dump.curriculum import Curriculum
from megatron_dump.types import Draw, Outcomes

ROWS = ["b"] * 50 + ["a"] * 20 + ["c"] * 30
SCHEDULED = {"static": {"weights": {"a": 1, "b": 2, "c": 3}}}
SOURCES = ("uniform", "proportional", "static", "easy_to_hard", "sec", "dump_ucb", "dump_ucb_robust")
PROMPTS = (
    "epoch",
    "cures",
    "thompson",
    {"name": "cures", "subsets": 2, "steps_per_subset": 2, "pre_rollouts": 3},
)
BUDGETS = ("fixed", "neyman", "knapsack")
EVERYTHING = [
    *(({"name": name, **SCHEDULED.get(name, {})}, "epoch", "fixed") for name in SOURCES),
    *(({"name": "dump_ucb_robust"}, prompts, budget) for prompts in PROMPTS for budget in BUDGETS),
    tuple({"name": f"tests.unit.own_policies:{name}"} for name in ("Struggling", "LeastDrawn", "WrongShare")),
]


def config(name="dump_ucb", prompts="epoch", budget="fixed", blocks=None, **options):
    """A `trainer.grpo.curriculum`: options are the source policy's; prompts and budget are names or blocks."""
    named = {k: v if isinstance(v, dict) else {"name": v} for k, v in (("prompts", prompts), ("budget", budget))}
    return {"sources": {"name": name, **options}, **named, **(blocks or {})}


def make(
    name="dump_ucb", rows=ROWS, n_prompts=8, group=4, seed=7, fingerprint="data", staleness=0, steps=20, **options
) -> Curriculum:
    settings = {"max_steps": steps, "max_staleness": staleness}
    return Curriculum(rows, n_prompts, group, seed, config(name, **options), fingerprint, **settings)


def full(sources, prompts, budget, rows=ROWS, **options):
    blocks = {"filter": {"name": "zero_variance", "max_refills": 2}, "audit": {"every": 4, "prompts": 3}}
    return make(rows=rows, prompts=prompts, budget=budget, blocks=blocks, **sources, **options)


def outcomes(step, source_ids, advantages, rewards=None, group_ids=None, **columns) -> Outcomes:
    """Rollouts of the given sources; unless told, each is a group of its own."""
    n = len(source_ids)
    rewards = np.zeros(n) if rewards is None else np.asarray(rewards, float)
    defaults = {
        "group_ids": np.arange(n) if group_ids is None else np.asarray(group_ids),
        "samples": np.zeros(n, np.int64),
        "prompt_ids": np.zeros(n, np.int64),
        "correct": rewards > 0,
        "well_formed": np.ones(n, bool),
        "lengths": np.ones(n, np.int64),
        "finished": np.ones(n, bool),
        "kept": np.isfinite(rewards),
        "ages": np.zeros(n, np.int64),
    }
    return Outcomes(
        step=step,
        source_ids=np.asarray(source_ids, np.int64),
        rewards=rewards,
        advantages=np.asarray(advantages, float),
        **{**defaults, **columns},
    )


def advantages_of(rewards: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """GRPO's, over finite rewards; NaN elsewhere."""
    result = np.full(len(rewards), np.nan)
    for group in np.unique(groups):
        mine = np.flatnonzero((groups == group) & np.isfinite(rewards))
        if mine.size == 1:
            result[mine] = 0.0
        elif mine.size:
            values = rewards[mine]
            result[mine] = (values - values.mean()) / (values.std(ddof=1) + 1e-6)
    return result


def answer(draw: Draw, rewards=None, **columns) -> Outcomes:
    """Made-up results of a draw: by default right or wrong as a function of (row, sample, step) only."""
    place = np.repeat(np.arange(len(draw.prompt_ids)), draw.rollouts)
    samples = np.concatenate([np.empty(0, np.int64), *(np.arange(n) for n in draw.rollouts)])
    rows, groups = draw.prompt_ids[place], draw.group_ids[place]
    if rewards is None:
        rewards = (np.sin(rows * 12.9898 + samples * 78.233 + draw.step) > 0.3).astype(float)
    rewards = np.asarray(rewards(rows, samples) if callable(rewards) else rewards, float)
    columns = {"samples": samples, "prompt_ids": rows, **columns}
    return outcomes(draw.step, draw.source_ids[place], advantages_of(rewards, groups), rewards, groups, **columns)


def rejecting(draw: Draw) -> Outcomes:
    """A third of the rows are always right, a third never."""
    return answer(draw, lambda rows, samples: np.where(rows % 3 == 0, 1, np.where(rows % 3 == 1, 0, samples % 2)))


def run(curriculum: Curriculum, steps: int, answering=answer) -> list[Draw]:
    """Draw and observe whole steps, refilling what the filter rejects; every round drawn."""
    rounds = []
    for step in range(curriculum.step, curriculum.step + steps):
        while not (draw := curriculum.draw(step)).train:
            rounds.append(draw)
            curriculum.observe(answering(draw))
        parts = [answering(draw)]
        rounds.append(draw)
        while (more := curriculum.refill(step, curriculum.filter.rejected(parts[-1]))) is not None:
            rounds.append(more)
            parts.append(answering(more))
        for part in parts:
            curriculum.observe(part)
    return rounds


def softmax(scores: np.ndarray, temperature: float) -> np.ndarray:
    scaled = np.exp(np.asarray(scores) / temperature)
    return scaled / scaled.sum()


def assert_same(left: list[Draw], right: list[Draw]) -> None:
    for a, b in zip(left, right, strict=True):
        assert (a.step, a.first_group, a.train) == (b.step, b.first_group, b.train)
        for field in ("prompt_ids", "source_ids", "rollouts", "weights"):
            assert np.array_equal(getattr(a, field), getattr(b, field))
