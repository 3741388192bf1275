"""wandb in a process of its own, which follows a run's files: should it hang or fail, training does not notice.

`trackers.Wandb` starts it and sends lines of JSON: {"folder", "options", "parent", "finish_s"}; then {"from_step"}, the
first step to upload; then {"end"}. The answer to the first is one line on stdout: {} or {"refused": why}.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import queue
import re
import select
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

POLL_S = 1.0
TABLES_EVERY = 10  # steps between two uploads of tables at first; later a fifth of the steps done
CHART_STEPS = 200  # places of the chart of weights
WEIGHT = re.compile(r"curriculum/(.+)/weight")
COLUMNS = ("step", "source", "prompt", "completion", "reward", "correct", "reason")


class Warnings:
    """One line on stderr, of the first failure, without secrets."""

    def __init__(self) -> None:
        self._given = False

    def tell(self, message: str) -> None:
        if not self._given:
            print(f"warning: wandb: {redact(message)}; training and metrics.jsonl go on", file=sys.stderr, flush=True)
        self._given = True

    def attempt(self, action: Any) -> Any:
        try:
            return action()
        except Exception as error:  # noqa: BLE001  whatever a tracker raises, the run goes on
            self.tell(f"{type(error).__name__}: {error}")
            return None


class Upload:
    """What goes to wandb of the lines that the run has written. `run` is wandb's."""

    def __init__(self, wandb: Any, run: Any, folder: Path, from_step: int, warnings: Warnings) -> None:
        self._wandb, self._run, self._folder, self._from, self._warnings = wandb, run, folder, from_step, warnings
        self._read = {"metrics.jsonl": 0, "samples.jsonl": 0}  # bytes
        self._weights: dict[int, dict[str, float]] = {}  # step -> source -> weight, of earlier parts of the run too
        self._samples: dict[str, dict[str, Any]] = {}  # the latest of each source
        self._step, self._tables_at = -1, TABLES_EVERY

    def follow(self) -> None:
        """Send every complete line that is new. Metrics first: samples of their steps, but the last, are then there."""
        rows = self._new("metrics.jsonl")
        for row in rows:
            weights = {m[1]: v for k, v in row.items() if v is not None and (m := WEIGHT.fullmatch(k))}
            if weights:
                self._weights[row["step"]] = weights
        samples = self._new("samples.jsonl")
        for row in rows:
            if row["step"] < self._from:
                continue
            if row["step"] > self._step >= self._tables_at:
                self._take(samples, self._step)
                self.send_tables()
            self._step = row["step"]
            self._send({k: v for k, v in row.items() if k != "step" and v is not None})
        self._take(samples, None)

    def send_tables(self) -> None:
        """The latest completion of each source, and all sources' weights in one chart, under the latest step."""
        self._tables_at = max(self._step + TABLES_EVERY, int(1.2 * self._step))
        content: dict[str, Any] = {}
        if self._samples:
            rows = [[self._samples[source].get(name) for name in COLUMNS] for source in sorted(self._samples)]
            content["samples"] = self._wandb.Table(columns=list(COLUMNS), data=rows)
        steps = sorted(step for step in self._weights if step <= self._step)
        if steps:
            steps = [step for place, step in enumerate(steps) if place % -(-len(steps) // CHART_STEPS) == 0]
            sources = sorted({source for step in steps for source in self._weights[step]})
            ys = [[self._weights[step].get(source, 0.0) for step in steps] for source in sources]
            content["curriculum/weights"] = self._wandb.plot.line_series(steps, ys, sources, "Source weights", "step")
        if content and self._step >= 0:
            self._send(content)

    def _send(self, content: dict[str, Any]) -> None:
        self._warnings.attempt(lambda: self._run.log(content, step=self._step))

    def _take(self, samples: list[dict[str, Any]], until: int | None) -> None:
        while samples and (until is None or samples[0]["step"] <= until):
            sample = samples.pop(0)
            self._samples[sample["source"]] = sample

    def _new(self, name: str) -> list[dict[str, Any]]:
        path = self._folder / name
        if not path.exists():
            return []
        with path.open("rb") as file:
            file.seek(self._read[name])
            text = file.read()
        text = text[: text.rfind(b"\n") + 1]
        self._read[name] += len(text)
        return [json.loads(line) for line in text.splitlines()]


def redact(text: str) -> str:
    """In one line, without the value of any environment variable whose name says that it is a secret."""
    for name, value in os.environ.items():
        if re.search("KEY|TOKEN|SECRET|PASSW", name.upper()) and value:
            text = text.replace(value, "***")
    return " ".join(text.split())


def refusal(options: Mapping[str, Any]) -> str | None:
    """Why wandb cannot be used as asked for, if so."""
    try:
        import wandb
    except ImportError as error:
        return f"exp_manager.create_wandb_logger=true, and wandb cannot be imported ({error}): pip install wandb"
    known = inspect.signature(wandb.init).parameters
    unknown = [key for key in options if key not in known]
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in known.values()):
        return f"exp_manager.wandb_logger_kwargs.{unknown[0]} is no argument of wandb.init: {', '.join(known)}"
    return None


def upload(folder: Path, options: dict[str, Any], commands: queue.Queue[dict[str, Any]]) -> None:
    """Until the run ends. A run that never begins leaves nothing at wandb."""
    import wandb

    begun = commands.get()
    if "from_step" not in begun:
        return
    warnings = Warnings()
    # console="off": what a process prints is not uploaded, so nothing printed by mistake leaves the cluster
    settings = {"console": "off", **(options.pop("settings", None) or {})}
    run = warnings.attempt(lambda: wandb.init(settings=wandb.Settings(**settings), **options))
    if run is None:
        return
    sent, ended = Upload(wandb, run, folder, begun["from_step"], warnings), False
    while not ended:
        with contextlib.suppress(queue.Empty):
            ended = bool(commands.get(timeout=POLL_S))
        warnings.attempt(sent.follow)
    warnings.attempt(sent.send_tables)
    warnings.attempt(run.finish)


def listen(commands: queue.Queue[dict[str, Any]], parent: int, finish_s: float) -> None:
    """Pass the lines of stdin on; at their end, or that of the run's process, allow the upload so many seconds more.

    The process may be gone and stdin still open: in processes that it has forked.
    """
    rest, ended = b"", False
    while not ended:
        is_orphan = os.getppid() != parent  # asked first: what its parent had sent can then be read
        ready = select.select([0], [], [], 0 if is_orphan else POLL_S)[0]
        ended = is_orphan and not ready
        if ready:
            part = os.read(0, 65536)
            *lines, rest = (rest + part).split(b"\n")
            messages = [json.loads(line) for line in lines]
            ended = not part or any("end" in message for message in messages)
            for message in messages:
                commands.put(message)
    commands.put({"end": True})
    time.sleep(finish_s)
    print(
        f"warning: wandb did not take everything within {finish_s:g} s of the run's end: `wandb sync` of the run's "
        "folder wandb/ sends the rest",
        file=sys.stderr,
        flush=True,
    )
    os._exit(0)  # its own exit would wait on


def main() -> None:
    first = json.loads(sys.stdin.buffer.raw.readline())  # type: ignore[attr-defined]  unbuffered: `listen` reads on
    why = refusal(first["options"])
    print(json.dumps({} if why is None else {"refused": why}), flush=True)
    os.dup2(2, 1)  # nobody reads stdout from here on
    if why is None:
        commands: queue.Queue[dict[str, Any]] = queue.Queue()
        threading.Thread(target=listen, args=(commands, first["parent"], first["finish_s"]), daemon=True).start()
        upload(Path(first["folder"]), first["options"], commands)
