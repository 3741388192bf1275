"""Which Hugging Face tensors each Megatron parameter is made of: one table for every model and layer specification.

Layouts follow megatron-core: linear_qkv holds, per key/value group, its query heads, its key and its value; linear_fc1
holds the gate and the up projection. The same parameter has up to two names: megatron-core's local layers keep a norm
and an expert as modules of their own, Transformer Engine's keep the norm inside the linear layer behind it
(`linear_qkv.layer_norm_weight`, `linear_fc1.layer_norm_weight`) and the experts' matrices side by side in one module
(`experts.linear_fc1.weight<i>`). Names of megatron-core 0.16 and of transformers' qwen2, qwen3, llama, qwen2_moe and
qwen3_moe.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megatron_dump.actor.architecture import Architecture

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_EXPERTS = (  # before the expert's number, the number, after it
    re.compile(r"(.*\bmlp\.experts\.local_experts\.)(\d+)(\.linear_fc[12]\.weight)"),
    re.compile(r"(.*\bmlp\.experts\.linear_fc[12]\.weight)(\d+)()"),
)
_FUSED_NORMS = {  # Transformer Engine's name -> the local one
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


@dataclasses.dataclass(frozen=True)
class Rule:
    """How one Megatron parameter is made of Hugging Face tensors.

    Tensor parallelism splits each of those tensors into equal parts along `dim`; a rank's parameter is the join of its
    parts, so joining and splitting commute.
    """

    hf_names: tuple[str, ...]
    dim: int | None  # None: every rank has the whole
    join: Callable[[list[Tensor]], Tensor] = lambda parts: parts[0]
    part: Callable[[Tensor], list[Tensor]] = lambda joined: [joined]  # the inverse of join
    length: int | None = None  # of the Hugging Face tensor along `dim` where Megatron fills it up with zeros
    expert: int | None = None  # its number in the whole model: split over expert-tensor, not tensor ranks

    def hf_shapes(self, shape: Sequence[int], size: int) -> list[tuple[int, ...]]:
        """Shapes of the Hugging Face tensors when each of `size` ranks has a parameter of this shape."""
        shapes = []
        for part in self.part(torch.empty(tuple(shape), device="meta")):
            whole = list(part.shape)
            if self.dim is not None:
                whole[self.dim] = self.length or whole[self.dim] * size
            shapes.append(tuple(whole))
        return shapes

    def unshard(self, shards: list[Tensor]) -> Tensor:
        """The parameter of a model that is not split, from those of all ranks in their order."""
        if self.dim is None or len(shards) == 1:
            return shards[0]
        return self.join([torch.cat(parts, self.dim) for parts in zip(*map(self.part, shards), strict=True)])


class WeightMap:
    """The rules of one architecture."""

    def __init__(self, arch: Architecture) -> None:
        self.arch = arch
        self.queries = arch.hf.num_attention_heads // arch.hf.num_key_value_heads  # query heads of a group

    def rule(self, name: str) -> Rule:
        """The rule of a parameter by its name in the whole model (`named_parameters`); KeyError when it has none."""
        vocab = Rule(("model.embed_tokens.weight",), 0, length=self.arch.vocab_size)
        if name == "embedding.word_embeddings.weight":
            return vocab
        if name == "output_layer.weight":
            return vocab if self.arch.tied else dataclasses.replace(vocab, hf_names=("lm_head.weight",))
        if name == "decoder.final_layernorm.weight":
            return Rule(("model.norm.weight",), None)
        if (match := _LAYER.fullmatch(name)) is None:
            raise KeyError(f"Megatron parameter {name!r} has no Hugging Face counterpart")
        rule = self._layer_rule(_FUSED_NORMS.get(match[2], match[2]))
        if rule is None:
            raise KeyError(f"Megatron parameter {name!r} has no Hugging Face counterpart")
        return dataclasses.replace(rule, hf_names=tuple(f"model.layers.{match[1]}.{n}" for n in rule.hf_names))

    def _layer_rule(self, name: str) -> Rule | None:
        if match := _expert(name):
            matrix = "linear_fc1" if "linear_fc1" in name else "linear_fc2"
            return dataclasses.replace(_feed_forward(f"mlp.experts.{match[2]}")[matrix], expert=int(match[2]))
        dense, shared = _feed_forward("mlp"), _feed_forward("mlp.shared_expert")
        rules = {
            "input_layernorm.weight": Rule(("input_layernorm.weight",), None),
            "pre_mlp_layernorm.weight": Rule(("post_attention_layernorm.weight",), None),
            "self_attention.linear_qkv.weight": self._attention_rule("weight"),
            "self_attention.linear_qkv.bias": self._attention_rule("bias"),
            "self_attention.linear_proj.weight": Rule(("self_attn.o_proj.weight",), 1),
            "self_attention.q_layernorm.weight": Rule(("self_attn.q_norm.weight",), None),
            "self_attention.k_layernorm.weight": Rule(("self_attn.k_norm.weight",), None),
            "mlp.linear_fc1.weight": dense["linear_fc1"],
            "mlp.linear_fc2.weight": dense["linear_fc2"],
            "mlp.router.weight": Rule(("mlp.gate.weight",), None),
            "mlp.shared_experts.linear_fc1.weight": shared["linear_fc1"],
            "mlp.shared_experts.linear_fc2.weight": shared["linear_fc2"],
            "mlp.shared_experts.gate_weight": Rule(("mlp.shared_expert_gate.weight",), None),
        }
        return rules.get(name)

    def _attention_rule(self, kind: str) -> Rule:
        return Rule(tuple(f"self_attn.{x}_proj.{kind}" for x in "qkv"), 0, self._join_qkv, self._part_qkv)

    def _join_qkv(self, parts: list[Tensor]) -> Tensor:
        groups = parts[1].size(0) // self.arch.head_dim  # of this rank
        return torch.cat([p.view(groups, -1, *p.shape[1:]) for p in parts], 1).flatten(0, 1)

    def _part_qkv(self, joined: Tensor) -> list[Tensor]:
        d = self.arch.head_dim
        per_group = joined.view(-1, (self.queries + 2) * d, *joined.shape[1:])
        return [p.flatten(0, 1) for p in per_group.split([self.queries * d, d, d], 1)]


def _feed_forward(prefix: str) -> dict[str, Rule]:
    gate_up = (f"{prefix}.gate_proj.weight", f"{prefix}.up_proj.weight")
    return {
        "linear_fc1": Rule(gate_up, 0, torch.cat, lambda joined: list(joined.chunk(2))),
        "linear_fc2": Rule((f"{prefix}.down_proj.weight",), 1),
    }


def named_parameters(modules: Sequence[nn.Module]) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters of a stage's model chunks under the names they have in the whole model.

    There, layers and experts are counted from 0 over all chunks, stages and expert ranks.
    """
    for module in modules:
        for name, parameter in module.named_parameters():
            if match := _LAYER.fullmatch(name):
                layer: Any = module.decoder.layers[int(match[1])]  # pyright: ignore[reportIndexIssue]
                name = f"decoder.layers.{layer.layer_number - 1}.{match[2]}"
                if expert := _expert(name):
                    name = with_expert(name, layer.mlp.local_expert_indices[int(expert[2])])
            yield name, parameter


def with_expert(name: str, expert: int) -> str:
    """The name of the same matrix of another expert."""
    match = _expert(name)
    if match is None:
        raise ValueError(f"{name} is no parameter of an expert")
    return f"{match[1]}{expert}{match[3]}"


def _expert(name: str) -> re.Match[str] | None:
    return next(filter(None, (pattern.fullmatch(name) for pattern in _EXPERTS)), None)
