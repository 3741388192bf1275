"""Accuracy and reward per source on held-out prompts, sampled as in training."""

from __future__ import annotations

import numpy as np

from megatron_dump.data import PromptDataset
from megatron_dump.distributed import Replica, gather_outcomes
from megatron_dump.rollout import Generator, Request
from megatron_dump.scoring import Scorer, local_outcomes
from megatron_dump.types import Outcomes

# Validation samples come from a stream of random numbers that no training step uses, the same every time: a difference
# between two validations is one of the weights.
STREAM = 2**32 - 1


def validate(
    generator: Generator, dataset: PromptDataset, scorer: Scorer, samples_per_prompt: int, replica: Replica
) -> dict[str, dict[str, float]]:
    """{source: {accuracy, accuracy_se, reward, n}}; a collective of all ranks, the same result on each."""
    mine = np.array_split(np.arange(len(dataset)), replica.size)[replica.rank]
    requests = [Request(int(i), dataset[int(i)], samples_per_prompt) for i in mine]
    completions = generator.generate(STREAM, requests)
    scores = scorer.score(completions, {r.group_id: r.prompt for r in requests})
    source_of = {s: k for k, s in enumerate(dataset.sources)}
    sources = np.array([source_of[dataset.source_of_rows[c.group_id]] for c in completions], np.int64)
    local = local_outcomes(0, completions, sources, scores, np.zeros(len(scores)))
    samples = np.array([c.sample for c in completions], np.int64)
    outcomes = gather_outcomes(local, samples, replica.group, replica.device)
    return {source: _summary(outcomes, k) for k, source in enumerate(dataset.sources)}


def _summary(outcomes: Outcomes, source_id: int) -> dict[str, float]:
    of_source = outcomes.source_ids == source_id
    prompts, index = np.unique(outcomes.group_ids[of_source], return_inverse=True)
    pass_rates = np.bincount(index, outcomes.correct[of_source]) / np.bincount(index)  # [prompts]
    # Samples of one prompt are alike: the standard error is over prompts.
    se = pass_rates.std(ddof=1) / np.sqrt(len(prompts)) if len(prompts) > 1 else float("nan")
    return {
        "accuracy": float(pass_rates.mean()),
        "accuracy_se": float(se),
        "reward": float(outcomes.rewards[of_source].mean()),
        "length": float(outcomes.lengths[of_source].mean()),
        "n": float(of_source.sum()),
    }


def mean_accuracy(per_source: dict[str, dict[str, float]]) -> tuple[float, float]:
    """Unweighted mean of the sources' accuracies and its standard error."""
    accuracies = [v["accuracy"] for v in per_source.values()]
    errors = np.array([v["accuracy_se"] for v in per_source.values()])
    return float(np.mean(accuracies)), float(np.sqrt((errors**2).sum()) / len(errors))
