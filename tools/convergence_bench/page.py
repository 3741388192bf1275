"""The benchmark in words and tables: Markdown."""

from __future__ import annotations

import math
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

from convergence_bench.arms import BASELINE, PUBLISHED, Arm
from convergence_bench.jobs import SAMPLES
from convergence_bench.measures import Spent
from convergence_bench.results import Results


def write(results: Results, arms: Mapping[str, Arm], command: str, picture: str, note: str) -> str:
    """The page. picture: the figure's path from the page's folder; note: what the runs share, in a sentence."""
    return (
        "\n\n".join(
            [
                "# Curricula at equal generated tokens",
                f"{note} Seeds: {_listed(results.seeds)}.",
                f"```\n{command}\n```",
                f"{machine()}. Every figure is a mean over seeds ± the half width of its 95 % interval (Student's t), "
                "or has its bootstrap interval over seeds [in brackets], the same seeds drawn for all arms. Tokens: "
                "all that were generated, rejected groups, refills and pre-rollouts included.",
                f"![curves, tokens to {BASELINE}'s accuracy, sources at the end]({picture})",
                f"## Tokens to {BASELINE}'s last accuracy",
                "Where the mean curve over seeds, made non-decreasing by isotonic regression, first reaches the "
                f"accuracy that `{BASELINE}`'s has at the end of the budget; *not reached* is counted as more than the "
                "budget.",
                _spent(results, arms),
                "## At the end of the budget",
                f"Accuracy is sampled at temperature 1, {SAMPLES} samples a puzzle (one under way), the mean over the "
                "sources' validation puzzles; greedy beside it. Worst source: the one furthest behind "
                f"`{BASELINE}`, and by how much.",
                _ends(results),
                _behind(results),
                "## By source, at the end",
                _sources(results),
            ]
        )
        + "\n"
    )


def machine() -> str:
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=10"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    parts = (f"{name} {version(name)}" for name in ("torch", "megatron-core"))
    return (
        f"Commit {commit or 'unknown'}, {os.cpu_count()} cores ({platform.machine()}), Python "
        f"{sys.version.split()[0]}, {', '.join(parts)}, one thread a run"
    )


def _spent(results: Results, arms: Mapping[str, Arm]) -> str:
    def count(tokens: float) -> str:
        return f"{tokens / 1000:.0f}k" if math.isfinite(tokens) else "not reached"

    def ratio(share: float) -> str:
        return f"{share:.2f}" if math.isfinite(share) else "–"

    rows = [("arm", "", "steps", "tokens", f"/ {BASELINE}", f"/ {PUBLISHED}")]
    for arm in results.arms:
        spent = results.spent[arm]
        base, published = (_bracketed(spent[other], ratio) if other in spent else "" for other in (BASELINE, PUBLISHED))
        tokens = _bracketed(spent["tokens"], count)
        rows.append((f"`{arm}`", arms[arm].what, f"{results.steps[arm]:.0f}", tokens, base, published))
    return _table(rows)


def _ends(results: Results) -> str:
    rows = [("arm", "sampled", "gain", f"less {BASELINE}'s", "greedy", "worst source")]
    for arm in results.arms:
        source, behind = results.worst(arm)
        less = "" if arm == BASELINE else results.ahead(arm).text("+.3f")
        worst = "" if arm == BASELINE else f"{source} {behind.text('+.3f')}"
        sampled, gained, greedy = results.final(arm), results.gained(arm), results.final_greedy(arm)
        rows.append((f"`{arm}`", sampled.text(), gained.text("+.3f"), less, greedy.text(), worst))
    return _table(rows)


def _behind(results: Results) -> str:
    found = [f"`{arm}` on {', '.join(names)}" for arm in results.arms if (names := results.behind(arm))]
    return f"Sources below `{BASELINE}` by more than their interval: {'; '.join(found) or 'none'}."


def _sources(results: Results) -> str:
    rows = [("arm", *results.sources)]
    start = [f"{results.accuracy[BASELINE][:, 0, k].mean():.3f}" for k in range(len(results.sources))]
    rows.append(("*before*", *start))
    for arm in results.arms:
        rows.append((f"`{arm}`", *(results.of_source(arm, k)[0].text() for k in range(len(results.sources)))))
    return _table(rows)


def _bracketed(spent: Spent, text) -> str:
    if math.isnan(spent.low):
        return text(spent.value)
    return f"{text(spent.value)} [{text(spent.low)}, {text(spent.high)}]"


def _table(rows: list[tuple[str, ...]]) -> str:
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, "|--" * len(rows[0]) + "|", *body])


def _listed(seeds: list[int]) -> str:
    in_a_row = len(seeds) > 2 and seeds == list(range(seeds[0], seeds[-1] + 1))
    return f"{seeds[0]}-{seeds[-1]}" if in_a_row else ", ".join(map(str, seeds))
