"""A reward that breaks the program: rank 3 fails in its next update."""

import os

from megatron_dump.actor.actor import MegatronGPTGRPOActor


def _fail(*_args: object) -> None:
    raise RuntimeError("deliberate crash")


def reward(*_args: object, **_kwargs: object) -> float:
    if os.environ["RANK"] == "3":
        MegatronGPTGRPOActor.train_step = _fail
    return 0.0
