"""Kill a run of launch_slurm.sh at random, again and again, and compare it with an undisturbed one.

    python -m tests.slurm.soak --kills 20 --out docs/results/slurm_soak.md      (or make soak; root, Debian's Slurm)

A rank, a node, or a rank in the middle of a save is killed (-9). After each kill the run must resume from the newest
checkpoint that was complete; at the end, metrics and draws must be those of the undisturbed run, bit for bit.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

from rich.progress import Progress

from tests.distributed.runs import make_data
from tests.slurm.cluster import Cluster, ClusterError, missing
from tests.slurm.jobs import Jobs, Run

KINDS = ("rank", "node", "save")


@dataclasses.dataclass
class Kill:
    number: int
    kind: str
    where: str
    step: int  # of metrics.jsonl when it was killed
    complete: int  # newest complete checkpoint when the next attempt began
    resumed: int = -1
    seconds: float = 0.0  # until the next attempt trains


def newest(run: Run) -> int:
    """The newest complete checkpoint; 0: none."""
    steps = (path.name.partition("_")[2] for path in (run.log_dir / "checkpoints").glob("step_*"))
    return max((int(step) for step in steps if step.isdecimal()), default=0)


def strike(run: Run, kind: str, rng: random.Random) -> str:
    """Kill something, now; who it was."""
    node = rng.choice(run.nodes())
    if kind == "node":
        role = "batch node" if node == run.nodes()[0] else "node"
        run.cluster.kill_node(node)
        return f"{role} {node}"
    if kind == "save":
        partial = (run.log_dir / "checkpoints").glob
        run.cluster.wait(lambda: any(partial("step_*.partial")), 60, lambda: "no save in a minute")
    rank = rng.choice(run.ranks(node))
    os.kill(rank, signal.SIGKILL)
    return f"a rank on {node}"


def one_kill(run: Run, number: int, rng: random.Random) -> Kill:
    """Kill, and wait until the next attempt trains."""
    cluster, attempts, begun = run.cluster, len(run.attempts()), run.steps()
    kind = KINDS[number % len(KINDS)] if number < len(KINDS) else rng.choice(KINDS)
    time.sleep(rng.uniform(0, 5))
    where = strike(run, kind, rng)
    killed, kill = time.monotonic(), Kill(number + 1, kind, where, run.steps(), newest(run))
    with contextlib.suppress(ClusterError):
        run.wait_attempt(attempts + 1, timeout_s=30)
    for node in cluster.nodes:  # as an administrator would; the job may be waiting for it
        cluster.revive(node)
    run.wait_attempt(attempts + 1)
    kill.complete = max(kill.complete, newest(run))  # one that was about to be completed may have been
    cluster.wait(lambda: _resumed(run) is not None, 240, lambda: f"no resume:\n{run.text[-3000:]}")
    kill.resumed = _resumed(run) or 0
    cluster.wait(lambda: _trains(run), 240, lambda: f"no step after {begun}:\n{run.text[-3000:]}")
    kill.seconds = time.monotonic() - killed
    return kill


def _resumed(run: Run) -> int | None:
    """The step from which the latest attempt's trainer went on; None: it has not told yet."""
    with contextlib.suppress(OSError, ValueError):
        return max(int((run.attempts()[-1] / "preflight/resume_step").read_text()), 0)
    return None


def _trains(run: Run) -> bool:
    """The latest attempt has done a step."""
    log = next(iter(sorted(run.attempts()[-1].glob("node?.log"))), None)
    return log is not None and "\nstep " in log.read_text()


def report(kills: list[Kill], same: bool, steps: int, seconds: float) -> str:
    verdict = "equal, bit for bit" if same else "NOT EQUAL"
    good = sum(kill.resumed == kill.complete for kill in kills)
    cells = ((k.number, k.kind, k.where, k.step, k.complete, k.resumed, round(k.seconds)) for k in kills)
    rows = "\n".join(f"| {' | '.join(map(str, row))} |" for row in cells)
    return f"""# Twenty kills in a row
`make soak`: the kk_cpu job (TP=2 × DP=2 on two of three nodes of a real Slurm cluster on one machine with two cores),
{steps} steps with a checkpoint every second one, killed with `kill -9` at random: a rank, a whole node, or a rank in
the middle of a save. {time.strftime("%Y-%m-%d")}, {seconds / 60:.0f} minutes.

- Resumed from the newest complete checkpoint: {good} of {len(kills)}.
- Metrics of all {steps} steps and all draws against an undisturbed run: {verdict}.

| kill | what | where | step | complete checkpoint | resumed from | seconds until it trained again |
|--|--|--|--|--|--|--|
{rows}

Where Slurm must notice that a node is gone, that takes its `SlurmdTimeout`, here 10 seconds.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=0, help="of the run; 0: two a kill, and eight")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if reason := missing():
        print(f"no Slurm cluster: {reason}", file=sys.stderr)
        return 1
    steps = args.steps or 2 * args.kills + 8
    rng, begin = random.Random(args.seed), time.monotonic()
    with tempfile.TemporaryDirectory() as folder, Cluster(nodes=3) as cluster, Progress() as progress:
        data = make_data(Path(folder) / "data")
        settings = {"trainer.grpo.max_steps": steps}
        task = progress.add_task("undisturbed", total=args.kills)
        plain = Jobs(cluster, data, Path(folder) / "plain").submit(**settings)
        plain.wait("COMPLETED", timeout_s=900)
        run = Jobs(cluster, data, Path(folder) / "killed").submit(env={"MAX_FAILURES": "1000"}, **settings)
        cluster.wait(lambda: run.attempts() and _trains(run), 240, lambda: run.text[-3000:])
        kills = []
        for number in range(args.kills):
            kills.append(one_kill(run, number, rng))
            progress.update(task, advance=1, description=f"kill {number + 1}: {kills[-1].where}")
        run.wait("COMPLETED", timeout_s=900)
        same = run.results() == plain.results()
    text = report(kills, same, steps, time.monotonic() - begin)
    print(text)
    if args.out:
        args.out.write_text(text)
    return 0 if same and all(kill.resumed == kill.complete for kill in kills) else 1


if __name__ == "__main__":
    sys.exit(main())
