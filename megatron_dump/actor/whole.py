"""A whole copy of the policy on every rank: generation on it needs neither tensor nor pipeline communication.

NeMo-Aligner's `reshard`: the ranks of a replica become data parallel while they generate.
"""

from __future__ import annotations

import dataclasses
import re

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_dump.actor import convert
from megatron_dump.actor.actor import MegatronGPTGRPOActor
from megatron_dump.actor.model import build_model, transformer_config
from megatron_dump.actor.parallel import Parallel


class WholePolicy:
    """The actor's policy unsplit; `refresh` brings its weights up to date. For models that fit on one rank."""

    def __init__(self, actor: MegatronGPTGRPOActor, precision: str) -> None:
        self.actor, self.arch = actor, actor.arch
        alone = dist.new_group([actor.parallel.rank], use_local_synchronization=True)
        assert alone is not None  # this rank is a member
        self.parallel: Parallel = dataclasses.replace(
            actor.parallel,
            tensor_rank=0, tensor_size=1, tensor_group=alone, pipeline_rank=0, pipeline_size=1, pipeline_group=alone,
        )  # fmt: skip
        groups = ProcessGroupCollection(tp=alone, pp=alone, cp=alone, embd=alone, tp_cp=alone, mp=alone)
        config = transformer_config(self.arch, self.parallel, precision)
        self.module = build_model(self.arch, config, self.parallel, groups).eval().requires_grad_(False)
        self.version = -1  # of the weights held; those of a new copy are nobody's

    @torch.no_grad()
    def refresh(self) -> None:
        """Gather the actor's weights, one parameter at a time. A collective of the replica's ranks."""
        if self.version == self.actor.version:
            return
        place = self.actor.parallel
        own, weights = dict(convert.named_parameters(self.actor.modules)), convert.WeightMap(self.arch)
        for name, parameter in convert.named_parameters([self.module]):
            stage = self._home(name)
            if stage == place.pipeline_rank:
                parameter.copy_(_unshard(own[name], weights.rule(name), place))
            if place.pipeline_size > 1:
                dist.broadcast(
                    parameter.data, dist.get_global_rank(place.pipeline_group, stage), group=place.pipeline_group
                )
        self.version = self.actor.version

    def _home(self, name: str) -> int:
        """The pipeline stage that has a parameter."""
        stages = self.actor.parallel.pipeline_size
        match = re.fullmatch(r"decoder\.layers\.(\d+)\..+", name)
        if match is None:
            return 0 if name.startswith("embedding.") else stages - 1
        return int(match[1]) // (self.arch.hf.num_hidden_layers // stages)


def _unshard(parameter: Tensor, rule: convert.Rule, place: Parallel) -> Tensor:
    if rule.dim is None or place.tensor_size == 1:
        return parameter
    shards = [torch.empty_like(parameter) for _ in range(place.tensor_size)]
    dist.all_gather(shards, parameter.detach().contiguous(), group=place.tensor_group)
    return rule.unshard(shards)
