"""Which rank of an attempt failed first, and why.

    python tools/slurm/first_failure.py ATTEMPT

Reads what torchrun left in ATTEMPT/ranks/<host> (--log-dir) and the nodes' logs, ATTEMPT/<host>.log. A cause comes
before its consequences: ranks that a signal killed, then exceptions of a rank's own, then other exits, then ranks that
lost a peer or waited too long; among equals the earliest. Leaves the host's name in ATTEMPT/failed_node, if one node
can be told.
"""

from __future__ import annotations

import argparse
import datetime
import os
import pathlib
import re
from collections.abc import Sequence

from rank_failures import causes, records
from rank_failures.records import Failure

TRACEBACK_LINES, LOG_LINES = 40, 20
# torchrun's own words after a failure: the summary above all
_LAUNCHER = re.compile(r"torch/distributed/elastic/multiprocessing/(api|errors/error_handler)\.py:\d+\]")


def describe(failure: Failure, lines: Sequence[str]) -> str:
    """Where, when and what, in full; `lines`: the node's log."""
    when = datetime.datetime.fromtimestamp(failure.time).isoformat(sep=" ", timespec="seconds")
    rank = "rank not known" if failure.rank is None else f"rank {failure.rank}"
    parts = [f"first failure: host {failure.host}, {rank}, local rank {failure.local_rank}, at {when}", failure.message]
    if kind := causes.kind(failure, lines):
        parts.append(f"({kind})")
    if failure.traceback:
        parts += failure.traceback.rstrip().splitlines()[-TRACEBACK_LINES:]
    before = [line for line in log_before_end(lines) if line.strip() and not _of_another_rank(line, failure.rank)]
    if failure.traceback:
        before = without_tracebacks(before)
    if before:
        parts += [f"last lines of {failure.host}.log before it ended:", *(f"  {t}" for t in before[-LOG_LINES:])]
    return "\n".join(parts)


def log_before_end(lines: Sequence[str]) -> list[str]:
    """A node's log up to where its torchrun begins to speak of the failure; slurmstepd's lines after it are kept."""
    end = next((i for i, line in enumerate(lines) if _LAUNCHER.search(line)), len(lines))
    return [*lines[:end], *(line for line in lines[end:] if line.startswith(("slurmstepd:", "srun:")))]


def without_tracebacks(lines: Sequence[str]) -> list[str]:
    """Up to and with the line that names the exception."""
    kept, is_inside = [], False
    for line in lines:
        text = re.sub(r"^\[rank\d+\]: ?", "", line)
        if text.startswith("Traceback (most recent call last)"):
            is_inside = True
        elif not is_inside:
            kept.append(line)
        elif not text.startswith(" "):
            is_inside = False
    return kept


def _of_another_rank(line: str, rank: int | None) -> bool:
    mark = re.match(r"\[rank(\d+)\]:", line)
    return mark is not None and rank is not None and int(mark[1]) != rank


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("attempt", type=pathlib.Path)
    attempt: pathlib.Path = parser.parse_args().attempt
    if not attempt.is_dir():
        parser.error(f"{attempt}: no such folder")
    failures, logs = records.read(attempt)
    (attempt / "failed_node").unlink(missing_ok=True)
    failure = causes.first(failures, logs)
    if failure is None:
        print(f"no rank's failure is recorded in {attempt}/ranks, nor told by torchrun in the nodes' logs")
        for host, lines in logs.items():
            print("\n".join([f"last lines of {host}.log:", *(f"  {line}" for line in lines[-LOG_LINES:])]))
        return
    print(describe(failure, logs.get(failure.host, [])))
    started = {path.name for path in (attempt / "ranks").glob("*")}
    node = causes.node_at_fault(failure, failures, logs, started)
    if node is None:
        print("which node it is to be laid to cannot be told")
        return
    if node != failure.host:
        print(f"the other nodes lost a peer; {node} says nothing of a failure: it may have gone down. Its log ends:")
        print("\n".join(f"  {line}" for line in logs[node][-LOG_LINES:]))
    partial = attempt / "failed_node.partial"
    partial.write_text(f"{node}\n")
    os.replace(partial, attempt / "failed_node")


if __name__ == "__main__":
    main()
