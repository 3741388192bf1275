"""Sums that YAML files of NeMo-Aligner and NeMo-RL do: `${multiply:${model.x}, 2}`."""

from __future__ import annotations

import operator

from omegaconf import OmegaConf

RESOLVERS = {
    "multiply": operator.mul,
    "mul": operator.mul,  # NeMo-RL's name
    "int_div": operator.floordiv,
    "div": operator.truediv,
    "subtract": operator.sub,
}


def register_resolvers() -> None:
    """Those that OmegaConf does not have yet: a program's own stay."""
    for name, function in RESOLVERS.items():
        if not OmegaConf.has_resolver(name):
            OmegaConf.register_new_resolver(name, function)
