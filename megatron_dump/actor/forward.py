"""Micro-batches through Megatron's schedules: one stage, pipeline (1F1B), or interleaved pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.utils import unwrap_model
from torch import Tensor, nn

from megatron_dump.actor import context
from megatron_dump.actor.batching import MicroBatch
from megatron_dump.actor.logprobs import hidden_states_as_output
from megatron_dump.actor.parallel import Parallel

LossOf = Callable[[Tensor, MicroBatch], tuple[Tensor, dict[str, Any]]]


def run_schedule(
    models: Sequence[nn.Module],
    parallel: Parallel,
    micros: Sequence[MicroBatch],
    loss_of: LossOf,
    forward_only: bool,
) -> list[dict[str, Any]]:
    """What `loss_of` reported of each micro-batch, on the last stage; an empty list on the others.

    `models` are the chunks of this stage. `loss_of` is given the last hidden states [S / context-parallel size, B, H]
    of this rank's positions of the sequence and returns the loss of the whole micro-batch, the same on all tensor and
    context ranks, and its report. An interleaved pipeline takes micro-batches of one shape.
    """

    def whole(hidden: Tensor) -> Tensor:
        if not parallel.layout.sequence:
            return hidden
        return gather_from_sequence_parallel_region(hidden, True, parallel.tensor_group)

    def forward_step(data: Iterator[MicroBatch], model: nn.Module) -> tuple[Tensor, Callable]:
        micro = next(data)
        held = context.positions(micro.tokens.size(1), parallel.context_group, micro.tokens.device)
        tokens = micro.tokens[:, held]
        with hidden_states_as_output(unwrap_model(model)):
            output = model(input_ids=tokens, position_ids=held.expand_as(tokens), attention_mask=None)
        return output, lambda hidden: loss_of(whole(hidden), micro)

    rows, length = max((m.tokens.shape for m in micros), key=lambda shape: shape[1])
    interleaved = len(models) > 1
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(micros) for _ in models] if interleaved else iter(micros),
        model=list(models) if interleaved else models[0],
        num_microbatches=len(micros),
        seq_length=length,
        micro_batch_size=rows,
        decoder_seq_length=length,
        forward_only=forward_only,
    )
