"""Hugging Face weights <-> this rank's Megatron parameters, at any tensor × pipeline layout.

One table says, for each Megatron parameter, which Hugging Face tensors it is made of, how they are joined into one
tensor and along which dimension tensor parallelism splits it. Layouts follow megatron-core: linear_qkv holds, per
key/value group, its query heads, its key and its value; linear_fc1 holds the gate and the up projection, each split
over ranks on its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from megatron_dump.actor.model import Architecture
from megatron_dump.actor.parallel import Parallel


@dataclasses.dataclass(frozen=True)
class Rule:
    """How one Megatron parameter is made of Hugging Face tensors."""

    hf_names: tuple[str, ...]
    dim: int | None  # dimension that tensor parallelism splits; None: every rank has the whole
    join: Callable[[list[Tensor]], Tensor] = lambda parts: parts[0]
    part: Callable[[Tensor], list[Tensor]] = lambda whole: [whole]
    blocks: int = 1  # the split is done inside each of this many equal blocks along `dim`

    def shard(self, whole: Tensor, rank: int, size: int) -> Tensor:
        if self.dim is None or size == 1:
            return whole
        blocks = whole.chunk(self.blocks, self.dim)
        return torch.cat([b.chunk(size, self.dim)[rank] for b in blocks], self.dim)

    def unshard(self, shards: list[Tensor]) -> Tensor:
        if self.dim is None or len(shards) == 1:
            return shards[0]
        blocks = zip(*(s.chunk(self.blocks, self.dim) for s in shards), strict=True)
        return torch.cat([torch.cat(b, self.dim) for b in blocks], self.dim)


class WeightMap:
    """The rules of one architecture."""

    def __init__(self, arch: Architecture) -> None:
        self.arch = arch
        hf = arch.hf
        self.groups = hf.num_key_value_heads
        self.queries = hf.num_attention_heads // self.groups  # query heads of a group

    def rule(self, name: str) -> Rule:
        """The rule of a parameter by its name in the whole model (`named_parameters` below)."""
        vocab = Rule(("model.embed_tokens.weight",), 0, self._pad_vocab, self._cut_vocab)
        if name == "embedding.word_embeddings.weight":
            return vocab
        if name == "output_layer.weight":
            return vocab if self.arch.tied else dataclasses.replace(vocab, hf_names=("lm_head.weight",))
        if name == "decoder.final_layernorm.weight":
            return Rule(("model.norm.weight",), None)
        match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name)
        if match is None:
            raise KeyError(f"Megatron parameter {name!r} has no Hugging Face counterpart")
        return self._layer_rule(f"model.layers.{match[1]}.", match[2])

    def _layer_rule(self, prefix: str, name: str) -> Rule:
        def names(*suffixes: str) -> tuple[str, ...]:
            return tuple(prefix + s for s in suffixes)

        kind = name.rsplit(".", 1)[-1]
        qkv = names(*(f"self_attn.{x}_proj.{kind}" for x in "qkv"))
        rules = {
            "input_layernorm.weight": Rule(names("input_layernorm.weight"), None),
            "pre_mlp_layernorm.weight": Rule(names("post_attention_layernorm.weight"), None),
            f"self_attention.linear_qkv.{kind}": Rule(qkv, 0, self._join_qkv, self._part_qkv),
            "self_attention.linear_proj.weight": Rule(names("self_attn.o_proj.weight"), 1),
            "self_attention.q_layernorm.weight": Rule(names("self_attn.q_norm.weight"), None),
            "self_attention.k_layernorm.weight": Rule(names("self_attn.k_norm.weight"), None),
            "mlp.linear_fc1.weight": Rule(
                names("mlp.gate_proj.weight", "mlp.up_proj.weight"), 0, torch.cat, lambda w: list(w.chunk(2)), blocks=2
            ),
            "mlp.linear_fc2.weight": Rule(names("mlp.down_proj.weight"), 1),
        }
        if name not in rules:
            raise KeyError(f"Megatron parameter {name!r} of {prefix} has no Hugging Face counterpart")
        return rules[name]

    def _join_qkv(self, parts: list[Tensor]) -> Tensor:
        per_group = [p.view(self.groups, -1, *p.shape[1:]) for p in parts]
        return torch.cat(per_group, 1).flatten(0, 1)

    def _part_qkv(self, whole: Tensor) -> list[Tensor]:
        d = self.arch.head_dim
        per_group = whole.view(self.groups, -1, *whole.shape[1:])
        return [p.flatten(0, 1) for p in per_group.split([self.queries * d, d, d], 1)]

    def _pad_vocab(self, parts: list[Tensor]) -> Tensor:
        whole = parts[0]
        missing = self.arch.padded_vocab_size - whole.size(0)
        return torch.cat([whole, whole.new_zeros(missing, whole.size(1))]) if missing else whole

    def _cut_vocab(self, whole: Tensor) -> list[Tensor]:
        return [whole[: self.arch.vocab_size]]


def named_parameters(modules: Sequence[nn.Module]) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters of a stage's model chunks under the names they have in the whole model."""
    for module in modules:
        for name, parameter in module.named_parameters():
            if match := re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name):
                name = f"decoder.layers.{module.decoder.layers[int(match[1])].layer_number - 1}.{match[2]}"
            yield name, parameter


