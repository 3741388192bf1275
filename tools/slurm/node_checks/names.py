"""Names of nodes: this one's, and those of a job in the order of its tasks."""

from __future__ import annotations

import itertools
import os
import re
import socket


def own_name() -> str:
    """Slurm's name of this node, else the host's."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def name_of(node: int, nodes: int) -> str | None:
    """A node that has not said its name, by Slurm's list of the step's or the job's nodes; None without one."""
    listed = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST") or ""
    names = expand(listed)
    return names[node] if len(names) == nodes else None


def expand(hostlist: str) -> list[str]:
    """Slurm's compressed lists: "login,gpu[01-03,7]" -> login, gpu01, gpu02, gpu03, gpu7."""
    names: list[str] = []
    for part in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", hostlist):
        pieces = re.split(r"\[([^\]]*)\]", part)  # text, ranges, text, ranges, …, text
        choices = [_numbers(piece) if i % 2 else [piece] for i, piece in enumerate(pieces)]
        names += ["".join(choice) for choice in itertools.product(*choices)]
    return names


def _numbers(ranges: str) -> list[str]:
    found: list[str] = []
    for item in ranges.split(","):
        first, _, last = item.partition("-")
        found += [str(n).zfill(len(first)) for n in range(int(first), int(last or first) + 1)]
    return found
