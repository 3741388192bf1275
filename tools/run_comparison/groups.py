"""Runs that differ in nothing but their seed, under one label."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_dump.report.run import Run, natural_sort, read_run
from megatron_dump.report.settings import read_settings

# Where a run writes, how it is observed and how it is spread over ranks: none of it makes another experiment.
ASIDE = re.compile(
    r"model\.seed$|exp_manager\.|trainer\.(num_nodes|devices)$|model\.(tensor|pipeline|context|expert)_model_parallel_size$"
)


@dataclass(frozen=True)
class Seed:
    """One run of a group."""

    run: Run
    seed: object  # model.seed; the folder's name for a run without config.yaml
    settings: dict[str, Any]

    @property
    def tokens(self) -> np.ndarray:
        """float64 [S]: tokens generated up to each step; NaN for runs that did not count them."""
        return np.cumsum(self.run.series("perf/generated_tokens"))

    def tested(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(steps, tokens, accuracy) [V] of the validations; accuracy is the unweighted mean over sources."""
        steps = np.array([step for step, _ in self.run.validations])
        rates = [
            np.mean([v for k, v in row.items() if re.fullmatch(r"val/.+/accuracy", k) and v is not None] or [np.nan])
            for _, row in self.run.validations
        ]
        known = [0, *self.run.steps] if self.run.steps[0] > 0 else self.run.steps
        spent = [0.0, *self.tokens] if self.run.steps[0] > 0 else self.tokens
        return steps, np.interp(steps, known, spent) if len(steps) else np.empty(0), np.array(rates, np.float64)


@dataclass(frozen=True)
class Group:
    """Seeds of one experiment."""

    label: str
    seeds: list[Seed]

    @property
    def sources(self) -> list[str]:
        return natural_sort(source for seed in self.seeds for source in seed.run.sources)


def read_groups(folders: Sequence[Path], labelled: Sequence[tuple[str, Sequence[Path]]]) -> list[Group]:
    """labelled: (label, its folders); the other folders are grouped by what their config.yaml says besides the seed.

    ValueError for a folder given twice, a label given twice, or a group that holds a seed twice.
    """
    every = [*folders, *(folder for _, some in labelled for folder in some)]
    resolved = [folder.resolve() for folder in every]
    if twice := sorted({str(folder) for folder in resolved if resolved.count(folder) > 1}):
        raise ValueError(f"{twice[0]} is given twice: a run counts once")
    groups = _by_settings([_read(folder) for folder in folders])
    groups += [Group(label, [_read(folder) for folder in some]) for label, some in labelled]
    labels = [group.label for group in groups]
    for group in groups:
        if labels.count(group.label) > 1:
            raise ValueError(f"the label {group.label!r} is there twice: give every group another with --group")
        names = [seed.seed for seed in group.seeds]
        if repeated := [name for name in names if names.count(name) > 1]:
            runs = ", ".join(seed.run.name for seed in group.seeds if seed.seed == repeated[0])
            raise ValueError(
                f"group {group.label!r}: {runs} have the same model.seed={repeated[0]}, which would make "
                "the band too narrow: leave one out, or label them apart with --group"
            )
    return groups


def _read(folder: Path) -> Seed:
    settings = read_settings(folder) or {}
    run = read_run(folder)
    return Seed(run, settings.get("model.seed", run.name), settings)


def _by_settings(seeds: list[Seed]) -> list[Group]:
    """Labels name the settings in which the groups differ; without config.yaml, the folder less its number."""
    found: dict[str, list[Seed]] = {}
    for seed in seeds:
        kept = {key: value for key, value in seed.settings.items() if not ASIDE.match(key)}
        kind = re.sub(r"[-_.]?(seed)?[-_]?\d+$", "", seed.run.name) or seed.run.name
        found.setdefault(json.dumps(kept or kind, sort_keys=True), []).append(seed)
    kinds = [some[0].settings for some in found.values()]
    keys = sorted({key for kind in kinds for key in kind if not ASIDE.match(key)})
    differing = [k for k in keys if len({json.dumps(kind.get(k), sort_keys=True) for kind in kinds}) > 1]
    groups = []
    for kind, some in found.items():
        settings = some[0].settings
        values = [f"{'.'.join(key.split('.')[-2:])}={settings[key]}" for key in differing if key in settings]
        name = json.loads(kind)
        label = name if isinstance(name, str) else ", ".join(values) or some[0].run.name
        groups.append(Group(label, some))
    return groups
