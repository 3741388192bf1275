"""Folders as runs leave them, of any number of sources: easy sources first, then harder ones."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

SECONDS = {"draw": 0.01, "gen": 4.0, "reward": 0.3, "old_log_prob": 0.8, "ref": 0.7, "adv": 0.02, "update_actor": 2.4}
SAMPLE = {"prompt": "Is <Zoey> a knight?", "completion": "<answer> (1) Zoey is a knave", "reward": 1.0, "correct": True}


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_run(
    log_dir: Path, n_sources: int, n_steps: int, seed: int = 0, gain: float = 5.0, tokens: float = 19_200.0
) -> None:
    """metrics.jsonl and samples.jsonl with logistic learning curves and some sources not drawn in some steps.

    gain: how far a run gets, in logits; tokens: generated in a step.
    """
    rng = np.random.default_rng(seed)
    names = [f"kk_logic_{i + 2}" for i in range(n_sources)]
    lines: list[dict] = []

    def accuracy(step: int) -> np.ndarray:
        return 1 / (1 + np.exp(0.7 * np.arange(n_sources) + 1.0 - gain * step / n_steps))

    def validate(step: int) -> None:
        passed = rng.binomial(100, accuracy(step)) / 100
        row = {f"val/{name}/accuracy": value for name, value in zip(names, passed, strict=True)}
        row |= {f"val/{n}/accuracy_se": (p * (1 - p) / 100) ** 0.5 for n, p in zip(names, passed, strict=True)}
        lines.append({"step": step, **row})

    validate(0)
    for step in range(1, n_steps + 1):
        truth, done = accuracy(step), step / n_steps
        learnability = np.sqrt(truth * (1 - truth)) + rng.normal(0, 0.02, n_sources)
        weights = np.exp(learnability / 0.1) / np.exp(learnability / 0.1).sum()
        prompts = rng.multinomial(16, weights)
        row = {"step": step, "critic/score/mean": float(weights @ truth + rng.normal(0, 0.05))}
        row["train/accuracy"] = float(prompts @ truth / 16)
        for name, w, a, n, p in zip(names, weights, learnability, prompts, truth, strict=True):
            row |= {f"curriculum/{name}/weight": w, f"curriculum/{name}/mean_abs_adv": a}
            row |= {f"curriculum/{name}/n_prompts": float(n), f"curriculum/{name}/n_rollouts": 8.0 * n}
            if n:
                row |= {f"train/{name}/accuracy": rng.binomial(8 * n, p) / (8 * n), f"train/{name}/reward/mean": p}
        row |= {"actor/grad_norm": rng.lognormal(-0.5, 0.3), "actor/kl_loss": 0.004 * done + rng.uniform(0, 1e-3)}
        row |= {"actor/entropy": 0.6 - 0.3 * done + rng.normal(0, 0.01), "perf/generated_tokens": tokens}
        row |= {"response_length/mean": 150 + 60 * done + rng.normal(0, 8)}
        row |= {"response_length/clip_ratio": max(0.0, 0.2 - 0.2 * done + rng.normal(0, 0.02))}
        row |= {f"timing_s/{phase}": seconds * rng.uniform(0.9, 1.2) for phase, seconds in SECONDS.items()}
        lines.append(row)
        if step % 10 == 0:
            validate(step)
    write_jsonl(log_dir / "metrics.jsonl", lines)
    last = names if n_sources > 12 else names[:1]
    write_jsonl(log_dir / "samples.jsonl", [{"step": 10, "source": source, **SAMPLE} for source in last])
