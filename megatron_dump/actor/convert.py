"""Hugging Face folder <-> this rank's Megatron parameters, at any layout, one tensor at a time.

`load_hf` reads what this rank needs of each tensor; `named_hf_weights` is the way weights leave the actor, and
`save_hf` writes them as a folder. All are collectives; a rank that fails does not leave the others waiting.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_dump.actor.architecture import Architecture
from megatron_dump.actor.hf_files import DERIVED, DTYPES, EMBEDDING, HEAD, HFTensors, some
from megatron_dump.actor.hf_output import OutputFolder, ShardWriter, parse_size, shard_name
from megatron_dump.actor.parallel import Parallel
from megatron_dump.actor.weight_map import Rule, WeightMap, named_parameters, with_expert
from megatron_dump.distributed import agree, all_gather_array, fail_together


@torch.no_grad()
def load_hf(
    modules: Sequence[nn.Module],
    arch: Architecture,
    parallel: Parallel,
    path: str,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Fill this rank's parameters from a Hugging Face folder. A collective of all ranks.

    on_progress: is given how many of this rank's parameters are done, and of how many.
    Raises ValueError on every rank, naming tensors and shapes, when tensors are missing, misshapen, quantised or
    unexpected, or a file cannot be read; RuntimeError when ranks see different folders.
    """
    what = f"pretrained_checkpoint.restore_from_path={path}"
    with _refused_together(what, parallel):
        source = _Source(HFTensors(path), modules, arch, parallel)
    agree(f"{what}: its list of tensors", source.folder.digest(), device=parallel.device)
    unexpected = source.unexpected()
    with _refused_together(what, parallel):
        source.check(unexpected)
        source.fill(on_progress)


@contextlib.contextmanager
def _refused_together(what: str, parallel: Parallel) -> Iterator[None]:
    """`fail_together` around what depends on the user's files alone: its error is a ValueError."""
    try:
        with fail_together(what, device=parallel.device):
            yield
    except RuntimeError as error:
        raise ValueError(str(error)) from error


class _Source:
    """A folder and what this rank wants of it."""

    def __init__(self, folder: HFTensors, modules: Sequence[nn.Module], arch: Architecture, parallel: Parallel) -> None:
        weights = WeightMap(arch)
        self.folder, self.arch, self.parallel = folder, arch, parallel
        self.wanted = [(parameter, weights.rule(name)) for name, parameter in named_parameters(modules)]

    def unexpected(self) -> list[str]:
        """The folder's tensors that no rank wants; the same on every rank. Collective."""
        names = sorted(self.folder.entries)
        own = {name for _, rule in self.wanted for name in self._names(rule)}
        wanted = np.any(all_gather_array(np.array([n in own for n in names], np.uint8), None, self.parallel.device), 0)
        return [n for n, is_wanted in zip(names, wanted, strict=True) if not is_wanted and not DERIVED.fullmatch(n)]

    def check(self, unexpected: list[str]) -> None:
        """ValueError naming what does not fit; reads no tensor."""
        missing, wrong = [], []
        for parameter, rule in self.wanted:
            _, size, _ = _place(rule, self.parallel)
            for name, shape in zip(rule.hf_names, rule.hf_shapes(parameter.shape, size), strict=True):
                entry = self.folder.entries.get(name)
                if entry is None:
                    missing.append(name)
                elif entry.shape != shape:
                    wrong.append(f"{name} has shape {list(entry.shape)}, config.json makes it {list(shape)}")
                elif entry.dtype not in DTYPES:
                    wrong.append(f"{name} is {entry.dtype}, not one of {', '.join(DTYPES)}")
        problems = list(wrong)
        if missing:
            problems.append(f"{len(missing)} tensors are missing: {some(missing)}")
        if unexpected:
            problems.append(f"{len(unexpected)} tensors are not part of the model: {some(unexpected)}")
        if problems:
            raise ValueError(f"{some(problems)}; give a folder whose tensors are those of its config.json")

    def fill(self, on_progress: Callable[[int, int], None]) -> None:
        """Read this rank's part of every parameter, file by file."""
        by_file = sorted(self.wanted, key=lambda item: self.folder.files_of(item[1].hf_names))
        for done, (parameter, rule) in enumerate(by_file):
            on_progress(done, len(by_file))
            names = self._names(rule)
            self.folder.open(self.folder.files_of(names))
            parts = [self._part(name, rule, parameter) for name in names]
            for name, copy in zip(names[len(rule.hf_names) :], parts[len(rule.hf_names) :], strict=True):
                if copy.dtype != parts[0].dtype or not torch.equal(copy, parts[0]):
                    raise ValueError(
                        f"{name} differs from {EMBEDDING}, but config.json ties them: set tie_word_embeddings to false"
                    )
            parameter.copy_(rule.join(parts[: len(rule.hf_names)]))
        self.folder.open([])

    def _names(self, rule: Rule) -> list[str]:
        """What filling a parameter reads; a tied model's embedding may have a copy, which must be one."""
        copied = self.arch.tied and rule.hf_names == (EMBEDDING,) and HEAD in self.folder.entries
        return [*rule.hf_names, *([HEAD] if copied else [])]

    def _part(self, name: str, rule: Rule, parameter: Tensor) -> Tensor:
        """This rank's part of a Hugging Face tensor, filled up with zeros where Megatron's is longer."""
        if rule.dim is None:
            return self.folder.read(name)
        rank, size, _ = _place(rule, self.parallel)
        length = self.folder.entries[name].shape[rule.dim]
        step = length // size if rule.length is None else parameter.size(rule.dim)
        part = self.folder.read(name, rule.dim, min(rank * step, length), min((rank + 1) * step, length))
        missing = step - part.size(rule.dim)
        return torch.cat([part, part.new_zeros(missing, *part.shape[1:])]) if missing else part


