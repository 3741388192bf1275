"""The engine's end of a stream of weights; imports torch and numpy only."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from megatron_dump.weight_sync import broadcast_receiver, shared_receiver

_TRANSPORTS = {"shared_memory": shared_receiver.receive, "broadcast": broadcast_receiver.receive}


def receive(link: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The weights that come through `link`, one (Hugging Face name, tensor) at a time, to be consumed to the end.

    Tensors lie in the host's memory, or on the current CUDA device when the link's process group is nccl's. They may be
    kept, which costs their memory, but not written to. Memory held besides: two buckets.

    Raises ConnectionError when the sender dies or gives up (with its message), TimeoutError when nothing comes for the
    link's `timeout_s`, ValueError when checksums are sent and a tensor's differs.
    """
    transport = link.get("transport")
    if transport not in _TRANSPORTS:
        raise ValueError(f"weight_sync link: transport={transport!r} is not one of {', '.join(_TRANSPORTS)}")
    return _TRANSPORTS[transport](link)
