"""The actor's optimizer step beside plain PyTorch, a whole GRPO step beside TRL, the step's speed on a GPU.

    python tools/benchmark_actor.py                                       # (a) plain PyTorch, on CPU
    python tools/benchmark_actor.py --trl-python TRL_VENV/bin/python      # and (b) TRL; needs `make data`
    python tools/benchmark_actor.py --gpu                                 # (c) tokens/s and MFU in bf16

One rank, one thread a side (OMP_NUM_THREADS=1), both sides in turn.
"""

from __future__ import annotations

import argparse
import logging
import pathlib
import platform
import statistics
import sys
import tempfile
import time
import warnings

import torch
import transformers
from actor_bench import problem
from actor_bench.plain import PlainStep

from kk.progress import each
from megatron_dump.actor import batching, parallel


def beside_plain(name: str, shape: problem.Shape, repeats: int, grid: parallel.Parallel) -> None:
    """Milliseconds of a step, and medians of the ratios of paired steps, on the same micro-batches in fp32."""
    device = grid.device
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder)
        problem.write_model(shape, path)
        actor = problem.make_actor(path, shape, grid)
        batch = problem.make_batch(actor, shape)
        parts = batching.equal_rows(batching.used_lengths(batch), shape.micro)
        micros = [batching.cut(batch, rows, device) for rows in parts]
        plain = PlainStep(path, device, sampled_only=False, dtype=torch.float32)
        lean = PlainStep(path, device, sampled_only=True, dtype=torch.float32)
        sides = {
            "ours": lambda: actor.train_step(batch),
            "plain PyTorch": lambda: plain(micros, batch.global_tokens),
            "plain PyTorch, output layer at sampled tokens only": lambda: lean(micros, batch.global_tokens),
        }
        first = {side: step() for side, step in sides.items()}  # warms up, too
        wall: dict[str, list[float]] = {side: [] for side in sides}
        busy: dict[str, list[float]] = {side: [] for side in sides}  # of the process: what others run counts less
        for _ in each(range(repeats), name):
            for side, step in sides.items():
                start, start_busy = time.perf_counter(), time.process_time()
                step()
                wall[side].append(time.perf_counter() - start)
                busy[side].append(time.process_time() - start_busy)
    tokens = sum(micro.tokens.numel() for micro in micros)
    print(f"\n{name}: {shape}\n{tokens} tokens, padded, in {len(micros)} micro-batches; {repeats} steps each")
    for side in sides:
        ratios = [
            statistics.median(o / t for o, t in zip(times["ours"], times[side], strict=True)) for times in (wall, busy)
        ]
        ours = "" if side == "ours" else f"; ours takes {ratios[0]:.2f} of its time, {ratios[1]:.2f} of its CPU time"
        print(
            f"  {1e3 * statistics.median(wall[side]):8.1f} ms, CPU {1e3 * statistics.median(busy[side]):8.1f} ms  "
            f"{side}{ours}"
        )
    ours = (first["ours"]["actor/loss"], first["ours"]["actor/grad_norm"])
    for side in list(sides)[1:]:
        print(f"  loss {ours[0]:.6f}, gradient norm {ours[1]:.6f}; {side}: {first[side][0]:.6f}, {first[side][1]:.6f}")


def versions() -> str:
    import megatron.core

    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()}, no GPU"
    return (
        f"{where}; Python {platform.python_version()}, torch {torch.__version__}, megatron-core "
        f"{megatron.core.__version__}, transformers {transformers.__version__}; {torch.get_num_threads()} thread(s)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--trl-python", help="interpreter of an environment with TRL: compare whole GRPO steps")
    parser.add_argument("--data", type=pathlib.Path, default=pathlib.Path("data/kk/train.parquet"))
    parser.add_argument("--steps", type=int, default=4, help="GRPO steps of each side a round, the first one not timed")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--gpu", action="store_true", help="tokens/s and MFU of a 0.5B model; needs CUDA")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    grid = parallel.initialize()
    print(versions())
    if args.gpu:
        from actor_bench.gpu import utilisation

        if grid.device.type != "cuda":
            sys.exit("--gpu: this machine has no CUDA device; leave the flag out for the CPU benchmarks")
        utilisation(grid, args.repeats)
        return
    torch.set_num_threads(1)
    beside_plain("kk-tiny's shape", problem.SMALL, args.repeats, grid)
    beside_plain("a larger vocabulary", problem.MIDDLE, args.repeats, grid)
    if args.trl_python:
        from actor_bench.whole_step import beside_trl

        beside_trl(args.trl_python, args.data, args.steps, args.rounds)


if __name__ == "__main__":
    main()
