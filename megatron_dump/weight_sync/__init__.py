"""Weights from the training ranks to generation engines: bucketed, versioned, under Hugging Face names.

`WeightSync.push(version)` is called by every rank after training; an engine's process iterates over `receive(link)`.
Neither side imports megatron or an engine's library.
"""

from __future__ import annotations

from megatron_dump.engine_options import WeightSyncOptions
from megatron_dump.weight_sync.receiving import receive
from megatron_dump.weight_sync.sync import WeightSync

__all__ = ["WeightSync", "WeightSyncOptions", "receive"]
