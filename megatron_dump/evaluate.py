"""Accuracy and reward per source on held-out prompts, sampled as in training."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from megatron_dump.data import PromptDataset
from megatron_dump.distributed import Replica
from megatron_dump.gather import gather_outcomes
from megatron_dump.rollout import Generator, Request
from megatron_dump.scoring import Scorer, finite_mean, local_outcomes
from megatron_dump.shared_scoring import SharedScorer
from megatron_dump.types import Completion, Outcomes, Score

# Validation samples come from a stream of random numbers that no training step uses, the same every time: a difference
# between two validations is one of the weights.
STREAM = 2**32 - 1


@dataclasses.dataclass(frozen=True)
class Validation:
    """What one validation found, per source."""

    metrics: dict[str, dict[str, float]]  # source -> accuracy, accuracy_se, pass@k, reward, length, n
    pass_rates: dict[str, list[float]]  # source -> share of right samples of each of its prompts, in order


@dataclasses.dataclass(frozen=True)
class Sampled:
    """Completions of every prompt of a data set."""

    outcomes: Outcomes  # of all ranks; group ids are rows of the data set
    completions: list[Completion]  # this rank's
    scores: list[Score]  # of `completions`; with their answers on the first rank of each replica


def sample(
    generator: Generator,
    dataset: PromptDataset,
    scorer: Scorer | SharedScorer,
    samples_per_prompt: int,
    replica: Replica,
) -> Sampled:
    """Sample and judge every prompt of the data set; a collective of all ranks."""
    mine = np.array_split(np.arange(len(dataset)), replica.size)[replica.rank]
    requests = [Request(int(i), dataset[int(i)], samples_per_prompt) for i in mine]
    completions = generator.generate(STREAM, requests)
    scores = scorer.score("validation reward", completions, {r.group_id: r.prompt for r in requests})
    local = local_outcomes(0, completions, {r.group_id: r.prompt for r in requests}, scores, dataset.sources)
    return Sampled(gather_outcomes(local, replica.group, replica.device), completions, scores)


def validate(
    generator: Generator,
    dataset: PromptDataset,
    scorer: Scorer | SharedScorer,
    samples_per_prompt: int,
    replica: Replica,
) -> Validation:
    """Sample every prompt of the data set; a collective of all ranks, the same result on each."""
    outcomes = sample(generator, dataset, scorer, samples_per_prompt, replica).outcomes
    metrics, pass_rates = {}, {}
    for k, source in enumerate(dataset.sources):
        of_source = outcomes.source_ids == k
        _, index = np.unique(outcomes.group_ids[of_source], return_inverse=True)
        rates = np.bincount(index, outcomes.correct[of_source]) / np.bincount(index)  # [prompts]
        pass_rates[source] = rates.tolist()
        metrics[source] = {
            "accuracy": float(rates.mean()),
            # Samples of one prompt are alike: the standard error is over prompts.
            "accuracy_se": float(rates.std(ddof=1) / np.sqrt(len(rates))) if len(rates) > 1 else float("nan"),
            f"pass@{samples_per_prompt}": float((rates > 0).mean()),
            "reward": finite_mean(outcomes.rewards[of_source]),
            "length": float(outcomes.lengths[of_source].mean()),
            "n": float(of_source.sum()),
        }
    return Validation(metrics, pass_rates)


def summary(metrics: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """`val/<source>/<name>` of every source, and `val/<name>`, the mean over sources; finite values only."""
    rows = {f"val/{source}/{name}": value for source, row in metrics.items() for name, value in row.items()}
    for name in dict.fromkeys(name for row in metrics.values() for name in row):
        rows[f"val/{name}"] = float(np.mean([row[name] for row in metrics.values()]))
    return {key: value for key, value in rows.items() if np.isfinite(value)}


def metric_names(sources: Sequence[str], samples_per_prompt: int) -> list[str]:
    """The keys of `summary`."""
    names = ("accuracy", "reward", "length", f"pass@{samples_per_prompt}")
    return [f"val/{name}" for name in names] + [f"val/{source}/{name}" for source in sources for name in names]
