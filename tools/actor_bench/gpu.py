"""Tokens per second and model FLOPs utilisation of the actor's step in bf16 on one GPU."""

from __future__ import annotations

import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable

import torch

from actor_bench import problem
from actor_bench.plain import PlainStep
from kk.progress import each
from megatron_dump.actor import batching
from megatron_dump.actor.parallel import Parallel
from megatron_dump.config import DynamicBatchingConfig
from megatron_dump.types import TrainBatch

BUDGET = 16384  # tokens of a micro-batch


def utilisation(grid: Parallel, repeats: int, shape: problem.Shape = problem.QWEN_05B) -> None:
    """Qwen2.5-0.5B's shapes with random weights: equal and dynamic micro-batches, chunk sizes, plain PyTorch."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder)
        problem.write_model(shape, path, torch.bfloat16)
        batch = _ours(grid, path, shape, repeats)
        micros = [
            batching.cut(batch, rows, grid.device)
            for rows in batching.equal_rows(batching.used_lengths(batch), shape.micro)
        ]
        plain = PlainStep(path, grid.device, sampled_only=True, dtype=torch.bfloat16)
        report = _Report(shape, batch, grid.device, repeats)
        report("plain PyTorch, bf16 weights and optimizer", lambda: plain(micros, batch.global_tokens))


def _ours(grid: Parallel, path: pathlib.Path, shape: problem.Shape, repeats: int) -> TrainBatch:
    """Reports on our actor; the batch it was given. The actor's memory is free again at the end."""
    actor = problem.make_actor(path, shape, grid, "bf16")
    batch = problem.make_batch(actor, shape)
    report = _Report(shape, batch, grid.device, repeats)
    print(
        f"\n{shape}\n{report.tokens} tokens without padding; torch's matmuls of these shapes alone: "
        f"{report.limit / 1e12:.1f} TFLOP/s"
    )
    for chunk in (256, 1024, 4096, None):
        actor.logprob_chunk_size = chunk
        report(f"ours, logprob_chunk_size {chunk}", lambda: actor.train_step(batch))
    actor.logprob_chunk_size = 1024
    actor.dynamic = DynamicBatchingConfig(enabled=True, train_mb_tokens=BUDGET)
    report(f"ours, dynamic micro-batches of {BUDGET} tokens", lambda: actor.train_step(batch))
    return batch


class _Report:
    """Times a step and prints a line about it."""

    def __init__(self, shape: problem.Shape, batch: TrainBatch, device: torch.device, repeats: int) -> None:
        self.tokens = int(batching.used_lengths(batch).sum())
        self.flops, self.limit = step_flops(shape, batch), matmul_flops_per_second(shape, device)
        self.repeats = repeats

    def __call__(self, name: str, step: Callable[[], object]) -> None:
        torch.cuda.empty_cache()
        step()  # warms up
        torch.cuda.reset_peak_memory_stats()
        seconds = []
        for _ in each(range(self.repeats), name):
            torch.cuda.synchronize()
            start = time.perf_counter()
            step()
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        median = statistics.median(seconds)
        print(
            f"  {self.tokens / median:9.0f} tokens/s, {100 * self.flops / median / self.limit:5.1f} % of the matmuls' "
            f"speed, {torch.cuda.max_memory_allocated() / 2**30:5.1f} GiB  {name}"
        )


def step_flops(shape: problem.Shape, batch: TrainBatch) -> float:
    """Floating-point operations an optimizer step needs, without padding and recomputation.

    Three times the forward pass's 2 per weight and token, the output layer at sampled tokens only; causal attention's
    two products of T^2 / 2 positions (Narayanan et al., 2104.04473, appendix, halved for causality).
    """
    head = shape.hidden // shape.heads
    attention = shape.hidden * (shape.heads + 2 * shape.groups) * head + shape.heads * head * shape.hidden
    layer = attention + 3 * shape.hidden * shape.ffn
    lengths = batching.used_lengths(batch).astype(float)
    sampled = float(batch.loss_mask.sum())
    dense = 2.0 * shape.layers * layer * lengths.sum() + 2.0 * shape.hidden * shape.vocabulary * sampled
    products = 2.0 * shape.layers * shape.heads * head * (lengths**2).sum()
    return 3 * (dense + products)


def matmul_flops_per_second(shape: problem.Shape, device: torch.device, tokens: int = 8192) -> float:
    """What torch reaches on the forward pass's matmuls alone, weighted as the model has them."""
    head = shape.hidden // shape.heads
    sizes = [  # inputs, outputs, how often
        (shape.hidden, (shape.heads + 2 * shape.groups) * head, shape.layers),
        (shape.heads * head, shape.hidden, shape.layers),
        (shape.hidden, 2 * shape.ffn, shape.layers),
        (shape.ffn, shape.hidden, shape.layers),
        (shape.hidden, shape.vocabulary, 1),
    ]
    flops = seconds = 0.0
    for inputs, outputs, count in sizes:
        x = torch.randn(tokens, inputs, device=device, dtype=torch.bfloat16)
        weight = torch.randn(outputs, inputs, device=device, dtype=torch.bfloat16)
        for _ in range(3):
            torch.mm(x, weight.t())
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(10):
            torch.mm(x, weight.t())
        torch.cuda.synchronize()
        seconds += count * (time.perf_counter() - start) / 10
        flops += count * 2.0 * tokens * inputs * outputs
    return flops / seconds
