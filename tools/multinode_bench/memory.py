"""Bytes that a rank holds: parameters, gradients and optimizer as megatron-core lays them out, and activations.

The first three are exact (megatron-core 0.16.1; the parts of `MegatronGPTGRPOActor.memory_report`). Activations are
those of Korthikanti et al., 2205.05198, equations 1 to 4, for layers without dropout whose attention keeps no scores.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from multinode_bench.shape import Parameter, Shape

_BUCKET = 40_000_000  # elements, of megatron-core's buckets when the reduction is overlapped


@dataclasses.dataclass(frozen=True)
class Held:
    """Bytes of a rank's own."""

    parameters: int
    gradients: int
    optimizer: int
    reference: int  # on the host

    @property
    def device(self) -> int:
        return self.parameters + self.gradients + self.optimizer


def held(
    shape: Shape,
    stage: int,
    data_rank: int,
    data_size: int,
    element: int,
    distributed: bool = True,
    overlap: bool = False,
    reference: bool = True,
) -> Held:
    """Of a rank of a stage. data_rank and data_size count context-parallel ranks, too: they share the optimizer.

    Gradients are fp32; moments too, and master weights where `element` is 2 bytes. With experts split over ranks
    (expert_model_parallel_size > 1), `data_size` / expert ranks share the experts' optimizer.
    """
    gradients = moments = parameters = 0
    layout = shape.layout
    for chunk, whole in enumerate(shape.parameters(stage)):
        parameters += sum(parameter.size for parameter in whole)
        for expert in (False, True):
            mine = [parameter for parameter in whole if parameter.expert == expert]
            ranks, rank = data_size, data_rank
            if expert:
                ranks = data_size * layout.tensor // (layout.expert * layout.expert_tensor)
                rank = data_rank * layout.tensor // (layout.expert * layout.expert_tensor)
            bucket = max(_BUCKET, 1_000_000 * ranks) if overlap and stage == 0 and chunk == 0 else None
            total, own = _buffer(mine, rank, ranks, distributed, bucket)
            gradients += 4 * total
            moments += own
    state = 8 if element == 4 else 12
    return Held(element * parameters, gradients, state * moments, element * parameters if reference else 0)


def _buffer(
    parameters: Sequence[Parameter], rank: int, ranks: int, distributed: bool, bucket_size: int | None
) -> tuple[int, int]:
    """Elements of a gradient buffer, padding included, and of those parameters in it that the rank updates."""
    if not parameters:
        return 0, 0
    if not distributed:
        total = sum(parameter.size for parameter in parameters)
        return total, total
    end_unit, begin, position = math.lcm(ranks, 128), 0, 0
    places: list[tuple[int, int]] = []
    total = own = 0

    def close(end: int) -> int:
        nonlocal begin, own, total
        total = -(-end // end_unit) * end_unit
        share = (total - begin) // ranks
        low, high = begin + rank * share, begin + (rank + 1) * share
        own += sum(max(0, min(stop, high) - max(start, low)) for start, stop in places)
        places.clear()
        begin = total
        return total

    for parameter in reversed(parameters):
        position = -(-position // 64) * 64
        if parameter.shared and places:
            position = close(position)
        places.append((position, position + parameter.size))
        position += parameter.size
        if parameter.shared or (bucket_size is not None and position - begin >= bucket_size):
            position = close(position)
    if places:
        close(position)
    return total, own


def layer_activations(shape: Shape, tokens: float, element: int, layer: int = 0) -> float:
    """Bytes that a layer keeps of `tokens` tokens for its backward pass on a tensor rank.

    Equation 2 (with sequence parallelism 4) without its dropout masks and its 5as²b of the scores, with the widths of
    this model: four times the hidden states (both norms' inputs and outputs), queries, keys, values and the attention's
    output, the feed-forward's halves and their product.
    """
    layout, experts = shape.layout, shape.arch.experts
    width = shape.arch.hf.intermediate_size
    if experts is not None and experts.sparse[layer]:
        width = experts.per_token * experts.intermediate_size + (experts.shared_intermediate_size or 0)
    return (
        tokens
        / layout.context
        * element
        * _layer_elements(
            shape.arch.hf.hidden_size, shape.attention_width, shape.kv_width, 3 * width, layout.tensor, layout.sequence
        )
    )


def _layer_elements(hidden: int, attention: int, kv: int, feed_forward: int, tensor: int, sequence: bool) -> float:
    between = 4 * hidden / (tensor if sequence else 1)
    return between + (2 * attention + 2 * kv + feed_forward) / tensor


def activations(shape: Shape, tokens: float, sampled: float, micros: int, element: int, options: object) -> float:
    """Bytes on the first stage, which keeps most micro-batches, at the peak of an update.

    tokens: of a micro-batch; sampled: those of it that meet the output layer; `options`: `model:` of the YAML, for its
    recomputation. 1F1B keeps min(stages, micro-batches); an interleaved schedule 1 + (p-1)/(p v) as many layers as
    all stages have (section 4.2.3 of the paper). Full recomputation keeps layers' inputs, and one unit of layers.
    """
    layout = shape.layout
    stages, chunks = layout.pipeline, shape.chunks
    kept = min(stages, micros) if chunks == 1 else stages * (1 + (stages - 1) / (stages * chunks))
    layer = max(layer_activations(shape, tokens, element, i) for i in range(shape.layers))
    granularity = getattr(options, "recompute_granularity", None)
    layers = shape.layers_per_stage
    if granularity == "full":
        unit = getattr(options, "recompute_num_layers", None) or 1
        split = layout.context * (layout.tensor if layout.sequence else 1)
        inputs = tokens / split * shape.arch.hf.hidden_size * element
        if getattr(options, "recompute_method", None) == "block":
            body = kept * (unit * inputs + max(layers - unit, 0) * layer) + layer
        else:
            body = kept * math.ceil(layers / unit) * inputs + unit * layer
    else:  # selective recomputation leaves out the scores, which the fused attention does not keep either
        body = kept * layers * layer
    chunk = getattr(getattr(options, "grpo", None), "logprob_chunk_size", None) or sampled
    head = 2 * 4 * min(chunk, sampled) * shape.arch.padded_vocab_size / layout.tensor if stages == 1 else 0.0
    return body + head


def kv_cache(
    shape: Shape, rows: float, groups: float, prompt: float, response: float, tensor: int, layers: int, element: int
) -> float:
    """Bytes of keys and values when `rows` completions of `response` tokens stand behind the prompts of `groups`."""
    return 2 * shape.kv_width / tensor * layers * element * (groups * prompt + rows * response)
