"""The sub-commands of tools/benchmark_multinode.py."""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from kk.progress import each
from megatron_dump.actor import parallel
from megatron_dump.actor.layout import Layout
from megatron_dump.distributed import fail_together
from multinode_bench import calibrate, check, collectives, page, scaling, simulate, steps, tables
from multinode_bench.constants import read_constants, save_constants
from multinode_bench.files import machine, write_json
from multinode_bench.workload import Lengths


def measure_collectives(options: argparse.Namespace) -> None:
    layout = Layout(tensor=options.tensor, pipeline=options.pipeline, context=options.context)
    grid = parallel.initialize(layout)
    found = collectives.measure(grid, options.quick, options.repeats)
    with fail_together(f"--out={options.out}", device=grid.device):
        if grid.rank == 0:
            save_collectives(found, layout, options.out)
    dist.destroy_process_group()


def save_collectives(found: dict[str, Any], layout: Layout, out: pathlib.Path) -> None:
    """As JSON, in the report and on the console."""
    name = f"{found['ranks']}-TP{layout.tensor}-PP{layout.pipeline}-CP{layout.context}"
    write_json(out / "collectives" / f"{name}.json", {**found, "name": name, "machine": machine()})
    print(tables.collectives(found["fits"]).text())
    print(page.write_report(out), flush=True)


def measure_step(options: argparse.Namespace) -> None:
    steps.measure(options.name, options.mode, options.given, options.steps, options.out)
    dist.destroy_process_group()


def measure_scaling(options: argparse.Namespace) -> None:
    """Layouts that --out has already are not run again; one rank, with other sizes too, for the constants."""
    plan = [
        (f"{layout.name}-{mode}", mode, layout.ranks, scaling.arguments_of(layout, mode, options.given))
        for mode in options.modes
        for layout in options.layouts
    ]
    if any(layout.ranks == 1 for layout in options.layouts):
        plan += [(name, "calibration", 1, arguments) for name, arguments in _calibration(options.given)]
    for name, mode, ranks, arguments in each(plan, "layouts"):
        if (options.out / "steps" / f"{name}.json").exists():
            print(f"{name}: measured already")
            continue
        scaling.launch(name, mode, ranks, arguments, options.steps, options.out)
        print(f"{name}: done", flush=True)
    for mode in options.modes:
        print(tables.scaling(mode, scaling.efficiencies(steps.read_steps(options.out), mode)).text())
    print(page.write_report(options.out))


def _calibration(given: list[str]) -> list[tuple[str, list[str]]]:
    """One rank with half the prompts, and with micro-batches of a quarter: they tell rates from overheads."""
    alone = scaling.arguments_of(scaling.parse_layout("1"), "strong", given)
    config = steps.read_arguments(alone)
    grpo, model = config.trainer.grpo, config.model
    half = [
        f"trainer.grpo.num_prompts_per_grpo_step={max(1, grpo.num_prompts_per_grpo_step // 2)}",
        f"model.global_batch_size={max(1, model.global_batch_size // 2)}",
    ]
    small = [f"model.micro_batch_size={max(1, model.micro_batch_size // 4)}"]
    return [("1-half", [*alone, *half]), ("1-small-micro-batches", [*alone, *small])]


def run_simulation(options: argparse.Namespace) -> None:
    if options.check:
        check_simulation(options)
        return
    constants = read_constants(options.constants)
    config = steps.read_arguments(options.given)
    longest = options.longest_response or config.model.grpo.length_params.max_length
    if options.response_tokens > longest:
        raise ValueError(f"--response-tokens={options.response_tokens:g}: the longest response has {longest:g}")
    lengths = Lengths(options.prompt_tokens, options.response_tokens, longest)
    rows = simulate.scale(config, options.gpus, lengths, constants, weak=not options.strong)
    about = {
        "constants": constants.name,
        "sources": constants.sources,
        "mode": "strong" if options.strong else "weak",
        "arguments": options.given,
        "lengths": dataclasses.asdict(lengths),
        "memory_bytes": constants.memory_bytes,
        "measured_ranks": constants.measured_ranks,
        "rows": rows,
    }
    write_json(options.out / "simulation.json", about)
    print(tables.simulation(about).text())
    print(tables.extrapolated(about))
    print(page.write_report(options.out))


def check_simulation(options: argparse.Namespace) -> None:
    """Constants of a folder of measurements, saved beside them, and predictions against its steps."""
    folder: pathlib.Path = options.check
    measured = steps.read_steps(folder)
    constants, fits = calibrate.calibrate(folder, measured)
    save_constants(constants, folder / "constants.json")
    found = {
        "fits": {name: dataclasses.asdict(fit) for name, fit in fits.items()},
        "seconds": check.seconds(measured, constants),
        "bytes": check.bytes_held(measured, constants),
    }
    write_json(folder / "check.json", found)
    for table in (tables.fits(found["fits"]), tables.check(found["seconds"]), tables.held(found["bytes"])):
        print(table.text())
    print(page.write_report(folder))


def write_report(options: argparse.Namespace) -> None:
    print(page.write_report(options.out))


PARTS: dict[str, Callable[[argparse.Namespace], None]] = {
    "collectives": measure_collectives,
    "step": measure_step,
    "scaling": measure_scaling,
    "simulate": run_simulation,
    "report": write_report,
}
