"""A machine's constants from what was measured on it: collectives, and steps of one rank."""

from __future__ import annotations

import dataclasses
import pathlib
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from megatron_dump.config import Config
from multinode_bench import generation, predict
from multinode_bench.constants import Constants
from multinode_bench.files import read_json
from multinode_bench.fit import Fit, fit
from multinode_bench.network import Link, all_reduce_columns
from multinode_bench.predict import Cost, Run
from multinode_bench.simulate import make_run
from multinode_bench.steps import Measured, read_arguments

_UNUSED_S = 1e-3  # a phase that a configuration has no use for takes microseconds
_FREE = float("inf")  # of a rate: what it counts takes no time
# Constants -> the phase that shows them, its prediction. In this order: prompts of a generation are forward passes.
_PARTS: dict[str, tuple[str, Callable[[Run], Cost]]] = {
    "train": ("update_actor", lambda run: predict.update(run).times(run.work.updates)),
    "forward": ("ref", predict.reference),
    "decode": ("gen", lambda run: generation.generation(run, generation.choose(run))),
}


def calibrate(out: pathlib.Path, steps: Sequence[Measured]) -> tuple[Constants, dict[str, Fit]]:
    """Fitted to OUT/collectives and to the `steps` of one rank; and how well each fit does.

    ValueError, one line, where something that is needed was not measured.
    """
    collectives = [read_json(path, "--check") for path in sorted((out / "collectives").glob("*.json"))]
    alone = [m for m in steps if m.ranks == 1]
    if not collectives or not alone:
        raise ValueError(f"{out}: measure first: `collectives`, and `scaling --layouts=1,…`, with --out={out}")
    links, fits = _links([row for found in collectives for row in found["rows"]])
    machine, cuda = collectives[0]["machine"], collectives[0]["machine"]["cuda"]
    copy = min(found["copy_bytes_per_s"] for found in collectives)
    constants = Constants(
        name=f"measured: {machine['device']}",
        ranks_per_node=max(c["ranks"] // c["nodes"] for c in collectives),
        cores_per_node=None if cuda else machine["cores"],
        memory_bytes=None,
        train_flops=_FREE,
        train_layer_s=0.0,
        forward_flops=_FREE,
        forward_layer_s=0.0,
        decode_flops=_FREE,
        decode_layer_s=0.0,
        memory_bytes_per_s=copy,
        host_bytes_per_s=copy,
        reward_s=statistics.median(s["reward"] / _rollouts(m) for m in alone for s in m.seconds),
        other_s=statistics.median(s["other"] for m in alone for s in m.seconds),
        links=links,
        measured_ranks=max(c["ranks"] for c in collectives),
        measured_nodes=max(c["nodes"] for c in collectives),
        sources={
            "links": f"measured: {sum(len(c['rows']) for c in collectives)} collectives",
            "memory_bytes_per_s, host_bytes_per_s": "measured: a copy of memory, all ranks at once",
            "all others": f"measured: steps of one rank, {', '.join(m.name for m in alone)}",
        },
    )
    for part, (phase, _) in _PARTS.items():
        if phase == "ref" and all(m.median("ref") < _UNUSED_S for m in alone):
            constants = dataclasses.replace(constants, forward_flops=constants.train_flops)
            continue
        fits[part] = found = _compute(part, alone, constants)
        layer_s, flop_s = found.coefficients
        constants = dataclasses.replace(constants, **{f"{part}_flops": 1 / flop_s, f"{part}_layer_s": layer_s})
    return constants, fits


def runs(measured: Measured, machine: Constants) -> list[Run]:
    """[S] what each step had to do, for a prediction."""
    config: Config = read_arguments(measured.arguments)
    return [make_run(config, measured.ranks, measured.prompts, lengths, machine) for lengths in measured.lengths]


def _compute(part: str, alone: Sequence[Measured], known: Constants) -> Fit:
    """Seconds a layer and micro-batch (or position), seconds a floating-point operation; the latter not 0.

    Where overheads alone would explain the steps best, as in noise, they are left out: more ranks must have less to do.
    """
    phase, cost = _PARTS[part]
    machines = [
        dataclasses.replace(known, **{f"{part}_flops": rate, f"{part}_layer_s": layer})
        for rate, layer in ((_FREE, 0.0), (_FREE, 1.0), (1.0, 0.0))  # what is known already; one column each
    ]
    columns, left = [], []
    for m in alone:
        base, layers, flops = ([cost(run).total for run in runs(m, machine)] for machine in machines)
        for i, step in enumerate(m.seconds):
            columns.append((layers[i] - base[i], flops[i] - base[i]))
            left.append(max(step[phase] - base[i], 0.01 * step[phase]))  # known parts are estimates, too
    found = fit(columns, left)
    if found.coefficients[1] == 0:
        found = fit([(flops,) for _, flops in columns], left)
        found = dataclasses.replace(found, coefficients=(0.0, *found.coefficients))
    return found


def _links(rows: Sequence[dict[str, Any]]) -> tuple[dict[str, dict[str, Link]], dict[str, Fit]]:
    """By class: groups on one node, groups with one rank a node. Others mix both and are not fitted to."""
    links: dict[str, dict[str, Link]] = {}
    fits: dict[str, Fit] = {}
    classes = {"intra": lambda row: row["nodes"] == 1, "inter": lambda row: row["nodes"] == row["ranks"]}
    for place, belongs in classes.items():
        for kind in ("all_reduce", "p2p"):
            mine = [row for row in rows if row["operation"] == kind and belongs(row)]
            if not mine:
                continue
            columns = []
            for row in mine:
                latency, share = all_reduce_columns(row["ranks"]) if kind == "all_reduce" else (1.0, 1.0)
                columns.append((latency, share * row["bytes"]))
            found = fit(columns, [row["seconds"] for row in mine])
            fits[f"{place} {kind}"] = found
            links.setdefault(place, {})[kind] = Link(*found.coefficients)
    if "intra" not in links:
        raise ValueError("the collectives have no group within a node: measure with several ranks a node")
    return links, fits


def _rollouts(m: Measured) -> int:
    return m.prompts * read_arguments(m.arguments).trainer.grpo.samples_per_prompt
