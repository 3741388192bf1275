"""A copy of the policy that is less split than the trained one, for generation with less talk between ranks.

NeMo-Aligner's `reshard`: the ranks of a replica become data parallel while they generate, however the policy is split.
"""

from __future__ import annotations

import dataclasses
import re

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_dump.actor.layout import Layout
from megatron_dump.actor.model import build_model, transformer_config
from megatron_dump.actor.parallel import Parallel
from megatron_dump.actor.policy import Policy
from megatron_dump.actor.weight_map import Rule, WeightMap, named_parameters


class WholePolicy:
    """The actor's policy unsplit or, with `keep_tensor`, split over its tensor ranks only: for models that fit so.

    `refresh` brings its weights up to date.
    """

    def __init__(self, actor: Policy, precision: str, keep_tensor: bool = False) -> None:
        if keep_tensor and actor.arch.experts is not None:
            raise ValueError(
                "trainer.grpo.inference_backend.reshard=pipeline: the model has experts; set it to true or false"
            )
        self.actor, self.arch, self.keep_tensor = actor, actor.arch, keep_tensor
        place = actor.parallel
        alone = dist.new_group([place.rank], use_local_synchronization=True)
        assert alone is not None  # this rank is a member
        kinds = ("tensor", "pipeline", "context", "expert", "expert_tensor")[keep_tensor:]
        self.parallel: Parallel = dataclasses.replace(
            place,
            layout=Layout(tensor=place.tensor_size if keep_tensor else 1),
            **{f"{kind}_rank": 0 for kind in kinds},
            **{f"{kind}_size": 1 for kind in kinds},
            **{f"{kind}_group": alone for kind in kinds},
        )
        names = "tp pp cp embd mp ep expt_tp expt_dp tp_cp tp_ep tp_ep_pp tp_dp_cp".split()
        shared = {name: self.parallel.tensor_group for name in ("tp", "mp", "tp_cp", "tp_dp_cp")}
        groups = ProcessGroupCollection(**dict.fromkeys(names, alone) | shared)
        config = transformer_config(self.arch, self.parallel, precision, actor.options)
        self.module = build_model(self.arch, config, self.parallel, groups).eval().requires_grad_(False)
        self.version = -1  # of the weights held; those of a new copy are nobody's

    @property
    def unit(self) -> tuple[int, int]:
        """Which of how many parts of the replica, each able to generate by itself, this rank is in."""
        place = self.actor.parallel
        number = place.context_rank * place.pipeline_size + place.pipeline_rank
        if self.keep_tensor:
            return number, place.context_size * place.pipeline_size
        return dist.get_rank(place.replica_group), dist.get_world_size(place.replica_group)

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
            size = 1 if self.keep_tensor else place.tensor_size
            whole.copy_(_unshard(own, rule, size, place.tensor_group))
            return
        if own is not None:
            whole.copy_(_unshard(own, rule, place.expert_tensor_size, place.expert_tensor_group))
        if place.expert_size > 1:
            owner = rule.expert // (self.arch.hf.num_experts // place.expert_size)
            _broadcast(whole, owner, place.expert_group)


def copy_bytes(actor: Policy, keep_tensor: bool = False) -> int:
    """What a WholePolicy's weights take on a rank. A collective of all ranks."""
    place, weights, total = actor.parallel, WeightMap(actor.arch), 0
    for name, parameter in named_parameters(actor.modules):
        rule, parts = weights.rule(name), 1
        if name == "output_layer.weight" and actor.arch.tied:
            continue  # the copy has it once, as embedding
        if rule.dim is not None and not keep_tensor:
            parts = place.tensor_size if rule.expert is None else place.expert_tensor_size
        if rule.expert is not None:
            parts *= place.expert_size
        total += parameter.numel() * parameter.element_size() * parts
    sizes = torch.tensor(total, device=place.device)
    dist.all_reduce(sizes, group=place.pipeline_group)
    return int(sizes)


def _broadcast(parameter: Tensor, rank: int, group: dist.ProcessGroup) -> None:
    dist.broadcast(parameter.data, dist.get_global_rank(group, rank), group=group)


def _unshard(parameter: Tensor, rule: Rule, size: int, group: dist.ProcessGroup) -> Tensor:
    if rule.dim is None or size == 1:
        return parameter
    shards = [torch.empty_like(parameter) for _ in range(size)]
    dist.all_gather(shards, parameter.detach().contiguous(), group=group)
    return rule.unshard(shards)
