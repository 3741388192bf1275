"""The frozen policy that the KL penalty pulls towards, kept on CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn


class ReferenceWeights:
    """This rank's weights as they are now, to be put back into the same modules for a while."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.modules = modules
        self.weights = _on_cpu(modules)

    @contextlib.contextmanager
    def loaded(self) -> Iterator[None]:
        """The modules hold these weights inside the block, the policy's again behind it."""
        # Parameters are views of the distributed optimizer's buffer: their contents are swapped, not their storage.
        policy = _on_cpu(self.modules)
        _fill(self.modules, self.weights)
        try:
            yield
        finally:
            _fill(self.modules, policy)


def _on_cpu(modules: Sequence[nn.Module]) -> list[Tensor]:
    return [p.detach().to("cpu", copy=True) for module in modules for p in module.parameters()]


@torch.no_grad()
def _fill(modules: Sequence[nn.Module], weights: list[Tensor]) -> None:
    parameters = [p for module in modules for p in module.parameters()]
    for parameter, weight in zip(parameters, weights, strict=True):
        parameter.copy_(weight)
