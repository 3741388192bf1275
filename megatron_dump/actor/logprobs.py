"""Log-probabilities and entropy from the last hidden states, chunk by chunk: the logits never exist as a whole."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from torch import Tensor


@contextlib.contextmanager
def hidden_states_as_output(model: GPTModel) -> Iterator[None]:
    """Inside the block the model's last stage returns what its output layer would read: [S, B, H], normalised.

    The output layer is still called, so that hooks on it run (Megatron's DDP waits in one for gathered parameters).
    Other stages are left alone.
    """
    if not model.post_process:
        yield
        return

    def hand_through(hidden: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        return hidden.transpose(0, 1), None  # GPTModel turns its output from [S, B, …] to [B, S, …]: here back again

    model.output_layer.forward = hand_through
    try:
        yield
    finally:
        del model.output_layer.forward  # the class's own shows again


def output_weight(model: GPTModel) -> Tensor:
    """The weight [V / tensor-parallel size, H] of the last stage's output layer, wherever a tied model keeps it."""
    tied = model.share_embeddings_and_output_weights
    return model.shared_embedding_or_output_weight() if tied else model.output_layer.weight


@dataclasses.dataclass(frozen=True)
class VocabularyShard:
    """How one tensor-parallel rank computes its part of the softmax."""

    group: dist.ProcessGroup
    first: int  # token id of the first column
    columns: int  # columns that are vocabulary; those behind are padding of the embedding
    temperature: float
    chunk_size: int | None
    reduce_hidden_grad: bool

    def logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """[N, columns], at least float32; the matmul is done in the inputs' type."""
        product = hidden @ weight[: self.columns].t()
        logits = product.to(_precise(product.dtype))
        return logits if self.temperature == 1.0 else logits.div_(self.temperature)

    def chunks(self, n: int) -> list[slice]:
        size = self.chunk_size or max(n, 1)
        return [slice(i, min(i + size, n)) for i in range(0, n, size)]

    def local(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Column of each target here, clamped to those there are, and whether the target is here at all."""
        local = targets - self.first
        return local.clamp(0, max(self.columns - 1, 0)), (local >= 0) & (local < self.columns)


class _HiddenLogprobs(torch.autograd.Function):
    """(hidden [N, H], weight [V, H], targets [N]) -> (log-probabilities [N], entropy [N]).

    With z the logits, p their softmax and L = log sum exp z:  logp_y = z_y - L,  H = L - sum p z, hence
    d logp_y / d z_j = [j = y] - p_j  and  d H / d z_j = -p_j (log p_j + H).
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, shard: VocabularyShard):  # pyright: ignore
        n, chunks = len(hidden), shard.chunks(len(hidden))
        parts = torch.zeros(4, n, dtype=_precise(hidden.dtype), device=hidden.device)  # peak, total, mean, chosen
        parts[0] = torch.finfo(parts.dtype).min
        exponentials = None
        for rows in chunks if shard.columns else ():
            logits = shard.logits(hidden[rows], weight)
            column, mine = shard.local(targets[rows])
            peak = logits.amax(-1)
            chosen = logits.gather(-1, column[:, None])[:, 0] * mine
            logits.sub_(peak[:, None])
            exponentials = logits.exp()
            # relative to this rank's own peak: no rank need know another's before the end
            mean = torch.bmm(exponentials[:, None], logits[:, :, None])[:, 0, 0]
            parts[:, rows] = torch.stack([peak, exponentials.sum(-1), mean, chosen])
        peak = parts[0].clone()
        log_total, entropy, chosen = _combine(parts, shard.group)
        kept = None
        if len(chunks) == 1 and exponentials is not None and any(ctx.needs_input_grad):
            kept = exponentials.mul_((peak - log_total).exp()[:, None])  # the only chunk's probabilities
        ctx.shard = shard
        ctx.save_for_backward(hidden, weight, targets, log_total, entropy, kept)
        ctx.set_materialize_grads(False)
        return chosen - log_total, entropy

    @staticmethod
    def backward(ctx: Any, d_logprobs: Tensor | None, d_entropy: Tensor | None):  # pyright: ignore
        hidden, weight, targets, log_total, entropy, kept = ctx.saved_tensors
        shard: VocabularyShard = ctx.shard
        d_hidden = torch.zeros_like(hidden)
        d_weight = torch.zeros_like(weight, dtype=log_total.dtype)
        for rows in shard.chunks(len(hidden)) if shard.columns else ():
            p = kept
            if p is None:
                p = shard.logits(hidden[rows], weight).sub_(log_total[rows, None]).exp_()
            d_logits = _d_logits(p, d_logprobs, d_entropy, entropy, targets, rows, shard).to(hidden.dtype)
            torch.mm(d_logits, weight[: shard.columns], out=d_hidden[rows])
            if d_weight.dtype == d_logits.dtype:
                d_weight[: shard.columns].addmm_(d_logits.t(), hidden[rows])
            else:
                d_weight[: shard.columns] += d_logits.t() @ hidden[rows]
        if shard.reduce_hidden_grad and dist.get_world_size(shard.group) > 1 and len(hidden):
            dist.all_reduce(d_hidden, group=shard.group)
        return d_hidden, d_weight.to(weight.dtype), None, None


def _combine(parts: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    """log sum exp, entropy and the targets' logits over all ranks from each rank's [4, N]: one collective."""
    ranks = [parts]
    if dist.get_world_size(group) > 1 and parts.numel():
        ranks = [torch.empty_like(parts) for _ in range(dist.get_world_size(group))]
        dist.all_gather(ranks, parts, group=group)
    peaks, totals, means, chosen = torch.stack(ranks, 1)  # [ranks, N] each
    peak = peaks.amax(0)
    shift = peaks - peak
    scale = shift.exp()
    total = (totals * scale).sum(0)
    mean = ((means + shift * totals) * scale).sum(0) / total  # of the logits, relative to the peak
    log_total = total.log()
    return peak + log_total, log_total - mean, chosen.sum(0)


def _d_logits(
    p: Tensor,
    d_logprobs: Tensor | None,
    d_entropy: Tensor | None,
    entropy: Tensor,
    targets: Tensor,
    rows: slice,
    shard: VocabularyShard,
) -> Tensor:
    """The gradient to a chunk's undivided logits, from its probabilities."""
    common = torch.zeros_like(entropy[rows])
    if d_logprobs is not None:
        common -= d_logprobs[rows]
    if d_entropy is not None:
        common -= d_entropy[rows] * entropy[rows]
    grad = p * common[:, None]
    if d_entropy is not None:
        grad.addcmul_(torch.special.entr(p), d_entropy[rows, None])  # entr(p) = -p log p, 0 at 0
    if d_logprobs is not None:
        column, mine = shard.local(targets[rows])
        grad.scatter_add_(-1, column[:, None], (d_logprobs[rows] * mine)[:, None])
    return grad if shard.temperature == 1.0 else grad.div_(shard.temperature)


def _precise(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def hidden_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    group: dist.ProcessGroup,
    tensor_rank: int,
    vocab_size: int,
    temperature: float = 1.0,
    chunk_size: int | None = None,
    reduce_hidden_grad: bool = True,
) -> tuple[Tensor, Tensor]:
    """log softmax(hidden weight^T / temperature) at `targets`, and the entropy of that distribution; differentiable.

    hidden [..., H], targets int64 [...]; weight [V / tensor-parallel size, H], this rank's part of the vocabulary: rows
    at or above `vocab_size` are padding. Returns [...] twice, in float32 (float64 for float64 inputs).

    `chunk_size` tokens at a time: no tensor is larger than chunk_size × V / tensor-parallel size, and the backward pass
    computes each chunk's logits again unless there is one chunk only. None: one chunk.

    Every rank of `group` passes the same hidden states. The gradient to them is the sum over the ranks
    (`reduce_hidden_grad`), or, with False, this rank's part of it: for hidden states gathered by
    gather_from_sequence_parallel_region(…, tensor_parallel_output_grad=True), whose backward pass adds the parts up.
    The weight's gradient is accumulated in float32 over chunks and returned in the weight's type.
    """
    first = tensor_rank * len(weight)
    columns = min(max(vocab_size - first, 0), len(weight))
    shard = VocabularyShard(group, first, columns, temperature, chunk_size, reduce_hidden_grad)
    logprobs, entropy = _HiddenLogprobs.apply(hidden.flatten(0, -2), weight, targets.flatten(), shard)  # pyright: ignore
    return logprobs.view(targets.shape), entropy.view(targets.shape)
