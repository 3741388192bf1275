"""Which split of the policy generates: the trained one, or a copy that talks less (`inference_backend.reshard`)."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Callable

import torch
import torch.distributed as dist

from megatron_dump.actor.policy import Policy
from megatron_dump.actor.whole import WholePolicy, copy_bytes
from megatron_dump.rollout.megatron import MegatronGenerator
from megatron_dump.rollout.resharded import ReshardedGenerator

ROOM = 0.25  # a copy may take this share of the memory that is free: activations and caches want the rest
SPLIT, WHOLE, PIPELINE = "the trained split", "whole copies", "copies split over tensor ranks"


@dataclasses.dataclass(frozen=True)
class Choice:
    """What generates, and why, for people."""

    copy: str  # SPLIT, WHOLE or PIPELINE
    why: str

    @property
    def notice(self) -> str:
        return f"generation runs on {self.copy} of the policy: {self.why}"


def choose(actor: Policy, reshard: bool | str) -> Choice:
    """`reshard`: true, false, pipeline or auto. A collective of all ranks; ValueError on all where nothing can work.

    auto: with tensor, pipeline or context parallel ranks, whole copies where they fit, since ranks that decode a token
    together wait for each other in every layer and stages in turn (docs/results/rollout.md); else the trained split or,
    where it cannot generate, copies split over tensor ranks. It goes by sizes, not by a clock, so that a run that is
    repeated or continued on the same machines generates the same way.
    """
    key = f"trainer.grpo.inference_backend.reshard={str(reshard).lower()}"
    if reshard != "auto":
        copy = PIPELINE if reshard == "pipeline" else WHOLE if reshard else SPLIT
        return Choice(copy, key)
    layout = actor.parallel.layout
    if layout.replica_size == 1:
        return Choice(SPLIT, f"{key}, and a replica is one rank")
    free = free_bytes(actor.parallel.device)
    candidates, needed = [(WHOLE, False)], layout.context > 1 or layout.virtual_pipeline is not None
    if needed and layout.tensor > 1 and actor.arch.experts is None:
        candidates.append((PIPELINE, True))
    sizes = {copy: copy_bytes(actor, keep_tensor) for copy, keep_tensor in candidates}
    found = ", ".join(f"{copy}: {_readable(size)} a rank" for copy, size in sizes.items())
    why = f"{key}; {found}; may take {ROOM:.0%} of the {_readable(free)} that are free"
    for copy, size in sizes.items():
        if size <= ROOM * free:
            return Choice(copy, why)
    if needed:
        raise ValueError(
            f"{why}: too little, and generation cannot step through context parallel ranks or interleaved stages; set "
            "reshard=true to make whole copies all the same, or change the layout"
        )
    return Choice(SPLIT, why)


def policy_generator(
    actor: Policy,
    choice: Choice,
    precision: str,
    on: Callable[[Policy | WholePolicy], MegatronGenerator],
) -> MegatronGenerator | ReshardedGenerator:
    """The generator of a choice; `on` makes one of a policy."""
    if choice.copy == SPLIT:
        generator = on(actor)
    else:
        copy = WholePolicy(actor, precision, keep_tensor=choice.copy == PIPELINE)
        generator = ReshardedGenerator(on(copy), copy)
    generator.notice = choice.notice
    return generator


def free_bytes(device: torch.device) -> int:
    """Memory that a rank may still take, the least of all ranks: a collective. On CPU the ranks of a node share."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        available = dict(line.split(":", 1) for line in pathlib.Path("/proc/meminfo").read_text().splitlines())
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", str(dist.get_world_size())))
        free = int(available["MemAvailable"].split()[0]) * 1024 // ranks
    least = torch.tensor(free, device=device)
    dist.all_reduce(least, op=dist.ReduceOp.MIN)
    return int(least)


def _readable(size: float) -> str:
    return f"{size / 2**30:.1f} GB" if size >= 2**30 else f"{size / 2**20:.1f} MB"
