"""TensorBoard and wandb."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import secrets
import select
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import megatron_dump

log = logging.getLogger("megatron_dump.monitor")
START_S = 120.0  # for the import of wandb, from a slow file system
FINISH_S = 60.0  # that the end of a run waits for uploads


class Tracker(Protocol):
    """Values go to metrics.jsonl first, samples to samples.jsonl."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def log_samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Scalars, charts of all sources in one, and completions as text."""

    def __init__(self, log_dir: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # opened at the first step that it sees: a resume hides what it repeats
        self._open = lambda step: SummaryWriter(str(log_dir / "tensorboard"), purge_step=step)
        self._writer: Any = None
        self._has_charts = False

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._writer = self._writer or self._open(step)
        sources = [match[1] for key in values if (match := re.fullmatch(r"curriculum/(.+)/weight", key))]
        if sources and not self._has_charts:
            self._add_charts(sources)
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)

    def log_samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        self._writer = self._writer or self._open(step)
        for sample in samples:
            verdict = "right" if sample["correct"] else "wrong"
            texts = (f"{verdict}, reward {sample['reward']}", sample["prompt"], sample["completion"])
            # indented text is code in Markdown: what a model writes is never markup
            shown = "\n\n".join("    " + text.replace("\n", "\n    ") for text in texts)
            self._writer.add_text(f"samples/{sample['source']}", shown, step)

    def _add_charts(self, sources: Sequence[str]) -> None:
        keys = {
            "weights": "curriculum/{}/weight",
            "learnability": "curriculum/{}/mean_abs_adv",
            "pass rates": "train/{}/accuracy",
            "test accuracy": "val/{}/accuracy",
        }
        charts = {name: ["Multiline", [f"^{re.escape(key.format(s))}$" for s in sources]] for name, key in keys.items()}
        self._writer.add_custom_scalars({"sources": charts})
        self._has_charts = True

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class Wandb:
    """Starts `wandb_process`, which uploads what the run's files say. Nothing here waits for the network.

    ValueError if wandb is not installed, or for arguments that `wandb.init` does not know.
    """

    def __init__(self, log_dir: Path, kwargs: Mapping[str, Any]) -> None:
        id_file = log_dir / "wandb_run_id"  # the same run goes on after a resume
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(4))
        options = {"dir": str(log_dir), "id": id_file.read_text().strip(), "resume": "allow", **kwargs}
        root = str(Path(megatron_dump.__file__).resolve().parents[1])
        program = f"import sys; sys.path.append({root!r}); from megatron_dump.monitor.wandb_process import main; main()"
        self._process = subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,  # Ctrl-C is for the run, which ends this
        )
        self._has_begun = False
        first = {"folder": str(log_dir), "options": options, "parent": os.getpid(), "finish_s": FINISH_S}
        self._send(first)
        self._check(self._answer())

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if not self._has_begun:
            self._has_begun = True
            self._send({"from_step": step})

    def log_samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """They are in samples.jsonl."""

    def close(self) -> None:
        """Wait for the uploads, FINISH_S at most."""
        self._send({"end": True})
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        try:
            self._process.wait(FINISH_S + 30.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.returncode != 0:
            log.warning("wandb's process ended with %d; metrics.jsonl is complete", self._process.returncode)

    def _send(self, message: Mapping[str, Any]) -> None:
        """A few hundred bytes, which a pipe takes at once."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended, and has said why, or `close` does
            self._process.stdin.write(json.dumps(message).encode() + b"\n")

    def _answer(self) -> bytes:
        """Its first line; empty if none came in time."""
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], START_S)
        return self._process.stdout.readline() if ready else b""

    def _check(self, answer: bytes) -> None:
        if not answer:
            log.warning("wandb did not start within %g s; metrics.jsonl goes on", START_S)
        elif why := json.loads(answer).get("refused"):
            self._process.wait()
            raise ValueError(why)
