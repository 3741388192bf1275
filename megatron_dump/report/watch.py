"""A report that keeps up with a run."""

from __future__ import annotations

import time
from pathlib import Path

from megatron_dump.report.page import write_report
from megatron_dump.report.run import read_jsonl
from megatron_dump.report.settings import read_settings

WATCHED = ("metrics.jsonl", "events.jsonl", "samples.jsonl", "config.yaml")


def watch(log_dir: Path, every_s: float) -> None:
    """Write the report whenever the run's files have changed, until the run's last step or Ctrl-C.

    The last one does not refresh itself any more. A folder that holds no step yet is waited for.
    """
    seen: object = None
    is_open = False
    print(f"watching {log_dir}, every {every_s:g} s; Ctrl-C ends it", flush=True)
    try:
        while True:
            state = [(p.stat().st_mtime_ns, p.stat().st_size) for p in (log_dir / n for n in WATCHED) if p.exists()]
            if state != seen and _is_finished(log_dir):
                break
            if state != seen and _has_steps(log_dir):
                html, _ = write_report(log_dir, refresh_s=every_s)
                if not is_open:
                    print(f"open {html}", flush=True)
                    is_open = True
            seen = state
            time.sleep(every_s)
    except KeyboardInterrupt:
        print()
    if _has_steps(log_dir):
        print(*write_report(log_dir), sep="\n", flush=True)


def _has_steps(log_dir: Path) -> bool:
    path = log_dir / "metrics.jsonl"
    return path.exists() and any(_is_step(row) for row in read_jsonl(path))


def _is_finished(log_dir: Path) -> bool:
    """Whether what config.yaml asks for, steps or tokens, is done, and a validation of it where there are any."""
    settings, path = read_settings(log_dir) or {}, log_dir / "metrics.jsonl"
    if not path.exists():
        return False
    rows = read_jsonl(path)
    steps = {row["step"]: row.get("perf/generated_tokens", 0.0) for row in rows if _is_step(row)}
    done = max(steps, default=0)
    max_steps, max_tokens = (settings.get(f"trainer.grpo.max_{what}") for what in ("steps", "generated_tokens"))
    by_steps = isinstance(max_steps, int) and 0 < max_steps <= done
    by_tokens = isinstance(max_tokens, int) and 0 < max_tokens <= sum(steps.values())
    tested = [row["step"] for row in rows if not _is_step(row)]
    validates = settings.get("trainer.grpo.val_check_interval", 0) and tested
    return (by_steps or by_tokens) and (not validates or max(tested) >= done)


def _is_step(row: dict) -> bool:
    return not any(key.startswith("val/") for key in row)