class CheckpointReader:
    """Tensors of a Hugging Face folder by name, read from its safetensors files one at a time."""

    def __init__(self, path: str) -> None:
        self.path = pathlib.Path(path)
        index, single = self.path / "model.safetensors.index.json", self.path / "model.safetensors"
        if index.is_file():
            self.files: Mapping[str, str] = json.loads(index.read_text())["weight_map"]
        elif single.is_file():
            with self._open(single.name) as f:
                self.files = dict.fromkeys(f.keys(), single.name)
        else:
            raise FileNotFoundError(
                f"pretrained_checkpoint.restore_from_path={path}: no model.safetensors(.index.json) there"
            )

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.files:
            raise ValueError(
                f"pretrained_checkpoint.restore_from_path={self.path}: tensor {name} is missing; give a complete model"
            )
        with self._open(self.files[name]) as f:
            return f.get_tensor(name)

    @contextlib.contextmanager
    def _open(self, name: str) -> Iterator[Any]:
        try:
            with safe_open(self.path / name, "pt") as file:
                yield file
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"pretrained_checkpoint.restore_from_path={self.path}: {name} cannot be read ({error}); copy it again"
            ) from error


@torch.no_grad()
def load_hf(modules: Sequence[nn.Module], arch: Architecture, parallel: Parallel, path: str) -> None:
    """Fill this rank's parameters from a Hugging Face folder.

    Raises ValueError for a missing tensor, a wrong shape or an unreadable file, naming it.
    """
    reader, weights = CheckpointReader(path), WeightMap(arch)
    for name, parameter in named_parameters(modules):
        rule = weights.rule(name)
        whole = rule.join([reader[n] for n in rule.hf_names])
        shard = rule.shard(whole, parallel.tensor_rank, parallel.tensor_size)
        if shard.shape != parameter.shape:
            raise ValueError(
                f"{path}: {', '.join(rule.hf_names)} give shape {tuple(shard.shape)} for this rank's {name}, "
                f"which needs {tuple(parameter.shape)}"
            )
        parameter.copy_(shard)


@torch.no_grad()
def named_hf_weights(
    modules: Sequence[nn.Module], arch: Architecture, parallel: Parallel
) -> Iterator[tuple[str, Tensor]]:
    """This stage's weights under their Hugging Face names, gathered over tensor ranks one parameter at a time.

    A collective of the tensor group: all of its ranks iterate, all of them receive the tensors.
    """
    weights = WeightMap(arch)
    for name, parameter in named_parameters(modules):
        if name == "output_layer.weight" and arch.tied:
            continue
        rule = weights.rule(name)
        shards = [parameter.detach()]
        if rule.dim is not None and parallel.tensor_size > 1:
            shards = [torch.empty_like(parameter) for _ in range(parallel.tensor_size)]
            dist.all_gather(shards, parameter.detach().contiguous(), group=parallel.tensor_group)
        yield from zip(rule.hf_names, rule.part(rule.unshard(shards)), strict=True)


def save_hf(modules: Sequence[nn.Module], arch: Architecture, parallel: Parallel, path: str) -> None:
    """Write a Hugging Face folder (config and safetensors, one file a pipeline stage). A collective of all ranks."""
    folder, n = pathlib.Path(path), parallel.pipeline_size
    files = [f"model-{i + 1:05d}-of-{n:05d}.safetensors" for i in range(n)] if n > 1 else ["model.safetensors"]
    tensors = {k: v.cpu().contiguous().clone() for k, v in named_hf_weights(modules, arch, parallel)}
    if parallel.data_rank == 0 and parallel.tensor_rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / files[parallel.pipeline_rank], metadata={"format": "pt"})
    stages: list[tuple[list[str], int]] = [([], 0)] * n
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    dist.all_gather_object(stages, (list(tensors), size), group=parallel.pipeline_group)
    if parallel.rank == 0:
        arch.hf.save_pretrained(folder)
        if n > 1:
            weight_map = {name: files[i] for i, (names, _) in enumerate(stages) for name in names}
            index = {"metadata": {"total_size": sum(s for _, s in stages)}, "weight_map": weight_map}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1, sort_keys=True))
    dist.barrier()