def _place(rule: Rule, parallel: Parallel) -> tuple[int, int, dist.ProcessGroup]:
    """Rank, size and group among the ranks that share a parameter."""
    if rule.expert is None:
        return parallel.tensor_rank, parallel.tensor_size, parallel.tensor_group
    return parallel.expert_tensor_rank, parallel.expert_tensor_size, parallel.expert_tensor_group


@torch.no_grad()
def named_hf_weights(
    modules: Sequence[nn.Module],
    arch: Architecture,
    parallel: Parallel,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[tuple[str, Tensor]]:
    """This stage's weights under their Hugging Face names, gathered over tensor and expert ranks one at a time.

    A collective of the stage's ranks: all iterate to the end, all receive every tensor. Tensors may be the parameters
    themselves: do not write to them. Beyond the parameters a rank holds at most two of the tensors. on_progress: as
    `load_hf`'s.
    """
    weights, parameters = WeightMap(arch), list(named_parameters(modules))
    for done, (name, parameter) in enumerate(parameters):
        on_progress(done, len(parameters))
        if name == "output_layer.weight" and arch.tied:
            continue
        rule = weights.rule(name)
        for i, part in enumerate(rule.part(parameter.detach())):
            tensor = _gather(part, rule, parallel)
            if rule.expert is None:
                yield rule.hf_names[i], tensor
                continue
            n_local = arch.hf.num_experts // parallel.expert_size
            for owner in range(parallel.expert_size):
                expert = rule.expert + (owner - parallel.expert_rank) * n_local
                yield weights.rule(with_expert(name, expert)).hf_names[i], _sent(tensor, owner, parallel)


def _gather(part: Tensor, rule: Rule, parallel: Parallel) -> Tensor:
    """The Hugging Face tensor of which this rank has a part."""
    _, size, group = _place(rule, parallel)
    if rule.dim is not None and size > 1:
        shards = part.new_empty((size, *part.shape))
        dist.all_gather_into_tensor(shards.flatten(0, 1), part.contiguous(), group=group)
        part = shards.flatten(0, 1) if rule.dim == 0 else torch.cat(list(shards), rule.dim)
    return part if rule.length is None else part[: rule.length]


def _sent(tensor: Tensor, owner: int, parallel: Parallel) -> Tensor:
    """The tensor of one of the ranks that hold different experts."""
    if parallel.expert_size == 1:
        return tensor
    tensor = tensor.contiguous() if owner == parallel.expert_rank else torch.empty_like(tensor)
    dist.broadcast(tensor, dist.get_global_rank(parallel.expert_group, owner), group=parallel.expert_group)
    return tensor


def save_hf(
    modules: Sequence[nn.Module],
    arch: Architecture,
    parallel: Parallel,
    path: str,
    *,
    source: str | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    replace: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write a Hugging Face folder that transformers and vLLM load. A collective of all ranks.

    source: the folder the policy started from. Its config.json, generation_config.json and tokenizer are copied, each
    tensor gets its dtype there, and the saved tensors must be its tensors by name and shape. Without it: config.json is
    written anew, with the dtype it names.
    dtype: of every tensor instead; a policy trained in fp32 from a bf16 folder is otherwise rounded to bf16 again.
    max_shard_size: of one file, as transformers writes it (5GB = 5 * 10**9 bytes); a rank holds one file's tensors.
    on_progress: of `named_hf_weights`.

    Each pipeline stage's first rank writes its stage's files. The folder appears under its name when it is complete; an
    existing one is refused, or with `replace` exchanged at the end. RuntimeError on every rank when one fails.
    """
    what, output = f"saving {path}", OutputFolder(path, arch, source, dtype, replace)
    chain = dist.get_process_group_ranks(parallel.pipeline_group)  # the first rank of each stage, on those ranks
    leads, writes = parallel.rank == 0, 0 in chain
    try:
        with fail_together(what, device=parallel.device):
            stem = f"stage-{parallel.pipeline_rank:05d}"
            writer = ShardWriter(output.folder.partial, stem, parse_size(max_shard_size))
            if writes:
                output.read_source()
            if leads:
                output.folder.prepare()
        failure = _write(writer, output, named_hf_weights(modules, arch, parallel, on_progress), writes)
        with fail_together(what, device=parallel.device):
            if failure is not None:
                raise failure
            writer.flush()
        counts = all_gather_array(np.array([writer.n_files]), None, parallel.device)[:, 0].tolist()
        with fail_together(what, device=parallel.device):
            if leads:
                stages = [(f"stage-{stage:05d}", counts[rank]) for stage, rank in enumerate(chain)]
                output.finish([shard_name(stem, i) for stem, n in stages for i in range(n)])
    except Exception:
        if leads:
            output.folder.discard()
        raise


def _write(
    writer: ShardWriter, output: OutputFolder, weights: Iterator[tuple[str, Tensor]], writes: bool
) -> Exception | None:
    """Take part in gathering all weights and write them; what went wrong, if anything did.

    A rank that cannot write goes on taking part: the others wait for it in every collective.
    """
    failure = None
    for name, tensor in weights:
        if writes and failure is None:
            try:
                writer.add(name, tensor, output.dtype_of(name, tensor.dtype))
            except Exception as error:  # noqa: BLE001 - raised by the caller, on every rank
                failure = error
    return failure
