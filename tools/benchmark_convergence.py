"""Curricula on a language model at equal generated tokens: which learns how fast, with intervals over seeds.

    python tools/benchmark_convergence.py                      # ten curricula × 5 seeds, one to two hours on two cores
    python tools/benchmark_convergence.py --quick              # three of them, one seed, minutes: does it run?
    python tools/benchmark_convergence.py --arms uniform dump_ucb --seeds 1-3 model.optim.lr=1e-4

Runs (examples/conf/kk_convergence.yaml, one process and one thread each) are in OUT/<arm>/<seed>; called again, those
that were interrupted go on and finished ones are not made anew. OUT.md and OUT.png say what they came to.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path

import matplotlib
from convergence_bench.arms import BASELINE, all_arms
from convergence_bench.figure import draw
from convergence_bench.jobs import Job, JobError, run_all
from convergence_bench.measures import read
from convergence_bench.page import write
from convergence_bench.results import gather

from kk import dataset, generate
from megatron_dump.report.style import STYLE

QUICK = ("uniform", "dump_ucb", "dump+cures+neyman")


def make_data(folder: Path, people: str, train: int, test: int) -> None:
    """Puzzles of every size, once."""
    if (folder / "test.parquet").exists():
        return
    words = ["--names", "8", "--frames", "1", "--seed", "1"]
    sizes = ["--people", people, "--per-size", str(train), "--test-per-size", str(test)]
    for module, command in ((generate, [*sizes, *words]), (dataset, ["--in", str(folder)])):
        if status := module.main([*command, "--out", str(folder)]):
            raise JobError(f"{module.__name__} ended with {status}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/convergence"))
    parser.add_argument("--arms", nargs="+", help="default: all; the baseline is always among them")
    parser.add_argument("--seeds", default="1-5", help="such as 1-5")
    parser.add_argument("--tokens", type=int, default=180_000, help="that each run generates (default: %(default)s)")
    parser.add_argument("--schedule-steps", type=int, default=10, help="of easy_to_hard (default: %(default)s)")
    parser.add_argument("--people", default="2-7")
    parser.add_argument("--train", type=int, default=60, help="training puzzles a size (default: %(default)s)")
    parser.add_argument("--test", type=int, default=100, help="test puzzles a size (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="runs at a time (default: every core)")
    parser.add_argument("--quick", action="store_true", help="few tokens, puzzles and arms, one seed")
    parser.add_argument("--report", type=Path, help="REPORT.md, and REPORT.png; default: OUT.md")
    parser.add_argument("overrides", nargs="*", help="key=value, for all arms")
    args = parser.parse_intermixed_args()
    if args.quick:
        args.tokens, args.test, args.train, args.seeds, args.people = 8_000, 8, 16, "1-1", "2-4"
        args.arms = args.arms or list(QUICK)
    known = all_arms(args.schedule_steps)
    if unknown := [arm for arm in args.arms or () if arm not in known]:
        parser.error(f"--arms {unknown[0]}: known are {', '.join(known)}")
    chosen = [arm for arm in known if args.arms is None or arm in args.arms or arm == BASELINE]
    first, _, last = args.seeds.partition("-")
    seeds = list(range(int(first), int(last or first) + 1))
    out = args.out.resolve()
    settings = (
        f"trainer.grpo.max_generated_tokens={args.tokens}",
        f"model.data.train_files=[{out}/data/train.parquet]",
        f"model.data.validation_files=[{out}/data/test.parquet]",
        *args.overrides,
    )
    jobs = [Job(known[arm], seed, out / arm / str(seed), settings) for seed in seeds for arm in chosen]
    try:
        make_data(out / "data", args.people, args.train, args.test)
        run_all(jobs, args.workers)
        runs = {arm: [read(job.folder, job.seed) for job in jobs if job.arm.name == arm] for arm in chosen}
        results = gather(runs, args.tokens)
    except (JobError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    page = (args.report or out.with_suffix(".md")).resolve()
    note = (
        f"Recipe `kk_convergence`: Knights and Knaves with {args.people} people ({args.train} training, {args.test} "
        f"test puzzles a size), {args.tokens:,} tokens a run."
    )
    command = shlex.join(["python", "tools/benchmark_convergence.py", *sys.argv[1:]])
    with matplotlib.rc_context(STYLE):
        draw(results).savefig(page.with_suffix(".png"), dpi=110)
    text = write(results, {arm: known[arm] for arm in chosen}, command, page.with_suffix(".png").name, note)
    page.write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
