"""An evaluation of a policy on files of prompts: every metric per source, with intervals."""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from megatron_dump import estimates, evaluate
from megatron_dump.actor import parallel
from megatron_dump.actor.policy import check_checkpoint, load_policy
from megatron_dump.config import Config, ConfigError
from megatron_dump.config.evaluate_schema import EvaluateConfig
from megatron_dump.distributed import Replica, all_gather_array
from megatron_dump.evaluate import Sampled
from megatron_dump.gather import gather_rows
from megatron_dump.generators import sampling_options, weights_generator
from megatron_dump.inputs import PromptFiles, read_inputs, validation_files
from megatron_dump.scoring import Scorer
from megatron_dump.types import Outcomes

Row = dict[str, Any]  # metric -> {value, low, high}; of a source prompts, samples, pass_rates besides


def evaluate_policy(
    config: Config,
    wanted: EvaluateConfig,
    tell: Callable[[str], None] = lambda line: None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Everything `wanted` asks for, as JSON; a collective of all ranks, the same result on each.

    tell: is given a line on each part that begins; on_progress: how many of the part's completions are done on this
    rank, and of how many. ValueError or OSError for input that cannot be used.
    """
    inputs = read_inputs(config, _prompt_files(config, wanted), on_any_ranks=True)
    inputs.check_lengths(config.model.grpo.length_params.max_length)
    if wanted.checkpoint is not None:
        check_checkpoint(wanted.checkpoint, config.trainer.precision)
    grid = parallel.initialize(inputs.layout, config.model.seed, config.trainer.collective_timeout_s)
    policy = load_policy(config, grid, wanted.checkpoint)
    options = sampling_options(config, policy, inputs.tokenizer)
    generator = weights_generator(config, policy, inputs.tokenizer, options, on_progress)
    tell(generator.notice)
    replica = grid.replica
    workers = {k: v for k, v in vars(config.model.data.reward_workers).items() if k != "ray_actors"}
    scorer = Scorer(config.model.data.rewards, inputs.sources, replica, **workers)
    files: dict[str, Any] = {}
    try:
        for name, dataset in inputs.datasets.items():
            files[name] = {"fingerprint": dataset.fingerprint, "prompts": len(dataset), "modes": {}}
            for mode in wanted.modes:
                n = 1 if mode == "greedy" else wanted.samples_per_prompt
                tell(f"{name}: {len(dataset)} prompts × {n}, {mode}")
                chosen = generator.greedy() if mode == "greedy" else generator
                sampled = evaluate.sample(chosen, dataset, scorer, n, replica)
                votes = gather_votes(sampled, replica)
                key = (wanted.bootstrap_seed, name, mode)
                files[name]["modes"][mode] = tabulate(sampled.outcomes, votes, dataset.sources, n, wanted, key)
    finally:
        scorer.close()
    settings = dataclasses.asdict(wanted) | {
        "k": wanted.ks,
        "seed": config.model.seed,
        "sampling": dataclasses.asdict(options),
    }
    checkpoint = None if wanted.checkpoint is None else str(pathlib.Path(wanted.checkpoint).resolve())  # a link's own
    path = config.pretrained_checkpoint.restore_from_path
    return {"model": path, "checkpoint": checkpoint, "settings": settings, "files": files}


def gather_votes(sampled: Sampled, replica: Replica) -> np.ndarray:
    """int64 [N]: each rollout's answer as a number, in the order of `sampled.outcomes`; a collective of all ranks.

    0: it gave none, which a reward function may do with every response. Equal numbers are equal answers.
    """
    pairs = zip(sampled.completions, sampled.scores, strict=True)
    own = [(c.group_id, c.sample, _vote(score.answer)) for c, score in pairs] if replica.is_lead else []
    rows = np.array(own, np.int64).reshape(-1, 3)
    sizes = all_gather_array(np.array(len(rows)), None, replica.device)
    rows = gather_rows(rows, sizes, None, replica.device)
    return rows[np.lexsort((rows[:, 1], rows[:, 0])), 2]


def tabulate(
    outcomes: Outcomes, votes: np.ndarray, sources: list[str], n: int, wanted: EvaluateConfig, key: tuple[Any, ...]
) -> dict[str, Any]:
    """{"sources": source -> Row, "mean": Row, over sources}. votes: of `gather_votes`; n: samples of each prompt."""
    table: dict[str, Row] = {}
    replicates, found = [], []
    for k, source in enumerate(sources):
        ratios = _ratios(outcomes, votes, np.flatnonzero(outcomes.source_ids == k), n, [k for k in wanted.ks if k <= n])
        above, below = (np.stack([pair[i] for pair in ratios.values()], axis=1) for i in (0, 1))  # [P, M]
        drawn = estimates.bootstrap(above, below, wanted.bootstrap_samples, *key, source)
        values = dict(zip(ratios, (_ratio(*pair) for pair in ratios.values()), strict=True))
        table[source] = {
            **_with_intervals(values, drawn, wanted.confidence),
            "prompts": len(above),
            "samples": n,
            "pass_rates": (ratios["accuracy"][0] / n).tolist(),
        }
        found.append(values)
        replicates.append(dict(zip(ratios, drawn.T, strict=True)))
    shared = [name for name in replicates[0] if all(name in other for other in replicates)]
    means = {name: float(np.mean([values[name] for values in found])) for name in shared}
    drawn = np.stack([np.mean([own[name] for own in replicates], axis=0) for name in shared], axis=1)
    return {"sources": table, "mean": _with_intervals(means, drawn, wanted.confidence)}


def _ratios(
    outcomes: Outcomes, votes: np.ndarray, rows: np.ndarray, n: int, ks: list[int]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Metric -> numerators and denominators of each prompt, float64 [P] each; `rows` are a source's rollouts."""
    correct, votes = outcomes.correct[rows].reshape(-1, n), votes[rows].reshape(-1, n)  # [P, n]
    rewards, lengths = outcomes.rewards[rows].reshape(-1, n), outcomes.lengths[rows].reshape(-1, n)
    right, judged, whole = correct.sum(axis=1), np.isfinite(rewards), np.full(len(correct), float(n))
    ratios = {"accuracy": (right.astype(np.float64), whole)}
    if n > 1:
        ones, counts = np.ones(len(correct)), np.full(len(correct), n)
        ratios |= {f"pass@{k}": (estimates.pass_at_k(counts, right, k), ones) for k in ks}
        # A reward function that says of no answer what it is leaves nothing to vote on.
        if np.all((votes != 0) | ~outcomes.well_formed[rows].reshape(-1, n)):
            wrong = [_wrong_counts(v, c) for v, c in zip(votes, correct, strict=True)]
            for k in ks:
                wins = [estimates.majority_at_k(n, int(r), w, k) for r, w in zip(right, wrong, strict=True)]
                ratios[f"maj@{k}"] = (np.array(wins), ones)
    ratios["reward"] = (np.where(judged, rewards, 0.0).sum(axis=1), judged.sum(axis=1).astype(np.float64))
    ratios["length"] = (lengths.sum(axis=1).astype(np.float64), whole)
    ratios["well_formed"] = (outcomes.well_formed[rows].reshape(-1, n).sum(axis=1).astype(np.float64), whole)
    ratios["finished"] = (outcomes.finished[rows].reshape(-1, n).sum(axis=1).astype(np.float64), whole)
    return ratios


def _wrong_counts(votes: np.ndarray, correct: np.ndarray) -> tuple[int, ...]:
    """How many samples gave each wrong answer. Right ones are one answer, however they are written."""
    return tuple(sorted(np.unique(votes[~correct & (votes != 0)], return_counts=True)[1].tolist()))


def _vote(answer: str | None) -> int:
    if answer is None:
        return 0
    return 1 + int.from_bytes(hashlib.sha256(answer.encode(errors="replace")).digest()[:7], "big")


def _ratio(above: np.ndarray, below: np.ndarray) -> float:
    return float(above.sum() / below.sum()) if below.sum() > 0 else float("nan")


def _with_intervals(values: Mapping[str, float], drawn: np.ndarray, confidence: float) -> dict[str, Any]:
    """drawn: float64 [resamples, M], columns in the order of `values`. What is not finite is None."""
    table = {}
    for i, (name, value) in enumerate(values.items()):
        numbers = (value, *estimates.interval(drawn[:, i], confidence))
        finite = (number if np.isfinite(number) else None for number in numbers)
        table[name] = dict(zip(("value", "low", "high"), finite, strict=True))
    return table


def _prompt_files(config: Config, wanted: EvaluateConfig) -> dict[str, PromptFiles]:
    """Name -> files: the run's validation, or each file that `wanted` names."""
    if wanted.files is None:
        files = {"validation": validation_files(config)}
    elif len({pathlib.Path(file).resolve() for file in wanted.files}) < len(wanted.files):
        raise ConfigError(f"evaluate.files={wanted.files}: a file comes twice; name it once")
    else:
        files = {file: PromptFiles([file], "evaluate.files") for file in wanted.files}
    if not wanted.num_prompts:
        return files
    limit: dict[str, Any] = {"keep": wanted.num_prompts, "keep_key": "evaluate.num_prompts"}
    return {name: dataclasses.replace(of_set, **limit) for name, of_set in files.items()}
