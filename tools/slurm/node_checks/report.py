"""What the head node leaves: a table, the problems, and files for the script that started it."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from node_checks.compare import gib
from node_checks.facts import Facts, Findings, Problem

FILES = ("resume_step", "bad_nodes", "refused", "report.json")


def show(facts: Mapping[int, Facts], findings: Mapping[int, Findings], problems: Sequence[Problem]) -> None:
    plain = {"width": 120, "force_terminal": False, "color_system": None, "highlight": False}
    console = Console(highlight=False) if sys.stdout.isatty() else Console(**plain)
    if facts:
        usual = facts[min(facts)].versions
        console.print(_table(facts, findings, usual))
        console.print(Text(", ".join(f"{name} {value}" for name, value in usual.items())), soft_wrap=True)
    for problem in problems:
        word, style = ("warning", "yellow") if problem.is_warning else ("error", "red")
        console.print(Text(f"pre-flight {word}: {problem.text}", style=style), soft_wrap=True)
    if not any(not p.is_warning for p in problems):
        step = facts[0].resume_step
        console.print(Text(f"resumes from step {step}" if step >= 0 else "starts anew"))


def _table(facts: Mapping[int, Facts], findings: Mapping[int, Findings], usual: Mapping[str, str]) -> Table:
    table = Table("node", "versions", "GPUs", box=box.SIMPLE, padding=(0, 1, 0, 0))
    for title in ("memory free", "disk free", "all-reduce"):
        table.add_column(title, justify="right", no_wrap=True)
    for node, f in sorted(facts.items()):
        names = dict.fromkeys([*usual, *f.versions])
        other = ", ".join(
            f"{name} {f.versions.get(name, '–')}" for name in names if f.versions.get(name) != usual.get(name)
        )
        kinds = ", ".join(f"{f.gpus.count(kind)} × {kind}" for kind in dict.fromkeys(f.gpus))
        reduce, found = "–", findings.get(node)
        if found and found.gb_per_s is not None and found.latency_us is not None:
            reduce = f"{found.gb_per_s:.2f} GB/s, {found.latency_us:.0f} µs"
        free = [gib(size) if size else "–" for size in (f.memory, f.disk)]
        table.add_row(Text(f.host), Text(other or "as below"), Text(kinds or "–"), *free, reduce)
    return table


def leave(
    folder: pathlib.Path,
    facts: Mapping[int, Facts],
    findings: Mapping[int, Findings],
    problems: Sequence[Problem],
    names: Mapping[int, str | None],
    seconds: float,
) -> None:
    """resume_step, bad_nodes, refused and report.json; what an earlier pre-flight left there goes. OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        (folder / name).unlink(missing_ok=True)
    head = facts.get(0)
    if head is not None and not head.refused and not head.failed:
        _write(folder / "resume_step", f"{head.resume_step}\n")
    bad = sorted({node for problem in problems if not problem.is_warning for node in problem.at_fault})
    _write(folder / "bad_nodes", "".join(f"{names[node]}\n" for node in bad if names[node]))
    refusals = [p.text for p in problems if p.is_refusal]
    if refusals:
        _write(folder / "refused", "\n".join(refusals) + "\n")
    table = {
        "ok": all(p.is_warning for p in problems),
        "seconds": round(seconds, 2),
        "nodes": [
            {"node": n, **dataclasses.asdict(f), "found": dataclasses.asdict(findings[n]) if n in findings else None}
            for n, f in sorted(facts.items())
        ],
        "problems": [p.as_json() for p in problems],
    }
    _write(folder / "report.json", json.dumps(table, indent=1, ensure_ascii=False) + "\n")


def _write(path: pathlib.Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text)
    os.replace(partial, path)
