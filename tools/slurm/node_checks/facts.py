"""What one node reports of itself; JSON on its way to the head node."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass
class Facts:
    """Filled check by check: what a hanging check leaves out keeps its default. Sizes in bytes."""

    host: str  # by Slurm's name, which is what excludes a node
    refused: str | None = None  # why the arguments cannot run, as seen from here
    failed: str | None = None  # a check that could not be made, and why
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    gpus: list[str] = dataclasses.field(default_factory=list)  # models, in CUDA's order
    gpu_used: list[int] = dataclasses.field(default_factory=list)  # memory that is taken on each
    memory: int = 0  # available
    memory_needed: int = 0  # by all ranks of the node, at least
    shared_memory: int = 0  # free in /dev/shm
    disk: int = 0  # free where checkpoints go
    checkpoint: int = 0  # size of one
    log_dir: str = ""
    resume_step: int = -1
    tokens: dict[str, str] = dataclasses.field(default_factory=dict)  # folder -> what this node wrote into it
    unwritable: dict[str, str] = dataclasses.field(default_factory=dict)  # folder -> why not


@dataclasses.dataclass
class Findings:
    """What a node found of the others."""

    unseen: dict[str, list[int]] = dataclasses.field(default_factory=dict)  # folder -> nodes whose file is not there
    clock_s: float = 0.0  # ahead of the head node's
    gb_per_s: float | None = None  # of the all-reduce: bytes sent and received by this node per second
    latency_us: float | None = None
    failed: str | None = None  # why there is no all-reduce, or what could not be looked at


@dataclasses.dataclass
class Problem:
    """One line of the report."""

    text: str
    at_fault: list[int] = dataclasses.field(default_factory=list)  # nodes, if it is some in particular
    is_warning: bool = False
    is_refusal: bool = False  # trying again would not help

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)
