"""Tokens per second of every way to generate, and what it takes to bring an engine new weights; markdown.

    python tools/benchmark_rollout.py --vllm-python VLLM_VENV/bin/python
    python tools/benchmark_rollout.py --quick --parts generation

Parts: generation (ours, transformers, vLLM), prompts (groups of 16 behind long prompts: time and memory), layouts
(reshard), sync (pushing weights). One thread a side (OMP_NUM_THREADS=1), all sides in turn in every round.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import os
import pathlib
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable

import megatron.core
import torch
import transformers
from actor_bench.plain import load_transformers
from rollout_bench import layouts, plain, problem
from rollout_bench.vllm_side import VLLMSide

from kk.progress import each
from megatron_dump.actor.actor import MegatronGPTGRPOActor
from megatron_dump.rollout.megatron import MegatronGenerator

PARTS = ("generation", "prompts", "layouts", "sync")
OURS = "megatron_dump"
Side = Callable[[], tuple[float, float, int]]  # seconds, CPU seconds, tokens


def timed(generate: Callable[[], int]) -> Side:
    """A side in this process; `generate` says how many tokens it made."""

    def run() -> tuple[float, float, int]:
        start, cpu = time.perf_counter(), time.process_time()
        tokens = generate()
        return time.perf_counter() - start, time.process_time() - cpu, tokens

    return run


def compare(title: str, sides: dict[str, Side], work: problem.Work, repeats: int) -> None:
    """A table: medians over rounds; ratios of ours to the side's are medians over paired rounds."""
    rounds: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for number, name in each(list(itertools.product(range(repeats + 1), sides)), title):
        seconds, cpu, tokens = sides[name]()
        if tokens != work.total:
            raise RuntimeError(f"{name}: {tokens} tokens instead of {work.total}")
        if number:  # the first one warms up
            rounds[name].append((tokens / seconds, tokens / cpu))
    print(f"\n## {title}\n{work}; medians of {repeats} rounds.\n")
    print("| | tokens/s | tokens per CPU second | ours : this, tokens/s | ours : this, per CPU second |")
    print("|--|--|--|--|--|")
    for name, values in rounds.items():
        medians = [f"{statistics.median(column):,.0f}" for column in zip(*values, strict=True)]
        ratios = [
            f"{statistics.median(o[i] / v[i] for o, v in zip(rounds[OURS], values, strict=True)):.2f}" for i in (0, 1)
        ]
        print(f"| {name} | {' | '.join(medians + (['', ''] if name == OURS else ratios))} |", flush=True)


def generator_of(actor: MegatronGPTGRPOActor, work: problem.Work) -> MegatronGenerator:
    return MegatronGenerator(actor, work.options, 0, work.prompts * work.samples, lambda ids: "")


def our_side(generator: MegatronGenerator, work: problem.Work) -> Side:
    return timed(lambda: sum(len(c.token_ids) for c in generator.generate(0, work.requests())))


def generation(folder: pathlib.Path, work: problem.Work, repeats: int, vllm_python: str | None) -> None:
    actor, model = problem.make_actor(folder), load_transformers(folder).eval()
    sides = {
        OURS: our_side(generator_of(actor, work), work),
        "plain loop": timed(lambda: plain.plain_loop(model, work)[0].numel()),
        "transformers' generate()": timed(lambda: plain.hf_generate(model, work).numel()),
    }
    engine = None
    if vllm_python:
        file = folder / "work.json"
        numbers = {"samples": work.samples, "tokens": work.tokens, "token_ids": work.token_ids().tolist()}
        file.write_text(json.dumps(numbers))
        engine = VLLMSide(vllm_python, str(folder), str(file))
        sides[f"vLLM {engine.version}"] = engine
    try:
        compare("Generation", sides, work, repeats)
    finally:
        if engine:
            engine.close()


def long_prompts(folder: pathlib.Path, work: problem.Work, repeats: int) -> None:
    """The cache of a group's prompt, shared or repeated."""
    actor, model = problem.make_actor(folder), load_transformers(folder).eval()
    ours, held = generator_of(actor, work), []

    def loop() -> int:
        tokens, _, size = plain.plain_loop(model, work)
        held[:] = [size]
        return tokens.numel()

    compare("Long prompts", {OURS: our_side(ours, work), "plain loop": timed(loop)}, work, repeats)
    print(
        f"\nKeys and values: {ours.cache_bytes / 2**20:.0f} MiB, a prompt's once a group; in the plain loop "
        f"{held[0] / 2**20:.0f} MiB, once a sample."
    )


def reshard(folder: pathlib.Path, work: problem.Work, repeats: int) -> None:
    print(f"\n## Split or copied\n{work}; seconds of a generation, gathering the copy included; {repeats} rounds.\n")
    print("| layout | the trained split | whole copies | copies split over tensor ranks |")
    print("|--|--|--|--|")
    for layout in each(list(layouts.LAYOUTS), "layouts"):
        path = folder / layout
        problem.write_model(path, experts=layout.startswith("EP"))
        found = layouts.run(layout, path, vars(work), repeats)
        print(f"| {layout} | {' | '.join(f'{s:.1f}' for s in found.values())}{' |' * (4 - len(found))}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="an eighth of the prompts, two rounds")
    parser.add_argument("--vllm-python", help="interpreter of an environment with vLLM: it takes part")
    parser.add_argument("--parts", type=lambda text: text.split(","), default=list(PARTS), help=",".join(PARTS))
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"--parts: {', '.join(sorted(unknown))}: known are {', '.join(PARTS)}")
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    share, repeats = (8, 2) if args.quick else (1, args.repeats)
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; Python "
        f"{platform.python_version()}, torch {torch.__version__}, megatron-core {megatron.core.__version__}, "
        f"transformers {transformers.__version__}"
    )
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        problem.write_model(folder)
        if "generation" in args.parts:
            generation(folder, problem.Work(64 // share), repeats, args.vllm_python)
        if "prompts" in args.parts:
            long_prompts(folder, problem.Work(16 // share, 16, 64, 512), repeats)
        if "layouts" in args.parts:
            reshard(folder, problem.Work(32 // share), min(repeats, 3))
    if "sync" in args.parts:
        from rollout_bench import sync

        print("\n## Weight sync\n")
        print(sync.table(sync.run(repeats=2 * repeats + 1)))


if __name__ == "__main__":
    main()
