"""A whole copy of the policy on every rank: generation on it needs no communication between ranks.

NeMo-Aligner's `reshard`: the ranks of a replica become data parallel while they generate, however the policy is split.
"""

from __future__ import annotations

import dataclasses
import re

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_dump.actor.actor import MegatronGPTGRPOActor
from megatron_dump.actor.layout import Layout
from megatron_dump.actor.model import build_model, transformer_config
from megatron_dump.actor.parallel import Parallel
from megatron_dump.actor.weight_map import Rule, WeightMap, named_parameters


class WholePolicy:
    """The actor's policy unsplit; `refresh` brings its weights up to date. For models that fit on one rank."""

    def __init__(self, actor: MegatronGPTGRPOActor, precision: str) -> None:
        self.actor, self.arch = actor, actor.arch
        alone = dist.new_group([actor.parallel.rank], use_local_synchronization=True)
        assert alone is not None  # this rank is a member
        kinds = ("tensor", "pipeline", "context", "expert", "expert_tensor")
        self.parallel: Parallel = dataclasses.replace(
            actor.parallel,
            layout=Layout(),
            **{f"{kind}_rank": 0 for kind in kinds},
            **{f"{kind}_size": 1 for kind in kinds},
            **{f"{kind}_group": alone for kind in kinds},
        )
        names = "tp pp cp embd mp ep expt_tp expt_dp tp_cp tp_ep tp_ep_pp tp_dp_cp".split()
        groups = ProcessGroupCollection(**dict.fromkeys(names, alone))
        config = transformer_config(self.arch, self.parallel, precision, actor.options)
        self.module = build_model(self.arch, config, self.parallel, groups).eval().requires_grad_(False)
        self.version = -1  # of the weights held; those of a new copy are nobody's

    @torch.no_grad()
    def refresh(self) -> None:
        """Gather the actor's weights, one parameter at a time. A collective of all ranks."""
        if self.version == self.actor.version:
            return
        place, weights = self.actor.parallel, WeightMap(self.arch)
        own = dict(named_parameters(self.actor.modules))
        for name, parameter in named_parameters([self.module]):
            stage, rule = self._home(name), weights.rule(name)
            if stage == place.pipeline_rank:
                self._gather(parameter, own.get(name), rule)
            if place.pipeline_size > 1:
                _broadcast(parameter, stage, place.pipeline_group)
        self.version = self.actor.version

    def _home(self, name: str) -> int:
        """The pipeline stage that has a parameter: the chunks of the model go round the stages."""
        layout = self.actor.parallel.layout
        match = re.fullmatch(r"decoder\.layers\.(\d+)\..+", name)
        if match is None:
            return 0 if name.startswith("embedding.") else layout.pipeline - 1
        chunks = layout.pipeline * (layout.virtual_pipeline or 1)
        return int(match[1]) // (self.arch.hf.num_hidden_layers // chunks) % layout.pipeline

    def _gather(self, whole: Tensor, own: Tensor | None, rule: Rule) -> None:
        """Put a parameter of this stage together; `own` is this rank's part, None if another rank has the expert."""
        place = self.actor.parallel
        if rule.expert is None:
            assert own is not None
            whole.copy_(_unshard(own, rule, place.tensor_size, place.tensor_group))
            return
        if own is not None:
            whole.copy_(_unshard(own, rule, place.expert_tensor_size, place.expert_tensor_group))
        if place.expert_size > 1:
            owner = rule.expert // (self.arch.hf.num_experts // place.expert_size)
            _broadcast(whole, owner, place.expert_group)


def _broadcast(parameter: Tensor, rank: int, group: dist.ProcessGroup) -> None:
    dist.broadcast(parameter.data, dist.get_global_rank(group, rank), group=group)


def _unshard(parameter: Tensor, rule: Rule, size: int, group: dist.ProcessGroup) -> Tensor:
    if rule.dim is None or size == 1:
        return parameter
    shards = [torch.empty_like(parameter) for _ in range(size)]
    dist.all_gather(shards, parameter.detach().contiguous(), group=group)
    return rule.unshard(shards)
