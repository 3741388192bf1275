"""Predictions beside what was measured: seconds of layouts that the constants were not fitted to, bytes of all."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

from megatron_dump.actor import memory as real
from multinode_bench import memory
from multinode_bench.calibrate import runs
from multinode_bench.constants import Constants
from multinode_bench.simulate import phases
from multinode_bench.steps import PHASES, Measured


def seconds(measured: Sequence[Measured], machine: Constants) -> list[dict[str, Any]]:
    """A row a layout: medians over its steps, predicted and measured, by phase; `fitted`: one rank's."""
    rows = []
    for m in measured:
        predicted = [{name: cost.total for name, cost in phases(run).items()} for run in runs(m, machine)]
        shown: dict[str, Any] = {}
        for phase in (*PHASES, "other"):
            shown[phase] = {"predicted": statistics.median(p[phase] for p in predicted), "measured": m.median(phase)}
        total = statistics.median(sum(p.values()) for p in predicted)
        shown["step"] = {"predicted": total, "measured": m.median("step")}
        rows.append(
            {
                "name": m.name,
                "mode": m.mode,
                "ranks": m.ranks,
                "fitted": m.ranks == 1,
                "phases": shown,
                "ratio": total / m.median("step"),
            }
        )
    return rows


def bytes_held(measured: Sequence[Measured], machine: Constants) -> list[dict[str, Any]]:
    """A row a layout and part of memory.PARTS: predicted and measured bytes, summed over ranks, and whether every
    rank's are the same."""
    rows = []
    for m in measured:
        run = runs(m, machine)[0]
        config = run.work.config
        predicted = [
            list(
                dataclasses.astuple(
                    memory.held(
                        run.shape,
                        stage,
                        rank,
                        size,
                        run.work.element,
                        config.model.use_distributed_optimizer,
                        config.model.overlap_grad_reduce,
                        config.trainer.grpo.initial_policy_kl_penalty > 0,
                    )
                )
            )
            for stage, rank, size in m.places
        ]
        for i, part in enumerate(real.PARTS):
            ours, theirs = [p[i] for p in predicted], [h[i] for h in m.held]
            rows.append(
                {"name": m.name, "part": part, "predicted": sum(ours), "measured": sum(theirs), "exact": ours == theirs}
            )
    return rows
