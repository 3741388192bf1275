"""Compare curriculum policies on a simulated learner, and measure what they cost.

    python tools/benchmark_curriculum.py                   # policies x scenarios x 20 seeds, written to docs/results
    python tools/benchmark_curriculum.py --quick           # a look at every part of it, not written
    python tools/benchmark_curriculum.py --cost            # start-up, draw and observe at 1 M prompts
    python tools/benchmark_curriculum.py --tune            # the constants of dump_ucb_robust
    python tools/benchmark_curriculum.py --plots docs/images/curriculum

megatron_dump/curriculum/simulator.py says what a simulated learner shows and what not.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from curriculum_bench import cost, plots, tune
from curriculum_bench.report import Grid, as_json, page, scenario_grid, section, summary_grid
from curriculum_bench.runs import POLICIES, Result, jobs_of, run_all
from rich.console import Console

from megatron_dump.curriculum.simulator import SCENARIOS, Scenario

DEFAULT_OUT = Path("docs/results/curriculum.md")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--cost", action="store_true", help="time the curriculum instead of simulating")
    mode.add_argument("--tune", action="store_true", help="search the constants of dump_ucb_robust instead")
    mode.add_argument("--plots", type=Path, metavar="FOLDER", help="draw each policy's weights on the ladder instead")
    parser.add_argument("--quick", action="store_true", help="a few steps and seeds; nothing is written without --out")
    parser.add_argument("--seeds", type=int, help="runs of each policy in each scenario (20; 8 for --tune)")
    parser.add_argument("--policies", nargs="+", choices=POLICIES, metavar="POLICY", help=", ".join(POLICIES))
    parser.add_argument("--scenarios", nargs="+", choices=SCENARIOS, metavar="SCENARIO", help=", ".join(SCENARIOS))
    parser.add_argument("--out", type=Path, help="Markdown file; the runs go beside it as .json")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--trials", type=int, default=48, help="with --tune: points of the grid")
    parser.add_argument(
        "--held-out",
        nargs="*",
        choices=SCENARIOS,
        default=tune.HELD_OUT,
        metavar="SCENARIO",
        help="with --tune: scenarios to check the best constants on",
    )
    return parser.parse_args(arguments)


def compare(policies: Mapping, scenarios: Sequence[Scenario], seeds: int, processes: int, quick: bool) -> list[Result]:
    jobs = []
    for scenario in scenarios:
        steps = min(4, scenario.steps) if quick else scenario.steps
        for label, make in policies.items():
            jobs += jobs_of(label, make(scenario), scenario, seeds, steps)
    return run_all(jobs, processes, "runs")


def main() -> None:
    args = parse()
    command = shlex.join(["python", *sys.argv])
    console = Console(width=None if sys.stdout.isatty() else 180)
    policies = {label: POLICIES[label] for label in args.policies or POLICIES}
    start = time.perf_counter()
    if args.plots:
        for path in plots.write(args.plots, policies, 10 if args.quick else None):
            console.print(str(path))
        return
    results: list[Result] = []
    if args.cost:
        grids: list[Grid] = [cost.grid(args.quick, list(policies))]
    elif args.tune:
        trials, seeds = (4, args.seeds or 2) if args.quick else (args.trials, args.seeds or 8)
        grids = tune.search(trials, seeds, args.held_out, args.processes, args.quick)
    else:
        scenarios = [SCENARIOS[name] for name in args.scenarios or SCENARIOS]
        seeds = args.seeds or (2 if args.quick else 20)
        results = compare(policies, scenarios, seeds, args.processes, args.quick)
        grids = [scenario_grid(s, [r for r in results if r.scenario == s.name]) for s in scenarios]
        if any(s.target <= 1.0 for s in scenarios):
            grids.insert(0, summary_grid(results))
    write(args, results, grids, command, time.perf_counter() - start)
    for grid in grids:
        grid.show(console)
    console.print(f"{time.perf_counter() - start:.0f} s")


def write(args: argparse.Namespace, results: list[Result], grids: list[Grid], command: str, seconds: float) -> None:
    """Markdown, and the runs as JSON beside it; by default only a full comparison is written."""
    is_full = bool(results) and not (args.quick or args.policies or args.scenarios)
    out = args.out or (DEFAULT_OUT if is_full else None)
    if out is None:
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text((page if results else section)(grids, command, seconds), encoding="utf-8")
    if results:
        out.with_suffix(".json").write_text(json.dumps(as_json(results, command)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
