"""Bandwidth and latency of collectives, GRPO steps and their scaling, and a simulation of more ranks than there are.

    torchrun --nproc-per-node=4 tools/benchmark_multinode.py collectives --tensor 2 --out results/multinode
    torchrun --nproc-per-node=4 tools/benchmark_multinode.py step --name TP2xDP2 --out results/multinode -- \\
        --config-name=kk_cpu trainer.devices=4 model.tensor_model_parallel_size=2 model.pipeline_model_parallel_size=1
    python tools/benchmark_multinode.py scaling --layouts 1,TP2,DP2,PP2,TP2xDP2 --out results/multinode
    python tools/benchmark_multinode.py simulate --check results/multinode --out results/multinode
    python tools/benchmark_multinode.py simulate --gpus 8,64,1024 --out results/simulated -- --config-name=… key=value

What stands behind -- are arguments of examples/train_gpt_grpo.py. Every part leaves JSON in --out, and all but `step`
write its report.html anew. docs/benchmark_multinode.md has the rest, many nodes among it.
"""

from __future__ import annotations

import argparse
import logging
import os
import pathlib
import sys
import warnings

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1]))  # examples' and the package's folder

import torch
from multinode_bench import parts
from multinode_bench.scaling import parse_layout

H100 = pathlib.Path(__file__).resolve().parent / "multinode_bench/h100_sxm.json"
POWERS = ",".join(str(2**n) for n in range(3, 11))


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def read_options(argv: list[str]) -> argparse.Namespace:
    argv = ["simulate", *argv[1:]] if argv[:1] == ["--simulate"] else argv
    argv, given = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="part", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--out", type=pathlib.Path, default=pathlib.Path("results/multinode"))
    part = commands.add_parser("collectives", parents=[shared], help="in started ranks: every group, by size")
    for name in ("tensor", "pipeline", "context"):
        part.add_argument(f"--{name}", type=int, default=1, help="ranks of such a group; data parallel is what is left")
    part.add_argument("--quick", action="store_true", help="four sizes up to 4 MiB, three repeats")
    part.add_argument("--repeats", type=int, default=9)
    part = commands.add_parser("step", parents=[shared], help="in started ranks: steps of the trainer")
    part.add_argument("--name", required=True, help="of the layout: names its files")
    part.add_argument("--mode", choices=("strong", "weak", "calibration"), default="strong")
    part.add_argument("--steps", type=int, default=3, help="beside the first one, which is not timed")
    part = commands.add_parser("scaling", parents=[shared], help="on this machine: starts torchrun for each layout")
    part.add_argument("--layouts", default="1,TP2,DP2,PP2,TP2xDP2", help="of TP, PP, VPP, CP, EP, DP with sizes")
    part.add_argument("--weak", action="store_true", help="rollouts a rank stay the same (default: both)")
    part.add_argument("--strong", action="store_true", help="rollouts in all stay the same (default: both)")
    part.add_argument("--steps", type=int, default=3)
    part = commands.add_parser("simulate", parents=[shared], help="steps of up to 1,024 ranks from constants")
    part.add_argument("--constants", type=pathlib.Path, default=H100, help="JSON; --check writes measured ones")
    part.add_argument("--gpus", type=numbers, default=numbers(POWERS), help=f"numbers of ranks: {POWERS}")
    part.add_argument("--strong", action="store_true", help="the configured prompts on any number (default: weak)")
    part.add_argument("--prompt-tokens", type=float, default=256.0)
    part.add_argument("--response-tokens", type=float, default=1024.0, help="the mean")
    part.add_argument("--longest-response", type=float, help="default: model.grpo.length_params.max_length")
    part.add_argument("--check", type=pathlib.Path, help="a folder of measurements: fit constants, compare, save them")
    commands.add_parser("report", parents=[shared], help="report.html of what is in --out")
    options = parser.parse_args(argv)
    options.given = given or ["--config-name=kk_cpu"]
    if options.part == "scaling":
        options.layouts = [parse_layout(text) for text in options.layouts.split(",")]
        options.modes = [m for m in ("strong", "weak") if getattr(options, m)] or ["strong", "weak"]
    return options


def main() -> int:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    try:
        options = read_options(sys.argv[1:])
        parts.PARTS[options.part](options)
    except (ValueError, OSError) as error:  # what is wrong with the input; a traceback would bury it
        print(f"[rank {os.environ.get('RANK', '0')}] error: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
