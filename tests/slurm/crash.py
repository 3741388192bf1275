"""A reward that breaks the program: rank 2 fails in its next update."""

import os

from megatron_dump.actor.actor import MegatronGPTGRPOActor
from megatron_dump.types import Score


def _fail(*_args: object) -> None:
    raise RuntimeError("deliberate crash")


def reward(text: str, ground_truth: str) -> Score:
    if os.environ["RANK"] == "2":
        MegatronGPTGRPOActor.train_step = _fail
    return Score(float(len(text) % 2), False, True, ground_truth)
