"""What torchrun left of ranks that failed.

ranks/<host>/<run>/attempt_0/<local rank>/error.json   exception of a rank, by torch.distributed.elastic's `record`:
    {"message": {"message": "ValueError: …", "extraInfo": {"py_callstack": "Traceback …", "timestamp": "179…"}}}
<host>.log   output of the node's torchrun and ranks; a torchrun whose rank failed ends it with a summary:
    Failures: / [1]: / time : … / rank : 0 (local_rank: 0) / exitcode : -15 (pid: 7239) … / Root Cause …: / [0]: …
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import pathlib
import re
import signal
from typing import Any

LOG_BYTES = 8 * 2**20  # read of a log's end
_SUMMARY = re.compile(r"^(.*\bFailures:|.*Root Cause \(first observed failure\):)$")
_FIELD = re.compile(r"^.*?\b(time|rank|exitcode)\s*: (.*)$")


@dataclasses.dataclass
class Failure:
    """A rank that ended otherwise than it should."""

    host: str
    local_rank: int
    rank: int | None = None  # global; None where torchrun left no summary
    time: float = 0.0  # seconds since the epoch
    exit_code: int | None = None  # below 0: a signal's number
    pid: int | None = None
    message: str = ""
    traceback: str = ""
    is_first_of_node: bool = False  # by its torchrun
    was_recorded: bool = False  # an exception, with its traceback

    @property
    def signal(self) -> str | None:
        """Name of the signal that ended it."""
        if self.exit_code is None or self.exit_code >= 0:
            return None
        try:
            return signal.Signals(-self.exit_code).name
        except ValueError:
            return f"signal {-self.exit_code}"


def read(attempt: pathlib.Path) -> tuple[list[Failure], dict[str, list[str]]]:
    """(failures, {host: the last lines of its log}) of a folder as launch_slurm.sh makes it for every attempt."""
    folders = sorted(path for path in (attempt / "ranks").glob("*") if path.is_dir())
    logs = {path.stem: _tail(path) for path in sorted(attempt.glob("*.log"))}
    found: dict[tuple[str, int], Failure] = {}
    for host in sorted({path.name for path in folders} | logs.keys()):
        for failure in _summary(host, logs.get(host, [])):
            found[host, failure.local_rank] = failure
    for folder in folders:
        for path in sorted(folder.rglob("error.json")):
            if path.parent.name.isdigit():
                local_rank = int(path.parent.name)
                failure = found.setdefault((folder.name, local_rank), Failure(folder.name, local_rank))
                _add_record(failure, path)
    for failure in found.values():
        if not failure.was_recorded:
            failure.message = _said(failure, logs.get(failure.host, []))
    return list(found.values()), logs


def _tail(path: pathlib.Path) -> list[str]:
    with path.open("rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(file.tell() - LOG_BYTES, 0))
        return file.read().decode(errors="replace").splitlines()


def _summary(host: str, lines: list[str]) -> list[Failure]:
    """The entries of torchrun's summary."""
    failures: list[Failure] = []
    fields: dict[str, str] = {}
    is_inside = is_root = False
    for line in lines:
        if heading := _SUMMARY.match(line):
            is_inside, is_root, fields = True, "Root Cause" in heading[1], {}
        elif is_inside and (field := _FIELD.match(line)) and field[1] not in fields:
            fields[field[1]] = field[2]
            if field[1] == "exitcode":  # the last of those that are read
                failures += _entry(host, fields, is_root)
                fields = {}
    return failures


def _entry(host: str, fields: dict[str, str], is_root: bool) -> list[Failure]:
    """[] for lines that only look like an entry: what a rank printed itself."""
    ranks = re.match(r"(\d+) \(local_rank: (\d+)\)", fields.get("rank", ""))
    end = re.match(r"(-?\d+)\s+\(pid: (\d+)\)", fields["exitcode"])
    if not ranks or not end:
        return []
    try:
        time = datetime.datetime.strptime(fields.get("time", "").strip(), "%Y-%m-%d_%H:%M:%S").timestamp()
    except ValueError:
        return []
    return [Failure(host, int(ranks[2]), int(ranks[1]), time, int(end[1]), int(end[2]), is_first_of_node=is_root)]


def _add_record(failure: Failure, path: pathlib.Path) -> None:
    try:
        message: Any = json.loads(path.read_text())["message"]
    except (ValueError, KeyError, TypeError) as error:  # cut short: the rank died while it wrote
        failure.message = f"{path} cannot be read: {error}"
        return
    failure.was_recorded = True
    if not isinstance(message, dict):
        failure.message = str(message)
        failure.time = failure.time or path.stat().st_mtime
        return
    extra = message.get("extraInfo", {})
    failure.message, failure.traceback = str(message.get("message", "")), str(extra.get("py_callstack", ""))
    failure.time = float(extra.get("timestamp") or path.stat().st_mtime)


def _said(failure: Failure, lines: list[str]) -> str:
    """What is known of a rank without a record: how it ended, and its own last word in the log."""
    how = f"killed by {failure.signal}" if failure.signal else f"exit code {failure.exit_code}"
    own = [line for line in lines if re.search(rf"\[rank {failure.rank}\] error: ", line)]
    return f"{how}: {own[-1].partition('] error: ')[2]}" if own else (failure.message or how)
