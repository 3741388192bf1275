"""Steps of several layouts on this machine, weak and strong, and their efficiencies."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from multinode_bench.steps import Measured, read_arguments

LIMIT_S = 600  # of one layout's run
_KEYS = {
    "TP": "tensor_model_parallel_size",
    "PP": "pipeline_model_parallel_size",
    "CP": "context_parallel_size",
    "VPP": "virtual_pipeline_model_parallel_size",
    "EP": "expert_model_parallel_size",
}


@dataclasses.dataclass(frozen=True)
class NamedLayout:
    """`TP2xPP2xDP2`; `1` is one rank."""

    name: str
    keys: dict[str, int]  # of `model:`
    ranks: int


def parse_layout(text: str) -> NamedLayout:
    """ValueError, one line, for what is none."""
    sizes: dict[str, int] = {}
    for part in text.split("x") if text != "1" else ():
        match = re.fullmatch(r"(VPP|TP|PP|CP|EP|DP)([1-9]\d*)", part)
        if match is None or match[1] in sizes:
            raise ValueError(f"--layouts: {text}: each is 1, or of TP, PP, VPP, CP, EP and DP with sizes, as TP2xDP2")
        sizes[match[1]] = int(match[2])
    ranks = sizes.get("TP", 1) * sizes.get("PP", 1) * sizes.get("CP", 1) * sizes.get("DP", 1)
    return NamedLayout(text, {_KEYS[kind]: size for kind, size in sizes.items() if kind != "DP"}, ranks)


def arguments_of(layout: NamedLayout, mode: str, given: Sequence[str]) -> list[str]:
    """Of train_gpt_grpo.py. Weak: prompts and the global batch grow with the ranks from those of one rank."""
    config = read_arguments(given)
    grpo, model = config.trainer.grpo, config.model
    factor = layout.ranks if mode == "weak" else 1
    split = {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1, **layout.keys}
    data = layout.ranks // (split["tensor_model_parallel_size"] * split["pipeline_model_parallel_size"])
    data //= split.get("context_parallel_size", 1)
    batch = model.global_batch_size * factor
    return [
        *given,
        *(f"model.{key}={size}" for key, size in split.items()),
        f"trainer.devices={layout.ranks}",
        f"trainer.grpo.num_prompts_per_grpo_step={grpo.num_prompts_per_grpo_step * factor}",
        f"model.global_batch_size={batch}",
        f"model.micro_batch_size={min(model.micro_batch_size, batch // data)}",
    ]


def launch(name: str, mode: str, ranks: int, arguments: Sequence[str], steps: int, out: pathlib.Path) -> None:
    """One run under torchrun on this machine. RuntimeError with the end of what it said if it fails."""
    tool = pathlib.Path(__file__).resolve().parents[1] / "benchmark_multinode.py"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={ranks}",
        str(tool),
        "step",
        f"--name={name}",
        f"--mode={mode}",
        f"--steps={steps}",
        f"--out={out}",
        "--",
        *arguments,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    if done.returncode:
        raise RuntimeError(f"{name}: {' '.join(command)}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}")


def efficiencies(measured: Sequence[Measured], mode: str) -> list[dict[str, Any]]:
    """A row a layout, against the one on the fewest ranks, the first by name.

    Strong scaling, the same step on more ranks: t1 n1 / (t n). Weak, as much on every rank: t1 / t.
    """
    rows = sorted((m for m in measured if m.mode == mode), key=lambda m: (m.ranks, m.name))
    found = []
    for m in rows:
        ratio = rows[0].median("step") / m.median("step")
        found.append(
            {
                "name": m.name,
                "ranks": m.ranks,
                "prompts": m.prompts,
                "step_s": m.median("step"),
                "efficiency": ratio * rows[0].ranks / m.ranks if mode == "strong" else ratio,
                "tokens_per_s_per_rank": _rate(m),
            }
        )
    return found


def _rate(m: Measured) -> float:
    samples = read_arguments(m.arguments).trainer.grpo.samples_per_prompt
    tokens = [m.prompts * samples * (lengths.prompt + lengths.response) for lengths in m.lengths]
    rates = sorted(t / step["step"] / m.ranks for t, step in zip(tokens, m.seconds, strict=True))
    return rates[len(rates) // 2]
