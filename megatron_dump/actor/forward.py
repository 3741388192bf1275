"""Micro-batches through Megatron's schedules: one stage, pipeline (1F1B), or interleaved pipeline."""

from __future__ import annotations

import contextlib
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
from megatron_dump.actor.shared_prompts import SharedPrompts

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
    of this rank's positions of `MicroBatch.inputs` and returns the loss of the whole micro-batch, the same on all
    tensor and context ranks, and its report. An interleaved pipeline takes micro-batches of one shape.
    """

    def whole(hidden: Tensor) -> Tensor:
        if not parallel.layout.sequence:
            return hidden
        return gather_from_sequence_parallel_region(hidden, True, parallel.tensor_group)

    def forward_step(data: Iterator[MicroBatch], model: nn.Module) -> tuple[Tensor, Callable]:
        micro = next(data)
        held = context.positions(micro.inputs.size(1), parallel.context_group, micro.inputs.device)
        tokens, shared = micro.inputs[:, held], micro.shared
        with hidden_states_as_output(unwrap_model(model)), _placed(unwrap_model(model), shared):
            output = model(
                input_ids=tokens, position_ids=held.expand_as(tokens), attention_mask=None, packed_seq_params=shared
            )
        return output, lambda hidden: loss_of(whole(hidden), micro)

    rows, length = max((m.inputs.shape for m in micros), key=lambda shape: shape[1])
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


@contextlib.contextmanager
def _placed(model: nn.Module, shared: SharedPrompts | None) -> Iterator[None]:
    """Inside the block the model's tokens stand at their positions in their rollouts."""
    if shared is None:
        yield
        return
    model.rotary_pos_emb.place(shared.positions, shared.max_seqlen_q)
    try:
        yield
    finally:
        model.rotary_pos_emb.place(None)
