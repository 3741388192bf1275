"""The policy's weights as this rank has them: which parts of which Hugging Face tensors. For weight_sync."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from megatron_dump.actor.architecture import Architecture
from megatron_dump.actor.parallel import Parallel
from megatron_dump.actor.weight_map import Rule, WeightMap, named_parameters


class Piece(NamedTuple):
    """A part of a Hugging Face tensor: `length` rows of dimension `dim` from `start` on."""

    name: str
    shape: tuple[int, ...]  # of the whole tensor
    dtype: str  # torch's name
    order: int  # 0 the embedding, then the layers, then what follows them
    dim: int
    start: int
    length: int


class WeightStream:
    """This rank's pieces, read one at a time; no communication. `modules` are the stage's model chunks."""

    def __init__(self, modules: Sequence[nn.Module], arch: Architecture, parallel: Parallel) -> None:
        weights, n_layers = WeightMap(arch), arch.hf.num_hidden_layers
        self.pieces: list[Piece] = []
        self._sources: list[tuple[nn.Parameter, Rule, int, int]] = []  # of each piece; which of the rule's, which dim
        for name, parameter in named_parameters(modules):
            if name == "output_layer.weight" and arch.tied:
                continue
            rule = weights.rule(name)
            size = parallel.tensor_size if rule.expert is None else parallel.expert_tensor_size
            rank = parallel.tensor_rank if rule.expert is None else parallel.expert_tensor_rank
            for i, shape in enumerate(rule.hf_shapes(parameter.shape, size)):
                dim = rule.dim or 0
                step = shape[dim] if rule.dim is None else shape[dim] // size
                if rule.length is not None:
                    step = parameter.size(dim)  # of the filled up tensor
                start = 0 if rule.dim is None else rank * step
                if (length := min(step, shape[dim] - start)) > 0:
                    dtype = str(parameter.dtype).removeprefix("torch.")
                    order = _order(name, n_layers)
                    self.pieces.append(Piece(rule.hf_names[i], shape, dtype, order, dim, start, length))
                    self._sources.append((parameter, rule, i, dim))

        self._last: tuple[int, list[Tensor]] = -1, []

    @torch.no_grad()
    def read(self, index: int) -> Tensor:
        """The present values of a piece; they may be the parameter itself: do not write to them."""
        parameter, rule, i, dim = self._sources[index]
        last, parts = self._last
        if i == 0 or index != last + 1:  # else the parts of the same parameter, taken apart one read ago
            parts = rule.part(parameter.detach())
        self._last = (index, parts) if i + 1 < len(parts) else (-1, [])
        return parts[i].narrow(dim, 0, self.pieces[index].length)


def _order(name: str, n_layers: int) -> int:
    if match := re.match(r"decoder\.layers\.(\d+)\.", name):
        return int(match[1]) + 1
    return 0 if name.startswith("embedding.") else n_layers + 1
